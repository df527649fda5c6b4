"""The proof that hardware virtualisation works: x07's agent answers from a guest.

A /dev/kvm that can be opened may still boot no stock kernel, or hang. So one guest is booted with a time limit, and the
result is stored for this boot, kernel and QEMU. If the state of the host may be the cause of a failure, the result is
valid for minutes only.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.handshake import Handshake, evidence_of
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
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.host.verdicts import proof_file, read_verdict, validity, write_verdict
from x07_sandbox.jail.forms import jail_form
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.sizes import RAM_CLASSES

if TYPE_CHECKING:
    from x07_sandbox.images.verify import OpenImage


class Proof(NamedTuple):
    """Whether a guest works, and the evidence.

    transient: whether the state of the host may be the cause of a failure. fix: what to do after a failure.
    """

    works: bool
    reason: str
    transient: bool = False
    fix: str = "Use a host where KVM works"


def kvm_verdict(image: OpenImage) -> Proof:
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
            write_verdict(record, values, transient=found.transient)
    except SandboxError as exc:
        return Proof(works=False, reason=f"{not_tried} ({exc.why})", fix=exc.fix)
    except TimeoutError as exc:  # the other process may be stopped
        return Proof(works=False, reason=f"{not_tried} ({exc} for the lock {lock})", fix="Try again")
    return known_verdict() or found


def known_verdict() -> Proof | None:
    """Return the result and its evidence, or None if a guest must be booted to get a result."""
    device = Path("/dev/kvm")
    if not device.exists():
        return Proof(works=False, reason="there is no /dev/kvm")
    if not os.access(device, os.R_OK | os.W_OK):
        return Proof(works=False, reason="/dev/kvm cannot be opened by this user", fix=_how_to_open(device))
    stored = read_verdict(_record())
    if not {"works", "reason"} <= stored.keys():
        return None
    if stored["works"]:
        return Proof(works=True, reason=str(stored["reason"]))
    reason = f"{stored['reason']}. KVM is not tried again {validity(stored)}"
    if "retry_at_ms" in stored:
        return Proof(works=False, reason=reason, transient=True, fix="Try again later")
    return Proof(works=False, reason=reason)


def _how_to_open(device: Path) -> str:
    import pwd

    with contextlib.suppress(KeyError):  # the uid or gid has no name
        user = pwd.getpwuid(os.geteuid()).pw_name
        if device.group() == "kvm":
            return f"As root, run usermod -aG kvm {user}, and then log in again as {user}"
    return f"As root, allow this user (uid {os.geteuid()}) to read and write {device}"


def _record() -> Path:
    """Return the path of the result's file for this boot, kernel, QEMU and jail. Raises HostError, RefusedError."""
    form = jail_form()
    return proof_file(host_arch().qemu_binary, *(() if form.namespaces else (form.name,)))


def prove(image: OpenImage, accelerator: Accelerator, limit_s: float) -> Proof:
    """Return whether an agent answers within *limit_s* seconds. Raises SandboxError if no guest could be booted."""
    from x07_sandbox.plan.outcomes import classify  # not imported by runs that know the result

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
            if spent := out_of_cpu_time(instance.exit_status()):
                raise HostError("cannot test a VM", f"QEMU {spent}", "Raise that limit")
            if not miscalibrated(failure):
                why = classify(evidence_of(failure)).reason.rstrip(".")
                return Proof(works=False, reason=f"a test VM{under} failed: {why}", transient=failure.transient)
    return Proof(works=False, reason=f"no VM{under} could be booted ({MISCALIBRATED})", transient=True)
