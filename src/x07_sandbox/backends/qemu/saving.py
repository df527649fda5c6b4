"""Making a VM template: boot a machine, let our agent prepare all that no job decides, save it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.handshake import Talk, polling
from x07_sandbox.backends.qemu.machine import qmp_save, qmp_saved
from x07_sandbox.backends.qemu.start import QemuJob, Saving, start_qemu
from x07_sandbox.backends.qemu.template import SCHEMA, LateError, TemplateManifest, sparse_sha256, warm_up
from x07_sandbox.backends.qemu.timer import boots, miscalibrated
from x07_sandbox.channel.frames import Kind
from x07_sandbox.channel.link import State
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.os_errors import out_of_cpu_time
from x07_sandbox.host.paths import open_private_file
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
_FIX: Final = "Jobs start cold until the host boots anew or x07 image build is run"


def make_template(template: Template, kind: MachineKind, accelerator: Accelerator, work: Path) -> TemplateManifest:
    """Make it in the folder *work*. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        files = {name: _new_file(work / name, stack) for name in ("ram", "state")}
        scratch_fd = os.open(work, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, scratch_fd)
        saving = Saving(ram_fd=files["ram"], state_fd=files["state"], scratch_fd=scratch_fd)
        for last in boots():
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
    """Boot and save one machine; False if another may do better. last: the last that tries. Raises BackendError."""
    words = warm_up(kind)
    limit_s = settings.TEMPLATE_S + (settings.PRELOAD_S if words["preload"] else 0)
    claim = Claim(run_id=new_run_id(), phase="template", wall_ms=int(limit_s * 1000))
    record = create_record(claim, backend="qemu", image_digest=kind.image_digest)
    job = QemuJob(record=record, kind=kind, deadline_s=2 * int(limit_s), any_timer=last)
    with start_qemu(job, accelerator, memory=saving) as instance:
        instance.release()
        deadline = Deadline.after(limit_s)
        say = {State.GREETED: (Kind.WARM, words)}
        if silence := Talk(instance, State.WAITING).until(State.WARM, deadline, say):
            _check_presence(deadline)
            if miscalibrated(silence) and not last:
                return False
            why = silence.why
            if spent := out_of_cpu_time(instance.exit_status()):
                raise HostError("cannot make a VM template", f"{why}; it {spent}", "Raise that limit")
            said = " ".join(instance.console_tail().split())[-200:] if silence.kind == "ended" else ""
            error = LateError if silence.kind == "late" else BackendError
            raise error("cannot make a VM template", f"{why}; {said}" if said else why, _FIX)
        _save(instance)
        if not instance.stop():
            raise BackendError("cannot make a VM template", "its machine did not end", _FIX)
    return True


def renew(instance: Instance, kind: MachineKind) -> None:
    """Have the agent, which has run a program of ours, make a fresh place for the next one. Raises BackendError."""
    words = warm_up(kind) | {"commands": []}
    limit_s = settings.TEMPLATE_S + (settings.PRELOAD_S if words["preload"] else 0)
    talk = Talk(instance, State.COLLECTING)
    if silence := talk.until(State.WARM, Deadline.after(limit_s), {State.COLLECTING: (Kind.WARM, words)}):
        raise BackendError("cannot warm a machine", silence.why, "Run x07 doctor")
    instance.start_mode = "pool"  # also one that was booted is spoken to as one that waits from now on


def _check_presence(deadline: Deadline) -> None:
    """Raises HostError if this process missed the deadline itself, which says nothing of the machine."""
    if deadline.missed_while_stopped():
        raise HostError("cannot make a VM template", "this process was stopped meanwhile", "The next run tries again")


def _new_file(path: Path, stack: contextlib.ExitStack) -> int:
    fd = open_private_file(path, os.O_RDWR | os.O_EXCL)
    stack.callback(os.close, fd)
    return fd


def _seal(name: str, fd: int) -> Part:
    """Ours again, and read-only for everybody; the machine that wrote it is gone."""
    os.fchown(fd, os.geteuid(), os.getegid())
    os.fchmod(fd, 0o444)
    size = os.fstat(fd).st_size
    return Part(file=name, bytes=size, sha256=sparse_sha256(fd, size))


def _save(instance: QemuInstance) -> None:
    """Have QEMU write the device state; the memory is in its file. Raises BackendError."""
    deadline = Deadline.after(settings.TEMPLATE_S)
    instance.tell(qmp_save(instance.paths.state))
    poll = polling(instance.pidfd, *instance.side_fds())
    while _SAVED not in instance.qmp.text():
        _check_presence(deadline)
        if deadline.passed() or instance.exit_status() is not None or _NOT_SAVED in instance.qmp.text():
            said = instance.qmp.text()[-300:] + instance.console_tail()[-200:]
            raise BackendError("cannot make a VM template", f"QEMU did not save it: {said}", _FIX)
        instance.tell(qmp_saved())
        for fd, _ in poll.poll(_ASK_AGAIN_MS):
            if fd != instance.pidfd:
                instance.drain(fd)
