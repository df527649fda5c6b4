"""One run from request to result: a session with one command, and before it perhaps another one for the build.

Before a run, jobs of dead x07 processes are removed, and after it, records of runs that exceed the limits.

Each step fills in the draft of the result, so an interrupted run ends with what is known.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from x07_sandbox.host.documents import prepared as prepared_model
from x07_sandbox.host.paths import cache_dir, state_dir
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.policy.denials import Denial, HowToAllow, Outcome
from x07_sandbox.policy.guest import filters_of
from x07_sandbox.policy.model import PolicyError
from x07_sandbox.programs import artifacts
from x07_sandbox.programs.toolchains import OUTPUT, build_driver
from x07_sandbox.records.runs import JOB_NAME, REQUEST, RETENTION, new_run_id, runs_dir, unfinished_jobs
from x07_sandbox.sessions.job import JobEnd, run_job
from x07_sandbox.sessions.prepare import Prepared, output_caps, prepare, wants_scaling
from x07_sandbox.sessions.request import loaded, reach_of, sha256_text
from x07_sandbox.sessions.result import BuildOutput, Discarded, Draft, Result
from x07_sandbox.sessions.specs import build_spec, run_plan, run_spec
from x07_sandbox.sessions.transfers import TAIL_BYTES, RunFolder

if TYPE_CHECKING:
    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.channel.messages import Closed
    from x07_sandbox.policy.outcomes import Verdict
    from x07_sandbox.sessions.host_files import HostFiles
    from x07_sandbox.sessions.request import Program, RunCaller, RunRequest
    from x07_sandbox.sessions.result import ChangesChoice
    from x07_sandbox.sessions.specs import SessionSpec
    from x07_sandbox.sessions.transfers import OutFile

SCALING_HINT = "the VM is emulated; --scale-limits multiplies the time limits by its slowdown"

_KNOWN_OUTCOMES: tuple[tuple[tuple[type[SandboxError], ...], Outcome], ...] = (
    ((PolicyError, RefusedError, ImageError, HostError), "refused"),
    ((UsageError,), "usage-error"),
    ((BackendError,), "backend-error"),
)


# If there is nothing to remove before a run, the sweep costs one folder listing and a few stat(2).
_SWEEP_S: Final = 0.2
_NEWEST: Final = 512  # bounds the cost of a start
_RECENT_MS: Final = 3_600_000
_RETAIN_MS: Final = 3_600_000  # between removals of records
_SHARE: Final = 20  # sweeps take at most 1/20 of the time of a process with many jobs

_not_before = 0.0  # on the monotonic clock, for the next sweep


def carry_out(
    request: RunRequest, caller: RunCaller, say: Callable[[str], None] = lambda _text: None
) -> tuple[Result, SandboxError | None]:
    """Remove jobs of killed x07 processes, then carry out one run. Return its result, and the error that caused it.

    say: called with a message about removed jobs.
    """
    sweep_before_start(say)
    return attempt(request, caller)


def pool_machines() -> MachineSource | None:
    """Return the VMs of `x07 pool`, or None if this user has no pool."""
    if not os.path.lexists(cache_dir() / "pool" / "socket"):
        return None
    from x07_sandbox.backends.lease import PoolClient  # few users have one

    return PoolClient()


def sweep_before_start(say: Callable[[str], None] = lambda _text: None) -> None:
    """Remove jobs of dead x07 processes, within 0.2 s. Errors are ignored. say: called with a line after a removal."""
    global _not_before  # noqa: PLW0603 - one time per process
    started_at = time.monotonic()
    if started_at < _not_before:
        return
    with contextlib.suppress(SandboxError, OSError):
        if any(not _surely_lives(name) for name in unfinished_jobs(state_dir(), _NEWEST)):
            # Usually there is nothing to remove.
            from x07_sandbox.backends.registry import find
            from x07_sandbox.records.pruning import Pruner
            from x07_sandbox.records.sweep import sweep_jobs

            pruner = Pruner(say, dry_run=False)
            sweep_jobs(pruner, find, _SWEEP_S)
            if count := len(pruner.removed):
                say(f"removed {count} job{'' if count == 1 else 's'} of dead x07 processes")
    now = time.monotonic()
    _not_before = now + _SHARE * (now - started_at)


def _surely_lives(name: str) -> bool:
    """Whether a job is young and the pid in its name is in use. Then the job's record need not be read."""
    match = JOB_NAME.fullmatch(name)
    return match is not None and unix_ms() - int(match[2]) < _RECENT_MS and os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110


def retain_records(say: Callable[[str], None] = lambda _text: None) -> None:
    """After a run, and at most once an hour, remove records of runs that exceed the limits. Errors are ignored.

    say: called with a line the first time that something is removed.
    """
    with contextlib.suppress(SandboxError, OSError):
        mark = runs_dir(state_dir()) / RETENTION
        if os.path.lexists(mark) and abs(unix_ms() - mark.lstat().st_mtime_ns // 1_000_000) < _RETAIN_MS:
            return
        from x07_sandbox.records.pruning import remove_excess  # usually there is nothing to remove

        remove_excess(mark, say)


def attempt(request: RunRequest, caller: RunCaller, *, build_only: bool = False) -> tuple[Result, SandboxError | None]:
    """Carry out one run; return the result and the error that caused it, if any. Only a bug raises an exception.

    build_only: whether the run ends once the program is in the caller's file for it.
    """
    draft = Draft(new_run_id())
    try:
        with contextlib.ExitStack() as stack:
            folder = make_folder(request, caller, draft.result.run, stack)
            (_build_only if build_only else _run)(request, caller, draft, folder, stack)
            store_result(folder.path, draft.result)
            return draft.result, None
    except (SandboxError, OSError, MemoryError) as exc:
        return ended_by(exc, draft, caller)


def make_folder(
    request: RunRequest, caller: RunCaller, run_id: str, stack: contextlib.ExitStack, name: str = ""
) -> RunFolder:
    """Make the folder of a run, in which `x07 ps` finds the run and `x07 kill` a way to end it. Raises HostError.

    name: by which `x07 ps` shows the run, instead of its program or command. Arguments may hold secrets.
    """
    folder = RunFolder(run_id, stack)
    folder.accept_kill(caller.cancel)
    named = name or request.program or "".join(request.command[:1])
    program = os.fsencode(named).decode("utf-8", "backslashreplace") if named else None
    document = {"schema_version": "x07.sandbox.request@0.1.0", "program": program}
    _store(folder.path / REQUEST, msgspec.json.encode(document))
    return folder


def store_result(folder: Path, result: Result) -> None:
    """Store the result in the folder of its run."""
    _store(folder / "result.json", msgspec.json.encode(result.document()))


def ended_by(exc: SandboxError | OSError | MemoryError, draft: Draft, caller: RunCaller) -> tuple[Result, SandboxError]:
    """Return the result of a run that *exc* has ended, and the error to raise. A bug is raised instead."""
    if isinstance(exc, SandboxError):
        exc.word_for(caller.word)
        _note_cause(draft, exc)
        return ended(draft.result, verdict_of(exc, caller.cancel.signal)), exc
    from x07_sandbox.host.paths import host_error

    if (error := host_error(exc)) is None:
        raise exc
    return ended(draft.result, verdict_of(error)), error


def failure(exc: Exception, signalled: int | None = None) -> Result:
    """Return the result for *exc*, an error before the start or a bug. signalled: the signal that cancelled the run."""
    from x07_sandbox.policy.outcomes import verdict

    draft = Draft(new_run_id())
    if isinstance(exc, SandboxError):
        _note_cause(draft, exc)
        return ended(draft.result, verdict_of(exc, signalled))
    return ended(draft.result, verdict("internal-error", "bug", {"problem": f"{type(exc).__name__}: {exc}"}))


def _run(request: RunRequest, caller: RunCaller, draft: Draft, folder: RunFolder, stack: contextlib.ExitStack) -> None:
    """Carry out a run."""
    request, program = loaded(request, caller, stack)
    prepared = planned(request, program, caller, draft, folder, stack)
    host_files = cache(partial(copy_in, prepared, draft, folder, stack))
    artifact: OutFile | None = None
    if program is not None:
        artifact = caller.artifact or folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
        failed = obtain_artifact(prepared, program, draft, folder, artifact, host_files)
        if failed is not None:
            draft.result = ended(draft.result, failed, caller.word)
            return
    end = run_job(
        prepared, run_plan(prepared, lambda: described(prepared, artifact, host_files(), draft, stack)), folder
    )
    spec = end.job.spec
    ending = _concluded(end, prepared, spec, draft)
    _fill_in(draft, end, ending, caller)
    left = {} if spec.receivers.left is None else spec.receivers.left.files()
    draft.set(files=left, files_discarded=_discarded(end.facts.closed, left))
    why_kept = "" if ending.outcome in {"ok", "failed"} else "the program did not end by itself"
    settle(draft, host_files(), request.changes, why_kept, ending, caller.word)


def _build_only(
    request: RunRequest, caller: RunCaller, draft: Draft, folder: RunFolder, stack: contextlib.ExitStack
) -> None:
    """Carry out the steps of a run until the program is in the caller's file for it."""
    from x07_sandbox.policy.outcomes import verdict

    request, program = loaded(request, caller, stack)
    prepared = prepare(request, program, caller, draft, stack)
    prepared.plan.require(() if request.overrides is None else request.overrides.given)
    assert caller.artifact is not None
    assert program is not None
    ending = obtain_artifact(prepared, program, draft, folder, caller.artifact)
    if ending is None:
        draft.set_digests(artifact=f"sha256:{caller.artifact.sha256()}")
        ending = replace(verdict("ok", "built"), exit_code=0)
    draft.result = ended(draft.result, ending, caller.word)


def planned(
    request: RunRequest,
    program: Program | None,
    caller: RunCaller,
    draft: Draft,
    folder: RunFolder,
    stack: contextlib.ExitStack,
) -> Prepared:
    """Check and plan a request. Raises SandboxError."""
    prepared = prepare(request, program, caller, draft, stack)
    overrides = request.overrides
    if overrides is not None:
        _store(folder.path / "policy.json", prepared.policy.data)
    draft.deny(*(_denial(refusal.field, refusal.why, refusal.how_to_allow) for refusal in prepared.plan.refusals))
    prepared.plan.require(() if overrides is None else overrides.given)
    return _scaled(prepared, draft)


def described(
    prepared: Prepared,
    artifact: OutFile | None,
    host_files: HostFiles | None,
    draft: Draft,
    stack: contextlib.ExitStack,
) -> SessionSpec:
    """Return the description of the session, and note what the result says of it. Raises SandboxError."""
    draft.set(limits=prepared.plan.limits.of_policy())
    if artifact is not None:
        draft.set_digests(artifact=f"sha256:{artifact.sha256()}")
    spec = run_spec(prepared, artifact, stack, host_files)
    if prepared.image is not None:
        known = prepared.image.manifest.filters
        draft.set(filters={name: f"sha256:{known[name].sha256}" for name in filters_of(spec.opening.confine)})
    return spec


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


def _note_cause(draft: Draft, exc: SandboxError) -> None:
    """Note the field of the policy that caused an error, if there is one."""
    if exc.policy_cause is not None:
        field, value = exc.policy_cause
        how = None if value is None else HowToAllow(json_path=f"$.{field}", value=value)
        draft.deny(_denial(field, f"{exc.what}: {exc.why}", how))


def copy_in(prepared: Prepared, draft: Draft, folder: RunFolder, stack: contextlib.ExitStack) -> HostFiles | None:
    """Copy any host files of a run for the guest, and note what was left out. Raises SandboxError."""
    request, policy, caller = prepared.request, prepared.policy.policy, prepared.caller
    roots = policy.fs.enabled and (policy.fs.read_roots or policy.fs.write_roots)
    if request.out is None and request.workdir is None and not (roots or request.git):
        return None
    # Imported only for runs with files.
    from x07_sandbox.files.copy import EntriesError
    from x07_sandbox.sessions.host_files import HostFiles, too_many
    from x07_sandbox.sessions.saved_changes import recover_all

    recover_all(caller.progress)  # for library callers; commands did it at their start
    with caller.cancel.waiting():
        try:
            host_files = HostFiles(prepared, folder, stack)
        except EntriesError as exc:
            draft.deny(too_many(policy, "copy", exc.why))
            raise
    draft.deny(*host_files.denials())
    return host_files


def _scaled(prepared: Prepared, draft: Draft) -> Prepared:
    if not wants_scaling(prepared):
        return prepared
    from x07_sandbox.sessions.scaling import measured_factor, scale  # most runs are not scaled

    try:
        prepared, scaling, warnings = scale(prepared, measured_factor(prepared))
    except (HostError, BackendError) as exc:
        draft.warn(f"the limits were not scaled ({exc.what}: {exc.why}). {exc.fix}{exc.stop}")
        return prepared
    draft.set(scaling=scaling)
    draft.warn(*warnings)
    return prepared


def _fill_in(draft: Draft, end: JobEnd, ending: Verdict, caller: RunCaller) -> None:
    """Note what is known about the run's job."""
    report, facts = end.report(ending, caller.word), end.facts
    draft.set_phase("run", report)
    problem = facts.input_problem
    draft.set(
        stdout=report.stdout,
        stderr=report.stderr,
        jail=end.job.instance.jail,
        net=end.net,
        input_problem=problem or None,
    )
    draft.set_digests(output=f"sha256:{end.streams[0].sha256()}")
    if facts.input_sha256 is not None:
        draft.set_digests(input=f"sha256:{facts.input_sha256}")
    draft.warn(*end.job.warnings)
    if problem:
        draft.warn(f"the input could not be read to its end: {problem}")


def _has_fixed_output(end: JobEnd, prepared: Prepared) -> bool:
    """Return whether no flag changes the exceeded output limit."""
    return prepared.protocol is not None and end.facts.evidence.output_overflow == "stderr"


def _discarded(closed: Closed | None, taken: dict[str, bytes]) -> Discarded:
    if closed is None:
        return Discarded()
    count, size = closed.left_files - len(taken), closed.left_bytes - sum(map(len, taken.values()))
    return Discarded(count=max(0, count), bytes=max(0, size))


def _concluded(end: JobEnd, prepared: Prepared, spec: SessionSpec, draft: Draft) -> Verdict:
    """Return how the program ended, and note what it was denied."""
    found, exited = end.ending, end.facts.exited
    tried = bool(end.facts.denied) or (end.net is not None and bool(end.net.denied))
    if found.outcome == "ok" and exited is not None and not (tried or exited.tasks_refused):
        draft.deny(*_of_limits(end, found.outcome, prepared, spec, draft))
        draft.set(denials_lost=exited.denials_lost)
        return found
    from x07_sandbox.sessions.denials import Observed, ending_of  # most programs succeed

    if _has_fixed_output(end, prepared):
        from x07_sandbox.policy.outcomes import limit_set_by

        found = limit_set_by(found, fixed="fixed")
    seen = Observed(spec.order, end.facts, end.net, _tail(end))
    ending = ending_of(found, seen, prepared, spec, known=draft.result.denials)
    lost = ending.lost + (0 if exited is None else exited.denials_lost)
    denials = [*ending.denials, *_of_limits(end, found.outcome, prepared, spec, draft)]
    draft.set(denials=denials, denials_lost=lost, hints=ending.hints)
    return ending.verdict


def _of_limits(end: JobEnd, outcome: Outcome, prepared: Prepared, spec: SessionSpec, draft: Draft) -> list[Denial]:
    """Return the denials for limits that the program reached."""
    exited = end.facts.exited
    disk, memory = (False, False) if exited is None else (exited.disk_full, exited.memory_full)
    if outcome == "ok" and not (disk or memory):
        return []
    from x07_sandbox.policy import observed  # imported only for programs that were denied something
    from x07_sandbox.policy.outcomes import mostly_waited

    policy, reach = prepared.policy.policy, reach_of(prepared.policy)
    denials = [observed.disk_full()] if disk else []
    if memory:
        denials.append(observed.memory_full(policy, reach))
    if limit := observed.limit_hit(outcome, policy, reach, cpu_ms=prepared.cpu_ms):
        scalable = outcome in {"timeout", "cpu-limit"} and prepared.availability.features.emulated
        scalable = scalable and not (outcome == "timeout" and mostly_waited(end.facts.evidence, spec.limits_shown))
        if scalable and draft.result.scaling is None and prepared.request.scale_limits is not False:
            limit = replace(limit, reason=SCALING_HINT)
        denials.append(limit)
    if outcome == "output-limit":
        most = None if _has_fixed_output(end, prepared) else output_caps(prepared.request, prepared.protocol)[0]
        denials.append(observed.too_much_output(str(end.facts.evidence.output_overflow), most))
    return denials


def _tail(end: JobEnd) -> bytes:
    """Return the ends of both outputs of the program."""
    sizes = [(fd, os.fstat(fd).st_size) for fd in reversed(end.fds)]
    return b"\n".join(os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES)) for fd, size in sizes if size)


def settle(
    draft: Draft,
    host_files: HostFiles | None,
    choice: ChangesChoice,
    why_kept: str,
    ending: Verdict,
    word: Callable[[Flag], str],
) -> None:
    """Apply, save or discard any changes to host files (`HostFiles.settle`), and complete the result.

    An invalid report by the guest replaces *ending*.
    """
    if host_files is None:
        draft.result = ended(draft.result, ending, word)
        return
    from x07_sandbox.errors import PeerError
    from x07_sandbox.policy.outcomes import REFUSED_EXIT, cancelled_verdict, verdict

    try:
        changes, refused, warning = host_files.settle(choice, why_kept)
    except PeerError as exc:
        lost = verdict("guest-lost", "protocol", {"problem": exc.why}, fault="program")
        draft.result = ended(draft.result, lost)
        return
    draft.deny(*refused)
    draft.set(changes=changes)
    if warning:
        draft.warn(warning)
    if host_files.cancelled_by is not None:
        cancelled = cancelled_verdict(host_files.cancelled_by, "cancelled-before-apply")
        draft.result = ended(draft.result, cancelled)
        return
    not_applied = ending.outcome == "ok" and changes.reason
    draft.result = ended(draft.result, ending, word, exit_code=REFUSED_EXIT if not_applied else None)


def _denial(field: str, why: str, how: HowToAllow | None) -> Denial:
    return Denial(
        field=field, action="plan", subject=why, enforced_by="plan", observed_by="host", count=1, how_to_allow=how
    )


def _store(path: Path, data: bytes) -> None:
    with contextlib.suppress(OSError):
        path.write_bytes(data)
        path.chmod(0o600)


class _CachedBuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The notes in the cache about a build. status: the compiler's exit status; without an artifact unless it is 0."""

    status: int
    output: BuildOutput


def obtain_artifact(
    prepared: Prepared,
    program: Program,
    draft: Draft,
    folder: RunFolder,
    artifact: OutFile,
    before_build: Callable[[], object] = lambda: None,
) -> Verdict | None:
    """Fill *artifact* with the file that the run executes, and *draft* with the facts about the build.

    before_build: called before a build, if one is needed: it checks what would be refused afterwards.
    Return the verdict if the build failed, else None. Raises SandboxError.
    """
    if artifact.complete or program.toolchain.build is None:
        if not artifact.complete:
            artifact.complete = artifact.take(program.data)
        draft.set(artifact_from="caller")
        return None
    # The compiler is unknown without an image, so nothing is cached.
    if prepared.image is None or not prepared.request.cache:
        before_build()
        return _build(prepared, program, draft, folder, artifact)
    key = _key(prepared, program, prepared.image.manifest.digest)
    if (known := _recall(key, artifact)) is not None:
        return _from_cache(prepared, program, draft, known)
    before_build()
    most_s = min((prepared.request.build_wall_ms or settings.BUILD_WALL_MS) / 1000, prepared.request.queue_s)
    with artifacts.build_lock(key, prepared.caller.cancel.pause, most_s, prepared.caller.progress) as mostly_waited:
        if mostly_waited and (known := _recall(key, artifact)) is not None:
            return _from_cache(prepared, program, draft, known)
        return _build(prepared, program, draft, folder, artifact, key)


def _key(prepared: Prepared, program: Program, image_digest: str) -> str:
    toolchain = program.toolchain
    assert toolchain.build is not None
    extras = None if toolchain.protocol is None else toolchain.protocol.build_extras(prepared.policy.data)
    more = [] if extras is None else [sha256_text(part) for part in extras.key]
    more += [sha256_text(build_driver())] if toolchain.packs else []
    return artifacts.artifact_key(image_digest, toolchain.name, toolchain.build(program.source), program.sha256, *more)


def _from_cache(prepared: Prepared, program: Program, draft: Draft, known: _CachedBuild) -> Verdict | None:
    draft.set(artifact_from="cache", build=known.output)
    if known.status == 0:
        return None
    from x07_sandbox.policy.outcomes import Evidence, Stage, classify

    ending = classify(Evidence(stage=Stage.COLLECT, wait_status=known.status << 8))
    draft.set(stdout=known.output.stdout, stderr=known.output.stderr)
    return _verdict(prepared, program, ending)


def _verdict(prepared: Prepared, program: Program, found: Verdict) -> Verdict:
    from x07_sandbox.policy.outcomes import build_verdict

    subject = "check of the source" if program.toolchain.packs else "compiler"
    return build_verdict(found, prepared.request.build_wall_ms or settings.BUILD_WALL_MS, subject)


def _failed_by_itself(end: JobEnd) -> bool:
    """Return whether the compiler rejected the source, and so would again: it exited and met no limit."""
    exited = end.facts.exited
    if end.ending.outcome != "failed" or exited is None or end.facts.denied:
        return False
    limits = (exited.oom_kills, exited.tasks_refused, exited.disk_full, exited.memory_full, exited.denials_lost)
    return not any(limits)


def _build(
    prepared: Prepared, program: Program, draft: Draft, folder: RunFolder, artifact: OutFile, key: str | None = None
) -> Verdict | None:
    """Build the program, and store what a later build would repeat under *key*, if there is one."""
    from x07_sandbox.policy.outcomes import verdict

    draft.set(artifact_from="build")
    prepared.caller.progress(f"building {program.source.name or 'the project'} in a separate VM")
    with contextlib.ExitStack() as stack:
        end = run_job(prepared, build_spec(prepared, program, artifact, stack), folder)
    ending = _verdict(prepared, program, end.ending)
    # The phase says how the compiler ended, the run that the build failed.
    report = replace(end.report(ending, prepared.caller.word), outcome=end.ending.outcome)
    build = BuildOutput(stdout=report.stdout, stderr=report.stderr)
    draft.set_phase("build", report)
    draft.set(build=build, jail=end.job.instance.jail)
    draft.warn(*end.job.warnings)
    built = ending.outcome == "ok" and artifact.complete
    if key is not None and (built or _failed_by_itself(end)):
        notes = msgspec.json.encode(_CachedBuild(ending.exit_code or 0, build))
        artifacts.store_artifact(key, artifact.fd, artifact.size, artifact.sha256(), notes)
    if built:
        return None
    draft.set(stdout=report.stdout, stderr=report.stderr)
    if ending.outcome != "ok":
        return ending
    problem = (end.facts.closed and end.facts.closed.output_problem) or "is incomplete"
    return verdict("build-failed", "not-built", {"problem": problem}, fault="program")


def _recall(key: str, artifact: OutFile) -> _CachedBuild | None:
    with artifacts.cached_artifact(key) as found:
        if found is None or found.size > artifact.max_bytes:
            return None
        while artifact.size < found.size:
            data = os.pread(found.fd, min(1 << 20, found.size - artifact.size), artifacts.HEADER_BYTES + artifact.size)
            if not data or not artifact.take(data):
                break
        if artifact.sha256() == found.sha256:
            with contextlib.suppress(msgspec.MsgspecError):
                known = msgspec.json.decode(found.notes, type=prepared_model(_CachedBuild))
                artifact.complete = known.status == 0
                return known
    artifact.clear()
    artifacts.remove_artifact(key)
    return None
