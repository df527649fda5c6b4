"""Folders for state and images: location, ownership and privacy."""

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

from x07_sandbox.errors import HostError, UsageError, worded
from x07_sandbox.host.paths import cache_dir, private_dir, read_bounded, state_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

NOBODY = 65534
VARIABLES = ("X07_VM_CACHE_DIR", "X07_VM_STATE_DIR", "XDG_CACHE_HOME", "HOME")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the variables that name a folder."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def mode(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)


def test_variables_override_the_home_folder(environment: pytest.MonkeyPatch) -> None:
    """X07_VM_STATE_DIR and X07_VM_CACHE_DIR override XDG_CACHE_HOME, which overrides the home folder, unless empty."""
    for name in VARIABLES:
        environment.setenv(name, "")
    environment.setenv("HOME", "/home/u")
    assert (str(state_dir()), str(cache_dir())) == ("/home/u/.x07/vm/jobs", "/home/u/.cache/x07-sandbox")
    environment.setenv("XDG_CACHE_HOME", "/xdg")
    assert (str(state_dir()), str(cache_dir())) == ("/home/u/.x07/vm/jobs", "/xdg/x07-sandbox")
    environment.setenv("X07_VM_STATE_DIR", "//srv/jobs")  # leading slashes are one
    environment.setenv("X07_VM_CACHE_DIR", "///srv/cache")
    assert (str(state_dir()), str(cache_dir())) == ("/srv/jobs", "/srv/cache")


@pytest.mark.parametrize("name", VARIABLES)
def test_a_relative_place_is_refused(name: str, environment: pytest.MonkeyPatch) -> None:
    """A relative path in a variable is an error that names the variable."""
    environment.setenv(name, "here/jobs")
    with pytest.raises(HostError, match=name):
        (state_dir if name in {"X07_VM_STATE_DIR", "HOME"} else cache_dir)()


@pytest.mark.usefixtures("environment")
def test_there_is_no_fallback_to_a_shared_folder() -> None:
    """Without HOME and the variables there is no folder, and no fallback to /tmp."""
    for place in (state_dir, cache_dir):
        with pytest.raises(HostError, match="HOME is not set"):
            place()


def test_folders_are_made_private_whatever_the_umask(tmp_path: Path) -> None:
    """Missing folders are created with mode 0700, whatever the umask."""
    before = os.umask(0)
    try:
        private_dir(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3


@pytest.mark.parametrize("bits", [0o701, 0o710, 0o755, 0o720, 0o777, 0o1777])
def test_a_folder_that_is_open_to_others_is_refused(bits: int, tmp_path: Path) -> None:
    """A folder with any permission for group or others is refused and left unchanged."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(HostError, match="it must belong to you and have mode 0700"):
        private_dir(folder)
    assert mode(folder) == bits


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777])
def test_a_folder_below_one_that_others_can_change_is_refused(bits: int, tmp_path: Path) -> None:
    """A folder below one that others can write is refused, unless that one is sticky like /tmp."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(bits)
    with pytest.raises(HostError, match="other users can change it"):
        private_dir(tmp_path / "shared" / "mine")
    (tmp_path / "shared").chmod(0o1777)
    private_dir(tmp_path / "shared" / "mine")


@pytest.mark.parametrize("where", ["last", "middle"])
@pytest.mark.parametrize("leads", ["to our own folder", "nowhere"])
def test_a_link_on_the_way_is_refused(where: str, leads: str, tmp_path: Path) -> None:
    """A symbolic link anywhere in the path is refused, and nothing is created behind it."""
    real = tmp_path / "real"
    if leads == "to our own folder":
        real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(HostError, match="link or not a folder"):
        private_dir(tmp_path / "link" if where == "last" else tmp_path / "link" / "sub")
    assert not (real / "sub").exists()
    assert real.exists() == (leads == "to our own folder")


def test_a_path_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    """A path that is relative, has ".." or leads to or through a file is refused before anything is changed."""
    (tmp_path / "f").write_bytes(b"kept")
    for path in (tmp_path.relative_to("/"), tmp_path / "a" / ".." / "b"):
        with pytest.raises(HostError, match="not an absolute path"):
            private_dir(path)
    for path in (tmp_path / "f", tmp_path / "f" / "sub"):
        with pytest.raises(HostError):
            private_dir(path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"kept")]


@pytest.mark.root
@pytest.mark.parametrize("where", ["last", "middle"])
def test_a_folder_of_another_user_is_refused(where: str, tmp_path: Path, need: Need) -> None:
    """A folder of another user is refused, even for root."""
    need(os.geteuid() == 0, "needs root to make a folder that is another user's", installable=False)
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(HostError, match=f"uid {NOBODY}"):
        private_dir(theirs if where == "last" else theirs / "ours")


@pytest.mark.root
@pytest.mark.parametrize("bits", [0o1777, 0o755, 0o775])
def test_no_error_suggests_to_change_a_system_folder(bits: int, tmp_path: Path, need: Need) -> None:
    """No error tells root to chmod an open system folder."""
    need(os.geteuid() == 0, "needs root, whose folders are the system's", installable=False)
    tmp_path.chmod(0o755)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(HostError) as caught:
        private_dir(folder)
    assert "chmod" not in caught.value.fix
    swapped = bits == 0o775  # others could replace the entries
    assert (str(folder / "x07-sandbox") in caught.value.fix) is not swapped
    with pytest.raises(HostError, match="other users can change it") if swapped else contextlib.nullcontext():
        private_dir(folder / "x07-sandbox")


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o777])
def test_a_folder_that_only_its_owner_reaches_is_repaired_by_chmod(bits: int, tmp_path: Path) -> None:
    """The error for an open folder inside a private one, such as a copy of images, has the chmod that repairs it."""
    folder = tmp_path / "images"
    folder.mkdir()
    folder.chmod(bits)
    with pytest.raises(HostError) as caught:
        private_dir(folder)
    assert worded(caught.value.fix) == f"Run: chmod 0700 {folder}"
    folder.chmod(0o700)
    private_dir(folder)


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
    """A folder of root's that an ordinary user can reach."""
    need(os.geteuid() == 0, "needs root to become an ordinary user", installable=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "home").mkdir(mode=0o700)
        os.chown(path / "home", NOBODY, NOBODY)
        yield path


def as_nobody(*paths: Path) -> list[str]:
    """The results of an ordinary user for these folders."""
    command = [sys.executable, "-c", TRY, *map(str, paths)]
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.splitlines()


@pytest.mark.root
def test_an_ordinary_user_is_refused_a_folder_of_root(base: Path) -> None:
    """A folder of root is refused to an ordinary user, but may be a parent folder, which need not be readable."""
    (base / "roots").mkdir(mode=0o755)
    taken, refused, failed = as_nobody(base / "home" / "jobs", base / "roots", base / "roots" / "sub")
    assert taken == "taken"
    assert refused.startswith("it belongs to uid 0 ")
    assert failed.startswith("Permission denied. ")
    base.chmod(0o711)
    assert as_nobody(base / "home" / "jobs") == ["taken"]


@pytest.mark.root
@pytest.mark.parametrize(("mode", "group"), [("0777", 0), ("2777", NOBODY), ("2775", NOBODY), ("2770", NOBODY)])
def test_a_volume_of_a_pod_is_refused_with_the_way_out(mode: str, group: int, base: Path) -> None:
    """A volume of emptyDir's or fsGroup's shape is refused, and the error names what works: a folder by subPath."""
    for name in ("volume", "place"):
        (base / name).mkdir()
    script = f"""
        mount -t tmpfs -o mode={mode},gid={group} tmpfs {base}/volume
        setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups mkdir -m 0700 {base}/volume/private
        mount --bind {base}/volume/private {base}/place
        exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"
    """
    paths = [base / "volume", base / "volume" / "jobs", base / "place", base / "place" / "jobs"]
    command = ["unshare", "--mount", "/bin/sh", "-ec", script, "pod", sys.executable, "-c", TRY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    *refused, place, jobs = done.stdout.splitlines()
    assert len(refused) == 2
    for line in refused:
        assert f"In a pod, let an init container run mkdir -m 0700 {base}/volume/private, and mount" in line
        assert "subPath: private" in line
    assert (place, jobs) == ("taken", "taken")


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    """A bounded read accepts only regular files within the limit."""
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
