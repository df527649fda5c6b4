"""Fuzz target: the inspection of a connection's first bytes, on a TLS port or a port of any protocol.

An input is a byte of switches and the client's bytes:

    bit 7        1: the mode is "any"; 0: "tls"
    bit 6        1: the connection is for a literal address; 0: for NAME
    bits 0 to 5  N cuts the bytes into pieces of N + 1 bytes

Invariants:

* only bytes or InspectionError come out, and after an InspectionError always the same one;
* the verdict, the name and the forwarded bytes do not depend on the cut;
* forwarded and held bytes together are the received bytes, unless a request was rewritten;
* on a TLS port nothing passes before a ClientHello that names NAME;
* at most HELD_MAX bytes and one read are held.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from tests.fuzz.differential.case import GOOD
from tests.fuzz.differential.corpus import CORPUS, PREFACE
from tests.fuzz.tls import body, extension, hello, message, records, sni
from x07_sandbox.network.first_bytes import HELD_MAX, Inspector
from x07_sandbox.network.protocols import InspectionError

if TYPE_CHECKING:
    from x07_sandbox.network.first_bytes import Mode
    from x07_sandbox.network.hosts import Host

NAME: Final = "a.example"
ADDRESS: Final = IPv4Address("192.0.2.7")
DENIED: Final = "denied.example"
TLS_ANSWER: Final = b"\x16\x03\x03"
LONGEST: Final = 4000  # of a seed: the fuzzer takes no longer inputs


class Verdict(NamedTuple):
    """The verdict on some bytes. rule: "" if they passed."""

    forwarded: bytes
    rule: str
    reason: str
    inspected: Inspector


def pieces(data: bytes, size: int) -> list[bytes]:
    """Return the bytes in pieces."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def denied(name: str) -> str | None:
    """Return why a name is denied."""
    return "a rule says so" if name == DENIED else None


def run(mode: Mode, host: Host, parts: list[bytes], answer: bytes = TLS_ANSWER, port: int = 80) -> Verdict:
    """Feed the parts and their end to an inspector. The server answers the first message."""
    inspected = Inspector(mode, host, port, denied)
    out = b""
    try:
        for part in parts:
            out += inspected.from_client(part)
            assert inspected.held <= HELD_MAX + len(part)
            while inspected.decided and inspected.watches_server and answer:
                inspected.from_server(answer)
                out += inspected.from_client(b"")
        inspected.client_eof()
        out += inspected.from_client(b"")
    except InspectionError as exc:
        assert not inspected.transparent
        check_sticky(inspected, exc)
        return Verdict(out, exc.rule, exc.reason, inspected)
    return Verdict(out, "", "", inspected)


def check_sticky(inspected: Inspector, error: InspectionError) -> None:
    """Check that after an error every call raises it again."""
    assert error.reason.isascii()
    assert error.reason.isprintable()
    for call in (lambda: inspected.from_client(b"x"), lambda: inspected.from_server(b"x"), inspected.client_eof):
        again: InspectionError | None = None
        try:
            call()
        except InspectionError as exc:
            again = exc
        assert again is error, "the inspector came back to life"


def corpus() -> dict[str, bytes]:
    """Return the client's bytes of all cases of the differential fuzzer, for our host in place of theirs."""
    joined = {case.name: b"".join(filter(None, case.steps)).replace(GOOD, NAME.encode()) for case in CORPUS}
    return {name: data for name, data in joined.items() if len(data) <= LONGEST}


def seeds() -> dict[str, bytes]:
    """Return first bytes of connections: ClientHellos, and what the differential fuzzer knows of other protocols."""
    tls, literal, anything = b"\x06", b"\x46", b"\x83"
    good = sni(NAME.encode())
    versions = extension(43, b"\x02\x03\x04")
    hellos = {
        "good": hello(good, versions) + b"\x17\x03\x03\x00\x01x",
        "small-records": records(message(body(good)), 1),
        "upper-case": hello(sni(b"A.EXAMPLE.")),
        "no-extensions": records(message(body()[:-2])),
        "two-names": hello(sni(NAME.encode(), b"b.example")),
        "two-extensions": hello(good, good),
        "ech": hello(good, extension(0xFE0D, bytes(8))),
        "too-large": records(b"\x01\xff\xff\xff" + bytes(9)),
        "trailing": records(message(body(good) + b"x")),
        "alert": records(message(body(good)), 9)[:14] + b"\x15\x03\x01\x00\x02\x01\x00",
    }
    return {
        **{name: tls + data for name, data in hellos.items()},
        **{f"any-{name}": anything + data for name, data in corpus().items()},
        "any-http2": anything + PREFACE,
        "any-postgres": anything + bytes.fromhex("0000000804d21630 0000000804d2162f") + hello(good),
        "literal": literal + hello(sni(DENIED.encode())),
        "literal-address": literal + hello(sni(b"192.0.2.7")),
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if not data:
        return
    mode: Literal["tls", "any"] = "any" if data[0] & 0x80 else "tls"
    host = ADDRESS if data[0] & 0x40 else NAME
    stream = data[1:]
    cut = run(mode, host, pieces(stream, (data[0] & 0x3F) + 1))
    whole = run(mode, host, [stream])
    assert cut.rule == whole.rule
    assert cut.reason == whole.reason or cut.rule == "http:malformed"  # it quotes what h11 has read so far
    assert cut.inspected.tls_name == whole.inspected.tls_name
    assert cut.forwarded.startswith(whole.forwarded) or b"HTTP/" in stream.upper()
    assert whole.rule or cut.forwarded == whole.forwarded == stream or b"HTTP/" in stream.upper()
    if mode == "tls" and whole.forwarded:
        assert whole.inspected.tls_name == NAME or host == ADDRESS
        assert whole.inspected.tls_name != DENIED
    if whole.inspected.transparent:
        assert cut.forwarded == whole.forwarded == stream
