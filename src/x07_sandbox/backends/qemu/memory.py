"""The RAM of a VM as its process has it: which pages differ from the file that it was mapped from, and their content.

A clone's RAM is a private mapping of a file, and that of a booted VM is anonymous memory. /proc shows the pages that
the process has written (ioctl_pagemap_scan(2), and proc(5): /proc/PID/pagemap), and their content. The process is
hostile: only its own memory is read, and what is read goes nowhere but into a copy of its own RAM.
"""

import array
import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from typing import Final

from x07_sandbox.errors import BackendError, HostError, Text
from x07_sandbox.host.linux import children_of, of_process
from x07_sandbox.host.paths import raised_as

PAGE: Final = mmap.PAGESIZE
_WHAT: Final = "cannot read the memory of the VM"
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
        with raised_as(HostError, _WHAT, fix):
            found = [(one, start) for one in _tree(pid) if (start := _mapped(one, inode, ram_bytes)) is not None]
            if len(found) != 1:
                raise BackendError(_WHAT, f"{len(found)} processes have it, instead of one", "Open another sandbox")
            owner, self._start = found[0]
            self._pages_fd = os.open(f"/proc/{owner}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._pages_fd)
            self._memory_fd = os.open(f"/proc/{owner}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._memory_fd)
        # The descriptors belong to the process that had this number then.
        if _mapped(owner, inode, ram_bytes) != self._start or owner not in _tree(pid):
            raise BackendError(_WHAT, "the process that has it has ended", "Open another sandbox")

    def copy(self, view: memoryview) -> int:
        """Copy all pages that the process has written to *view*, a copy of the file. Return their size in bytes.

        Raises BackendError.
        """
        try:
            return sum(self._copy(view, begin, end) for begin, end in self._written())
        except OSError as exc:
            # The kernel has found no room for a page of the file that *view* is a mapping of.
            why = os.strerror(errno.ENOSPC) if exc.errno == errno.EFAULT else exc.strerror or str(exc)
            raise BackendError(_WHAT, why, "Free disk space, or try again") from exc

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
