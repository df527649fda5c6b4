"""Image builds reuse verified images and bases, rebuild damaged ones, and remember packages. Copies are whole.

The images are fakes; tests/vm/test_image_build.py rebuilds real ones. No outside command is found here, so a build
that has to create something ends at the first command that it needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.conftest import overwrite
from tests.published import document
from tests.unit.test_images_manifest import MANIFEST
from tests.unit.test_images_verify import store_image
from x07_sandbox.cli.main import main
from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.arch import host_arch
from x07_sandbox.images import base as bases
from x07_sandbox.images import boot, build, sources, store, verify
from x07_sandbox.images.build import add_image, pieces_of
from x07_sandbox.library.cleanup import prune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Need

SHARED = ("vmlinux", "root.erofs", "scratch.head")
PACKAGES = ("hello", "netbase")


def _base_folder(include: Sequence[str]) -> Path:
    return store.images_dir() / f"base-{bases.Contents(arch=host_arch(), include=tuple(include)).base_key}"


def _make(include: Sequence[str]) -> str:
    """Create a base and an image of it in the store; return the image's digest in hex."""
    folder = _base_folder(include)
    folder.mkdir(mode=0o700)
    base = bases.Base(
        schema_version=bases.BASE_SCHEMA,
        kernel_release="6.12",
        kernel=bases.put(folder, "vmlinux", b"kernel" * 1000),
        root=bases.put(folder, "root.erofs", bytes(verify.SMALL_BYTES + 5000)),
        scratch=bases.put(folder, "scratch.head", b"s" * 4096),
        scratch_disk=store.ScratchDisk(bytes=1 << 20, pieces=[store.Piece(offset=0, bytes=4096)]),
        boot=[bases.put(folder, "00-erofs.ko", b"module" * 100)],
        net=[bases.put(folder, "net-00-nf_tables.ko", b"module" * 200)],
        packages=[store.Package(name=name, version="1", arch="all") for name in include],
    )
    bases.put(folder, "base.json", msgspec.json.encode(base))
    place = store.images_dir() / "made"
    place.mkdir(mode=0o700)
    initrd = bases.put(place, "initrd.cpio", b"initrd" * 1000)
    for name in SHARED:
        os.link(folder / name, place / name)
    made = store.sealed(
        msgspec.structs.replace(
            MANIFEST,
            recipe=bases.RECIPE,
            arch=host_arch().name,
            suite=sources.release_codename(),
            include=list(include),
            base=base.digest,
            guest_code=store.read_guest_code().digest,
            kernel_release=base.kernel_release,
            parts=store.Parts(kernel=base.kernel, initrd=initrd, root=base.root, scratch=base.scratch),
            scratch_disk=base.scratch_disk,
            packages=base.packages,
        )
    )
    bases.put(place, "manifest.json", store.encode_manifest(made))
    digest = made.digest.removeprefix("sha256:")
    place.rename(store.images_dir() / digest)
    return digest


def test_forbidden_namespaces_are_explained(tmp_path: Path) -> None:
    """A host without namespaces is told which container flag or which other host helps."""
    wrapper = Path(__file__).parents[1] / "vm" / "without_namespaces.py"
    code = "from x07_sandbox.images.commands import require_namespaces; require_namespaces()"
    done = subprocess.run(
        [sys.executable, wrapper, sys.executable, "-c", code],
        env=os.environ | {"X07_VM_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert "namespaces are forbidden here (unshare: " in said
    assert "start it with --privileged" in said
    assert f"copy ~/.cache/x07-sandbox/images from there to {tmp_path}/images" in said


@pytest.fixture
def science(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Image:
    """An image called "science" with further packages, and its base."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "PROGRAMS", ())
    store.set_name("science", _make(PACKAGES))
    return store.find_image("science")


@pytest.mark.parametrize("name", [*SHARED, "initrd.cpio", "notes.txt"])
def test_a_damaged_image_is_rebuilt(science: store.Image, name: str) -> None:
    """An image with a changed byte or a foreign file is rebuilt."""
    if name == "notes.txt":
        (science.folder / name).write_bytes(b"x")
    else:
        overwrite(science.folder / name)
    output: list[str] = []
    with pytest.raises(HostError, match="is missing"):
        build.build_image(name="science", include=PACKAGES, progress=output.append)
    assert name in output[0]
    assert output[0].endswith(": rebuilding the image")
    # The base holds the same file by a link: it is damaged too, and of no use.
    assert any("downloading" in line for line in output) == (name in SHARED)


def test_a_damaged_base_is_fetched_again(science: store.Image) -> None:
    """A damaged base is fetched again when an image needs it."""
    overwrite(_base_folder(PACKAGES) / "00-erofs.ko")
    assert build.build_image(name="science", include=PACKAGES, progress=print) == science  # it needs no module
    (science.folder / "initrd.cpio").unlink()
    output: list[str] = []
    with pytest.raises(HostError, match="mmdebstrap is missing"):
        build.build_image(name="science", include=PACKAGES, progress=output.append)
    assert any("the content of 00-erofs.ko has changed" in line and "downloading it again" in line for line in output)


def test_a_build_checks_disk_space_first(science: store.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without enough disk space fails early, with the needed size and the variable to set."""
    overwrite(science.folder / "initrd.cpio")
    monkeypatch.setattr(boot, "UNPACKED_MAX", 1 << 40)
    with pytest.raises(HostError, match=r"has \d+ MiB free, but a build needs \d+") as caught:
        build.build_image(name="science", progress=print)
    assert "X07_VM_CACHE_DIR" in caught.value.fix


def test_a_named_image_keeps_its_packages(science: store.Image) -> None:
    """A rebuild without package flags keeps the image's packages and names them, and reuses an intact image."""
    output: list[str] = []
    assert build.build_image(name="science", progress=output.append) == science
    assert output == ["keeping the packages: hello, netbase"]
    assert store.find_image("science").manifest.include == list(PACKAGES)


def test_packages_are_dropped_only_when_asked(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`--no-include` drops packages; with --include it is a usage error."""
    plain = _make(())
    assert build.build_image(name="science", include=(), progress=print).digest == f"sha256:{plain}"
    store.set_name("science", science.folder.name)
    (store.images_dir() / plain / "initrd.cpio").unlink()
    assert main(["image", "build", "--name", "science", "--no-include"]) == 125  # it would make the plain one anew
    output = capsys.readouterr().err
    assert "rebuilding the image" in output
    assert "keeping the packages" not in output
    assert main(["image", "build", "--no-include", "--include", "hello"]) == 2


def test_packages_that_cannot_be_known_are_not_dropped(science: store.Image) -> None:
    """A rebuild without package flags is refused if the image's manifest is damaged, and the image can be removed."""
    overwrite(science.folder / "manifest.json")
    with pytest.raises(ImageError) as caught:
        build.build_image(name="science", progress=print)
    assert caught.value.fix == (
        "Run x07 image build --name science --no-include, or use --include with the packages that it had"
    )
    with pytest.raises(HostError, match=r"fsck\.erofs is missing"):  # so far it comes: the image is made anew
        build.build_image(name="science", include=PACKAGES, progress=print)
    assert main(["image", "rm", "science"]) == 0
    assert not science.folder.exists()


def test_an_image_is_removed_by_its_name(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image rm` removes a name, and its files once no other name refers to them, but nothing if one is unknown."""
    assert main(["image", "rm", "science", "sience"]) == 2
    assert "Use one of: science" in capsys.readouterr().err
    assert store.find_image("science").digest == science.digest
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


def test_a_pinned_image_stays(science: store.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image pinned by X07_VM_GUEST_IMAGE_DIGEST loses its name but is kept."""
    monkeypatch.setenv("X07_VM_GUEST_IMAGE_DIGEST", science.digest)
    assert main(["image", "rm", "science"]) == 0
    assert store.find_image(science.digest).digest == science.digest


def test_an_engines_image_is_no_image_of_ours() -> None:
    """A container reference NAME:TAG is refused with the backends that accept it."""
    for ref in ("ghcr.io/x07lang/runner:1", "runner:dev"):
        with pytest.raises(UsageError, match="only podman and docker use") as caught:
            store.find_image(ref)
        assert "x07 image build" in caught.value.fix


def test_other_wheels_make_another_image(science: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """Other wheels make another image, and a rebuild keeps the image's own wheels."""
    wheel = store.Wheel(name="six", version="1.16.0", sha256="ab" * 32)
    more = bases.Contents(arch=host_arch(), include=PACKAGES, pip=(wheel,))
    assert more.base_key != bases.Contents(arch=host_arch(), include=PACKAGES).base_key
    place = store.images_dir() / "with-wheels"
    shutil.copytree(science.folder, place)
    made = store.sealed(msgspec.structs.replace(science.manifest, pip=[wheel]))
    (place / "manifest.json").unlink()
    bases.put(place, "manifest.json", store.encode_manifest(made))
    place.rename(store.images_dir() / made.digest.removeprefix("sha256:"))
    store.set_name("wheels", made.digest.removeprefix("sha256:"))
    output: list[str] = []
    with pytest.raises(HostError):
        build.build_image(name="wheels", progress=output.append)
    assert "keeping the Python packages: six" in output
    assert build.build_image(name="wheels", pip=(), progress=print).digest == science.digest
    store.set_name("wheels", made.digest.removeprefix("sha256:"))
    assert main(["image", "list"]) == 0
    assert "trixie  include: hello, netbase  pip: six==1.16.0" in capsys.readouterr().out.replace(
        sources.release_codename(), "trixie"
    )


def test_an_unused_base_is_pruned(science: store.Image) -> None:
    """`x07 prune` removes a base once no named image uses it."""

    def gone() -> set[str]:
        report = prune(["images"], progress=lambda _text: None, dry_run=False)
        return {removed.path.rpartition("/")[2] for removed in report.removed}

    base = _base_folder(PACKAGES)
    assert gone() == set()
    (store.images_dir() / "names" / "science").unlink()
    assert gone() == {science.folder.name, base.name}
    assert sorted(path.name for path in store.images_dir().iterdir()) == [".lock", "names"]


Pieces = list[tuple[str, bytes]]


def say(_text: str) -> None:
    """Ignore progress."""


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Pieces]:
    """The digest and the pieces of an image, and afterwards an empty store."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "there"))
    digest = store_image()
    pieces = list(pieces_of(store.load(digest)))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "here"))
    return f"sha256:{digest}", pieces


def test_a_copy_has_the_digest_and_all_bytes(sent: tuple[str, Pieces]) -> None:
    """A copied image is found by its digest and intact, and copying it again changes nothing."""
    digest, pieces = sent
    halves = [(name, half) for name, data in pieces[1:] for half in (data[: len(data) // 2], data[len(data) // 2 :])]
    image = add_image(digest, [pieces[0], *halves], say)
    assert (image.digest, store.find_image(digest)) == (digest, image)
    assert verify.verify_image(image) == []
    assert add_image(digest, [], say) == image


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pieces: pieces[1:], "is not the manifest"),
        (lambda _pieces: [], "is not the manifest"),
        (lambda pieces: pieces[:-1], "is incomplete"),
        (lambda pieces: [*pieces[:-1], (pieces[-1][0], pieces[-1][1][:-1] + b"?")], "is incomplete or damaged"),
        (lambda pieces: [*pieces, pieces[-1]], "too large"),
        (lambda pieces: [*pieces, ("../../escaped", b"")], "is not in the manifest"),
        (
            lambda pieces: [(pieces[0][0], pieces[0][1].replace(b"trixie", b"sid")), *pieces[1:]],
            "digest does not match",
        ),
    ],
)
def test_a_wrong_copy_is_refused(sent: tuple[str, Pieces], change: object, why: str) -> None:
    """If a piece is missing, changed, repeated, foreign or of another image, nothing is added and nothing is left."""
    digest, pieces = sent
    assert callable(change)
    with pytest.raises(ImageError, match=why):
        add_image(digest, change(pieces), say)
    with pytest.raises(ImageError, match="belongs to another image"):
        add_image("sha256:" + "0" * 64, pieces, say)
    assert [name for name in os.listdir(store.images_dir()) if not name.startswith(".")] == []  # noqa: PTH208 - names
    assert build.leftovers() == []


def test_disk_from_the_head_is_a_sound_file_system(tmp_path: Path, need: Need) -> None:
    """The scratch disk passes e2fsck and is reproducible."""
    need(shutil.which("mke2fs", path="/usr/sbin:/sbin"), "mke2fs (package e2fsprogs)", installable=True)
    head, disk = bases.make_scratch(tmp_path)
    assert (head, disk) == bases.make_scratch(tmp_path)
    assert len(head) < 256 * 1024
    assert disk.bytes == 8 * 1024**3
    (tmp_path / "head").write_bytes(head)
    with (tmp_path / "head").open("rb") as part, (tmp_path / "disk").open("w+b") as file:
        verify.write_disk(part.fileno(), disk, file.fileno())
    checked = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(tmp_path / "disk")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert list(tmp_path.glob("scratch-*")) == []
