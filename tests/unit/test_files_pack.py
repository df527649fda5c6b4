"""Project files packed for the VM: selection, refusals and exact arrival."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.errors import Cancelled, UsageError
from x07_sandbox.files.pack import ENTRIES_MAX, FILES_MAX, pack_files, pack_tree
from x07_sandbox.guest.trees import ProgramTree
from x07_sandbox.host import settings
from x07_sandbox.host.waiting import Cancel

NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=12)


def unpack(tree: bytes, folder: Path) -> None:
    """Unpack a program's files as the guest does."""
    unpacker = ProgramTree(str(folder))
    unpacker.write(tree)
    unpacker.finish()


def unpacked(tree: bytes) -> dict[str, bytes]:
    """The files of a tree stream as the guest unpacks them."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(tree, Path(folder))
        root = Path(folder)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tree(root: Path, *names: str) -> None:
    """Files that contain their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_the_same_files_are_the_same_stream(tmp_path: Path) -> None:
    """The same files give the same stream, whatever their order, times and owners."""
    tree(tmp_path, "a.c", "b/c.c")
    first = pack_tree(tmp_path, ["a.c", "b/*"])
    os.utime(tmp_path / "a.c", (1, 1))
    assert pack_tree(tmp_path, ["b/*", "a.c"]).tree == first.tree
    (tmp_path / "a.c").chmod(0o755)
    assert pack_tree(tmp_path, ["b/*", "a.c"]).tree != first.tree


@pytest.mark.parametrize(("mtime_ns", "arrives"), [(1_700_000_000_123_456_789,) * 2, (5,) * 2, (1 << 60,) * 2, (0, 0)])
def test_a_stream_with_mtimes_is_unpacked_with_them(tmp_path: Path, mtime_ns: int, arrives: int) -> None:
    """Files keep their mtimes to the nanosecond, while the digest ignores mtimes."""
    tree(tmp_path / "in", "gen.c")
    os.utime(tmp_path / "in/gen.c", ns=(0, mtime_ns))
    packed = pack_tree(tmp_path / "in", ["**"], mtimes=True)
    (tmp_path / "out").mkdir()
    unpack(packed.timed, tmp_path / "out")
    assert (tmp_path / "out/gen.c").stat().st_mtime_ns == arrives
    assert packed.tree == pack_tree(tmp_path / "in", ["**"]).tree != packed.timed


def huge(path: Path) -> None:
    """A sparse file above the size limit."""
    with path.open("wb") as file:
        file.truncate(settings.SOURCE_MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda root: (root / "x").symlink_to("/etc/passwd"), "leads out of the project, to /etc/passwd"),
        (lambda root: (root / "x").symlink_to("/etc"), "leads out of the project, to /etc"),
        (lambda root: (root / "x").symlink_to("nowhere"), "No such file"),
        (lambda root: (root / "x").symlink_to("x"), "symbolic links"),
        (lambda root: os.mkfifo(root / "x"), "not a regular file"),
        (lambda root: (root / "x\n").touch(), "not a plain relative path"),
        (lambda root: (root / os.fsdecode(b"x\xff")).touch(), "not a plain relative path"),
        (lambda root: huge(root / "x"), "more than"),
    ],
)
def test_unsupported_entries_are_refused(tmp_path: Path, make: object, why: str) -> None:
    """Escaping or looping links, pipes, unprintable names and oversized files are refused by name."""
    assert callable(make)
    make(tmp_path)
    with pytest.raises(UsageError, match=why):
        pack_tree(tmp_path, ["x*"])


PLACES = ("a.c", "b.c", "ab", ".hid", "s/a.c", "s/.hid/x", "s/t/b.c", "s/t/ab/a", ".dot/a.c", ".dot/s/b", "t/s/a.c")
PARTS = ("**", "*", "*.c", "?.c", "[ab].c", "[!a]*", "a*", ".*", ".hid", ".dot", "s", "t", "ab", "a.c", "*[", "x")


@given(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("/".join), min_size=1, max_size=2))
def test_patterns_mean_what_glob_means(patterns: list[str]) -> None:
    """Patterns match the same files as Python's glob."""
    with tempfile.TemporaryDirectory() as folder:
        tree(Path(folder), *PLACES)
        named = [set(glob.glob(pattern, root_dir=folder, recursive=True)) for pattern in patterns]  # noqa: PTH207 - the model
        files = {os.path.normpath(name) for name in set().union(*named) if (Path(folder) / name).is_file()}
        if all(named):
            assert set(pack_tree(Path(folder), patterns).files) == files
        else:
            with pytest.raises(UsageError, match="no file matches"):
                pack_tree(Path(folder), patterns)


def test_a_pattern_is_read_as_a_path_is(tmp_path: Path) -> None:
    """Patterns ignore single dots and repeated slashes, and a trailing slash matches no file."""
    tree(tmp_path, "a.c", "s/b.c")
    assert sorted(pack_tree(tmp_path, ["./a.c", ".//s/./*.c"]).files) == ["a.c", "s/b.c"]
    for pattern in ("s/", "s/.", "**/", ".", ""):
        with pytest.raises(UsageError, match="no file matches"):
            pack_tree(tmp_path, [pattern])


def test_a_folder_reached_through_links_is_packed_once(tmp_path: Path) -> None:
    """A folder reached again through links is packed once, and a link within the project as the file at its end."""
    tree(tmp_path, "a/x", "b/y", "real.txt")
    for name, target in {"me": ".", "a/up": "..", "a/b": "../b", "b/a": "../a", "whole": str(tmp_path)}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert pack_tree(tmp_path, ["link.txt"]).files == {"link.txt": b"real.txt"}
    wanted = ["a/b/y", "a/x", "b/a/x", "b/y", "link.txt", "real.txt"]
    for patterns in (["**"], ["**/" * 200 + "*"]):
        assert sorted(pack_tree(tmp_path, patterns).files) == wanted


def test_an_escaping_pattern_is_refused(tmp_path: Path) -> None:
    """A pattern that leads out of the project through a link is refused with the reason."""
    tree(tmp_path, "in/a.c", "out/b.c")
    (tmp_path / "in" / "lib").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "all").symlink_to("/")
    assert list(pack_tree(tmp_path / "in", ["**/*.c"]).files) == ["a.c"]
    with pytest.raises(UsageError, match=r"no file matches 'lib/\*\.c'"):
        pack_tree(tmp_path / "in", ["lib/*.c"])
    with pytest.raises(UsageError, match="leads out of the project"):
        pack_tree(tmp_path / "in", ["**"])


def test_an_endless_tree_is_refused(tmp_path: Path) -> None:
    """Trees expanded by links and patterns with too many stars are refused."""
    tree(tmp_path, *(f"links/wide/{number}" for number in range(1000)), *(f"stars/{n:0120}" for n in range(300)))
    for number in range(ENTRIES_MAX // 1000):
        (tmp_path / f"links/{number}").symlink_to("wide")
    with pytest.raises(UsageError, match=f"more than {ENTRIES_MAX} names"):
        pack_tree(tmp_path / "links", ["**/*.h"])
    with pytest.raises(UsageError, match="too many stars"):
        pack_tree(tmp_path / "stars", ["*0" * 100 + f"*{number}" for number in range(60)])


def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    """A tree that is too deep is refused."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(UsageError, match="is too deep"):
        pack_tree(tmp_path, ["**/*.c"])


def test_packing_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    """Packing can be cancelled by a signal or another thread."""
    tree(tmp_path, "a.c")
    for number in (2, 0):
        cancel = Cancel()
        cancel(number)
        with pytest.raises(Cancelled) as caught:
            pack_tree(tmp_path, ["**"], check=cancel.check)
        assert caught.value.signal == number
        cancel.close()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        *(
            ([name], "")
            for name in ("", "/a", "a//b", "../a", "a/..", "./a", "a\0", "a\nb", "a" * 256, "a/" * 600 + "b")
        ),
        (["a", "a/b"], ".*is below a file"),
        ([str(number) for number in range(FILES_MAX + 1)], ".*the limit is 10000 files"),
    ],
)
def test_wrong_files_in_memory_are_refused(names: list[str], why: str) -> None:
    """Files given in memory need relative, plain names, none below another file, and have a limit of number."""
    with pytest.raises(UsageError, match=f"cannot use the files{why}"):
        pack_files(dict.fromkeys(names, b""), "the files")


@example({"TRAILER!!!": b""})
@given(st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=50), max_size=8))
def test_any_files_arrive_as_they_were_or_are_refused(files: dict[str, bytes]) -> None:
    """Any files either arrive unchanged in the guest or are refused."""
    try:
        packed = pack_files(files, "the files")
    except UsageError:
        return
    assert unpacked(packed.tree) == files
