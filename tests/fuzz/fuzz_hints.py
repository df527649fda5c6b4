"""Fuzz target: the end of a program's error output, in which it may have said what it missed.

An input is a byte that chooses the policy, and the text. Whatever stands in it gives at most three hints: all of them
printable and about what the text names, none about what is there, and with advice that holds (fuzz_observed.follow).
"""

from __future__ import annotations

import msgspec

from tests.fuzz.fuzz_observed import AREAS, CWD, POLICIES, follow
from x07_sandbox.plan.hints import hints

MOST = 3
OURS = ("HOME", "TOKEN")


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or whatever it was that should never have been raised."""
    policy = POLICIES[data[0] % len(POLICIES)] if data else POLICIES[0]
    found = hints(data[1:], policy, AREAS, CWD, host_variables=OURS)
    assert len(found) <= MOST
    assert len({hint.subject for hint in found}) == len(found)
    for hint in found:
        assert hint.subject.isprintable()
        msgspec.json.encode(hint)
        if hint.how.json_path is None:  # a module or a program, which another image brings, a variable, a connection
            assert hint.how.flag is not None
            assert hint.subject.startswith(
                ("the Python module ", "the program ", "the variable ", "the connection to ", "a connection")
            )
            continue
        assert hint.kind != "missing" or "/" in hint.subject
        follow(hint.how, policy)
        follow(hint.to_write, policy)
