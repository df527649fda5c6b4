"""What a build does with what is there already: verified, reused only where it is whole, and with its packages.

The images are made up; the real mending is in tests/vm/test_image_build.py. No outside command is found here, so a
build that has to make something ends at the first one that it needs.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.conftest import overwrite
from tests.published import document
from x07_sandbox.cli.main import main
from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.housekeeping.prune import prune
from x07_sandbox.images import base as bases
from x07_sandbox.images import boot, build, commands, guestcode, manifest, recipe, sources, store, verify

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.conftest import Need

SHARED = ("vmlinux", "root.erofs", "scratch.head")
PACKAGES = ("hello", "netbase")


def _base_folder(include: Sequence[str]) -> Path:
    return (
        store.images_dir()
        / f"base-{bases.BaseSpec(arch=host_arch(), suite=sources.release_codename(), include=tuple(include)).key}"
    )


def _make(include: Sequence[str]) -> str:
    """A base and an image of it in the store, as a build leaves them; the image's digest in hex."""
    folder = _base_folder(include)
    folder.mkdir(mode=0o700)
    base = bases.Base(
        schema_version=bases.BASE_SCHEMA,
        kernel_release="6.12",
        kernel=bases.put(folder, "vmlinux", b"kernel" * 1000),
        root=bases.put(folder, "root.erofs", bytes(verify.SMALL_BYTES + 5000)),
        scratch=bases.put(folder, "scratch.head", b"s" * 4096),
        scratch_disk=manifest.ScratchDisk(bytes=1 << 20, pieces=[manifest.Piece(offset=0, bytes=4096)]),
        boot=[bases.put(folder, "00-erofs.ko", b"module" * 100)],
        net=[bases.put(folder, "net-00-nf_tables.ko", b"module" * 200)],
        packages=[manifest.Package(name=name, version="1", arch="all") for name in include],
    )
    bases.put(folder, "base.json", msgspec.json.encode(base))
    place = store.images_dir() / "made"
    place.mkdir(mode=0o700)
    initrd = bases.put(place, "initrd.cpio", b"initrd" * 1000)
    for name in SHARED:
        os.link(folder / name, place / name)
    made = manifest.sealed(
        manifest.Manifest(
            schema_version=manifest.SCHEMA,
            digest=manifest.NO_DIGEST,
            recipe=recipe.RECIPE,
            arch=host_arch().name,
            suite=sources.release_codename(),
            include=list(include),
            base=base.digest,
            guest_code=guestcode.read_guest_code().digest,
            kernel_release=base.kernel_release,
            parts=manifest.Parts(kernel=base.kernel, initrd=initrd, root=base.root, scratch=base.scratch),
            scratch_disk=base.scratch_disk,
            packages=base.packages,
            filters={},
        )
    )
    bases.put(place, "manifest.json", manifest.encode(made))
    digest = made.digest.removeprefix("sha256:")
    place.rename(store.images_dir() / digest)
    return digest


@pytest.fixture
def science(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Image:
    """An image called "science" with further packages, and its base."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(commands, "SEARCH", ())
    store.set_name("science", _make(PACKAGES))
    return store.find_image("science")


def test_a_whole_image_is_taken_as_it_is(science: store.Image) -> None:
    """A build that finds what it would make, whole, makes nothing and needs no outside command."""
    said: list[str] = []
    assert build.build_image(name="science", include=PACKAGES, progress=said.append) == science
    assert said == []


@pytest.mark.parametrize("name", [*SHARED, "initrd.cpio", "notes.txt"])
def test_a_damaged_image_is_never_called_ready(science: store.Image, name: str) -> None:
    """With one byte of any part changed, its times put back, or a foreign file in it, an image is made anew."""
    if name == "notes.txt":
        (science.folder / name).write_bytes(b"x")
    else:
        overwrite(science.folder / name)
    said: list[str] = []
    with pytest.raises(HostError, match="is missing"):
        build.build_image(name="science", include=PACKAGES, progress=said.append)
    assert name in said[0]
    assert said[0].endswith(": rebuilding the image")
    # The base holds the same file by a link: it is damaged too, and of no use.
    assert any("downloading" in line for line in said) == (name in SHARED)


def test_a_damaged_base_is_fetched_anew(science: store.Image) -> None:
    """A base of which only a module is damaged is fetched anew when an image has to be made from it."""
    overwrite(_base_folder(PACKAGES) / "00-erofs.ko")
    assert build.build_image(name="science", include=PACKAGES, progress=print) == science  # it needs no module
    (science.folder / "initrd.cpio").unlink()
    said: list[str] = []
    with pytest.raises(HostError, match="mmdebstrap is missing"):
        build.build_image(name="science", include=PACKAGES, progress=said.append)
    assert any("the content of 00-erofs.ko has changed" in line and "downloading it again" in line for line in said)


def test_a_build_looks_for_room_first(science: store.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kept base cannot be unpacked for want of space the build says how much it needs, and what to set."""
    overwrite(science.folder / "initrd.cpio")
    monkeypatch.setattr(boot, "UNPACKED_MAX", 1 << 40)
    with pytest.raises(HostError, match=r"has \d+ MiB free, but a build needs \d+") as caught:
        build.build_image(name="science", progress=print)
    assert "X07_VM_CACHE_DIR" in caught.value.fix


def test_a_build_hashes_large_parts_once(science: store.Image, monkeypatch: pytest.MonkeyPatch, need: Need) -> None:
    """A second build with nothing changed reads no large part again, on file systems where that is safe."""
    monkeypatch.setattr(verify, "SETTLED_NS", 0)
    with (science.folder / "root.erofs").open("rb") as file:
        kind = verify.filesystem(file.fileno())
    need(kind in verify.TIMES_MOVE, f"tests' folder on a disk file system, not {kind}", installable=False)
    sizes: list[int] = []
    real = verify.sha256_of

    def watch(fd: int, size: int) -> str:
        sizes.append(size)
        return real(fd, size)

    monkeypatch.setattr(verify, "sha256_of", watch)
    for expected in (True, False):
        sizes.clear()
        build.build_image(name="science", include=PACKAGES, progress=print)
        assert any(size > verify.SMALL_BYTES for size in sizes) == expected


def test_a_named_image_keeps_its_packages(science: store.Image) -> None:
    """Built again without a word on packages, an image keeps those that it has, and it is said which."""
    said: list[str] = []
    assert build.build_image(name="science", progress=said.append) == science
    assert said == ["keeping the packages: hello, netbase"]
    assert store.find_image("science").manifest.include == list(PACKAGES)


def test_packages_are_dropped_only_when_asked(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`--no-include` builds an image without further packages; with --include it is wrong usage."""
    plain = _make(())
    assert build.build_image(name="science", include=(), progress=print).digest == f"sha256:{plain}"
    store.set_name("science", science.folder.name)
    (store.images_dir() / plain / "initrd.cpio").unlink()
    assert main(["image", "build", "--name", "science", "--no-include"]) == 125  # it would make the plain one anew
    said = capsys.readouterr().err
    assert "rebuilding the image" in said
    assert "keeping the packages" not in said
    assert main(["image", "build", "--no-include", "--include", "hello"]) == 2


def test_packages_that_cannot_be_known_are_not_dropped(science: store.Image) -> None:
    """Where the manifest that tells an image's packages is damaged, a build without a word on them is refused."""
    overwrite(science.folder / "manifest.json")
    with pytest.raises(ImageError) as caught:
        build.build_image(name="science", progress=print)
    assert caught.value.fix == ("Run x07 image build --name science --no-include, or with --include and its packages")
    with pytest.raises(HostError, match=r"fsck\.erofs is missing"):  # so far it comes: the image is made anew
        build.build_image(name="science", include=PACKAGES, progress=print)


def test_an_image_is_removed_by_its_name(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image rm` removes a name, and the files and packages of the image once no other name leads to it."""
    store.set_name("second", science.folder.name)
    plain = _make(())
    store.set_name("default", plain)
    assert main(["image", "rm", "science", "--json"]) == 0
    report = document(capsys.readouterr().out)
    assert report["images"] == [{"name": "science", "digest": science.digest}]
    assert (report["bytes"], report["kept"]) == (0, [])
    assert science.folder.is_dir()
    assert main(["image", "rm", "second"]) == 0
    assert capsys.readouterr().out.startswith("removed second (")
    assert not science.folder.exists()
    assert not _base_folder(PACKAGES).exists()
    assert store.find_image("default").folder.name == plain
    assert _base_folder(()).is_dir()


def test_a_damaged_image_can_be_removed(science: store.Image) -> None:
    """An image whose manifest cannot be read goes like any other."""
    overwrite(science.folder / "manifest.json")
    assert main(["image", "rm", "science"]) == 0
    assert not science.folder.exists()


def test_a_pinned_image_stays(science: store.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that X07_VM_GUEST_IMAGE_DIGEST names loses its name, and stays."""
    monkeypatch.setenv("X07_VM_GUEST_IMAGE_DIGEST", science.digest)
    assert main(["image", "rm", "science"]) == 0
    assert store.find_image(science.digest).digest == science.digest


def test_nothing_is_removed_where_a_name_is_wrong(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """One unknown name is an error that lists the images, and all of them stay."""
    assert main(["image", "rm", "science", "sience"]) == 2
    assert "Name one of: science" in capsys.readouterr().err
    assert store.find_image("science").digest == science.digest


def test_an_engines_image_is_no_image_of_ours() -> None:
    """A reference such as NAME:TAG is refused with the backend that takes it, and the command that makes an image."""
    for ref in ("ghcr.io/x07lang/runner:1", "runner:dev"):
        with pytest.raises(UsageError, match="only podman and docker use") as caught:
            store.find_image(ref)
        assert "x07 image build" in caught.value.fix


def test_the_wheels_of_an_image_make_it_another(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """Other wheels make another base; without a word on them an image keeps its own, and `image list` names them."""
    wheel = manifest.Wheel(name="six", version="1.16.0", sha256="ab" * 32)
    more = build.Extras(include=PACKAGES, pip=(wheel,))
    assert more.base_spec().key != build.Extras(include=PACKAGES).base_spec().key
    place = store.images_dir() / "with-wheels"
    shutil.copytree(science.folder, place)
    made = manifest.sealed(msgspec.structs.replace(science.manifest, pip=[wheel]))
    (place / "manifest.json").unlink()
    bases.put(place, "manifest.json", manifest.encode(made))
    place.rename(store.images_dir() / made.digest.removeprefix("sha256:"))
    store.set_name("wheels", made.digest.removeprefix("sha256:"))
    said: list[str] = []
    with pytest.raises(HostError):
        build.build_image(name="wheels", progress=said.append)
    assert "keeping the Python packages: six" in said
    assert build.build_image(name="wheels", pip=(), progress=print).digest == science.digest
    store.set_name("wheels", made.digest.removeprefix("sha256:"))
    assert main(["image", "list"]) == 0
    assert "trixie  pip: six==1.16.0" in capsys.readouterr().out.replace(sources.release_codename(), "trixie")


def test_a_base_goes_with_the_last_image_that_is_made_of_it(science: store.Image) -> None:
    """`x07 prune` keeps the packages of a named image, and removes them once no name leads to any image of them."""

    def gone() -> set[str]:
        report = prune(["images"], progress=lambda _text: None, dry_run=False)
        return {removed.path.rpartition("/")[2] for removed in report.removed}

    base = _base_folder(PACKAGES)
    assert gone() == set()
    (store.images_dir() / "names" / "science").unlink()
    assert gone() == {science.folder.name, base.name}
    assert sorted(path.name for path in store.images_dir().iterdir()) == [".lock", "names"]
