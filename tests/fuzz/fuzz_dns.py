"""Fuzz target: DNS queries of programs in the guest.

An input is one ignored byte, then one message. Invariants:

* a message is dropped only if it is no query; any query gets one answer, the same one each time;
* an answer fits into 512 bytes, matches its query, and dnspython can read it;
* its records are addresses of listed names, or of the machine itself.
"""

from __future__ import annotations

import struct
from typing import Final

import dns.flags
import dns.message

from x07_sandbox.guest.dns import NameTable, answer

EXACT: Final = {"example.org": "198.18.0.16"}
WILDCARDS: Final = [("example.net", "198.18.1.0"), ("b.example.net", "198.18.2.0")]
HEADER_SIZE: Final = 12
ITSELF: Final = {"127.0.0.1", "::1"}
ANSWER_MAX: Final = 512


def asked(name: str, kind: int = 1, extra: bytes = b"", opts: int = 0) -> bytes:
    """Return a query of class IN; extra: what follows the question; opts: the number of such records."""
    header = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, opts)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return header + labels + b"\0" + struct.pack(">HH", kind, 1) + extra


def seeds() -> dict[str, bytes]:
    """Return queries, some of them damaged, behind an ignored byte."""
    opt = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)
    listed, wildcard = asked("example.org"), asked("a.B.example.net", 28, opt, 1)
    header = struct.Struct(">HHHHHH")
    queries = {
        "listed": listed,
        "wildcard": wildcard,
        "unlisted": asked("evil.test", 65, opt, 1),
        "localhost": asked("app.localhost", 28),
        "other-class": listed[:-1] + b"\x03",
        "other-opcode": b"\0\x07\x28\0" + listed[4:],
        "an-answer": b"\0\x07\x81\x80" + listed[4:],
        "two-questions": header.pack(7, 0x0100, 2, 0, 0, 0) + listed[12:] * 2,
        "loop": header.pack(7, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\x01\0\x01",
        "long-name": asked(".".join(["a" * 63] * 4)),
        "odd-name": asked("a b.example.org"),
        "cut-off": listed[:-3],
    }
    return {name: b"\x00" + query for name, query in queries.items()}


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    check(data[1:], NameTable(EXACT, WILDCARDS))


def check(query: bytes, names: NameTable) -> None:
    """Answer one message, and check the answer."""
    reply = answer(query, names)
    if len(query) < HEADER_SIZE or query[2] & 0x80:
        assert reply is None
        return
    assert reply is not None
    assert len(reply) <= ANSWER_MAX
    assert reply[:2] == query[:2]
    assert answer(query, names) == reply
    parsed = dns.message.from_wire(reply)
    assert parsed.flags & (dns.flags.QR | dns.flags.RA | dns.flags.TC | dns.flags.AD) == dns.flags.QR | dns.flags.RA
    if parsed.question:
        end = HEADER_SIZE + len(parsed.question[0].name.to_digestable()) + 4
        assert reply[HEADER_SIZE:end] == query[HEADER_SIZE:end]
    for records in parsed.answer:
        name = records.name.to_text(omit_final_dot=True).lower()
        for record in records:
            known = str(record)
            if known in ITSELF:
                assert f".{name}".endswith(".localhost")
            else:
                assert names.host_at(known) == name
