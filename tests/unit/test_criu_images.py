"""Changing a dump of criu: which pages move, and what stays as it was."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from x07_sandbox.backends.protobuf import Message
from x07_sandbox.backends.qemu.criu_images import PAGE, move_pages, read_messages, reset_priority, write_messages
from x07_sandbox.backends.qemu.hot import require_plain_files
from x07_sandbox.errors import BackendError

PID = 64
RAM = "/img/ram"
KNOWN = {RAM, "/lib/x.so"}
RAM_PAGES, LARGE_PAGES = 4, 200
MAGIC = b"magic..."
REGULAR, FILE_PRIVATE, ANON_PRIVATE, HEAP = 1, 1 << 6, 1 << 9, 1 << 5
AREAS = {  # start: (pages, pgoff, file, flags, status)
    0x100000: (RAM_PAGES, 0, 2, 0x4002, REGULAR | FILE_PRIVATE),
    0x200000: (LARGE_PAGES, 0, 0, 0x22, REGULAR | ANON_PRIVATE),
    0x200000 + LARGE_PAGES * PAGE: (1, 0, 0, 0x22, REGULAR | ANON_PRIVATE),
    0x900000: (LARGE_PAGES, 0, 0, 0x22, REGULAR | ANON_PRIVATE | HEAP),
    0xB00000: (2, 7, 1, 0x02, REGULAR | FILE_PRIVATE),
}
# Two entries cover areas side by side, as criu writes them.
MAPS = [(0x100000 + PAGE, 2), (0x200000, LARGE_PAGES + 1), (0x900000, LARGE_PAGES), (0xB00000, 1)]


def message(**fields: int | bytes) -> Message:
    """A message with fields named f1, f2 and so on."""
    made = Message(b"")
    for name, value in fields.items():
        made[int(name[1:])] = value
    return made


def page(number: int) -> bytes:
    """The content of one page of the dump."""
    return struct.pack("<I", number) * (PAGE // 4)


@pytest.fixture(name="dump")
def dump_fixture(tmp_path: Path) -> Path:
    """A dump of a process with the AREAS."""
    mm = Message(b"")
    mm[1] = 0x400000
    for start, (pages, pgoff, file, flags, status) in AREAS.items():
        area = message(f1=start, f2=start + pages * PAGE, f3=pgoff, f4=file, f5=3, f6=flags, f7=status, f9=77)
        mm.fields.append([14, 2, area.encode()])
    mm.fields += [[99, 5, b"four"], [100, 1, b"exactly8"]]
    write_messages(tmp_path / f"mm-{PID}.img", MAGIC, [mm])
    maps = [message(f1=address, f2=pages, f4=4) for address, pages in MAPS]
    write_messages(tmp_path / f"pagemap-{PID}.img", MAGIC, [message(f1=1), *maps])
    files = [
        message(f1=1, f2=number, f3=message(f1=number, f6=name.encode(), f8=size).encode())
        for number, name, size in ((1, "/lib/x.so", 8192), (2, RAM, RAM_PAGES * PAGE), (3, RAM, RAM_PAGES * PAGE))
    ]
    write_messages(tmp_path / "files.img", MAGIC, files)
    total = sum(pages for _, pages in MAPS)
    (tmp_path / "pages-1.img").write_bytes(b"".join(map(page, range(total))))
    return tmp_path


@pytest.fixture(name="memory")
def memory_fixture() -> Iterator[int]:
    """The saved RAM."""
    fd = os.memfd_create("ram")
    os.write(fd, b"r" * (RAM_PAGES * PAGE))
    yield fd
    os.close(fd)


def test_large_areas_move_to_the_file_and_all_others_stay(dump: Path, memory: int) -> None:
    """Pages of RAM and of large anonymous areas move to the file, each to its place, and all others stay in order."""
    move_pages(dump, PID, memory, RAM, KNOWN)
    ram = os.pread(memory, RAM_PAGES * PAGE, 0)
    assert ram == b"r" * PAGE + page(0) + page(1) + b"r" * PAGE
    assert os.pread(memory, LARGE_PAGES * PAGE, RAM_PAGES * PAGE) == b"".join(map(page, range(2, 2 + LARGE_PAGES)))
    assert os.fstat(memory).st_size == (RAM_PAGES + LARGE_PAGES) * PAGE
    first = 2 + LARGE_PAGES
    kept = [first, *range(first + 1, first + 1 + LARGE_PAGES), first + 1 + LARGE_PAGES]
    assert (dump / "pages-1.img").read_bytes() == b"".join(map(page, kept))
    _, (head, *maps) = read_messages(dump / f"pagemap-{PID}.img")
    assert head[1] == 1
    small = 0x200000 + LARGE_PAGES * PAGE
    assert [(one[1], one[2], one[4]) for one in maps] == [(small, 1, 4), (0x900000, LARGE_PAGES, 4), (0xB00000, 1, 4)]


def test_the_moved_areas_become_private_mappings_of_the_file(dump: Path, memory: int) -> None:
    """A moved area maps the file privately at its place, and other fields, areas and files keep their values."""
    _, (before,) = read_messages(dump / f"mm-{PID}.img")
    move_pages(dump, PID, memory, RAM, KNOWN)
    magic, (after,) = read_messages(dump / f"mm-{PID}.img")
    assert magic == MAGIC
    changed = [at for at, (old, new) in enumerate(zip(before.fields, after.fields, strict=True)) if old != new]
    assert len(changed) == 1
    moved = Message(after.fields[changed[0]][2])
    assert [moved[number] for number in (1, 3, 4, 6, 7, 9, 10)] == [0x200000, RAM_PAGES * PAGE, 2, 2, 65, 77, 0]
    _, files = read_messages(dump / "files.img")
    size = (RAM_PAGES + LARGE_PAGES) * PAGE
    assert [Message(entry[3])[8] for entry in files] == [8192, size, size]


def test_threads_get_the_usual_priority(dump: Path) -> None:
    """A process that was dumped with a low priority is restored with the usual one, and other fields stay."""
    thread, other = message(f1=7, f2=24, f3=20, f4=0), message(f1=8, f2=24)  # f3: nice 10, as sint32
    for number, held in ((64, thread), (65, other)):
        write_messages(dump / f"core-{number}.img", MAGIC, [message(f1=1, f5=held.encode(), f3=b"task")])
    reset_priority(dump)
    for number, held in ((64, thread), (65, other)):
        magic, (core,) = read_messages(dump / f"core-{number}.img")
        assert (magic, core[1], core[3]) == (MAGIC, 1, b"task")
        found = Message(core[5])
        assert (found[1], found[2], found[3]) == (held[1], 24, 0)


@pytest.mark.parametrize("name", ["mm-64.img", "pagemap-64.img", "files.img"])
def test_a_dump_that_is_not_understood_is_refused(name: str, dump: Path, memory: int) -> None:
    """A file that is cut off or empty is an error."""
    path = dump / name
    whole = path.read_bytes()
    for size in (0, 8, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BackendError, match="not as expected"):
            move_pages(dump, PID, memory, RAM, KNOWN)


def test_pages_that_nothing_lists_are_an_error(dump: Path, memory: int) -> None:
    """Pages beyond or short of those that the dump lists are an error, as is a process that does not map its RAM."""
    pages = dump / "pages-1.img"
    whole = pages.read_bytes()
    for wrong in (whole + page(0), whole[:-1]):
        pages.write_bytes(wrong)
        with pytest.raises(BackendError, match=r"pages-1\.img"):
            move_pages(dump, PID, memory, RAM, KNOWN)
    with pytest.raises(BackendError, match=r"files\.img"):
        move_pages(dump, PID, memory, "/img/other", KNOWN)


def test_a_dump_with_a_link_is_refused(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A link in a dump is refused, symbolic or hard, as is a folder."""
    require_plain_files(dump)
    other = tmp_path_factory.mktemp("other") / "file"
    other.write_bytes(b"")
    for make in (Path.symlink_to, Path.hardlink_to, lambda path, _other: path.mkdir()):
        make(dump / "core-64.img", other)
        with pytest.raises(BackendError, match="no plain file"):
            require_plain_files(dump)
        (dump / "core-64.img").rename(other.with_name(os.urandom(4).hex()))


@pytest.mark.parametrize("name", ["/lib/x.so.1", "/etc/passwd", "/img/ram2", "/dev/kvm", "/proc/1/mem", "", "xfile[1]"])
def test_a_process_with_another_file_is_refused(dump: Path, memory: int, name: str) -> None:
    """A dumped process with a file that a waiting VM does not have is refused."""
    magic, files = read_messages(dump / "files.img")
    files.append(message(f1=1, f2=4, f3=message(f1=4, f6=name.encode(), f8=1).encode()))
    write_messages(dump / "files.img", magic, files)
    with pytest.raises(BackendError, match=re.escape(f"opened '{name}'")):
        move_pages(dump, PID, memory, RAM, KNOWN)


def test_a_process_with_a_file_of_an_unknown_kind_is_refused(dump: Path, memory: int) -> None:
    """A dumped process with a file of an unknown kind is refused."""
    magic, files = read_messages(dump / "files.img")
    files.append(message(f1=14, f2=4))
    write_messages(dump / "files.img", magic, files)
    with pytest.raises(BackendError, match="type 14"):
        move_pages(dump, PID, memory, RAM, KNOWN)
