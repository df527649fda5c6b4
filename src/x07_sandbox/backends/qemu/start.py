"""Starting QEMU in its jail. It is started blocked, recorded and released, and at the end killed and proven gone."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple, Protocol

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
    limits_of,
)
from x07_sandbox.backends.qemu.machine import OVERCOMMIT, Machine, Origin, Paths, qemu_argv
from x07_sandbox.errors import HostError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import Arch, host_arch, is_foreign
from x07_sandbox.host.linux import fd_path, memory_file, processor, require_own_proc
from x07_sandbox.host.paths import out_of_cpu_time, unnamed_file
from x07_sandbox.host.processes import FdGroup, Identity, Launch
from x07_sandbox.images.verify import OpenImage, write_disk
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV, Criu, Jail, may_nest
from x07_sandbox.jail.forms import Form, jail_form, namespace_flags, needed_files
from x07_sandbox.jail.resources import lease_uid, make_groups
from x07_sandbox.records.runs import Claim, JobRecord, create_record, drop_unstarted, new_run_id

MISCALIBRATED: Final = "its kernel calibrated its timer wrong, as happens on an overloaded host"
# Generations below the supervisor, by whether there are namespaces: then bubblewrap's outer process is in between.
_DEPTH: Final = {True: 2, False: 1}
SOCKETS: Final = ("channel", "net", "qmp", "console", "stderr")


class CriuJob(NamedTuple):
    """The process that criu dumps or restores. limits: of QEMU. given: gets descriptors of the child."""

    machine: Machine
    uid: int | None
    given: FdGroup
    limits: Limits


class CriuWork(Protocol):
    """What criu does with a VM's process when it starts (qemu/hot)."""

    def criu(self, process: CriuJob) -> Criu:
        """Return the part of criu in the jail. Raises HostError."""

    def release_message(self, machine: Machine) -> bytes:
        """Return the message that releases the jail."""

    def sockets(self, ours: dict[str, int], stack: contextlib.ExitStack) -> dict[str, int]:
        """Return our ends of QEMU's sockets; *stack* closes new ones. Raises ProcessLookupError if the jail ended."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a VM comes from: by default it boots in anonymous memory. The caller keeps owning all descriptors.

    files: to read, by their name in `Paths`; None for those to boot from. ram_fd: that of which the RAM is a private
    mapping. written: files for QEMU to write. disk_fd: for the job's disk; None for a new unnamed file. fill: writes
    the content of that disk. criu: None if criu takes no part.
    """

    origin: Origin = Origin.COLD
    files: dict[str, int] | None = None
    ram_fd: int | None = None
    written: dict[str, int] = {}
    disk_fd: int | None = None
    fill: Callable[[OpenImage, int], None] = lambda image, fd: write_disk(
        image.fds["scratch"], image.manifest.scratch_disk, fd
    )
    criu: CriuWork | None = None


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
    job: QemuJob, *, kvm: bool, arch: Arch | None = None, source: Source | None = None
) -> Iterator[QemuInstance]:
    """Start a QEMU process, blocked until it is released. When the context ends, it is gone and recorded as gone.

    kvm: whether KVM runs the guest's processor, instead of emulation. source: where the VM comes from; None: boot it.
    arch: the machine type and its needs, by default those of the image.
    Raises BackendError (including NotStartedError), HostError.
    """
    arch, record, image, source = arch or job.kind.arch, job.record, job.kind.image, source or Source()
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
        for fd in streams if source.origin is Origin.HOT else ():  # a started QEMU does so itself
            os.set_blocking(fd, False)
        files = _placed(_read_files(job.kind, image, source), given, form)
        if uid is not None:
            for fd in source.written.values():
                os.fchown(fd, uid, uid)
        written = _placed(source.written, given, form, os.O_RDWR)
        if (scratch_fd := source.disk_fd) is None:
            # Closed once the child has it, so that the space is free when the child is gone.
            scratch_fd = given.add(unnamed_file(record.folder, "cannot make the scratch disk"))
        source.fill(image, scratch_fd)
        disk = stack.enter_context(contextlib.ExitStack())
        ours |= _snapshot_files(scratch_fd, source, disk)
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
            origin=source.origin,
            reserve=not form.namespaces,
            any_timer=job.any_timer,
            program=job.kind.has_program_root,
            paths=msgspec.structs.replace(Paths(), **{name: path for name, (_, path) in (files | written).items()}),
        )
        filter_fd, pipe_w = os.pipe()
        release_pipe = ReleasePipe(pipe_w, _release_message(source, form, machine))
        stack.callback(release_pipe.close)
        given.add(filter_fd)
        limits = limits_of(machine.ram_bytes, namespaces=form.namespaces)
        criu = None if source.criu is None else source.criu.criu(CriuJob(machine, uid, given, limits))
        if criu is not None:
            limits = limits | {resource.RLIMIT_NOFILE: (criu.files_max, criu.files_max)}
        as_user = form.namespaces and source.origin is not Origin.HOT and (uid is not None or criu is not None)
        needed = dict.fromkeys(
            [*needed_files(arch.qemu_binary), *arch.firmware, *(needed_files(SETPRIV) if as_user else ())]
        )
        jail = Jail(
            files=tuple(needed) if criu is None else criu.not_covered(tuple(needed)),
            fd_files=tuple(files.values()),
            # "always" in proc(5), for QEMU only, so that it leaves memory unreserved. The jail has no /proc, and the
            # kernel uses the host's setting.
            fd_copies=((given.add(memory_file(b"1\n")), OVERCOMMIT),) if form.namespaces and criu is None else (),
            fd_writable=tuple(written.values()),
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
            start_mode=_MODES.get(source.origin, "cold"),
        )

        def make(child: subprocess.Popen[bytes], inner: Identity) -> QemuInstance:
            sockets = ours if source.criu is None else source.criu.sockets(ours, stack)
            return QemuInstance(start, HostSide(groups, release_pipe, sockets, machine.paths, disk), child, inner)

        yield stack.enter_context(running(start, request, make, partial(_no_jail, ours["stderr"], form)))


def _release_message(source: Source, form: Form, machine: Machine) -> Callable[[int], bytes]:
    """Return a function that turns the pid of the jail's first process into the message that releases the jail."""
    if (work := source.criu) is not None:
        return lambda _pid: work.release_message(machine)
    return form.release_message(host_arch())


@contextlib.contextmanager
def own_vm(
    kind: MachineKind, phase: str, limit_s: float, *, kvm: bool, any_timer: bool, source: Source | None = None
) -> Iterator[QemuInstance]:
    """Boot a VM for a purpose of x07, named *phase*, which takes at most *limit_s*. Raises as `start_qemu`."""
    claim = Claim(run_id=new_run_id(), phase=phase, wall_ms=int(limit_s * 1000))
    record = create_record(claim, backend="qemu", image_digest=kind.image_digest)
    job = QemuJob(record=record, kind=kind, deadline_s=2 * int(limit_s) + 5, any_timer=any_timer)
    with start_qemu(job, kvm=kvm, source=source) as instance:
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


def _read_files(kind: MachineKind, image: OpenImage, source: Source) -> dict[str, int]:
    """Return the files that the VM reads. A clone has kernel and initramfs in its memory.

    The files appear on a read-only mount. Through a plain descriptor, a QEMU that runs as the owner of an image could
    change the image's mode and times, and so damage it for later runs.
    """
    names = ("root", *(["program"] if kind.has_program_root else []), *(("kernel", "initrd") * (source.files is None)))
    return (source.files or {}) | {name: image.fds[name] for name in names}


def _placed(fds: dict[str, int], given: FdGroup, form: Form, flags: int = os.O_RDONLY) -> _Files:
    """Return each file's descriptor and path: a path below the jail's root, or a reopened file with its own offset."""
    if form.namespaces:
        return {name: (fd, getattr(Paths(), name)) for name, fd in fds.items()}
    found = {}
    for name, fd in fds.items():
        own = given.add(os.open(fd_path(fd), flags | os.O_CLOEXEC))
        found[name] = own, fd_path(own)
    return found


def _snapshot_files(scratch_fd: int, source: Source, disk: contextlib.ExitStack) -> dict[str, int]:
    """Return the files that a snapshot of the VM would need. disk: closes that of the scratch disk."""
    own = os.dup(scratch_fd)
    disk.callback(os.close, own)
    return {"scratch": own} | ({} if source.ram_fd is None else {"ram": source.ram_fd})


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
