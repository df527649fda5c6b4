"""The result of a run, an immutable value from which text, JSON and reports are made.

`schemas/result.schema.json` (`x07.sandbox.result@0.1.0`) is generated from these types.
"""

import builtins
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.policy.denials import Control, Denial, Hint, NetworkUse, Outcome
from x07_sandbox.policy.features import Isolation
from x07_sandbox.policy.model import Limits

SCHEMA: Final = "x07.sandbox.result@0.1.0"

ChangesChoice = Literal["apply", "all-or-nothing", "keep", "discard"]


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One output stream.

    bytes: the number of bytes received, at most the limit.
    truncated: whether the program wrote more than the limit.
    text: the content of the stream, if it is UTF-8.
    base64: the content of the stream in base64, if it is not UTF-8.
    undelivered: why x07 could not pass on part of the stream, for example because the disk was full; null if all was
        passed on, or the reader closed the stream.
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


def output_with(data: bytes, count: int, *, truncated: bool, undelivered: str | None = None) -> Output:
    """Return an output whose content is *data*. count: the number of bytes received."""
    try:
        text, coded = data.decode(), None
    except UnicodeDecodeError:
        from base64 import b64encode

        text, coded = None, b64encode(data).decode()
    return Output(bytes=count, truncated=truncated, text=text, base64=coded, undelivered=undelivered)


class PhaseReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happened in one phase, which is the build or the run. Each phase has a VM of its own.

    job_id: the id of the job, made of the run's id and the phase.
    start: how the VM started: booted (`cold`), cloned from a saved VM (`clone`), restored from the saved process of a
        clone (`hot`), taken from a pool (`pool`), or started from a snapshot of another sandbox (`fork`).
    outcome: how the phase ended, in the same words as the outcome of a run.
    reason_code: the code of the reason (docs/reference/codes.md).
    reason: how the phase ended, in one sentence.
    times_ms: milliseconds from the VM's start to the events `hello` (the agent answered; not for a clone), `seeded`
        (the agent received random data), `started` and `exited` (the program), and `end` (of the phase). A sandbox has
        `opened` (it could take commands) instead of those of a program.
    stdout, stderr: what the phase wrote to this stream.
    cpu_ms: the CPU time used, in milliseconds; for a sandbox, that of its commands together.
    memory_peak_bytes: the peak memory use; for a sandbox, that of the command that used most. 0 if it was not measured.
    tasks_peak: the peak number of processes and threads; 0 if it was not measured, as for a sandbox.
    """

    job_id: str
    start: Literal["cold", "clone", "hot", "pool", "fork"]
    outcome: Outcome
    reason_code: str
    reason: str
    times_ms: dict[str, float]
    stdout: Output
    stderr: Output
    cpu_ms: int
    memory_peak_bytes: int
    tasks_peak: int


class BuildOutput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a build printed.

    stdout, stderr: what the build wrote to this stream.
    """

    stdout: Output
    stderr: Output


class ChangedName(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One file, folder or link that the program changed.

    root: the granted folder on the host.
    name: the path, relative to that folder. The program chose it: it may contain any character, such as line ends.
    action: what happened to the file, folder or link.
    name_base64: the exact path in base64, if it is not valid UTF-8; *name* is then escaped.
    """

    root: str
    name: str
    action: Literal["added", "changed", "deleted"]
    name_base64: str = ""


class LeftOutEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change that x07 did not apply, because a rule refuses it. x07 keeps it and all changes below it for review.

    name: the path of the changed file, folder or link, escaped for messages; `x07 diff --json` has the exact path.
    rules: the rules that refuse the change.
    entries: the number of refused changes at this path and below it.
    take: the flags of `x07 apply` that apply the change, quoted for a shell; empty if no flag can.
    """

    name: str
    rules: tuple[str, ...]
    entries: int
    take: str


class NewCommits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The program's new commits on one branch of a git repository.

    branch: the branch; HEAD for commits on no branch.
    commit: the last one.
    ref: the reference that points to it in the repository on the host, while the changes are applied.
    """

    branch: str
    commit: str
    ref: str


ChangesState = Literal["none", "applied", "kept", "conflict", "discarded"]


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happened to the program's changes to folders.

    state: whether the changes were applied, kept for `x07 apply`, not applied because of a conflict, or discarded.
    reason: why the changes were not applied.
    added, changed, deleted: the number of files, folders and links with this change, without those left out.
    names: the changed files, folders and links, deletions first; at most 1000.
    left_out: how many changes x07 left out, because a rule refuses them, or refuses a change on which they depend.
    left_out_entries: the refused changes that are not below another refused change; at most 100.
    apply_left_out: the command that applies those left-out changes that can be applied.
    commits: the new commits, by branch, of a program that got a git repository.
    """

    state: ChangesState = "none"
    reason: str = ""
    added: int = 0
    changed: int = 0
    deleted: int = 0
    names: tuple[ChangedName, ...] = ()
    left_out: int = 0
    left_out_entries: tuple[LeftOutEntry, ...] = ()
    apply_left_out: str = ""
    commits: tuple[NewCommits, ...] = ()


class Diff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run changed, or a sandbox so far.

    patch: all changes in git's format, also those left out, as `x07 diff` prints them.
    running: whether commands of a sandbox were running, which may have written only parts of their files.
    """

    changes: Changes
    patch: builtins.bytes
    running: bool = False


class Discarded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files that were deleted together with the VM.

    count: the number of files.
    bytes: the total size of the files.
    """

    count: int = 0
    bytes: int = 0


class Digests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Digests of inputs and outputs as `sha256:<hex>`; null if the run had no such input or output.

    image: the guest image.
    policy: the policy that applied to the run.
    source: the program's source files.
    artifact: the file that was executed.
    input: standard input.
    output: standard output.
    """

    image: str | None = None
    policy: str | None = None
    source: str | None = None
    artifact: str | None = None
    input: str | None = None
    output: str | None = None


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that were multiplied, because the VM was emulated and the user asked for scaling.

    factor: the measured slowdown: how many times slower the VM is than the host.
    wall_ms, cpu_ms: the multiplied limit that applied to the run, in milliseconds.
    """

    factor: int
    wall_ms: int
    cpu_ms: int


class CommandReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of a sandbox.

    id: the number of the command in its sandbox.
    name: its first word, without its arguments, which may hold secrets; at most 100 characters.
    argv_sha256: the digest of its arguments, each followed by a zero byte.
    outcome: how the command ended, in the same words as the outcome of a run.
    exit_code: the exit status of the command; null if it did not exit by itself.
    signal: the signal that ended the command; null if there was none.
    began_ms: when the command was sent to the VM, in milliseconds since the sandbox was opened.
    wall_ms: the time from then until its end, in milliseconds.
    cpu_ms: the CPU time used, in milliseconds.
    """

    id: int
    name: str = ""
    argv_sha256: str
    outcome: Outcome
    exit_code: int | None
    signal: int | None
    began_ms: float
    wall_ms: float
    cpu_ms: float


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one run, or of one sandbox.

    run: the id of the run, to give to commands such as `x07 diff` and `x07 logs`.
    schema_version: the version of this format.
    outcome: how the run ended, in one word (docs/reference/outcomes.md).
    fault: who is responsible: the program, the policy (a limit, a refusal, a wrong request, or a command or interpreter
        that the image lacks), the host, or nobody.
    reason_code: the code of the reason (docs/reference/codes.md).
    reason: how the run ended, in one sentence.
    x07_exit_code: the exit code of `x07 run`.
    exit_code: the exit status of the program, or of the compiler after a failed build; null if it did not exit by
        itself.
    signal: the signal that ended the program or cancelled the run; null if there was none.
    stdout, stderr: what the program wrote to this stream; after a failed build, what the compiler wrote to it.
    isolation: the isolation class that was used.
    backend: the backend that was used.
    jail: how the QEMU process was confined; null for other backends.
    phases: what happened in each phase, by its name: `build` or `run`.
    policy: the policy that applied: a path, `built-in:TEMPLATE` or an id; null if the run ended before x07 read it.
    digests: digests of inputs and outputs.
    controls: what enforces each field of the policy.
    denials: actions that were denied.
    denials_lost: the number of denials that the result does not list, because there were too many.
    hints: what the program seems to lack, according to its error output. Hints are not denials.
    changes: what happened to the program's changes to granted folders.
    input_problem: why x07 could not read the program's input to its end; null if there was no problem.
    files_discarded: the files in the program's private folders, which were deleted with the VM. To keep such files, use
        `--workdir` or `--out`.
    files: files that the program left in its private working folder or in /x07/out, by relative name. Only the Python
        API collects them (`max_files_bytes`). JSON documents do not include them.
    warnings: warnings, each in one sentence.
    artifact_from: whether this run built the program (`build`), a cached build, perhaps a failed one, was used
        (`cache`), or the caller gave the built program (`caller`).
    build: what the build printed (for a cached build, what the original build printed); null if there was no build.
    filters: digests of the seccomp filters that applied to the program, by name. A filter whose name ends in `-once`
        also lets the guest agent execute the program once.
    net: the program's connections; null if it had no network access.
    scaling: how x07 multiplied the time limits; null if it did not.
    limits: the limits that applied; null if the run ended before x07 determined them.
    commands: the commands of a sandbox, at most 10,000; empty for a run.
    forked_from: the id of the sandbox from whose snapshot this one has started; null for any other.
    """

    run: str
    outcome: Outcome
    fault: Literal["program", "policy", "host", "none"]
    reason_code: str
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
    controls: list[Control]
    denials: list[Denial]
    denials_lost: int = 0
    hints: list[Hint] = []
    changes: Changes = Changes()
    input_problem: str | None = None
    files_discarded: Discarded = Discarded()
    filters: dict[str, str] = {}
    net: NetworkUse | None = None
    scaling: Scaling | None = None
    limits: Limits | None = None
    commands: tuple[CommandReport, ...] = ()
    forked_from: str | None = None
    warnings: list[str]
    files: dict[str, builtins.bytes] = {}
    schema_version: Literal["x07.sandbox.result@0.1.0"] = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether the program exited with status 0."""
        return self.outcome == "ok"

    @property
    def program_started(self) -> bool:
        """Whether the program itself was executed."""
        return "run" in self.phases and "started" in self.phases["run"].times_ms

    def document(self) -> dict[str, Any]:
        """Return the result as JSON values, without *files*."""
        document: dict[str, Any] = msgspec.to_builtins(replace(self, files={}))
        del document["files"]
        return document

    def _repr_html_(self) -> str:
        """Return the result as HTML, which notebooks show."""
        from x07_sandbox.sessions.html import fragment

        return fragment(self.document())


EMPTY_OUTPUT = Output(bytes=0, truncated=False, text="")


def draft_result(run: str) -> Result:
    """Return the first draft of a result, without any facts."""
    return Result(
        run=run,
        outcome="internal-error",
        fault="host",
        reason_code="",
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


def stored_result(run: str) -> Result | None:
    """Return the result of a run or sandbox that has ended, from its folder, or None."""
    from x07_sandbox.host.documents import prepared  # only where a result is read
    from x07_sandbox.records.runs import all_runs

    try:
        return msgspec.json.decode((all_runs() / run / "result.json").read_bytes(), type=prepared(Result))
    except (OSError, msgspec.MsgspecError):
        return None


class Draft:
    """The result of a run in progress, as far as it is known: an interrupted run ends with it."""

    def __init__(self, run: str) -> None:
        self.result = draft_result(run)

    def set(self, **fields: Any) -> None:  # noqa: ANN401 - fields of a result
        """Fill in fields."""
        self.result = replace(self.result, **fields)

    def set_digests(self, **digests: str | None) -> None:
        """Fill in digests."""
        self.set(digests=replace(self.result.digests, **digests))

    def set_phase(self, name: str, report: PhaseReport) -> None:
        """Add the report about a phase."""
        self.set(phases={**self.result.phases, name: report})

    def deny(self, *denials: Denial) -> None:
        """Add denials."""
        self.set(denials=[*self.result.denials, *denials])

    def warn(self, *warnings: str) -> None:
        """Add warnings."""
        self.set(warnings=[*self.result.warnings, *warnings])
