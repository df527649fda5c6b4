"""A job of a run: x07 starts an instance, runs one phase in the instance, and reports how the phase ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from x07_sandbox.backends.base import Cloning, Instance, Job, MachineKind, NoAnswerError
from x07_sandbox.backends.handshake import evidence_of
from x07_sandbox.errors import BackendError, Flag
from x07_sandbox.host import settings
from x07_sandbox.host.variables import flag
from x07_sandbox.records.admission import admitted
from x07_sandbox.records.record import Claim
from x07_sandbox.sessions.phase import PhaseSpec, needs_of, preload_phase, run_phase
from x07_sandbox.sessions.prepare import Prepared, output_caps
from x07_sandbox.sessions.result import PhaseReport
from x07_sandbox.sessions.transfers import CommandStreams, Sink

if TYPE_CHECKING:
    from x07_sandbox.host.cancel import Cancel
    from x07_sandbox.network.processes import GateProcess
    from x07_sandbox.network.summary import NetworkUse
    from x07_sandbox.policy.outcomes import Evidence, Verdict
    from x07_sandbox.sessions.execution import Facts
    from x07_sandbox.sessions.folder import RunFolder


class JobEnd(NamedTuple):
    """The result of a job. output_sha256: digest of standard output.

    output_fds: standard error and standard output, closed by RunFolder.
    """

    ending: Verdict
    facts: Facts
    report: PhaseReport
    jail: str
    output_sha256: str
    output_fds: tuple[int, int]
    warnings: tuple[str, ...]
    net: NetworkUse | None = None


def run_job(prepared: Prepared, spec: PhaseSpec, run_id: str, folder: RunFolder) -> JobEnd:
    """Run one phase in a new instance. Raises SandboxError if no instance could be started."""
    request, caller, raw = prepared.request, prepared.caller, prepared.request.raw
    if spec.name == "run":
        caps, prefix = output_caps(request, prepared.program.toolchain), ""
        live = caller.live_stdout, caller.live_stderr
    else:
        caps, prefix, live = (settings.OUTPUT_MAX_BYTES,) * 2, "build-", (None, None)
    stdout, stdout_fd = folder.sink(f"{prefix}stdout", live_fd=live[0], max_bytes=caps[0], raw=raw)
    stderr, stderr_fd = folder.sink(f"{prefix}stderr", live_fd=live[1], max_bytes=caps[1], raw=raw)
    with (
        admitted(cancel_fd=caller.cancel.fd, timeout_s=request.queue_s, progress=caller.progress),
        gate_for(prepared, spec, folder) as gate,
    ):
        instance, facts, warnings = _run_phase(prepared, spec, run_id, (stdout, stderr), gate)
        net = None if gate is None else gate.account()
    from x07_sandbox.policy.outcomes import classify
    from x07_sandbox.sessions.folder import output_of
    from x07_sandbox.sessions.session import drain

    evidence = facts.evidence
    if gate is not None and net is None:
        evidence = without_account(evidence, gate, warnings)
    if not drain((stdout, stderr), caller.cancel):
        evidence = replace(evidence, cancelled_by=caller.cancel.signal or 0)
    ending = classify(evidence, features=prepared.availability.features, limits=spec.limits_shown)
    warnings += ending.warnings
    report = PhaseReport(
        job_id=instance.record.job_id,
        start=instance.start_mode,
        outcome=ending.outcome,
        reason_code=ending.code,
        reason=ending.reason,
        times_ms=facts.times_ms,
        stdout=output_of(stdout, stdout_fd),
        stderr=output_of(stderr, stderr_fd),
        cpu_ms=0 if facts.exited is None else facts.exited.cpu_us // 1000,
        memory_peak_bytes=0 if facts.exited is None else facts.exited.memory_peak_bytes,
        tasks_peak=0 if facts.exited is None else facts.exited.tasks_peak,
    )
    return JobEnd(ending, facts, report, instance.jail, stdout.sha256(), (stderr_fd, stdout_fd), tuple(warnings), net)


def worded_report(report: PhaseReport, ending: Verdict, word: Callable[[Flag], str]) -> PhaseReport:
    """Return the report with the reason of a more precise verdict. word: see `errors.worded`."""
    return replace(report, reason_code=ending.code, reason=ending.reason_for(word))


def without_account(evidence: Evidence, gate: GateProcess, warnings: list[str]) -> Evidence:
    """Return the evidence about a phase whose gate gave no account, and add to *warnings*."""
    if said := gate.last_message():
        warnings.append(f"the egress gate reported: {said}")
    elif evidence.deadline_passed:
        warnings.append("the egress gate did not answer, so the result lists no connections")
    return replace(evidence, gate_lost=True)


def gate_for(
    prepared: Prepared, spec: PhaseSpec, folder: RunFolder
) -> contextlib.AbstractContextManager[GateProcess | None]:
    """Return the context of the egress gate of a phase, or of None if it has no network."""
    if prepared.egress is None or spec.opening.network is None:
        return contextlib.nullcontext()
    from x07_sandbox.sessions.egress import gate_of

    return gate_of(prepared.egress, folder.path)


def _run_phase(
    prepared: Prepared, spec: PhaseSpec, run_id: str, sinks: tuple[Sink, Sink], gate: GateProcess | None
) -> tuple[Instance, Facts, list[str]]:
    caller, live = prepared.caller, spec.name == "run"
    warnings: list[str] = []
    streams = CommandStreams(
        stdin_fd=prepared.stdin_fd if live else None,
        stdout=sinks[0],
        stderr=sinks[1],
        on_started=lambda: caller.progress("") if live else None,
    )
    try:
        with contextlib.ExitStack() as stack:
            instance = started(prepared, spec, run_id, stack, warnings)
            gate_fd = relay_fd = None
            if gate is not None:
                gate_fd, relay_fd = gate.pidfd, gate.connect(instance.net_fd, stack)
            facts = run_phase(spec, instance, streams, caller.cancel, gate_fd, relay_fd)
    except NoAnswerError as exc:
        from x07_sandbox.sessions.execution import Facts

        instance = exc.instance
        facts = Facts(evidence=evidence_of(exc.failure, caller.cancel.signal), times_ms=exc.times_ms)
    warnings += instance.notes
    return instance, facts, warnings


def _warm_up(instance: Instance, kind: MachineKind, cloning: Cloning, cancel: Cancel) -> None:
    from x07_sandbox.sessions.warm_up import warm_up  # few runs save a process

    warm_up(instance, kind, cloning, cancel)


def _save_later(backend: str, progress: Callable[[str], None], kind: MachineKind) -> str:
    from x07_sandbox.sessions.saving import save_later  # as above

    return save_later(backend, kind, progress)


def started(
    prepared: Prepared, spec: PhaseSpec, run_id: str, stack: contextlib.ExitStack, warnings: list[str]
) -> Instance:
    """Return an instance for a phase whose agent has answered; *stack* ends it. Raises SandboxError."""
    caller, backend, cold = prepared.caller, prepared.backend, prepared.request.cold
    job = Job(
        claim=Claim(run_id=run_id, phase=spec.name, wall_ms=spec.wall_ms),
        kind=MachineKind(
            image=prepared.image, ram_bytes=spec.ram_bytes, runtime=spec.name, network=spec.opening.network is not None
        ),
        caller=caller,
        needs=needs_of(spec),
        cold=cold,
        meanwhile=preload_phase,
        warm_up=_warm_up,
        save_later=None if flag("X07_VM_SAVE_FIRST") else partial(_save_later, backend.name, caller.progress),
    )
    if caller.machines is not None and not cold:
        try:
            if (waiting := caller.machines.claim(backend, job)) is not None:
                return stack.enter_context(waiting)
        except BackendError as exc:
            why = f"{exc.what}: {exc.why}"
            if isinstance(exc, NoAnswerError):
                if exc.failure.kind == "cancelled":
                    raise
                why = "the VM did not answer"
            warnings.append(f"no VM of the pool was used for the {spec.name}: {why}")
            # The record of the failed job is kept.
            job = replace(job, claim=replace(job.claim, phase=f"{spec.name}-clone"))
    return stack.enter_context(backend.start(job))
