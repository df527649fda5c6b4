"""Real builds of the guest image: reproducible, without traces of the host, and safe to kill."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import overwrite
from tests.vm.conftest import copy_kvm_verdict, marked
from x07_sandbox.host import paths
from x07_sandbox.host.arch import host_arch
from x07_sandbox.images import build, commands, sources, store, verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.slow]

# Machines that Debian's own packages name in their files: for these, only files that the build may write are searched.
PUBLIC = re.compile(r"(.+\.)?debian\.org")
BUILD = "from x07_sandbox.images.build import build_image; build_image(progress=lambda line: print(line, flush=True))"


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Monkeypatch for fixtures of the whole module."""
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def killed(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of a build that was killed while it installed packages."""
    del image  # built in the user's cache before this module sets its own
    cache = tmp_path_factory.mktemp("killed") / "a cache"  # the space: a path is no shell text
    cache.mkdir(mode=0o700)
    copy_kvm_verdict(cache)
    env = commands.environment({"X07_VM_CACHE_DIR": str(cache)})
    with subprocess.Popen([sys.executable, "-c", BUILD], env=env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "installing essential packages" in line:
                break
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    yield cache
    shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module")
def first(killed: Path, patch: pytest.MonkeyPatch) -> Image:
    """An image built in the cache of the killed build."""
    patch.setenv("X07_VM_CACHE_DIR", str(killed))
    assert list((killed / "tmp").iterdir()), "the killed build left nothing to clean up: the test is too late"
    return build.build_image(progress=print)


@pytest.fixture(scope="module")
def tree(first: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system, unpacked."""
    folder = tmp_path_factory.mktemp("tree") / "root"
    argv = [commands.tool("fsck.erofs"), f"--extract={folder}", "--no-preserve", str(first.folder / "root.erofs")]
    subprocess.run(argv, check=True, capture_output=True)
    return folder


def test_killed_build_leaves_nothing(killed: Path, first: Image) -> None:
    """A build removes all that a killed build left: folders, mounts and processes."""
    assert first.folder.is_dir()
    assert list((killed / "tmp").iterdir()) == []
    assert str(killed).encode() not in Path("/proc/self/mountinfo").read_bytes()
    assert marked(str(killed)) == []


def test_two_builds_are_bit_identical(
    image: Image, first: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builds from the same package sources have the same digest, and all their files have the same bytes."""
    second = image
    if image.manifest.packages != first.manifest.packages:  # it was built before the sources got updates
        monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
        second = build.build_image(progress=print, fresh=True)
    assert second.folder != first.folder
    assert second.manifest == first.manifest
    assert second.digest == first.digest
    assert verify.verify_image(second) == []


def test_second_build_reuses_what_is_there(first: Image, killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with nothing new starts no outside command, and a second name costs nothing."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(killed))
    monkeypatch.setattr(paths, "PROGRAMS", ())
    assert build.build_image(progress=print).folder == first.folder
    assert build.build_image(name="second", progress=print).folder == first.folder
    assert [image.name for image in store.list_images()] == ["default", "second"]


def test_files_are_private_and_read_only(first: Image) -> None:
    """Image files have mode 0444 in a folder of mode 0700; parts that two images share are hard links."""
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in first.folder.iterdir()} == {0o444}
    assert (first.folder / "root.erofs").stat().st_nlink == 2


def test_manifest_lists_the_contents(first: Image) -> None:
    """The manifest lists the architecture, every package with its version, and the kernel."""
    made = first.manifest
    names = {package.name for package in made.packages}
    assert {"python3", "gcc", "g++", "make", "nftables", "iproute2", "ca-certificates", "libc6-dev"} <= names
    assert f"linux-image-{made.kernel_release}" in names
    assert made.arch == host_arch().name
    assert all(package.version for package in made.packages)
    assert store.decode_manifest((first.folder / "manifest.json").read_bytes(), "x") == made


def test_the_image_has_no_traces_of_the_host(first: Image, tree: Path, killed: Path) -> None:
    """Root file system, initramfs and manifest hold no mirror, proxy, machine name or path of the host."""
    found = sources.host_sources(sources.release_codename(), host_arch().deb, note=print)
    settings = sources.fetch_settings(commands.capture([commands.tool("apt-config"), "dump"]).decode())
    hosts = {
        re.sub(r"https?://(?:[^@/]*@)?([^/:]+).*", r"\1", uri) for source in found for uri in source["URIs"].split()
    }
    words = hosts | set(re.findall(r"https?://(?:[^@/]*@)?([^/:\"]+)", "\n".join(settings)))
    everywhere = {word.encode() for word in words if not PUBLIC.fullmatch(word)} | {str(killed).encode()}
    written = {word.encode() for word in words}
    if len(socket.gethostname()) >= 8:  # shorter ones are words that any text may hold
        everywhere.add(socket.gethostname().encode())
    for path in [*tree.rglob("*"), *first.folder.iterdir()]:
        if path.is_symlink() or not path.is_file() or path.name == "root.erofs":
            continue
        data = path.read_bytes()
        is_ours = (
            not path.is_relative_to(tree) or path.is_relative_to(tree / "etc") or path.parent == tree / "var/lib/dpkg"
        )
        for word in everywhere | (written if is_ours else set()):
            assert word not in data, f"{path} holds {word.decode()}"


def test_files_that_a_build_fills_are_neutral(tree: Path) -> None:
    """Files that a build fills from its host are empty, neutral or missing."""
    assert (tree / "etc/hostname").read_text() == "x07\n"
    assert (tree / "etc/hosts").read_text() == "127.0.0.1 localhost\n::1 localhost\n"
    assert (tree / "etc/resolv.conf").read_bytes() == b""
    assert (tree / "etc/machine-id").read_bytes() == b""
    gone = ("etc/apt", "var/lib/apt", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "x07-kernel", "usr/share/man/man1")
    assert [name for name in gone if (tree / name).exists()] == []
    assert list((tree / "var/log").iterdir()) == list((tree / "var/cache").iterdir()) == []
    assert list((tree / "boot").iterdir()) == []


def test_tree_has_what_init_and_agent_need(tree: Path) -> None:
    """The image has the mount points and the program's account that init and agent need."""
    for name in ("x07", "opt/x07", "proc", "sys", "dev", "run", "tmp"):
        assert (tree / name).is_dir()
    assert "x07:x:65532:65532:x07:/opt/x07:/bin/sh" in (tree / "etc/passwd").read_text().splitlines()
    assert "x07:x:65532:" in (tree / "etc/group").read_text().splitlines()
    assert shutil.which("gcc", path=str(tree / "usr/bin"))


def test_byte_code_needs_no_check_of_its_source(tree: Path) -> None:
    """The guest's own library has byte code that needs no check of its source (PEP 552, unchecked)."""
    files = list(tree.glob("usr/lib/python3.*/**/*.pyc"))
    assert len(files) > 500
    assert {path.read_bytes()[4:8] for path in files} == {b"\x01\0\0\0"}


@pytest.mark.parametrize(
    ("part", "fetched"),
    [
        ("initrd.cpio", False),
        pytest.param("root.erofs", True, marks=pytest.mark.full("fetches all")),
    ],
)
def test_a_build_repairs_a_damaged_image(
    first: Image, killed: Path, monkeypatch: pytest.MonkeyPatch, part: str, *, fetched: bool
) -> None:
    """A build repairs a damaged image: its own parts from the kept base, shared parts from fetched packages."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(killed))
    overwrite(first.folder / part)
    said: list[str] = []
    mended = build.build_image(progress=said.append)
    assert mended == first
    assert verify.verify_image(mended) == []
    with verify.open_image(mended):
        pass
    assert any("fetching and unpacking" in line for line in said) == fetched
    assert build.build_image(progress=said.append) == first
