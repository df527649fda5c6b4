"""Making a VM template: boot a machine, have the agent prepare everything that no job decides, save it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.handshake import Handshake, input_poll
from x07_sandbox.backends.qemu.machine import qmp_query_save, qmp_save
from x07_sandbox.backends.qemu.start import QemuJob, Saving, start_qemu
from x07_sandbox.backends.qemu.template import SCHEMA, TemplateManifest, TemplateTimeoutError, sparse_sha256, warm_frame
from x07_sandbox.backends.qemu.timer import boot_attempts, miscalibrated
from x07_sandbox.channel.frames import Kind
from x07_sandbox.channel.link import State
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.host.paths import open_own
from x07_sandbox.images.manifest import Part
from x07_sandbox.images.scratch import read_disk
from x07_sandbox.jobs.record import Claim, create_record, new_run_id

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.backends.base import Instance, MachineKind
    from x07_sandbox.backends.qemu.instance import QemuInstance
    from x07_sandbox.backends.qemu.start import Accelerator
    from x07_sandbox.backends.qemu.template import Template

_SAVED: Final = '"status": "completed"'
_NOT_SAVED: Final = '"status": "failed"'
_ASK_AGAIN_MS: Final = 5
_FIX: Final = "Jobs start cold until this host reboots or you run: x07 image build"


def make_template(template: Template, kind: MachineKind, accelerator: Accelerator, work: Path) -> TemplateManifest:
    """Make the template in the folder *work*. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        files = {name: _new_file(work / name, stack) for name in ("ram", "state")}
        scratch_fd = os.open(work, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, scratch_fd)
        saving = Saving(ram_fd=files["ram"], state_fd=files["state"], scratch_fd=scratch_fd)
        for last in boot_attempts():
            os.ftruncate(saving.ram_fd, 0)
            os.ftruncate(saving.ram_fd, kind.ram_bytes)
            if _booted_and_saved(kind, accelerator, saving, last=last):
                break
        head, disk = read_disk(scratch_fd)
        files["scratch.head"] = _new_file(work / "scratch.head", stack)
        os.write(files["scratch.head"], head)
        ram, state, scratch = (_seal(name, fd) for name, fd in files.items())
        key, image = template.key, kind.image_digest
        return TemplateManifest(
            schema_version=SCHEMA, key=key, image=image, ram=ram, state=state, scratch=scratch, scratch_disk=disk
        )


def _booted_and_saved(kind: MachineKind, accelerator: Accelerator, saving: Saving, *, last: bool) -> bool:
    """Boot and save one machine; False if another attempt may succeed. Raises SandboxError."""
    words = warm_frame(kind)
    limit_s = settings.TEMPLATE_S + (settings.PRELOAD_S if words["preload"] else 0)
    claim = Claim(run_id=new_run_id(), phase="template", wall_ms=int(limit_s * 1000))
    record = create_record(claim, backend="qemu", image_digest=kind.image_digest)
    job = QemuJob(record=record, kind=kind, deadline_s=2 * int(limit_s), any_timer=last)
    with start_qemu(job, accelerator, memory=saving) as instance:
        instance.release()
        deadline = Deadline.after(limit_s)
        say = {State.GREETED: (Kind.WARM, words)}
        if failure := Handshake(instance, State.WAITING).until(State.WARM, deadline, say):
            if miscalibrated(failure) and not last:
                return False
            why = failure.why
            if spent := out_of_cpu_time(instance.exit_status()):
                raise HostError("cannot make a VM template", f"{why}; it {spent}", "Raise that limit")
            said = " ".join(instance.console_tail().split())[-200:] if failure.kind == "ended" else ""
            error = TemplateTimeoutError if failure.kind == "late" else BackendError
            raise error("cannot make a VM template", f"{why}; {said}" if said else why, _FIX)
        _save(instance)
        if not instance.stop():
            raise BackendError("cannot make a VM template", "its machine did not end", _FIX)
    return True


def renew(instance: Instance, kind: MachineKind) -> None:
    """Have the agent, which has run a program of ours, prepare for the next one. Raises BackendError."""
    words = warm_frame(kind) | {"commands": []}
    limit_s = settings.TEMPLATE_S + (settings.PRELOAD_S if words["preload"] else 0)
    talk = Handshake(instance, State.COLLECTING)
    if failure := talk.until(State.WARM, Deadline.after(limit_s), {State.COLLECTING: (Kind.WARM, words)}):
        raise BackendError("cannot warm a machine", failure.why, "Run x07 doctor")
    instance.start_mode = "pool"  # from now on its agent waits in the same state as a clone's


def _new_file(path: Path, stack: contextlib.ExitStack) -> int:
    fd = open_own(path, os.O_RDWR | os.O_EXCL)
    stack.callback(os.close, fd)
    return fd


def _seal(name: str, fd: int) -> Part:
    """Take the file back from the machine's uid, and make it read-only."""
    os.fchown(fd, os.geteuid(), os.getegid())
    os.fchmod(fd, 0o444)
    size = os.fstat(fd).st_size
    return Part(file=name, bytes=size, sha256=sparse_sha256(fd, size))


def _save(instance: QemuInstance) -> None:
    """Have QEMU write the device state; the memory is in its file already. Raises BackendError."""
    deadline = Deadline.after(settings.TEMPLATE_S)
    instance.send_qmp(qmp_save(instance.paths.state))
    poll = input_poll(instance.pidfd, *instance.side_fds())
    while _SAVED not in instance.qmp.text():
        if deadline.passed() or instance.exit_status() is not None or _NOT_SAVED in instance.qmp.text():
            said = instance.qmp.text()[-300:] + instance.console_tail()[-200:]
            error = TemplateTimeoutError if deadline.passed() else BackendError
            raise error("cannot make a VM template", f"QEMU did not save it: {said}", _FIX)
        instance.send_qmp(qmp_query_save())
        for fd, _ in poll.poll(_ASK_AGAIN_MS):
            if fd != instance.pidfd:
                instance.drain(fd)
