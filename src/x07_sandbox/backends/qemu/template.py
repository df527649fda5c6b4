"""Saved VMs: machines that were booted, prepared and saved once. Clones resume copy-on-write.

The key is a hash of everything that a saved VM depends on: image, QEMU and firmware as files, the command line, and the
processor's clock. Measured: QEMU resumes without an error on another root image or processor count, and hangs on
another processor model. Only the key prevents that.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.base import (
    NOT_IMPORTED,
    SLOW_IMPORT,
    Handshake,
    Instance,
    MachineKind,
    NoAnswerError,
    evidence_of,
)
from x07_sandbox.backends.qemu import start as starts
from x07_sandbox.backends.qemu.instance import QemuInstance
from x07_sandbox.backends.qemu.machine import QMP_QUERY_SAVE, Machine, Origin, qemu_argv, qmp_save
from x07_sandbox.backends.qemu.saved import (
    SCHEMA,
    Manifest,
    SavedVm,
    Template,
    TransientError,
    ensure,
    lack_of_space,
    new_file,
    opened,
    seal,
    templates_dir,
)
from x07_sandbox.backends.qemu.start import Source
from x07_sandbox.channel.link import State
from x07_sandbox.channel.messages import Warm
from x07_sandbox.errors import BackendError, Command, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import processor
from x07_sandbox.host.paths import unnamed_file
from x07_sandbox.host.verdicts import file_state
from x07_sandbox.host.waiting import Deadline, input_poll, write_all
from x07_sandbox.images.store import ScratchDisk
from x07_sandbox.images.verify import OpenImage, opened_parts, read_disk, write_disk
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import canonical_json, default_policy
from x07_sandbox.policy.guest import build_limits, command_limits, tmp_bytes

_COMPILE: Final = "echo 'int main(void) { return 0; }' > warm.c && gcc -O2 -o warm warm.c -lm; rm -f warm*"
_COMMANDS: Final = {
    "run": [["/bin/true"], ["/usr/bin/python3", "-c", "pass"]],
    "build": [["/bin/true"], ["/bin/sh", "-c", _COMPILE]],
}
# The imports of programs/data/build_tree.py.
_OF_BUILDS: Final = ["importlib.util", "os", "traceback"]

_SAVED: Final = '"status": "completed"'
_NOT_SAVED: Final = '"status": "failed"'
_ASK_AGAIN_MS: Final = 5
_WHAT: Final = "cannot save a VM"
# The codes of errors about preloaded modules, by the stage that the guest reports.
_PRELOADING: Final = {"exec": NOT_IMPORTED, "preload": SLOW_IMPORT}
_FIX: Final = ("Jobs boot a new VM instead. To try again: ", Command("x07 image build"))


def warm_message(kind: MachineKind) -> Warm:
    """Return the message WARM. Its commands are run before saving, so that their files are in memory."""
    assert kind.image is not None  # each virtual machine has one
    running = kind.runtime == "run"
    of_run, of_build = run_limits(default_policy()), build_limits()
    limits = of_run.for_guest() if running else command_limits(of_build, settings.BUILD_TASKS)
    return Warm(
        preload=None if kind.has_program_root else kind.image.manifest.preload if running else _OF_BUILDS,
        limits=limits,
        tmp_bytes=tmp_bytes(limits.mem_bytes),
        hostname=settings.GUEST_HOSTNAME,
        out_writable=not running,
        network=kind.network,
        commands=_COMMANDS[kind.runtime],
    )


class VmTemplate(Template, frozen=True, kw_only=True):
    """The place of a saved VM."""

    noun = "VM"
    instead = "boot a new VM"
    done = "booted"
    waits_for_host = False
    next_attempt = "cold"

    def failed(self, error: NoAnswerError) -> str:
        """Suspend it, unless somebody has killed its clone. Return why the clone did not answer."""
        from x07_sandbox.policy.outcomes import classify

        evidence = evidence_of(error.failure)
        why = f"a clone of the saved VM did not answer ({classify(evidence).reason})"
        return why if evidence.killed else self.suspend(why, transient=error.failure.transient)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Source | None]:
        """Open the verified files, or yield None if there are none. Raises ImageError if they are damaged."""
        with contextlib.ExitStack() as stack:
            if (found := opened(self, stack)) is None:
                yield None
                return
            folder_fd, made = found
            assert isinstance(made, SavedVm)  # by its key
            parts = (made.ram, made.state, made.scratch)
            ram_fd, state_fd, scratch_fd = opened_parts(folder_fd, parts, self.subject, stack)
            files = {"ram": ram_fd, "state": state_fd}
            yield Source(
                origin=Origin.CLONE, files=files, ram_fd=ram_fd, fill=filled_from(scratch_fd, made.scratch_disk)
            )


def filled_from(scratch_fd: int, disk: ScratchDisk) -> Callable[[OpenImage, int], None]:
    """Return a function that fills a job's disk with the content that a saved VM has of it (`Source.fill`)."""
    return lambda _image, fd: write_disk(scratch_fd, disk, fd)


def template_for(kind: MachineKind, *, kvm: bool) -> VmTemplate:
    """Return the template for jobs of this kind. Raises HostError."""
    arch, ram, kvm_fd = kind.arch, kind.ram_bytes, 0 if kvm else None
    clock = starts.tsc_khz(arch)
    fds: dict[str, Any] = dict.fromkeys(("scratch_fd", "channel_fd", "net_fd", "qmp_fd", "console_fd"), 0)
    machine = Machine(arch=arch, ram_bytes=ram, kvm_fd=kvm_fd, tsc_khz=None, mark="", origin=Origin.SAVING, **fds)
    parts = [
        SCHEMA,
        kind.image_digest,
        qemu_argv(machine),
        [file_state(path) for path in (arch.qemu_binary, *arch.firmware)],
        # The clock in steps of 0.1 %: its last digits in /proc/cpuinfo vary.
        0 if clock is None else round(math.log(clock) * 1000),
        processor("model name", "flags", "microcode") if kvm else "",  # what a guest under KVM sees
        warm_message(kind),
    ]
    key = hashlib.sha256(canonical_json(parts)).hexdigest()
    jobs = "builds" if kind.runtime == "build" else "runs with connections" if kind.network else "runs"
    return VmTemplate(key=key, folder=templates_dir() / key, title=f"{jobs} ({ram >> 30} GiB of RAM)")


def ensure_template(
    template: Template, kind: MachineKind, progress: Callable[[str], None], *, kvm: bool, boot_s: float
) -> None:
    """Save a VM unless there is one. boot_s: timeout of its boot. Raises SandboxError."""

    def make(work: Path) -> Manifest:
        if short := lack_of_space(kind.ram_bytes):
            raise HostError(_WHAT, short, "Free disk space")
        return make_template(template, kind, work, kvm=kvm, boot_s=boot_s)

    ensure(template, make, f"saving a VM for {template.title} with this image; later VMs start in 0.1 s", progress)


def make_template(
    template: Template, kind: MachineKind, work: Path, *, kvm: bool, boot_s: float = settings.BOOT_S
) -> Manifest:
    """Make the template in the folder *work*. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        files = {name: new_file(work / name, stack) for name in ("ram", "state")}
        scratch_fd = unnamed_file(work, _WHAT)
        stack.callback(os.close, scratch_fd)
        saving = Source(origin=Origin.SAVING, written=dict(files), disk_fd=scratch_fd)
        for last in starts.boot_attempts():
            os.ftruncate(files["ram"], 0)
            os.ftruncate(files["ram"], kind.ram_bytes)
            if _booted_and_saved(kind, saving, kvm=kvm, last=last, boot_s=boot_s):
                break
        files["scratch.head"] = new_file(work / "scratch.head", stack)
        disk = keep_disk(scratch_fd, files["scratch.head"])
        ram, state, scratch = (seal(name, fd) for name, fd in files.items())
        made = SavedVm(ram=ram, state=state, scratch=scratch, scratch_disk=disk)
        return Manifest(key=template.key, image=kind.image_digest, made=made)


def keep_disk(disk_fd: int, scratch_fd: int) -> ScratchDisk:
    """Keep the content of a scratch disk in the file *scratch_fd*. Raises ImageError, OSError."""
    head, disk = read_disk(disk_fd)
    write_all(scratch_fd, head)
    return disk


def _booted_and_saved(kind: MachineKind, saving: Source, *, kvm: bool, last: bool, boot_s: float) -> bool:
    """Boot and save one VM. Return False if another attempt may succeed. Raises SandboxError."""
    order, most_s = warm_message(kind), limit_s(kind) + boot_s - settings.BOOT_S
    with starts.own_vm(kind, "template", most_s, kvm=kvm, any_timer=last, source=saving) as instance:
        say = {State.GREETED: order}
        if failure := Handshake(instance, State.WAITING).until(State.WARM, Deadline.after(most_s), say):
            if starts.miscalibrated(failure) and not last:
                return False
            starts.require_cpu_time(instance, _WHAT)
            error = TransientError if failure.transient else BackendError
            if code := _PRELOADING.get(failure.stage) if order.preload else None:
                raise error(_WHAT, failure.why, _FIX, code=code)
            raise error(_WHAT, failure.text, _FIX)
        _save(instance)
        if not instance.stop():
            raise TransientError(_WHAT, "the VM did not end", _FIX)
    return True


def limit_s(kind: MachineKind) -> float:
    """Return how long a guest may take to prepare itself, in seconds."""
    return settings.TEMPLATE_S + (settings.PRELOAD_S if warm_message(kind).preload else 0)


def renew(instance: Instance, kind: MachineKind) -> None:
    """Prepare an instance for one user program after it has run x07's own programs. Raises BackendError."""
    say = {State.CLOSED: warm_message(kind)._replace(commands=[])}
    if failure := Handshake(instance, State.CLOSED).until(State.WARM, Deadline.after(limit_s(kind)), say):
        raise BackendError("cannot prepare a VM for the pool", failure.text, "Run x07 doctor")
    instance.start_mode = "pool"  # from now on its agent waits in the same state as a clone's


def _save(instance: QemuInstance) -> None:
    """Make QEMU write the device state. The memory is in its file already. Raises TransientError."""
    instance.send_qmp(qmp_save(instance.paths.state))
    await_qmp(instance, _SAVED, QMP_QUERY_SAVE)


def await_qmp(instance: QemuInstance, wanted: str, ask: bytes = b"") -> None:
    """Wait until QEMU says *wanted*. ask: commands to send again and again. Raises TransientError."""
    deadline = Deadline.after(settings.TEMPLATE_S)
    poll = input_poll(instance.pidfd, *instance.side_fds())
    while wanted not in instance.qmp.text():
        if deadline.passed() or instance.exit_status() is not None or _NOT_SAVED in instance.qmp.text():
            said = instance.qmp.text()[-300:] + instance.console_tail()[-200:]
            raise TransientError(_WHAT, f"QEMU did not save it: {said}", _FIX)
        instance.send_qmp(ask)
        for fd, _ in poll.poll(_ASK_AGAIN_MS):
            if fd != instance.pidfd:
                instance.drain(fd)
