"""QEMU as a backend: what this host offers, and starting jobs on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.qemu.proof import kvm_verdict
from x07_sandbox.backends.qemu.start import Accelerator, QemuInstance, start_qemu
from x07_sandbox.errors import RefusedError
from x07_sandbox.host.settings import flag_from_environment
from x07_sandbox.plan.features import VM_HOLDS, Features, Isolation

if TYPE_CHECKING:
    from x07_sandbox.images.verify import OpenImage

# Measured on 2 cores (docs/design.md, "Emulation"): compilers and interpreters take this much longer.
SLOWDOWN = "9 to 17 times"


class QemuBackend:
    """The embedded backend of Linux: needs nothing but packages."""

    name = "qemu"

    def __init__(self) -> None:
        self._kvm = False

    def probe(self, image: OpenImage) -> Availability:
        """Hardware virtualisation if our agent has answered under it, else emulation.

        Raises RefusedError if the user demands hardware and there is none.
        """
        demanded = flag_from_environment("X07_VM_REQUIRE_HARDWARE")
        self._kvm, reason = kvm_verdict(image)
        if demanded and not self._kvm:
            raise RefusedError(
                "hardware virtualisation was required",
                reason,
                "Unset X07_VM_REQUIRE_HARDWARE to accept emulation, or run where KVM works",
            )
        isolation: Isolation = "vm-hardware" if self._kvm else "vm-emulated"
        warnings = () if self._kvm else (f"emulated: CPU work in the guest takes {SLOWDOWN} as long as on this host",)
        features = Features(isolation=isolation, own_kernel=True, can_hold=VM_HOLDS)
        return Availability(usable=True, features=features, proof=reason, warnings=warnings)

    def start(self, job: Job) -> AbstractContextManager[QemuInstance]:
        """Start a job, blocked until released."""
        return start_qemu(job, Accelerator(kvm=self._kvm))
