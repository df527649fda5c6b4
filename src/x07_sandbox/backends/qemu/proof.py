"""The proof that hardware virtualisation works: x07's agent answers from a guest.

A /dev/kvm that can be opened may still boot no stock kernel, or hang. So one guest is booted with a time limit, and the
result is stored for this boot, kernel and QEMU. If the guest was only late, the host may have been busy, so the result
is valid for minutes only.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.handshake import Handshake
from x07_sandbox.backends.proofs import proof_file, read_verdict, write_verdict
from x07_sandbox.backends.qemu.start import (
    MISCALIBRATED,
    Accelerator,
    QemuJob,
    boot_attempts,
    miscalibrated,
    start_qemu,
)
from x07_sandbox.channel.link import State
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.clocks import Deadline, boot_ms
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.jail.forms import jail_form
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.sizes import RAM_CLASSES

if TYPE_CHECKING:
    from x07_sandbox.images.verify import OpenImage


class Proof(NamedTuple):
    """Whether a guest works, and the evidence.

    late: whether the guest was still running, but its agent did not answer in time.
    """

    works: bool
    reason: str
    late: bool = False


def kvm_verdict(image: OpenImage) -> tuple[bool, str]:
    """Return whether KVM works, and the evidence. Without a stored result, a guest is booted."""
    if (known := known_verdict()) is not None:
        return known
    record = _record()
    lock = record.parent / ".lock"
    not_tried = "a VM under KVM could not be tested"  # proves nothing, so it is not stored
    try:
        with file_lock(lock, most_s=settings.BOOTS_MAX * (settings.KVM_PROOF_S + 1)):
            if (known := known_verdict()) is not None:  # stored while we waited
                return known
            found = prove(image, Accelerator(kvm=True), settings.KVM_PROOF_S)
            values = {"works": found.works, "reason": found.reason}
            write_verdict(record, values, settings.KVM_RETRY_S if found.late else None)
    except SandboxError as exc:
        return False, f"{not_tried} ({exc.why})"
    except TimeoutError as exc:  # the other process may be stopped
        return False, f"{not_tried} ({exc} for the lock {lock})"
    return known_verdict() or (found.works, found.reason)


def known_verdict() -> tuple[bool, str] | None:
    """Return the result and its evidence, or None if a guest must be booted to get a result."""
    device = Path("/dev/kvm")
    if not device.exists():
        return False, "there is no /dev/kvm"
    if not os.access(device, os.R_OK | os.W_OK):
        return False, "/dev/kvm cannot be opened by this user (join the group kvm to use it)"
    stored = read_verdict(_record())
    if not {"works", "reason"} <= stored.keys():
        return None
    works, reason = bool(stored["works"]), str(stored["reason"])
    if "retry_at_ms" in stored:
        minutes = math.ceil((float(stored["retry_at_ms"]) - boot_ms()) / 60_000)
        return works, f"{reason}. The host may have been busy: KVM is tried again in {minutes} min"
    return works, reason if works else f"{reason}. KVM is not tried again until this host reboots"


def _record() -> Path:
    """Return the path of the result's file for this boot, kernel, QEMU and jail. Raises HostError, RefusedError."""
    form = jail_form()
    return proof_file(host_arch().qemu_binary, *(() if form.namespaces else (form.name,)))


def prove(image: OpenImage, accelerator: Accelerator, limit_s: float) -> Proof:
    """Return whether an agent answers within *limit_s* seconds. Raises SandboxError if no guest could be booted."""
    under = " under KVM" if accelerator.kvm else " under emulation"
    kind = MachineKind(image=image, ram_bytes=RAM_CLASSES[0])
    for last in boot_attempts():
        claim = Claim(run_id=new_run_id(), phase="probe", wall_ms=int(limit_s * 1000))
        record = create_record(claim, backend="qemu", image_digest=image.manifest.digest)
        job = QemuJob(record=record, kind=kind, deadline_s=int(limit_s) + 5, any_timer=last)
        with start_qemu(job, accelerator) as instance:
            instance.release()
            failure = Handshake(instance, State.WAITING).until(State.GREETED, Deadline.after(limit_s))
            if failure is None:
                return Proof(works=True, reason=f"x07's agent answered from a VM{under}")
            if failure.kind == "late":
                return Proof(works=False, reason=f"no answer from a VM{under} within {limit_s:.0f} s", late=True)
            if failure.exit_status is None:
                return Proof(works=False, reason=f"a test VM{under} failed ({failure.why})")
            if spent := out_of_cpu_time(instance.exit_status()):
                raise HostError("cannot test a VM", f"QEMU {spent}", "Raise that limit")
            if not miscalibrated(failure):
                lines = (" ".join(line.split()) for line in instance.console_tail().splitlines())
                said = "; ".join(filter(None, lines))[-200:].rstrip(".") or "nothing"
                why = f"a test VM{under} ended before x07's agent answered (QEMU printed {said})"
                return Proof(works=False, reason=why)
    return Proof(works=False, reason=f"no VM{under} could be booted ({MISCALIBRATED})")
