"""QEMU as a backend: what this host offers, and starting jobs on it."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from x07_sandbox.backends.base import Availability, Job, MachineKind
from x07_sandbox.backends.qemu.proof import known_verdict, kvm_verdict
from x07_sandbox.backends.qemu.start import Accelerator, NotStartedError, check_tools, start_qemu
from x07_sandbox.backends.qemu.template import (
    ensure_template,
    lack_of_space,
    opened_template,
    remove_template,
    template_for,
    trust_all,
)
from x07_sandbox.errors import BackendError, HostError, ImageError, RefusedError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.troubles import host_error
from x07_sandbox.host.variables import flag
from x07_sandbox.jobs.record import drop_unstarted
from x07_sandbox.plan.features import Isolation, vm_features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from x07_sandbox.backends.qemu.instance import QemuInstance
    from x07_sandbox.backends.qemu.start import Saved
    from x07_sandbox.backends.qemu.template import Template
    from x07_sandbox.images.verify import OpenImage

# Measured on 2 cores (docs/design.md, "Emulation"): compilers and interpreters take this much longer.
SLOWDOWN = "9 to 17 times"
_UNTIL = "So do all like it, until x07 image build is run for their image or the host boots anew"


class QemuBackend:
    """The embedded backend of Linux: needs nothing but packages.

    progress: called with a line of text before something that takes seconds, as making a VM template does.
    waiting: around that, so that a signal can end it. note: called with what the user should know of afterwards.
    """

    name = "qemu"

    def __init__(
        self,
        progress: Callable[[str], None] = lambda _text: None,
        waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._kvm = False
        self._progress = progress
        self._waiting = waiting
        self._note = note

    def probe(self, image: OpenImage, *, require_hardware: bool = False, boot: bool = True) -> Availability:
        """Hardware virtualisation if our agent has answered under it, else emulation.

        boot: a guest may try that; else, where none has yet, the answer is of the weaker class and demands nothing.

        Raises RefusedError if the user demands hardware (X07_VM_REQUIRE_HARDWARE too) and there is none, HostError
        where a program is missing that a machine needs.
        """
        check_tools(host_arch())  # first: what is known of KVM, and each saved machine, is kept by the file of QEMU
        by_variable = flag("X07_VM_REQUIRE_HARDWARE")
        verdict = kvm_verdict(image) if boot else known_verdict()
        if verdict is None:
            return Availability(usable=True, features=vm_features("vm-emulated"), proof="no guest has tried KVM yet")
        self._kvm, reason = verdict
        if (by_variable or require_hardware) and not self._kvm:
            steps = ["leave out --require-hardware"] * require_hardware
            steps += ["unset X07_VM_REQUIRE_HARDWARE"] * by_variable
            fix = f"To accept emulation {' and '.join(steps)}, or run where KVM works"
            raise RefusedError("hardware virtualisation was required", reason, fix)
        isolation: Isolation = "vm-hardware" if self._kvm else "vm-emulated"
        warnings = () if self._kvm else (f"emulated: CPU work in the guest takes {SLOWDOWN} as long as on this host",)
        return Availability(usable=True, features=vm_features(isolation), proof=reason, warnings=warnings)

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[QemuInstance]:
        """Start a job, blocked until released: a clone where there is a template or one can be made, else cold."""
        accelerator = Accelerator(kvm=self._kvm)
        with contextlib.ExitStack() as stack:
            stack.callback(drop_unstarted, job.record)
            saved, why_not = (None, "") if job.cold else self._saved(job.kind, accelerator, stack)
            instance = stack.enter_context(start_qemu(job, accelerator, memory=saved))
            instance.cold_reason = why_not
            yield instance

    def _saved(
        self, kind: MachineKind, accelerator: Accelerator, stack: contextlib.ExitStack
    ) -> tuple[Saved | None, str]:
        """The machine that such jobs go on from, or None and why not."""
        template = template_for(kind, accelerator)
        if reason := template.bad():
            return None, f"{reason}. {_UNTIL}"
        damage = ""
        try:
            if (saved := stack.enter_context(opened_template(template))) is not None:
                return saved, ""
        except HostError as exc:
            return None, f"{exc.what}: {exc.why}"  # for now, as below
        except ImageError as exc:
            damage = f"{exc.what}: {exc.why}"
            self._progress(f"{damage}; making it anew")
            remove_template(template.folder)
        saved, why_not = self._made(template, kind, accelerator, stack)
        if damage:
            self._note(damage if saved is None else f"{damage}; it was made anew")
        return saved, why_not

    def _made(
        self, template: Template, kind: MachineKind, accelerator: Accelerator, stack: contextlib.ExitStack
    ) -> tuple[Saved | None, str]:
        """The machine, saved now, or None and why not: whatever hinders that, a job can start cold."""
        if short := lack_of_space(kind.ram_bytes):
            return None, short  # for now: nothing speaks against the template
        try:
            self._make(template, kind, accelerator)
            return stack.enter_context(opened_template(template)), ""
        except NotStartedError as exc:  # for now: another process may have what this one lacks
            return None, f"{exc.what}: {exc.why}"
        except (BackendError, ImageError) as exc:
            template.distrust(f"{exc.what}: {exc.why}")
            return None, f"{exc.what}: {exc.why}. {_UNTIL}"
        except (HostError, OSError) as exc:  # as on a full disk; that says nothing of the template, and is tried again
            error = exc if isinstance(exc, HostError) else host_error(exc)
            if error is None:
                raise
            return None, f"{error.what}: {error.why}"

    def _make(self, template: Template, kind: MachineKind, accelerator: Accelerator) -> None:
        from x07_sandbox.backends.qemu.saving import make_template

        with self._waiting():
            make = partial(make_template, template, kind, accelerator)
            ensure_template(template, kind.image.manifest.digest, make, self._progress)

    def distrust(self, kind: MachineKind, reason: str) -> None:
        """A clone did not answer: its template is used no more in this boot of the host."""
        template_for(kind, Accelerator(kvm=self._kvm)).distrust(reason)

    def prepare(self, kind: MachineKind) -> None:
        """Make the template of this kind now, whatever spoke against it before. Raises SandboxError."""
        accelerator = Accelerator(kvm=self._kvm)
        template = template_for(kind, accelerator)
        trust_all()
        self._make(template, kind, accelerator)
