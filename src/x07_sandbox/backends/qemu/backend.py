"""The QEMU backend: probing, starting jobs, and cloning saved VMs.

Hardware virtualisation counts as working once x07's agent has answered from a guest. A /dev/kvm that can be opened may
still boot no stock kernel, or hang. So one guest is booted with a time limit, and the result is stored for this boot,
kernel and QEMU. If the state of the host may be the cause of a failure, the result is valid for minutes only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.backends.base import (
    EMULATED,
    Availability,
    Capture,
    Fork,
    Handshake,
    Instance,
    Job,
    MachineKind,
    NoAnswerError,
    WarmUp,
    evidence_of,
    greet,
)
from x07_sandbox.backends.prerequisites import KVM, NO_KVM, Need, check
from x07_sandbox.backends.qemu import hot as processes
from x07_sandbox.backends.qemu import saved as store
from x07_sandbox.backends.qemu import start as starts
from x07_sandbox.backends.qemu import template as templates
from x07_sandbox.backends.qemu.instance import LeasedInstance, NotStartedError, QemuInstance, Streams
from x07_sandbox.backends.qemu.saved import TransientError
from x07_sandbox.backends.qemu.start import QemuJob, Source, start_qemu
from x07_sandbox.channel.link import State
from x07_sandbox.errors import BackendError, HostError, ImageError, SandboxError, worded
from x07_sandbox.host import settings
from x07_sandbox.host.arch import ARCHES, Arch, host_arch, is_foreign
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import host_error
from x07_sandbox.host.processes import Identity
from x07_sandbox.host.verdicts import Verdict, file_state, forget, validity
from x07_sandbox.host.waiting import Caller, Deadline
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jail.forms import jail_form
from x07_sandbox.policy.features import Features, vm_features
from x07_sandbox.policy.guest import RAM_CLASSES
from x07_sandbox.records.runs import Claim, JobRecord, create_record, drop_unstarted

Template = templates.VmTemplate | processes.ProcessTemplate
_ANY_TIMER: Final = "timers in the {} VM may run late: its kernel measured the timer wrong, as in each earlier attempt"


class QemuBackend:
    """The embedded backend of Linux, which needs only packages. Call `probe` first."""

    name = "qemu"
    uses_image = True
    engine_images = None
    known_gaps: Final[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self._kvm = False
        self._boot_s = settings.BOOT_S

    @property
    def cloning(self) -> QemuBackend:
        """Support for copy-on-write clones of saved VMs."""
        return self

    @property
    def needs(self) -> Sequence[Need]:
        """The programs and firmware for this machine's architecture, and KVM."""
        arch = ARCHES.get(os.uname().machine)
        return () if arch is None else starts.needs_of(arch)

    def least_features(self) -> Features:
        """Return the features with emulation."""
        return vm_features("vm-emulated")

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """Return the features with KVM if x07's agent has answered under KVM, else the features with emulation.

        An image of another architecture is always emulated.
        """
        # First: verdicts and templates are stored by the state of QEMU's file.
        starts.check_needs(host_arch() if image is None else image.arch)
        jail_form()  # raises RefusedError or HostError before anything else fails
        assert image is not None or not boot  # `uses_image` is set
        if image is not None and is_foreign(image.arch):
            return self._foreign(image.arch)
        verdict = known_verdict() if image is None or not boot else kvm_verdict(image)
        if verdict is None:
            return Availability(features=self.least_features(), proof="no VM has used KVM yet", known=False)
        self._kvm, self._boot_s = verdict.works, boot_limit_s(verdict.boot_s)
        if self._kvm:
            return Availability(features=vm_features("vm-hardware"), proof=verdict.reason)
        return Availability(
            features=self.least_features(), proof=verdict.reason, warnings=(f"emulated: {EMULATED}",), fix=verdict.fix
        )

    def _foreign(self, arch: Arch) -> Availability:
        """Return the features of guests of another architecture than this host's."""
        self._kvm, self._boot_s = False, settings.FOREIGN_BOOT_S
        return Availability(
            features=self.least_features(),
            proof=f"the image is for {arch.deb}, which this {host_arch().deb} host can only emulate",
            warnings=(f"emulated: {EMULATED}",),
            fix=f"Use an image for {host_arch().deb}",
        )

    def stop(self, record: JobRecord) -> bool:
        """Stop a recorded job, and remove its control groups."""
        from x07_sandbox.jail.resources import remove_groups
        from x07_sandbox.records.stopping import stop_recorded

        return stop_recorded(record, lambda stored: stored.owner is None or remove_groups(stored.owner.cgroups))

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[QemuInstance]:
        """Start a job and yield the first VM whose agent answers: restored, cloned from a saved VM, or booted."""
        notes: dict[str, str] = {}  # by subject, so that each appears once
        with contextlib.ExitStack() as stack:
            if job.fork is not None:
                yield self._forked(job, job.fork, stack)
                return
            instance = self._first(job, stack, notes)
            instance.notes = tuple(notes.values())
            if job.save_later and not job.cold and instance.start_mode != "hot":
                instance.notes += self._saved_later(job, instance, job.save_later)
            yield instance

    def _first(self, job: Job, stack: contextlib.ExitStack, notes: dict[str, str]) -> QemuInstance:
        """Return the first VM whose agent answers. notes: remarks for the user, which this adds to.

        Raises NoAnswerError if none does, or if the caller cancels. A VM that fails has not received the program.
        """
        at = job  # each attempt has a record of its own
        for template in () if job.cold else self._templates(job.kind):
            with contextlib.ExitStack() as one:
                source, why_not = self._opened(template, self._maker(template, job), job.caller, one, notes)
                if source is not None:
                    try:
                        instance = self._answered(at, source, one)
                    except NoAnswerError as exc:
                        if exc.failure.kind == "cancelled":
                            raise
                        why_not = template.failed(exc)
                    except (BackendError, HostError) as exc:
                        if not template.waits_for_host:
                            raise
                        why_not = f"{exc.what}: {exc.why}"  # perhaps a clone needs less
                    else:
                        stack.push(one.pop_all())
                        return instance
            if why_not:
                notes["without"] = _without_saved(job, template, why_not)
            if source is not None or (why_not and template.waits_for_host):
                at = _next_attempt(at, template.next_attempt)
        return self._booted(at, stack, notes)

    def _booted(self, job: Job, stack: contextlib.ExitStack, notes: dict[str, str]) -> QemuInstance:
        """Return the first booted VM whose agent answers. See `_first`."""
        at = job
        if job.cold:
            job.caller.progress(f"booting a VM for the {job.claim.phase}")
        for number, last in enumerate(starts.boot_attempts(), 1):
            with contextlib.ExitStack() as one:
                try:
                    instance = self._answered(at, None, one, any_timer=last)
                except NoAnswerError as exc:
                    exc.instance.notes = tuple(notes.values())
                    if not starts.miscalibrated(exc.failure):
                        raise
                    if last:
                        why = f"{starts.MISCALIBRATED}; try again when the host is less busy"
                        failure = replace(exc.failure, kind="failed", why=why)
                        raise NoAnswerError(exc.instance, failure, exc.times_ms) from None
                else:
                    stack.push(one.pop_all())
                    if last:
                        notes["timer"] = _ANY_TIMER.format(_phase(job))
                    return instance
            at = _next_attempt(job, f"cold{number}")
        raise AssertionError("the last attempt has ended above")

    def _answered(
        self, job: Job, source: Source | None, stack: contextlib.ExitStack, *, any_timer: bool = False
    ) -> QemuInstance:
        """Return a VM whose agent has answered. *stack* ends it. Raises SandboxError, such as NoAnswerError."""
        record = create_record(job.claim, backend=self.name, image_digest=job.kind.image_digest)
        stack.callback(drop_unstarted, record)
        machine = QemuJob(record, job.kind, job.claim.deadline_s, any_timer=any_timer, ram_bytes=job.used_ram_bytes)
        instance = stack.enter_context(start_qemu(machine, kvm=self._kvm, source=source))
        link = None if job.fork is None else job.fork.link
        greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile, boot_s=self._boot_s, link=link)
        return instance

    def _templates(self, kind: MachineKind) -> Iterator[Template]:
        """Yield the places of the saved process and the saved VM from which jobs of this kind may start."""
        template = templates.template_for(kind, kvm=self._kvm)
        if not self.why_not_hot():
            yield processes.hot_template(template)
        yield template

    def _maker(self, template: Template, job: Job) -> Callable[[], None] | None:
        """Return what makes a template for a job that waits for it, or None if the job does not wait."""
        if job.save_later is not None:
            return None
        if isinstance(template, templates.VmTemplate):
            return partial(self._make, template, job.kind, job.caller)
        if job.warm_up is None:
            return None
        return partial(self._make_process, template, job.kind, job.caller, job.warm_up, wait=False)

    def _saved_later(self, job: Job, instance: Instance, save_later: Callable[[MachineKind], str]) -> tuple[str, ...]:
        """Have saved what the job did not find, now that its VM has started. Return a remark for the user, if any."""
        best = self._best(job.kind)
        if best is None or best.folder.is_dir():
            return ()
        done = "was cloned" if instance.start_mode == "clone" else "booted"
        why = f"no {best.noun} for {best.title} is saved with this image"
        return (f"the {_phase(job)} VM {done}: {why}; {save_later(job.kind)}",)

    def _opened(
        self,
        template: Template,
        make: Callable[[], None] | None,
        caller: Caller,
        stack: contextlib.ExitStack,
        notes: dict[str, str],
    ) -> tuple[Source | None, str]:
        """Return a template's files, made by *make* if there are none, or None and why there are none."""
        if reason := template.suspended():
            return None, reason
        damage = ""
        try:
            if (files := stack.enter_context(template.opened())) is not None:
                return files, ""
        except HostError as exc:
            return None, f"{exc.what}: {exc.why}"  # temporary, as below
        except ImageError as exc:
            damage = f"{exc.what}: {exc.why}"
            caller.progress(damage)
            store.remove(template.folder)
        if make is None:
            return None, damage
        started_at = time.monotonic()
        files, why_not = _made(template, make, stack)
        if files is not None:
            seconds = time.monotonic() - started_at
            notes[template.noun] = f"a {template.noun} for {template.title} was saved first, in {seconds:.0f} s"
        if damage:
            notes[f"damaged {template.noun}"] = damage if files is None else f"{damage}; it was saved again"
        return files, why_not

    def _make(self, template: Template, kind: MachineKind, caller: Caller) -> None:
        """Save a VM. Raises SandboxError."""
        with caller.cancel.waiting():
            templates.ensure_template(template, kind, caller.progress, kvm=self._kvm, boot_s=self._boot_s)

    def _make_process(
        self, process: Template, kind: MachineKind, caller: Caller, warm_up: WarmUp, *, wait: bool
    ) -> None:
        """Save the process of a clone, and first a VM to clone if there is none. Raises SandboxError."""
        plain = replace(kind, network=False)  # while it is warmed up, there is no gate
        template = templates.template_for(plain, kvm=self._kvm)
        with contextlib.ExitStack() as stack:
            make_vm = partial(self._make, template, plain, caller)
            saved, why_not = self._opened(template, make_vm, caller, stack, {})
            if saved is None:
                # Not suspended: the reason may be a full disk, and if the VM is suspended, this ends at once.
                raise HostError("there is no VM to warm up", why_not, "Run x07 doctor")

            def warm(instance: Instance) -> None:
                warm_up(instance, kind, self, caller.cancel)

            notice = f"warming up a VM for {process.title}; later ones take less than half the time"
            make = partial(processes.make_hot, process, kind, saved, warm)
            with caller.cancel.waiting():
                store.ensure(process, make, notice, caller.progress, wait=wait)

    def prepare(self, kind: MachineKind, caller: Caller, warm_up: WarmUp) -> None:
        """Save a VM now, and a process if possible, even if saving is suspended. Raises SandboxError."""
        forget(store.SUSPENDED)
        self._make(templates.template_for(kind, kvm=self._kvm), kind, caller)
        if why_not := self.save(kind, caller, warm_up):
            caller.progress(f"no process could be saved: {why_not}")

    def save(self, kind: MachineKind, caller: Caller, warm_up: WarmUp) -> str:
        """Save what a job of this kind would start from. Return why that failed, or "". Raises Cancelled."""
        if (best := self._best(kind)) is None:
            return ""
        with contextlib.ExitStack() as stack:
            make = partial(self._make, best, kind, caller)
            if isinstance(best, processes.ProcessTemplate):
                make = partial(self._make_process, best, kind, caller, warm_up, wait=True)
            _, why_not = self._opened(best, make, caller, stack, {})
        if why_not and not best.suspended():  # otherwise each job would have it tried again
            best.suspend(why_not, transient=True, keep=True)
        return why_not

    def _best(self, kind: MachineKind) -> Template | None:
        """Return the saved process or VM from which jobs of this kind start, or would, if it could be saved now."""
        return next((one for one in self._templates(kind) if not one.suspended()), None)

    def why_not_hot(self) -> str:
        """Return why VMs cannot be restored from saved processes here, or "" if they can."""
        return processes.unsupported(kvm=self._kvm)

    def _forked(self, job: Job, fork: Fork, stack: contextlib.ExitStack) -> QemuInstance:
        """Return a VM that was started from a snapshot. Raises NoAnswerError."""
        from x07_sandbox.backends.qemu.snapshot import opened_fork  # few jobs are forks

        return self._answered(job, stack.enter_context(opened_fork(fork.folder, job.kind)), stack)

    @property
    def snapshots(self) -> QemuBackend:
        """Support for snapshots of running VMs."""
        return self

    def prove(self, fork: Fork, kind: MachineKind) -> None:
        """Start a VM from a snapshot, unless one has answered since QEMU was installed."""
        from x07_sandbox.backends.qemu.snapshot import opened_fork  # as above

        verdict = Verdict("snapshots", file_state(kind.arch.qemu_binary), self._kvm)
        if not verdict.read():
            with opened_fork(fork.folder, kind) as files:
                vm = starts.own_vm(kind, "probe", settings.CLONE_S, kvm=self._kvm, any_timer=False, source=files)
                with vm as instance:
                    greet(instance, link=fork.link)
            verdict.write({"works": True}, transient=False)

    folder = staticmethod(store.new_folder)
    kept = staticmethod(store.kept_snapshots)
    drop = staticmethod(store.delete)

    def capture(self, instance: Instance, kind: MachineKind, folder: Path) -> AbstractContextManager[Capture]:
        """Prepare a snapshot of a running VM."""
        from x07_sandbox.backends.qemu.snapshot import capture  # as above

        assert isinstance(instance, Streams)  # a backend only gets its own instances
        return capture(instance, kind, folder)

    def key(self, kind: MachineKind) -> str:
        """Return the key of the saved VMs of this kind."""
        return templates.template_for(kind, kvm=self._kvm).key

    prunable = staticmethod(store.prunable)
    saved_bytes = staticmethod(store.saved_bytes)
    renew = staticmethod(templates.renew)

    def limit_ram(self, instance: Instance, ram_bytes: int) -> None:
        """Lower the most RAM that a VM may use."""
        _ours(instance).limit_ram(ram_bytes)

    def adopt(self, instance: Instance, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Turn a waiting VM into the job in *claim*, which uses at most *ram_bytes* of RAM."""
        _ours(instance).adopt(claim, runner, ram_bytes)

    def descriptors(self, instance: Instance) -> dict[str, int]:
        """Return the VM's streams, and the pidfds of its processes."""
        found = _ours(instance)
        return {**found.ends, "supervisor": found.pidfd, "inner": found.inner_pidfd}

    def leased(self, lease: socket.socket, record: JobRecord, jail: str, fds: Mapping[str, int]) -> LeasedInstance:
        """Return a VM that another process started and still watches."""
        return LeasedInstance(lease, record, jail, fds)


def _ours(instance: Instance) -> QemuInstance:
    assert isinstance(instance, QemuInstance)  # a backend only gets its own instances
    return instance


def _made(template: Template, make: Callable[[], None], stack: contextlib.ExitStack) -> tuple[Source | None, str]:
    """Make a template and return its files, or None and the reason for the failure."""
    try:
        make()
        return stack.enter_context(template.opened()), ""
    except NotStartedError as exc:  # temporary: another process may have the limits that this one lacks
        why = f"{exc.what}: {exc.why}"
        return None, template.suspend(why, transient=True) if template.waits_for_host else why
    except (BackendError, ImageError) as exc:
        transient = isinstance(exc, TransientError)
        return None, template.suspend(f"{exc.what}: {exc.why}", transient=transient)
    except (HostError, OSError) as exc:  # temporary, as on a full disk
        error = exc if isinstance(exc, HostError) else host_error(exc)
        if error is None:
            raise
        return None, f"{error.what}: {error.why}"


def _next_attempt(job: Job, name: str) -> Job:
    """Return the job for another attempt. Its record has *name* in its own."""
    return replace(job, claim=replace(job.claim, phase=f"{job.claim.phase}-{name}"))


def _phase(job: Job) -> str:
    return job.claim.phase.partition("-")[0]  # later attempts have longer names


def _without_saved(job: Job, template: Template, why: str) -> str:
    return f"the {_phase(job)} VM {template.done} without a saved {template.noun}: {why}"


class Proof(NamedTuple):
    """Whether a guest works, and the evidence.

    transient: whether the state of the host may be the cause of a failure. fix: what to do after a failure.
    boot_s: how long the guest took to answer, in seconds.
    """

    works: bool
    reason: str
    transient: bool = False
    fix: str = NO_KVM
    boot_s: float = 0.0


def kvm_verdict(image: OpenImage) -> Proof:
    """Return whether KVM works, and the evidence. Without a stored result, a guest is booted."""
    if (known := known_verdict()) is not None:
        return known
    verdict = _verdict()
    lock = verdict.path.with_name(".lock")
    not_tried = "a VM under KVM could not be tested"  # proves nothing, so it is not stored
    try:
        with file_lock(lock, most_s=settings.BOOTS_MAX * (settings.BOOT_S + 1)):
            if (known := known_verdict()) is not None:  # stored while we waited
                return known
            found = prove(image, settings.KVM_PROOF_S, settings.BOOT_S, kvm=True)
            values = {"works": found.works, "reason": found.reason, "boot_s": found.boot_s}
            verdict.write(values, transient=found.transient)
    except SandboxError as exc:
        return Proof(works=False, reason=f"{not_tried} ({exc.why})", fix=exc.fix)
    except TimeoutError as exc:  # the other process may be stopped
        return Proof(works=False, reason=f"{not_tried} ({exc} for the lock {lock})", fix="Try again")
    return known_verdict() or found


def known_verdict() -> Proof | None:
    """Return the result and its evidence, or None if a guest must be booted to get a result."""
    ((_, device),) = check([KVM])
    if not device.good:
        return Proof(works=False, reason=device.why, fix=worded(device.fix))
    stored = _verdict().read()
    if not {"works", "reason"} <= stored.keys():
        return None
    if stored["works"]:
        return Proof(works=True, reason=str(stored["reason"]), boot_s=float(stored.get("boot_s", 0)))
    reason = f"{stored['reason']}. KVM is not tried again {validity(stored)}"
    transient = "retry_at_ms" in stored
    return Proof(works=False, reason=reason, transient=transient, fix="Try again later" if transient else NO_KVM)


def _verdict() -> Verdict:
    """Return the place of the result for this QEMU and jail. Raises HostError, RefusedError."""
    return Verdict("kvm", file_state(host_arch().qemu_binary), jail_form().name)


def proof_limit_s(jail_s: float, least_s: float, most_s: float) -> float:
    """Return how long a guest may take to answer on a host that took *jail_s* to start its jail, in seconds.

    A guest that hangs costs each host this time, and a slow or busy host starts both the jail and the guest slowly.
    """
    return min(most_s, max(least_s, settings.KVM_PROOF_JAILS * jail_s))


def boot_limit_s(measured_s: float) -> float:
    """Return how long a guest may take to boot, in seconds. measured_s: how long the guest of the proof took."""
    return max(settings.BOOT_S, settings.BOOTS_SLOWER * measured_s)


def prove(image: OpenImage, least_s: float, most_s: float, *, kvm: bool) -> Proof:
    """Return whether an agent answers in time (`proof_limit_s`). Raises SandboxError if no guest could be booted."""
    from x07_sandbox.policy.outcomes import classify  # not imported by runs that know the result

    under = " under KVM" if kvm else " under emulation"
    kind = MachineKind(image=image, ram_bytes=RAM_CLASSES[0])
    for last in starts.boot_attempts():
        began = time.monotonic()
        with starts.own_vm(kind, "probe", most_s, kvm=kvm, any_timer=last) as instance:
            released = time.monotonic()
            deadline = Deadline.after(proof_limit_s(released - began, least_s, most_s))
            failure = Handshake(instance, State.WAITING).until(State.GREETED, deadline)
            if failure is None:
                boot_s = round(time.monotonic() - released, 1)
                return Proof(works=True, reason=f"x07's agent answered from a VM{under}", boot_s=boot_s)
            starts.require_cpu_time(instance, "cannot test a VM")
            if not starts.miscalibrated(failure):
                why = classify(evidence_of(failure)).reason.rstrip(".")
                return Proof(works=False, reason=f"a test VM{under} failed: {why}", transient=failure.transient)
    return Proof(works=False, reason=f"no VM{under} could be booted ({starts.MISCALIBRATED})", transient=True)
