"""Trees of host files: creating them as they arrive, and reporting what the program changed or left behind.

Files are created as the program's user. Changes are detected by inode and ctime, which only the kernel sets. So that
every change gets a later ctime, the program starts at least one clock tick after its last file was created. The host
then compares contents.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Final, NamedTuple

from x07_sandbox.channel.contents import READ, parts
from x07_sandbox.channel.trees import (
    CHANGED,
    FOLDER_FLAGS,
    NO_TIME,
    Entry,
    Kind,
    Unpacker,
    can_hold_names,
    entry_of,
    segment,
    segment_of,
    walk,
)
from x07_sandbox.errors import PeerError
from x07_sandbox.guest.system import JobError

_COARSE: Final = 5  # CLOCK_REALTIME_COARSE (clock_gettime(2)), the lower bound of inode timestamps
_PERMISSIONS: Final = 0o7777
_END: Final = Entry(Kind.END, b"").encoded()
LOOKED_AT_MAX: Final = 100_000  # entries; further ones are neither counted nor sent
ENTRIES_MAX: Final = 100_000  # of a program's files
BYTES_MAX: Final = 4 << 30


@contextlib.contextmanager
def as_program_user(uid: int | None) -> Iterator[None]:
    """Switch to the program's user with umask 0. None: keep the current user."""
    mask = os.umask(0)
    if uid is not None:
        os.setegid(uid)
        os.seteuid(uid)
    try:
        yield
    finally:
        if uid is not None:
            os.seteuid(0)
            os.setegid(0)
        os.umask(mask)


class Tree(Unpacker):
    """One tree, unpacked by *uid* in an empty folder. stage: of errors. mask: of the modes.

    names: the inode of each file and link, by name. folders: the mode of each folder, by name.
    """

    stage = "files"
    mask = _PERMISSIONS

    def __init__(self, folder: str, uid: int | None) -> None:
        # A descriptor, since the program's user may not enter the parent folders.
        super().__init__(os.open(folder, FOLDER_FLAGS), self.mask)
        self._uid = uid
        self.folder = os.fsencode(folder)
        self.names: dict[bytes, int] = {}
        self.folders: dict[bytes, int] = {b"": 0o755}
        self.made_at_ns = 0

    def write(self, data: bytes) -> None:
        """Decode stream data, and create the entries in it. Raises JobError, OSError."""
        try:
            with as_program_user(self._uid):
                super().write(data)
        except PeerError as exc:
            raise JobError(self.stage, 0, exc.why) from exc

    def finish(self) -> None:
        """Finish the tree at the end of its stream. Raises JobError, OSError."""
        if not self.ended:
            raise JobError(self.stage, 0, "a file tree is incomplete")
        super().finish()
        self.made_at_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)  # some timestamps use the fine clock

    def wait(self) -> None:
        """Wait until any change would get a later ctime than every entry of the tree has."""
        while time.clock_gettime_ns(_COARSE) <= self.made_at_ns:
            time.sleep(0.001)  # a kernel tick takes 4 ms

    def inodes(self) -> Iterator[tuple[int, str]]:
        """Yield the inode and the relative name of every entry that still exists."""
        for name, inode in self.names.items():
            yield inode, os.fsdecode(name)
        for name in self.folders:
            with contextlib.suppress(OSError):
                yield os.lstat(self.folder + b"/" + name).st_ino, os.fsdecode(name)

    def _make(self, entry: Entry) -> None:
        super()._make(entry)
        if entry.kind is Kind.FOLDER:
            self.folders[entry.name] = entry.mode

    def _created(self, name: bytes, inode: int) -> None:
        self.names[name] = inode


class ProgramTree(Tree):
    """The files of a program. A hostile build may have made them: only files and folders, which nobody else can change.

    They are unpacked as the agent's user.
    """

    stage = "unpack"
    mask = 0o755

    def __init__(self, folder: str) -> None:
        super().__init__(folder, None)
        self._entries = self._bytes = 0

    def _make(self, entry: Entry) -> None:
        self._entries += 1
        self._bytes += entry.size
        if self._entries > ENTRIES_MAX or self._bytes > BYTES_MAX:
            raise PeerError("bad file tree", f"it has more than {ENTRIES_MAX} entries or {BYTES_MAX} bytes")
        if entry.kind is Kind.LINK:
            self._refuse(entry)
        super()._make(entry)


class Room:
    """The room for the contents of changed files. file_bytes, total_bytes: for one file and for all of them."""

    def __init__(self, file_bytes: int = 0, total_bytes: int = 0) -> None:
        self._file_bytes = file_bytes
        self._left = total_bytes

    def content(self, path: bytes, name: bytes, info: os.stat_result) -> Iterator[bytes]:
        """Yield the records of `content`, or TOO_LARGE for a file that has no room. A file takes room for its holes."""
        size = info.st_size if stat.S_ISREG(info.st_mode) else 0
        if size > min(self._file_bytes, self._left):
            yield Entry(Kind.TOO_LARGE, name, mode=info.st_mode & _PERMISSIONS, size=size).encoded()
        else:
            self._left -= size
            yield from content(path, name, info)


def changes(tree: Tree, sub: bytes, room: Room) -> Iterator[bytes]:
    """Yield the changes of *tree* below *sub* as records. Their names are relative to *sub*. Raises OSError."""
    prefix = sub + b"/" if sub else b""
    top = tree.folder + b"/" + sub if sub else tree.folder
    info = os.lstat(top)
    if not stat.S_ISDIR(info.st_mode):  # a root that is one file
        if is_modified(tree, sub, info):
            yield from room.content(top, b"", info)
        return
    seen: set[bytes] = set()
    top_fd = os.open(top, FOLDER_FLAGS)
    try:
        for found in walk(top_fd):
            below = found.name
            name = prefix + below if below else sub
            seen.add(name)
            if found.fd >= 0:
                yield from _changed_folder(tree, name, found.path, below, found.info.st_mode)
            elif is_modified(tree, name, found.info):
                yield from room.content(found.path, below, found.info)
    finally:
        os.close(top_fd)
    gone = {name for name in (*tree.names, *tree.folders) if name.startswith(prefix) and name != sub} - seen
    for name in sorted(gone, reverse=True):  # folders after what was in them
        yield Entry(Kind.DELETED, name[len(prefix) :]).encoded()


def is_modified(tree: Tree, name: bytes, info: os.stat_result) -> bool:
    """Return whether a file or link differs from the input that arrived under the same name."""
    return tree.names.get(name) != info.st_ino or info.st_ctime_ns > tree.made_at_ns


def _changed_folder(tree: Tree, name: bytes, path: bytes, below: bytes, mode: int) -> Iterator[bytes]:
    if tree.folders.get(name) != mode & _PERMISSIONS:
        yield Entry(Kind.FOLDER, below, mode=mode & _PERMISSIONS).encoded()
    # Inputs have no extended attributes, so the program has set these.
    if not can_hold_names(below) or _has_attributes(path):
        yield Entry(Kind.UNSUPPORTED, below, mode=mode).encoded()


def _has_attributes(path: bytes) -> bool:
    """Whether a file or folder has extended attributes; False if a command removes it at this moment."""
    try:
        return bool(os.listxattr(path, follow_symlinks=False))
    except OSError as exc:
        if exc.errno in CHANGED:
            return False
        raise


def content(path: bytes, name: bytes, info: os.stat_result) -> Generator[bytes, None, bool]:
    """Yield the records of a regular file or a link. For anything else, yield UNSUPPORTED.

    Yield nothing for an entry that a command removes or replaces at this moment. If it shortens a file, a hole stands
    for the rest, and this returns False.
    """
    fd = -1
    try:
        if stat.S_ISLNK(info.st_mode):
            yield entry_of(name, info, _PERMISSIONS, os.readlink(path)).encoded()
            return True
        if not stat.S_ISREG(info.st_mode) or _has_attributes(path):
            yield Entry(Kind.UNSUPPORTED, name, mode=info.st_mode).encoded()
            return True
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in CHANGED:
            return True
        raise
    try:
        left = info.st_size
        yield entry_of(name, info, _PERMISSIONS).encoded()
        with contextlib.suppress(OSError):  # a command shortens it at this moment
            for part in parts(fd, left):
                left -= part if isinstance(part, int) else len(part)
                yield segment_of(part)
        if left:
            yield segment(left, hole=True)
        return not left
    finally:
        os.close(fd)


class Left(NamedTuple):
    """The files that a program left: number, bytes, and the files to send as (folder number, path, name, stat)."""

    files: int
    size: int
    sent: list[tuple[int, bytes, bytes, os.stat_result]]


def left_files(
    folders: Sequence[str], inputs: Tree | None, most_files: int, most_bytes: int, roots: Collection[bytes] = ()
) -> Left:
    """Count the files in *folders*, the first of which is the working folder, and choose those to send.

    Regular files are sent as long as they fit into most_files and most_bytes. Top-level dot files in the working
    folder, which is also the home folder, do not count. inputs: the input tree of the working folder; files in it count
    only if they were modified. roots: mount points in the working folder, which are skipped.
    """
    count = size = sent_size = looked_at = 0
    sent: list[tuple[int, bytes, bytes, os.stat_result]] = []
    for number, folder in enumerate(folders):
        old = None if number else inputs

        def wanted(_folder_fd: int, name: bytes, *, in_work: bool = not number) -> bool:
            return not in_work or not (name in roots or (name.startswith(b".") and b"/" not in name))

        top_fd = os.open(folder, FOLDER_FLAGS)
        # Not every agent is root, so some entries may be unreadable.
        for found in walk(top_fd, wanted=wanted, failed=lambda _name, _exc: None):
            name, info = found.name, found.info
            looked_at += bool(name)
            if looked_at > LOOKED_AT_MAX:
                break
            if found.fd >= 0 or (old is not None and not is_modified(old, name, info)):
                continue
            regular = stat.S_ISREG(info.st_mode)
            count += 1
            size += info.st_size if regular else 0
            if regular and len(sent) < most_files and sent_size + info.st_size <= most_bytes:
                sent_size += info.st_size
                sent.append((number, os.fsencode(folder) + b"/" + name, name, info))
        os.close(top_fd)
    return Left(count, size, sent)


def stream_of(left: Left) -> Iterator[bytes]:
    """Yield the files to send as tree records (channel/trees), one tree per folder. Raises OSError."""
    folder = -1
    for number, path, name, info in left.sent:
        if number != folder:
            folder = number
            yield Entry(Kind.ROOT, b"%d" % number).encoded()
        with contextlib.suppress(OSError):  # as above; nothing of the file is sent then
            yield from content(path, name, info)
    yield _END


def pack_program(top_fd: int) -> tuple[str, int, Iterator[bytes]]:
    """Return the tree of a program that was built, once all processes have ended: "", its size and its bytes.

    It has no times, and only the modes 755 and 644. Only folders and files with one link are packed; the first value is
    the reason why other folders are not. The iterator closes *top_fd*. Raises OSError.
    """
    entries: list[Entry] = []
    problem, size = "", len(_END)
    for found in walk(top_fd):
        entry = entry_of(found.name, found.info, 0o777)
        fits = can_hold_names(entry.name) if found.fd >= 0 else entry.kind is Kind.FILE and found.info.st_nlink == 1
        if not fits or len(entries) >= ENTRIES_MAX:
            problem = "contains something other than files and folders, too many of them, or too long names"
            break
        if found.name:
            mode = 0o755 if entry.kind is Kind.FOLDER or entry.mode & 0o100 else 0o644
            entries.append(entry._replace(mode=mode, mtime_ns=NO_TIME))
            size += len(entries[-1].encoded())
            size += len(segment(entry.size)) + entry.size if entry.kind is Kind.FILE and entry.size else 0
    return problem, size, _program(top_fd, entries)


def _program(top_fd: int, entries: list[Entry]) -> Iterator[bytes]:
    for entry in entries:
        yield entry.encoded()
        if entry.kind is Kind.FILE and entry.size:
            yield segment(entry.size)
            with open(os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top_fd), "rb") as file:
                while data := file.read(READ):
                    yield data
    yield _END
    os.close(top_fd)
