"""One run from request to result. Each step replaces the draft, and the last draft becomes the result."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import (
    BackendError,
    Cancelled,
    Flag,
    HostError,
    ImageError,
    RefusedError,
    SandboxError,
    UsageError,
)
from x07_sandbox.host import settings
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.denials import CONNECTS, Denial, Hint, HowToAllow, Outcome
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.programs.toolchains import COMMAND, OUTPUT
from x07_sandbox.records.record import new_run_id
from x07_sandbox.records.runs import REQUEST
from x07_sandbox.sessions.artifact import obtain_artifact
from x07_sandbox.sessions.folder import RunFolder
from x07_sandbox.sessions.job import JobEnd, run_job, worded_report
from x07_sandbox.sessions.phase_specs import run_spec
from x07_sandbox.sessions.prepare import Prepared, Step, image_in_use, output_caps, prepare, wants_scaling
from x07_sandbox.sessions.result import Discarded, PhaseReport, Result, draft_result
from x07_sandbox.sessions.transfers import TAIL_BYTES

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Closed, Denied
    from x07_sandbox.network.summary import NetworkUse
    from x07_sandbox.policy.outcomes import Verdict
    from x07_sandbox.sessions.host_files import HostFiles
    from x07_sandbox.sessions.phase import PhaseSpec
    from x07_sandbox.sessions.request import ChangesChoice, RunCaller, RunRequest
    from x07_sandbox.sessions.transfers import OutFile

    Steps = Callable[[RunRequest, RunCaller, Result, RunFolder, contextlib.ExitStack], Iterator[Result]]

SCALING_HINT = "the VM is emulated; --scale-limits multiplies the time limits by its slowdown"

_KNOWN_OUTCOMES: tuple[tuple[tuple[type[SandboxError], ...], Outcome], ...] = (
    ((PolicyError, RefusedError, ImageError, HostError), "refused"),
    ((UsageError,), "usage-error"),
    ((BackendError,), "backend-error"),
)


def attempt(request: RunRequest, caller: RunCaller, steps: Steps | None = None) -> tuple[Result, SandboxError | None]:
    """Carry out one run; return the result and the error that caused it, if any. Only a bug raises an exception.

    steps: `build_steps` to only build the program; None for a whole run.
    """
    draft = draft_result(new_run_id())
    try:
        with contextlib.ExitStack() as stack:
            folder = make_folder(request, caller, draft.run, stack)
            for known in (steps or _steps)(request, caller, draft, folder, stack):
                draft = known
            store_result(folder, draft)
            return draft, None
    except (SandboxError, OSError, MemoryError) as exc:
        return ended_by(exc, draft, caller)


def make_folder(request: RunRequest, caller: RunCaller, run_id: str, stack: contextlib.ExitStack) -> RunFolder:
    """Make the folder of a run, in which `x07 ps` finds the run and `x07 kill` a way to end it. Raises HostError."""
    folder = RunFolder(run_id, stack)
    folder.accept_kill(caller.cancel)
    _store(folder.path / REQUEST, _request_document(request))
    return folder


def store_result(folder: RunFolder, result: Result) -> None:
    """Store the result in the folder of its run."""
    _store(folder.path / "result.json", msgspec.json.encode(result.document()))


def ended_by(
    exc: SandboxError | OSError | MemoryError, draft: Result, caller: RunCaller
) -> tuple[Result, SandboxError]:
    """Return the result of a run that *exc* has ended, and the error to raise. A bug is raised instead."""
    if isinstance(exc, SandboxError):
        exc.word_for(caller.word)
        return ended(_with_cause(draft, exc), verdict_of(exc, caller.cancel.signal)), exc
    from x07_sandbox.host.os_errors import host_error

    if (error := host_error(exc)) is None:
        raise exc
    return ended(draft, verdict_of(error)), error


def failure(exc: Exception, signalled: int | None = None) -> Result:
    """Return the result for *exc*, an error before the start or a bug. signalled: the signal that cancelled the run."""
    from x07_sandbox.policy.outcomes import verdict

    draft = draft_result(new_run_id())
    if isinstance(exc, SandboxError):
        return ended(_with_cause(draft, exc), verdict_of(exc, signalled))
    return ended(draft, verdict("internal-error", "bug", {"problem": f"{type(exc).__name__}: {exc}"}))


def _steps(
    request: RunRequest, caller: RunCaller, draft: Result, folder: RunFolder, stack: contextlib.ExitStack
) -> Iterator[Result]:
    """Carry out the steps of a run, and yield a more complete result after each."""
    from x07_sandbox.policy.outcomes import limit_set_by, with_denied_tasks

    prepared, host_files, draft = yield from planned(request, caller, draft, folder, stack)
    artifact = caller.artifact or folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
    failed, draft = yield from obtain_artifact(prepared, draft, folder, artifact)
    if failed is not None:
        yield ended(draft, failed, caller.word)
        return
    draft = replace(draft, digests=replace(draft.digests, artifact=f"sha256:{artifact.sha256()}"))
    spec, draft = described(prepared, artifact, host_files, draft, stack)
    yield draft
    end = run_job(prepared, spec, draft.run, folder)
    ending = end.ending
    if _has_fixed_output(end, prepared):
        ending = limit_set_by(ending, fixed="fixed")
    ending = with_setter(ending, prepared)
    ending = without_command(ending, end.facts.evidence.exec_errno, prepared, prepared.program.source.name)
    draft = _with_denials(draft, prepared, spec, end)
    ending = with_denied_tasks(ending, draft.denials)
    draft = _with_run(draft, end, worded_report(end.report, ending, caller.word))
    left = {} if spec.receivers.left is None else spec.receivers.left.files()
    draft = replace(draft, files=left, files_discarded=_discarded(end.facts.closed, left))
    yield draft
    why_kept = "" if ending.outcome in {"ok", "failed"} else "the program did not end by itself"
    yield settled(draft, host_files, request.changes, why_kept, ending, caller.word)


def build_steps(
    request: RunRequest, caller: RunCaller, draft: Result, folder: RunFolder, stack: contextlib.ExitStack
) -> Iterator[Result]:
    """Carry out the steps of a run until the program is in the caller's file for it, and yield results like a run."""
    from x07_sandbox.policy.outcomes import verdict

    prepared, draft = yield from prepare(request, caller, draft, stack)
    prepared.plan.require(() if request.overrides is None else request.overrides.given)
    assert caller.artifact is not None  # noqa: S101 - for the type checker
    ending, draft = yield from obtain_artifact(prepared, draft, folder, caller.artifact)
    if ending is None:
        draft = replace(draft, digests=replace(draft.digests, artifact=f"sha256:{caller.artifact.sha256()}"))
        ending = replace(verdict("ok", "built"), exit_code=0)
    yield ended(draft, ending, caller.word)


def planned(
    request: RunRequest, caller: RunCaller, draft: Result, folder: RunFolder, stack: contextlib.ExitStack
) -> Step[tuple[Prepared, HostFiles | None, Result]]:
    """Check and plan a request, and copy its host files for the guest. Raises SandboxError."""
    prepared, draft = yield from prepare(request, caller, draft, stack)
    overrides = request.overrides
    if overrides is not None:
        _store(folder.path / "policy.json", prepared.policy.data)
    refusals = [_denial(refusal.field, refusal.why, refusal.how_to_allow) for refusal in prepared.plan.refusals]
    draft = _more(draft, refusals)
    yield draft
    prepared.plan.require(() if overrides is None else overrides.given)
    host_files, draft = yield from copy_in(prepared, draft, folder, stack)
    prepared, draft = _scaled(prepared, draft)
    draft = replace(draft, limits=prepared.plan.limits.of_policy())
    yield draft
    return prepared, host_files, draft


def described(
    prepared: Prepared, artifact: OutFile, host_files: HostFiles | None, draft: Result, stack: contextlib.ExitStack
) -> tuple[PhaseSpec, Result]:
    """Return the description of the run phase, and the draft with what it says of the program."""
    spec = run_spec(prepared, artifact, stack, host_files)
    if prepared.program.toolchain is COMMAND:
        digests = replace(draft.digests, source=None, artifact=None)
        draft = replace(draft, digests=digests, artifact_from=None)
    return spec, replace(draft, filters=_filters(prepared, spec))


def _more(draft: Result, denials: list[Denial]) -> Result:
    return replace(draft, denials=[*draft.denials, *denials])


def verdict_of(exc: SandboxError, signalled: int | None = None) -> Verdict:
    """Return the verdict on a run that an error has ended. signalled: the signal that cancelled the run."""
    from x07_sandbox.policy.outcomes import OUTCOMES, Verdict, cancelled_verdict

    if isinstance(exc, Cancelled):
        return cancelled_verdict(signalled or 0)
    outcome = next(outcome for kinds, outcome in _KNOWN_OUTCOMES if isinstance(exc, kinds))
    ours = isinstance(exc, (ImageError, HostError, BackendError))
    return Verdict(outcome=outcome, fault="host" if ours else OUTCOMES[outcome].fault, code=exc.code, error=exc)


def ended(draft: Result, ending: Verdict, word: Callable[[Flag], str] = str, *, exit_code: int | None = None) -> Result:
    """Return the draft with the verdict filled in. word: see `errors.worded`.

    exit_code: the exit code of `x07 run`; None for the verdict's.
    """
    return replace(
        draft,
        outcome=ending.outcome,
        fault=ending.fault,
        reason_code=ending.code,
        reason=ending.reason_for(word),
        x07_exit_code=ending.x07_exit_code if exit_code is None else exit_code,
        exit_code=ending.exit_code,
        signal=ending.signal,
    )


def _with_cause(draft: Result, exc: SandboxError) -> Result:
    if exc.policy_cause is None:
        return draft
    field, value = exc.policy_cause
    how = None if value is None else HowToAllow(json_path=f"$.{field}", value=value)
    return _more(draft, [_denial(field, f"{exc.what}: {exc.why}", how)])


def copy_in(
    prepared: Prepared, draft: Result, folder: RunFolder, stack: contextlib.ExitStack
) -> Step[tuple[HostFiles | None, Result]]:
    """Copy any host files of a run for the guest. Add denials of left-out entries to the draft. Raises SandboxError."""
    request, policy, caller = prepared.request, prepared.policy.policy, prepared.caller
    roots = policy.fs.enabled and (policy.fs.read_roots or policy.fs.write_roots)
    if request.out is None and request.workdir is None and not roots:
        return None, draft
    # Imported only for runs with files.
    from x07_sandbox.files.copy import EntriesError
    from x07_sandbox.sessions.host_files import HostFiles, too_many
    from x07_sandbox.sessions.saved_changes import recover_all

    recover_all(caller.progress)  # for library callers; commands did it at their start
    with caller.cancel.waiting():
        try:
            host_files = HostFiles(prepared, folder, stack)
        except EntriesError as exc:
            yield _more(draft, [too_many(policy, "copy", exc.why)])
            raise
    return host_files, _more(draft, host_files.denials())


def _filters(prepared: Prepared, spec: PhaseSpec) -> dict[str, str]:
    if prepared.image is None:
        return {}
    known = prepared.image.manifest.filters
    return {name: f"sha256:{known[name].sha256}" for name in spec.filters}


def _with_run(draft: Result, end: JobEnd, report: PhaseReport) -> Result:
    digests = replace(draft.digests, output=f"sha256:{end.output_sha256}")
    problem, warnings = end.facts.input_problem, [*draft.warnings, *end.warnings]
    if problem:
        warnings.append(f"the input could not be read to its end: {problem}")
    if end.facts.input_sha256 is not None:
        digests = replace(digests, input=f"sha256:{end.facts.input_sha256}")
    return replace(
        draft,
        phases={**draft.phases, "run": report},
        stdout=report.stdout,
        stderr=report.stderr,
        jail=end.jail,
        digests=digests,
        net=end.net,
        input_problem=problem or None,
        warnings=warnings,
    )


def _scaled(prepared: Prepared, draft: Result) -> tuple[Prepared, Result]:
    if not wants_scaling(prepared):
        return prepared, draft
    from x07_sandbox.sessions.scaling import measured_factor, scale  # most runs are not scaled

    try:
        prepared, scaling, warnings = scale(prepared, measured_factor(prepared))
    except (HostError, BackendError) as exc:
        return prepared, replace(
            draft,
            warnings=[
                *draft.warnings,
                f"the limits were not scaled ({exc.what}: {exc.why}). {exc.fix}{exc.stop}",
            ],
        )
    return prepared, replace(draft, scaling=scaling, warnings=[*draft.warnings, *warnings])


def with_setter(ending: Verdict, prepared: Prepared) -> Verdict:
    """Return the verdict with the flag that set a reached limit, if the limit is not the policy's."""
    from x07_sandbox.policy.outcomes import limit_set_by

    field, cpu_ms, changes = ending.limited_by, prepared.program.cpu_ms, prepared.request.limits
    if field == "limits.cpu_ms" and cpu_ms is not None and cpu_ms < prepared.policy.policy.limits.cpu_ms:
        return limit_set_by(ending, option=Flag("--cpu-time-limit-seconds"))
    for name in () if changes is None else changes.given():
        if field == f"limits.{name}":
            from x07_sandbox.policy.changes import NAMES

            return limit_set_by(ending, option=Flag(NAMES[name].flag))
    return ending


def _has_fixed_output(end: JobEnd, prepared: Prepared) -> bool:
    """Return whether no flag changes the exceeded output limit."""
    return prepared.program.toolchain.protocol is not None and end.facts.evidence.output_overflow == "stderr"


def _discarded(closed: Closed | None, taken: dict[str, bytes]) -> Discarded:
    if closed is None:
        return Discarded()
    count, size = closed.left_files - len(taken), closed.left_bytes - sum(map(len, taken.values()))
    return Discarded(count=max(0, count), bytes=max(0, size))


def without_command(ending: Verdict, exec_errno: int, prepared: Prepared, word: str) -> Verdict:
    """Return the verdict on the command *word*, with advice if there is no such command."""
    if prepared.program.toolchain is not COMMAND or exec_errno != errno.ENOENT:
        return ending
    name, image = ascii(word)[1:-1], prepared.image_name
    if prepared.image is None:
        return replace(ending, code="command-not-on-host", params={"name": name})
    if "/" in name or prepared.image.manifest.program is not None:
        return replace(ending, code="command-not-in-vm", params={"name": name})
    from x07_sandbox.policy.packages import package_of_program

    flag, package = package_of_program(name)
    add = "To add a Python package" if flag == "--pip" else "To add the Debian package that has it"
    add = add if package == "PACKAGE" else "To add it"
    command = image_in_use(prepared.image, image).adding(flag, [package]).text
    params = {"name": name, "image": image, "advice": add, "command": command}
    return replace(ending, code="command-not-in-image", params=params)


def _with_denials(draft: Result, prepared: Prepared, spec: PhaseSpec, end: JobEnd) -> Result:
    exited, refused, outcome = end.facts.exited, end.facts.denied, end.ending.outcome
    tasks, disk, memory = 0, False, False
    if exited is not None:
        draft = replace(draft, denials_lost=exited.denials_lost)
        tasks, disk, memory = exited.tasks_refused, exited.disk_full, exited.memory_full
    disconnected = end.net is not None and end.net.denied
    if outcome == "ok" and not (refused or tasks or disk or memory or disconnected):
        return draft
    from x07_sandbox.policy import observed  # imported only for programs that were denied something
    from x07_sandbox.policy.outcomes import mostly_waited

    policy, program = prepared.policy.policy, prepared.program
    reach = prepared.policy.reach()
    found, more = denied(refused, end.net, prepared, spec, spec.order.cwd, _tail(end))
    denials = [*found, *draft.denials]
    draft = replace(draft, denials_lost=draft.denials_lost + more)
    if tasks:
        denials.append(observed.more_tasks(policy, run_limits(policy).max_live, tasks, reach))
    if disk:
        denials.append(observed.disk_full())
    if memory:
        denials.append(observed.memory_full(policy, reach))
    if limit := observed.limit_hit(outcome, policy, reach, cpu_ms=program.cpu_ms):
        scalable = outcome in {"timeout", "cpu-limit"} and prepared.availability.features.emulated
        scalable = scalable and not (outcome == "timeout" and mostly_waited(end.facts.evidence, spec.limits_shown))
        if scalable and draft.scaling is None and prepared.request.scale_limits is not False:
            limit = replace(limit, reason=SCALING_HINT)
        denials.append(limit)
    if outcome == "output-limit":
        stream, caps = str(end.facts.evidence.output_overflow), output_caps(prepared.request, program.toolchain)
        denials.append(observed.too_much_output(stream, None if _has_fixed_output(end, prepared) else caps[0]))
    return replace(draft, denials=denials, hints=without_repetition(_hints(outcome, prepared, spec, end), denials))


def denied(
    refused: Sequence[Denied], net: NetworkUse | None, prepared: Prepared, spec: PhaseSpec, cwd: str, tail: bytes
) -> tuple[list[Denial], int]:
    """Return what a command was denied, and the number of denials that the list does not contain.

    refused: what the guest reported. net: what the gate reported, if there is one. tail: the end of the output.
    """
    from x07_sandbox.policy import observed

    policy = prepared.policy
    found, more = observed.denials(refused, policy.policy, spec.areas, cwd, policy.reach()), 0
    connections: list[Denial] = []
    if net is not None and prepared.egress is not None:
        from x07_sandbox.sessions.egress import denials as denied_connections

        connections, more = denied_connections(net, prepared.egress.allowlist, tail.decode("utf-8", "replace"))
    elif any(one.by == observed.NETWORK for one in refused):
        from x07_sandbox.sessions.egress import denials_without_gate

        boundary = prepared.availability.features.words.boundary
        connections = denials_without_gate(refused, policy, boundary, tail.decode("utf-8", "replace"))
    return [*found, *connections], more


def without_repetition(hints: list[Hint], denials: Sequence[Denial]) -> list[Hint]:
    """Return the hints without those on connections, if the denials name connections."""
    if any(one.action in CONNECTS for one in denials):
        return [hint for hint in hints if hint.kind != "network"]
    return hints


def _hints(outcome: str, prepared: Prepared, spec: PhaseSpec, end: JobEnd) -> list[Hint]:
    if outcome == "ok":
        return []
    from x07_sandbox.sessions.hint_context import hints_for, missing_interpreter

    if tail := _tail(end):
        return hints_for(tail, prepared, spec)
    if end.facts.evidence.exec_errno == errno.ENOENT:
        return missing_interpreter(prepared.program, image_in_use(prepared.image, prepared.image_name))
    return []


def _tail(end: JobEnd) -> bytes:
    """Return the ends of both outputs of the program."""
    sizes = [(fd, os.fstat(fd).st_size) for fd in end.output_fds]
    return b"\n".join(os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES)) for fd, size in sizes if size)


def settled(
    draft: Result,
    host_files: HostFiles | None,
    choice: ChangesChoice,
    why_kept: str,
    ending: Verdict,
    word: Callable[[Flag], str],
) -> Result:
    """Apply, save or discard any changes to host files (`HostFiles.settle`), and return the result.

    An invalid report by the guest replaces *ending*.
    """
    if host_files is None:
        return ended(draft, ending, word)
    from x07_sandbox.errors import PeerError
    from x07_sandbox.policy.outcomes import REFUSED_EXIT, cancelled_verdict, verdict

    try:
        changes, refused, warning = host_files.settle(choice, why_kept)
    except PeerError as exc:
        return ended(draft, verdict("guest-lost", "protocol", {"problem": exc.why}, fault="program"))
    draft = replace(_more(draft, refused), changes=changes)
    if warning:
        draft = replace(draft, warnings=[*draft.warnings, warning])
    if host_files.cancelled_by is not None:
        return ended(draft, cancelled_verdict(host_files.cancelled_by, "cancelled-before-apply"))
    not_applied = ending.outcome == "ok" and changes.reason
    return ended(draft, ending, word, exit_code=REFUSED_EXIT if not_applied else None)


def _denial(field: str, why: str, how: HowToAllow | None) -> Denial:
    return Denial(
        field=field, action="plan", subject=why, enforced_by="plan", observed_by="host", count=1, how_to_allow=how
    )


def _request_document(request: RunRequest) -> bytes:
    """Return the data about a run that `x07 ps` shows. It omits the program's arguments, which may hold secrets."""
    named = request.program or "".join(request.command[:1])
    program = os.fsencode(named).decode("utf-8", "backslashreplace") if named else None
    return msgspec.json.encode({"schema_version": "x07.sandbox.request@0.1.0", "program": program})


def _store(path: Path, data: bytes) -> None:
    with contextlib.suppress(OSError):
        path.write_bytes(data)
        path.chmod(0o600)
