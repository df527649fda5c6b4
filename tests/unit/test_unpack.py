"""Whole folders that go into a sandbox and come out of it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.channel.trees import Entry, Kind, segment
from x07_sandbox.errors import BackendError, PeerError
from x07_sandbox.files import incoming
from x07_sandbox.files.incoming import Unpacker, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Entry(Kind.FOLDER, b"", mode=0o755)
END = Entry(Kind.END, b"")


def stream(*parts: Entry | bytes) -> bytes:
    """The stream of a folder with these entries."""
    return b"".join(part if isinstance(part, bytes) else part.encoded() for part in (TOP, *parts, END))


def file(name: bytes, content: bytes, mode: int = 0o644) -> bytes:
    """The record of a file."""
    return Entry(Kind.FILE, name, mode=mode, size=len(content)).encoded() + (
        segment(len(content)) + content if content else b""
    )


def unpacked(target: Path, data: bytes, step: int = 1 << 20) -> None:
    """Unpack a stream, in pieces of *step* bytes."""
    with Unpacker(target) as unpacker:
        for at in range(0, len(data), step):
            unpacker.write(data[at : at + step])
        assert unpacker.ended


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where a stream is unpacked, beside a file that must not change."""
    (tmp_path / "outside").write_bytes(b"mine")
    yield tmp_path / "target"
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "target", "tree"}


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_folder_survives_the_way_through_a_stream(tmp_path: Path, target: Path, step: int) -> None:
    """Contents, holes, modes, times, links and empty folders are the same after packing and unpacking."""
    tree = tmp_path / "tree"
    (tree / "closed" / "deep").mkdir(parents=True)
    (tree / "closed" / "deep" / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "closed" / "deep" / "run").chmod(0o750)
    (tree / "link").symlink_to("/etc/passwd")
    (tree / "to-folder").symlink_to("closed")
    (tree / "hole").write_bytes(b"begin")
    os.truncate(tree / "hole", 300_000)
    os.utime(tree / "hole", ns=(1, 123_456_789))
    os.mkfifo(tree / "pipe")
    (tree / "closed").chmod(0o555)
    packed = io.BytesIO()
    pack(tree, packed)
    unpacked(target, packed.getvalue(), step)
    seen = {path.relative_to(target).as_posix(): path.lstat() for path in target.rglob("*")}
    wanted = {path.relative_to(tree).as_posix(): path.lstat() for path in tree.rglob("*") if path.name != "pipe"}
    assert seen.keys() == wanted.keys()
    for name, info in seen.items():
        assert info.st_mode == wanted[name].st_mode, name
        assert stat.S_ISLNK(info.st_mode) or info.st_mtime_ns == wanted[name].st_mtime_ns, name
    assert (target / "hole").read_bytes() == (tree / "hole").read_bytes()
    assert (target / "link").readlink() == Path("/etc/passwd")
    (tree / "closed").chmod(0o755)
    (target / "closed").chmod(0o755)


@pytest.mark.parametrize(
    "parts",
    [
        (Entry(Kind.LINK, b"a", target=b".."), file(b"a/outside", b"bad")),
        (Entry(Kind.LINK, b"a", target=b"../outside"), file(b"a", b"bad")),
        (file(b"a", b"1"), file(b"a", b"2")),
    ],
)
def test_no_entry_leads_through_a_link_or_replaces_another(target: Path, parts: tuple[Entry | bytes, ...]) -> None:
    """A guest's stream that follows a link, or names an entry twice, is refused."""
    with pytest.raises(OSError, match=r".") as raised:
        unpacked(target, stream(*parts))
    assert raised.value.errno is not None


@pytest.mark.parametrize("entry", [Entry(Kind.DELETED, b"a"), Entry(Kind.TOO_LARGE, b"a", mode=0o644, size=9)])
def test_other_records_are_violations(target: Path, entry: Entry) -> None:
    """Records that only a report of changes may have are refused."""
    with pytest.raises(PeerError, match="record of the kind"):
        unpacked(target, stream(entry))


def test_modes_lose_their_set_id_bits_and_devices_are_left_out(target: Path) -> None:
    """No set-id bit and no device comes from a guest."""
    unpacked(target, stream(file(b"a", b"1", 0o6755), Entry(Kind.UNSUPPORTED, b"b", mode=stat.S_IFBLK)))
    assert [(path.name, path.stat().st_mode) for path in target.iterdir()] == [("a", stat.S_IFREG | 0o755)]


def test_what_a_guest_could_not_send_is_named(target: Path) -> None:
    """Entries that did not come whole are named, at most 100 of them, except sockets and pipes."""
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFSOCK, stat.S_IFIFO)
    odd = [Entry(Kind.UNSUPPORTED, b"%d" % number, mode=mode) for number, mode in enumerate(kinds)]
    many = [Entry(Kind.UNSUPPORTED, b"n%d" % number, mode=stat.S_IFREG) for number in range(100)]
    with Unpacker(target) as unpacker:
        unpacker.write(stream(file(b"0", b"1"), *odd, *many))
    assert (unpacker.left_out[:3], len(unpacker.left_out), unpacker.more_left_out) == (["0", "1", "n0"], 100, 2)


def test_a_folder_that_cannot_be_packed_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host folder whose names are too long for a record is an error, and none of its parts is dropped."""
    (tmp_path / "tree").mkdir()
    monkeypatch.chdir(tmp_path / "tree")
    for _ in range(280):
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    with pytest.raises(OSError, match="File name too long"):
        pack(tmp_path / "tree", io.BytesIO())


def test_entries_and_bytes_are_bounded(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream with too many entries or bytes is refused."""
    monkeypatch.setattr(incoming, "ENTRIES_MAX", 3)
    with pytest.raises(BackendError, match="more than 3 entries"):
        unpacked(target, stream(*(file(b"%d" % number, b"") for number in range(9))))


def test_an_existing_folder_is_not_touched(target: Path) -> None:
    """A stream is unpacked only to a new folder."""
    target.mkdir()
    with pytest.raises(FileExistsError):
        Unpacker(target)
