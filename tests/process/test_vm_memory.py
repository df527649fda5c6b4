"""The RAM of a VM, read from the process that has it: what it has written, whatever it does meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from x07_sandbox.backends.qemu.snapshot import PAGE, Memory
from x07_sandbox.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE: Final = 64 << 20
# Maps the file, or anonymous memory, writes pages of it, and does what it is told.
PROCESS: Final = """
import mmap, os, sys, ctypes
fd, size = int(sys.argv[1]), int(sys.argv[2])
if fd < 0:
    ram = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
else:
    ram = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for page in (0, 1, 2, 700, 5000, size // 4096 - 1):
    ram[page * 4096:page * 4096 + 4] = b"new!"
ram[900 * 4096]  # read only
address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
libc = ctypes.CDLL(None)
print("ready", flush=True)
for line in sys.stdin:
    if line == "unmap\\n":
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    elif line == "hole\\n":
        libc.munmap(ctypes.c_void_p(address + 700 * 4096), ctypes.c_size_t(4096))
    elif line == "twice\\n":
        other = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    elif line == "other\\n":
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        other = mmap.mmap(os.open("/proc/self/exe", os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
    print("done", flush=True)
"""


class Process:
    """A process that has the RAM."""

    def __init__(self, ram_fd: int | None) -> None:
        fds = () if ram_fd is None else (ram_fd,)
        words = [sys.executable, "-c", PROCESS, str(-1 if ram_fd is None else ram_fd), str(SIZE)]
        self.child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds, text=True, bufsize=1
        )
        assert self._line() == "ready"

    def tell(self, word: str) -> None:
        """Have it do something."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{word}\n")
        assert self._line() == "done"

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def end(self) -> None:
        """Kill it."""
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def ram_fd(tmp_path: Path) -> Iterator[int]:
    """A RAM file, with some content."""
    with (tmp_path / "ram").open("wb+") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), b"old!" * 1024, 900 * PAGE)
        yield file.fileno()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What the test opens."""
    with contextlib.ExitStack() as opened:
        yield opened


def started(stack: contextlib.ExitStack, ram_fd: int | None) -> Process:
    """Start a process, which ends with the test."""
    process = Process(ram_fd)
    stack.callback(process.end)
    return process


def copied(memory: Memory, stack: contextlib.ExitStack) -> tuple[bytearray, int]:
    """Return a copy of the RAM, which was zero before, and how many bytes were copied to it."""
    mapped = mmap.mmap(-1, SIZE)
    view = memoryview(mapped)
    stack.callback(mapped.close)
    stack.callback(view.release)
    size = memory.copy(view)
    return bytearray(view), size


def no_scan(*_args: object) -> int:
    """The ioctl of a kernel before 6.7."""
    raise OSError(25, "Inappropriate ioctl for device")


@pytest.mark.parametrize("old_kernel", [False, True])
@pytest.mark.parametrize("anonymous", [False, True])
def test_only_written_pages_are_copied(
    stack: contextlib.ExitStack, ram_fd: int, monkeypatch: pytest.MonkeyPatch, *, old_kernel: bool, anonymous: bool
) -> None:
    """The pages that a process has written are copied to their places, also on kernels that cannot list them."""
    if old_kernel:
        monkeypatch.setattr(fcntl, "ioctl", no_scan)
    file_fd = None if anonymous else ram_fd
    process = started(stack, file_fd)
    found, size = copied(Memory(process.child.pid, SIZE, file_fd, stack), stack)
    written = [0, 1, 2, 700, 5000, SIZE // PAGE - 1]
    assert [number for number in range(SIZE // PAGE) if found[number * PAGE : number * PAGE + 4] == b"new!"] == written
    if not anonymous:  # a page that was only read is there in anonymous memory
        assert size == len(written) * PAGE
        assert not any(found[900 * PAGE : 901 * PAGE])


@pytest.mark.parametrize("word", ["unmap", "other"])
def test_a_process_that_has_moved_its_memory_is_refused(stack: contextlib.ExitStack, ram_fd: int, word: str) -> None:
    """Without a mapping of the RAM file, in its size and from its beginning, nothing is read."""
    process = started(stack, ram_fd)
    process.tell(word)
    with pytest.raises(BackendError, match="0 processes have it"):
        Memory(process.child.pid, SIZE, ram_fd, stack)


def test_a_process_that_unmaps_while_it_is_read_gives_nothing_more(stack: contextlib.ExitStack, ram_fd: int) -> None:
    """Memory that goes away after it was found no longer counts as written, and nor does that of a dead process."""
    process = started(stack, ram_fd)
    memory = Memory(process.child.pid, SIZE, ram_fd, stack)
    process.tell("hole")
    found, _ = copied(memory, stack)
    assert not any(found[700 * PAGE : 701 * PAGE])
    process.end()
    assert copied(memory, stack)[1] == 0


def test_the_memory_of_the_host_is_never_read(stack: contextlib.ExitStack, ram_fd: int) -> None:
    """A file of another size or inode at the same place is not taken for the RAM."""
    process = started(stack, ram_fd)
    for size, file_fd in ((SIZE // 2, ram_fd), (SIZE, None)):
        with pytest.raises(BackendError, match="0 processes have it"):
            Memory(process.child.pid, size, file_fd, stack)
    started(stack, ram_fd)  # beside it, below this process
    with pytest.raises(BackendError, match="2 processes have it"):
        Memory(os.getpid(), SIZE, ram_fd, stack)
