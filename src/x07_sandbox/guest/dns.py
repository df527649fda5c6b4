"""DNS server for programs in the guest: bytes in, bytes out. No query leaves the guest.

The server knows only the names that the policy lists. Each has a synthetic IPv4 address. The relay translates the
address back to the name (`NameTable.host_at`), and the host decides whether that name may be reached.

It is a minimal server: UDP only, no EDNS, no reverse lookups. Every answer fits into the 512 bytes that any client
accepts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from socket import AF_INET, inet_ntop, inet_pton
from typing import Final

from x07_sandbox.channel import egress
from x07_sandbox.guest.audit import Denials, Refusal
from x07_sandbox.guest.system import own_network_kept

TTL_S: Final = 30
OWN_NAME: Final = "x07"  # host/settings.GUEST_HOSTNAME

_HEADER: Final = struct.Struct(">HHHHHH")  # id, flags, record counts: question, answer, authority, additional
_QUESTION: Final = struct.Struct(">HH")  # type, class
_RECORD: Final = struct.Struct(">HHIH")  # type, class, TTL, data length

_QR, _OPCODE, _RD, _RA = 0x8000, 0x7800, 0x0100, 0x0080
_NOERROR, _FORMERR, _NXDOMAIN, _NOTIMP, REFUSED = 0, 1, 3, 4, 5
_A, _SOA, _AAAA = 1, 6, 28
_IN: Final = 1

_WIRE_NAME_MAX: Final = 255  # bytes, with length bytes and the root: 253 characters
_LABEL_MAX: Final = 63
_LABEL_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_NAME_OF_QUESTION: Final = b"\xc0\x0c"  # a pointer to offset 12

# The root owns it, since clients only accept an SOA above the name. Server, mailbox, serial, three timers, and the TTL
# of negative answers.
_SOA_DATA: Final = b"\0\0" + struct.pack(">5I", 1, TTL_S, TTL_S, TTL_S, TTL_S)
_SOA_RECORD: Final = b"\0" + _RECORD.pack(_SOA, _IN, TTL_S, len(_SOA_DATA)) + _SOA_DATA

_LOCALHOST: Final = {_A: inet_pton(AF_INET, "127.0.0.1"), _AAAA: bytes(15) + b"\x01"}

RESOLV_CONF: Final = f"nameserver {egress.DNS}\noptions attempts:1\n"
_PORT: Final = 53
QUERY_MAX: Final = 4096
_QUERIES: Final = 64  # answered in one turn of the agent


class NameTable:
    """Synthetic IPv4 addresses of the names that a policy lists.

    exact: address by name. wildcards: by suffix, the first of 256 addresses for names below it; the first and last of
    these addresses stay unused. Names are lower case, without a trailing dot.
    on_unlisted: called with an unlisted name, other than the guest's own, whose IPv4 address was requested.
    unlisted: the response code for such names.
    Raises OSError for an invalid address.
    """

    def __init__(self, exact: dict[str, str], wildcards: list[tuple[str, str]]) -> None:
        for address in exact.values():
            inet_pton(AF_INET, address)
        self._addresses = dict(exact)
        self._hosts = {address: name for name, address in exact.items()}
        firsts = {suffix: int.from_bytes(inet_pton(AF_INET, first), "big") for suffix, first in wildcards}
        self._unused = {suffix: iter(range(first + 1, first + 255)) for suffix, first in firsts.items()}
        self.on_unlisted: Callable[[str], object] = lambda _name: None
        self.unlisted = _NXDOMAIN

    def address_of(self, name: str) -> str | None:
        """Return the address of a name. Return None if the name is unlisted or its wildcard has no addresses left."""
        return self._addresses.get(name) or self._assign(name)

    def host_at(self, address: str) -> str | None:
        """Return the name that an address is assigned to."""
        return self._hosts.get(address)

    def _assign(self, name: str) -> str | None:
        if not _is_valid(name):
            return None
        suffix = name
        while suffix := suffix.partition(".")[2]:  # the longest suffix first
            if (unused := self._unused.get(suffix)) is None:
                continue
            if (number := next(unused, None)) is None:
                return None
            address = inet_ntop(AF_INET, number.to_bytes(4, "big"))
            self._addresses[name] = address
            self._hosts[address] = name
            return address
        return None


def answer(query: bytes, names: NameTable) -> bytes | None:
    """Return the answer to one DNS message, or None if the message must be dropped."""
    if len(query) < _HEADER.size:
        return None
    ident, flags, question_count, *_ = _HEADER.unpack_from(query)
    if flags & _QR:
        return None
    question, record, code = b"", b"", _NOTIMP
    if not flags & _OPCODE:
        labels = _labels(query)
        name_size = sum(len(label) + 1 for label in labels or ()) + 1
        end = _HEADER.size + name_size + _QUESTION.size
        if question_count != 1 or labels is None or end > len(query):
            code = _FORMERR
        else:
            question = query[_HEADER.size : end]  # byte for byte: clients check its random upper and lower case
            kind, in_class = _QUESTION.unpack_from(query, end - _QUESTION.size)
            code, record = _look_up(labels, kind, in_class, names)
    negative = not record and code in {_NOERROR, _NXDOMAIN}
    header = _HEADER.pack(ident, flags & (_OPCODE | _RD) | _QR | _RA | code, bool(question), bool(record), negative, 0)
    return header + question + record + (_SOA_RECORD if negative else b"")


class NoNetwork:
    """The server of programs without a network. It refuses every name and counts them.

    The C library then reports the same error as without any server ("Temporary failure in name resolution"), and the
    session can say which names the program looked up. It is in the network namespace of programs. *fd* is readable when
    `serve` has queries to answer.
    """

    def __init__(self, netns_fd: int) -> None:
        """Open the socket. Raises OSError."""
        self._denials = Denials()
        self._names = NameTable({}, [])
        self._names.unlisted, self._names.on_unlisted = REFUSED, self._count
        with own_network_kept():
            os.setns(netns_fd, os.CLONE_NEWNET)
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.bind((egress.DNS, _PORT))
        self.fd = self._socket.fileno()

    def serve(self) -> None:
        """Answer queries that have arrived."""
        with contextlib.suppress(OSError):
            for _ in range(_QUERIES):
                query, source = self._socket.recvfrom(QUERY_MAX)
                if (reply := answer(query, self._names)) is not None:
                    self._socket.sendto(reply, source)

    def take(self) -> tuple[dict[Refusal, int], int]:
        """Return and forget how often each name was looked up, and how many lookups that does not include."""
        denials, self._denials = self._denials, Denials()
        return denials.found, denials.uncounted

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _count(self, name: str) -> None:
        self._denials.count(Refusal("network", "lookup", 0, name, write=False))


def _look_up(labels: list[bytes], kind: int, in_class: int, names: NameTable) -> tuple[int, bytes]:
    """Return the response code, and the record of type *kind*, which is empty if there is none."""
    if any(label.translate(None, _LABEL_BYTES) for label in labels):
        return _FORMERR, b""
    if in_class != _IN:
        return REFUSED, b""
    name = b".".join(labels).decode("ascii").lower()
    data: bytes | None = None
    if labels[-1:] and labels[-1].lower() == b"localhost":
        data = _LOCALHOST.get(kind)
    else:
        # Any type assigns the address of a wildcard's name: a name that exists for one type exists for all.
        address = names.address_of(name)
        if address is None:
            if kind == _A and name != OWN_NAME:
                names.on_unlisted(name)
            return names.unlisted, b""
        data = inet_pton(AF_INET, address) if kind == _A else None
    if data is None:
        return _NOERROR, b""
    return _NOERROR, _NAME_OF_QUESTION + _RECORD.pack(kind, _IN, TTL_S, len(data)) + data


def _labels(query: bytes) -> list[bytes] | None:
    """Return the labels of the first question's name, or None if the name is malformed or compressed."""
    labels: list[bytes] = []
    at, stop = _HEADER.size, min(len(query), _HEADER.size + _WIRE_NAME_MAX)
    while at < stop:
        size = query[at]
        if not size:
            return labels
        if size > _LABEL_MAX:
            return None
        labels.append(query[at + 1 : at + 1 + size])
        at += 1 + size
    return None


def _is_valid(name: str) -> bool:
    labels = name.split(".")
    return (
        name.isascii()
        and len(name) + 2 <= _WIRE_NAME_MAX
        and all(0 < len(label) <= _LABEL_MAX for label in labels)
        and not name.encode("ascii").translate(None, _LABEL_BYTES + b".")
    )
