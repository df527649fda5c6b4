"""Warm machines: cloned VMs that have run the warm-up programs. Each waits for one program of the user.

Each machine is recorded as a job (`RUN-warm`) with a deadline. A run that claims a machine takes over the machine's
deadline, then its record, then the machine itself. The programs are in sessions/saving.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from x07_sandbox.backends.base import Backend, Cloning, Instance, Job, MachineKind, NoAnswerError, claimed
from x07_sandbox.backends.registry import choice_from_environment, create
from x07_sandbox.errors import BackendError, Cancelled, Command, HostError, SandboxError, UsageError, whole_number
from x07_sandbox.host import settings
from x07_sandbox.host.linux import memory_bytes
from x07_sandbox.host.processes import Identity, own_identity
from x07_sandbox.host.waiting import Caller, Cancel, Deadline
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.guest import ram_class_bytes
from x07_sandbox.records.admission import admitted, warm_slots
from x07_sandbox.records.runs import Claim, new_run_id
from x07_sandbox.sessions.prepare import check_pinned, current_image
from x07_sandbox.sessions.saving import needs_of_programs, warm_up

_QUIET_S: Final = 0.25  # after a machine was taken and others are left
_TRY_AGAIN_S: Final = 1.0
_FAILURES_MAX: Final = 3  # in a row, before the error is reported
_TRY_LATER_S: Final = 10.0


class WarmMachine:
    """One waiting machine. It belongs to the pool until a run claims it, then to that run."""

    def __init__(self, instance: Instance, stack: contextlib.ExitStack, made_at: float) -> None:
        self.instance = instance
        self.made_at = made_at
        self._stack = stack

    def close(self) -> bool:
        """End the machine, record its end, and return whether it is proven gone. A second call does nothing."""
        self._stack.close()
        return self.instance.stop()


class WarmMachines:
    """Keeps *size* machines warm until closed. It has its own thread and is thread-safe. image: name or digest."""

    def __init__(
        self, size: int, *, image: str | None = None, progress: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._choice = choice_from_environment()
        memory = memory_bytes()
        most = memory // 4 // settings.WARM_BYTES
        if most < 1:
            each, here = settings.WARM_BYTES >> 20, memory >> 20
            why = f"one VM takes {each} MiB, more than a quarter of the {here} MiB of memory"
            raise HostError("cannot start a pool", why, "Raise the memory limit, or run programs without a pool")
        why = f"the size is {size!r}, but memory allows only a whole number from 1 to {most}"
        self.size = whole_number(size, UsageError("cannot start a pool", why, "Set another size"), 1, most)
        self._most = most
        self.claimed = 0
        self.problem: SandboxError | None = None
        self.used_at = time.monotonic()
        self._taken_at = 0.0
        self._image_ref = image
        self._stack = contextlib.ExitStack()
        self._cancel = Cancel()
        self._caller = Caller(cancel=self._cancel, progress=progress)
        self._ready: deque[WarmMachine] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._closed = False
        self._owner_pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name="x07-warm", daemon=True)

    def start(self) -> None:
        """Open the image and the warm-up programs, and start making machines. Raises SandboxError if a step fails."""
        try:
            self._stack.enter_context(warm_slots(self.size, self._most))
            self._image = self._stack.enter_context(open_image(current_image(find_image(self._image_ref))))
            check_pinned(self._image.manifest.digest)
            self.backend = create(self._choice.backend)
            self.cloning = _cloning_of(self.backend)
            self.backend.probe(self._image)
            self.kind = MachineKind(image=self._image, ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes))
            self._needs = needs_of_programs(self.kind)
        except BaseException:
            self._stack.close()
            self._cancel.close()
            raise
        self._thread.start()

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
                        what = "cannot keep VMs ready"
                        fix = ("Raise the limit on open files: ", Command("ulimit -n"))
                        self.problem = exc if isinstance(exc, SandboxError) else HostError(what, str(exc), fix)
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
        """Wait until a machine is needed, and meanwhile end machines near their deadline. Return False once closed."""
        while True:
            with self._changed:
                if self._closing:
                    return False
                if len(self._ready) < self.size:
                    quiet_s = self._taken_at + _QUIET_S - time.monotonic()
                    if not self._ready or quiet_s <= 0:
                        return True
                    self._changed.wait(quiet_s)  # leave the processors to the run that has just taken a machine
                    continue
                oldest = self._ready[0]
                left_s = oldest.made_at + settings.WARM_S - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                self._ready.popleft()
            oldest.close()

    def _make(self) -> WarmMachine:
        progress = self._caller.progress
        with (
            admitted(cancel_fd=self._cancel.fd, timeout_s=settings.QUEUE_S, progress=progress),
            contextlib.ExitStack() as stack,
        ):
            claim = Claim(run_id=new_run_id(), phase="warm", wall_ms=int(settings.WARM_S * 1000))
            job = Job(claim=claim, kind=self.kind, caller=self._caller, needs=self._needs, warm_up=warm_up)
            try:
                instance = stack.enter_context(self.backend.start(job))
            except NoAnswerError as exc:
                self._check_open()
                raise BackendError("cannot prepare a VM for the pool", exc.why, "Run x07 doctor") from exc
            for note in instance.notes:
                progress(note)
            warm_up(instance, self.kind, self.cloning, self._cancel)
            return WarmMachine(instance, stack.pop_all(), time.monotonic())

    def _check_open(self) -> None:
        if self._closing:
            raise Cancelled("the pool has ended", "it was closed", "Start it again")

    def in_forked_child(self) -> bool:
        """Whether this process is a fork of the pool's process. A fork may neither take nor end machines."""
        return os.getpid() != self._owner_pid

    def ready(self) -> int:
        """Return how many machines are waiting."""
        with self._changed:
            return len(self._ready)

    def wait_ready(self, deadline: Deadline) -> bool:
        """Wait for all machines to be warm. Return whether they are. Raises SandboxError if no machine can be made."""
        with self._changed:
            while len(self._ready) < self.size and not deadline.passed() and not self._closing:
                if self.problem is not None:
                    raise self.problem
                self._changed.wait(deadline.left_s())
            return len(self._ready) >= self.size

    def take(self, claim: Claim, runner: Identity, ram_bytes: int) -> WarmMachine | None:
        """Hand a machine, limited to ram_bytes of RAM, to the process *runner* for *claim*. None if none is ready."""
        if self.in_forked_child():
            return None
        with self._changed:
            if not self._ready or self._closing:
                return None
            machine = self._ready.popleft()
            self.used_at = self._taken_at = time.monotonic()
            self._changed.notify_all()
        try:
            self.cloning.adopt(machine.instance, claim, runner, ram_bytes)
        except (HostError, BackendError):
            machine.close()
            return None
        with self._changed:
            self.claimed += 1
        return machine

    def claim(self, backend: Backend, job: Job) -> contextlib.AbstractContextManager[Instance] | None:
        """Return a machine for a run of this process, or None if no machine of the job's kind and backend is ready."""
        if (backend.name, job.kind.key) != (self.backend.name, self.kind.key):
            return None
        machine = self.take(job.claim, own_identity(), job.used_ram_bytes)
        return None if machine is None else claimed(machine.instance, job, machine.close)

    def close(self) -> None:
        """End the waiting machines and make no more. Claimed machines stay, since they belong to runs."""
        if self.in_forked_child():
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


def _cloning_of(backend: Backend) -> Cloning:
    if backend.cloning is None:
        why = f"the backend {backend.name} cannot clone VMs"
        raise UsageError("cannot start a pool", why, "Run programs without a pool")
    return backend.cloning
