"""Names below an opened folder: no link is followed on the way, no mount point crossed, nothing overwritten unseen."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPENAT2: Final = 437  # of every architecture that Linux has had numbers for since 5.6
_NO_XDEV, _NO_SYMLINKS, _BENEATH = 0x01, 0x04, 0x08  # openat2(2)
_NOREPLACE, _EXCHANGE = 1, 2  # renameat2(2)
# What a kernel or a filter says that does not have a call.
_UNKNOWN: Final = {errno.ENOSYS, errno.EPERM}
# What a file system says that cannot do what was asked; EPERM is said of links where there are none.
_CANNOT: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_root(path: str) -> int:
    """A folder by its absolute path, on which there is no link. Raises OSError: ELOOP or ENOTDIR where there is one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    top = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _openat2(top, path.lstrip("/") or ".", flags, _NO_SYMLINKS)
        return _walk(top, path.strip("/") or ".", flags, cross=True) if found is None else found
    finally:
        os.close(top)


def look(dir_fd: int, name: str) -> int:
    """An O_PATH descriptor of what is under a relative name ("." is the folder itself), of a link that itself.

    Raises OSError: ELOOP or ENOTDIR where something on the way is no folder, EXDEV at a mount point.
    """
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    found = _openat2(dir_fd, name, flags, _NO_SYMLINKS | _NO_XDEV | _BENEATH)
    return _walk(dir_fd, name, flags, cross=False) if found is None else found


@contextlib.contextmanager
def parent_of(dir_fd: int, name: str) -> Iterator[tuple[int, str]]:
    """The folder in which the last part of *name* is, and that part. Raises OSError as look() does."""
    folder, _, last = name.rpartition("/")
    if not folder:
        yield dir_fd, last
        return
    fd = look(dir_fd, folder)
    try:
        yield fd, last
    finally:
        os.close(fd)


def exchange(fd: int, name: str, other_fd: int, other: str) -> bool:
    """Let two names change places, at once; False where the file system cannot. Raises OSError."""
    code = _renameat2(fd, name, other_fd, other, _EXCHANGE)
    if code and code not in _CANNOT:
        raise OSError(code, os.strerror(code), name)
    return not code


def move(fd: int, name: str, to_fd: int, to: str) -> None:
    """Give a thing another name, under which there must be nothing. Raises OSError: FileExistsError if there is."""
    code = _renameat2(fd, name, to_fd, to, _NOREPLACE)
    # EEXIST comes before EINVAL, and what is there may be what one of us, killed then, has linked.
    if code in _CANNOT or (code == errno.EEXIST and _one(fd, name, to_fd, to)):
        _move_by_link(fd, name, to_fd, to)
    elif code:
        raise OSError(code, os.strerror(code), to)


def _move_by_link(fd: int, name: str, to_fd: int, to: str) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        try:
            os.link(name, to, src_dir_fd=fd, dst_dir_fd=to_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno not in _NO_LINKS and not (isinstance(exc, FileExistsError) and _one(fd, name, to_fd, to)):
                raise
            linked = isinstance(exc, FileExistsError)  # by one of us that was killed then
        else:
            linked = True
        if linked:
            os.unlink(name, dir_fd=fd)
            return
    # Without links, or for a folder, we can only look. What another process puts there right now is lost.
    with contextlib.suppress(FileNotFoundError):
        os.stat(to, dir_fd=to_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to)
    os.rename(name, to, src_dir_fd=fd, dst_dir_fd=to_fd)


def _one(fd: int, name: str, to_fd: int, to: str) -> bool:
    """Whether both names are of one thing."""
    try:
        one, other = (os.stat(at, dir_fd=where, follow_symlinks=False) for where, at in ((fd, name), (to_fd, to)))
    except FileNotFoundError:
        return False
    return os.path.samestat(one, other)


def sync(fd: int) -> None:
    """Have the disk hold all that was written to the file system of *fd*: syncfs(2). Raises OSError."""
    if _libc.syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _renameat2(fd: int, name: str, to_fd: int, to: str, flags: int) -> int:
    failed = _libc.renameat2(fd, os.fsencode(name), to_fd, os.fsencode(to), flags)
    return ctypes.get_errno() if failed else 0


def _openat2(dir_fd: int, name: str, flags: int, resolve: int) -> int | None:
    """None where there is no such call. Raises OSError."""
    how = _How(flags, 0, resolve)
    words = (ctypes.c_long(dir_fd), ctypes.c_char_p(os.fsencode(name)), ctypes.byref(how), ctypes.c_size_t(24))
    fd = int(_libc.syscall(ctypes.c_long(_OPENAT2), *words))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return None
    raise OSError(code, os.strerror(code), name)


def _walk(dir_fd: int, name: str, flags: int, *, cross: bool) -> int:
    """The same, a part at a time. A mount of the same file system elsewhere in it is not seen; a rename sees it."""
    *folders, last = name.split("/")
    device = os.fstat(dir_fd).st_dev
    fd = os.dup(dir_fd)
    try:
        for part in folders:
            here = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = here
            if not cross:
                _same_device(fd, device, part)
        found = os.open(last, flags | os.O_NOFOLLOW, dir_fd=fd)
    finally:
        os.close(fd)
    if not cross:
        try:
            _same_device(found, device, last)
        except OSError:
            os.close(found)
            raise
    return found


def _same_device(fd: int, device: int, name: str) -> None:
    """Overlays number files unlike folders: only a folder can be another mount's root and have things below it."""
    info = os.fstat(fd)
    if stat.S_ISDIR(info.st_mode) and info.st_dev != device:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
