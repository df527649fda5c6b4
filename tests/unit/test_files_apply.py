"""Applying change sets: all or nothing, undoable exactly, despite concurrent writers and kills."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import posixpath
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.conftest import need
from tests.unit.apply_driver import STRIDE
from tests.unit.apply_trees import NEW, OLD, Tree, applied, difference, full_disk, put, read, remove, trees, undone
from x07_sandbox.errors import HostError
from x07_sandbox.files.apply import ConflictError, apply, recover
from x07_sandbox.files.changes import Change, ChangeSet, Node, RootChanges, decode
from x07_sandbox.host.paths import closing_fd

if TYPE_CHECKING:
    from collections.abc import Iterator


PROJECT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")  # noqa: S108 - a folder of the test's own is made in it
FAST = SHM if os.path.ismount(SHM) else None
NOBODY = 65534
FOLDER = ("folder", 0o755, b"")


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder for roots; the tmpfs one is on another file system than its undo data."""
    if request.param == "disk":
        yield tmp_path
        return
    need(os.path.ismount(SHM), "a tmpfs at /dev/shm", installable=False)
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        yield Path(name)
        opened(Path(name))


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder on tmpfs if there is one, so that a thousand attempts do not wait for a disk."""
    with tempfile.TemporaryDirectory(dir=FAST or tmp_path) as name:
        yield Path(name)
        opened(Path(name))


@pytest.fixture(autouse=True)
def removable(tmp_path: Path) -> Iterator[None]:
    """Open folders that are closed to their owner, so that pytest can remove them."""
    yield
    opened(tmp_path)


def opened(top: Path) -> None:
    """Make all folders below *top* removable."""
    for folder, names, _ in os.walk(top):
        for name in names:
            if not Path(folder, name).is_symlink():
                Path(folder, name).chmod(0o700)


def make(path: Path, tree: Tree) -> Path:
    """Create the tree at a path and return the path."""
    put(path, tree)
    return path


def driven(what: str, folder: Path, *words: str, before: tuple[str, ...] = ()) -> str:
    """The output of tests/unit/apply_driver.py."""
    argv = [*before, sys.executable, "-m", "tests.unit.apply_driver", what, str(folder), *words]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def file_node(data: bytes, at: int | None = None, mode: int = 0o644) -> Node:
    """A file with that content."""
    return Node(kind="file", mode=mode, size=len(data), sha256=hashlib.sha256(data).hexdigest(), at=at)


def one_set(root: Path, *changes: Change, missing: bool = False) -> ChangeSet:
    """A change set with one root."""
    return ChangeSet(run="1-2-3", roots=(RootChanges(root=str(root), guest="/g", missing=missing, changes=changes),))


def test_apply_and_undo_are_exact(place: Path, tmp_path: Path) -> None:
    """Every kind of change is applied, undone exactly, and applied again by undoing the undo."""
    root = make(place / "root", OLD)
    changes, data = difference(root, OLD, NEW)
    inverse = applied(changes, data, tmp_path / "state")
    assert read(root) == NEW
    assert inverse == decode((tmp_path / "state" / "undo" / "changes.json").read_bytes())
    undone(tmp_path / "state")
    assert read(root) == OLD
    undone(tmp_path / "state", tmp_path / "other")
    assert read(root) == NEW
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["undo"]


@pytest.mark.parametrize("missing", [False, True])
def test_a_second_part_is_refused(tmp_path: Path, *, missing: bool) -> None:
    """A set applied in parts never loses undo data: a second part is refused until the first is undone."""
    root, state = tmp_path / "root", tmp_path / "state"
    old: Tree = {"": FOLDER} if missing else {"": FOLDER, **dict.fromkeys("abc", ("file", 420, b"old"))}
    new: Tree = {"": FOLDER, **dict.fromkeys("abc", ("file", 420, b"new"))}
    if not missing:
        put(root, old)
    parts = [difference(root, old, {**old, **{name: new[name] for name in names}}, missing=missing) for names in PARTS]
    first, rest, whole = parts
    applied(*first, state)
    here = read(root)
    for part in (rest, whole):
        with pytest.raises(ConflictError, match="Run x07 undo"):
            applied(*part, state)
        assert read(root) == here
    assert applied(*first, state).roots == ()
    undone(state, tmp_path / "other")
    assert read(root) == old if not missing else not root.exists()
    applied(*whole, state)
    assert read(root) == new
    undone(state, tmp_path / "more")
    assert read(root) == old if not missing else not root.exists()


PARTS = ("bc", "a", "abc")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("changed", ("file", 0o644, b"as it WAS")),
        ("changed", ("file", 0o640, b"as it was")),
        ("changed", ("link", 0, b"kept")),
        ("changed", None),
        ("deleted", None),
        ("link", ("link", 0, b"changes")),
        ("open", ("folder", 0o700, b"")),
        ("gone/deep/more", ("file", 0o600, b"")),
        ("added", ("file", 0o600, b"there first")),
        ("added", NEW["added"]),  # as it is to become, while others are not
        ("added-tree", ("folder", 0o700, b"")),
    ],
)
def test_a_change_on_the_host_is_a_conflict(tmp_path: Path, name: str, entry: Any) -> None:  # noqa: ANN401
    """If an entry of the set changed on the host, nothing is applied and the conflict names it."""
    now = {known: one for known, one in {**OLD, name: entry}.items() if one is not None}
    root = make(tmp_path / "root", now)
    with pytest.raises(ConflictError) as caught:
        applied(*difference(root, OLD, NEW), tmp_path / "state")
    assert caught.value.names == (str(root / name),)
    assert (caught.value.count, str(root / name) in str(caught.value)) == (1, True)
    assert read(root) == now


@pytest.mark.parametrize("now", ["link", "nothing", "file"])
def test_a_conflict_is_found_before_anything_is_touched(tmp_path: Path, now: str) -> None:
    """A conflict in a parent folder is found before anything is changed."""
    root = make(tmp_path / "root", {"": FOLDER, "to": FOLDER})
    if now == "link":
        (root / "d").symlink_to("to")
    elif now == "file":
        (root / "d").touch(0o644)
    before = root.stat().st_ctime_ns
    old, new = {"": FOLDER, "d": FOLDER}, {"": FOLDER, "d": FOLDER, "d/a": FOLDER}
    with pytest.raises(ConflictError) as caught:
        applied(*difference(root, old, new), tmp_path / "state")
    assert caught.value.names == (str(root / "d" / "a"),)
    assert root.stat().st_ctime_ns == before


def test_a_conflict_names_a_hundred_entries_at_most(tmp_path: Path) -> None:
    """A conflict names at most a hundred entries and counts the rest."""
    tree = {"": FOLDER, **{f"{n:03}": ("file", 0o600, b"") for n in range(150)}}
    root = make(tmp_path / "root", {"": FOLDER})
    with pytest.raises(ConflictError, match="and 145 more") as caught:
        applied(*difference(root, tree, {"": FOLDER, "new": FOLDER}), tmp_path / "state")
    assert (len(caught.value.names), caught.value.count) == (100, 150)


@pytest.mark.parametrize(
    "change",
    [
        Change(name="a", before=None, after=Node(kind="file", mode=0o4755, sha256="0" * 64, at=0)),
        Change(name="a", before=None, after=Node(kind="folder", mode=0o1777)),
        Change(name="a", before=None, after=Node(kind="folder", mode=-1)),
        Change(name="a", before=None, after=Node(kind="file", mode=0o644, sha256="0" * 64)),
        Change(name="a", before=None, after=Node(kind="file", mode=0o644, sha256="0" * 63, at=0)),
        Change(name="a", before=None, after=Node(kind="file", mode=0o644, size=-1, sha256="0" * 64, at=0)),
        Change(name="a", before=None, after=Node(kind="link")),
        Change(name="a", before=None, after=Node(kind="link", target="a\0b")),
        *(
            Change(name=name, before=None, after=Node(kind="folder", mode=0o755))
            for name in ("..", "../x", "/x", "a//b", "a/./b", "a/../b", "a\0", "a/", ".x07-apply-0", "a/.x07-apply-0")
        ),
    ],
)
def test_an_invalid_change_rejects_the_set(tmp_path: Path, change: Change) -> None:
    """A set with set-id bits, escaping names or missing content is rejected before anything is changed."""
    root = make(tmp_path / "root", OLD)
    good = Change(name="fine", before=None, after=Node(kind="folder", mode=0o755))
    with pytest.raises(ValueError, match="below"):
        applied(one_set(root, change, good), b"", tmp_path / "state")
    assert read(root) == OLD
    assert not (tmp_path / "state").exists()


def test_a_set_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """A self-contradictory set is rejected: duplicate names or roots, overlaps, entries below a non-folder."""
    made = Change(name="a", before=None, after=Node(kind="folder", mode=0o755))
    below = Change(name="a/b", before=None, after=Node(kind="folder", mode=0o755))
    link = Change(name="a", before=None, after=Node(kind="link", target="x"))
    good = one_set(tmp_path, made).roots[0]
    wrong = [
        [one_set(tmp_path, made, made).roots[0]],
        [one_set(tmp_path, link, below).roots[0]],
        [good, good],
        [good, msgspec.structs.replace(good, root=str(tmp_path / "a"))],
        [one_set(tmp_path, made, below).roots[0], msgspec.structs.replace(good, root=str(tmp_path / "a"))],
        [one_set(tmp_path, link).roots[0], msgspec.structs.replace(good, root=str(tmp_path / "a/in"))],
        *([msgspec.structs.replace(good, root=path)] for path in ("x", "/a/../b", "//a", "/a/", "/a\0")),
        [msgspec.structs.replace(good, root="/", missing=True)],
    ]
    for roots in wrong:
        with pytest.raises(ValueError, match=r"root|below"):
            applied(ChangeSet(run="1", roots=tuple(roots)), b"", tmp_path / "state")
    assert not (tmp_path / "a").exists()


def test_roots_in_each_other_are_changed_apart(tmp_path: Path) -> None:
    """Nested roots are applied and undone together."""
    made = Change(name="made", before=None, after=Node(kind="folder", mode=0o755))
    outer, inner = tmp_path / "root", tmp_path / "root/kept/in"
    inner.mkdir(parents=True)
    changes = ChangeSet(run="1", roots=(*one_set(outer, made).roots, *one_set(inner, made).roots))
    undoing = applied(changes, b"", tmp_path / "state")
    assert (outer / "made").is_dir()
    assert (inner / "made").is_dir()
    applied(undoing, b"", tmp_path / "state/undoing")
    assert [path.name for path in sorted(outer.rglob("*"))] == ["kept", "in"]


@pytest.mark.parametrize("damage", ["content", "short"])
def test_damaged_content_is_not_written(tmp_path: Path, damage: str) -> None:
    """A damaged or truncated data file changes nothing."""
    root = make(tmp_path / "root", OLD)
    changes, data = difference(root, OLD, NEW)
    wrong = data[:-1] if damage == "short" else data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(HostError, match="is damaged"):
        applied(changes, wrong, tmp_path / "state")
    assert read(root) == OLD


def test_a_root_can_be_one_file(place: Path, tmp_path: Path) -> None:
    """A root that is a single file can be changed, removed, replaced and undone."""
    trees: list[Tree] = [
        {"": ("file", 0o644, b"one")},
        {"": ("file", 0o755, b"two")},
        {},
        {"": ("folder", 0o755, b""), "a": ("file", 0o600, b"in it")},
        {"": ("link", 0, b"beside")},
    ]
    (place / "beside").write_bytes(b"stays")
    root = place / "root"
    put(root, trees[0])
    for number, (old, new) in enumerate(itertools.pairwise(trees)):
        applied(*difference(root, old, new), tmp_path / str(number))
        assert (read(root) if new else os.path.lexists(root)) == (new or False)
    for number in reversed(range(len(trees) - 1)):
        undone(tmp_path / str(number))
    assert read(root) == trees[0]
    assert (place / "beside").read_bytes() == b"stays"


@pytest.mark.parametrize("now", ["nothing", "empty folder", "something", "a link"])
def test_a_root_that_was_missing_is_made(place: Path, tmp_path: Path, now: str) -> None:
    """A missing root is created with its contents, and removed by undo."""
    root, new = place / "root", {"": FOLDER, "a": FOLDER, "a/b": ("file", 0o644, b"x")}
    changes, data = difference(root, {"": FOLDER}, new, missing=True)
    if now == "a link":
        root.symlink_to(tmp_path)
    elif now != "nothing":
        put(root, {"": FOLDER} if now == "empty folder" else {"": FOLDER, "c": FOLDER})
    if now in {"something", "a link"}:
        with pytest.raises(ConflictError) as caught:
            applied(changes, data, tmp_path / "state")
        assert caught.value.names[0] == str(root)
        assert not (root / "a").exists()
        return
    umask = os.umask(0o022)
    try:
        applied(changes, data, tmp_path / "state")
        assert read(root) == new
        assert applied(changes, data, tmp_path / "state").roots == ()
        undone(tmp_path / "state")
    finally:
        os.umask(umask)
    assert root.exists() == (now == "empty folder")


def test_a_root_that_is_reached_by_a_link_is_a_conflict(tmp_path: Path) -> None:
    """A root reached through a symbolic link is a conflict."""
    make(tmp_path / "root", OLD)
    (tmp_path / "way").symlink_to(tmp_path)
    (tmp_path / "last").symlink_to(tmp_path / "root")
    for root in (tmp_path / "way" / "root", tmp_path / "last", tmp_path / "nothing"):
        with pytest.raises(ConflictError) as caught:
            applied(*difference(root, OLD, NEW), tmp_path / "state")
        assert caught.value.names == (str(root),)
    assert read(tmp_path / "root") == OLD


def test_several_roots_are_one_set(place: Path, tmp_path: Path) -> None:
    """A conflict in one root leaves all roots of the set unchanged."""
    for name in ("a", "b"):
        (place / name).write_bytes(b"old")
    make(place / "root", OLD)
    whole, data = difference(place / "root", OLD, NEW)
    change = Change(name="", before=file_node(b"old"), after=file_node(b"new", at=len(data)))
    roots = (one_set(place / name, change).roots[0] for name in ("b", "a"))
    every = ChangeSet(run="1", roots=(whole.roots[0], *roots))
    for name in ("a", "b"):
        (place / name).chmod(0o644)
    (place / "b").write_bytes(b"another")
    with pytest.raises(ConflictError):
        applied(every, data + b"new", tmp_path / "state")
    assert (read(place / "root"), (place / "a").read_bytes()) == (OLD, b"old")
    (place / "b").write_bytes(b"old")
    applied(every, data + b"new", tmp_path / "state")
    assert (read(place / "root"), (place / "a").read_bytes(), (place / "b").read_bytes()) == (NEW, b"new", b"new")
    undone(tmp_path / "state")
    assert (read(place / "root"), (place / "a").read_bytes(), (place / "b").read_bytes()) == (OLD, b"old", b"old")


def test_holes_stay_holes(place: Path, tmp_path: Path) -> None:
    """Sparse files stay sparse when they are applied, saved for undo, and restored."""
    root = make(place / "root", {"": FOLDER, "big": ("file", 0o644, b"")})
    size = 8 << 20
    with (root / "big").open("r+b") as file:
        file.truncate(size)
        file.seek(2 << 20)
        file.write(b"old")
    old = (root / "big").read_bytes()
    new = bytearray(size)
    new[4 << 20 : (4 << 20) + 3] = b"new"
    with (tmp_path / "data").open("wb+") as file:
        file.seek(4096 + (4 << 20))
        file.write(b"new")
        file.truncate(4096 + size)
        file.flush()
        changes = one_set(root, Change(name="big", before=file_node(old), after=file_node(bytes(new), at=4096)))
        apply(changes, file.fileno(), tmp_path / "state")
    assert (root / "big").read_bytes() == new
    kept = tmp_path / "state" / "undo" / "data"
    assert [(path.stat().st_size, path.stat().st_blocks * 512 < 1 << 20) for path in (root / "big", kept)] == [
        (size, True),
        (size, True),
    ]
    undone(tmp_path / "state")
    assert (root / "big").read_bytes() == old
    assert (root / "big").stat().st_blocks * 512 < 1 << 20


def test_modes_are_exact_whatever_the_umask(tmp_path: Path) -> None:
    """Modes are applied exactly whatever the umask; folders keep their setgid and sticky bits."""
    root = make(tmp_path / "root", {"": FOLDER, "d": FOLDER})
    (root / "d").chmod(0o3755)
    new = {"": FOLDER, "d": ("folder", 0o777, b""), "e": ("folder", 0o777, b""), "f": ("file", 0o666, b"")}
    umask = os.umask(0o077)
    try:
        applied(*difference(root, {"": FOLDER, "d": FOLDER}, new), tmp_path / "state")
    finally:
        os.umask(umask)
    assert {name: mode for name, (_, mode, _) in read(root).items()} == {"": 0o755, "d": 0o3777, "e": 0o777, "f": 0o666}


def test_a_replaced_file_keeps_its_attributes(tmp_path: Path) -> None:
    """Extended attributes of a replaced file survive apply and undo."""
    root = make(tmp_path / "root", {"": FOLDER, "f": ("file", 0o444, b"old")})
    (root / "f").chmod(0o644)
    os.setxattr(root / "f", "user.note", b"mine")
    (root / "f").chmod(0o444)
    changes, data = difference(
        root, {"": FOLDER, "f": ("file", 0o444, b"old")}, {"": FOLDER, "f": ("file", 0o400, b"new")}
    )
    applied(changes, data, tmp_path / "state")
    assert os.getxattr(root / "f", "user.note") == b"mine"
    undone(tmp_path / "state")
    assert (os.getxattr(root / "f", "user.note"), (root / "f").read_bytes()) == (b"mine", b"old")


def test_a_hard_link_is_a_file_of_its_own(place: Path, tmp_path: Path) -> None:
    """Changing one name of a hard-linked file changes no other name."""
    names = ("a", "b", "c", "d", "closed")
    old: Tree = {"": FOLDER, **dict.fromkeys(names, ("file", 0o400, b"old"))}
    old |= dict.fromkeys(("a", "b", "c", "d"), ("file", 0o644, b"old"))
    root = make(place / "root", {"": FOLDER})
    for name, (_, mode, data) in old.items():
        if name:
            outside = place / f"outside {mode:o}"
            if not outside.exists():
                outside.write_bytes(data)
                outside.chmod(mode)
            os.link(outside, root / name)
    before = {path.name: path.stat().st_mode for path in place.glob("outside*")}
    new: Tree = {"": FOLDER, "a": ("file", 0o777, b"old"), "b": ("file", 0o755, b"old"), "c": ("file", 0o644, b"new")}
    changes, data = difference(root, old, new)
    applied(changes, data, tmp_path / "state")
    assert read(root) == new
    assert applied(changes, data, tmp_path / "state").roots == ()
    assert {path.name: path.stat().st_mode for path in place.glob("outside*")} == before
    os.link(root / "a", root / "b2")
    undone(tmp_path / "state")
    assert read(root) == {**old, "b2": new["a"]}
    assert (place / "outside 644").read_bytes() == b"old"


@pytest.mark.root
def test_a_replaced_file_keeps_its_owner_or_is_not_replaced(tmp_path: Path) -> None:
    """A replaced file keeps its owner and group; a user who may not set them changes nothing."""
    need(os.geteuid() == 0, "root", installable=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)
        root = make(base / "root", {"": FOLDER, "f": ("file", 0o644, b"old")})
        os.chown(root / "f", 1234, 4321)
        old, new = {"": FOLDER, "f": ("file", 0o644, b"old")}, {"": FOLDER, "f": ("file", 0o600, b"new")}
        applied(*difference(root, old, new), tmp_path / "state")
        info = (root / "f").stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (1234, 4321, 0o600)
        undone(tmp_path / "state")
        info = (root / "f").stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (1234, 4321, 0o644)
        for path in (base / "mine", root):
            path.mkdir(exist_ok=True)
            if path == root:  # which NOBODY may not even make a folder in
                assert f"{os.strerror(errno.EACCES)} ('{root}')" in driven("refused-owner", base, str(NOBODY))
            os.chown(path, NOBODY, NOBODY)
        fix = "Apply the changes as the owner of the files and a member of their groups"
        for owner in (1234, NOBODY):  # of a group that is another's in both cases
            os.chown(root / "f", owner, 4321)
            reported = driven("refused-owner", base, str(NOBODY))
            assert f"{os.strerror(errno.EPERM)} ('{root}/f'). {fix}" in reported
        assert read(root) == old


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """If new content does not fit on the disk, nothing is changed and the error gives the reason."""
    root = make(tmp_path / "root", OLD)
    new = {**OLD, "big": ("file", 0o644, b"x" * 300_000)}
    changes, data = difference(root, OLD, new)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with full_disk(100_000), pytest.raises(HostError, match=os.strerror(errno.EFBIG)):
            apply(changes, file.fileno(), tmp_path / "state")
    assert read(root) == OLD
    assert list((tmp_path / "state").iterdir()) == []


def test_without_room_for_undo_nothing_is_changed(tmp_path: Path) -> None:
    """If the undo data does not fit on the disk, nothing is changed and the error gives the reason."""
    old, new = {"": FOLDER, "big": ("file", 0o644, b"x" * 300_000)}, {"": FOLDER, "small": ("file", 0o644, b"y")}
    root = make(tmp_path / "root", old)
    with full_disk(100_000), pytest.raises(HostError, match=os.strerror(errno.EFBIG)):
        applied(*difference(root, old, new), tmp_path / "state")
    assert read(root) == old
    assert list((tmp_path / "state").iterdir()) == []
    applied(*difference(root, old, new), tmp_path / "state")
    undone(tmp_path / "state")
    assert read(root) == old


def test_undo_works_on_a_full_disk(tmp_path: Path) -> None:
    """Undo works on a full disk."""
    old, new = {"": FOLDER}, {"": FOLDER, "big": ("file", 0o644, b"x" * 300_000)}
    root = make(tmp_path / "root", old)
    undoing = applied(*difference(root, old, new), tmp_path / "state")
    with full_disk(100_000), (tmp_path / "state/undo/data").open("rb") as data:
        apply(undoing, data.fileno(), tmp_path / "state/undoing")
    assert read(root) == old
    assert list((tmp_path / "state").iterdir()) == [tmp_path / "state/undoing"]
    assert list((tmp_path / "state/undoing").iterdir()) == []


def test_a_damaged_journal_is_reported(tmp_path: Path) -> None:
    """A damaged journal is an error that names it, and nothing is changed."""
    (tmp_path / "state").mkdir(mode=0o700)
    for text in (b"", b"{}\n", b"\xff\n", b'{"version":2,"run":"","places":[]}\n'):
        (tmp_path / "state" / "journal").write_bytes(text)
        with pytest.raises(HostError, match="cannot read the journal"):
            recover(tmp_path / "state")
        assert (tmp_path / "state" / "journal").read_bytes() == text


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_applying_to_a_locked_root_waits(tmp_path: Path, *, is_exchanged: bool) -> None:
    """Applying to a locked root waits, and reports the path once; a root that is replaced meanwhile is a conflict."""
    root = make(tmp_path / "root", OLD)
    make(tmp_path / "another", OLD)
    waits: list[str] = []
    with closing_fd(os.open(root, os.O_RDONLY)) as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def let_go(path: str) -> None:
            waits.append(path)
            assert read(root) == OLD
            if is_exchanged:
                root.rename(tmp_path / "first")
                (tmp_path / "another").rename(root)
            fcntl.flock(held, fcntl.LOCK_UN)

        if is_exchanged:
            with pytest.raises(ConflictError) as caught:
                applied(*difference(root, OLD, NEW), tmp_path / "state", let_go)
            assert caught.value.names == (str(root),)
            assert read(tmp_path / "first") == OLD
        else:
            applied(*difference(root, OLD, NEW), tmp_path / "state", let_go)
    assert waits == [str(root)]
    assert read(root) == (OLD if is_exchanged else NEW)


def test_a_kill_at_any_call_leaves_the_old_tree_or_the_new_one(fast: Path) -> None:
    """A kill at any call of apply or recovery leaves the old tree or the new one."""
    old, new = (int(part.split()[0]) for part in driven("killed", fast).split(", "))
    assert old * STRIDE > 50
    assert new * STRIDE > 10


@pytest.mark.root
def test_a_kill_leaves_one_tree_of_an_ordinary_user(fast: Path) -> None:
    """A kill at any call leaves the old tree or the new one for an ordinary user with closed folders."""
    need(os.geteuid() == 0, "root, that can become a user", installable=False)
    os.chown(fast, NOBODY, NOBODY)
    assert driven("killed", fast, str(NOBODY))


@pytest.mark.root
def test_a_root_can_be_closed_to_its_owner(fast: Path) -> None:
    """A change may make a root read-only, and a kill leaves no staging files in it."""
    need(os.geteuid() == 0, "root, that can become a user", installable=False)
    os.chown(fast, NOBODY, NOBODY)
    assert int(driven("closed-root", fast, str(NOBODY))) > 20


@pytest.mark.root
def test_a_kill_leaves_one_tree_on_fuse(fast: Path) -> None:
    """A kill at any call leaves the old tree or the new one on NFS and FUSE."""
    need(os.geteuid() == 0, "root", installable=False)
    need(shutil.which("bindfs"), "bindfs", installable=True)
    need(Path("/dev/fuse").exists(), "FUSE", installable=False)
    assert driven("killed-on-fuse", fast, before=("/usr/bin/unshare", "--mount"))


@pytest.mark.root
def test_nothing_is_applied_below_a_mount(fast: Path) -> None:
    """A set with a path on which something else is mounted is refused, and changes nothing there."""
    need(os.geteuid() == 0, "root", installable=False)
    reported = driven("mounted", fast, before=("/usr/bin/unshare", "--mount"))
    assert reported.count(f"a mount point is on the path '{fast}/root/gone") == 2


def test_concurrent_files_are_never_lost(fast: Path) -> None:
    """A file that another process replaces or writes during apply is never lost."""
    assert driven("disturbed", fast)
    assert driven("written", fast)


def test_a_swapped_link_redirects_nothing(fast: Path) -> None:
    """A folder that is replaced by a symbolic link during apply never redirects changes."""
    assert driven("led-outside", fast)


def test_two_sets_at_once_are_one_after_the_other(fast: Path) -> None:
    """If two conflicting sets are applied at once, one succeeds and the other reports a conflict."""
    assert driven("together", fast)


def test_it_works_without_exchange(fast: Path) -> None:
    """Apply, undo and recovery work on file systems without RENAME_EXCHANGE and RENAME_NOREPLACE."""
    assert driven("without-exchange", fast)


def test_nothing_is_applied_without_openat2(fast: Path) -> None:
    """On a kernel without openat2, applying changes fails with advice, and nothing changes."""
    assert "without a seccomp filter that blocks openat2" in driven("without-openat2", fast)


NAMES = st.sampled_from(["a", "b", "c", "a-", "é", "x y", "\udcff", "\n"])
TREES = trees(NAMES, st.sampled_from([b"a", b"/", b"../..", b"\xff"]))


def _closed(old: Tree, new: Tree) -> bool:
    """Return whether something changes in a folder that the current user may not write to."""
    changed = [name for name in old.keys() | new.keys() if name and old.get(name) != new.get(name)]
    folders = [posixpath.dirname(name) for name in changed]
    stay = [old[name] for name in folders if name in old and old[name] == new.get(name)]
    return os.geteuid() != 0 and any(kind == "folder" and not mode & 0o200 for kind, mode, _ in stay)


@given(TREES, TREES)
@example(OLD, NEW)
@example(NEW, OLD)
def test_any_tree_becomes_any_other_and_comes_back(old: Tree, new: Tree) -> None:
    """Any tree can be changed into any other and back, and applying twice changes nothing more."""
    assume(not _closed(old, new))  # the system says no, and so do we
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        root, state = Path(name) / "root", Path(name) / "state"
        try:
            put(root, old)
            changes, data = difference(root, old, new)
            inverse = applied(changes, data, state)
            assert read(root) == new
            assert applied(changes, data, state).roots == ()
            if old != new:
                assert inverse.roots
                with pytest.raises(ConflictError):
                    applied(*difference(root, {**old, "never": FOLDER}, {**new, "more": FOLDER}), state)
                assert read(root) == new
            undone(state)
            assert read(root) == old
        finally:
            remove(root)


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o755, 0o710])
def test_a_file_system_without_modes_is_supported(tmp_path: Path, mode: int) -> None:
    """Changes are applied and undone on a file system that gives every file the same mode."""
    need(os.geteuid() == 0, "root", installable=False)
    need(shutil.which("bindfs"), "bindfs", installable=True)
    folder = ("folder", mode, b"")
    old: Tree = {"": folder, "a": ("file", mode, b"old"), "gone": folder, "gone/b": ("file", mode, b"b")}
    new: Tree = {"": FOLDER, "a": ("file", 0o644, b"new"), "run": ("file", 0o600, b"new"), "d": ("folder", 0o700, b"")}
    new["d/c"] = ("file", 0o444, b"c")
    for name in ("disk", "shown"):
        (tmp_path / name).mkdir()
    root = tmp_path / "shown/root"
    mount = ["bindfs", "--chmod-ignore", f"--perms={mode:04o}", str(tmp_path / "disk"), str(root.parent)]
    need(subprocess.run(mount, check=False, capture_output=True).returncode == 0, "FUSE", installable=False)
    try:
        put(root, old)
        changes, data = difference(root, old, new)
        applied(changes, data, tmp_path / "state")
        assert {name: entry[2] for name, entry in read(root).items()} == {name: entry[2] for name, entry in new.items()}
        assert applied(changes, data, tmp_path / "state").roots == ()  # already applied
        undone(tmp_path / "state", tmp_path / "other")
        assert read(root) == old
        applied(changes, data, tmp_path / "again")
        assert (root / "a").read_bytes() == b"new"
        modes = {name: (kind, 0o700 if kind == "folder" else 0o600, text) for name, (kind, _, text) in old.items()}
        undone(tmp_path / "again", tmp_path / "more")
        applied(*difference(root, old, modes), tmp_path / "modes")
        undone(tmp_path / "modes", tmp_path / "last")
        assert read(root) == old
    finally:
        subprocess.run(["/usr/bin/umount", str(root.parent)], check=True)
