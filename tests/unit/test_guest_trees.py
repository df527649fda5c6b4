"""The guest's unpacker for programs: plain files and folders below one folder, or an error."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.channel.trees import Entry, Kind, Unpacker, file_record, segment, walk
from x07_sandbox.files.pack import pack_files
from x07_sandbox.guest import trees as module
from x07_sandbox.guest.system import JobError
from x07_sandbox.guest.trees import ProgramTree, pack_program

END = Entry(Kind.END, b"").encoded()


def folder(name: bytes, mode: int = 0o755) -> bytes:
    """The record of a folder."""
    return Entry(Kind.FOLDER, name, mode=mode).encoded()


GOOD = folder(b"d") + file_record(b"d/f", b"12345") + file_record(b"x", b"#!", 0o111) + END


def take(data: bytes, target: Path, step: int = 1 << 20) -> None:
    """Unpack a stream into a folder, in pieces of *step* bytes."""
    unpacker = ProgramTree(str(target))
    try:
        for at in range(0, len(data), step):
            unpacker.write(data[at : at + step])
        unpacker.finish()
    finally:
        unpacker.close()


def tree(target: Path) -> dict[str, bytes | None]:
    """Path and content of all entries in a folder; None for folders."""
    return {
        path.relative_to(target).as_posix(): path.read_bytes() if path.is_file() else None for path in target.rglob("*")
    }


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."}
)
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=6)


def whole(files: dict[str, bytes]) -> dict[str, bytes | None]:
    """The files and their folders, folders first, without files below other files."""
    kept = {
        name: data
        for name, data in files.items()
        if not any(parent.as_posix() in files for parent in PurePosixPath(name).parents)
    }
    folders = {parent.as_posix() for name in kept for parent in PurePosixPath(name).parents} - {"."}
    return dict.fromkeys(sorted(folders)) | kept


def test_only_safe_modes_are_kept(tmp_path: Path) -> None:
    """Nobody else can write to a program's files, and no file has a set-id bit."""
    parts = [
        folder(b"p", 0o777),
        file_record(b"p/main.py", b"print(1)\n", 0o666),
        file_record(b"p/tool", b"\x7fELF", 0o6777),
    ]
    before = os.umask(0o022)  # that of the guest's first process
    try:
        take(b"".join([*parts, END]), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"p": 0o755, "main.py": 0o644, "tool": 0o755}


def test_files_of_our_own_packer_come_out(tmp_path: Path) -> None:
    """The unpacker reads what the host packs."""
    files = {"a/b/c.py": b"1", "a/d": b"", "e": bytes(300_000)}
    take(pack_files(files, "the files").tree, tmp_path)
    assert tree(tmp_path) == {"a": None, "a/b": None, **files}


def test_a_stream_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """A stream truncated at any byte is rejected."""
    for end in range(len(GOOD)):
        target = tmp_path / str(end)
        target.mkdir()
        with pytest.raises(JobError, match="incomplete"):
            take(GOOD[:end], target)


@pytest.mark.parametrize(
    "entry",
    [
        Entry(Kind.LINK, b"odd", target=b"/etc"),
        *(Entry(Kind.UNSUPPORTED, b"odd", mode=kind << 12) for kind in range(16)),
        Entry(Kind.TOO_LARGE, b"odd", size=1),
        Entry(Kind.DELETED, b"odd"),
        Entry(Kind.ROOT, b"1"),
        Entry(Kind.FILE, b""),
    ],
)
def test_only_files_and_folders_are_made(entry: Entry, tmp_path: Path) -> None:
    """Links, devices, fifos, sockets and records about changes are rejected."""
    with pytest.raises(JobError, match="it has a record of the kind"):
        take(entry.encoded() + END, tmp_path)
    assert tree(tmp_path) == {}


def test_a_duplicate_name_is_an_error(tmp_path: Path) -> None:
    """A duplicate file name is an error, and the first file is kept."""
    with pytest.raises(FileExistsError):
        take(file_record(b"f", b"first") + file_record(b"f", b"second") + END, tmp_path)
    assert tree(tmp_path) == {"f": b"first"}


def test_an_existing_link_is_not_followed(tmp_path: Path) -> None:
    """A link that exists in the target is never followed, neither as a file nor as a folder."""
    (tmp_path / "outside").write_bytes(b"kept")
    (tmp_path / "away").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "f").symlink_to(tmp_path / "outside")
    (target / "g").symlink_to(tmp_path / "new")
    (target / "h").symlink_to(tmp_path / "away")
    for name in (b"f", b"g", b"h/x"):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            take(file_record(name, b"changed") + END, target)
    assert (tmp_path / "outside").read_bytes() == b"kept"
    assert not (tmp_path / "new").exists()
    assert tree(tmp_path / "away") == {}


@pytest.mark.parametrize("name", [b"f/g", b"missing/g"])
def test_a_file_is_no_folder(name: bytes, tmp_path: Path) -> None:
    """An entry below a file or a missing folder is an error."""
    with pytest.raises(OSError, match=r"Not a directory|No such file"):
        take(file_record(b"f", b"") + file_record(name, b"") + END, tmp_path)


def test_bytes_are_bounded_over_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The total size of all files, with their holes, is bounded, and excess is rejected before it is written."""
    files = [file_record(b"%d" % number, bytes(100)) for number in range(9)]
    files.append(Entry(Kind.FILE, b"9", size=100).encoded() + segment(100, hole=True))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(module, "BYTES_MAX", 1000)
    take(b"".join(files) + END, tmp_path / "a")
    monkeypatch.setattr(module, "BYTES_MAX", 999)
    with pytest.raises(JobError, match="999 bytes"):
        take(b"".join(files) + END, tmp_path / "b")
    assert len(tree(tmp_path / "b")) == 9


@pytest.mark.parametrize("size", [(4 << 30) + 1, 1 << 40, (1 << 40) + 1, (1 << 64) - 1])
def test_a_huge_declared_size_costs_nothing(size: int, tmp_path: Path) -> None:
    """A huge declared size costs neither memory nor disk."""
    with pytest.raises(JobError, match=r"more than|too large"):
        take(Entry(Kind.FILE, b"f", size=size).encoded() + segment(1) + b"x" + END, tmp_path)
    assert tree(tmp_path) == {}


def test_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of entries is bounded."""
    assert module.ENTRIES_MAX <= 1_000_000
    monkeypatch.setattr(module, "ENTRIES_MAX", 5)
    files = [folder(b"%d" % number) for number in range(6)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    take(b"".join(files[:5]) + END, tmp_path / "a")
    with pytest.raises(JobError, match="more than 5 entries"):
        take(b"".join(files) + END, tmp_path / "b")
    assert len(tree(tmp_path / "b")) == 5


def packed(folder: Path) -> bytes | None:
    """The stream of a built program, which has the size that was announced."""
    fd = os.open(folder, os.O_RDONLY)
    problem, size, pieces = pack_program(fd)
    if problem:
        os.close(fd)
        return None
    data = b"".join(pieces)
    assert len(data) == size
    return data


@given(TREES.map(whole), st.integers(1, 99))
def test_a_built_program_arrives_as_it_was_built(files: dict[str, bytes | None], step: int) -> None:
    """A run gets what a build puts into its output folder, however it is cut; the same files give the same bytes."""
    with tempfile.TemporaryDirectory() as here:
        built, got = Path(here, "built"), Path(here, "got")
        for folder in (built, got):
            folder.mkdir()
        for name, data in files.items():
            if data is None:
                (built / name).mkdir(exist_ok=True)
            else:
                (built / name).write_bytes(data)
        data = packed(built)
        assert data is not None
        take(data, got, step)
        assert tree(got) == files
        for path in built.rglob("*"):
            os.utime(path, (1, 1))
        assert packed(built) == data


@pytest.mark.parametrize("kind", ["link", "pipe", "hard link", "long name", "many"])
def test_a_built_program_has_only_files_and_folders(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built program with links, devices, too many files or too long names is refused as a whole."""
    place = tmp_path / "built"
    place.mkdir()
    (place / "a").write_bytes(b"1")
    if kind == "link":
        (place / "b").symlink_to("a")
    elif kind == "pipe":
        os.mkfifo(place / "b")
    elif kind == "hard link":
        (place / "b").hardlink_to(place / "a")
    elif kind == "many":
        monkeypatch.setattr(module, "ENTRIES_MAX", 1)
        (place / "b").write_bytes(b"2")
    else:
        monkeypatch.chdir(place)
        for _ in range(16):
            Path("d" * 250).mkdir()
            os.chdir("d" * 250)
    assert packed(place) is None


def open_fds() -> int:
    """The number of this process's open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_walk_holds_few_descriptors_and_stays_in_its_folder(tmp_path: Path) -> None:
    """A walk of very deep folders has few of them open, is sorted, and follows no link, also one that was put in."""
    deep = tmp_path / "top"
    deep.mkdir()
    top_fd = os.open(deep, os.O_RDONLY)
    fd = top_fd
    for _ in range(1000):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        if fd != top_fd:
            os.close(fd)
        fd = inner
    os.close(fd)
    (deep / "e").mkdir()
    (deep / "e" / "f").write_bytes(b"")
    (deep / "out").symlink_to("/etc")
    before = open_fds()
    names = []
    for found in walk(top_fd):
        names.append(found.name)
        assert open_fds() <= before + 3
        if found.name == b"e":
            (deep / "e").rename(tmp_path / "moved")
            (deep / "e").symlink_to("/etc")
    os.close(top_fd)
    assert names[:3] == [b"", b"d", b"d/d"]
    assert names[1001:] == [b"e", b"e/f", b"out"]


def test_an_unpacker_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Closing an unpacker in the middle of a file closes everything that it has opened."""
    before = open_fds()
    unpacker = Unpacker(os.open(tmp_path, os.O_RDONLY), 0o777)
    unpacker.write(folder(b"d") + Entry(Kind.FILE, b"d/f", mode=0o644, size=9).encoded() + segment(1))
    unpacker.close()
    assert open_fds() == before
