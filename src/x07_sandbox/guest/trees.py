"""Trees of the host's files: made for the program as they come, and what it has changed of them, sent back.

Everything is made as the program's user. A change is found by inode and ctime, which only the kernel sets: the program
starts in a later tick of that clock than the last of its files was made in. The host then compares contents.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection, Iterator
from typing import Final

from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import Entry, Hole, Kind, Piece, Reader, can_hold_names, segment
from x07_sandbox.errors import PeerError
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.system import write_all

_COARSE: Final = 5  # CLOCK_REALTIME_COARSE (clock_gettime(2)), by which the kernel stamps inodes at the earliest
_PERMISSIONS: Final = 0o7777
_MINE: Final = 0o700


@contextlib.contextmanager
def as_program_user(uid: int | None) -> Iterator[None]:
    """Make files as the program's user, with exactly the mode asked for. uid: None where that is this process's own."""
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
    """One tree below *folder*, an empty folder of the program's. uid: as `as_program_user` has it.

    names: of all files and links, with their inodes. folders: of all folders, with their modes.
    """

    def __init__(self, folder: str, uid: int | None) -> None:
        self._uid = uid
        self.folder = os.fsencode(folder)
        # By way of it: the program's user may not enter the folders above.
        self._top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.names: dict[bytes, int] = {}
        self.folders: dict[bytes, int] = {b"": 0o755}
        self._mtimes: dict[bytes, int] = {}  # of folders, in nanoseconds
        self.made_at_ns = 0
        self._reader = Reader()
        self._fd = -1
        self._entry: Entry | None = None
        self._position = 0

    def write(self, data: bytes) -> None:
        """Make what these bytes of the stream tell of. Raises JobError, OSError."""
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
        """The stream has ended. Raises JobError."""
        if not self._reader.ended:
            raise JobError("files", 0, "a tree of files did not come whole")
        # Not before: a folder changes its mtime with each entry made in it, and its mode may allow none.
        for name, mode in reversed(self.folders.items()):
            if mode & _MINE != _MINE or name in self._mtimes:
                self._finish_folder(name, mode, self._mtimes.get(name))
        os.close(self._top)
        self.made_at_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)  # newer kernels stamp some by the finer clock

    def wait(self) -> None:
        """Until what is changed from now on has a later ctime than all that was made."""
        while time.clock_gettime_ns(_COARSE) <= self.made_at_ns:
            time.sleep(0.001)  # a tick of the kernel's: 4 ms

    def inodes(self) -> Iterator[tuple[int, str]]:
        """Of all that came, the inode and the name below the tree's own folder; what is gone since is left out."""
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
            raise JobError("files", 0, f"the tree has no place for {name[:200]!r}")
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
            raise JobError("files", 0, f"a tree cannot hold {entry.kind.name}")

    def _close_file(self) -> None:
        entry, fd = self._entry, self._fd
        assert entry is not None  # noqa: S101 - for the type checker
        if os.fstat(fd).st_size < self._position:  # it ends with a hole
            os.ftruncate(fd, self._position)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        self.names[entry.name] = os.fstat(fd).st_ino
        os.close(fd)


def changes(tree: Tree, sub: bytes) -> Iterator[bytes]:
    """What the program has changed of *tree* below *sub*, as records with names from there. Raises OSError."""
    prefix = sub + b"/" if sub else b""
    top = tree.folder + b"/" + sub if sub else tree.folder
    info = os.lstat(top)
    if not stat.S_ISDIR(info.st_mode):  # a root that is one file
        if is_modified(tree, sub, info):
            yield from content(top, b"", info)
        return
    seen: set[bytes] = set()
    yield from _changed_folder(tree, sub, top, b"", info.st_mode)
    for path, below, info in walk(top):
        name = prefix + below
        seen.add(name)
        if stat.S_ISDIR(info.st_mode):
            yield from _changed_folder(tree, name, path, below, info.st_mode)
        elif is_modified(tree, name, info):
            yield from content(path, below, info)
    gone = {name for name in (*tree.names, *tree.folders) if name.startswith(prefix) and name != sub} - seen
    for name in sorted(gone, reverse=True):  # folders after what was in them
        yield Entry(Kind.DELETED, name[len(prefix) :]).encoded()


def is_modified(tree: Tree, name: bytes, info: os.stat_result) -> bool:
    """Whether a file or link is not what came in under that name."""
    return tree.names.get(name) != info.st_ino or info.st_ctime_ns > tree.made_at_ns


def _changed_folder(tree: Tree, name: bytes, path: bytes, below: bytes, mode: int) -> Iterator[bytes]:
    if tree.folders.get(name) != mode & _PERMISSIONS:
        yield Entry(Kind.FOLDER, below, mode=mode & _PERMISSIONS).encoded()
    # None came in with any: whatever it has is the program's.
    if not can_hold_names(below) or os.listxattr(path, follow_symlinks=False):
        yield Entry(Kind.UNSUPPORTED, below, mode=mode).encoded()


def walk(
    top: bytes, *, hidden: bool = True, skipped: Collection[bytes] = ()
) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    """Path, name below *top*, and state of all that is there, folders before what is in them.

    hidden: whether names at the top that begin with a dot count. skipped: names that do not.
    """
    folders = [b""]
    while folders:
        folder = folders.pop()
        with os.scandir(top + b"/" + folder if folder else top) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        inner = []
        for entry in entries:
            below = folder + b"/" + entry.name if folder else entry.name
            if below in skipped or not (hidden or folder or not below.startswith(b".")):
                continue
            info = entry.stat(follow_symlinks=False)
            yield entry.path, below, info
            if stat.S_ISDIR(info.st_mode) and can_hold_names(below):
                inner.append(below)
        folders += reversed(inner)


def content(path: bytes, name: bytes, info: os.stat_result) -> Iterator[bytes]:
    """A file, a link, or the word that there is something else."""
    if stat.S_ISLNK(info.st_mode):
        yield Entry(Kind.LINK, name, target=os.readlink(path)).encoded()
        return
    if not stat.S_ISREG(info.st_mode) or os.listxattr(path, follow_symlinks=False):
        yield Entry(Kind.UNSUPPORTED, name, mode=info.st_mode).encoded()
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = info.st_size
        yield Entry(Kind.FILE, name, mode=info.st_mode & _PERMISSIONS, mtime_ns=info.st_mtime_ns, size=size).encoded()
        for part in parts(fd, size):
            yield segment(part, hole=True) if isinstance(part, int) else segment(len(part)) + part
    finally:
        os.close(fd)
