"""The guest's unpacker: plain files and folders below one folder, or an error."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_unpack import MOST_BYTES, Watched, one_input
from x07_sandbox.guest import unpack as module
from x07_sandbox.guest.unpack import ArchiveError, unpack
from x07_sandbox.images import cpio

FILE = stat.S_IFREG | 0o644
FOLDER = stat.S_IFDIR | 0o755
KINDS = {
    "link": stat.S_IFLNK,
    "character device": stat.S_IFCHR,
    "block device": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "no type": 0,
    "all types": 0o170000,
}
FIELDS = {"ino": 6, "mode": 14, "mtime": 46, "filesize": 54, "devmajor": 62, "namesize": 94, "check": 102}
NO_NUMBERS = [b"-0000001", b"+0000001", b" 0000001", b"0000001 ", b"0x000001", b"0_000001", b"0000000g", bytes(8)]


def entry(name: bytes, mode: int, data: bytes = b"", *, size: int | None = None) -> bytes:
    """An entry of a newc archive (cpio(5)), built here so that it can be malformed."""
    size = len(data) if size is None else size
    fields = (1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


END = entry(b"TRAILER!!!", 0)
GOOD = entry(b"d", FOLDER) + entry(b"d/f", FILE, b"12345") + entry(b"x", stat.S_IFREG | 0o111, b"#!") + END


def take(archive: bytes, target: Path, *, most_bytes: int = 1 << 20) -> int:
    """Unpack bytes into a folder."""
    return unpack(Watched(archive), str(target), most_bytes=most_bytes)


def tree(target: Path) -> dict[str, bytes | None]:
    """Path and content of all entries in a folder; None for folders."""
    return {
        path.relative_to(target).as_posix(): path.read_bytes() if path.is_file() else None for path in target.rglob("*")
    }


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", "..", "TRAILER!!!"}
)
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=6)


def whole(files: dict[str, bytes]) -> dict[str, bytes | None]:
    """The files and their folders, folders first, without files below other files."""
    kept = {
        name: data
        for name, data in files.items()
        if name != "TRAILER!!!" and not any(parent.as_posix() in files for parent in PurePosixPath(name).parents)
    }
    folders = {parent.as_posix() for name in kept for parent in PurePosixPath(name).parents} - {"."}
    return dict.fromkeys(sorted(folders)) | kept


@given(TREES.map(whole))
def test_any_tree_is_unpacked_exactly(files: dict[str, bytes | None]) -> None:
    """Any tree of files and folders is unpacked exactly."""
    parts = [entry(os.fsencode(name), FOLDER if data is None else FILE, data or b"") for name, data in files.items()]
    with tempfile.TemporaryDirectory() as folder:
        assert take(b"".join(parts) + END, Path(folder)) == len(files)
        assert tree(Path(folder)) == files


def test_an_archive_of_our_own_writer_comes_out(tmp_path: Path) -> None:
    """The unpacker reads our own archives and keeps only the executable bit of modes."""
    entries = [
        cpio.folder("p", 0o700),
        cpio.file("p/main.py", b"print(1)\n", 0o400),
        cpio.file("p/tool", b"\x7fELF", 0o6711),
        cpio.file("empty", b""),
    ]
    before = os.umask(0o022)  # that of the guest's first process
    try:
        assert take(cpio.pack(entries), tmp_path) == 4
    finally:
        os.umask(before)
    assert tree(tmp_path) == {"p": None, "p/main.py": b"print(1)\n", "p/tool": b"\x7fELF", "empty": b""}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"p": 0o755, "main.py": 0o644, "tool": 0o755, "empty": 0o644}


def test_bytes_after_the_trailer_are_ignored(tmp_path: Path) -> None:
    """Bytes after the trailer are ignored."""
    assert take(GOOD + bytes(512) + b"junk", tmp_path) == 3
    assert tree(tmp_path) == {"d": None, "d/f": b"12345", "x": b"#!"}


@pytest.mark.parametrize("end", range(len(GOOD)))
def test_an_archive_cut_anywhere_is_refused(end: int, tmp_path: Path) -> None:
    """An archive truncated at any byte is rejected."""
    with pytest.raises(ArchiveError):
        take(GOOD[:end], tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        b"..",
        b"../x",
        b"d/../x",
        b"d/../../x",
        b"/etc/x",
        b"//x",
        b"d//x",
        b"d/",
        b"/",
        b".",
        b"./x",
        b"d/.",
        b"a\0b",
        b"\0",
        b"..\0/x",
        b"n" * 256,
        b"d/" + b"n" * 256,
    ],
)
@pytest.mark.parametrize("mode", [FILE, FOLDER])
def test_a_hostile_name_is_refused(name: bytes, mode: int, tmp_path: Path) -> None:
    """A name that is absolute, leads up, is not canonical or contains a zero byte creates nothing."""
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ArchiveError):
        take(entry(b"d", FOLDER) + entry(name, mode) + END, target)
    assert tree(tmp_path) == {"inside": None, "inside/target": None, "inside/target/d": None}


def test_a_name_without_its_end_is_refused(tmp_path: Path) -> None:
    """A name without its terminating zero byte is rejected."""
    bad = entry(b"name", FILE).replace(b"name\0", b"names")
    with pytest.raises(ArchiveError):
        take(bad + END, tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("size", [0, 1, 4097, 0xFFFFFFFF])
def test_a_names_length_is_bounded(size: int, tmp_path: Path) -> None:
    """A name of invalid length is rejected before it is read."""
    archive = entry(b"x", FILE)
    with pytest.raises(ArchiveError, match="name"):
        take(archive[:94] + b"%08X" % size + archive[102:] + bytes(8192), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_and_folders_are_made(kind: str, tmp_path: Path) -> None:
    """Links, devices, fifos, sockets and unknown types are rejected."""
    with pytest.raises(ArchiveError, match="neither a regular file nor a folder"):
        take(entry(b"odd", KINDS[kind] | 0o777, b"/etc") + END, tmp_path)
    assert tree(tmp_path) == {}


def test_a_second_name_of_one_inode_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Hard links in an archive become separate files."""
    assert take(entry(b"a", FILE, b"1") + entry(b"b", FILE) + END, tmp_path) == 2
    assert tree(tmp_path) == {"a": b"1", "b": b""}
    assert {path.stat().st_nlink for path in tmp_path.iterdir()} == {1}


def test_a_duplicate_name_is_an_error(tmp_path: Path) -> None:
    """A duplicate file name is an error, and the first file is kept."""
    with pytest.raises(FileExistsError):
        take(entry(b"f", FILE, b"first") + entry(b"f", FILE, b"second") + END, tmp_path)
    assert tree(tmp_path) == {"f": b"first"}


def test_an_existing_link_is_not_followed(tmp_path: Path) -> None:
    """A link that exists in the target is never followed."""
    (tmp_path / "outside").write_bytes(b"kept")
    target = tmp_path / "target"
    target.mkdir()
    (target / "f").symlink_to(tmp_path / "outside")
    (target / "g").symlink_to(tmp_path / "new")
    for name in (b"f", b"g"):
        with pytest.raises(FileExistsError):
            take(entry(name, FILE, b"changed") + END, target)
    assert (tmp_path / "outside").read_bytes() == b"kept"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [b"f/g", b"missing/g"])
def test_a_file_is_no_folder(name: bytes, tmp_path: Path) -> None:
    """An entry below a file or a missing folder is an error."""
    with pytest.raises(OSError, match=r"Not a directory|No such file"):
        take(entry(b"f", FILE) + entry(name, FILE) + END, tmp_path)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_field_is_eight_hexadecimal_digits(field: str, value: bytes, tmp_path: Path) -> None:
    """Header fields are exactly eight hexadecimal digits."""
    at = FIELDS[field]
    with pytest.raises(ArchiveError):
        take(GOOD[:at] + value + GOOD[at + 8 :], tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("magic", [b"070702", b"070707", b"\xc7\x71\0\0\0\0", b"\x1f\x8b\x08\0\0\0", b"ustar\0"])
def test_other_formats_are_refused(magic: bytes, tmp_path: Path) -> None:
    """Only the newc format without checksums is accepted."""
    with pytest.raises(ArchiveError, match="newc"):
        take(magic + GOOD[6:], tmp_path)


def test_a_folder_has_no_content(tmp_path: Path) -> None:
    """A folder entry with content is rejected."""
    with pytest.raises(ArchiveError, match="folder"):
        take(entry(b"d", FOLDER, b"1234") + END, tmp_path)


def test_bytes_are_bounded_over_all_files(tmp_path: Path) -> None:
    """The total size of all files is bounded, and excess is rejected before it is written."""
    files = [entry(b"%d" % number, FILE, bytes(100)) for number in range(10)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert take(b"".join(files) + END, tmp_path / "a", most_bytes=1000) == 10
    with pytest.raises(ArchiveError, match="more than 999 bytes"):
        take(b"".join(files) + END, tmp_path / "b", most_bytes=999)
    assert len(tree(tmp_path / "b")) == 9


@pytest.mark.parametrize("size", [1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_huge_declared_size_costs_nothing(size: int, tmp_path: Path) -> None:
    """A huge declared size costs neither memory nor disk."""
    with pytest.raises(ArchiveError, match="more than"):
        take(entry(b"f", FILE, b"x", size=size) + END, tmp_path, most_bytes=(1 << 20) - 1)
    assert tree(tmp_path) == {}


def test_a_large_file_is_copied_in_pieces(tmp_path: Path) -> None:
    """A large file is copied in pieces of at most one megabyte."""
    data = os.urandom(1 << 20) * 3 + b"x"
    assert take(entry(b"f", FILE, data) + END, tmp_path, most_bytes=1 << 22) == 1
    assert tree(tmp_path) == {"f": data}


def test_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of entries is bounded."""
    assert module.ENTRIES_MAX <= 1_000_000
    monkeypatch.setattr(module, "ENTRIES_MAX", 5)
    files = [entry(b"%d" % number, FOLDER) for number in range(6)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert take(b"".join(files[:5]) + END, tmp_path / "a") == 5
    with pytest.raises(ArchiveError, match="more than 5 entries"):
        take(b"".join(files) + END, tmp_path / "b")
    assert len(tree(tmp_path / "b")) == 5


@given(
    st.lists(
        st.builds(
            entry,
            st.sampled_from([b"a", b"a/b", b"../outside", b"/x", b"a/..", b"b"]) | st.binary(max_size=6),
            st.sampled_from([FILE, FOLDER, stat.S_IFLNK | 0o777, stat.S_IFREG | 0o7777]) | st.integers(0, 0xFFFFFFFF),
            st.binary(max_size=12) | st.just(bytes(MOST_BYTES // 3)),
            size=st.none() | st.integers(0, 0xFFFFFFFF),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_no_archive_reaches_outside(parts: list[bytes], ended: bool) -> None:  # noqa: FBT001 - hypothesis gives it
    """No archive creates or changes anything outside the target."""
    one_input(b"".join(parts) + (END if ended else b""))


@given(st.binary(max_size=300))
def test_any_bytes_are_an_archive_or_an_error(data: bytes) -> None:
    """Junk is rejected with ArchiveError and leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ArchiveError):
            take(data, Path(folder))
        assert tree(Path(folder)) == {}
