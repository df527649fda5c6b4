"""Promises about folders for state and images: where they are, and that they are ours alone."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.host.paths import cache_dir, private_dir, read_bounded, state_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

NOBODY = 65534
VARIABLES = ("X07_VM_CACHE_DIR", "X07_VM_STATE_DIR", "XDG_CACHE_HOME", "HOME")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the variables that name a place."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def mode(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_named_folder_comes_before_all_others(environment: pytest.MonkeyPatch) -> None:
    """X07_VM_STATE_DIR and X07_VM_CACHE_DIR are taken as they are; then XDG_CACHE_HOME; then the home folder."""
    environment.setenv("HOME", "/home/u")
    assert (str(state_dir()), str(cache_dir())) == ("/home/u/.x07/vm/jobs", "/home/u/.cache/x07-sandbox")
    environment.setenv("XDG_CACHE_HOME", "/xdg")
    assert (str(state_dir()), str(cache_dir())) == ("/home/u/.x07/vm/jobs", "/xdg/x07-sandbox")
    environment.setenv("X07_VM_STATE_DIR", "/state")
    environment.setenv("X07_VM_CACHE_DIR", "/cache")
    assert (str(state_dir()), str(cache_dir())) == ("/state", "/cache")


def test_two_slashes_at_the_beginning_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux takes them for one, so what is compared with a folder of ours by its name must not differ by them."""
    monkeypatch.setenv("X07_VM_STATE_DIR", "//srv/jobs")
    monkeypatch.setenv("X07_VM_CACHE_DIR", "///srv/cache")
    assert (str(state_dir()), str(cache_dir())) == ("/srv/jobs", "/srv/cache")


def test_an_empty_variable_counts_as_unset(environment: pytest.MonkeyPatch) -> None:
    """A variable that is set to nothing names no place."""
    for name in VARIABLES:
        environment.setenv(name, "")
    environment.setenv("HOME", "/home/u")
    assert (str(state_dir()), str(cache_dir())) == ("/home/u/.x07/vm/jobs", "/home/u/.cache/x07-sandbox")


@pytest.mark.parametrize("name", VARIABLES)
def test_a_relative_place_is_refused(name: str, environment: pytest.MonkeyPatch) -> None:
    """A place that depends on where one stands is an error that names its variable."""
    environment.setenv(name, "here/jobs")
    with pytest.raises(HostError, match=name):
        (state_dir if name in {"X07_VM_STATE_DIR", "HOME"} else cache_dir)()


@pytest.mark.usefixtures("environment")
def test_there_is_no_fallback_to_a_shared_folder() -> None:
    """Without HOME and without names there is no place: never one below /tmp."""
    for place in (state_dir, cache_dir):
        with pytest.raises(HostError, match="HOME is not set"):
            place()


def test_folders_are_made_private_whatever_the_umask(tmp_path: Path) -> None:
    """All that is missing on the way is made with mode 0700, also under a careless umask."""
    before = os.umask(0)
    try:
        private_dir(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_a_folder_that_is_ours_is_taken_again(tmp_path: Path) -> None:
    """Asking twice gives the same folder, with what is in it."""
    folder = private_dir(tmp_path / "a")
    (folder / "f").write_text("kept", encoding="ascii")
    assert private_dir(folder) == folder
    assert (folder / "f").read_text(encoding="ascii") == "kept"


@pytest.mark.parametrize("bits", [0o701, 0o710, 0o755, 0o720, 0o777, 0o1777])
def test_a_folder_that_is_open_to_others_is_refused(bits: int, tmp_path: Path) -> None:
    """Any right of group or others on the last folder is refused, and left as it is."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(HostError, match="must be yours with mode 0700"):
        private_dir(folder)
    assert mode(folder) == bits


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777])
def test_a_folder_below_one_that_others_can_change_is_refused(bits: int, tmp_path: Path) -> None:
    """Whoever can write a folder above could put another one in place of ours, unless it is sticky like /tmp."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(bits)
    with pytest.raises(HostError, match="others can change it"):
        private_dir(tmp_path / "shared" / "mine")
    (tmp_path / "shared").chmod(0o1777)
    private_dir(tmp_path / "shared" / "mine")


@pytest.mark.parametrize("where", ["last", "middle"])
@pytest.mark.parametrize("leads", ["to our own folder", "nowhere"])
def test_a_link_on_the_way_is_refused(where: str, leads: str, tmp_path: Path) -> None:
    """A link is refused wherever it stands and wherever it leads, and nothing is made behind it."""
    real = tmp_path / "real"
    if leads == "to our own folder":
        real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(HostError, match="link or not a folder"):
        private_dir(tmp_path / "link" if where == "last" else tmp_path / "link" / "sub")
    assert not (real / "sub").exists()
    assert real.exists() == (leads == "to our own folder")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """A file where a folder should be is an error, and stays."""
    (tmp_path / "f").write_bytes(b"kept")
    for path in (tmp_path / "f", tmp_path / "f" / "sub"):
        with pytest.raises(HostError):
            private_dir(path)
    assert (tmp_path / "f").read_bytes() == b"kept"


def test_a_path_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    """A relative path, or one with "..", is refused before anything is made."""
    for path in (tmp_path.relative_to("/"), tmp_path / "a" / ".." / "b"):
        with pytest.raises(HostError, match="not an absolute path"):
            private_dir(path)
    assert list(tmp_path.iterdir()) == []


def test_the_root_folder_is_not_private() -> None:
    """The root folder, which everybody can read, is refused like any other."""
    with pytest.raises(HostError):
        private_dir(Path("/"))


@pytest.mark.root
@pytest.mark.parametrize("where", ["last", "middle"])
def test_a_folder_of_another_user_is_refused(where: str, tmp_path: Path, need: Need) -> None:
    """A folder that belongs to another user is refused, although root could use it."""
    need(os.geteuid() == 0, "needs root to make a folder that is another user's", installable=False)
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(HostError, match=f"uid {NOBODY}"):
        private_dir(theirs if where == "last" else theirs / "ours")


@pytest.mark.root
@pytest.mark.parametrize("bits", [0o1777, 0o755, 0o775])
def test_nobody_is_told_to_close_a_folder_of_the_system(bits: int, tmp_path: Path, need: Need) -> None:
    """To root an open folder's error never says chmod, and what is below it only where that would be taken."""
    need(os.geteuid() == 0, "needs root, whose folders are the system's", installable=False)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(HostError) as caught:
        private_dir(folder)
    assert "chmod" not in caught.value.fix
    swapped = bits == 0o775  # others could put another in the place of what lies there
    assert (str(folder / "x07-sandbox") in caught.value.fix) is not swapped
    with pytest.raises(HostError, match="others can change it") if swapped else contextlib.nullcontext():
        private_dir(folder / "x07-sandbox")


TRY = """
import pathlib, sys
from x07_sandbox.errors import HostError
from x07_sandbox.host.paths import private_dir
for path in sys.argv[1:]:
    try:
        private_dir(pathlib.Path(path))
        print("taken")
    except HostError as exc:
        print(exc.why, exc.fix, sep=". ")
"""


@pytest.fixture
def base(need: Need) -> Iterator[Path]:
    """A folder of root's that an ordinary user can reach, whatever pytest's own folders allow."""
    need(os.geteuid() == 0, "needs root to become an ordinary user", installable=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "home").mkdir(mode=0o700)
        os.chown(path / "home", NOBODY, NOBODY)
        yield path


def as_nobody(*paths: Path) -> list[str]:
    """What an ordinary user is told about these folders."""
    command = [sys.executable, "-c", TRY, *map(str, paths)]
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.splitlines()


@pytest.mark.root
def test_an_ordinary_user_is_refused_a_folder_of_root(base: Path) -> None:
    """For an ordinary user a folder of root's on the way is fine, and as the last one it is refused."""
    (base / "roots").mkdir(mode=0o755)
    taken, refused, failed = as_nobody(base / "home" / "jobs", base / "roots", base / "roots" / "sub")
    assert taken == "taken"
    assert refused.startswith("it belongs to uid 0 ")
    assert failed.startswith("Permission denied. ")


@pytest.mark.root
def test_folders_on_the_way_need_not_be_readable(base: Path) -> None:
    """A home below a folder that others may pass but not list, as on shared machines, is a good place."""
    base.chmod(0o711)
    assert as_nobody(base / "home" / "jobs") == ["taken"]


@pytest.mark.root
def test_only_a_folder_of_one_s_own_may_be_closed(base: Path) -> None:
    """An ordinary user hears of chmod only for a folder of their own that nobody else writes, and under a condition."""
    folders = [base / "home" / f"mode-{bits:o}" for bits in (0o755, 0o775, 0o1777)]
    for folder in folders:
        folder.mkdir()
        folder.chmod(int(folder.name.removeprefix("mode-"), 8))
        os.chown(folder, NOBODY, NOBODY)
    own, group, sticky, system = as_nobody(*folders, Path("/tmp"))  # noqa: S108 - only looked at
    assert own.endswith("if nobody else needs it; or use another folder")
    (roots,) = as_nobody(Path("/usr"))
    for told, below in ((group, False), (sticky, True), (system, True), (roots, False)):
        assert "chmod" not in told
        assert ("a new folder in it" if below else "to a folder of your own") in told


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    """A file of just the most bytes is read, a larger one is refused, and so is all that is no regular file."""
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    assert read_bounded(path, "thing", 5) == b"12345"
    with pytest.raises(UsageError, match="it has more than 4 bytes"):
        read_bounded(path, "thing", 4)
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match=r"it is not a regular file|Is a directory"):
            read_bounded(name, "thing", 5)
    with pytest.raises(UsageError, match="null"):
        read_bounded(Path("a\0b"), "thing", 5)
