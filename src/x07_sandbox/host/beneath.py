"""Operations on names below an open folder that follow no link, cross no mount point and overwrite nothing."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from x07_sandbox.host.linux import openat2, path_flag, renameat2
from x07_sandbox.host.paths import closing_fd

_NO_XDEV, _NO_SYMLINKS, _BENEATH = 0x01, 0x04, 0x08  # openat2(2)
_NOREPLACE, _EXCHANGE = 1, 2  # renameat2(2)
# Errors of file systems that do not support a rename flag, or links.
_UNSUPPORTED: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def open_root(path: str) -> int:
    """Open a folder by its absolute path. Raises OSError: ELOOP or ENOTDIR if the path contains a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with closing_fd(os.open("/", path_flag() | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        return openat2(top, path.lstrip("/") or ".", flags, _NO_SYMLINKS)


def look(dir_fd: int, name: str) -> int:
    """Return an O_PATH descriptor of a relative name ("." is the folder). A link is opened itself, not its target.

    Raises OSError: ELOOP or ENOTDIR if a parent is not a folder, EXDEV at a mount point.
    """
    flags = path_flag() | os.O_NOFOLLOW | os.O_CLOEXEC
    return openat2(dir_fd, name, flags, _NO_SYMLINKS | _NO_XDEV | _BENEATH)


def open_file(dir_fd: int, name: str) -> int:
    """Open a relative name for reading, without waiting for a pipe. Raises ValueError, OSError like look()."""
    if "\0" in name:
        raise ValueError("a name contains a NUL byte")
    return openat2(dir_fd, name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, _NO_SYMLINKS | _BENEATH)


@contextlib.contextmanager
def parent_of(dir_fd: int, name: str) -> Iterator[tuple[int, str]]:
    """Yield the parent folder of *name*, and the last part of *name*. Raises OSError like look()."""
    folder, _, last = name.rpartition("/")
    if not folder:
        yield dir_fd, last
        return
    with closing_fd(look(dir_fd, folder)) as fd:
        yield fd, last


def exchange(fd: int, name: str, other_fd: int, other: str) -> bool:
    """Exchange two names atomically. Return False if the file system cannot do so. Raises OSError for other errors."""
    code = renameat2(fd, name, other_fd, other, _EXCHANGE)
    if code and code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), name)
    return not code


def move(fd: int, name: str, to_fd: int, to: str) -> None:
    """Rename a file or folder without overwriting. Raises OSError, which is a FileExistsError if *to* exists."""
    code = renameat2(fd, name, to_fd, to, _NOREPLACE)
    # The new name may be a link that a killed process of ours made in _move_by_link.
    if code in _UNSUPPORTED or (code == errno.EEXIST and _same_inode(fd, name, to_fd, to)):
        _move_by_link(fd, name, to_fd, to)
    elif code:
        raise OSError(code, os.strerror(code), to)


def _move_by_link(fd: int, name: str, to_fd: int, to: str) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        linked = True
        try:
            os.link(name, to, src_dir_fd=fd, dst_dir_fd=to_fd, follow_symlinks=False)
        except FileExistsError:
            if not _same_inode(fd, name, to_fd, to):  # else a killed process of ours made the link
                raise
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            linked = False
        if linked:
            os.unlink(name, dir_fd=fd)
            return
    # Without links, or for a folder, only a check is possible: a file created in between is overwritten.
    with contextlib.suppress(FileNotFoundError):
        os.stat(to, dir_fd=to_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to)
    os.rename(name, to, src_dir_fd=fd, dst_dir_fd=to_fd)


def _same_inode(fd: int, name: str, to_fd: int, to: str) -> bool:
    """Return whether both names are the same inode."""
    try:
        one, other = (os.stat(at, dir_fd=where, follow_symlinks=False) for where, at in ((fd, name), (to_fd, to)))
    except FileNotFoundError:
        return False
    return os.path.samestat(one, other)
