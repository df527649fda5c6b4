"""Saved processes: a clone of a saved VM that has run warm-up programs, dumped with its QEMU by criu(8).

Under emulation most of a clone's time goes into translating the guest's code, and a saved VM contains no translations.
A saved QEMU process does. Each process restored from it shares the layout of QEMU's address space and the values that
QEMU drew at its start, so it is made anew after each reboot of the host, and every few hours (`current_period`).
"""

import contextlib
import hashlib
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec.structs

from x07_sandbox.backends.base import Instance, MachineKind, NoAnswerError, evidence_of, greet, wait_for_exit
from x07_sandbox.backends.qemu import start as starts
from x07_sandbox.backends.qemu.instance import QemuInstance, hard_limit
from x07_sandbox.backends.qemu.machine import QMP_PAUSE, Machine, Origin, Paths
from x07_sandbox.backends.qemu.saved import (
    SCHEMA,
    Manifest,
    SavedProcess,
    Template,
    TransientError,
    current_period,
    lack_of_space,
    new_file,
    opened,
    seal,
    sparse_sha256,
    templates_dir,
)
from x07_sandbox.backends.qemu.start import CriuJob, Source
from x07_sandbox.backends.qemu.template import await_qmp, filled_from, keep_disk, limit_s
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import of_process
from x07_sandbox.host.paths import closing_fd, unnamed_file
from x07_sandbox.host.variables import flag
from x07_sandbox.host.verdicts import file_state
from x07_sandbox.images.store import Part
from x07_sandbox.images.verify import (
    FOLDER_MODE,
    OpenImage,
    Subject,
    copy_sparse,
    opened_folder,
    opened_parts,
)
from x07_sandbox.jail.bwrap import CRIU, CRIU_NULL, DUMPED_PID, PERL, Criu, may_nest
from x07_sandbox.jail.forms import jail_form, needed_files
from x07_sandbox.policy.decode import canonical_json

IMAGES: Final = "images"
VARIABLE: Final = "X07_VM_NO_HOT_CLONES"
_WHAT: Final = "cannot save a running VM"
_FIX: Final = "Jobs clone a saved VM instead. See x07 doctor"
_DUMP_S: Final = 30.0
_SOCKETS_S: Final = 10.0
_CRIU_FILES: Final = 1024  # open files; criu keeps some of its own under high numbers
_CRIU_KILLED: Final = 75  # the exit status of data/criu.pl
_FILES_MIN: Final = 512
# Limits that the jail does not set (`instance.limits_of`).
_INHERITED: Final = (resource.RLIMIT_STACK, resource.RLIMIT_RSS, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)
_NAMES_MAX: Final = 4096
_NO_FILTER: Final = b"\nSeccomp:\t0\n"  # proc(5)
_FILTER: Final = "a system call filter, such as a container's (podman and docker: --security-opt seccomp=unconfined)"
_MASKED: Final = "parts of /proc are hidden here, as in a container (podman: --security-opt unmask=ALL)"


def unsupported(*, kvm: bool) -> str:
    """Return why processes of VMs cannot be saved and restored here, or "" if they can. Raises HostError."""
    obstacles = (
        (kvm, "this host has hardware virtualisation, so a clone needs no translations"),
        (flag(VARIABLE), f"{VARIABLE} is set"),
        (host_arch().name != "x86_64", "they work only on x86_64"),
        (not os.access(CRIU, os.X_OK), "criu is not installed (Debian: apt-get install criu)"),
        (not jail_form().namespaces, "they need a jail with namespaces"),
        # It applies to QEMU too, and criu can neither save nor suspend it (PTRACE_O_SUSPEND_SECCOMP in ptrace(2)).
        (_NO_FILTER not in (of_process(os.getpid(), "status") or b""), f"criu saves no process with {_FILTER}"),
        (not may_nest(), f"criu needs a /proc of its own, and {_MASKED}"),
        # criu would have to raise the limit to that of the dumped process, and needs many descriptors.
        (resource.getrlimit(resource.RLIMIT_CPU)[0] >= 0, "this shell limits CPU time (ulimit -t)"),
        (hard_limit(resource.RLIMIT_NOFILE) < _FILES_MIN, "this shell limits open files (ulimit -n)"),
    )
    return next((why for found, why in obstacles if found), "")


class Dump(NamedTuple):
    """The dump of a clone's process. images_fd: an empty folder for it.

    control, jail_fd: the ends of a socket, ours and that of the jail's first process (jail/data/criu.pl).
    """

    images_fd: int
    control: socket.socket
    jail_fd: int

    def criu(self, process: CriuJob) -> Criu:
        """See `CriuWork`."""
        return _criu(
            process,
            images_fd=self.images_fd,
            control_fd=self.jail_fd,
            socket_fds=_sockets(process.machine),
            scratch_fd=process.machine.scratch_fd,
            open_files=process.limits[resource.RLIMIT_NOFILE][0],
        )

    def release_message(self, _machine: Machine) -> bytes:
        """See `CriuWork`. QEMU gets no filter, which criu could not dump."""
        return b"."

    def sockets(self, ours: dict[str, int], stack: contextlib.ExitStack) -> dict[str, int]:
        """See `CriuWork`. The jail's first process makes them, and sends our ends."""
        self.control.settimeout(_SOCKETS_S)
        try:
            _, fds, _, _ = socket.recv_fds(self.control, 1, len(starts.SOCKETS))
        except TimeoutError:
            fds = []
        for fd in fds:
            stack.callback(os.close, fd)
            os.set_blocking(fd, False)
        if len(fds) != len(starts.SOCKETS):
            raise ProcessLookupError
        return {**dict(zip(starts.SOCKETS, fds, strict=True)), "jail": ours["stderr"]}


class Restore(NamedTuple):
    """A dump to restore. images_fd: its folder. names: of the scratch disk and of SOCKETS in the dump."""

    images_fd: int
    names: tuple[str, ...]

    def criu(self, process: CriuJob) -> Criu:
        """See `CriuWork`."""
        fds = (process.machine.scratch_fd, *_sockets(process.machine), 2)
        return _criu(process, images_fd=self.images_fd, restores=tuple(zip(fds, self.names, strict=True)))

    def release_message(self, machine: Machine) -> bytes:
        """See `CriuWork`."""
        from x07_sandbox.jail.seccomp import restored_filter

        mark = machine.mark.encode("ascii")
        return struct.pack("=I", len(mark)) + mark + restored_filter(host_arch(), DUMPED_PID)

    def sockets(self, ours: dict[str, int], _stack: contextlib.ExitStack) -> dict[str, int]:
        """See `CriuWork`."""
        return ours


def _sockets(machine: Machine) -> tuple[int, ...]:
    return machine.channel_fd, machine.net_fd, machine.qmp_fd, machine.console_fd


def _criu(process: CriuJob, **what: Any) -> Criu:  # noqa: ANN401 - fields of `Criu`
    """Return what criu does in the jail. Raises HostError."""
    files_max = int(min(_CRIU_FILES, hard_limit(resource.RLIMIT_NOFILE)))
    highest = max(process.machine.scratch_fd, *_sockets(process.machine))
    if highest >= files_max // 2:  # criu's own must have higher ones
        why = f"this process has so many open files that a new one has the number {highest}"
        raise HostError("criu cannot be used", why, "Close files, or use another process")
    return Criu(
        files=(*needed_files(CRIU), *needed_files(PERL)),
        files_max=files_max,
        userns_fd=None if process.uid is None else process.given.add(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)),
        **what,
    )


class ProcessTemplate(Template, frozen=True, kw_only=True):
    """The place of a saved process."""

    noun = "process"
    instead = "clone a saved VM"
    done = "was cloned"
    waits_for_host = True
    next_attempt = "clone"

    def failed(self, error: NoAnswerError) -> str:
        """Suspend it, unless somebody has killed the restored process. Return why that did not answer."""
        why, transient = f"the restored one did not answer ({error.why})", error.failure.transient
        return why if evidence_of(error.failure).killed else self.suspend(why, transient=transient, keep=transient)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Source | None]:
        """Open the verified files, or yield None if there are none. Raises ImageError, HostError."""
        with contextlib.ExitStack() as stack:
            if (found := opened(self, stack)) is None:
                yield None
                return
            folder_fd, made = found
            assert isinstance(made, SavedProcess)  # by its key
            ram_fd, scratch_fd = opened_parts(folder_fd, (made.ram, made.scratch), self.subject, stack)
            subject = Subject(name=self.subject.name, record=f"{self.key}-{IMAGES}", sha256=sparse_sha256)
            images_fd = stack.enter_context(opened_folder(self.folder / IMAGES, subject))
            opened_parts(images_fd, made.images, subject, stack)
            yield restored(ram_fd, filled_from(scratch_fd, made.scratch_disk), Restore(images_fd, made.names))


def restored(ram_fd: int, fill: Callable[[OpenImage, int], None], restore: Restore) -> Source:
    """Return a saved process as the source of a VM. ram_fd: the file, which also has other memory of the process."""
    return Source(origin=Origin.HOT, files={"ram": ram_fd}, ram_fd=ram_fd, fill=fill, criu=restore)


def hot_template(saved: Template) -> ProcessTemplate:
    """Return the place of the process saved from clones of *saved*. Raises OSError."""
    files = [file_state(path) for path in (CRIU, "/etc/ld.so.cache")]  # libraries are found through the latter
    limits = [resource.getrlimit(which) for which in _INHERITED]  # a restored process must be able to have them
    parts = [SCHEMA, saved.key, current_period(), files, os.geteuid(), limits]
    key = hashlib.sha256(canonical_json(parts)).hexdigest()
    return ProcessTemplate(key=key, folder=templates_dir() / key, title=saved.title)


def make_hot(
    template: Template, kind: MachineKind, saved: Source, warm_up: Callable[[Instance], None], work: Path
) -> Manifest:
    """Make the saved process in the folder *work*, and restore it once. Raises SandboxError, OSError.

    warm_up: runs programs in a VM that has answered, and leaves it waiting for SEED.
    """
    from x07_sandbox.backends.qemu.criu_images import move_pages, reset_priority  # most runs find a saved process

    if short := lack_of_space(kind.ram_bytes):
        raise HostError(_WHAT, short, "Free disk space")
    images = work / IMAGES
    images.mkdir()
    images.chmod(FOLDER_MODE)
    with contextlib.ExitStack() as stack:
        images_fd, disk_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), unnamed_file(work, _WHAT)
        stack.callback(os.close, images_fd)
        stack.callback(os.close, disk_fd)
        control, theirs = (stack.enter_context(end) for end in socket.socketpair())
        dump = Dump(images_fd, control, theirs.fileno())
        warming = msgspec.structs.replace(saved, origin=Origin.WARMING, disk_fd=disk_fd, criu=dump)
        names = _dump(kind, warming, dump, theirs, warm_up)
        require_plain_files(images)
        memory_fd = new_file(work / "ram", stack)
        assert saved.ram_fd is not None  # it is a saved VM
        copy_sparse(saved.ram_fd, memory_fd)
        paths = (Paths().ram, Paths().root, Paths().program, "/", "/dev/urandom", CRIU_NULL)
        move_pages(images, DUMPED_PID, memory_fd, Paths().ram, {*paths, *needed_files(kind.arch.qemu_binary)})
        reset_priority(images)
        scratch_fd = new_file(work / "scratch.head", stack)
        disk = keep_disk(disk_fd, scratch_fd)
        ram, scratch = seal("ram", memory_fd), seal("scratch.head", scratch_fd)
        hot = restored(memory_fd, filled_from(scratch_fd, disk), Restore(images_fd, names))
        try:
            with _own(kind, hot) as instance:  # the proof that it works here
                greet(instance)
        except NoAnswerError as exc:
            raise (TransientError if exc.failure.transient else BackendError)(_WHAT, exc.why, _FIX) from exc
        made = SavedProcess(
            ram=ram,
            scratch=scratch,
            scratch_disk=disk,
            images=tuple(_sealed_file(path) for path in sorted(images.iterdir())),
            names=names,
            period=current_period(),
        )
        return Manifest(key=template.key, image=kind.image_digest, made=made)


def require_plain_files(images: Path) -> None:
    """Raise BackendError if anything in a dump may lead elsewhere, although the dumped process could not reach it."""
    for path in images.iterdir():
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise BackendError(_WHAT, f"the dump contains {path.name!a}, which is no plain file", _FIX)


def _own(kind: MachineKind, source: Source) -> contextlib.AbstractContextManager[QemuInstance]:
    return starts.own_vm(kind, "template", limit_s(kind), kvm=False, any_timer=False, source=source)


def _dump(
    kind: MachineKind, warming: Source, dump: Dump, theirs: socket.socket, warm_up: Callable[[Instance], None]
) -> tuple[str, ...]:
    """Warm up a clone and dump its process. Return criu's names. theirs: closed here. Raises SandboxError."""
    with _own(kind, warming) as instance:
        theirs.close()
        try:
            greet(instance)
            warm_up(instance)
        except BackendError as exc:
            raise TransientError(exc.what, exc.why, exc.fix) from exc
        instance.send_qmp(QMP_PAUSE)
        await_qmp(instance, '"STOP"')
        try:
            dump.control.settimeout(_DUMP_S)
            dump.control.sendall(b".")
            names = tuple(dump.control.recv(_NAMES_MAX).decode("ascii").split("\n"))
        except (OSError, ValueError) as exc:
            raise TransientError(_WHAT, f"criu did not answer ({exc})", _FIX) from exc
        if len(names) != 1 + len(starts.SOCKETS):
            killed, short = wait_for_exit(instance) == _CRIU_KILLED, lack_of_space(kind.ram_bytes)
            why = short or f"criu could not dump it: {instance.console_tail()[-300:].strip()}"
            raise (TransientError if killed or short else BackendError)(_WHAT, why, _FIX)
        if not instance.stop():
            raise TransientError(_WHAT, "the VM did not end", _FIX)
    return names


def _sealed_file(path: Path) -> Part:
    with closing_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return seal(path.name, fd)
