"""Fuzz target: DNS queries of programs in the guest.

An input is one byte that is ignored, then one message. What must hold:

* a message is dropped only if it is no query; anything else gets one answer, the same one each time;
* an answer fits into 512 bytes, belongs to its query, and is one that dnspython reads;
* its records are addresses of listed names, or of the machine itself.
"""

from __future__ import annotations

from typing import Final

import dns.flags
import dns.message

from x07_sandbox.guest.dns import NameTable, answer

EXACT: Final = {"example.org": "198.18.0.16"}
WILDCARDS: Final = [("example.net", "198.18.1.0"), ("b.example.net", "198.18.2.0")]
HEADER_SIZE: Final = 12
ITSELF: Final = {"127.0.0.1", "::1"}
ANSWER_MAX: Final = 512


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
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
