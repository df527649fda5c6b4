"""The result of a run: one frozen value, from which text, JSON and reports are made.

Schema `x07.sandbox.result@0.1.0`: `schemas/result.schema.json` is generated from these types.
"""

from __future__ import annotations

import builtins
from typing import Any, Final, Literal, Self

import msgspec

from x07_sandbox.network.summary import NetworkUse
from x07_sandbox.plan.denials import Denial, Hint
from x07_sandbox.plan.features import Isolation
from x07_sandbox.policy.model import Limits

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


class LeftOutEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry that may not be applied, and was kept for review with all that lies below it.

    rules: which ones refuse it. entries: how many names they refuse there. take: flags of `x07 apply` that apply it,
    quoted for a shell; empty where none does.
    """

    name: str
    rules: tuple[str, ...]
    entries: int
    take: str


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of the program's changes to files.

    reason: why they were not applied. added, changed, deleted: how many, and names: all deletions first, and of the
    rest as many as make 1000; both without what was left out.
    left_out: how many names were left out, since they are refused or depend on one that is. left_out_entries: the
    uppermost that are refused, at most 100. apply_left_out: the command that applies what of them it can.
    """

    state: Literal["none", "applied", "kept", "conflict", "discarded"] = "none"
    reason: str = ""
    added: int = 0
    changed: int = 0
    deleted: int = 0
    names: tuple[ChangedName, ...] = ()
    left_out: int = 0
    left_out_entries: tuple[LeftOutEntry, ...] = ()
    apply_left_out: str = ""


class Discarded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files that were thrown away with the machine: how many, and their bytes."""

    count: int = 0
    bytes: int = 0


class Digests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """sha256 of what went in and came out, as `sha256:<hex>`; null for what there was none of."""

    image: str | None = None
    policy: str | None = None
    source: str | None = None
    artifact: str | None = None
    input: str | None = None
    output: str | None = None


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that were multiplied, since the machine was emulated and the user wanted that.

    factor: how much slower than the host it was measured to be. wall_ms, cpu_ms: the limits that held.
    """

    factor: int
    wall_ms: int
    cpu_ms: int


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """How one run ended.

    run: its name, for `x07 diff` and its kin. schema_version: of this form.
    outcome: one word of docs/reference/outcomes.md. fault: whose doing it was. reason: one sentence for people.
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
    files_discarded: what the program left in its private folders, and nobody took: see x07 run --workdir and --out.
    net: what the program's connections came to; null where it could have none.
    scaling: of its time and CPU limits; null where the policy's own held.
    limits: those that held for the program, whoever set them; null where there is no plan.
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
    files_discarded: Discarded = Discarded()
    filters: dict[str, str] = {}
    net: NetworkUse | None = None
    scaling: Scaling | None = None
    limits: Limits | None = None
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

    @property
    def files(self) -> dict[str, builtins.bytes]:
        """Files that the program left in its private working folder or in /x07/out, by relative name.

        Only calls from Python take them (`max_files_bytes`), and no document of a result has them.
        """
        found: dict[str, builtins.bytes] = vars(self).get("files_left", {})
        return found

    def having(self, files: dict[str, builtins.bytes]) -> Self:
        """The same result, with these as its `files`."""
        vars(self)["files_left"] = files
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _with_files, (type(self), msgspec.structs.asdict(self), self.files)


def _with_files(kind: type[Result], fields: dict[str, Any], files: dict[str, bytes]) -> Result:
    """Undo Result.__reduce__: a pickled result keeps its files."""
    return kind(**fields).having(files)


EMPTY_OUTPUT = Output(bytes=0, truncated=False, text="")


def draft_result(run: str) -> Result:
    """The result of a run of which nothing is known yet: what is learned replaces its fields, one after another."""
    return Result(
        run=run,
        outcome="internal-error",
        fault="host",
        reason="",
        x07_exit_code=125,
        stdout=EMPTY_OUTPUT,
        stderr=EMPTY_OUTPUT,
        phases={},
        digests=Digests(),
        controls=[],
        denials=[],
        warnings=[],
    )
