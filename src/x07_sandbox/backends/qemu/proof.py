"""The proof that hardware virtualisation works: x07's agent answers from a guest.

A /dev/kvm that can be opened may still boot no stock kernel, or hang. So one guest is booted with a time limit, and the
result is stored for this boot, kernel and QEMU. If the state of the host may be the cause of a failure, the result is
valid for minutes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.handshake import Handshake, evidence_of
from x07_sandbox.backends.prerequisites import KVM, NO_KVM, check
from x07_sandbox.backends.qemu.start import MISCALIBRATED, boot_attempts, miscalibrated, own_vm, require_cpu_time
from x07_sandbox.channel.link import State
from x07_sandbox.errors import SandboxError, worded
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.verdicts import Verdict, file_state, validity
from x07_sandbox.jail.forms import jail_form
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
    fix: str = NO_KVM


def kvm_verdict(image: OpenImage) -> Proof:
    """Return whether KVM works, and the evidence. Without a stored result, a guest is booted."""
    if (known := known_verdict()) is not None:
        return known
    verdict = _verdict()
    lock = verdict.path.with_name(".lock")
    not_tried = "a VM under KVM could not be tested"  # proves nothing, so it is not stored
    try:
        with file_lock(lock, most_s=settings.BOOTS_MAX * (settings.KVM_PROOF_S + 1)):
            if (known := known_verdict()) is not None:  # stored while we waited
                return known
            found = prove(image, settings.KVM_PROOF_S, kvm=True)
            verdict.write({"works": found.works, "reason": found.reason}, transient=found.transient)
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
        return Proof(works=True, reason=str(stored["reason"]))
    reason = f"{stored['reason']}. KVM is not tried again {validity(stored)}"
    transient = "retry_at_ms" in stored
    return Proof(works=False, reason=reason, transient=transient, fix="Try again later" if transient else NO_KVM)


def _verdict() -> Verdict:
    """Return the place of the result for this QEMU and jail. Raises HostError, RefusedError."""
    return Verdict("kvm", file_state(host_arch().qemu_binary), jail_form().name)


def prove(image: OpenImage, limit_s: float, *, kvm: bool) -> Proof:
    """Return whether an agent answers within *limit_s* seconds. Raises SandboxError if no guest could be booted."""
    from x07_sandbox.plan.outcomes import classify  # not imported by runs that know the result

    under = " under KVM" if kvm else " under emulation"
    kind = MachineKind(image=image, ram_bytes=RAM_CLASSES[0])
    for last in boot_attempts():
        with own_vm(kind, "probe", limit_s, kvm=kvm, any_timer=last) as instance:
            failure = Handshake(instance, State.WAITING).until(State.GREETED, Deadline.after(limit_s))
            if failure is None:
                return Proof(works=True, reason=f"x07's agent answered from a VM{under}")
            require_cpu_time(instance, "cannot test a VM")
            if not miscalibrated(failure):
                why = classify(evidence_of(failure)).reason.rstrip(".")
                return Proof(works=False, reason=f"a test VM{under} failed: {why}", transient=failure.transient)
    return Proof(works=False, reason=f"no VM{under} could be booted ({MISCALIBRATED})", transient=True)
