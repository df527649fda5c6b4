"""Fuzz target: the denials that a guest reports, from DENIED messages to advice.

An input is a byte that chooses the policy, and payloads as JSON, one per line. Every input gives PeerError, or denials
that can be written: at most one per message, counts within what JSON can hold, and advice that works (`follow`).
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

import msgspec

from tests.guest.lies import DENIED
from x07_sandbox.channel.messages import FORMS, Denied, decode
from x07_sandbox.errors import PeerError
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.denials import GuestMount
from x07_sandbox.policy.observed import denials
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from x07_sandbox.policy.denials import HowToAllow
    from x07_sandbox.policy.model import Policy

CWD: Final = "/opt/x07"
AREAS: Final = (
    GuestMount(given="/data", at="/data", write=False),
    GuestMount(given="/data/out", at="/data/out", write=True),
    GuestMount(given="in", at="/opt/x07/in", write=False),
)
POLICIES: Final = tuple(TEMPLATES.values())
COUNT_MAX: Final = 2**63 - 1


def seeds() -> dict[str, bytes]:
    """Return bodies as a guest sends them, and hostile ones; the first byte chooses the policy."""
    refused = [
        DENIED._replace(by="seccomp", call="clone", errno=1, path=""),
        DENIED._replace(by="seccomp", call="execve", errno=1, path=""),
        DENIED._replace(call="socket", errno=24, path=""),
        DENIED._replace(call="execve", path="/usr/bin/true"),
        DENIED._replace(call="execve", path="/data/out/made"),
        DENIED._replace(call="mkdir", errno=30, path="/data/", write=True),
        DENIED._replace(call="openat", errno=30, path="/opt/x07/in/f", write=True),
        DENIED._replace(call="openat", errno=30, path="/x07/out/", write=True),
        DENIED._replace(call="openat", errno=30, path=".../", write=True),
        DENIED._replace(call="openat", path="/usr/bin/true"),
    ]
    hostile = [
        DENIED._replace(call="\x1b[2J", path="/srv/$(id); '\n", write=True, errno=30, times=2**63 - 1),
        DENIED._replace(by="nobody", call="", path="\ud800/" * 500, write=True, errno=4096),
        DENIED._replace(path="/" * 2000, write=True, errno=30),
    ]
    # With lone surrogates, which no agent sends.
    made = [json.dumps(denied).encode() for denied in (*refused, *hostile)]
    found = {f"policy-{number}": bytes([number]) + b"\n".join(made[: len(refused)]) for number in range(len(POLICIES))}
    found |= {f"hostile-{number}": b"\x00" + body for number, body in enumerate(made[len(refused) :])}
    return {**found, "counted": b"\x00" + b"\n".join(made[-3:] * 3), "no-fields": b"\x00{}\n[]\n\xff"}


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    policy = POLICIES[data[0] % len(POLICIES)] if data else POLICIES[0]
    denied = []
    for line in data[1:].split(b"\n"):
        try:
            message = decode(FORMS[Denied].number, line)
        except PeerError:
            continue
        assert isinstance(message, Denied)
        denied.append(message)
    found = denials(denied, policy, AREAS, CWD)
    assert len(found) <= len(denied)
    assert bool(found) == bool(denied)
    assert sum(denial.count for denial in found) <= sum(message.times for message in denied)
    for denial in found:
        assert 1 <= denial.count <= COUNT_MAX
        assert denial.observed_by == "guest"
        msgspec.json.encode(denial)
        follow(denial.how_to_allow, policy)


def follow(how: HowToAllow | None, policy: Policy) -> None:
    """Follow the advice: a value makes a valid policy; a flag is valid in a shell and takes at most one value."""
    if how is None:
        return
    assert how.json_path or how.flag
    if how.flag is not None:
        flag, *values = shlex.split(how.flag)
        assert flag.startswith("--")
        assert len(values) <= 1
    if how.json_path is not None:
        document = msgspec.to_builtins(policy)
        section, _, key = how.json_path.removeprefix("$.").partition(".")
        document[section][key] = how.value
        decode_policy(msgspec.json.encode(document), source="advice")
