"""The job of a session: its slot, its egress gate and its instance, from their start to the report about them."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from msgspec.structs import replace

from x07_sandbox.backends.base import Cloning, Fork, Instance, Job, MachineKind, NoAnswerError, evidence_of
from x07_sandbox.errors import BackendError, Flag, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.variables import flag
from x07_sandbox.policy.denials import NetworkUse
from x07_sandbox.records.admission import RUNS, Slots, admitted
from x07_sandbox.records.runs import ENDS, Claim
from x07_sandbox.sessions.prepare import Prepared, output_caps
from x07_sandbox.sessions.result import EMPTY_OUTPUT, PhaseReport
from x07_sandbox.sessions.specs import Planned, SessionSpec
from x07_sandbox.sessions.transfers import CommandStreams, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.network.processes import GateProcess
    from x07_sandbox.policy.outcomes import Evidence, Verdict
    from x07_sandbox.sessions.execution import Execution, Facts
    from x07_sandbox.sessions.session import Session
    from x07_sandbox.sessions.transfers import RunFolder


class SessionJob:
    """The job of one session, from its place in the queue to its end. A context manager.

    A VM starts before its session is described: that happens while it wakes. A session that is refused then ends a VM
    that has got nothing of it. instance: once it has started. warnings: about its start and its end.
    """

    instance: Instance

    def __init__(
        self,
        prepared: Prepared,
        planned: SessionSpec | Planned,
        folder: RunFolder,
        slots: Slots = RUNS,
        progress: Callable[[str], None] | None = None,
        fork: Fork | None = None,
    ) -> None:
        """Wait for a slot. Raises SandboxError.

        progress: gets the line that the job waits for a slot; None for that of the caller. fork: the snapshot to start
        from, if the session has been open before.
        """
        caller = prepared.caller
        self.warnings: list[str] = []
        self._prepared = prepared
        self._planned = planned
        self._spec = planned if isinstance(planned, SessionSpec) else None
        self._fork = fork
        self._run_id = folder.path.name
        self._vm = contextlib.ExitStack()
        self._gate: GateProcess | None = None
        self._is_ready = False
        self._problem: SandboxError | OSError | MemoryError | None = None
        self.before: list[NetworkUse] = []  # accounts of gates of earlier instances
        # Other backends need the description to start an instance, and the VMs of a pool wait already.
        if prepared.backend.cloning is None or caller.machines is not None:
            self._describe()
        self._needs_known = self._spec is not None
        with contextlib.ExitStack() as stack:
            slot = admitted(
                cancel_fd=caller.cancel.fd,
                timeout_s=prepared.request.queue_s,
                progress=progress or caller.progress,
                slots=slots,
                before_wait=self._describe,
            )
            stack.enter_context(slot)
            self._folder = folder.path
            self._rest = stack.pop_all()

    @property
    def spec(self) -> SessionSpec:
        """The description of the session."""
        self._describe()
        assert self._spec is not None
        return self._spec

    def _describe(self) -> None:
        if self._spec is None:
            assert isinstance(self._planned, Planned)
            self._spec = self._planned.describe()

    def _make_ready(self) -> None:
        """Do what the session needs, while its instance starts."""
        if self._is_ready:
            return
        self._is_ready = True
        import x07_sandbox.sessions.session  # noqa: F401 - to save time later

        try:
            self._describe()
            self._gate = self._new_gate(self._rest)
        except (SandboxError, OSError, MemoryError) as exc:
            self._problem = exc

    def _new_gate(self, stack: contextlib.ExitStack) -> GateProcess | None:
        if self._prepared.egress is None or self.spec.opening.network is None:
            return None
        from x07_sandbox.sessions.egress import gate_of

        return stack.enter_context(gate_of(self._prepared.egress, self._folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._rest, self._vm:
            pass

    def open(self, adopted: Sequence[Execution] = ()) -> Session:
        """Start the instance, and open the session on it. Raises SandboxError, such as NoAnswerError.

        adopted: the commands of a fork.
        """
        try:
            instance = self.instance = self._started()
        except SandboxError:
            if self._problem is not None:
                raise self._problem from None
            raise
        self._make_ready()
        if self._problem is not None:
            self._leave_no_record(instance)
            raise self._problem
        gate_fds = None
        if self._gate is not None:
            nonce = b"" if self._fork is None else instance.greeting.nonce
            gate_fds = self._gate.pidfd, self._gate.connect(instance.net_fd, self._vm, nonce)
        from x07_sandbox.sessions.session import Session

        cancel = self._prepared.caller.cancel
        if self._fork is not None:  # its guest has the files already
            return Session(instance, cancel, None, (), gate_fds, adopted)
        return Session(instance, cancel, self.spec.opening, self.spec.files, gate_fds)

    def _leave_no_record(self, instance: Instance) -> None:
        """End an instance whose session was refused, and remove its record."""
        from x07_sandbox.records.pruning import remove_record  # few sessions are refused so late

        self._vm.close()
        if os.path.lexists(instance.record.folder / ENDS[0]):  # it is proven gone
            with contextlib.suppress(OSError):
                remove_record(instance.record.folder)

    def replace(self, fork: Fork, adopted: Sequence[Execution], switch: Callable[[Session], object]) -> None:
        """Start an instance from a snapshot, call *switch* with its session, and end the instance before.

        Raises SandboxError, as *switch* may; the instance before goes on then.
        """
        instance, vm, gate, before = self.instance, self._vm, self._gate, self._fork
        self._vm, self._fork = contextlib.ExitStack(), fork
        try:
            self._gate = self._new_gate(self._rest)
            switch(self.open(adopted))
        except BaseException:
            self._vm.close()
            self.instance, self._vm, self._gate, self._fork = instance, vm, gate, before
            raise
        vm.close()
        if gate is not None:
            self.before.append(gate.account() or NetworkUse())

    def at_end(self, call: Callable[[], object]) -> None:
        """Call *call* when the job ends."""
        self._rest.callback(call)

    def connections(self) -> NetworkUse | None:
        """Return the account of the egress gate so far, or None if there is none."""
        return self._with_before(None if self._gate is None else self._gate.account_so_far())

    def _with_before(self, net: NetworkUse | None) -> NetworkUse | None:
        if net is None or not self.before:
            return net
        from x07_sandbox.sessions.egress import joined

        return joined([*self.before, net])

    def end(self, evidence: Evidence) -> tuple[Evidence, NetworkUse | None]:
        """End the instance, then the gate. Return the evidence with that of the gate, and its account."""
        self._vm.close()
        net = self._with_before(None if self._gate is None else self._gate.account())
        if self._gate is not None and net is None:
            if said := self._gate.last_message():
                self.warnings.append(f"the egress gate reported: {said}")
            elif evidence.deadline_passed:
                self.warnings.append("the egress gate did not answer, so the result lists no connections")
            evidence = replace(evidence, gate_lost=True)
        self._rest.close()
        self.warnings += self.instance.notes
        return evidence, net

    def report(
        self,
        ending: Verdict,
        word: Callable[[Flag], str],
        times_ms: dict[str, float],
        **use: Any,  # noqa: ANN401 - fields of a report
    ) -> PhaseReport:
        """Return the report about the job. word: see `errors.worded`. use: further fields of the report."""
        unmeasured: dict[str, Any] = {"stdout": EMPTY_OUTPUT, "stderr": EMPTY_OUTPUT}
        unmeasured |= {"cpu_ms": 0, "memory_peak_bytes": 0, "tasks_peak": 0}
        return PhaseReport(
            job_id=self.instance.record.job_id,
            start=self.instance.start_mode,
            outcome=ending.outcome,
            reason_code=ending.code,
            reason=ending.reason_for(word),
            times_ms=times_ms,
            **unmeasured | use,
        )

    def _started(self) -> Instance:
        """Return an instance whose agent has answered; `_vm` ends it. Raises SandboxError."""
        prepared, planned, stack = self._prepared, self._planned, self._vm
        caller, backend, cold = prepared.caller, prepared.backend, prepared.request.cold
        saved_first = flag("X07_VM_SAVE_FIRST")
        # A paused sandbox goes on in another process, so from the second machine on, the name has the process too.
        number = "" if self._fork is None or self._fork.number == 1 else f"-{self._fork.number}-{os.getpid()}"
        job = Job(
            claim=Claim(run_id=self._run_id, phase=f"{planned.name}{number}", wall_ms=planned.wall_ms),
            kind=planned.kind(prepared.image),
            caller=caller,
            needs=self.spec.needs if self._needs_known else None,
            cold=cold,
            meanwhile=self._make_ready,
            warm_up=_warm_up,
            save_later=None if saved_first else partial(_save_later, backend.name, caller.progress),
            fork=self._fork,
        )
        if caller.machines is not None and not cold and self._fork is None:
            try:
                if (waiting := caller.machines.claim(backend, job)) is not None:
                    return stack.enter_context(waiting)
            except BackendError as exc:
                why = f"{exc.what}: {exc.why}"
                if isinstance(exc, NoAnswerError):
                    if exc.failure.kind == "cancelled":
                        raise
                    why = "the VM did not answer"
                self.warnings.append(f"no VM of the pool was used for the {planned.name}: {why}")
                # The record of the failed job is kept.
                job = replace(job, claim=replace(job.claim, phase=f"{planned.name}-clone"))
        instance = stack.enter_context(backend.start(job))
        if not self._needs_known and self._problem is None and backend.cloning is not None:
            backend.cloning.limit_ram(instance, replace(job, needs=self.spec.needs).used_ram_bytes)
        return instance

    def unanswered(self, exc: NoAnswerError) -> Facts:
        """Return what is known about a job whose agent did not answer."""
        from x07_sandbox.sessions.execution import Facts

        self.instance = exc.instance
        cancelled_by = self._prepared.caller.cancel.signal
        return Facts(evidence=evidence_of(exc.failure, cancelled_by), times_ms=exc.times_ms)


class JobEnd(NamedTuple):
    """The end of a job with one command.

    streams: standard output and standard error. fds: of the files that store them, closed by RunFolder.
    """

    job: SessionJob
    ending: Verdict
    facts: Facts
    streams: tuple[Sink, Sink]
    fds: tuple[int, int]
    net: NetworkUse | None

    def report(self, ending: Verdict, word: Callable[[Flag], str]) -> PhaseReport:
        """Return the report about the job. ending: a verdict that may be more precise. word: see `errors.worded`."""
        from x07_sandbox.sessions.transfers import output_of

        outputs = dict(zip(("stdout", "stderr"), map(output_of, self.streams, self.fds), strict=True))
        exited = self.facts.exited
        used: dict[str, int] = {}
        if exited is not None:
            used = {"memory_peak_bytes": exited.memory_peak_bytes, "tasks_peak": exited.tasks_peak}
            used["cpu_ms"] = exited.cpu_us // 1000
        return self.job.report(ending, word, self.facts.times_ms, **outputs, **used)


def run_job(prepared: Prepared, planned: SessionSpec | Planned, folder: RunFolder) -> JobEnd:
    """Run one command in an instance of its own. Raises SandboxError if no instance could be started."""
    caller, raw = prepared.caller, prepared.request.raw
    if live := planned.name == "run":
        caps, names = output_caps(prepared.request, prepared.protocol), ("stdout", "stderr")
        live_fds = caller.live_stdout, caller.live_stderr
    else:
        caps, names, live_fds = (settings.OUTPUT_MAX_BYTES,) * 2, ("build-stdout", "build-stderr"), (None, None)
    (stdout, stdout_fd), (stderr, stderr_fd) = (
        folder.sink(name, live_fd=fd, max_bytes=most, raw=raw)
        for name, fd, most in zip(names, live_fds, caps, strict=True)
    )
    given = CommandStreams(
        stdin_fd=prepared.stdin_fd if live else None,
        stdout=stdout,
        stderr=stderr,
        on_started=lambda: caller.progress("") if live else None,
    )
    with SessionJob(prepared, planned, folder) as job:
        try:
            session, spec = job.open(), job.spec
            facts = session.run(spec.order, given, spec.wall_ms, spec.receivers)
        except NoAnswerError as exc:
            facts = job.unanswered(exc)
        evidence, net = job.end(facts.evidence)
    from x07_sandbox.policy.outcomes import classify
    from x07_sandbox.sessions.session import drain

    if not drain((stdout, stderr), caller.cancel):
        evidence = replace(evidence, cancelled_by=caller.cancel.signal or 0)
    ending = classify(evidence, features=prepared.availability.features, limits=job.spec.limits_shown)
    job.warnings += ending.warnings
    facts = replace(facts, evidence=evidence)
    return JobEnd(job, ending, facts, (stdout, stderr), (stdout_fd, stderr_fd), net)


def _warm_up(instance: Instance, kind: MachineKind, cloning: Cloning, cancel: Cancel) -> None:
    from x07_sandbox.sessions.saving import warm_up  # few runs save a process

    warm_up(instance, kind, cloning, cancel)


def _save_later(backend: str, progress: Callable[[str], None], kind: MachineKind) -> str:
    from x07_sandbox.sessions.saving import save_later  # as above

    return save_later(backend, kind, progress)
