"""File trees packed on the host, recreated in the guest, changed, reported, and judged on the host."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import FULL
from tests.unit.apply_trees import Tree as FileTree
from tests.unit.apply_trees import flat, put, trees
from x07_sandbox.channel.messages import Mount as GuestFolder
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.files.apply import apply
from x07_sandbox.files.change_rules import AllowedActions, CheckedChanges, check_changes
from x07_sandbox.files.changes import STAGING, ChangeSet, RootChanges
from x07_sandbox.files.copy import Bounds, Mount, Tree, copy_tree
from x07_sandbox.files.incoming import Incoming
from x07_sandbox.files.protected import Protection
from x07_sandbox.guest.audit import ProgramPaths
from x07_sandbox.guest.trees import Room, changes
from x07_sandbox.guest.trees import Tree as GuestTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.files.copy import Copied

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the agent is root, and makes files as another user")

BOUNDS = Bounds(deny_hidden=True, allow_symlinks=True, read_bytes=1 << 20, write_bytes=1 << 20, entries=1000, depth=16)
ALL = AllowedActions(mkdir=True, remove=True, rename=True)


def tree_at(folder: Path, *, write: bool = True, only: str = "") -> Tree:
    """A tree with one root."""
    mount = Mount(sub=only, at="/opt/x07", host=str(folder / only), write=write, missing=not folder.exists())
    return Tree(host=str(folder), only=only, mounts=(mount,))


class Trip:
    """A host folder and its copy in the guest."""

    def __init__(self, host: Path, guest: Path) -> None:
        self.host = host
        self.guest = guest
        self.tree = GuestTree(str(guest), guest.stat().st_uid or None)
        self.copied: Copied | None = None

    def go(self, bounds: Bounds = BOUNDS, piece: int = 7000) -> None:
        """Copy the host's folder into the guest."""
        stream = io.BytesIO()
        self.copied = copy_tree(tree_at(self.host), bounds, stream, 1 << 30)
        data = stream.getvalue()
        for at in range(0, len(data), piece):
            self.tree.write(data[at : at + piece])
        self.tree.finish()
        self.tree.wait()

    def back(
        self,
        bounds: Bounds = BOUNDS,
        allowed: AllowedActions = ALL,
        letting: tuple[str, ...] = (),
        data_fd: int = -1,
        room: int = 1 << 30,
    ) -> CheckedChanges:
        """The verdict on the guest's changes. data_fd: lent, for the contents. room: for all contents together."""
        assert self.copied is not None
        fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR) if data_fd < 0 else os.dup(data_fd)
        try:
            incoming = Incoming(fd, roots=1, most_entries=5000, most_bytes=1 << 30)
            incoming.take(Entry(Kind.ROOT, b"0").encoded())
            for part in changes(self.tree, b"", Room(bounds.write_bytes, room)):
                assert incoming.take(part)
            assert incoming.take(Entry(Kind.END, b"").encoded())
            assert incoming.complete
            protection = Protection(str(self.host), (), letting)
            judged = check_changes(
                self.copied.nodes, self.copied.skipped, incoming.reported, bounds, allowed, protection
            )
            for change in judged.changes:
                node = change.after
                if node is not None and node.kind == "file" and node.at is not None and node.mode & 0o7000 == 0:
                    assert os.pread(fd, node.size, node.at) == (self.guest / change.name).read_bytes()
        finally:
            os.close(fd)
        return judged


@pytest.fixture
def trip() -> Iterator[Trip]:
    """Two folders that the program's user can reach."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    for name in ("host", "guest"):
        (place / name).mkdir()
    os.chown(place / "guest", 65532, 65532)
    yield Trip(place / "host", place / "guest")
    shutil.rmtree(place)


def seen(folder: Path) -> dict[str, tuple[object, ...]]:
    """All entries of a folder: kind, mode, content or target, and mtime of files."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[name] = ("folder", stat.S_IMODE(info.st_mode))
        else:
            found[name] = ("file", stat.S_IMODE(info.st_mode), path.read_bytes(), info.st_mtime_ns)
    return found


def fill(folder: Path) -> None:
    """Create one entry of every kind that can be copied."""
    (folder / "a").mkdir()
    (folder / "a/deep er").mkdir(mode=0o700)
    (folder / "a/empty").write_bytes(b"")
    (folder / "a/deep er/n\u00f6ch.txt").write_text("x" * 10_000)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o750)
    (folder / os.fsdecode(b"no \xff utf-8\n")).write_bytes(b"\0" * 10)
    (folder / "link").symlink_to("a/empty")
    (folder / "a/up").symlink_to("../run.sh")
    with (folder / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(900_000)
        file.write(b"end")
    os.utime(folder / "run.sh", ns=(5, 1_234_567_890_123_456_789))
    (folder / "hollow/e").mkdir(parents=True)
    write("hollow/f/x", "in f")(folder)
    (folder / "closed").mkdir()
    (folder / "closed/in").write_text("in it")
    (folder / "closed").chmod(0o555)


@needs_root
def test_a_copy_has_everything(trip: Trip) -> None:
    """A copy has the same names, kinds, modes, contents, targets and mtimes, owned by the program's user."""
    fill(trip.host)
    trip.go()
    assert seen(trip.guest) == seen(trip.host)
    assert {path.lstat().st_uid for path in trip.guest.rglob("*")} == {65532}
    assert (trip.guest / "sparse").stat().st_blocks < 200
    assert trip.back() == CheckedChanges(changes=(), refused=())


def replace_by(path: Path, kind: str) -> None:
    """Replace whatever is at the path by an entry of that kind."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "file":
        path.write_text("content")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("other")
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)


def replace_on_stat(path: Path, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the entry by the next of these kinds each time it is examined."""
    look = os.stat

    def looked(name: Any, **words: Any) -> os.stat_result:  # noqa: ANN401 - whatever os.stat takes
        info = look(name, **words)
        if os.fsdecode(name) == path.name and kinds:
            replace_by(path, kinds.pop(0))
        return info

    monkeypatch.setattr(os, "stat", looked)


@pytest.mark.parametrize("before", ["file", "folder", "link"])
@pytest.mark.parametrize("after", ["file", "folder", "link", "socket", "nothing"])
def test_an_entry_that_changes_its_kind_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """An entry that changes its kind while it is packed is packed as its new kind; one that becomes a folder is not."""
    replace_by(tmp_path / "name", before)
    replace_by(tmp_path / "other", "file")
    replace_on_stat(tmp_path / "name", [after], monkeypatch)
    copied = copy_tree(tree_at(tmp_path), BOUNDS, io.BytesIO(), 1 << 30)
    assert copied.nodes["other"].kind == "file"
    came = copied.nodes.get("name")
    becomes_folder = after == "folder" != before
    assert (came.kind if came else None) == (None if becomes_folder or after in {"socket", "nothing"} else after)
    assert list(copied.left_out) == (["special"] if after == "socket" else ["changing"] if becomes_folder else [])


def test_an_entry_that_keeps_changing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that keeps changing while it is packed is left out."""
    replace_by(tmp_path / "name", "file")
    replace_on_stat(tmp_path / "name", ["link", "file"] * 10, monkeypatch)
    copied = copy_tree(tree_at(tmp_path), BOUNDS, io.BytesIO(), 1 << 30)
    assert (set(copied.nodes), list(copied.left_out)) == ({""}, ["changing"])


@needs_root
@pytest.mark.parametrize("call", ["stat", "pread"])
def test_a_file_with_read_errors_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A file that cannot be read, as on a network share without its server, is left out; the others are copied."""
    replace_by(tmp_path / "name", "file")
    working = getattr(os, call)

    def broken(what: Any, *words: Any, **more: Any) -> Any:  # noqa: ANN401 - as the call has them
        if call == "pread" or what in {"name", b"name"}:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), *(["name"] if call == "stat" else []))
        return working(what, *words, **more)

    monkeypatch.setattr(os, call, broken)
    copied = copy_tree(tree_at(tmp_path), BOUNDS, io.BytesIO(), 1 << 30)
    assert (set(copied.nodes), list(copied.left_out)) == ({""}, ["unreadable" if call == "stat" else "changing"])


def test_a_read_only_entry_is_found_by_inode(trip: Trip) -> None:
    """The inode of an entry in a read root gives the path that the program sees."""
    fill(trip.host)
    trip.go()
    mounts = [
        GuestFolder(0, "", "/data", write=False, changes=False),
        GuestFolder(0, "a", "/data/a", write=True, changes=True),
        GuestFolder(0, "a/deep er", "/deep", write=False, changes=False),
        GuestFolder(None, "", "/x07/in/project", write=True, changes=False),
    ]
    (trip.host / "view/x07/in").mkdir(parents=True)
    known = ProgramPaths({0: trip.tree}, mounts, str(trip.host / "view"))
    device = trip.guest.stat().st_dev
    shown = f"{os.major(device):02x}:{os.minor(device):02x}"
    names = ("", "run.sh", "no \udcff utf-8\n", "a", "a/empty", "a/deep er", "a/deep er/n\u00f6ch.txt")
    found = {name: known.path(shown, (trip.guest / name).stat().st_ino) for name in names}
    assert found == {
        "": "/data",
        "run.sh": "/data/run.sh",
        "no \udcff utf-8\n": "/data/no \\xff utf-8\n",
        "a": "",
        "a/empty": "",
        "a/deep er": "/deep",
        "a/deep er/n\u00f6ch.txt": "/deep/n\u00f6ch.txt",
    }
    inode = (trip.guest / "run.sh").stat().st_ino
    assert known.path("00:00", inode) == ""
    assert known.path(shown, (trip.host / "view/x07/in").stat().st_ino) == "/x07/in"  # a root lies in it
    for name in ("/data/run.sh", "/data/x/y", "/deep", "/data/x/../link"):  # as good as the path
        assert known.path(shown, inode, name) == ""
    for name in ("/", "/tmp/link", "/data/a/link", "/database", "/x07/in/project"):  # noqa: S108 - the guest's
        assert known.path(shown, inode, name) == "/data/run.sh"


@needs_root
def test_a_link_that_a_program_made_is_resolved_for_denials(tmp_path: Path) -> None:
    """A denied execution of a link that the program made names the target; a loop of links has none."""
    (tmp_path / "tmp").mkdir()
    for name, target in (("bin", "/usr/bin"), ("made", "bin/nl"), ("loop", "loop")):
        (tmp_path / "tmp" / name).symlink_to(target)
    paths = ProgramPaths({}, [], str(tmp_path))
    given = ("/tmp/made", "/tmp/loop", "/usr/bin/nl")  # noqa: S108 - the guest's
    assert [paths.link_target(path) for path in given] == ["/usr/bin/nl", "", ""]


def test_every_kind_of_change_is_found(trip: Trip) -> None:
    """Every kind of change in the guest is reported."""
    fill(trip.host)
    trip.go()
    guest = trip.guest
    (guest / "new").mkdir()
    (guest / "new/file").write_text("new")
    (guest / "run.sh").write_text("#!/bin/sh\nexit 1\n")
    (guest / "a/empty").unlink()
    (guest / "link").unlink()
    (guest / "link").symlink_to("run.sh")
    (guest / "closed").chmod(0o755)
    (guest / "sparse").rename(guest / "a/sparse")
    shutil.rmtree(guest / "a/deep er")
    (guest / "a/deep er").write_text("a file now")
    judged = trip.back()
    assert judged.refused == ()
    assert [(change.name, change.action) for change in judged.changes] == [
        ("a/deep er", "changed"),
        ("a/deep er/n\u00f6ch.txt", "deleted"),
        ("a/empty", "deleted"),
        ("a/sparse", "added"),
        ("closed", "changed"),
        ("link", "changed"),
        ("new", "added"),
        ("new/file", "added"),
        ("run.sh", "changed"),
        ("sparse", "deleted"),
    ]


@needs_root
def test_hidden_changes_are_found(trip: Trip) -> None:
    """Changes that keep size and times, swapped files, and writes through mmap are found."""
    import mmap

    for name in ("same", "mapped", "one/x", "two/x"):
        (trip.host / name).parent.mkdir(exist_ok=True)
        (trip.host / name).write_bytes(b"%-10s" % name.encode())
    trip.go()
    guest = trip.guest
    before = (guest / "same").stat()
    (guest / "same").write_bytes(b"other     ")
    os.utime(guest / "same", ns=(before.st_atime_ns, before.st_mtime_ns))
    (guest / "one").rename(guest / "three")
    (guest / "two").rename(guest / "one")
    (guest / "three").rename(guest / "two")
    with (guest / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[:3] = b"MAP"
    assert [change.name for change in trip.back().changes] == ["mapped", "one/x", "same", "two/x"]


@needs_root
def test_hard_links_become_separate_files(trip: Trip) -> None:
    """Hard links on the host become independent files in the guest."""
    (trip.host / "a").write_text("x")
    os.link(trip.host / "a", trip.host / "b")
    trip.go()
    (trip.guest / "a").chmod(0o700)
    assert [(change.name, change.after and change.after.mode) for change in trip.back().changes] == [("a", 0o700)]
    os.link(trip.guest / "b", trip.guest / "c")
    assert [(change.name, change.action) for change in trip.back().changes] == [("a", "changed"), ("c", "added")]


@needs_root
def test_a_file_that_ends_in_a_hole_comes_back_whole(trip: Trip, tmp_path: Path) -> None:
    """Files that end in a hole come back whole."""
    trip.go()
    (trip.guest / "a").write_text("data")
    for name in ("b", "c"):
        with (trip.guest / name).open("wb") as file:
            file.write(b"begin" if name == "b" else b"")
            file.truncate(900_000)
    (trip.guest / "d").touch()
    with (tmp_path / "data").open("w+b") as data:
        changed = trip.back(data_fd=data.fileno()).changes
        root = RootChanges(root=str(trip.host), guest="/opt/x07", missing=False, changes=changed)
        apply(ChangeSet(run="1", roots=(root,)), data.fileno(), tmp_path / "kept")
    for name in ("a", "b", "c", "d"):
        assert (trip.host / name).read_bytes() == (trip.guest / name).read_bytes()
    assert (trip.host / "c").stat().st_blocks == 0


@needs_root
def test_a_touched_file_is_no_change(trip: Trip) -> None:
    """A file rewritten with the same bytes is no change, nor is a temporary one."""
    fill(trip.host)
    trip.go()
    (trip.guest / "run.sh").write_text("#!/bin/sh\n")
    (trip.guest / "short").write_text("lived")
    (trip.guest / "short").unlink()
    os.utime(trip.guest / "a/empty")
    assert trip.back().changes == ()


def write(name: str, text: str = "x") -> Callable[[Path], object]:
    """An action that writes a file and its folders."""

    def do(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return do


def sparse(root: Path) -> None:
    """Make a file of 3 GiB that takes no space."""
    (root / "big").touch()
    os.truncate(root / "big", 3 << 30)


NO_REMOVE = AllowedActions(mkdir=True, remove=False, rename=True)
NO_REMOVE_NO_RENAME = AllowedActions(mkdir=True, remove=False, rename=False)
NO_RENAME = AllowedActions(mkdir=True, remove=True, rename=False)
OPEN = msgspec.structs.replace(BOUNDS, deny_hidden=False)


@needs_root
@pytest.mark.parametrize(
    ("do", "words", "expected"),
    [
        (write("a/.x/y"), {}, [("a/.x", "fs.deny_hidden", False), ("a/.x/y", "fs.deny_hidden", False)]),
        (sparse, {}, [("big", "fs.max_write_bytes", None)]),
        (write("b", "x" * 2000), {"room": 1999}, [("b", "fs.max_write_bytes", None)]),
        (write("big", "x" * 2_000_000), {}, [("big", "fs.max_write_bytes", 2_000_000)]),
        (
            lambda folder: (folder / "l").symlink_to("run.sh"),
            {"bounds": msgspec.structs.replace(BOUNDS, allow_symlinks=False)},
            [("l", "fs.allow_symlinks", True)],
        ),
        (lambda folder: (folder / "l").symlink_to("/etc/passwd"), {}, [("l", "fs.allow_symlinks", None)]),
        (lambda folder: (folder / "d").mkdir(), {"allowed": AllowedActions(mkdir=False, remove=True, rename=True)},
            [("d", "fs.allow_mkdir", True)]),
        (lambda folder: (folder / "run.sh").unlink(), {"allowed": NO_REMOVE},
            [("run.sh", "fs.allow_remove", True)]),
        (lambda folder: (folder / "run.sh").rename(folder / "b"), {"allowed": NO_REMOVE}, []),
        (lambda folder: (folder / "run.sh").rename(folder / "b"), {"allowed": NO_REMOVE_NO_RENAME},
            [("run.sh", "fs.allow_rename", True)]),
        (lambda folder: (folder / "run.sh").rename(folder / "a/empty"), {"allowed": NO_RENAME},
            [("run.sh", "fs.allow_rename", True)]),
        (lambda folder: (folder / "run.sh").unlink(), {"allowed": NO_RENAME}, []),
        (lambda folder: (folder / "hollow").rename(folder / "other"), {"allowed": NO_REMOVE}, []),
        (lambda folder: (folder / "hollow").rename(folder / "other"), {"allowed": NO_REMOVE_NO_RENAME},
            [(name, "fs.allow_rename", True) for name in ("hollow", "hollow/e", "hollow/f", "hollow/f/x")]),
        (lambda folder: shutil.rmtree(folder / "hollow"), {"allowed": NO_REMOVE},
            [(name, "fs.allow_remove", True) for name in ("hollow", "hollow/e", "hollow/f", "hollow/f/x")]),
        (lambda folder: (folder / "closed").rename(folder / "open"), {"allowed": NO_RENAME},
            [("closed", "fs.allow_rename", True), ("closed/in", "fs.allow_rename", True)]),
        (lambda folder: (folder / "run.sh").chmod(0o4755), {}, [("run.sh", "kind", None)]),
        (lambda folder: (folder / "a").chmod(0o2755), {}, [("a", "kind", None)]),
        (lambda folder: os.mknod(folder / "dev", stat.S_IFBLK | 0o600, 0), {}, [("dev", "kind", None)]),
        (lambda folder: os.setxattr(folder / "run.sh", "user.x", b"1"), {}, [("run.sh", "kind", None)]),
        (lambda folder: os.setxattr(folder, "user.x", b"1"), {}, [("", "kind", None)]),
        (write("/".join("d" * 20)), {}, [("/".join("d" * 17), "fs.max_depth", 20)]),
        (write(".bashrc"), {}, [(".bashrc", "protected", None), (".bashrc", "fs.deny_hidden", False)]),
    ],
)  # fmt: skip
def test_a_refused_change_names_its_rule(
    trip: Trip, do: Callable[[Path], object], words: dict[str, Any], expected: list[tuple[str, str, object]]
) -> None:
    """Each refused change names its entry, its rule, and the policy value that would allow it."""
    fill(trip.host)
    trip.go()
    do(trip.guest)
    judged = trip.back(**words)
    found = [(refusal.name, refusal.rule, refusal.value) for refusal in judged.refused]
    assert sorted(found, key=str) == sorted(expected, key=str)


# any tree


ODD = (
    *("a" * 61, "ö" * 127, "x" * 255, "blank ", " ", "dot.", "...", ".hidden", "-x", "a\nb", "\x1b[m"),
    os.fsdecode(b"\xff\xfe"),
)
NAMES = st.sampled_from(ODD) | st.binary(min_size=1, max_size=70).map(
    lambda name: os.fsdecode(name.translate(None, b"/\0"))
)
NAMES = NAMES.filter(lambda name: name not in {"", ".", ".."} and not name.startswith(STAGING))
TARGETS = st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: os.fsencode("/".join(parts)))
ANY = msgspec.structs.replace(OPEN, secrets=(), depth=64, entries=5000)
DEEP: dict[str, Any] = {"last ": ("file", 0o777, b"")}
for _ in range(60):
    DEEP = {"d": (0o755, DEEP)}
EVERYTHING = flat(
    0o755,
    {
        **{name: ("file", 0o600, os.fsencode(name)) for name in ODD},
        "links": (0o500, {"up": ("link", 0, b"../blank "), "down": ("link", 0, b"nothing/" + b"y" * 90)}),
        "empty": (0, {}),
        "closed": ("file", 0o400, b"only its owner may read it"),
        "deep": (0o755, DEEP),
    },
)


def round_trip(tree: FileTree, place: Path, data_fd: int) -> CheckedChanges:
    """The reported changes of a program that creates this tree, after checking the guest's copy of it."""
    here, there, again, back = (place / name for name in ("here", "there", "again", "back"))
    for folder in (there, again, back):
        folder.mkdir()
        os.chown(folder, 65532, 65532)
    put(here, tree)
    going = Trip(here, there)
    going.go(ANY)
    assert going.copied is not None
    assert going.copied.left_out == {}
    assert seen(there) == seen(here)
    assert going.back(ANY, letting=("*",)) == CheckedChanges(changes=(), refused=())
    coming = Trip(back, again)
    coming.go(ANY)
    again.rmdir()
    put(again, tree)
    judged = coming.back(ANY, letting=("*",), data_fd=data_fd)
    assert judged.refused == ()
    nodes = {change.name: msgspec.structs.replace(change.after, at=None) for change in judged.changes if change.after}
    assert nodes == {name: node for name, node in going.copied.nodes.items() if name}
    return judged


@needs_root
@settings(max_examples=400 if FULL else 20)  # each makes four trees on the disk
@given(tree=trees(NAMES, TARGETS))
def test_any_tree_survives_the_round_trip(tree: FileTree) -> None:
    """Any tree arrives unchanged in the guest and is reported exactly when created there."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as data:
        round_trip(tree, Path(place), data.fileno())


@needs_root
def test_an_odd_tree_is_applied_as_it_was() -> None:
    """Odd names, deep nesting, closed folders and links come back exactly."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as data:
        judged = round_trip(EVERYTHING, Path(place), data.fileno())
        root = RootChanges(root=f"{place}/back", guest="/g", missing=False, changes=judged.changes)
        apply(ChangeSet(run="1-1-1", roots=(root,)), data.fileno(), Path(place, "set"))
        back, here = ({name: what[:3] for name, what in seen(Path(place, at)).items()} for at in ("back", "here"))
        assert back == here
