"""Warm machines: clones that have run two programs of ours and wait, each for one program of somebody's.

An emulator pays about ten times for what it meets first. A machine that has been through a C and a Python program, and
has a fresh place for the next, runs that one in the time that it takes a machine that has been up for long. None is
ever used again once a program that is not ours has been in it.

Each is recorded and labelled like any job (`RUN-warm`), held to a deadline, and becomes the job of its claimer: first
the deadline, then the record, then the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.backends.base import Job, MachineKind, boots
from x07_sandbox.backends.qemu.backend import QemuBackend
from x07_sandbox.backends.qemu.talk import talk_until
from x07_sandbox.backends.qemu.template import warm_up
from x07_sandbox.backends.selection import heed_variables
from x07_sandbox.channel.frames import Kind
from x07_sandbox.channel.link import State
from x07_sandbox.errors import BackendError, Cancelled, HostError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.memory import memory_bytes
from x07_sandbox.host.processes import Identity, own_identity
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.jobs.admission import admitted, kept_warm
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.controls import run_limits
from x07_sandbox.plan.outcomes import Outcome, classify
from x07_sandbox.plan.sizes import ram_class_bytes
from x07_sandbox.policy import default_policy
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.runs.folder import RunFolder
from x07_sandbox.runs.phase import carry_out
from x07_sandbox.runs.program import load_program
from x07_sandbox.runs.request import RunRequest, policy_in_force
from x07_sandbox.runs.run import check_pinned, current_image
from x07_sandbox.runs.session import Progress, Session
from x07_sandbox.runs.streams import Cancel, Sink, memory_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.backends.qemu.instance import QemuInstance
    from x07_sandbox.runs.phase import PhaseSpec

_PROGRAMS: Final = tuple(Path(__file__).parents[1] / "programs" / "data" / name for name in ("warm.c", "warm.py"))
_INPUT: Final = b"hello\n"
_WALL_MS: Final = 30_000
_TRY_AGAIN_S: Final = 1.0
_FAILURES_MAX: Final = 3  # in a row: then the user is told, and it is tried again now and then
_TRY_LATER_S: Final = 10.0


class _MistimedError(BackendError):
    """A booted machine that measured its timer wrong; another may do better."""


class WarmMachine:
    """One machine that waits. It is its maker's until it is claimed, and its claimer's from then on."""

    def __init__(self, instance: QemuInstance, stack: contextlib.ExitStack, made_at: float) -> None:
        self.instance = instance
        self.made_at = made_at
        self._stack = stack

    def close(self) -> bool:
        """End it, with its record; whether it is proven gone. A second call does nothing."""
        self._stack.close()
        return self.instance.gone


class WarmMachines:
    """Keeps *size* machines warm, in a thread of its own, until it is closed. Thread-safe.

    image: name or digest; None for the default. progress: told of what takes seconds.
    """

    def __init__(
        self, size: int, *, image: str | None = None, progress: Callable[[str], None] = lambda _text: None
    ) -> None:
        heed_variables()
        memory = memory_bytes()
        most = memory // 4 // settings.WARM_BYTES
        if most < 1:
            each, here = settings.WARM_BYTES >> 20, memory >> 20
            why = f"one machine takes {each} MiB of a quarter of the memory, of which there are {here} MiB for us"
            raise HostError("cannot keep a pool", why, "Raise the limit of memory, or run programs without a pool")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            why = f"its size is {size!r}, and must be a whole number from 1 to {most}, which is what memory holds"
            raise UsageError("cannot keep a pool", why, "Set another size")
        self.size = size
        self._most = most
        self.claimed = 0
        self.problem: SandboxError | None = None
        self.used_at = time.monotonic()
        self._image_ref = image
        self._progress = progress
        self._stack = contextlib.ExitStack()
        self._cancel = Cancel()
        self._ready: deque[WarmMachine] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._closed = False
        self._owner_pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name="x07-warm", daemon=True)

    def start(self) -> None:
        """Open image and programs, and begin to make machines. Raises SandboxError."""
        try:
            self._stack.enter_context(kept_warm(self.size, self._most))
            self._image = self._stack.enter_context(open_image(current_image(find_image(self._image_ref))))
            check_pinned(self._image.manifest.digest)
            self._backend = QemuBackend(self._progress)
            self._backend.probe(self._image)
            self.kind = MachineKind(image=self._image, ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes))
            self._specs = tuple(self._spec(program) for program in _PROGRAMS)
        except BaseException:
            self._stack.close()
            self._cancel.close()
            raise
        self._thread.start()

    def _spec(self, program: Path) -> PhaseSpec:
        """The run of a program of ours, which is built now or was before."""
        so_far = Progress(run_id=new_run_id())
        folder = RunFolder(so_far.run_id, self._stack)
        try:
            request = RunRequest(program=program, cancel=self._cancel, progress=self._progress)
            request, loaded = load_program(request, self._stack)
            session = Session(request, loaded, so_far, folder, self._backend, self._image)
            artifact = folder.out_file(OUTPUT, settings.ARTIFACT_MAX_BYTES)
            failed = session.prepare(artifact)
            if failed is not None:
                raise BackendError("cannot warm a machine", f"{program.name}: {failed.reason}", "Run x07 doctor")
            in_force = policy_in_force(request)
            spec = session.run_spec(artifact, in_force, run_limits(in_force.policy), self._stack)
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)
        return msgspec.structs.replace(spec, wall_ms=_WALL_MS)

    # making

    def _keep(self) -> None:
        failures = 0
        while self._wait_until_wanted():
            try:
                machine = self._make()
            except Cancelled:
                return
            except (SandboxError, OSError) as exc:
                failures += 1
                with self._changed:
                    if failures >= _FAILURES_MAX:
                        self.problem = exc if isinstance(exc, SandboxError) else _out_of(exc)
                        self._changed.notify_all()
                    if not self._closing:
                        self._changed.wait(_TRY_AGAIN_S if failures < _FAILURES_MAX else _TRY_LATER_S)
                continue
            failures = 0
            with self._changed:
                self.problem = None
                if not self._closing:
                    self._ready.append(machine)
                    self._changed.notify_all()
                    continue
            machine.close()

    def _wait_until_wanted(self) -> bool:
        """Until a machine is missing, or one has waited for so long that its deadline nears; False at the end."""
        while True:
            with self._changed:
                if self._closing:
                    return False
                if len(self._ready) < self.size:
                    return True
                oldest = self._ready[0]
                left_s = oldest.made_at + settings.WARM_S - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                self._ready.popleft()
            oldest.close()

    def _make(self) -> WarmMachine:
        with admitted(cancel_fd=self._cancel.fd, timeout_s=settings.QUEUE_S, progress=self._progress):
            tries = boots()
            while True:
                last = next(tries)
                try:
                    return self._made()
                except _MistimedError:  # none is kept that has any timer: runs would not be told
                    if last:
                        raise

    def _made(self) -> WarmMachine:
        claim = Claim(run_id=new_run_id(), phase="warm", wall_ms=int(settings.WARM_S * 1000))
        with contextlib.ExitStack() as stack:
            record = create_record(claim, backend=self._backend.name, image_digest=self._image.manifest.digest)
            job = Job(record=record, kind=self.kind, deadline_s=claim.deadline_s)
            instance = stack.enter_context(self._backend.start(job))
            if instance.cold_reason:
                self._progress(f"booting a machine: {instance.cold_reason}")
            for spec in self._specs:
                self._run(instance, spec)
            return WarmMachine(instance, stack.pop_all(), time.monotonic())

    def _run(self, instance: QemuInstance, spec: PhaseSpec) -> None:
        """Have the machine run a program of ours and prepare the next place. Raises BackendError."""
        with contextlib.ExitStack() as stack:
            names = ("stdout", "stderr")
            sinks = [
                Sink(name, keep_fd=memory_file(b"", stack), live_fd=None, max_bytes=settings.MIB) for name in names
            ]
            stdin_fd = memory_file(_INPUT, stack)
            facts = carry_out(spec, instance, stdin_fd=stdin_fd, sinks=(sinks[0], sinks[1]), cancel=self._cancel)
            ending = classify(facts.evidence)
        if self._closing:
            raise Cancelled("the pool ends", "it was closed", "Start it again")
        if facts.unanswered and instance.begun == "clone" and not facts.evidence.killed:  # the next is booted
            self._backend.distrust(self.kind, f"a clone of it did not answer: {ending.reason}")
        if ending.outcome is not Outcome.OK:
            kind = _MistimedError if facts.mistimed else BackendError
            raise kind("cannot warm a machine", ending.reason, "Run x07 doctor")
        words = {State.COLLECTING: (Kind.WARM, warm_up(self.kind) | {"commands": []})}
        deadline = Deadline.after(settings.TEMPLATE_S)
        if why := talk_until(instance, State.WARM, deadline, begin=State.COLLECTING, words=words):
            raise BackendError("cannot warm a machine", why, "Run x07 doctor")
        instance.begun = "pool"  # also one that was booted is spoken to as one that waits from now on

    # giving out

    def in_a_child(self) -> bool:
        """Whether this is a process that was forked from the owner's: no machine is its to take, or to end."""
        return os.getpid() != self._owner_pid

    def ready(self) -> int:
        """How many wait now."""
        with self._changed:
            return len(self._ready)

    def wait_ready(self, deadline: Deadline) -> bool:
        """Until all are warm; whether they are. Raises SandboxError if none can be made."""
        with self._changed:
            while len(self._ready) < self.size and not deadline.passed() and not self._closing:
                if self.problem is not None:
                    raise self.problem
                self._changed.wait(deadline.left_s())
            return len(self._ready) >= self.size

    def serves(self, kind: MachineKind) -> bool:
        """Whether its machines are of that kind."""
        return kind.key == self.kind.key

    def take(self, claim: Claim, runner: Identity) -> WarmMachine | None:
        """One of them, as the job of *claim*, carried out by *runner*; None if none waits or it could not become it."""
        if self.in_a_child():
            return None
        with self._changed:
            if not self._ready or self._closing:
                return None
            machine = self._ready.popleft()
            self.used_at = time.monotonic()
            self._changed.notify_all()
        try:
            machine.instance.adopt(claim, runner)
        except (HostError, BackendError):
            machine.close()
            return None
        with self._changed:
            self.claimed += 1
        return machine

    def claim(self, kind: MachineKind, claim: Claim) -> contextlib.AbstractContextManager[QemuInstance] | None:
        """As `Machines` has it: one for a run of this process."""
        machine = self.take(claim, own_identity()) if self.serves(kind) else None
        return None if machine is None else _claimed(machine)

    def close(self) -> None:
        """End those that wait, and make no more. Those that were claimed are their claimers'."""
        if self.in_a_child():
            return
        with self._changed:
            if self._closing:
                self._changed.wait_for(lambda: self._closed)
                return
            self._closing = True
            waiting = list(self._ready)
            self._ready.clear()
            self._changed.notify_all()
        self._cancel()
        for machine in waiting:
            machine.close()
        if self._thread.ident is not None:
            self._thread.join()
        self._stack.close()
        self._cancel.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _out_of(exc: OSError) -> HostError:
    return HostError("cannot keep machines warm", exc.strerror or str(exc), "Raise the limit on open files: ulimit -n")


@contextlib.contextmanager
def _claimed(machine: WarmMachine) -> Iterator[QemuInstance]:
    try:
        yield machine.instance
    finally:
        machine.close()
