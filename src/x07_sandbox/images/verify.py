"""Opening and verifying an image's files, and reading and writing scratch disks.

Each file is opened once, without following links, below the image folder's descriptor. The virtual machine gets the
file's descriptor, so replacing the file later has no effect. A large file is hashed once per boot of the host, and
again if fstat shows a change. Small files are hashed each time.

The checks protect against accidents and other users, but not against the user's own processes.

A scratch disk is an empty ext4 file system, stored as its few non-zero blocks. A job's disk is a sparse file with these
blocks.
"""

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from x07_sandbox.channel.contents import next_data
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import Arch, arch_named
from x07_sandbox.host.linux import mounts
from x07_sandbox.host.paths import closing_fd, host_error, raised_as
from x07_sandbox.host.verdicts import SETTLED_NS, Verdict
from x07_sandbox.images import store
from x07_sandbox.images.store import Image, Manifest, Part, Piece, ScratchDisk

FILE_MODE = 0o444
FOLDER_MODE = 0o700
TRIES = 5
SMALL_BYTES = 64 * 1024
CHUNK_BYTES = 1024 * 1024
# File systems on which a write through a mapping is known to change ctime. Not tmpfs (measured), and not overlay, whose
# upper layer may be one. On others, each open hashes everything.
TIMES_MOVE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})
FIX = "Run x07 image build, and if it happens again check the disk"
DISK_BYTES = 8 * 1024**3  # of a scratch disk
BLOCK = 4096
MAX_HEAD_BYTES = 4 * 1024 * 1024
# A lack of resources does not mean that the file is damaged.
_RUN_OUT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

Identity = tuple[int, int, int, int, int, int, int]


class OpenImage(msgspec.Struct, frozen=True, kw_only=True):
    """Verified files of an image. `open_image` closes them."""

    fds: dict[str, int]  # read-only descriptors by name of the part (store.Parts)
    manifest: Manifest

    @property
    def arch(self) -> Arch:
        """The architecture of the image's kernel and programs."""
        return arch_named(self.manifest.arch)


class Subject(msgspec.Struct, frozen=True):
    """An object to verify: its name in errors, the name of its record, its hash function, and the advice in errors."""

    name: str
    record: str
    sha256: Callable[[int, int], str]
    fix: str = FIX


@contextlib.contextmanager
def open_image(image: Image) -> Iterator[OpenImage]:
    """Open and verify the files that VMs start from. Raises ImageError if one differs from *image*'s manifest.

    The filters lie in the initramfs too, and only `verify_image` looks at the copies for people to read.
    Raises HostError if the host lacks descriptors, memory or space.
    """
    subject = subject_of(image)
    with contextlib.ExitStack() as stack:
        folder_fd = stack.enter_context(opened_folder(image.folder, subject))
        parts = image.manifest.parts.by_name()
        fds = dict(zip(parts, opened_parts(folder_fd, [*parts.values()], subject, stack), strict=True))
        yield OpenImage(fds=fds, manifest=image.manifest)


def subject_of(image: Image) -> Subject:
    """Return what errors say about an image."""
    hexes = image.digest.removeprefix("sha256:")
    return Subject(f"guest image {hexes[:12]}", hexes, sha256_of, store.repair_hint(image))


def opened_parts(folder_fd: int, parts: Sequence[Part], subject: Subject, stack: contextlib.ExitStack) -> list[int]:
    """Open and verify *parts*, files below a folder. *stack* closes the descriptors. Raises ImageError, HostError."""
    before = _recorded(subject)
    fds = [stack.enter_context(opened_file(folder_fd, part.file, subject)) for part in parts]
    fresh = {
        part.file: check_part(fd, part, before.get(part.file), subject) for fd, part in zip(fds, parts, strict=True)
    }
    _write_record(subject, parts, fresh, before)
    return fds


def verify_image(image: Image, *, use_record: bool = False) -> list[str]:
    """Return a sentence for each problem of an image. use_record: hash only files that changed since the last time."""
    problems: list[str] = []
    subject = subject_of(image)
    parts = image.manifest.files()
    recorded = _recorded(subject) if use_record else {}
    verified: dict[str, Identity] = {}
    with contextlib.ExitStack() as stack:
        try:
            folder_fd = stack.enter_context(opened_folder(image.folder, subject))
            _check_manifest(folder_fd, image, subject)
        except ImageError as exc:
            return [f"{exc.what}: {exc.why}"]
        for part in parts:
            try:
                with opened_file(folder_fd, part.file, subject) as fd:
                    verified[part.file] = check_part(fd, part, recorded.get(part.file), subject)
            except ImageError as exc:
                problems.append(f"{part.file}: {exc.why}")
        if use_record:
            _write_record(subject, parts, verified, recorded)
        foreign = set(os.listdir(folder_fd)) - {part.file for part in parts} - {"manifest.json"}  # noqa: PTH208 - of a descriptor
        return problems + [f"{name}: it does not belong to the image" for name in sorted(foreign)]


def check_part(fd: int, part: Part, earlier: Identity | None, subject: Subject) -> Identity:
    """Check that the file *fd* is *part*; return the file's identity. Raises ImageError.

    earlier: the identity that was recorded at the last verification, or None.
    """
    before = os.fstat(fd)
    if before.st_size != part.bytes:
        raise _bad(subject, f"{part.file} has {before.st_size} bytes instead of {part.bytes}")
    identity = identity_of(before)
    if earlier == identity and part.bytes > SMALL_BYTES and filesystem(fd) in TIMES_MOVE:
        return identity
    # Another build may link the file into its image at any time, which changes ctime: retry.
    for _ in range(TRIES):
        if subject.sha256(fd, part.bytes) != part.sha256:
            raise _bad(subject, f"the content of {part.file} has changed since it was built")
        after = identity_of(os.fstat(fd))
        if after == identity:
            return identity
        identity = after
    raise _bad(subject, f"{part.file} kept changing while it was verified")


def identity_of(info: os.stat_result) -> Identity:
    """Return the fstat fields that change when a file is written, replaced, or given to another user.

    The link count is left out, since builds link the files of a base into new images.
    """
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_mode, info.st_uid)


def sha256_of(fd: int, size: int) -> str:
    """Return the digest of the first *size* bytes. The file offset does not change."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    offset = 0
    while offset < size:
        got = os.preadv(fd, [buffer[: min(CHUNK_BYTES, size - offset)]], offset)
        if got == 0:
            break
        digest.update(buffer[:got])
        offset += got
    return digest.hexdigest()


def filesystem(fd: int) -> str:
    """Return the file system type of *fd* by its name in mountinfo, or "" if unknown."""
    try:
        with Path(f"/proc/self/fdinfo/{fd}").open("rb") as file:
            number = next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
        return next(mounted.kind for mounted in mounts() if mounted.number == number)
    except (OSError, StopIteration):
        return ""


@contextlib.contextmanager
def opened_folder(folder: Path, subject: Subject) -> Iterator[int]:
    """Open a folder that only this user can access. Raises ImageError, HostError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        what = f"cannot open {subject.name}"
        raise _run_out(exc) or ImageError(what, exc.strerror or str(exc), subject.fix) from exc
    with closing_fd(fd):
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != FOLDER_MODE:
            raise _bad(subject, "its folder must belong to you and have mode 0700")
        yield fd


@contextlib.contextmanager
def opened_file(folder_fd: int, name: str, subject: Subject) -> Iterator[int]:
    """Open a read-only regular file of this user. Raises ImageError, HostError."""
    try:
        # O_NONBLOCK: a FIFO in its place must not block.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
    except OSError as exc:
        raise _run_out(exc) or _bad(subject, f"{name} cannot be opened, or is a link ({exc.strerror})") from exc
    with closing_fd(fd):
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _bad(subject, f"{name} is not a regular file")
        if stat.S_IMODE(info.st_mode) != FILE_MODE or info.st_uid != os.geteuid():
            has = f"mode {stat.S_IMODE(info.st_mode):04o} and uid {info.st_uid}"
            why = f"{name} has {has}, but must belong to you and have mode {FILE_MODE:04o}"
            fix = f"If you copied it, copy it again with cp -rp and then run chown -R on the copy. {subject.fix}"
            raise ImageError(f"cannot use {subject.name}", why, fix)
        os.set_blocking(fd, True)
        yield fd


def read_disk(fd: int) -> tuple[bytes, ScratchDisk]:
    """Return the non-zero blocks of the disk *fd* and their offsets. Raises ImageError if there are too many blocks."""
    head = bytearray()
    pieces: list[Piece] = []
    for offset in _data_blocks(fd):
        block = os.pread(fd, BLOCK, offset)
        if not any(block):
            continue
        joins = pieces and pieces[-1].offset + pieces[-1].bytes == offset
        begin = pieces.pop().offset if joins else offset
        pieces.append(Piece(offset=begin, bytes=offset + BLOCK - begin))
        head += block
        if len(head) > MAX_HEAD_BYTES:
            why = f"mke2fs wrote more than {MAX_HEAD_BYTES} bytes"
            raise ImageError("cannot make the scratch disk", why, "Install Debian's e2fsprogs 1.47 or newer")
    return bytes(head), ScratchDisk(bytes=DISK_BYTES, pieces=pieces)


def _data_blocks(fd: int) -> list[int]:
    blocks: list[int] = []
    end = 0
    while True:
        start, end = next_data(fd, end, DISK_BYTES)
        if start == end:
            return blocks
        blocks += range(start - start % BLOCK, end, BLOCK)
        if len(blocks) > DISK_BYTES // BLOCK // 64:
            why = "the cache is on a file system without sparse files"
            fix = "Set X07_VM_CACHE_DIR to a folder on ext4, xfs or btrfs"
            raise ImageError("cannot make the scratch disk", why, fix)


def write_disk(scratch_fd: int, disk: ScratchDisk, fd: int) -> None:
    """Write a scratch disk to the empty file *fd*. scratch_fd: the image's verified scratch file."""
    what = "cannot make a scratch disk"
    fix = "Raise the file size limit with ulimit -f, or set X07_VM_STATE_DIR to a folder on ext4, xfs or btrfs"
    with raised_as(HostError, what, fix):
        os.ftruncate(fd, disk.bytes)
    position = 0
    for piece in disk.pieces:
        data = os.pread(scratch_fd, piece.bytes, position)
        if len(data) != piece.bytes:
            why = "the scratch part of the image was truncated"
            raise ImageError(what, why, "Try again: x07 then verifies the image")
        position += piece.bytes
        written = 0
        with raised_as(HostError, what, "Free disk space, or set X07_VM_STATE_DIR"):
            while written < len(data):  # a full disk accepts a part before it fails
                written += os.pwrite(fd, data[written:], piece.offset + written)


def _copy_range(source_fd: int, target_fd: int, at: int, size: int) -> int:
    try:
        return os.copy_file_range(source_fd, target_fd, size, at, at)  # shares blocks where the file system can
    except OSError as exc:
        if exc.errno not in {errno.EXDEV, errno.EOPNOTSUPP}:
            raise
    os.lseek(target_fd, at, os.SEEK_SET)
    return os.sendfile(target_fd, source_fd, at, size)


def copy_sparse(source_fd: int, target_fd: int, most: int | None = None) -> None:
    """Copy a sparse file, or its first *most* bytes, into an empty one. Raises OSError."""
    size, at = os.fstat(source_fd).st_size if most is None else most, 0
    os.ftruncate(target_fd, size)
    while at < size:
        at, end = next_data(source_fd, at, size)
        while at < end:
            if not (count := _copy_range(source_fd, target_fd, at, end - at)):
                raise OSError(errno.EIO, "the file shrank while it was copied")
            at += count


def _check_manifest(folder_fd: int, image: Image, subject: Subject) -> None:
    """Raise ImageError if the manifest has changed since *image* was read."""
    with opened_file(folder_fd, "manifest.json", subject) as fd:
        data = os.pread(fd, store.MAX_BYTES + 1, 0)
    if data != store.encode_manifest(image.manifest) or store.digest_of(image.manifest) != image.digest:
        raise _bad(subject, "manifest.json has changed since it was read")


def _recorded(subject: Subject) -> dict[str, Identity]:
    """Return the identities of files verified since the host booted, or {} if there is no valid record of them."""
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(Verdict("verified", subject.record).read().get("files", {}), dict[str, Identity])
    return {}


def _write_record(
    subject: Subject, parts: Sequence[Part], verified: dict[str, Identity], before: dict[str, Identity]
) -> None:
    """Record the identity of each large file, whose digest is known to be right. before: the present record."""
    large = {part.file for part in parts if part.bytes > SMALL_BYTES}
    if (files := {name: identity for name, identity in verified.items() if name in large}) != before:
        now_ns = time.time_ns()  # wall time, because ctime is
        settled = {name: identity for name, identity in files.items() if identity[4] < now_ns - SETTLED_NS}
        Verdict("verified", subject.record).write({"files": settled})


def _run_out(exc: OSError) -> HostError | None:
    return host_error(exc) if exc.errno in _RUN_OUT else None


def _bad(subject: Subject, why: str) -> ImageError:
    return ImageError(f"cannot use {subject.name}", why, subject.fix)
