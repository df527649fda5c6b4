"""Starting QEMU in its jail: created blocked, recorded, released; killed and proven gone."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from x07_sandbox.backends.jailed import Start, running, socket_ends
from x07_sandbox.backends.qemu.instance import Gate, QemuInstance
from x07_sandbox.backends.qemu.machine import INITRD, KERNEL, RAM, ROOT, STATE, Machine, Origin, qemu_argv
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch
from x07_sandbox.host.bounded_stream import SideStream
from x07_sandbox.host.forks import Given
from x07_sandbox.host.troubles import fix_of, need_own_proc
from x07_sandbox.images.manifest import ScratchDisk
from x07_sandbox.images.scratch import write_disk
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV, Jail, jail_argv, may_nest
from x07_sandbox.jail.cgroups import HostGroups, make_groups
from x07_sandbox.jail.libraries import needed_files
from x07_sandbox.jail.seccomp import vmm_filter
from x07_sandbox.jail.uids import lease_uid
from x07_sandbox.jobs.launcher import Launch
from x07_sandbox.jobs.record import drop_unstarted

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from x07_sandbox.backends.base import MachineKind, StartMode
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.record import JobRecord

_AS_ABOVE_RAM: Final = 3 * settings.GIB  # code, thread stacks, and the translator's buffer of 1 GiB
_CGROUP_ABOVE_RAM: Final = 1536 * settings.MIB
# QEMU's own threads, up to 64 workers of its block layer (thread-pool-max) when a guest has as many requests under
# way, and bubblewrap's first process: with less, a busy guest ends QEMU ("pthread_create failed").
_TASKS: Final = 96
_DEPTH: Final = 2  # below the supervisor: bubblewrap, which waits, and the first process of the jail
# Which limits are not zero, as a shell calls them, and in which unit.
_SHELLS: Final = (
    (resource.RLIMIT_FSIZE, "f", 1024),
    (resource.RLIMIT_AS, "v", 1024),
    (resource.RLIMIT_DATA, "d", 1024),
    (resource.RLIMIT_NOFILE, "n", 1),
    (resource.RLIMIT_SIGPENDING, "i", 1),
    (resource.RLIMIT_NPROC, "u", 1),
)


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


class NotStartedError(BackendError):
    """No machine came to be: the host's doing, or the caller's limits. It says nothing of what it would have run."""


class QemuJob(NamedTuple):
    """One machine to start. deadline_s: when its supervisor ends it. any_timer: it may go on with a wrong timer."""

    record: JobRecord
    kind: MachineKind
    deadline_s: int
    any_timer: bool = False


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
        need_own_proc()
        check_tools(arch)
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        given = Given()  # what the child gets: ours to close once it has them, or when it never came to be
        stack.callback(given.close)
        ends = {name: socket_ends(stack, given) for name in ("channel", "net", "qmp", "console", "stderr")}
        ours, theirs = {name: pair[0] for name, pair in ends.items()}, {name: pair[1] for name, pair in ends.items()}
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
            any_timer=job.any_timer,
        )
        gate_r, gate_w = os.pipe2(os.O_CLOEXEC)
        gate = Gate(gate_w, vmm_filter(arch))
        stack.callback(gate.close)
        given.add(gate_r)
        files = [*needed_files(arch.qemu_binary), *arch.firmware, *(needed_files(SETPRIV) if uid is not None else ())]
        jail = Jail(
            files=tuple(dict.fromkeys(files)),
            # The opened files themselves, on a read-only mount: through a descriptor of its own a VMM that runs under
            # the owner's uid could still change an image's mode and times, and so spoil it for later runs.
            fd_files=_fd_files(image, memory),
            fd_writable=_writable(memory, uid),
            devices=("/dev/urandom",),
            uid=uid,
            mark=record.mark,
            deadline_s=job.deadline_s,
            runner_pid=os.getpid(),
            syscalls=arch.syscalls,
            nest=may_nest(),
            filter_fd=gate_r,
            lock_fd=lock_fd,
        )
        passed = [fd for fd in (machine.kvm_fd, lock_fd) if fd is not None]
        passed += [*(fd for fd, _ in (*jail.fd_files, *jail.fd_writable)), machine.scratch_fd, gate_r]
        passed += [theirs[name] for name in ("channel", "net", "qmp", "console")]
        request = Launch(argv=jail_argv(jail, qemu_argv(machine)), pass_fds=tuple(passed), stderr_fd=theirs["stderr"])
        yield stack.enter_context(_running(record, machine, request, given, gate, ours))


def _running(
    record: JobRecord, machine: Machine, request: Launch, given: Given, gate: Gate, ours: dict[str, int]
) -> AbstractContextManager[QemuInstance]:
    groups = make_groups(record.job_id, memory_bytes=machine.ram_bytes + _CGROUP_ABOVE_RAM, tasks=_TASKS)
    jail = f"namespaces, {'root' if os.geteuid() == 0 else 'user'}; {groups.describe()}"
    bound = partial(_bound, machine.ram_bytes, groups)
    start = Start(record, jail, given, _DEPTH, groups.remove, groups.names(), bound)
    mode: StartMode = "clone" if machine.origin is Origin.CLONE else "cold"
    start = start._replace(name="the virtual machine", error=NotStartedError, start_mode=mode)
    make = partial(QemuInstance, start, groups, gate, ours)
    return running(start, request, make, partial(_no_jail, ours["stderr"]))


def _no_jail(stderr_fd: int, status: int | None) -> NotStartedError:
    """What bubblewrap said when it could not build the jail, as an error."""
    stream = SideStream(stderr_fd, keep_bytes=4096)
    stream.read()
    said = stream.text().strip() or f"bubblewrap ended with status {status}"
    if "find source path" in said:
        fix = "A file that it needs was replaced or removed meanwhile: try again"
    else:
        fix = "Allow user and mount namespaces here (in a container: --privileged)"
    return NotStartedError("cannot build the jail around the virtual machine", said[:500], fix)


def _bound(ram_bytes: int, groups: HostGroups, pid: int) -> None:
    """Limits on the still blocked process: everything that it starts inherits them."""
    limits = {
        resource.RLIMIT_FSIZE: settings.SCRATCH_BYTES,
        resource.RLIMIT_AS: ram_bytes + _AS_ABOVE_RAM,
        resource.RLIMIT_DATA: ram_bytes + _AS_ABOVE_RAM,  # the guest's RAM is such memory
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        # These two are counted for all processes of a user together, in the jail or not.
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if _tasks_are_counted_apart():
        limits[resource.RLIMIT_NPROC] = _TASKS
    try:
        for which, value in limits.items():
            resource.prlimit(pid, which, (value, value))
        soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if soft != resource.RLIM_INFINITY:  # as long as the shell allows; a second before that a signal tells of it
            resource.prlimit(pid, resource.RLIMIT_CPU, (hard - 1 if hard > 0 else hard, hard))
        # Before it is let go, though the kernel takes 10 to 20 ms for it: a VMM that ran meanwhile could take memory
        # that no group would ever count (tried: the test of a memory hog fails).
        groups.add(pid)
    except OSError as exc:
        if isinstance(exc, ProcessLookupError):  # it has ended: the caller knows how to ask why
            raise
        needed = [
            f"ulimit -H -{option} to {limits[which] // unit} or more"
            for which, option, unit in _SHELLS
            if which in limits and limits[which] > _most(which)
        ]
        fix = f"Raise the hard limits of this shell: {', '.join(needed) or 'ulimit -H -a shows them'}"
        raise NotStartedError("cannot bound the virtual machine", f"{exc.strerror or exc}", fix) from exc


def _most(which: int) -> float:
    """The hard limit of this process; infinite for none."""
    hard = resource.getrlimit(which)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def _tasks_are_counted_apart() -> bool:
    """Whether RLIMIT_NPROC counts only the jail's tasks.

    It does in a user namespace of its own (Linux 5.14), and for a uid of its own if bubblewrap runs as real root.
    """
    mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    return os.geteuid() != 0 or mapped == ["0", "0", "4294967295"]


def _kvm(stack: contextlib.ExitStack) -> int:
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def image_of(kind: MachineKind) -> OpenImage:
    """The image of a kind of virtual machine: each has one."""
    if kind.image is None:
        raise HostError("cannot start a virtual machine", "it needs a guest image", "Run x07 image build")
    return kind.image


def _fd_files(image: OpenImage, memory: Saving | Saved | None) -> tuple[tuple[int, str], ...]:
    """What the machine reads. A clone has kernel and initramfs in its memory."""
    root = image.fds["root"], ROOT
    if isinstance(memory, Saved):
        return ((memory.ram_fd, RAM), (memory.state_fd, STATE), root)
    return ((image.fds["kernel"], KERNEL), (image.fds["initrd"], INITRD), root)


def _writable(memory: Saving | Saved | None, uid: int | None) -> tuple[tuple[int, str], ...]:
    if not isinstance(memory, Saving):
        return ()
    if uid is not None:
        for fd in (memory.ram_fd, memory.state_fd):
            os.fchown(fd, uid, uid)
    return ((memory.ram_fd, RAM), (memory.state_fd, STATE))


def _scratch_disk(given: Given, image: OpenImage, record: JobRecord, memory: Saving | Saved | None) -> int:
    """Make the job's disk, a file without a name; a clone's holds what it held when the machine was saved."""
    if isinstance(memory, Saving):
        write_disk(image.fds["scratch"], image.manifest.scratch_disk, memory.scratch_fd)
        return memory.scratch_fd
    try:
        fd = os.open(record.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        fix = fix_of(exc, "Set X07_VM_STATE_DIR to a folder on ext4, xfs or btrfs")
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
