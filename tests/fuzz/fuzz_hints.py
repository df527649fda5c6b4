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


def seeds() -> dict[str, bytes]:
    """Return programs' messages about missing files, and similar text; the first byte chooses the policy."""
    missing = "No such file or directory"
    return {
        "nothing": b"\x00all is well\n",
        "python": f"\x00FileNotFoundError: [Errno 2] {missing}: '/srv/in.csv'\n".encode(),
        "bytes": f'\x01FileNotFoundError: [Errno 2] {missing}: b"/srv/in\'s"\n'.encode(),
        "coreutils": f"\x02cat: '/srv/a b': {missing}\ncat: /srv/c: {missing}\n".encode(),
        "perror": f"\x03/opt/tool: error opening /srv/d: {missing}\nrun: /srv/e f: {missing}\n".encode(),
        "relative": f"\x04FileNotFoundError: [Errno 2] {missing}: 'results/a'\n".encode(),
        "hidden": f"\x05FileNotFoundError: [Errno 2] {missing}: '.cache/a'\n".encode(),
        "there": f"\x06cat: /data/x: {missing}\ncat: /usr/x: {missing}\n".encode(),
        "module": b"\x07ModuleNotFoundError: No module named 'numpy.linalg'\n",
        "library": b"\x00ImportError: ./own.so: failed to map segment from shared object\n",
        "no-text": b"\x00" + bytes(range(256)),
        "odd-names": f"\x00cat: /srv/$(id)': {missing}\ncat: /\u202e: {missing}\ncat: /a/../..: {missing}\n".encode(),
    }


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
