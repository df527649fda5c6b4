"""Changing a dump of criu(8), so that large areas of memory are mapped from a file instead of being copied.

criu reads all pages of a dump into each restored process. That takes most of the time of a restore, and no two
processes share a page. So the pages of the guest's RAM and of other large areas (QEMU's translations above all) move to
one file, and the dump says that these areas are private mappings of that file. The kernel then copies only what is
written.

A dump consists of files of messages in the format of Protocol Buffers, each after its length, after two magic numbers.
The numbers of fields below are those of criu's files images/{mm,vma,regfile,fdinfo,pagemap,core}.proto, which may gain
fields but change none.
"""

import bisect
import os
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.protobuf import Message
from x07_sandbox.errors import BackendError

PAGE: Final = 4096
_WHAT: Final = "cannot use the dump of a VM"
_LARGE_BYTES: Final = 512 * 1024
_MAGIC_BYTES: Final = 8
_MOST_BYTES: Final = 64 << 20  # of a file of messages

_MM_VMAS: Final = 14
_VMA_START, _VMA_END, _VMA_PGOFF, _VMA_FILE, _VMA_FLAGS, _VMA_STATUS, _VMA_FDFLAGS = 1, 2, 3, 4, 6, 7, 10
_FILE_TYPE, _FILE_REG = 1, 3
_TYPES: Final = (1, 5, 6, 7, 9, 17)  # regular files, Unix sockets, eventfd, epoll, signalfd, timerfd
_REG_ID, _REG_NAME, _REG_SIZE = 1, 6, 8
_MAP_START, _MAP_PAGES = 1, 2
_CORE_THREAD, _THREAD_NICE = 5, 3

# mmap(2): MAP_PRIVATE, MAP_ANONYMOUS. criu/include/image.h: VMA_AREA_REGULAR, VMA_FILE_PRIVATE, VMA_ANON_PRIVATE.
_PRIVATE, _ANONYMOUS = 0x02, 0x20
_REGULAR, _FILE_PRIVATE, _ANON_PRIVATE = 1 << 0, 1 << 6, 1 << 9


def read_messages(path: Path) -> tuple[bytes, list[Message]]:
    """Return the magic numbers and the messages of a file. Raises BackendError if the file is not understood."""
    data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
    found, at = [], _MAGIC_BYTES
    try:
        while at < len(data):
            (size,) = struct.unpack_from("<I", data, at)
            found.append(Message(data[at + 4 : at + 4 + size]))
            at += 4 + size
    except (ValueError, struct.error) as exc:
        raise _not_understood(path) from exc
    if not found or at != len(data):
        raise _not_understood(path)
    return data[:_MAGIC_BYTES], found


def write_messages(path: Path, magic: bytes, messages: list[Message]) -> None:
    """Replace a file."""
    encoded = [message.encode() for message in messages]
    path.write_bytes(magic + b"".join(struct.pack("<I", len(data)) + data for data in encoded))


class _Area:
    """One area of the process. place: its offset in the file, or None if its pages stay in the dump."""

    def __init__(self, field: list[Any]) -> None:
        self.field = field
        self.message = Message(field[2])
        self.start: int = self.message[_VMA_START]
        self.end: int = self.message[_VMA_END]
        self.held = 0
        self.place: int | None = None


def move_pages(folder: Path, pid: int, memory_fd: int, ram: str, known: Container[str]) -> None:
    """Move the pages of large areas of process *pid* to the file *memory_fd*, which contains the guest's RAM.

    folder: the dump. ram: the path under which the process has mapped its RAM, and will map the file. The file grows.
    known: paths of the files that the process may have. It was not filtered, and there are more files when it is
    restored. Raises BackendError if the dump is not as expected, OSError.
    """
    mm_path, map_path, files_path = folder / f"mm-{pid}.img", folder / f"pagemap-{pid}.img", folder / "files.img"
    mm_magic, (mm,) = read_messages(mm_path)
    map_magic, (head, *maps) = read_messages(map_path)
    files_magic, files = read_messages(files_path)
    regular = [(entry, Message(entry[_FILE_REG])) for entry in files if entry[_FILE_REG]]
    names = [reg[_REG_NAME].decode(errors="replace") for _, reg in regular]
    if strange := [name for name in names if name not in known and not name.startswith("file[")]:
        raise BackendError(_WHAT, f"it has opened {strange[0]!a}", "Run x07 doctor")
    if strange := [entry[_FILE_TYPE] for entry in files if entry[_FILE_TYPE] not in _TYPES]:
        raise BackendError(_WHAT, f"it has a file of type {strange[0]}", "Run x07 doctor")
    of_ram = [(entry, reg) for entry, reg in regular if reg[_REG_NAME] == ram.encode()]
    areas = [_Area(field) for field in mm.fields if field[0] == _MM_VMAS]
    pages = list(_pages(maps, areas))
    for area, _, size, _ in pages:
        area.held += size
    if not of_ram:
        raise _not_understood(files_path)
    ids = {reg[_REG_ID] for _, reg in of_ram}
    end = os.fstat(memory_fd).st_size
    for area in areas:
        status, flags = area.message[_VMA_STATUS], area.message[_VMA_FLAGS]
        if status == _REGULAR | _FILE_PRIVATE and area.message[_VMA_FILE] in ids:
            area.place = area.message[_VMA_PGOFF]
        elif status == _REGULAR | _ANON_PRIVATE and flags == _PRIVATE | _ANONYMOUS and area.held >= _LARGE_BYTES:
            area.place = end
            end += area.end - area.start
            area.message[_VMA_PGOFF], area.message[_VMA_FILE] = area.place, min(ids)
            area.message[_VMA_FLAGS], area.message[_VMA_STATUS] = _PRIVATE, _REGULAR | _FILE_PRIVATE
            area.message[_VMA_FDFLAGS] = os.O_RDONLY
            area.field[2] = area.message.encode()
    os.ftruncate(memory_fd, end)
    for entry, reg in of_ram:
        reg[_REG_SIZE] = end
        entry[_FILE_REG] = reg.encode()
    kept = _split(folder / "pages-1.img", pages, memory_fd)
    write_messages(mm_path, mm_magic, [mm])
    write_messages(map_path, map_magic, [head, *kept])
    write_messages(files_path, files_magic, files)


def reset_priority(folder: Path) -> None:
    """Give each thread in a dump the usual priority: a process in the background, which has a low one, dumps it."""
    for path in folder.glob("core-*.img"):
        magic, (core,) = read_messages(path)
        thread = Message(core.single(_CORE_THREAD, b""))
        thread[_THREAD_NICE] = 0
        core[_CORE_THREAD] = thread.encode()
        write_messages(path, magic, [core])


def _pages(maps: list[Message], areas: list[_Area]) -> Iterator[tuple[_Area, int, int, Message]]:
    """Yield the dumped ranges in the order of their pages: the area, address and bytes, and the entry in the dump."""
    starts = [area.start for area in areas]
    for entry in maps:
        address, left = entry[_MAP_START], entry[_MAP_PAGES] * PAGE
        while left:
            area = areas[bisect.bisect(starts, address) - 1]
            size = min(left, area.end - address)  # an entry may cover several areas
            yield area, address, size, entry
            address, left = address + size, left - size


def _split(path: Path, pages: list[tuple[_Area, int, int, Message]], memory_fd: int) -> list[Message]:
    """Move the pages of areas that have a place to *memory_fd*. Return the entries of all others."""
    kept = []
    rest = path.with_name(".pages")
    with path.open("rb") as source, rest.open("wb") as target:
        for area, address, size, entry in pages:
            if len(data := source.read(size)) != size:
                raise _not_understood(path)
            if area.place is not None:
                os.pwrite(memory_fd, data, area.place + address - area.start)
                continue
            target.write(data)
            own = Message(entry.encode())
            own[_MAP_START], own[_MAP_PAGES] = address, size // PAGE
            kept.append(own)
        if source.read(1):
            raise _not_understood(path)
    rest.replace(path)
    return kept


def _not_understood(path: Path) -> BackendError:
    return BackendError(_WHAT, f"{path.name} is not as expected", "Run x07 doctor")
