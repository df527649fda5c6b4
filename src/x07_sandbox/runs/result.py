"""The result of a run: one frozen value, from which text, JSON and reports are made.

Schema `x07.sandbox.result@0.1.0`: `schemas/result.schema.json` is generated from these types.
"""

from __future__ import annotations

import builtins
from typing import Final, Literal

import msgspec

from x07_sandbox.network.account import NetworkUse
from x07_sandbox.plan.denials import Denial, Hint
from x07_sandbox.plan.features import Isolation

SCHEMA: Final = "x07.sandbox.result@0.1.0"

# The words of plan/outcomes, which is not loaded here, since its table would cost every start.
Outcome = Literal[
    "ok",
    "failed",
    "signalled",
    "timeout",
    "cpu-limit",
    "oom",
    "output-limit",
    "refused",
    "guest-lost",
    "gate-lost",
    "backend-error",
    "internal-error",
    "build-failed",
    "cancelled",
    "usage-error",
]


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One output stream: `text` where it is UTF-8, else `base64`. bytes: how many came up to the cap.

    undelivered: why not all of it could be passed on as it came (a full disk, say; a reader who went away is none).
    """

    bytes: int
    truncated: bool
    text: str | None = None
    base64: str | None = None
    undelivered: str | None = None

    @property
    def data(self) -> builtins.bytes:
        """The stream itself."""
        if self.base64 is None:
            return (self.text or "").encode()
        from base64 import b64decode

        return b64decode(self.base64)


class PhaseReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One phase. times_ms: from the machine's release to hello, seeded, started, exited and end; a clone says no hello.

    start: whether the machine was booted anew, is a clone of one that was saved, or waited in a pool.
    """

    job_id: str
    start: Literal["cold", "clone", "pool"]
    outcome: Outcome
    reason: str
    times_ms: dict[str, float]
    stdout: Output
    stderr: Output
    cpu_ms: int
    memory_peak_bytes: int
    tasks_peak: int


class BuildOutput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a build printed."""

    stdout: Output
    stderr: Output


class ControlReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field of the policy, and who holds it."""

    field: str
    state: Literal["enforced", "advisory", "refused"]
    by: str
    why: str


class ChangedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name that the program changed. root: the folder of the host. name: from there."""

    root: str
    name: str
    action: Literal["added", "changed", "deleted"]


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of the program's changes to files.

    reason: why they were not applied. added, changed, deleted: how many. names: all deletions first, and of the rest
    as many as make 1000.
    """

    state: Literal["none", "applied", "kept", "conflict", "discarded"] = "none"
    reason: str = ""
    added: int = 0
    changed: int = 0
    deleted: int = 0
    names: tuple[ChangedName, ...] = ()


class Digests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """sha256 of what went in and came out, as `sha256:<hex>`; null for what there was none of."""

    image: str | None = None
    policy: str | None = None
    source: str | None = None
    artifact: str | None = None
    input: str | None = None
    output: str | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one run ended.

    run: its name, for `x07 diff` and its kin. schema_version: of this form.
    outcome: one word of docs/outcomes.md. fault: whose doing it was. reason: one sentence for people.
    x07_exit_code: what `x07 run` ends with. exit_code, signal: how the program itself ended; null where it did not so.
    stdout, stderr: what it printed; of a failed build, what that printed.
    isolation, backend, jail: the wall that stood. phases: what each machine did, times in milliseconds, sizes in bytes.
    policy: from what the one in force was made, as it was named: a path, `built-in:TEMPLATE`, or the id of a value;
        null where it did not come to one.
    digests: of what went in and came out, as `sha256:<hex>`. controls: of each field of the policy who held it.
    denials: what was asked for, or tried, and not given. changes: what became of its changes to files.
    warnings: sentences for people.
    artifact_from: whether the program was built now, kept from an earlier build of the same, or given.
    build: what its build printed, then or now; null where there was none.
    hints: what it seems to have missed, told from its own error output: no refusals.
    denials_lost: how many more things refused, or records of them, were not looked at: there were too many.
    filters: the image's seccomp filters that the program was under, by name, as `sha256:<hex>`. One whose name ends
        in -once stands beside its twin: the guest takes it where the program itself has to be executed.
    net: what the program's connections came to; null where it could have none.
    """

    run: str
    outcome: Outcome
    fault: Literal["program", "policy", "host", "none"]
    reason: str
    x07_exit_code: int
    exit_code: int | None = None
    signal: int | None = None
    isolation: Isolation | None = None
    backend: str | None = None
    jail: str | None = None
    artifact_from: Literal["build", "cache", "caller"] | None = None
    build: BuildOutput | None = None
    stdout: Output
    stderr: Output
    phases: dict[str, PhaseReport]
    policy: str | None = None
    digests: Digests
    controls: list[ControlReport]
    denials: list[Denial]
    denials_lost: int = 0
    hints: list[Hint] = []
    changes: Changes = Changes()
    filters: dict[str, str] = {}
    net: NetworkUse | None = None
    warnings: list[str]
    schema_version: Literal["x07.sandbox.result@0.1.0"] = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with status 0."""
        return self.outcome == "ok"

    @property
    def began(self) -> bool:
        """Whether the program itself was ever executed."""
        return "run" in self.phases and "started" in self.phases["run"].times_ms


NOTHING = Output(bytes=0, truncated=False, text="")


def draft_result(run: str) -> Result:
    """The result of a run of which nothing is known yet: what is learned replaces its fields, one after another."""
    return Result(
        run=run,
        outcome="internal-error",
        fault="host",
        reason="",
        x07_exit_code=125,
        stdout=NOTHING,
        stderr=NOTHING,
        phases={},
        digests=Digests(),
        controls=[],
        denials=[],
        warnings=[],
    )
