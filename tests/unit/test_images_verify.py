"""Opening an image: what was checked is what is handed on, and a changed byte is found whatever its times say."""

from __future__ import annotations

import hashlib
import os
import resource
from typing import TYPE_CHECKING

import pytest

from tests.published import document
from x07_sandbox.cli.main import main
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.images import manifest, scratch, store, verify

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


def _write(folder: Path) -> str:
    """A made-up image in the store; its digest in hex."""
    folder.mkdir(mode=0o700)
    parts = []
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o444)
        parts.append(manifest.Part(file=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))
    made = manifest.sealed(
        manifest.Manifest(
            schema_version=manifest.SCHEMA,
            digest=manifest.NO_DIGEST,
            recipe=1,
            arch="x86_64",
            suite="trixie",
            include=[],
            base="0" * 64,
            guest_code="0" * 64,
            kernel_release="6.12",
            parts=manifest.Parts(kernel=parts[0], initrd=parts[1], root=parts[2], scratch=parts[3]),
            scratch_disk=manifest.ScratchDisk(bytes=1 << 20, pieces=[manifest.Piece(offset=8192, bytes=4096)]),
            packages=[],
            filters={"base": parts[4]},
        )
    )
    (folder / "manifest.json").write_bytes(manifest.encode(made))
    (folder / "manifest.json").chmod(0o444)
    return made.digest.removeprefix("sha256:")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Image:
    """An image called "default" in a store of its own, on whatever file system the tests' folder is."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    digest = _write(store.images_dir() / "made")
    (store.images_dir() / "made").rename(store.images_dir() / digest)
    store.set_name("default", digest)
    return store.find_image(None)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that was hashed, in order: the real function, watched."""
    sizes: list[int] = []
    real = verify.sha256_of

    def watch(fd: int, size: int) -> str:
        sizes.append(size)
        return real(fd, size)

    monkeypatch.setattr(verify, "sha256_of", watch)
    return sizes


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to be recorded at once."""
    monkeypatch.setattr(verify, "SETTLED_NS", 0)


def _open(image: store.Image) -> None:
    with verify.open_image(image):
        pass


def _flip(path: Path, *, restore_times: bool) -> None:
    """Change one byte in place, and give the file its old mode and, if asked, its old mtime."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        file.write(b"!")
    path.chmod(0o444)
    if restore_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_descriptors_are_read_only_and_hold_the_parts(image: store.Image) -> None:
    """The four descriptors are the image's files, cannot be written, and are closed afterwards."""
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
    """One changed byte in any part is found at the next start, also when its modification time was put back."""
    _open(image)
    _flip(image.folder / name, restore_times=True)
    with pytest.raises(ImageError, match=f"the content of {name} has changed"):
        _open(image)
    assert verify.verify_image(image) == [f"{name}: the content of {name} has changed since it was built"]


@pytest.mark.usefixtures("settled")
def test_large_files_are_hashed_once_and_small_ones_each_time(
    image: store.Image, counted: list[int], tmp_path: Path, need: Need
) -> None:
    """The hot path hashes only what is small, once the large files were found right."""
    with (tmp_path / "probe").open("wb") as file:
        kind = verify.filesystem(file.fileno())
    need(kind in verify.TIMES_MOVE, f"tests' folder on a disk file system, not {kind}", installable=False)
    small = [len(data) for data in FILES.values() if len(data) <= verify.SMALL_BYTES]
    _open(image)
    assert sorted(counted) == sorted(map(len, FILES.values()))
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
    """A record holds only for the very file with the very times, mode and owner that it had."""
    _open(image)
    counted.clear()
    change(image.folder / "root.erofs")
    _open(image)
    assert len(FILES["root.erofs"]) in counted


@pytest.mark.usefixtures("settled")
def test_new_boot_makes_everything_be_hashed_again(
    image: store.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of an earlier boot of the host do not count."""
    _open(image)
    counted.clear()
    monkeypatch.setattr(verify, "boot_id", lambda: "another")
    _open(image)
    assert sorted(counted) == sorted(map(len, FILES.values()))


def test_file_changed_just_now_is_not_recorded(
    image: store.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file younger than the kernel's clock can tell apart is hashed again next time."""
    assert verify.SETTLED_NS >= 100_000_000  # ten ticks of the slowest clock
    monkeypatch.setattr(verify, "SETTLED_NS", 3600 * 10**9)  # however slow this host is
    path = image.folder / "root.erofs"
    path.chmod(0o444)
    _open(image)
    counted.clear()
    _open(image)
    assert len(FILES["root.erofs"]) in counted


def test_unknown_file_system_means_hashing_each_time(
    image: store.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a write need not move the change time, such as tmpfs, every start hashes everything."""
    monkeypatch.setattr(verify, "SETTLED_NS", 0)
    monkeypatch.setattr(verify, "TIMES_MOVE", frozenset({"none-such"}))
    _open(image)
    counted.clear()
    _open(image)
    assert sorted(counted) == sorted(map(len, FILES.values()))


def test_file_system_of_a_descriptor_is_known(need: Need) -> None:
    """Tmpfs is told apart from a disk."""
    need(os.path.ismount("/dev/shm"), "a tmpfs at /dev/shm", installable=False)  # noqa: S108 - only looked at
    fd = os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY)  # noqa: S108 - only looked at
    try:
        assert verify.filesystem(fd) == "tmpfs"
        assert "tmpfs" not in verify.TIMES_MOVE
    finally:
        os.close(fd)


@pytest.mark.usefixtures("settled")
def test_path_swapped_after_opening_changes_nothing(image: store.Image) -> None:
    """What was checked is what the descriptor shows, whatever happens to the path."""
    with verify.open_image(image) as opened:
        evil = image.folder / "evil"
        evil.write_bytes(b"evil")
        evil.rename(image.folder / "root.erofs")
        assert os.pread(opened.fds["root"], 1 << 24, 0) == FILES["root.erofs"]
    with pytest.raises(ImageError):
        _open(image)


def test_link_is_refused(image: store.Image) -> None:
    """A symbolic link in a part's place is refused although it leads to the right bytes."""
    path = image.folder / "vmlinux"
    path.rename(image.folder.parent / "elsewhere")
    path.symlink_to(image.folder.parent / "elsewhere")
    with pytest.raises(ImageError, match="is a link"):
        _open(image)


def test_folder_that_is_a_link_is_refused(image: store.Image) -> None:
    """The image's folder itself is no link either."""
    image.folder.rename(image.folder.parent / "elsewhere")
    image.folder.symlink_to(image.folder.parent / "elsewhere")
    with pytest.raises(ImageError, match="cannot open guest image"):
        _open(image)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_want_of_descriptors_is_no_damage(image: store.Image, left: int) -> None:
    """Where this process may open no more files that is what is said, and not that the image is no good."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (image.folder / "vmlinux").open() as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1 + left, limits[1]))
        try:
            with pytest.raises(HostError, match="Too many open files"):
                _open(image)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_fifo_is_refused_and_does_not_hang(image: store.Image) -> None:
    """Something that is no file is refused at once."""
    (image.folder / "vmlinux").unlink()
    os.mkfifo(image.folder / "vmlinux", 0o444)
    with pytest.raises(ImageError, match="not a regular file"):
        _open(image)


@pytest.mark.parametrize("mode", [0o644, 0o400, 0o666, 0o4444])
def test_wrong_mode_is_refused(image: store.Image, mode: int) -> None:
    """A file that somebody could write is not used."""
    (image.folder / "vmlinux").chmod(mode)
    with pytest.raises(ImageError, match="has mode"):
        _open(image)


def test_open_folder_is_refused(image: store.Image) -> None:
    """A folder that others can enter is not used."""
    image.folder.chmod(0o755)
    with pytest.raises(ImageError, match="mode 0700"):
        _open(image)
    assert verify.verify_image(image) != []


def test_wrong_size_is_refused(image: store.Image) -> None:
    """A longer or shorter file is refused before it is hashed."""
    path = image.folder / "root.erofs"
    path.chmod(0o644)
    os.truncate(path, len(FILES["root.erofs"]) - 1)
    path.chmod(0o444)
    with pytest.raises(ImageError, match="bytes instead of"):
        _open(image)


def test_manifest_changed_since_it_was_read_is_refused(image: store.Image) -> None:
    """The manifest in memory and the one in the folder are the same."""
    path = image.folder / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"trixie", b"forky1"))
    path.chmod(0o444)
    with pytest.raises(ImageError, match=r"manifest\.json has changed"):
        _open(image)
    with pytest.raises(ImageError, match="its digest does not match its content"):
        store.find_image(None)


def test_missing_and_foreign_files_are_reported(image: store.Image) -> None:
    """x07 image verify names every part that is gone and every file that does not belong there."""
    (image.folder / "scratch.head").unlink()
    (image.folder / "notes.txt").write_text("x")
    problems = verify.verify_image(image)
    assert len(problems) == 2
    assert problems[0].startswith("scratch.head: ")
    assert problems[1] == "notes.txt: it does not belong to the image"


def test_good_image_has_no_problems(image: store.Image) -> None:
    """A whole image verifies without a word."""
    assert verify.verify_image(image) == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage", [b"", b"junk", b'{"schema_version":"x07.sandbox.verified@9","boot_id":"","files":{}}']
)
def test_damaged_record_means_hashing(image: store.Image, counted: list[int], damage: bytes) -> None:
    """A record that cannot be read counts as none, and is written anew."""
    _open(image)
    record = next((image.folder.parent.parent / "verified").glob("*.json"))
    assert record.stat().st_mode & 0o777 == 0o600
    whole = record.read_bytes()
    record.write_bytes(damage)
    counted.clear()
    _open(image)
    assert sorted(counted) == sorted(map(len, FILES.values()))
    assert record.read_bytes() == whole


def test_image_is_found_by_name_digest_and_prefix(image: store.Image) -> None:
    """A name, the whole digest and a unique prefix of it lead to the same image."""
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


def test_image_without_a_build_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an image the error has the one line to type."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ImageError, match=r"no guest image: none has been built. Run x07 image build"):
        store.find_image(None)
    assert store.list_images() == []


def test_where_there_are_other_images_their_names_are_said(image: store.Image) -> None:
    """Where images were built under other names only, the error does not say that there is none, and names them."""
    for name in ("science", "extra"):
        store.set_name(name, image.digest.removeprefix("sha256:"))
    (store.images_dir() / "names" / "default").unlink()
    with pytest.raises(ImageError, match="no guest image: there is none with the name default") as caught:
        store.find_image(None)
    assert caught.value.fix == "Run x07 image build, or use one of these: extra, science"


def test_image_of_other_guest_code_is_not_current(image: store.Image) -> None:
    """An image built from other guest code is told apart from one of this installation."""
    assert not store.image_is_current(image)


def test_scratch_disk_is_made_from_the_part(image: store.Image, tmp_path: Path) -> None:
    """A job's disk has the pieces where they belong, zeros elsewhere, and takes no space for zeros."""
    with (tmp_path / "disk").open("w+b") as disk, verify.open_image(image) as opened:
        scratch.write_disk(opened.fds["scratch"], opened.manifest.scratch_disk, disk.fileno())
        disk.seek(0)
        assert disk.read() == bytes(8192) + b"s" * 4096 + bytes((1 << 20) - 12288)
        assert os.fstat(disk.fileno()).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(("times", "good"), [(1, True), (100, False)])
def test_a_link_made_meanwhile_is_no_damage(
    image: store.Image, monkeypatch: pytest.MonkeyPatch, times: int, *, good: bool
) -> None:
    """A file that another build links while it is read is read again, and refused only if it never comes to rest."""
    real, left = verify.sha256_of, [times]

    def linked_meanwhile(fd: int, size: int) -> str:
        digest = real(fd, size)
        if left[0] > 0:
            left[0] -= 1
            before = os.fstat(fd).st_ctime_ns
            while os.fstat(fd).st_ctime_ns == before:  # the clock of a file system moves in steps
                os.fchmod(fd, 0o444)  # moves it as a link does
        return digest

    monkeypatch.setattr(verify, "sha256_of", linked_meanwhile)
    if good:
        _open(image)
    else:
        with pytest.raises(ImageError, match="kept changing"):
            _open(image)


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
    """For an image that is not there the error has the very command that makes one of that name, if any does."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ImageError, match="no guest image") as caught:
        store.find_image(ref)
    assert caught.value.fix == fix


def test_a_damaged_image_names_the_command_that_mends_it(image: store.Image) -> None:
    """What to do about a damaged part has the image's own name, and is no command where no name leads to it."""
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
    """`image list` shows an image whose manifest is damaged as such, with what to do, and ends with 0; JSON too."""
    store.set_name("science", image.digest.removeprefix("sha256:"))
    (store.images_dir() / "names" / "default").unlink()
    _flip(image.folder / "manifest.json", restore_times=True)
    assert main(["image", "list"]) == 0
    told = capsys.readouterr()
    assert "no images yet" not in told.err
    fix = "Run x07 image build --name science --no-include, or with --include and its packages"
    assert told.out.startswith(f"science          {image.digest}  damaged  (")
    assert told.out.endswith(f". {fix}.)\n")
    assert main(["image", "list", "--json"]) == 0
    (row,) = document(capsys.readouterr().out)["images"]
    assert (row["name"], row["digest"], row["suite"], row["current"]) == ("science", image.digest, None, False)
    assert row["problem"]
    assert row["fix"] == fix


def test_the_list_names_the_command_that_renews(image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`image list` gives, for an image of another version, the command that renews the one of that name."""
    store.set_name("science", image.digest.removeprefix("sha256:"))
    assert main(["image", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("(")[2] for line in lines] == [
        "built by another version of x07-sandbox. Run x07 image build.)",
        "built by another version of x07-sandbox. Run x07 image build --name science.)",
    ]


def test_verify_names_the_command_that_mends(image: store.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`image verify` of a damaged image ends with 1 and names the command that mends it, as JSON too."""
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
