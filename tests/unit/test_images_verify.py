"""Opening an image: the verified descriptors are the ones used, and any changed byte is found."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.published import document
from tests.unit.test_images_manifest import MANIFEST
from x07_sandbox.cli.main import main
from x07_sandbox.errors import ImageError, worded
from x07_sandbox.host.verdicts import SETTLED_NS
from x07_sandbox.images import store, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Need

FILES = {
    "vmlinux": b"kernel" * 1000,
    "initrd.cpio": b"initrd" * 1000,
    "root.erofs": bytes(verify.SMALL_BYTES + 5000),  # large: hashed once, then recorded
    "scratch.head": b"s" * 4096,
    "base.bpf": b"filters" * 8,
}


STARTED_FROM = {name: data for name, data in FILES.items() if not name.endswith(".bpf")}  # what `open_image` checks


def store_image(files: dict[str, bytes] = FILES, **changes: object) -> str:
    """Put an image of these files into the store; return its digest in hex. changes: of its manifest."""
    folder = store.images_dir() / "made"
    folder.mkdir(mode=0o700)
    parts = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o444)
        parts.append(store.Part(file=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))
    changes |= {
        "parts": store.Parts(kernel=parts[0], initrd=parts[1], root=parts[2], scratch=parts[3]),
        "scratch_disk": store.ScratchDisk(bytes=1 << 20, pieces=[store.Piece(offset=8192, bytes=4096)]),
        "filters": {part.file.removesuffix(".bpf"): part for part in parts[4:]},
    }
    made = store.sealed(replace(MANIFEST, **changes))
    (folder / "manifest.json").write_bytes(store.encode_manifest(made))
    (folder / "manifest.json").chmod(0o444)
    digest = made.digest.removeprefix("sha256:")
    folder.rename(store.images_dir() / digest)
    return digest


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Image:
    """An image called "default" in a store of its own."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    store.set_name("default", store_image())
    return store.find_image(None)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all hashed files, in order."""
    sizes: list[int] = []
    real = verify.sha256_of

    def watch(fd: int, size: int) -> str:
        sizes.append(size)
        return real(fd, size)

    monkeypatch.setattr(verify, "sha256_of", watch)
    return sizes


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all files as old enough to be recorded."""
    monkeypatch.setattr(verify, "SETTLED_NS", 0)


def _open(image: store.Image) -> None:
    with verify.open_image(image):
        pass


def _flip(path: Path, *, restore_times: bool) -> None:
    """Change one byte in place, restore the mode and, if asked, the mtime."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        file.write(b"!")
    path.chmod(0o444)
    if restore_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_descriptors_are_read_only_and_hold_the_parts(image: store.Image) -> None:
    """The descriptors of an opened image are its files, read-only and not inheritable."""
    with verify.open_image(image) as opened:
        fds = tuple(opened.fds.values())
        assert [os.pread(fd, 1 << 24, 0) for fd in fds] == list(FILES.values())[:4]
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            assert not os.get_inheritable(fd)
            assert os.lseek(fd, 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("settled")
def test_flipped_byte_is_found_although_mtime_was_restored(image: store.Image, name: str) -> None:
    """A changed byte in any part is found even if its mtime was restored."""
    _open(image)
    _flip(image.folder / name, restore_times=True)
    if name in STARTED_FROM:
        with pytest.raises(ImageError, match=f"the content of {name} has changed"):
            _open(image)
    assert verify.verify_image(image) == [f"{name}: the content of {name} has changed since it was built"]


@pytest.mark.usefixtures("settled")
def test_large_files_are_hashed_once_and_small_ones_each_time(
    image: store.Image, counted: list[int], tmp_path: Path, need: Need
) -> None:
    """Large files are hashed once, small ones at every start."""
    with (tmp_path / "probe").open("wb") as file:
        kind = verify.filesystem(file.fileno())
    need(kind in verify.TIMES_MOVE, f"tests' folder on a disk file system, not {kind}", installable=False)
    small = [len(data) for data in STARTED_FROM.values() if len(data) <= verify.SMALL_BYTES]
    _open(image)
    assert sorted(counted) == sorted(map(len, STARTED_FROM.values()))
    counted.clear()
    _open(image)
    assert counted == small


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "change",
    [
        os.utime,
        lambda path: (path.chmod(0o644), path.chmod(0o444)),
        lambda path: (
            path.rename(path.with_name("x")),
            path.with_name("y").write_bytes(path.with_name("x").read_bytes()),
            path.with_name("y").chmod(0o444),
            path.with_name("y").rename(path),
        ),
    ],
    ids=["times", "mode", "replaced"],
)
def test_any_visible_change_makes_the_file_be_hashed_again(
    image: store.Image, counted: list[int], change: Callable[[Path], object]
) -> None:
    """A change of times, mode or inode makes a file be hashed again."""
    _open(image)
    counted.clear()
    change(image.folder / "root.erofs")
    _open(image)
    assert len(FILES["root.erofs"]) in counted


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host.verdicts.boot_id", lambda: "another"),
        ("images.verify.filesystem", lambda _fd: "none-such"),
        ("images.verify.filesystem", lambda _fd: "tmpfs"),
    ],
    ids=["new-boot", "unknown-file-system", "tmpfs"],
)
def test_everything_is_hashed_again_where_times_prove_nothing(
    image: store.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """After a reboot, and on a file system with unreliable change times, a start hashes every file."""
    _open(image)
    counted.clear()
    monkeypatch.setattr(f"x07_sandbox.{name}", value)
    _open(image)
    assert sorted(counted) == sorted(map(len, STARTED_FROM.values()))


def test_file_changed_just_now_is_not_recorded(
    image: store.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file modified within the clock's resolution is hashed again next time."""
    assert SETTLED_NS >= 100_000_000  # ten ticks of the slowest clock
    monkeypatch.setattr(verify, "SETTLED_NS", 3600 * 10**9)  # however slow this host is
    path = image.folder / "root.erofs"
    path.chmod(0o444)
    _open(image)
    counted.clear()
    _open(image)
    assert len(FILES["root.erofs"]) in counted


@pytest.mark.usefixtures("settled")
def test_path_swapped_after_opening_changes_nothing(image: store.Image) -> None:
    """Replacing a file after it was verified does not change what the VM gets."""
    with verify.open_image(image) as opened:
        evil = image.folder / "evil"
        evil.write_bytes(b"evil")
        evil.rename(image.folder / "root.erofs")
        assert os.pread(opened.fds["root"], 1 << 24, 0) == FILES["root.erofs"]
    with pytest.raises(ImageError):
        _open(image)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Move a file or folder away and make something else in its place."""
    path.rename(path.with_name("elsewhere"))
    make(path)


def _shorten(path: Path) -> None:
    """Remove the last byte of a part, and restore its mode."""
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 1)
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("vmlinux", lambda path: _replace(path, lambda at: at.symlink_to("elsewhere")), "is a link"),
        ("", lambda path: _replace(path, lambda at: at.symlink_to("elsewhere")), "cannot open guest image"),
        ("vmlinux", lambda path: _replace(path, lambda at: os.mkfifo(at, 0o444)), "not a regular file"),
        ("vmlinux", lambda path: path.chmod(0o644), "has mode"),
        ("vmlinux", lambda path: path.chmod(0o4444), "has mode"),
        ("", lambda path: path.chmod(0o755), "mode 0700"),
        ("root.erofs", _shorten, "bytes instead of"),
    ],
    ids=["link", "folder-link", "fifo", "writable", "set-user-id", "open-folder", "short"],
)
def test_an_unsafe_file_or_folder_is_refused(
    image: store.Image, name: str, damage: Callable[[Path], object], why: str
) -> None:
    """A link, fifo, wrong mode or wrong size in place of a part, or an open folder, is refused without blocking."""
    damage(image.folder / name)
    with pytest.raises(ImageError, match=why):
        _open(image)
    assert verify.verify_image(image) != []


def test_a_changed_manifest_is_found(image: store.Image) -> None:
    """`x07 image verify` and the next start find a changed manifest; the files of one that was read are its own."""
    path = image.folder / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"trixie", b"forky1"))
    path.chmod(0o444)
    assert verify.verify_image(image) == [
        f"cannot use {verify.subject_of(image).name}: manifest.json has changed since it was read"
    ]
    _open(image)
    with pytest.raises(ImageError, match="its digest does not match its content"):
        store.find_image(None)


def test_missing_and_foreign_files_are_reported(image: store.Image) -> None:
    """`x07 image verify` names every missing part and every foreign file."""
    (image.folder / "scratch.head").unlink()
    (image.folder / "notes.txt").write_text("x")
    problems = verify.verify_image(image)
    assert len(problems) == 2
    assert problems[0].startswith("scratch.head: ")
    assert problems[1] == "notes.txt: it does not belong to the image"


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage", [b"", b"junk", b'{"schema_version":"x07.sandbox.verified@9","boot_id":"","files":{}}']
)
def test_damaged_record_means_hashing(image: store.Image, counted: list[int], damage: bytes) -> None:
    """A damaged verification record is ignored and rewritten."""
    _open(image)
    record = next((image.folder.parent.parent / "verdicts").glob("verified-*.json"))
    assert record.stat().st_mode & 0o777 == 0o600
    whole = record.read_bytes()
    record.write_bytes(damage)
    counted.clear()
    _open(image)
    assert sorted(counted) == sorted(map(len, STARTED_FROM.values()))
    assert record.read_bytes() == whole


def test_image_is_found_by_name_digest_and_prefix(image: store.Image) -> None:
    """An image is found by name, digest and unique digest prefix."""
    digest = image.digest.removeprefix("sha256:")
    for ref in (None, "default", image.digest, digest, digest[:12], f"sha256:{digest[:20]}"):
        assert store.find_image(ref).digest == image.digest
    for ref in (
        "other",
        "f" * 12 if not digest.startswith("f" * 12) else "e" * 12,
        "sha256:xyz",
        f"sha256:{digest[:8]}",
    ):
        with pytest.raises(ImageError, match="no guest image"):
            store.find_image(ref)
    assert [found.name for found in store.list_images()] == ["default"]


def test_a_missing_default_image_names_the_others(image: store.Image) -> None:
    """If the default image is missing, the error names the other images."""
    for name in ("science", "extra"):
        store.set_name(name, image.digest.removeprefix("sha256:"))
    (store.images_dir() / "names" / "default").unlink()
    with pytest.raises(ImageError, match="there is no guest image: the existing images have other names") as caught:
        store.find_image(None)
    assert caught.value.fix == "Run x07 image build, or use one of these: extra, science"


def test_scratch_disk_is_made_from_the_part(image: store.Image, tmp_path: Path) -> None:
    """A job's scratch disk is sparse, with its pieces in place."""
    with (tmp_path / "disk").open("w+b") as disk, verify.open_image(image) as opened:
        verify.write_disk(opened.fds["scratch"], opened.manifest.scratch_disk, disk.fileno())
        disk.seek(0)
        assert disk.read() == bytes(8192) + b"s" * 4096 + bytes((1 << 20) - 12288)
        assert os.fstat(disk.fileno()).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("ref", "fix"),
    [
        (None, "Run x07 image build"),
        ("default", "Run x07 image build"),
        ("nosuch", "Run x07 image build --name nosuch"),
        ("f" * 12, "See x07 image list"),
        ("sha256:xyz", "See x07 image list"),
    ],
)
def test_a_missing_image_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str | None, fix: str
) -> None:
    """The error for a missing image has the command that builds it, if there is one."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ImageError, match="no guest image") as caught:
        store.find_image(ref)
    assert caught.value.fix == fix


def test_a_damaged_image_names_the_repair_command(image: store.Image) -> None:
    """The error for a damaged image has the command that repairs that image."""
    store.set_name("science", image.digest.removeprefix("sha256:"))
    _flip(image.folder / "vmlinux", restore_times=True)
    fixes = []
    for ref in ("default", "science", image.digest):
        with pytest.raises(ImageError, match="the content of vmlinux has changed") as caught:
            _open(store.find_image(ref))
        fixes.append(caught.value.fix)
    assert fixes[0] == "Run x07 image build, and if it happens again check the disk"
    assert fixes[1] == "Run x07 image build --name science, and if it happens again check the disk"
    assert fixes[2] == fixes[0]
    for name in ("default", "science"):
        (store.images_dir() / "names" / name).unlink()
    with pytest.raises(ImageError) as caught:
        _open(store.find_image(image.digest))
    assert "build" not in caught.value.fix


def test_the_list_shows_damaged_images(image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image list` marks damaged images and how to repair them."""
    store.set_name("science", image.digest.removeprefix("sha256:"))
    (store.images_dir() / "names" / "default").unlink()
    _flip(image.folder / "manifest.json", restore_times=True)
    assert main(["image", "list"]) == 0
    captured = capsys.readouterr()
    assert "no images yet" not in captured.err
    fix = "Run x07 image build --name science --no-include, or use --include with the packages that it had"
    line = captured.out.splitlines()[0]
    assert line.startswith(f"science          {image.digest}  ")
    assert " of saved VMs  damaged  (" in line
    assert line.endswith(f". {fix}.)")
    assert main(["image", "list", "--json"]) == 0
    (row,) = document(capsys.readouterr().out)["images"]
    assert (row["name"], row["digest"], row["suite"], row["current"]) == ("science", image.digest, None, False)
    assert row["problem"]
    assert row["fix"] == fix


def test_the_list_names_the_command_that_renews(image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image list` shows the command that updates an outdated image."""
    store.set_name("science", image.digest.removeprefix("sha256:"))
    assert main(["image", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("(")[2] for line in lines[:-1]] == [
        "built by another version of x07-sandbox. Run x07 image build.)",
        "built by another version of x07-sandbox. Run x07 image build --name science.)",
    ]


def test_verify_names_the_repair_command(image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image verify` of a damaged image ends with 1 and names the repair command, in JSON too."""
    assert main(["image", "inspect", "--json"]) == 0
    assert document(capsys.readouterr().out)["digest"] == image.digest
    assert main(["image", "verify", "--json"]) == 0
    good = {"schema_version": "x07.sandbox.image.verify@0.1.0", "digest": image.digest, "good": True}
    assert document(capsys.readouterr().out) == good | {"problems": [], "fix": None}
    _flip(image.folder / "initrd.cpio", restore_times=True)
    assert main(["image", "verify"]) == 1
    assert "Run x07 image build, and if it happens again" in capsys.readouterr().err
    assert main(["image", "verify", "--json"]) == 1
    found = document(capsys.readouterr().out)
    assert (found["good"], found["fix"].partition(",")[0]) == (False, "Run x07 image build")


def test_a_copy_with_other_modes_says_how_to_copy(image: store.Image) -> None:
    """The error for an image that was copied without its modes names the command that keeps them."""
    (image.folder / "initrd.cpio").chmod(0o400)  # as cp -r does under umask 077
    with pytest.raises(ImageError) as caught, verify.open_image(image):
        pass
    assert "mode 0400" in caught.value.why
    assert worded(caught.value.fix).startswith("If you copied it, copy it again with cp -rp and then run chown -R")
