"""The store of saved machines: every state of a VM on the disk, each in a folder of its own.

cache/templates/<key>/{manifest.json,ram,state,scratch.head}         a saved VM (qemu/template), to clone
cache/templates/<key>/{manifest.json,ram,scratch.head,images/*}      a saved process of one (qemu/hot)
cache/templates/<id>00.../{manifest.json,ram,state,disk,...}         a snapshot (qemu/snapshot): kept by name, of a
                                                                     paused sandbox, or a checkpoint of an open one
cache/templates/.new-*                                               one that is being made

Whoever uses a folder, or makes it, holds a shared flock(2) on it. So a folder without a lock is not in use, and a
`.new-` folder without one was left by a killed process. All folders share one limit of disk space: above it, the least
recently used ones go. A paused sandbox, for 7 days, and the checkpoints of an open one stay, and count.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, Self

import msgspec

from x07_sandbox.backends.base import Kept, MachineKind, Note, Prunable
from x07_sandbox.channel.contents import next_data
from x07_sandbox.errors import BackendError, Command, HostError, ImageError, RefusedError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import boot_id, boot_ms
from x07_sandbox.host.locks import file_lock, is_locked, lock_for_removal, lock_shared
from x07_sandbox.host.paths import (
    cache_dir,
    cache_folder,
    least_recently_used,
    open_private_file,
    raised_as,
    read_bounded,
    why_not_ours,
)
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.verdicts import Verdict, validity
from x07_sandbox.host.waiting import Notice, Remark, unix_ms
from x07_sandbox.images.store import Part, ScratchDisk, list_images
from x07_sandbox.images.verify import CHUNK_BYTES, FILE_MODE, FOLDER_MODE, Subject, opened_file, opened_folder
from x07_sandbox.policy.decode import canonical_json
from x07_sandbox.records.runs import record_in

SCHEMA: Final = "x07.sandbox.saved@0.1.0"
MANIFEST: Final = "manifest.json"
_NAME: Final = "[0-9a-f]" * 64
SUSPENDED: Final = "suspended"  # the kind of verdict on a saved machine that is not used for now
_MANIFEST_MAX: Final = 1 << 20
_ZEROS: Final = bytes(CHUNK_BYTES)
_UNLOCKED_S: Final = 60.0  # a new folder may not be locked yet
_WHAT: Final = "cannot save a VM"


class SavedVm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="vm"):
    """The files of a saved VM. state: QEMU's device state. scratch_disk: how the scratch file makes the disk."""

    ram: Part
    state: Part
    scratch: Part
    scratch_disk: ScratchDisk


class SavedProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="process"):
    """The files of a saved process. images: of criu's dump. names: see `start.Hot`. period: outside, it is not used."""

    ram: Part
    scratch: Part
    scratch_disk: ScratchDisk
    images: tuple[Part, ...]
    names: tuple[str, ...]
    period: str


class SavedMoment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="snapshot"):
    """A snapshot. Its files are private to the user, and too large to be verified whenever they are used."""

    note: Note

    def is_needed(self) -> bool:
        """Return whether a paused sandbox goes on from it."""
        record = record_in(Path(self.note.folder)) if self.note.keep == "paused" else None
        return record is not None and record.paused == self.note.id


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of manifest.json. digest: of all other fields. key: what the folder is called. image: its digest."""

    schema_version: str = SCHEMA
    digest: str = ""
    key: str
    image: str
    made: SavedVm | SavedProcess | SavedMoment

    def sealed(self) -> Self:
        """Return this manifest with its digest set."""
        blank = msgspec.structs.replace(self, digest="")
        digest = hashlib.sha256(canonical_json(msgspec.to_builtins(blank))).hexdigest()
        return msgspec.structs.replace(self, digest=f"sha256:{digest}")

    def write(self, folder: Path) -> None:
        """Write the manifest into the folder of its files. Raises OSError."""
        path = folder / MANIFEST
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self.sealed())))
        path.chmod(FILE_MODE)


class TransientError(BackendError):
    """A VM could not be saved, and the state of the host may be the cause."""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """The key and folder of a saved VM or process, which may not exist yet. See `VmTemplate` and `ProcessTemplate`.

    title: the jobs that use it. noun: what is saved. instead, done: what such jobs do, or did, without it. All for
    messages. waits_for_host: whether it is suspended, too, when no VM could be started to make it. next_attempt: names
    the attempt that follows one from it.
    """

    noun: ClassVar[str]
    instead: ClassVar[str]
    done: ClassVar[str]
    waits_for_host: ClassVar[bool]
    next_attempt: ClassVar[str]
    key: str
    folder: Path
    title: str = "runs"

    @property
    def subject(self) -> Subject:
        """The description of this template for `images/verify`."""
        return Subject(name=f"saved {self.noun} {self.key[:12]}", record=self.key, sha256=sparse_sha256)

    def suspended(self) -> str:
        """Return why the template is not used now, and until when, or "" if it is usable."""
        note = Verdict(SUSPENDED, self.key).read()
        until = f"Such jobs {self.instead} {validity(note)}, or until you run x07 image build for their image"
        return f"{note['reason']}. {until}" if "reason" in note else ""

    def suspend(self, reason: str, *, transient: bool, keep: bool = False) -> str:
        """Remove the template, and make no other for minutes or until the host reboots. Return why.

        transient: whether the state of the host may be the cause. The suspension then lasts minutes. keep: whether the
        template stays, and is used again afterwards.
        """
        with contextlib.suppress(OSError):
            Verdict(SUSPENDED, self.key).write({"reason": reason[:500]}, transient=transient)
        if not keep:
            remove(self.folder)
        return self.suspended() or reason


def templates_dir() -> Path:
    """Return the folder of all templates. Raises HostError."""
    return cache_folder("templates")


def current_period() -> str:
    """Return a text that changes when the host reboots, and every few hours."""
    return f"{boot_id()} {int(boot_ms() / 1000 // settings.HOT_S)}"


def _most_bytes() -> int:
    from x07_sandbox.host.user_settings import disk_limits  # few runs save or remove a VM

    return disk_limits().saved_vms_mib << 20


def lack_of_space(ram_bytes: int) -> str:
    """Return why no template with this much RAM can be saved on this disk, or "" if it can."""
    info = os.statvfs(templates_dir())
    free = info.f_bavail * info.f_frsize
    needed_bytes = settings.TEMPLATE_BYTES + ram_bytes // settings.TEMPLATE_SHARE
    if free >= needed_bytes:
        return ""
    needed = needed_bytes >> 20
    return f"saving one takes {needed} MiB of disk space, but {free >> 20} MiB are free"


def opened(template: Template, stack: contextlib.ExitStack) -> tuple[int, SavedVm | SavedProcess | SavedMoment] | None:
    """Return the folder of a saved VM or process, which *stack* closes, and what is in it. None: there is none.

    Raises ImageError if it is damaged.
    """
    try:
        # Until then, `delete_unused` does not remove it.
        stack.callback(close_on_fork.close, lock_shared(template.folder))
    except (FileNotFoundError, BlockingIOError):  # the latter while another process removes it
        return None
    except OSError:
        pass  # it cannot be opened below either, which says why
    if not template.folder.is_dir():
        return None
    folder_fd = stack.enter_context(opened_folder(template.folder, template.subject))
    with opened_file(folder_fd, MANIFEST, template.subject) as fd:
        found = _decode(os.pread(fd, _MANIFEST_MAX, 0), template)
    with contextlib.suppress(OSError):
        os.utime(template.folder)  # the time of last use, by which the oldest are removed
    return folder_fd, found.made


def _decode(data: bytes, template: Template) -> Manifest:
    what = f"cannot use {template.subject.name}"
    try:
        found = msgspec.json.decode(data, type=prepared(Manifest))
    except msgspec.MsgspecError as exc:
        raise ImageError(what, f"its {MANIFEST} is damaged", "Try again") from exc
    if (found.schema_version, found.key) != (SCHEMA, template.key):
        raise ImageError(what, f"its {MANIFEST} belongs to another saved VM", "Try again")
    if found != found.sealed():
        raise ImageError(what, f"its {MANIFEST} has changed", "Try again")
    return found


def sparse_sha256(fd: int, size: int) -> str:
    """Return the digest of a file's non-zero chunks and their offsets. Most of a VM's memory is a hole."""
    digest = hashlib.sha256(str(size).encode())
    offset = 0
    while offset < size:
        offset = next_data(fd, offset, size)[0] // CHUNK_BYTES * CHUNK_BYTES
        data = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        if not data:
            break
        if data != _ZEROS[: len(data)]:
            digest.update(f" {offset} {len(data)} ".encode())
            digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def new_file(path: Path, stack: contextlib.ExitStack) -> int:
    """Create a file and return its descriptor, which *stack* closes."""
    fd = open_private_file(path, os.O_RDWR | os.O_EXCL)
    stack.callback(os.close, fd)
    return fd


def seal(name: str, fd: int) -> Part:
    """Make a file of the template read-only and owned by this user again. While saving, the VM's uid owned it."""
    os.fchown(fd, os.geteuid(), os.getegid())
    os.fchmod(fd, FILE_MODE)
    size = os.fstat(fd).st_size
    return Part(file=name, bytes=size, sha256=sparse_sha256(fd, size))


def ensure(
    template: Template,
    make: Callable[[Path], Manifest],
    notice: str,
    progress: Callable[[str], None],
    *,
    wait: bool = True,
) -> None:
    """Make a template unless it exists. A lock ensures that only one process makes it. Raises SandboxError.

    make: makes its files in a folder. notice: what to tell the user before. wait: whether to wait for another process.
    """
    if template.folder.is_dir():
        return
    with contextlib.ExitStack() as stack:
        try:
            waits = partial(progress, "waiting for another process to save a VM") if wait else lambda: None
            most_s = 2 * settings.TEMPLATE_S + settings.PRELOAD_S if wait else 0.0
            stack.enter_context(file_lock(templates_dir() / ".lock", on_wait=waits, most_s=most_s))
        except TimeoutError as exc:  # the other process may be stopped, and must not block all others
            if not wait:
                raise HostError(_WHAT, "another process is saving one", "Try again later") from exc
            fix = ("Check for a stopped x07: ", Command("ps ax"))
            raise HostError(_WHAT, f"{exc} for the lock of all saved VMs", fix) from exc
        if not template.folder.is_dir():
            remove(template.folder)  # in case it is not a folder
            _make_alone(template, make, notice, progress)


def _make_alone(
    template: Template, make: Callable[[Path], Manifest], notice: str, progress: Callable[[str], None]
) -> None:
    most_bytes = _most_bytes()
    with new_folder() as work:
        progress(Notice(notice))
        found = make(work.path)
        found.write(work.path)
        work.rename(template.key)
    for remark in _remove_excess(template.key, found.image, most_bytes):
        progress(Remark(remark))


class NewFolder:
    """The folder of a machine that is being saved. It is private, and removed at the end of its context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stays = False

    def rename(self, key: str, *, stays: bool = True) -> None:
        """Put the folder in its place. stays: whether it outlives the context. Raises OSError."""
        self.path = self.path.rename(self.path.parent / key)
        self.stays = stays

    def keep(self, note: Note, kind: MachineKind) -> list[str]:
        """Keep a snapshot in the folder, instead of those with its name. Return remarks about what was removed.

        Raises SandboxError, such as RefusedError if what must stay would take more than the limit.
        """
        key, most_bytes = note.id.ljust(len(_NAME) // 8, "0"), _most_bytes()
        if note.keep != "kept" and (size := size_bytes(self.path) + _staying_bytes()) > most_bytes:
            why = f"checkpoints and paused sandboxes would take {size >> 20} MiB, and may take {most_bytes >> 20} MiB"
            fix = "Close sandboxes that have them, or raise [disk] saved_vms_mib in sandbox.toml"
            raise RefusedError("cannot keep the snapshot", why, fix, code="no-disk-room")
        with raised_as(HostError, "cannot keep the snapshot", "Free disk space"):
            Manifest(key=key, image=kind.image_digest, made=SavedMoment(note=note)).write(self.path)
            self.rename(key, stays=note.keep != "open")
        for one in kept_snapshots():
            if note.name and one.note.name == note.name and one.note.id != note.id:
                remove(one.folder)
        return _remove_excess(key, kind.image_digest, most_bytes)


@contextlib.contextmanager
def new_folder() -> Iterator[NewFolder]:
    """Make an empty folder for the files of a machine. Raises HostError."""
    import shutil
    import tempfile

    with raised_as(HostError, _WHAT, "Free disk space"):
        for left in leftovers():
            shutil.rmtree(left, ignore_errors=True)
        work = NewFolder(Path(tempfile.mkdtemp(prefix=".new-", dir=templates_dir())))
        lock = lock_shared(work.path)
        work.path.chmod(FOLDER_MODE)  # the umask may have removed some of these bits
    try:
        yield work
    finally:
        close_on_fork.close(lock)
        if not work.stays:
            shutil.rmtree(work.path, ignore_errors=True)


def _staying_bytes() -> int:
    return sum(one.bytes for one in kept_snapshots() if one.note.keep != "kept")


def _remove_excess(keep: str, image: str, most_bytes: int) -> list[str]:
    """Remove what can be removed after *keep*, a saved VM of an image, was added. Return what was removed."""
    images = {image.digest for image in list_images()} | {image}
    gone: dict[str, list[int]] = {}
    for old, why in expired(keep=keep, images=images, most_bytes=most_bytes):
        size = size_bytes(old)
        with contextlib.suppress(OSError):
            delete_unused(old)
            gone.setdefault(why, []).append(size)
    return [f"removed saved VMs ({len(sizes)}, with {sum(sizes) >> 20} MiB): {why}" for why, sizes in gone.items()]


def expired(*, keep: str, images: set[str], most_bytes: int) -> list[tuple[Path, str]]:
    """Return the folders that can be removed, each with the reason. None of them is in use.

    These are those whose image is gone, those that were not used for long, and the least recently used ones if all take
    more than *most_bytes*. keep: the key of one that stays in any case. images: digests of the existing images.
    """
    unused: list[tuple[float, int, Path]] = []
    doomed = []
    since = unix_ms() / 1000 - settings.RETENTION_S
    for folder, found in every():
        made = None if found is None else found.made
        held = made.note.keep if isinstance(made, SavedMoment) else "kept"
        if folder.name == keep or is_locked(folder):
            most_bytes -= size_bytes(folder)
        elif isinstance(made, SavedMoment) and held != "kept" and not made.is_needed():
            doomed.append((folder, "its sandbox has ended"))
        elif folder.stat().st_mtime < since:
            doomed.append((folder, "not used for 7 days"))
        elif held == "paused":
            most_bytes -= size_bytes(folder)
        elif found is not None and found.image not in images:  # it may be of another version of x07-sandbox
            doomed.append((folder, "the image is gone"))
        elif isinstance(made, SavedProcess) and made.period != current_period():
            doomed.append((folder, "used as long as allowed"))
        else:
            unused.append((folder.stat().st_mtime, size_bytes(folder), folder))
    oldest = least_recently_used(unused, most_bytes)
    why = "all take more space than [disk] saved_vms_mib allows, and others were used more recently"
    return doomed + [(folder, why) for folder in oldest]


def every() -> list[tuple[Path, Manifest | None]]:
    """Return all folders with their manifests; None for a manifest that is damaged, or of another version."""
    found: list[tuple[Path, Manifest | None]] = []
    for folder in templates_dir().glob(_NAME) if os.path.lexists(cache_dir() / "templates") else ():
        manifest = None
        with contextlib.suppress(HostError, UsageError, msgspec.MsgspecError):
            data = read_bounded(folder / MANIFEST, "manifest", _MANIFEST_MAX)
            manifest = msgspec.json.decode(data, type=prepared(Manifest))
        found.append((folder, manifest))
    return found


def kept_snapshots() -> list[Kept]:
    """Return the snapshots, oldest first. Raises HostError."""
    found = [
        Kept(manifest.made.note, folder, manifest.image, size_bytes(folder))
        for folder, manifest in every()
        if manifest is not None and isinstance(manifest.made, SavedMoment)
    ]
    return sorted(found, key=lambda one: one.note.created_unix_ms)


def size_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk. stat(2) counts blocks of 512 bytes."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # another process is removing it
            total += path.lstat().st_blocks * 512
    return total


def saved_bytes() -> dict[str, int]:
    """Return what saved machines take on the disk, by the digest of their image. Raises HostError."""
    sizes: dict[str, int] = {}
    for folder, found in every():
        if found is not None:
            sizes[found.image] = sizes.get(found.image, 0) + size_bytes(folder)
    return sizes


def remove(folder: Path) -> None:
    """Remove a saved machine if possible. Running clones keep the files that they have open."""
    with contextlib.suppress(OSError):
        delete(folder)


def delete(folder: Path) -> None:
    """Remove a saved machine, atomically for processes that use it. Raises OSError."""
    import shutil
    import tempfile

    if not os.path.lexists(folder):
        return
    doomed = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        folder.rename(doomed / "old")
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def delete_unused(folder: Path) -> None:
    """Remove a saved machine unless a VM uses it. Raises OSError."""
    with lock_for_removal(folder) as free:
        if not free:
            raise BlockingIOError(0, "a VM uses it")
        delete(folder)


def leftovers() -> list[Path]:
    """Return the folders that killed processes left while they made or removed one. Raises HostError."""
    found, since = [], unix_ms() / 1000 - _UNLOCKED_S
    for path in (*templates_dir().glob(".new-*"), *templates_dir().glob(".old-*")):
        with contextlib.suppress(OSError):  # such as one that has just been removed
            # A new folder is empty until it is locked.
            if not is_locked(path) and (path.lstat().st_mtime < since or any(path.iterdir())):
                found.append(path)
    return found


def prunable(images: set[str], on_wait: Callable[[], None]) -> Iterator[Prunable]:
    """Lock the store, and yield what can be removed if only *images* (digests) stay. Raises SandboxError."""
    import shutil

    if not os.path.lexists(cache_dir() / "templates"):
        return
    with file_lock(templates_dir() / ".lock", on_wait=on_wait):
        for left in leftovers():
            if not why_not_ours(left.lstat(), stat.S_ISDIR):
                yield Prunable("leftover", left, "a killed process left it", shutil.rmtree)
        for path, why in expired(keep="", images=images, most_bytes=_most_bytes()):
            yield Prunable("template", path, why, delete_unused)
