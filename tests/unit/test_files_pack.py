"""Trees that go into a machine: what is chosen, what is refused, and that it arrives as it was."""

from __future__ import annotations

import glob
import io
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from x07_sandbox.errors import Cancelled, UsageError
from x07_sandbox.files.pack import FILES_MAX, pack_files, pack_tree
from x07_sandbox.files.patterns import ENTRIES_MAX
from x07_sandbox.guest.unpack import unpack
from x07_sandbox.host import settings
from x07_sandbox.host.cancel import Cancel

NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=12)


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The files of an archive, as the guest unpacks it."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(io.BytesIO(archive), folder, most_bytes=1 << 30)
        root = Path(folder)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tree(root: Path, *names: str) -> None:
    """Files that hold their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_patterns_choose_and_hidden_files_stay(tmp_path: Path) -> None:
    """What the patterns name travels, each once; hidden files only where a pattern names them so."""
    tree(tmp_path, "Makefile", "src/a.c", "src/deep/b.c", "src/.secret", ".env", ".git/config", "other.txt")
    packed = pack_tree(tmp_path, ["Makefile", "src/**", "src/a.c"])
    assert sorted(packed.files) == ["Makefile", "src/a.c", "src/deep/b.c"]
    assert unpacked(packed.archive) == packed.files
    assert sorted(pack_tree(tmp_path, ["**"]).files) == ["Makefile", "other.txt", "src/a.c", "src/deep/b.c"]
    assert list(pack_tree(tmp_path, [".env"]).files) == [".env"]


def test_the_same_tree_is_the_same_archive(tmp_path: Path) -> None:
    """Order of patterns, times and owners change nothing: what was built before is found again."""
    tree(tmp_path, "a.c", "b/c.c")
    first = pack_tree(tmp_path, ["a.c", "b/*"])
    os.utime(tmp_path / "a.c", (1, 1))
    assert pack_tree(tmp_path, ["b/*", "a.c"]).archive == first.archive
    (tmp_path / "a.c").chmod(0o755)
    assert pack_tree(tmp_path, ["b/*", "a.c"]).archive != first.archive


@pytest.mark.parametrize(
    ("mtime_ns", "arrives"), [(1_700_000_000_123_456_789,) * 2, (5,) * 2, (1 << 62, 0xFFFFFFFF * 10**9)]
)
def test_an_archive_with_mtimes_is_unpacked_with_them(tmp_path: Path, mtime_ns: int, arrives: int) -> None:
    """A file keeps its mtime to the nanosecond, up to 2106; the digested archive stays without."""
    tree(tmp_path / "in", "gen.c")
    os.utime(tmp_path / "in/gen.c", ns=(0, mtime_ns))
    packed = pack_tree(tmp_path / "in", ["**"], mtimes=True)
    (tmp_path / "out").mkdir()
    unpack(io.BytesIO(packed.timed), str(tmp_path / "out"), most_bytes=1 << 20)
    assert (tmp_path / "out/gen.c").stat().st_mtime_ns == arrives
    assert packed.archive == pack_tree(tmp_path / "in", ["**"]).archive != packed.timed


def huge(path: Path) -> None:
    """A file that is too large, with nothing in it."""
    with path.open("wb") as file:
        file.truncate(settings.SOURCE_MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda root: (root / "x").symlink_to("/etc/passwd"), "leads out of it, to /etc/passwd"),
        (lambda root: (root / "x").symlink_to("/etc"), "leads out of it, to /etc"),
        (lambda root: (root / "x").symlink_to("nowhere"), "No such file"),
        (lambda root: (root / "x").symlink_to("x"), "symbolic links"),
        (lambda root: os.mkfifo(root / "x"), "not a regular file"),
        (lambda root: (root / "x\n").touch(), "not a relative path of plain names"),
        (lambda root: (root / os.fsdecode(b"x\xff")).touch(), "not a relative path of plain names"),
        (lambda root: huge(root / "x"), "more than"),
    ],
)
def test_what_cannot_travel_is_refused(tmp_path: Path, make: object, why: str) -> None:
    """Links out of the project, loops, pipes, names that are no text, and too much of it: refused by name."""
    assert callable(make)
    make(tmp_path)
    with pytest.raises(UsageError, match=why):
        pack_tree(tmp_path, ["x*"])


def test_a_link_inside_the_project_is_the_file_it_leads_to(tmp_path: Path) -> None:
    """A link that stays inside travels as the file's content."""
    tree(tmp_path, "real.txt")
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert pack_tree(tmp_path, ["link.txt"]).files == {"link.txt": b"real.txt"}


PLACES = ("a.c", "b.c", "ab", ".hid", "s/a.c", "s/.hid/x", "s/t/b.c", "s/t/ab/a", ".dot/a.c", ".dot/s/b", "t/s/a.c")
PARTS = ("**", "*", "*.c", "?.c", "[ab].c", "[!a]*", "a*", ".*", ".hid", ".dot", "s", "t", "ab", "a.c", "*[", "x")


@given(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("/".join), min_size=1, max_size=2))
def test_patterns_mean_what_glob_means(patterns: list[str]) -> None:
    """In a tree without links patterns name the files that Python's glob names, or nothing where that names nothing."""
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
    """Single dots and repeated slashes change nothing; what ends in a slash names folders, and so no file."""
    tree(tmp_path, "a.c", "s/b.c")
    assert sorted(pack_tree(tmp_path, ["./a.c", ".//s/./*.c"]).files) == ["a.c", "s/b.c"]
    for pattern in ("s/", "s/.", "**/", ".", ""):
        with pytest.raises(UsageError, match="no file matches"):
            pack_tree(tmp_path, [pattern])


def test_no_link_leads_round_in_circles(tmp_path: Path) -> None:
    """A folder that links show inside itself, at any depth and through each other, travels once."""
    tree(tmp_path, "a/x", "b/y", "real.txt")
    for name, target in {"me": ".", "a/up": "..", "a/b": "../b", "b/a": "../a", "whole": str(tmp_path)}.items():
        (tmp_path / name).symlink_to(target)
    wanted = ["a/b/y", "a/x", "b/a/x", "b/y", "real.txt"]
    for patterns in (["**"], ["**/" * 200 + "*"]):
        assert sorted(pack_tree(tmp_path, patterns).files) == wanted


def test_no_pattern_leads_out_of_the_project(tmp_path: Path) -> None:
    """Through a link to a folder outside nothing is looked at: the pattern is told to name nothing, and why."""
    tree(tmp_path, "in/a.c", "out/b.c")
    (tmp_path / "in" / "lib").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "all").symlink_to("/")
    assert list(pack_tree(tmp_path / "in", ["**/*.c"]).files) == ["a.c"]
    with pytest.raises(UsageError, match=r"no file matches 'lib/\*\.c'"):
        pack_tree(tmp_path / "in", ["lib/*.c"])
    with pytest.raises(UsageError, match="leads out of it"):
        pack_tree(tmp_path / "in", ["**"])


def test_a_tree_without_end_is_refused(tmp_path: Path) -> None:
    """Links that show one folder in ever more places, and patterns that are all stars, end in an error that says so."""
    tree(tmp_path, *(f"links/wide/{number}" for number in range(1000)), *(f"stars/{n:0120}" for n in range(300)))
    for number in range(ENTRIES_MAX // 1000):
        (tmp_path / f"links/{number}").symlink_to("wide")
    with pytest.raises(UsageError, match=f"more than {ENTRIES_MAX} names"):
        pack_tree(tmp_path / "links", ["**/*.h"])
    with pytest.raises(UsageError, match="too many stars"):
        pack_tree(tmp_path / "stars", ["*0" * 100 + f"*{number}" for number in range(60)])


def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    """Folders in folders deeper than any name that may travel are refused, and end no walk in a recursion."""
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
    """A walk that nobody wants any more ends at the next folder or file, by a signal or by another thread's request."""
    tree(tmp_path, "a.c")
    for number in (2, 0):
        cancel = Cancel()
        cancel(number)
        with pytest.raises(Cancelled) as caught:
            pack_tree(tmp_path, ["**"], check=cancel.check)
        assert caught.value.signal == number
        cancel.close()


def test_a_pattern_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    """A pattern without a file is told, since the build would miss it."""
    with pytest.raises(UsageError, match=r"no file matches 'lib/\*'"):
        pack_tree(tmp_path, ["lib/*"])


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a//b", "../a", "a/..", "./a", "a\0", "a\nb", "a" * 256, "a/" * 600 + "b", "TRAILER!!!", "TRAILER!!!/a"],
)
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    """Files given in memory have relative names of plain parts, none of them the archive's own, or are refused."""
    with pytest.raises(UsageError, match="cannot take the files"):
        pack_files({name: b""}, "the files")


def test_a_file_cannot_lie_below_a_file() -> None:
    """Two names of which one is the other's folder are refused."""
    with pytest.raises(UsageError, match="is below a file"):
        pack_files({"a": b"", "a/b": b""}, "the files")


def test_too_many_files_are_refused() -> None:
    """The number of files has a bound."""
    with pytest.raises(UsageError, match="exceed"):
        pack_files({str(number): b"" for number in range(FILES_MAX + 1)}, "the files")


@example({"TRAILER!!!": b""})
@given(st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=50), max_size=8))
def test_any_files_arrive_as_they_were_or_are_refused(files: dict[str, bytes]) -> None:
    """What is packed is unpacked in the guest to the same names and bytes."""
    try:
        packed = pack_files(files, "the files")
    except UsageError:
        return
    assert unpacked(packed.archive) == files
