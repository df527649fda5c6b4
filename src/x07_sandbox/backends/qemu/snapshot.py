"""Snapshots of running VMs, from which forks start: device state, RAM and scratch disk, saved in one short pause.

QEMU can write the device state without RAM: xen-save-devices-state works on any machine, whatever its name says
(migration/savevm.c). The RAM file gets a copy of the file that the VM was cloned from, and the pages that the VM has
written (`Memory`): once before the pause, so that in the pause few pages need room on the disk, and once in it. A fork
is a clone of these files.
"""

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.instance import Streams
from x07_sandbox.backends.qemu.machine import Origin
from x07_sandbox.backends.qemu.memory import Memory
from x07_sandbox.backends.qemu.saved import new_file
from x07_sandbox.backends.qemu.start import Source
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host.locks import lock_shared
from x07_sandbox.host.paths import raised_as
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.waiting import Deadline, input_poll
from x07_sandbox.images.verify import FILE_MODE, OpenImage, copy_sparse

FILES: Final = ("ram", "state", "disk")
_WHAT: Final = "cannot take a snapshot of the VM"
_ROOM: Final = "Free disk space, or set XDG_CACHE_HOME to a folder on a larger disk"
_MAGIC: Final = b"QEVM"  # a stream begins with it (migration/qemu-file-types.h)
_STATE_BYTES: Final = 4 << 20  # of the device state; measured: 4.4 kB
_ANSWER_S: Final = 5.0
_LOOK_MS: Final = 5


class Capture:
    """A VM whose snapshot is prepared. ram_bytes: of the RAM that it has written, when it was prepared."""

    def __init__(self, instance: Streams, kind: MachineKind, folder: Path, stack: contextlib.ExitStack) -> None:
        if instance.scratch_fd is None:
            raise BackendError(_WHAT, "its disk is not known", "Open another sandbox")
        self._qmp = _Qmp(instance)
        self._instance = instance
        self._scratch_fd = instance.scratch_fd
        self._memory = Memory(instance.inner_pid, kind.ram_bytes, instance.ram_fd, stack)
        with raised_as(BackendError, _WHAT, _ROOM):
            fds = [new_file(folder / name, stack) for name in FILES]
            self._ram_fd, self._state_fd, self._disk_fd = fds
            if instance.ram_fd is None:
                os.ftruncate(self._ram_fd, kind.ram_bytes)
            else:
                copy_sparse(instance.ram_fd, self._ram_fd, kind.ram_bytes)
            mapped = mmap.mmap(self._ram_fd, kind.ram_bytes)
        stack.callback(mapped.close)
        self._view = memoryview(mapped)
        stack.callback(self._view.release)
        self.ram_bytes = self._memory.copy(self._view)

    def take(self) -> None:
        """Pause the VM, save it, and let it run on. Raises BackendError; the VM then runs on, if it still can."""
        stream_fd = self._qmp.new_file()
        try:
            self._qmp.run("stop")
            try:
                self._qmp.run("xen-save-devices-state", filename=f"/dev/fdset/{self._qmp.fdset}", live=False)
                self._memory.copy(self._view)
                with raised_as(BackendError, _WHAT, _ROOM):
                    copy_sparse(self._scratch_fd, self._disk_fd)
            finally:
                self._qmp.run("cont")
            self._qmp.run("remove-fd", **{"fdset-id": self._qmp.fdset})
            if os.pread(stream_fd, len(_MAGIC), 0) != _MAGIC:
                raise BackendError(_WHAT, "QEMU has not saved the state of its devices", "Try again")
            with raised_as(BackendError, _WHAT, _ROOM):
                copy_sparse(stream_fd, self._state_fd)
                for fd in (self._ram_fd, self._state_fd):  # for the uid of a fork's jail; the folder is private
                    os.fchmod(fd, FILE_MODE)
        finally:
            os.close(stream_fd)


@contextlib.contextmanager
def capture(instance: Streams, kind: MachineKind, folder: Path) -> Iterator[Capture]:
    """Prepare a snapshot of a running VM, in a private folder. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        yield Capture(instance, kind, folder, stack)


@contextlib.contextmanager
def opened_fork(folder: Path, kind: MachineKind) -> Iterator[Source]:
    """Open the files of a snapshot. Raises BackendError."""
    with contextlib.ExitStack() as stack:
        with raised_as(BackendError, "cannot use the snapshot", "Take another snapshot"):
            stack.callback(close_on_fork.close, lock_shared(folder))  # until then it is not removed
            os.utime(folder)  # the time of last use
            fds = []
            for name in FILES:
                fds.append(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            if os.fstat(fds[0]).st_size != kind.ram_bytes:
                raise BackendError("cannot use the snapshot", "its RAM has another size", "Take another snapshot")
        ram_fd, state_fd, disk_fd = fds

        def fill(_image: OpenImage, fd: int) -> None:
            fix = "Free disk space, or set X07_VM_STATE_DIR"
            with raised_as(HostError, "cannot copy the disk of the snapshot", fix):
                copy_sparse(disk_fd, fd)

        yield Source(origin=Origin.FORK, files={"ram": ram_fd, "state": state_fd}, ram_fd=ram_fd, fill=fill)


class _Qmp:
    """Commands to QEMU's control protocol, and their answers."""

    def __init__(self, instance: Streams) -> None:
        self._instance = instance
        self._file_fd = -1
        self._count = 0
        self.fdset = int.from_bytes(os.urandom(4)) >> 1  # a set of its own: one that failed may have left its file
        if instance.start_mode == "cold":  # others were given commands before
            with contextlib.suppress(BackendError):  # also this one, by an earlier snapshot
                self.run("qmp_capabilities")

    def new_file(self) -> int:
        """Give QEMU a new file in memory, as a descriptor set. Return our descriptor."""
        self._file_fd = fd = os.memfd_create("x07-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)  # QEMU wants this mode of access
            try:
                self.run("add-fd", (own,), **{"fdset-id": self.fdset})
            finally:
                os.close(own)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _bound_file(self) -> None:
        """Let QEMU write no more to the file if it is too large. Raises BackendError then.

        It cannot be sealed before, since QEMU first empties it.
        """
        if self._file_fd >= 0 and os.fstat(self._file_fd).st_size > _STATE_BYTES:
            fcntl.fcntl(self._file_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
            raise BackendError(_WHAT, "the state of its devices is too large", "Open another sandbox")

    def run(self, command: str, fds: tuple[int, ...] = (), /, **arguments: object) -> None:
        """Run a command, and wait for its answer. Raises BackendError if it fails or is late."""
        self._count += 1
        name = f"{self.fdset}-{self._count}"
        line = json.dumps({"execute": command, "arguments": arguments, "id": name}).encode() + b"\n"
        self._instance.send_qmp(line, fds)
        qmp, deadline = self._instance.qmp, Deadline.after(_ANSWER_S)
        poll = input_poll(qmp.fd, self._instance.pidfd)
        while not (said := next((one for one in qmp.text().splitlines() if f'"{name}"' in one), "")):
            if deadline.passed() or qmp.ended or any(fd != qmp.fd for fd, _ in poll.poll(_LOOK_MS)):
                raise BackendError(_WHAT, f"QEMU did not answer to {command}", "Try again, or open another sandbox")
            qmp.read()
            self._bound_file()
        if '"return"' not in said:
            raise BackendError(_WHAT, f"QEMU refuses {command}: {said[:300]}", "Open another sandbox")
