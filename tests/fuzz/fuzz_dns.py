"""Fuzz target: DNS queries of programs in the guest, over UDP and over TCP.

An input is a byte that says how the rest is cut, and the rest: one message, and also a TCP stream of messages. What
must hold:

* a message is dropped only if it is no query; anything else gets one answer, the same one each time;
* an answer fits into 512 bytes, belongs to its query, and is one that dnspython reads;
* its records are addresses and names of the list, or of the machine itself;
* a stream is split the same way however it is cut.
"""

from __future__ import annotations

from typing import Final

import dns.flags
import dns.message
import dns.rdatatype

from x07_sandbox.guest.dns import ANSWER_MAX, UDP_MAX, Names, answer, split_stream

EXACT: Final = {"example.org": "198.18.0.16"}
WILDCARDS: Final = [("example.net", "198.18.1.0"), ("b.example.net", "198.18.2.0")]
HEADER_SIZE: Final = 12
ITSELF: Final = {"127.0.0.1", "::1"}
CUT_SIZES: Final = 16


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
    if not data:
        return
    size, stream = data[0] % CUT_SIZES + 1, data[1:]
    messages = split(stream, len(stream) or 1)
    assert messages == split(stream, size)
    names = Names(EXACT, WILDCARDS)
    for message in (stream, *messages):
        check(message, names)


def split(stream: bytes, size: int) -> list[bytes]:
    """Messages of a stream that arrives in pieces of this size."""
    buffer = bytearray()
    found = []
    for at in range(0, len(stream), size):
        buffer += stream[at : at + size]
        while (message := split_stream(buffer)) is not None:
            found.append(message)
    assert b"".join(len(message).to_bytes(2, "big") + message for message in found) + buffer == stream
    return found


def check(query: bytes, names: Names) -> None:
    """Answer one message, and check the answer."""
    reply = answer(query, names, UDP_MAX)
    if len(query) < HEADER_SIZE or query[2] & 0x80:
        assert reply is None
        return
    assert reply is not None
    assert len(reply) <= ANSWER_MAX
    assert reply[:2] == query[:2]
    assert answer(query, names, UDP_MAX) == reply
    parsed = dns.message.from_wire(reply)
    assert parsed.flags & (dns.flags.QR | dns.flags.RA | dns.flags.TC | dns.flags.AD) == dns.flags.QR | dns.flags.RA
    if parsed.question:
        end = HEADER_SIZE + len(parsed.question[0].name.to_digestable()) + 4
        assert reply[HEADER_SIZE:end] == query[HEADER_SIZE:end]
    for records in parsed.answer:
        name = records.name.to_text(omit_final_dot=True).lower()
        for record in records:
            known = str(record)
            if records.rdtype == dns.rdatatype.PTR:
                assert names.address_of(known.removesuffix(".")) == ".".join(reversed(name.split(".")[:4]))
            elif known in ITSELF:
                assert f".{name}".endswith(".localhost")
            else:
                assert (names.host_at(known), names.name_of(known)) == (name, name)
