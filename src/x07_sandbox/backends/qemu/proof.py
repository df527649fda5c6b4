"""Whether hardware virtualisation works here: proven only by our own agent answering from a guest.

A /dev/kvm that opens and runs an instruction may still boot no stock kernel, or spin for ever. So a guest is booted
once, under a time limit, and the verdict is remembered for this boot, kernel and QEMU. A guest that was only late
proves little, since the host may have been busy: that is remembered for minutes, and then a guest is booted again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.proofs import proof_file
from x07_sandbox.backends.qemu.start import Accelerator, QemuJob, start_qemu
from x07_sandbox.backends.qemu.timer import MISCALIBRATED, boot_attempts, miscalibrated
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.clocks import Deadline, boot_ms
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.host.paths import replace_file
from x07_sandbox.jail.forms import jail_form
from x07_sandbox.jobs.record import Claim, create_record, new_run_id
from x07_sandbox.plan.sizes import RAM_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.images.verify import OpenImage


class Proof(NamedTuple):
    """Whether a guest works, and how that is known. late: it had not ended, but did not answer in time."""

    works: bool
    reason: str
    late: bool = False


def kvm_verdict(image: OpenImage) -> tuple[bool, str]:
    """(works, how that is known). Boots a guest where no verdict is remembered, and remembers the new one."""
    if (known := known_verdict()) is not None:
        return known
    record = _record()
    most_s = settings.BOOTS_MAX * (settings.KVM_PROOF_S + 1)
    try:
        with file_lock(record.parent / ".lock", most_s=most_s):
            if (known := known_verdict()) is not None:  # by now
                return known
            found = prove(image, Accelerator(kvm=True), settings.KVM_PROOF_S)
            remembered: dict[str, object] = {"works": found.works, "reason": found.reason}
            if found.late:
                remembered["retry_at_ms"] = boot_ms() + int(settings.KVM_RETRY_S * 1000)
            replace_file(record, json.dumps(remembered).encode())
    except SandboxError as exc:  # that says nothing of KVM, and is not remembered
        return False, f"a guest under KVM could not be tried: {exc.why}"
    except TimeoutError as exc:  # it may be stopped, by Ctrl-Z say, and must not hold all others
        return False, f"a guest under KVM could not be tried: {exc}: the lock {record.parent / '.lock'}"
    return _told(remembered)


def known_verdict() -> tuple[bool, str] | None:
    """The same as far as it is known without booting anything; None where a guest has to try."""
    device = Path("/dev/kvm")
    if not device.exists():
        return False, "there is no /dev/kvm"
    if not os.access(device, os.R_OK | os.W_OK):
        return False, "/dev/kvm cannot be opened by this user (join the group kvm to use it)"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = dict(json.loads(_record().read_text(encoding="utf-8")))
        if boot_ms() < float(known.get("retry_at_ms", math.inf)):
            return _told(known)
    return None


def _told(remembered: Mapping[str, object]) -> tuple[bool, str]:
    """A remembered verdict, with how long it holds."""
    works, reason = bool(remembered["works"]), str(remembered["reason"])
    if "retry_at_ms" in remembered:
        minutes = math.ceil((float(str(remembered["retry_at_ms"])) - boot_ms()) / 60_000)
        return works, f"{reason}. The host may have been busy: KVM is tried again in {minutes} min"
    return works, reason if works else f"{reason}. KVM is not tried again until this host reboots"


def _record() -> Path:
    """Where the verdict for this boot, kernel, QEMU and form of the jail is kept. Raises HostError, RefusedError."""
    form = jail_form()
    return proof_file(host_arch().qemu_binary, *(() if form.namespaces else (form.name,)))


def prove(image: OpenImage, accelerator: Accelerator, limit_s: float) -> Proof:
    """Find out whether an agent answers within *limit_s*. Raises SandboxError if none was tried."""
    # What follows is not needed where the verdict is known.
    from x07_sandbox.backends.handshake import Handshake
    from x07_sandbox.channel.link import State

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
                return Proof(works=True, reason=f"our agent answered from a guest{under}")
            if failure.kind == "late":
                return Proof(works=False, reason=f"no answer from a guest{under} within {limit_s:.0f} s", late=True)
            if failure.exit_status is None:
                return Proof(works=False, reason=f"a guest{under} failed: {failure.why}")
            if spent := out_of_cpu_time(instance.exit_status()):
                raise HostError("cannot try a guest", f"the machine {spent}", "Raise that limit")
            if not miscalibrated(failure):
                said = " ".join(instance.console_tail().split())[-200:] or "it said nothing"
                return Proof(works=False, reason=f"a guest{under} ended before our agent answered: {said}")
    return Proof(works=False, reason=f"no guest{under} could be booted: {MISCALIBRATED}")
