"""Starting QEMU in its jail. It is started blocked, recorded and released, and at the end killed and proven gone."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, Final, NamedTuple

import msgspec

from x07_sandbox.backends.base import HandshakeFailure, MachineKind, StartMode
from x07_sandbox.backends.jailed import BoundedStream, Start, running, socket_ends
from x07_sandbox.backends.prerequisites import KVM, Need, require
from x07_sandbox.backends.qemu.instance import (
    TASKS,
    VMM_BYTES,
    HostSide,
    Limits,
    NotStartedError,
    QemuInstance,
    ReleasePipe,
    bound,
    hard_limit,
    limits_of,
)
from x07_sandbox.backends.qemu.machine import OVERCOMMIT, Machine, Origin, Paths, qemu_argv
from x07_sandbox.errors import HostError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch, is_foreign
from x07_sandbox.host.linux import fd_path, memory_file, processor, require_own_proc
from x07_sandbox.host.paths import out_of_cpu_time, raised_as, unnamed_file
from x07_sandbox.host.processes import FdGroup, Identity, Launch
from x07_sandbox.images.store import ScratchDisk
from x07_sandbox.images.verify import OpenImage, copy_sparse, write_disk
from x07_sandbox.jail.bwrap import BWRAP, CRIU, DUMPED_PID, PERL, SETPRIV, Criu, Jail, may_nest
from x07_sandbox.jail.forms import Form, jail_form, namespace_flags, needed_files
from x07_sandbox.jail.resources import lease_uid, make_groups
from x07_sandbox.records.runs import Claim, JobRecord, create_record, drop_unstarted, new_run_id

MISCALIBRATED: Final = "its kernel calibrated its timer wrong, as happens on an overloaded host"
# Generations below the supervisor, by whether there are namespaces: then bubblewrap's outer process is in between.
_DEPTH: Final = {True: 2, False: 1}
SOCKETS: Final = ("channel", "net", "qmp", "console", "stderr")
_SOCKETS_S: Final = 10.0
_CRIU_FILES: Final = 1024  # open files; criu keeps some of its own under high numbers


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """Empty writable files, which the caller keeps owning, for saving a VM. ram_fd: has the size of the VM's RAM."""

    origin: ClassVar = Origin.SAVING
    ram_fd: int
    state_fd: int
    scratch_fd: int


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The readable files of a saved VM, which the caller keeps owning, and the content of its scratch disk."""

    origin: ClassVar = Origin.CLONE
    ram_fd: int
    state_fd: int | None
    scratch_fd: int
    scratch_disk: ScratchDisk


class Warming(Saved, frozen=True, kw_only=True):
    """A saved VM to clone, whose process will be dumped.

    disk_fd: an empty file, for the scratch disk. images_fd: an empty folder for the dump. control, jail_fd: the ends of
    a socket, ours and that of the jail's first process (jail/data/criu.pl).
    """

    origin: ClassVar = Origin.WARMING
    disk_fd: int
    images_fd: int
    control: socket.socket
    jail_fd: int


class Hot(Saved, frozen=True, kw_only=True):
    """A dumped process to restore. Its *ram_fd* also has other memory of the process, and there is no *state_fd*.

    images_fd: the folder of the dump. names: criu's names for the scratch disk and the sockets, as in SOCKETS.
    """

    origin: ClassVar = Origin.HOT
    images_fd: int
    names: tuple[str, ...]


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """The readable files of a snapshot of a running VM, which the caller keeps owning. scratch_fd: the whole disk."""

    origin: ClassVar = Origin.FORK
    ram_fd: int
    state_fd: int
    scratch_fd: int


Memory = Saving | Saved | Fork
_MODES: Final[dict[Origin, StartMode]] = {
    Origin.CLONE: "clone",
    Origin.WARMING: "clone",
    Origin.HOT: "hot",
    Origin.FORK: "fork",
}


class QemuJob(NamedTuple):
    """One VM to start.

    deadline_s: when the supervisor ends the VM. any_timer: whether the guest accepts a wrongly calibrated timer.
    ram_bytes: RAM that the VM may use, or None for all. The control group's limit is that plus QEMU's own memory.
    """

    record: JobRecord
    kind: MachineKind
    deadline_s: int
    any_timer: bool = False
    ram_bytes: int | None = None


@contextlib.contextmanager
def start_qemu(
    job: QemuJob, *, kvm: bool, arch: Arch | None = None, memory: Memory | None = None
) -> Iterator[QemuInstance]:
    """Start a QEMU process, blocked until it is released. When the context ends, it is gone and recorded as gone.

    kvm: whether KVM runs the guest's processor, instead of emulation. memory: where the VM comes from. None: boot in
    anonymous memory. arch: the machine type and its needs, by default those of the image.
    Raises BackendError (including NotStartedError), HostError.
    """
    arch, record, image = arch or job.kind.arch, job.record, job.kind.image
    assert image is not None  # each virtual machine has one
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        require_own_proc()
        check_needs(arch)
        form = jail_form()
        most = (job.ram_bytes or job.kind.ram_bytes) + VMM_BYTES
        groups = make_groups(record.job_id, memory_bytes=most, tasks=TASKS)  # early: the move is then quick
        stack.callback(groups.remove)
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        given = FdGroup()  # the child's descriptors, closed here once it has them
        stack.callback(given.close)
        ends = {name: socket_ends(stack, given) for name in SOCKETS}
        ours, theirs = {name: pair[0] for name, pair in ends.items()}, {name: pair[1] for name, pair in ends.items()}
        streams = [theirs[name] for name in SOCKETS[:-1]]
        for fd in streams if isinstance(memory, Hot) else ():  # a started QEMU does so itself
            os.set_blocking(fd, False)
        files, writable = _fd_files(job.kind, image, memory, given, form), _writable(memory, uid, given, form)
        scratch_fd = _scratch_disk(given, image, record, memory)
        disk = stack.enter_context(contextlib.ExitStack())
        ours |= _kept_files(scratch_fd, memory, disk)
        machine = Machine(
            arch=arch,
            ram_bytes=job.kind.ram_bytes,
            kvm_fd=given.add(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) if kvm else None,
            tsc_khz=None if kvm else tsc_khz(arch),
            scratch_fd=scratch_fd,
            channel_fd=theirs["channel"],
            net_fd=theirs["net"],
            qmp_fd=theirs["qmp"],
            console_fd=theirs["console"],
            mark=record.mark,
            origin=Origin.COLD if memory is None else memory.origin,
            reserve=not form.namespaces,
            any_timer=job.any_timer,
            program=job.kind.has_program_root,
            paths=msgspec.structs.replace(Paths(), **{name: path for name, (_, path) in (files | writable).items()}),
        )
        limits = limits_of(machine.ram_bytes, namespaces=form.namespaces)
        filter_fd, pipe_w = os.pipe()
        release_pipe = ReleasePipe(pipe_w, _release_message(memory, form, machine))
        stack.callback(release_pipe.close)
        given.add(filter_fd)
        as_user = form.namespaces and not isinstance(memory, Hot) and (uid is not None or isinstance(memory, Warming))
        setpriv_files = needed_files(SETPRIV) if as_user else ()
        needed = tuple(dict.fromkeys([*needed_files(arch.qemu_binary), *arch.firmware, *setpriv_files]))
        criu = None
        if isinstance(memory, Warming | Hot):
            files_max = int(min(_CRIU_FILES, hard_limit(resource.RLIMIT_NOFILE)))
            criu = _criu(memory, machine, uid, given, limits, files_max)
            limits = limits | {resource.RLIMIT_NOFILE: (files_max, files_max)}
        jail = Jail(
            files=needed if criu is None else criu.not_covered(needed),
            fd_files=tuple(files.values()),
            # "always" in proc(5), for QEMU only, so that it leaves memory unreserved. The jail has no /proc, and the
            # kernel uses the host's setting.
            fd_copies=((given.add(memory_file(b"1\n")), OVERCOMMIT),) if form.namespaces and criu is None else (),
            fd_writable=tuple(writable.values()),
            devices=("/dev/urandom",),
            limits=limits,
            fds=(*([] if machine.kvm_fd is None else [machine.kvm_fd]), machine.scratch_fd, *streams),
            uid=uid,
            mark=record.mark,
            deadline_s=job.deadline_s,
            runner_pid=os.getpid(),
            nest=may_nest(),
            filter_fd=filter_fd,
            lock_fd=lock_fd,
            criu=criu,
        )
        passed = [*jail.fds, filter_fd, *(fd for fd, _ in (*jail.fd_files, *jail.fd_writable, *jail.fd_copies))]
        passed += [*([] if lock_fd is None else [lock_fd]), *([] if criu is None else criu.fds())]
        command = qemu_argv(machine)
        if (ruleset_fd := form.open_ruleset(jail, command[0])) is not None:
            passed.append(given.add(ruleset_fd))
        argv = form.argv(jail, command, ruleset_fd)
        request = Launch(argv=argv, pass_fds=tuple(passed), stderr_fd=theirs["stderr"])
        start = Start(
            record=record,
            jail=f"{form.name}, {'root' if os.geteuid() == 0 else 'user'}; {groups.describe()}",
            given=given,
            depth=_DEPTH[form.namespaces],
            remove=groups.remove,
            cgroups=groups.names(),
            # Without namespaces the jail sets its own limits: not every root may limit a process of another uid.
            bound=partial(bound, limits if form.namespaces else {}, groups),
            name="the virtual machine",
            error=NotStartedError,
            start_mode=_MODES.get(machine.origin, "cold"),
        )

        def make(child: subprocess.Popen[bytes], inner: Identity) -> QemuInstance:
            sockets = ours
            if isinstance(memory, Warming):
                sockets = {**_made_in_jail(memory.control, stack), "jail": ours["stderr"]}
            return QemuInstance(start, HostSide(groups, release_pipe, sockets, machine.paths, disk), child, inner)

        yield stack.enter_context(running(start, request, make, partial(_no_jail, ours["stderr"], form)))


def _criu(
    memory: Warming | Hot, machine: Machine, uid: int | None, given: FdGroup, limits: Limits, files_max: int
) -> Criu:
    """Return what criu does in the jail. limits: of QEMU. files_max: how many open files criu may have."""
    numbers = (machine.scratch_fd, machine.channel_fd, machine.net_fd, machine.qmp_fd, machine.console_fd)
    if (highest := max(numbers)) >= files_max // 2:  # criu's own must have higher ones
        why = f"this process has so many open files that a new one has the number {highest}"
        raise HostError("criu cannot be used", why, "Close files, or use another process")
    files = (*needed_files(CRIU), *needed_files(PERL))
    userns_fd = None if uid is None else given.add(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    sockets = (machine.channel_fd, machine.net_fd, machine.qmp_fd, machine.console_fd)
    if isinstance(memory, Hot):
        restores = tuple(zip((machine.scratch_fd, *sockets, 2), memory.names, strict=True))
        return Criu(files=files, images_fd=memory.images_fd, userns_fd=userns_fd, restores=restores)
    return Criu(
        files=files,
        images_fd=memory.images_fd,
        userns_fd=userns_fd,
        control_fd=memory.jail_fd,
        socket_fds=sockets,
        scratch_fd=machine.scratch_fd,
        open_files=limits[resource.RLIMIT_NOFILE][0],
    )


def _made_in_jail(control: socket.socket, stack: contextlib.ExitStack) -> dict[str, int]:
    """Return our ends of the sockets that the jail's first process made. Raises ProcessLookupError if it ended."""
    control.settimeout(_SOCKETS_S)
    try:
        _, fds, _, _ = socket.recv_fds(control, 1, len(SOCKETS))
    except TimeoutError:
        fds = []
    for fd in fds:
        stack.callback(os.close, fd)
        os.set_blocking(fd, False)
    if len(fds) != len(SOCKETS):
        raise ProcessLookupError
    return dict(zip(SOCKETS, fds, strict=True))


def _release_message(memory: Memory | None, form: Form, machine: Machine) -> Callable[[int], bytes]:
    """Return a function that turns the pid of the jail's first process into the message that releases the jail."""
    if isinstance(memory, Warming):
        return lambda _pid: b"."
    if isinstance(memory, Hot):
        from x07_sandbox.jail.seccomp import restored_filter

        mark = machine.mark.encode("ascii")
        return lambda _pid: struct.pack("=I", len(mark)) + mark + restored_filter(host_arch(), DUMPED_PID)
    return form.release_message(host_arch())


@contextlib.contextmanager
def own_vm(
    kind: MachineKind, phase: str, limit_s: float, *, kvm: bool, any_timer: bool, memory: Memory | None = None
) -> Iterator[QemuInstance]:
    """Boot a VM for a purpose of x07, named *phase*, which takes at most *limit_s*. Raises as `start_qemu`."""
    claim = Claim(run_id=new_run_id(), phase=phase, wall_ms=int(limit_s * 1000))
    record = create_record(claim, backend="qemu", image_digest=kind.image_digest)
    job = QemuJob(record=record, kind=kind, deadline_s=2 * int(limit_s) + 5, any_timer=any_timer)
    with start_qemu(job, kvm=kvm, memory=memory) as instance:
        instance.release()
        yield instance


def require_cpu_time(instance: QemuInstance, what: str) -> None:
    """Raise HostError, with *what*, if the shell's limit on CPU time ended QEMU. A new VM would end the same way."""
    if spent := out_of_cpu_time(instance.exit_status()):
        raise HostError(what, f"QEMU {spent}", "Raise that limit")


def _no_jail(stderr_fd: int, form: Form, status: int | None) -> NotStartedError:
    """Return the error for a jail that could not be built. It contains what the jail wrote to standard error."""
    stream = BoundedStream(stderr_fd, keep_bytes=4096)
    stream.read()
    said = stream.text().strip() or f"it exited with status {status}"
    if "find source path" in said:
        fix = "A file that it needs was just replaced or removed: try again"
    elif form.namespaces:
        fix = f"Allow user and mount namespaces here: {namespace_flags()}"
    else:
        fix = f"Run x07 doctor, or allow namespaces here: {namespace_flags()}"
    return NotStartedError("cannot build the jail around the virtual machine", said[:500], fix)


def boot_attempts() -> Iterator[bool]:
    """Yield, for each allowed boot attempt, whether it is the last one."""
    return (number == settings.BOOTS_MAX for number in range(1, settings.BOOTS_MAX + 1))


def miscalibrated(failure: HandshakeFailure) -> bool:
    """Return whether an emulated VM gave up booting because of its timer (guest/boot/init.c)."""
    return "x07 init: the timer was measured wrong" in failure.console_tail


# By the name in `Paths`: the descriptor, and the path under which QEMU opens it.
_Files = dict[str, tuple[int, str]]


def _fd_files(kind: MachineKind, image: OpenImage, memory: Memory | None, given: FdGroup, form: Form) -> _Files:
    """Return the files that the VM reads. A clone has kernel and initramfs in its memory.

    The files appear on a read-only mount. Through a plain descriptor, a QEMU that runs as the owner of an image could
    change the image's mode and times, and so damage it for later runs.
    """
    found = {"kernel": image.fds["kernel"], "initrd": image.fds["initrd"]}
    if isinstance(memory, Saved | Fork):
        found = {"ram": memory.ram_fd} | ({} if memory.state_fd is None else {"state": memory.state_fd})
    found |= {name: image.fds[name] for name in ("root", *(["program"] if kind.has_program_root else []))}
    return _placed(found, given, form)


def _writable(memory: Memory | None, uid: int | None, given: FdGroup, form: Form) -> _Files:
    if not isinstance(memory, Saving):
        return {}
    if uid is not None:
        for fd in (memory.ram_fd, memory.state_fd):
            os.fchown(fd, uid, uid)
    return _placed({"ram": memory.ram_fd, "state": memory.state_fd}, given, form, os.O_RDWR)


def _placed(fds: dict[str, int], given: FdGroup, form: Form, flags: int = os.O_RDONLY) -> _Files:
    """Return each file's descriptor and path: a path below the jail's root, or a reopened file with its own offset."""
    if form.namespaces:
        return {name: (fd, getattr(Paths(), name)) for name, fd in fds.items()}
    found = {}
    for name, fd in fds.items():
        own = given.add(os.open(fd_path(fd), flags | os.O_CLOEXEC))
        found[name] = own, fd_path(own)
    return found


def _scratch_disk(given: FdGroup, image: OpenImage, record: JobRecord, memory: Memory | None) -> int:
    """Make the job's disk, an unnamed file. The disk of a clone has the content saved with its VM."""
    if isinstance(memory, Saving):
        fd = memory.scratch_fd
    elif isinstance(memory, Warming):
        fd = memory.disk_fd
    else:  # closed once the child has it, so that the space is free when the child is gone
        fd = given.add(unnamed_file(record.folder, "cannot make the scratch disk"))
    if isinstance(memory, Fork):
        with raised_as(HostError, "cannot copy the disk of the snapshot", "Free disk space, or set X07_VM_STATE_DIR"):
            copy_sparse(memory.scratch_fd, fd)
        return fd
    source = (image.fds["scratch"], image.manifest.scratch_disk)
    write_disk(*((memory.scratch_fd, memory.scratch_disk) if isinstance(memory, Saved) else source), fd)
    return fd


def _kept_files(scratch_fd: int, memory: Memory | None, disk: contextlib.ExitStack) -> dict[str, int]:
    """Return the files that a snapshot of the VM would need. disk: closes that of the scratch disk."""
    own = os.dup(scratch_fd)
    disk.callback(os.close, own)
    return {"scratch": own} | ({"ram": memory.ram_fd} if isinstance(memory, Saved | Fork) else {})


def needs_of(arch: Arch) -> tuple[Need, ...]:
    """Return what a start of a virtual machine needs."""
    programs = {BWRAP: "bubblewrap", SETPRIV: "util-linux", PERL: "perl-base", arch.qemu_binary: arch.qemu_package}
    packages = " ".join(arch.firmware_packages)  # dependencies of QEMU's package
    return (
        *(Need("program", path, package) for path, package in programs.items()),
        *(Need("firmware", path, packages) for path in arch.firmware),
        KVM,
    )


def check_needs(arch: Arch) -> None:
    """Raise HostError if programs or firmware are missing."""
    require(needs_of(arch), "cannot start a virtual machine")


def tsc_khz(arch: Arch) -> int | None:
    """Return the frequency in kHz of the host's time stamp counter, which an emulated guest cannot measure reliably."""
    if arch.machine != "microvm":
        return None
    if is_foreign(arch):
        why = f"the clock of an emulated {arch.name} guest is known only on {arch.name} hosts"
        raise HostError("cannot start a virtual machine", why, f"Use an image for {host_arch().deb}")
    if lines := processor("bogomips"):
        return int(float(lines[0].partition(":")[2]) * 500)
    why = "/proc/cpuinfo has no bogomips line"
    raise HostError("cannot find the processor's clock rate", why, "Run x07 on a host with hardware virtualisation")
