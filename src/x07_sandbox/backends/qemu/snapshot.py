"""Snapshots of running VMs, from which forks start: device state, RAM and scratch disk, saved in one short pause.

QEMU can write the device state without RAM: xen-save-devices-state works on any machine, whatever its name says
(migration/savevm.c). The RAM file gets a copy of the file that the VM was cloned from, and the pages that the VM has
written (`Memory`): once before the pause, so that in the pause few pages need room on the disk, and once in it. A fork
is a clone of these files.

/proc shows the pages that a process has written (ioctl_pagemap_scan(2), and proc(5): /proc/PID/pagemap), and their
content. The process is hostile: only its own memory is read, and what is read goes nowhere but into a copy of its RAM.
"""

import array
import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.instance import Streams
from x07_sandbox.backends.qemu.machine import Origin
from x07_sandbox.backends.qemu.saved import new_file
from x07_sandbox.backends.qemu.start import Source
from x07_sandbox.errors import BackendError, HostError, Text
from x07_sandbox.host.linux import children_of, of_process
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
PAGE: Final = mmap.PAGESIZE
_NO_MEMORY: Final = "cannot read the memory of the VM"
_MAPPING: Final = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) rw-p ([0-9a-f]+) [0-9a-f]+:[0-9a-f]+ (\d+)(?: .*)?")
_ARGUMENT: Final = struct.Struct("=12Q")  # struct pm_scan_arg
_PAGEMAP_SCAN: Final = 0xC0606610
# Categories of pages.
_OF_FILE: Final = 1 << 2
_PRESENT: Final = 1 << 3
_SWAPPED: Final = 1 << 4
_REGIONS: Final = 1 << 14  # in one call
_READ: Final = 16 << 20
# The bits of /proc/PID/pagemap, for kernels before 6.7: present, swapped, of a file.
_HELD_BITS: Final = 3 << 62
_FILE_BIT: Final = 1 << 61


class Memory:
    """The RAM of a running VM, in the process below *pid* that has it.

    ram_bytes: its size. ram_fd: the file that it is mapped from, or None. Raises HostError, BackendError.
    """

    def __init__(self, pid: int, ram_bytes: int, ram_fd: int | None, stack: contextlib.ExitStack) -> None:
        self._bytes = ram_bytes
        inode = 0 if ram_fd is None else os.fstat(ram_fd).st_ino
        fix: Text = "Let this user trace its own processes (sysctl kernel.yama.ptrace_scope), and do not use x07 pool"
        with raised_as(HostError, _NO_MEMORY, fix):
            found = [(one, start) for one in _tree(pid) if (start := _mapped(one, inode, ram_bytes)) is not None]
            if len(found) != 1:
                why = f"{len(found)} processes have it, instead of one"
                raise BackendError(_NO_MEMORY, why, "Open another sandbox")
            owner, self._start = found[0]
            self._pages_fd = os.open(f"/proc/{owner}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._pages_fd)
            self._memory_fd = os.open(f"/proc/{owner}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._memory_fd)
        # The descriptors belong to the process that had this number then.
        if _mapped(owner, inode, ram_bytes) != self._start or owner not in _tree(pid):
            raise BackendError(_NO_MEMORY, "the process that has it has ended", "Open another sandbox")

    def copy(self, view: memoryview) -> int:
        """Copy all pages that the process has written to *view*, a copy of the file. Return their size in bytes.

        Raises BackendError.
        """
        try:
            return sum(self._copy(view, begin, end) for begin, end in self._written())
        except OSError as exc:
            if exc.errno == errno.EFAULT:  # no room for a page of the file that *view* is a mapping of
                raise BackendError(_WHAT, os.strerror(errno.ENOSPC), _ROOM) from exc
            raise BackendError(_NO_MEMORY, exc.strerror or str(exc), "Try again") from exc

    def _copy(self, view: memoryview, begin: int, end: int) -> int:
        at = begin
        while at < end:
            if not (count := os.preadv(self._memory_fd, [view[at : min(end, at + _READ)]], self._start + at)):
                raise OSError(errno.ESRCH, "its process has ended")
            at += count
        return end - begin

    def _written(self) -> Iterator[tuple[int, int]]:
        """Yield the regions of pages that the process has written, as offsets in the RAM. Raises OSError."""
        regions = array.array("Q", bytes(24 * _REGIONS))
        address, _ = regions.buffer_info()
        at, end = self._start, self._start + self._bytes
        while at < end:
            words = [_ARGUMENT.size, 0, at, end, 0, address, _REGIONS, 0, _OF_FILE, _OF_FILE, _PRESENT | _SWAPPED, 0]
            words[11] = _OF_FILE  # the kernel joins regions whose categories agree in these
            argument = bytearray(_ARGUMENT.pack(*words))
            try:
                count = fcntl.ioctl(self._pages_fd, _PAGEMAP_SCAN, argument)
            except OSError:  # before Linux 6.7
                yield from self._written_in_pagemap()
                return
            for number in range(count):  # at most _REGIONS
                begin, stop = regions[3 * number], regions[3 * number + 1]
                if not at <= begin < stop <= end:
                    raise OSError(errno.EINVAL, "the kernel reported pages beyond it")
                yield begin - self._start, stop - self._start
            at = max(at + PAGE, _ARGUMENT.unpack(argument)[4])  # walk_end

    def _written_in_pagemap(self) -> Iterator[tuple[int, int]]:
        step, begin = _READ // 8, None
        for first in range(0, self._bytes // PAGE, step):
            size = min(step, self._bytes // PAGE - first) * 8
            words = memoryview(os.pread(self._pages_fd, size, (self._start // PAGE + first) * 8)).cast("Q")
            for number, word in enumerate(words, first):
                if bool(word & _HELD_BITS) and not word & _FILE_BIT:
                    begin = number if begin is None else begin
                elif begin is not None:
                    yield begin * PAGE, number * PAGE
                    begin = None
        if begin is not None:
            yield begin * PAGE, self._bytes


def _tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    for one in found:
        found += children_of(one)
    return found


def _mapped(pid: int, inode: int, size: int) -> int | None:
    """Return the address at which a process has mapped *size* bytes of a file from its beginning, or None.

    inode: 0 for anonymous memory. Raises OSError.
    """
    for line in (of_process(pid, "maps") or b"").splitlines():
        if (match := _MAPPING.fullmatch(line)) is None:
            continue
        start, end, offset, number = int(match[1], 16), int(match[2], 16), int(match[3], 16), int(match[4])
        if (number, end - start) == (inode, size) and not offset:
            return start
    return None


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
