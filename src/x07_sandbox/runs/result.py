"""The result of a run: one frozen value, from which text, JSON and reports are made.

`schemas/result.schema.json` (`x07.sandbox.result@0.1.0`) is generated from these types.
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

# The names in plan/outcomes, which is not imported because its table would slow every start.
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
    """One output stream: `text` if it is UTF-8, else `base64`. bytes: how many arrived, up to the limit.

    undelivered: why not all of it could be passed on live, such as a full disk; null if the reader just went away.
    """

    bytes: int
    truncated: bool
    text: str | None = None
    base64: str | None = None
    undelivered: str | None = None

    @property
    def data(self) -> builtins.bytes:
        """The bytes of the stream."""
        if self.base64 is None:
            return (self.text or "").encode()
        from base64 import b64decode

        return b64decode(self.base64)


class PhaseReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One phase. start: whether the machine was booted, cloned from a saved one, or taken from a pool.

    times_ms: from the release of the machine to hello, seeded, started, exited and end; a clone sends no hello.
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
    """The output of a build."""

    stdout: Output
    stderr: Output


class ControlReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field of the policy and what enforces it."""

    field: str
    state: Literal["enforced", "advisory", "refused"]
    by: str
    why: str


class ChangedName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One name that the program changed. root: the folder of the host. name: relative to it."""

    root: str
    name: str
    action: Literal["added", "changed", "deleted"]


class LeftOutEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry that was not allowed and was saved for review, with everything below it.

    rules: the rules that refuse it. entries: the number of refused names. take: flags of `x07 apply` that apply it,
    quoted for a shell; empty if none do.
    """

    name: str
    rules: tuple[str, ...]
    entries: int
    take: str


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happened to the program's changes to files.

    reason: why they were not applied. added, changed, deleted: their numbers, and names: all deletions first, then
    others up to 1000 in total; none of them includes what was left out. left_out: the number of names that were refused
    or depend on a refused one. left_out_entries: the uppermost refused ones, at most 100. apply_left_out: the command
    that applies those that flags can allow.
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
    """Files that were removed with the machine: their number and bytes."""

    count: int = 0
    bytes: int = 0


class Digests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SHA-256 digests of what went in and came out, as `sha256:<hex>`; null if there was none."""

    image: str | None = None
    policy: str | None = None
    source: str | None = None
    artifact: str | None = None
    input: str | None = None
    output: str | None = None


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that were multiplied because the machine was emulated and the user asked for it.

    factor: the measured slowdown. wall_ms, cpu_ms: the limits that applied.
    """

    factor: int
    wall_ms: int
    cpu_ms: int


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The result of one run.

    run: its id, for `x07 diff` and other commands. schema_version: of this document.
    outcome: see docs/reference/outcomes.md. fault: who caused it. reason: one sentence for people.
    x07_exit_code: exit code of `x07 run`. exit_code, signal: how the program itself ended; null if it did not.
    stdout, stderr: output of the program, or of a failed build.
    isolation, backend, jail: the boundary that was used. phases: each machine's report, times in ms, sizes in bytes.
    policy: the source of the policy as it was named: a path, `built-in:TEMPLATE`, or the id of a value;
        null if the run failed before.
    digests: of what went in and came out. controls: for each field of the policy, what enforced it.
    denials: what was requested or tried, and denied. changes: what happened to its changes to files.
    warnings: sentences for people.
    artifact_from: whether the program was built now, taken from the cache, or provided.
    build: output of the build, also of a cached one; null if there was none.
    hints: what the program seems to have missed, according to its error output; these are not denials.
    denials_lost: the number of further denials that were not recorded.
    filters: the seccomp filters of the image that applied, by name, as `sha256:<hex>`. One whose name ends in -once
        belongs to the filter of the same name; the guest uses it if the program itself has to be executed.
    files_discarded: what the program left in its private folders (see x07 run --workdir and --out).
    net: summary of the program's connections; null if it could have none.
    scaling: of the time and CPU limits; null if the policy's applied.
    limits: the limits that applied, whoever set them; null if there was no plan.
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
        """Whether the program exited with status 0."""
        return self.outcome == "ok"

    @property
    def program_started(self) -> bool:
        """Whether the program itself was executed."""
        return "run" in self.phases and "started" in self.phases["run"].times_ms

    @property
    def files(self) -> dict[str, builtins.bytes]:
        """Files that the program left in its private working folder or /x07/out, by relative name.

        Only the Python API collects them (`max_files_bytes`); documents do not include them.
        """
        found: dict[str, builtins.bytes] = vars(self).get("files_left", {})
        return found

    def with_files(self, files: dict[str, builtins.bytes]) -> Self:
        """Return this result with *files* as its `files`."""
        vars(self)["files_left"] = files
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _with_files, (type(self), msgspec.structs.asdict(self), self.files)


def _with_files(kind: type[Result], fields: dict[str, Any], files: dict[str, bytes]) -> Result:
    return kind(**fields).with_files(files)


EMPTY_OUTPUT = Output(bytes=0, truncated=False, text="")


def draft_result(run: str) -> Result:
    """Return the result of a run of which nothing is known yet; the run replaces its fields."""
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
