"""The documents of `x07 policy check`, `check --host` and `explain`."""

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from x07_sandbox.policy.controls import Control, Refusal
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.problems import Problem


class CheckedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of checking one policy.

    file: the path or name that the user gave. policy_id, digest: only for a valid policy. problems, text: the errors.
    """

    file: str
    status: Literal["valid", "invalid", "unreadable"]
    policy_id: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    problems: tuple[Problem, ...] | UnsetType = UNSET
    text: str | UnsetType = UNSET


class CheckReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The results for all policies, in the order in which the user gave them. ok: whether all policies are valid."""

    schema_version: Literal["x07.sandbox.policy.check@0.1.0"] = "x07.sandbox.policy.check@0.1.0"
    ok: bool
    files: tuple[CheckedFile, ...]


class HostReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a connection is allowed.

    policy: the path or name that the user gave. host: the host in its normal form.
    rule: the rule that decides, such as `net.allow_hosts[2]` or `deny-floor:private`.
    how_to_allow: null if the connection is allowed or nothing can allow it.
    resolved_later: whether the addresses of the host are checked when a program connects.
    """

    schema_version: Literal["x07.sandbox.policy.host@0.1.0"] = "x07.sandbox.policy.host@0.1.0"
    policy: str
    policy_id: str
    host: str
    port: int
    transport: Literal["tcp", "udp"]
    allowed: bool
    rule: str
    reason: str
    how_to_allow: HowToAllow | None
    resolved_later: bool


class ExplainedControl(Control, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field of the policy, its value, and what enforces it.

    in_sandbox: with --sandbox, what the field means in a sandbox, if that differs from a run; else empty.
    """

    value: Any
    in_sandbox: str = ""


IN_SANDBOX: Final = {
    "limits.wall_ms": "of each command, if you name the policy",
    "limits.cpu_ms": "of each command, if you name the policy",
    "limits.mem_bytes": "of all commands together",
    "limits.procs": "of all commands together",
    "limits.fds": "of each process of each command",
    "fs.read_roots": "copied in when the sandbox is opened",
    "fs.write_roots": "copied in when the sandbox is opened, and changes come back when it is closed",
    "net.allow_hosts": "for all commands, until the sandbox ends",
}
"""What policy fields mean in a sandbox, where that differs from a run."""


class NeverReached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of net.allow_hosts that is blocked completely or in part. field: the entry's path in the policy."""

    field: str
    host: str
    why: str


class ExplainReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plan of a run.

    policy: the path or name that the user gave. carried_out: whether a run would start.
    isolation: classes of isolation that the backend may provide, best first.
    filters: names of the image's seccomp filters that would apply.
    never_reached: allowed hosts that the egress gate blocks unless the user's settings allow them.
    """

    schema_version: Literal["x07.sandbox.policy.explain@0.1.0"] = "x07.sandbox.policy.explain@0.1.0"
    policy: str
    policy_id: str
    digest: str
    backend: str
    isolation: tuple[str, ...]
    toolchain: str | None
    carried_out: bool
    filters: tuple[str, ...]
    controls: tuple[ExplainedControl, ...]
    refusals: tuple[Refusal, ...]
    never_reached: tuple[NeverReached, ...] = ()
