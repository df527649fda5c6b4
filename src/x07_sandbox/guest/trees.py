"""Trees of host files: creating them as they arrive, and reporting what the program changed or left behind.

Files are created as the program's user. Changes are detected by inode and ctime, which only the kernel sets. So that
every change gets a later ctime, the program starts at least one clock tick after its last file was created. The host
then compares contents.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import Entry, Hole, Kind, Piece, Reader, can_hold_names, segment
from x07_sandbox.errors import PeerError
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.system import write_all

T = TypeVar("T")
_COARSE: Final = 5  # CLOCK_REALTIME_COARSE (clock_gettime(2)), the lower bound of inode timestamps
_PERMISSIONS: Final = 0o7777
_MINE: Final = 0o700
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What calls report if a command removes or replaces an entry at this moment.
_CHANGED: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO})
LOOKED_AT_MAX: Final = 100_000  # entries; further ones are neither counted nor sent


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


class Tree:
    """One tree, unpacked by *uid* in an empty folder.

    names: the inode of each file and link, by name. folders: the mode of each folder, by name.
    """

    def __init__(self, folder: str, uid: int | None) -> None:
        self._uid = uid
        self.folder = os.fsencode(folder)
        # A descriptor, since the program's user may not enter the parent folders.
        self._top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.names: dict[bytes, int] = {}
        self.folders: dict[bytes, int] = {b"": 0o755}
        self._mtimes: dict[bytes, int] = {}  # of folders
        self.made_at_ns = 0
        self._reader = Reader()
        self._fd = -1
        self._entry: Entry | None = None
        self._position = 0

    def write(self, data: bytes) -> None:
        """Decode stream data, and create the entries in it. Raises JobError, OSError."""
        try:
            with as_program_user(self._uid):
                for event in self._reader.feed(data):
                    if isinstance(event, Piece):
                        write_all(self._fd, event.data)
                        self._position += len(event.data)
                    elif isinstance(event, Hole):
                        self._position = os.lseek(self._fd, event.size, os.SEEK_CUR)
                    elif isinstance(event, Entry):
                        self._make(event)
                    else:
                        self._close_file()
        except PeerError as exc:
            raise JobError("files", 0, exc.why) from exc

    def finish(self) -> None:
        """Finish the tree at the end of its stream. Raises JobError."""
        if not self._reader.ended:
            raise JobError("files", 0, "a file tree is incomplete")
        # Only now: creating an entry changes a folder's mtime, and needs write permission.
        for name, mode in reversed(self.folders.items()):
            if mode & _MINE != _MINE or name in self._mtimes:
                self._finish_folder(name, mode, self._mtimes.get(name))
        os.close(self._top)
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

    def _finish_folder(self, folder: bytes, mode: int, mtime_ns: int | None) -> None:
        if mode & _MINE != _MINE:
            os.chmod(folder or b".", mode, dir_fd=self._top)
        if mtime_ns is not None:
            os.utime(folder or b".", ns=(mtime_ns, mtime_ns), dir_fd=self._top, follow_symlinks=False)

    def _make(self, entry: Entry) -> None:
        name = entry.name
        if entry.kind is Kind.END:
            return
        if entry.kind is Kind.FOLDER and not name:
            self.folders[b""], self._mtimes[b""] = entry.mode, entry.mtime_ns
            os.fchmod(self._top, entry.mode | _MINE)
            return
        if name.rpartition(b"/")[0] not in self.folders or name in self.names or name in self.folders or not name:
            raise JobError("files", 0, f"{name[:200]!r} is a duplicate, or its folder is missing")
        if entry.kind is Kind.FOLDER:
            os.mkdir(name, entry.mode | _MINE, dir_fd=self._top)
            self.folders[name], self._mtimes[name] = entry.mode, entry.mtime_ns
        elif entry.kind is Kind.FILE:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(name, flags, entry.mode, dir_fd=self._top)
            self._entry, self._position = entry, 0
        elif entry.kind is Kind.LINK:
            os.symlink(entry.target, name, dir_fd=self._top)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=self._top, follow_symlinks=False)
            self.names[name] = os.stat(name, dir_fd=self._top, follow_symlinks=False).st_ino
        else:
            raise JobError("files", 0, f"unexpected record {entry.kind.name}")

    def _close_file(self) -> None:
        entry, fd = self._entry, self._fd
        assert entry is not None  # noqa: S101 - for the type checker
        if os.fstat(fd).st_size < self._position:  # it ends with a hole
            os.ftruncate(fd, self._position)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        self.names[entry.name] = os.fstat(fd).st_ino
        os.close(fd)


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
    yield from _changed_folder(tree, sub, top, b"", info.st_mode)
    for path, below, info in walk(top):
        name = prefix + below
        seen.add(name)
        if stat.S_ISDIR(info.st_mode):
            yield from _changed_folder(tree, name, path, below, info.st_mode)
        elif is_modified(tree, name, info):
            yield from room.content(path, below, info)
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
        if exc.errno in _CHANGED:
            return False
        raise


def walk(
    top: bytes, *, hidden: bool = True, skipped: Collection[bytes] = ()
) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    """Yield path, relative name and stat result of every entry, and each folder before its entries.

    The path holds until the next entry. It leads to the entry's folder by a descriptor, since a command may replace any
    folder by a link at any moment. hidden: whether to include top-level names that begin with a dot. skipped: names to
    leave out.
    """
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            fd = _opened_folder(top, folder)
        except OSError as exc:
            if exc.errno in _CHANGED:
                continue
            raise
        try:
            inner = []
            for name in sorted(map(os.fsencode, os.listdir(fd))):
                below = folder + b"/" + name if folder else name
                if below in skipped or not (hidden or folder or not below.startswith(b".")):
                    continue
                try:
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield b"/proc/self/fd/%d/%s" % (fd, name), below, info
                if stat.S_ISDIR(info.st_mode) and can_hold_names(below):
                    inner.append(below)
        finally:
            os.close(fd)
        folders += reversed(inner)


def _opened_folder(top: bytes, below: bytes) -> int:
    """Open a folder below *top*, without following a link on the way. Raises OSError."""
    fd = os.open(top, _FOLDER_FLAGS)
    for name in below.split(b"/") if below else ():
        outer = fd
        try:
            fd = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=outer)
        finally:
            os.close(outer)
    return fd


def content(path: bytes, name: bytes, info: os.stat_result) -> Generator[bytes, None, bool]:
    """Yield the records of a regular file or a link. For anything else, yield UNSUPPORTED.

    Yield nothing for an entry that a command removes or replaces at this moment. If it shortens a file, a hole stands
    for the rest, and this returns False.
    """
    fd = -1
    try:
        if stat.S_ISLNK(info.st_mode):
            yield Entry(Kind.LINK, name, target=os.readlink(path)).encoded()
            return True
        if not stat.S_ISREG(info.st_mode) or _has_attributes(path):
            yield Entry(Kind.UNSUPPORTED, name, mode=info.st_mode).encoded()
            return True
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in _CHANGED:
            return True
        raise
    try:
        left = info.st_size
        yield Entry(Kind.FILE, name, mode=info.st_mode & _PERMISSIONS, mtime_ns=info.st_mtime_ns, size=left).encoded()
        with contextlib.suppress(OSError):  # a command shortens it at this moment
            for part in parts(fd, left):
                left -= part if isinstance(part, int) else len(part)
                yield segment(part, hole=True) if isinstance(part, int) else segment(len(part)) + part
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
        entries = walk(os.fsencode(folder), hidden=number > 0, skipped=() if number else roots)
        old = None if number else inputs
        while (entry := _next(entries)) is not None:
            _, name, info = entry
            looked_at += 1
            if looked_at > LOOKED_AT_MAX:
                return Left(count, size, sent)
            if stat.S_ISDIR(info.st_mode) or (old is not None and not is_modified(old, name, info)):
                continue
            regular = stat.S_ISREG(info.st_mode)
            count += 1
            size += info.st_size if regular else 0
            if regular and len(sent) < most_files and sent_size + info.st_size <= most_bytes:
                sent_size += info.st_size
                sent.append((number, os.fsencode(folder) + b"/" + name, name, info))
    return Left(count, size, sent)


def _next(entries: Iterator[T]) -> T | None:
    """Return the next item, or None at the end or if the item cannot be read (not every agent is root)."""
    try:
        return next(entries, None)
    except OSError:
        return None


def stream_of(left: Left) -> Iterator[bytes]:
    """Yield the files to send as tree records (channel/trees), one tree per folder. Raises OSError."""
    folder = -1
    for number, path, name, info in left.sent:
        if number != folder:
            folder = number
            yield Entry(Kind.ROOT, b"%d" % number).encoded()
        pieces = content(path, name, info)
        if (head := _next(pieces)) is not None:
            yield head
            yield from pieces
    yield Entry(Kind.END, b"").encoded()
