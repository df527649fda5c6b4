"""QEMU as a backend: what this host offers, starting jobs on it, and cloning saved machines."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from x07_sandbox.backends.base import Availability, NoAnswerError
from x07_sandbox.backends.handshake import evidence_of, greet
from x07_sandbox.backends.qemu.bounds import NotStartedError
from x07_sandbox.backends.qemu.instance import LeasedInstance, QemuInstance
from x07_sandbox.backends.qemu.proof import known_verdict, kvm_verdict
from x07_sandbox.backends.qemu.start import Accelerator, QemuJob, check_tools, start_qemu
from x07_sandbox.backends.qemu.template import (
    TemplateTimeoutError,
    clear_suspensions,
    ensure_template,
    lack_of_space,
    opened_template,
    remove_template,
    template_for,
)
from x07_sandbox.backends.qemu.timer import MISCALIBRATED, MISCALIBRATED_FIX, boot_attempts, miscalibrated
from x07_sandbox.errors import BackendError, HostError, ImageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.os_errors import host_error
from x07_sandbox.host.variables import flag
from x07_sandbox.jail.forms import jail_form
from x07_sandbox.jobs.record import create_record, drop_unstarted
from x07_sandbox.plan.features import Isolation, vm_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from x07_sandbox.backends.base import Instance, Job, Lease, MachineKind, Pruner
    from x07_sandbox.backends.qemu.start import Saved
    from x07_sandbox.backends.qemu.template import Template
    from x07_sandbox.host.cancel import Caller
    from x07_sandbox.host.processes import Identity
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.record import Claim, JobRecord

# Measured on 2 cores (docs/explanation/design.md, "Emulation"): compilers and interpreters take this much longer.
SLOWDOWN: Final = "9 to 17 times"
_ANY_TIMER: Final = "the {} machine may have a timer that is late: each booted before it measured its own wrong"


class QemuBackend:
    """The embedded backend of Linux: it needs only packages. `probe` comes before all else."""

    name = "qemu"
    uses_image = True
    engine_images = None
    known_gaps: Final[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self._accelerator = Accelerator(kvm=False)

    @property
    def cloning(self) -> QemuBackend:
        """Saved machines are cloned copy-on-write."""
        return self

    def probe(self, image: OpenImage | None, *, boot: bool = True) -> Availability:
        """Hardware virtualisation if our agent has answered under it, else emulation."""
        check_tools(host_arch())  # first: what is known of KVM, and each saved machine, is kept by the file of QEMU
        if flag("X07_VM_REQUIRE_NAMESPACES"):
            jail_form()  # refuses before anything is made
        assert image is not None or not boot  # noqa: S101 - the backend says that it uses one
        verdict = known_verdict() if image is None or not boot else kvm_verdict(image)
        if verdict is None:
            return Availability(features=vm_features("vm-emulated"), proof="no guest has tried KVM yet", known=False)
        kvm, reason = verdict
        self._accelerator = Accelerator(kvm=kvm)
        isolation: Isolation = "vm-hardware" if kvm else "vm-emulated"
        warnings = () if kvm else (f"emulated: CPU work in the guest takes {SLOWDOWN} as long as on this host",)
        return Availability(features=vm_features(isolation), proof=reason, warnings=warnings)

    def list_owned(self) -> Sequence[JobRecord]:
        """Jobs of this user that are not recorded as gone."""
        from x07_sandbox.jobs.stopping import live_records

        return live_records(self.name)

    def stop(self, record: JobRecord) -> bool:
        """Stop a job by its record: its supervisor ends all of the jail, and its control groups go."""
        from x07_sandbox.jail.cgroups import remove_groups
        from x07_sandbox.jobs.stopping import stop_recorded

        return stop_recorded(record, lambda stored: stored.owner is None or remove_groups(stored.owner.cgroups))

    # starting

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[QemuInstance]:
        """Start a job: a clone where there is a template or one can be made, else cold; by the first that answers."""
        with contextlib.ExitStack() as stack:
            yield self._answering(job, stack)

    def _answering(self, job: Job, stack: contextlib.ExitStack) -> QemuInstance:
        """The first machine for *job* that answers. Raises NoAnswerError: none did, or the caller cancelled."""
        claim, cold, cloned = job.claim, job.cold, False
        notes: dict[str, str] = {}  # by what they are about: each is told once
        if cold:
            job.caller.progress(f"booting a machine for the {claim.phase}")
        tries = enumerate(boot_attempts(), 1)
        number, last = next(tries)
        while True:
            with contextlib.ExitStack() as one:
                instance = one.enter_context(self._started(replace(job, claim=claim, cold=cold), notes, any_timer=last))
                try:
                    greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
                    if last and instance.start_mode == "cold":
                        notes["timer"] = _ANY_TIMER.format(job.claim.phase)
                except NoAnswerError as exc:
                    error = exc
                else:
                    stack.push(one.pop_all())
                    return instance
                finally:
                    instance.notes = tuple(notes.values())
            # It never got to hear of the program, so another machine may take its place.
            if error.failure.kind == "cancelled":
                raise error
            if instance.start_mode == "clone" and not cloned:
                cold, cloned = self._silent_clone(job, error, notes), True
                claim = replace(claim, phase=f"{job.claim.phase}-cold")
                continue
            if not miscalibrated(error.failure):
                raise error
            if last:
                failure = replace(error.failure, kind="failed", why=f"{MISCALIBRATED}; {MISCALIBRATED_FIX}")
                raise NoAnswerError(instance, failure, error.times_ms)
            claim = replace(claim, phase=f"{job.claim.phase}-cold{number}")
            number, last = next(tries)

    def _silent_clone(self, job: Job, error: NoAnswerError, notes: dict[str, str]) -> bool:
        """Note that a clone did not answer; whether another might, so that the next has to be told to start cold."""
        from x07_sandbox.plan.outcomes import classify

        evidence = evidence_of(error.failure)
        why = f"a clone of it did not answer: {classify(evidence).reason}"
        if evidence.killed:
            notes["cold"] = _started_cold(job, why)
        else:
            template_for(job.kind, self._accelerator).suspend(why, late=error.failure.kind == "late")
        return evidence.killed

    @contextlib.contextmanager
    def _started(self, job: Job, notes: dict[str, str], *, any_timer: bool) -> Iterator[QemuInstance]:
        """One machine for *job*, blocked until released. notes: gets what the user should know."""
        record = create_record(job.claim, backend=self.name, image_digest=job.kind.image_digest)
        with contextlib.ExitStack() as stack:
            stack.callback(drop_unstarted, record)
            saved, why_not = (None, "") if job.cold else self._saved(job, stack, notes)
            if why_not:
                notes.setdefault("cold", _started_cold(job, why_not))
            machine = QemuJob(record, job.kind, job.claim.deadline_s, any_timer=any_timer, ram_bytes=job.used_ram_bytes)
            yield stack.enter_context(start_qemu(machine, self._accelerator, memory=saved))

    def _saved(self, job: Job, stack: contextlib.ExitStack, notes: dict[str, str]) -> tuple[Saved | None, str]:
        """The machine that such jobs are cloned from, or None and why not."""
        template = template_for(job.kind, self._accelerator)
        if reason := template.bad():
            return None, reason
        damage = ""
        try:
            if (saved := stack.enter_context(opened_template(template))) is not None:
                return saved, ""
        except HostError as exc:
            return None, f"{exc.what}: {exc.why}"  # for now, as below
        except ImageError as exc:
            damage = f"{exc.what}: {exc.why}"
            job.caller.progress(f"{damage}; making it anew")
            remove_template(template.folder)
        begun = time.monotonic()
        saved, why_not = self._made(template, job, stack)
        if saved is not None:
            notes["saved"] = f"a machine for {template.title} was saved first, in {time.monotonic() - begun:.0f} s"
        if damage:
            notes["damage"] = damage if saved is None else f"{damage}; it was made anew"
        return saved, why_not

    def _made(self, template: Template, job: Job, stack: contextlib.ExitStack) -> tuple[Saved | None, str]:
        """The machine, saved now, or None and why not: whatever prevents that, a job can start cold."""
        if short := lack_of_space(job.kind.ram_bytes):
            return None, short  # for now: nothing is wrong with the template
        try:
            self._make(template, job.kind, job.caller)
            return stack.enter_context(opened_template(template)), ""
        except NotStartedError as exc:  # for now: another process may have what this one lacks
            return None, f"{exc.what}: {exc.why}"
        except (BackendError, ImageError) as exc:
            return None, template.suspend(f"{exc.what}: {exc.why}", late=isinstance(exc, TemplateTimeoutError))
        except (HostError, OSError) as exc:  # as on a full disk; that says nothing of the template, and is tried again
            error = exc if isinstance(exc, HostError) else host_error(exc)
            if error is None:
                raise
            return None, f"{error.what}: {error.why}"

    def _make(self, template: Template, kind: MachineKind, caller: Caller) -> None:
        from x07_sandbox.backends.qemu.saving import make_template

        with caller.cancel.waiting():
            make = partial(make_template, template, kind, self._accelerator)
            ensure_template(template, kind.image_digest, make, caller.progress)

    # cloning, as `base.Cloning` has it

    def prepare(self, kind: MachineKind, caller: Caller) -> None:
        """Make the template of this kind now, whatever prevented it before. Raises SandboxError."""
        template = template_for(kind, self._accelerator)
        clear_suspensions()
        self._make(template, kind, caller)

    def prune(self, pruner: Pruner, images: set[str]) -> None:
        """Remove templates as making another does."""
        from x07_sandbox.backends.qemu.template import prune_templates

        prune_templates(pruner, images)

    def renew(self, instance: Instance, kind: MachineKind) -> None:
        """Have the agent make a fresh place for the next program. Raises BackendError."""
        from x07_sandbox.backends.qemu.saving import renew

        renew(instance, kind)

    def adopt(self, instance: Instance, claim: Claim, runner: Identity, ram_bytes: int) -> None:
        """Make a machine that waited the job of *claim*, which uses at most *ram_bytes* of its RAM."""
        _ours(instance).adopt(claim, runner, ram_bytes)

    def descriptors(self, instance: Instance) -> dict[str, int]:
        """Its streams, and what tells of its processes' end."""
        found = _ours(instance)
        return {**found.ends, "supervisor": found.pidfd, "inner": found.inner_pidfd}

    def leased(self, lease: Lease, record: JobRecord, jail: str, owned_fds: Mapping[str, int]) -> LeasedInstance:
        """A machine that another process started and still watches."""
        return LeasedInstance(lease, record, jail, owned_fds)


def _ours(instance: Instance) -> QemuInstance:
    assert isinstance(instance, QemuInstance)  # noqa: S101 - whoever has a backend gives it its own instances
    return instance


def _started_cold(job: Job, why: str) -> str:
    return f"the {job.claim.phase.partition('-')[0]} machine started cold: {why}"
