"""Fuzz target: hints derived from the end of a program's error output.

An input is a byte that chooses the policy, and the text. Any text gives at most three hints: printable, about what the
text names, never about what is present, and with advice that works (fuzz_observed.follow).
"""

from __future__ import annotations

import msgspec

from tests.fuzz.fuzz_observed import AREAS, CWD, POLICIES, follow
from x07_sandbox.policy.hints import hints

MOST = 3
OURS = ("HOME", "TOKEN")


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    policy = POLICIES[data[0] % len(POLICIES)] if data else POLICIES[0]
    found = hints(data[1:], policy, AREAS, CWD, host_variables=OURS)
    assert len(found) <= MOST
    assert len({hint.subject for hint in found}) == len(found)
    for hint in found:
        assert hint.subject.isprintable()
        msgspec.json.encode(hint)
        if hint.how.json_path is None:  # a module or a program that another image has, a variable, a connection
            assert hint.how.flag is not None
            assert hint.subject.startswith(
                ("the Python module ", "the program ", "the variable ", "the connection to ", "a connection")
            )
            continue
        assert hint.kind != "missing" or "/" in hint.subject
        follow(hint.how, policy)
        follow(hint.to_write, policy)
