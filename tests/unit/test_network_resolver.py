"""The resolver's answers, and how the gate parses them."""

from __future__ import annotations

import socket
import threading
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.network.resolver import (
    ADDRESSES_MAX,
    ANSWER_MAX,
    FAILED,
    FOUND,
    NO_NAME,
    NUMBER,
    REQUEST_MAX,
    decode_answer,
    encode_answer,
    hosts_file_addresses,
    look_up,
    serve,
)

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.network.hosts import Address

ADDRESSES: Final = st.lists(st.ip_addresses(), max_size=ADDRESSES_MAX + 4)


@given(st.integers(0, 2**32 - 1), st.sampled_from([FOUND, NO_NAME, FAILED]), ADDRESSES)
def test_an_answer_is_read_as_it_was_written(number: int, status: int, addresses: list[Address]) -> None:
    """Number, status and the first 16 addresses survive encoding and decoding."""
    data = encode_answer(number, status, addresses)
    assert len(data) <= ANSWER_MAX
    assert decode_answer(data) == (number, status, addresses[:ADDRESSES_MAX])


WHOLE: Final = encode_answer(7, FOUND, [IPv4Address("93.184.215.14"), IPv6Address("2606:4700::1")])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\7",
        b"\0\0\0\7\3",
        b"\0\0\0\7\xff",
        WHOLE[:-1],
        WHOLE[:8],
        WHOLE + b"\4",
        WHOLE + b"\5\1\2\3\4",
        WHOLE + b"\0",
        encode_answer(7, FOUND, [IPv6Address(1)] * ADDRESSES_MAX) + b"\4\1\2\3\4",
    ],
)
def test_a_malformed_answer_is_an_error(data: bytes) -> None:
    """A malformed answer is an error."""
    with pytest.raises(ValueError, match="not an"):
        decode_answer(data)


@given(st.binary(max_size=ANSWER_MAX + 10))
def test_any_bytes_are_an_answer_or_an_error(data: bytes) -> None:
    """Any bytes from the resolver give a bounded answer or ValueError."""
    try:
        _, status, addresses = decode_answer(data)
    except ValueError:
        return
    assert status in {FOUND, NO_NAME, FAILED}
    assert len(addresses) <= (ANSWER_MAX - NUMBER.size - 1) // 5
    assert all(isinstance(address, IPv4Address | IPv6Address) for address in addresses)


def test_each_address_is_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each address is returned once, and only IPv6 addresses of ipv4only.arpa are asked for."""
    asked: list[tuple[object, ...]] = []

    def host_s(name: bytes, *args: object, **_: object) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
        asked.append((name, *args))
        texts = ("93.184.215.14", "2606:4700::1", "93.184.215.14", "fe80::1%eth0", "93.184.215.13")
        families = [socket.AF_INET6 if ":" in text else socket.AF_INET for text in texts]
        return [(family, 1, 6, "", (text, 0)) for family, text in zip(families, texts, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", host_s)
    found = [ip_address(text) for text in ("93.184.215.14", "2606:4700::1", "fe80::1", "93.184.215.13")]
    assert look_up("a.example") == (FOUND, found)
    assert look_up("ipv4only.arpa") == (FOUND, found)
    assert [family for _, _, family, _ in asked] == [socket.AF_UNSPEC, socket.AF_INET6]


def test_names_of_the_hosts_file_are_found(tmp_path: Path) -> None:
    """A line of the hosts file gives all its names an address, in any case, and comments give none."""
    path = tmp_path / "hosts"
    assert hosts_file_addresses("a.example", path) == []
    path.write_bytes(b"10.0.0.1 A.example b.example # c.example\n\n#10.0.0.2 a.example\nfe80::1%eth0\ta.example\n")
    with path.open("ab") as file:
        file.write(b"wrong a.example\n10.0.0.1 a.example\n\xff\xfe a.example\n10.0.0.3 xa.example a.example.org\n")
    assert hosts_file_addresses("a.example", path) == [ip_address("10.0.0.1"), ip_address("fe80::1")]
    assert hosts_file_addresses("b.example", path) == [ip_address("10.0.0.1")]
    assert hosts_file_addresses("c.example", path) == []
    assert hosts_file_addresses("10.0.0.1", path) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), NO_NAME),
        (socket.gaierror(socket.EAI_AGAIN, "x"), FAILED),
        (socket.gaierror(socket.EAI_FAIL, "x"), FAILED),
        (OSError(24, "Too many open files"), FAILED),
    ],
)
def test_missing_names_and_failures_differ(error: OSError, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing name and a failing resolver have different statuses."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    assert look_up("a.example") == (status, [])


def test_requests_are_answered_by_number_until_the_gate_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets one answer with its number, and the resolver ends with the gate."""

    def host_s(name: bytes, *_: object, **__: object) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
        return [(socket.AF_INET, 1, 6, "", (f"93.184.215.{name[1:2].decode()}", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", host_s)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(60)
        thread = threading.Thread(target=serve, args=(theirs,))
        thread.start()
        numbers = [1, 2, 77, 2**32 - 1, *range(100, 120)]
        for number in numbers:
            ours.send(NUMBER.pack(number) + b"n%d.example" % (number % 10))
        answers = [decode_answer(ours.recv(ANSWER_MAX + 1)) for _ in numbers]
        assert {number: found for number, _, found in answers} == {
            number: [ip_address(f"93.184.215.{number % 10}")] for number in numbers
        }
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        assert not thread.is_alive()
    assert NUMBER.size + 253 == REQUEST_MAX
