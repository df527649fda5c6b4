"""Starting QEMU in its jail: created blocked, recorded, released; killed and proven gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from x07_sandbox.backends.jailed import Start, running, socket_ends
from x07_sandbox.backends.qemu.bounds import TASKS, VMM_BYTES, NotStartedError, bound, limits_of
from x07_sandbox.backends.qemu.instance import Gate, Held, QemuInstance
from x07_sandbox.backends.qemu.machine import OVERCOMMIT, Machine, Origin, Paths, qemu_argv
from x07_sandbox.errors import HostError
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.host.bounded_stream import BoundedStream
from x07_sandbox.host.close_on_fork import FdGroup
from x07_sandbox.host.os_errors import fix_for, require_own_proc
from x07_sandbox.images.manifest import ScratchDisk
from x07_sandbox.images.scratch import write_disk
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV, Jail, may_nest
from x07_sandbox.jail.cgroups import make_groups
from x07_sandbox.jail.forms import Form, flags, jail_form
from x07_sandbox.jail.libraries import needed_files
from x07_sandbox.jail.uids import lease_uid
from x07_sandbox.jobs.launcher import Launch
from x07_sandbox.jobs.record import drop_unstarted

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from x07_sandbox.backends.base import MachineKind, StartMode
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.record import JobRecord

# Below the supervisor: bubblewrap, which waits, and the first process of the jail; without namespaces only that.
_DEPTH: Final = {True: 2, False: 1}


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """Empty files for a machine that will be saved, lent, open for writing. ram_fd: of the machine's size."""

    ram_fd: int
    state_fd: int
    scratch_fd: int


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a saved machine, lent, open for reading, and what its scratch disk held."""

    ram_fd: int
    state_fd: int
    scratch_fd: int
    scratch_disk: ScratchDisk


class QemuJob(NamedTuple):
    """One machine to start.

    deadline_s: when its supervisor ends it. any_timer: it may go on with a wrong timer. ram_bytes: how much of its RAM
    it may use, beside which its control group has room for QEMU itself; None for all.
    """

    record: JobRecord
    kind: MachineKind
    deadline_s: int
    any_timer: bool = False
    ram_bytes: int | None = None


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """How the guest's processor is provided."""

    kvm: bool


@contextlib.contextmanager
def start_qemu(
    job: QemuJob, accelerator: Accelerator, arch: Arch | None = None, memory: Saving | Saved | None = None
) -> Iterator[QemuInstance]:
    """Start a QEMU, blocked until released; on the way out it is gone and its record says so.

    memory: a saved machine to clone, or files to save this one in; None boots it in memory of its own.
    arch: the VMM and what it needs; None for this host's (tests of the jail use another VMM).
    Raises NotStartedError, HostError; BackendError too where it ended at once.
    """
    arch, record, image = arch or host_arch(), job.record, image_of(job.kind)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        require_own_proc()
        check_tools(arch)
        form = jail_form()
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        given = FdGroup()  # what the child gets: ours to close once it has them, or when it never came to be
        stack.callback(given.close)
        ends = {name: socket_ends(stack, given) for name in ("channel", "net", "qmp", "console", "stderr")}
        ours, theirs = {name: pair[0] for name, pair in ends.items()}, {name: pair[1] for name, pair in ends.items()}
        streams = [theirs[name] for name in ("channel", "net", "qmp", "console")]
        files, writable = _fd_files(image, memory, given, form), _writable(memory, uid, given, form)
        machine = Machine(
            arch=arch,
            ram_bytes=job.kind.ram_bytes,
            kvm_fd=_kvm(stack) if accelerator.kvm else None,
            tsc_khz=None if accelerator.kvm else tsc_khz(arch),
            scratch_fd=_scratch_disk(given, image, record, memory),
            channel_fd=theirs["channel"],
            net_fd=theirs["net"],
            qmp_fd=theirs["qmp"],
            console_fd=theirs["console"],
            mark=record.mark,
            origin=Origin.COLD if memory is None else Origin.CLONE if isinstance(memory, Saved) else Origin.SAVING,
            reserve=not form.namespaces,
            any_timer=job.any_timer,
            paths=msgspec.structs.replace(Paths(), **{name: path for name, (_, path) in (files | writable).items()}),
        )
        limits = limits_of(machine.ram_bytes, namespaces=form.namespaces)
        gate_r, gate_w = os.pipe2(os.O_CLOEXEC)
        gate = Gate(gate_w, form.gate_message(arch))
        stack.callback(gate.close)
        given.add(gate_r)
        within = needed_files(SETPRIV) if uid is not None and form.namespaces else ()
        jail = Jail(
            files=tuple(dict.fromkeys([*needed_files(arch.qemu_binary), *arch.firmware, *within])),
            fd_files=tuple(files.values()),
            fd_copies=_overcommit(given, form),
            fd_writable=tuple(writable.values()),
            devices=("/dev/urandom",),
            limits=limits,
            fds=(*([] if machine.kvm_fd is None else [machine.kvm_fd]), machine.scratch_fd, *streams),
            uid=uid,
            mark=record.mark,
            deadline_s=job.deadline_s,
            runner_pid=os.getpid(),
            syscalls=arch.syscalls,
            nest=may_nest(),
            filter_fd=gate_r,
            lock_fd=lock_fd,
        )
        passed = [*jail.fds, gate_r, *(fd for fd, _ in (*jail.fd_files, *jail.fd_writable, *jail.fd_copies))]
        passed += [] if lock_fd is None else [lock_fd]
        argv = form.argv(jail, qemu_argv(machine))
        request = Launch(argv=argv, pass_fds=tuple(passed), stderr_fd=theirs["stderr"])
        yield stack.enter_context(_running(_Ready(job, machine, form, request, given, gate, ours, limits)))


class _Ready(NamedTuple):
    """A machine that only has to be launched. ends: ours, of its streams."""

    job: QemuJob
    machine: Machine
    form: Form
    request: Launch
    given: FdGroup
    gate: Gate
    ends: dict[str, int]
    limits: dict[int, tuple[int, int]]


def _running(ready: _Ready) -> AbstractContextManager[QemuInstance]:
    record, machine, form = ready.job.record, ready.machine, ready.form
    memory_bytes = (ready.job.ram_bytes or machine.ram_bytes) + VMM_BYTES
    groups = make_groups(record.job_id, memory_bytes=memory_bytes, tasks=TASKS)
    jail = f"{form.name}, {'root' if os.geteuid() == 0 else 'user'}; {groups.describe()}"
    # Without namespaces the jail sets its limits itself: of a process of another uid not every root may.
    hold = partial(bound, ready.limits if form.namespaces else {}, groups)
    start = Start(record, jail, ready.given, _DEPTH[form.namespaces], groups.remove, groups.names(), hold)
    mode: StartMode = "clone" if machine.origin is Origin.CLONE else "cold"
    start = start._replace(name="the virtual machine", error=NotStartedError, start_mode=mode)
    not_built = partial(_no_jail, ready.ends["stderr"], form)
    make = partial(QemuInstance, start, Held(groups, ready.gate, ready.ends, machine.paths))
    return running(start, ready.request, make, not_built)


def _no_jail(stderr_fd: int, form: Form, status: int | None) -> NotStartedError:
    """What was said when the jail could not be built, as an error."""
    stream = BoundedStream(stderr_fd, keep_bytes=4096)
    stream.read()
    said = stream.text().strip() or f"it ended with status {status}"
    if "find source path" in said:
        fix = "A file that it needs was replaced or removed meanwhile: try again"
    elif form.namespaces:
        fix = f"Allow user and mount namespaces here: {flags()}"
    else:
        fix = f"Run x07 doctor, or allow namespaces here: {flags()}"
    return NotStartedError("cannot build the jail around the virtual machine", said[:500], fix)


def _kvm(stack: contextlib.ExitStack) -> int:
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def image_of(kind: MachineKind) -> OpenImage:
    """The image of a kind of virtual machine: each has one."""
    if kind.image is None:
        raise HostError("cannot start a virtual machine", "it needs a guest image", "Run x07 image build")
    return kind.image


# By the name in `Paths`: the descriptor, and under which path QEMU opens it.
_Files = dict[str, tuple[int, str]]


def _fd_files(image: OpenImage, memory: Saving | Saved | None, given: FdGroup, form: Form) -> _Files:
    """What the machine reads. A clone has kernel and initramfs in its memory.

    The opened files themselves, on a read-only mount: through a descriptor of its own a VMM that runs under the owner's
    uid could still change an image's mode and times, and so spoil it for later runs.
    """
    root = image.fds["root"]
    if isinstance(memory, Saved):
        return _placed({"ram": memory.ram_fd, "state": memory.state_fd, "root": root}, given, form)
    return _placed({"kernel": image.fds["kernel"], "initrd": image.fds["initrd"], "root": root}, given, form)


def _overcommit(given: FdGroup, form: Form) -> tuple[tuple[int, str], ...]:
    """The file by which QEMU decides whether it may leave memory unreserved: ours, since the jail has no /proc."""
    if not form.namespaces:
        return ()
    fd = given.add(os.memfd_create("overcommit_memory", os.MFD_CLOEXEC))
    os.pwrite(fd, b"1\n", 0)  # always, as proc(5) has it; the kernel goes by its own setting all the same
    return ((fd, OVERCOMMIT),)


def _writable(memory: Saving | Saved | None, uid: int | None, given: FdGroup, form: Form) -> _Files:
    if not isinstance(memory, Saving):
        return {}
    if uid is not None:
        for fd in (memory.ram_fd, memory.state_fd):
            os.fchown(fd, uid, uid)
    return _placed({"ram": memory.ram_fd, "state": memory.state_fd}, given, form, os.O_RDWR)


def _placed(fds: dict[str, int], given: FdGroup, form: Form, flags: int = os.O_RDONLY) -> _Files:
    """Where they are: bound below the jail's root, or opened anew, since what is opened once has one offset for all."""
    if form.namespaces:
        return {name: (fd, getattr(Paths(), name)) for name, fd in fds.items()}
    found = {}
    for name, fd in fds.items():
        own = given.add(os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC))
        found[name] = own, f"/proc/self/fd/{own}"
    return found


def _scratch_disk(given: FdGroup, image: OpenImage, record: JobRecord, memory: Saving | Saved | None) -> int:
    """Make the job's disk, a file without a name; a clone's holds what it held when the machine was saved."""
    if isinstance(memory, Saving):
        write_disk(image.fds["scratch"], image.manifest.scratch_disk, memory.scratch_fd)
        return memory.scratch_fd
    try:
        fd = os.open(record.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        fix = fix_for(exc, "Set X07_VM_STATE_DIR to a folder on ext4, xfs or btrfs")
        raise HostError("cannot make the scratch disk", f"{record.folder}: {exc.strerror}", fix) from exc
    given.add(fd)  # not ours once the child has it, so that its space is free when the child is gone
    held = (image.fds["scratch"], image.manifest.scratch_disk)
    write_disk(*(held if memory is None else (memory.scratch_fd, memory.scratch_disk)), fd)
    return fd


def required_tools(arch: Arch) -> dict[str, str]:
    """Programs that a start needs, and Debian's package of each."""
    return {BWRAP: "bubblewrap", SETPRIV: "util-linux", PERL: "perl-base", arch.qemu_binary: arch.qemu_package}


def check_tools(arch: Arch) -> None:
    """Raise HostError, with what to type, where programs or firmware are missing."""
    what = "cannot start a virtual machine"
    if missing := [package for path, package in required_tools(arch).items() if not os.access(path, os.X_OK)]:
        names = " ".join(missing)
        raise HostError(what, f"missing: {names}", f"Run: apt-get install --no-install-recommends {names}")
    if gone := [path for path in arch.firmware if not os.access(path, os.R_OK)]:  # of packages that QEMU's depends on
        fix = f"Run: apt-get install --reinstall {' '.join(arch.firmware_packages)}"
        raise HostError(what, f"missing: {', '.join(gone)}", fix)


def tsc_khz(arch: Arch) -> int | None:
    """The host's time stamp counter in kHz, which an emulated guest shares and could not find out reliably."""
    if arch.machine != "microvm":
        return None
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("bogomips"):
            return int(float(line.partition(":")[2]) * 500)
    why = "/proc/cpuinfo has no bogomips line"
    raise HostError("cannot tell the processor's clock", why, "Run on a machine with hardware virtualisation")
