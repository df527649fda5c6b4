"""Where state and caches live, and how their folders are made: ours, private, no link on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_OWN: Final = 0o600


def cache_dir() -> Path:
    """Images, templates and artifacts: X07_VM_CACHE_DIR, else XDG_CACHE_HOME/x07-sandbox, else ~/.cache/x07-sandbox."""
    if named := os.environ.get("X07_VM_CACHE_DIR"):
        return _absolute(named, "X07_VM_CACHE_DIR")
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(xdg, "XDG_CACHE_HOME") / "x07-sandbox"
    return _home() / ".cache" / "x07-sandbox"


def state_dir() -> Path:
    """Job records: X07_VM_STATE_DIR, else ~/.x07/vm/jobs."""
    if named := os.environ.get("X07_VM_STATE_DIR"):
        return _absolute(named, "X07_VM_STATE_DIR")
    return _home() / ".x07" / "vm" / "jobs"


def _absolute(value: str, name: str) -> Path:
    path = Path(collapse_leading_slashes(value))
    if not path.is_absolute():
        raise HostError(f"cannot use {name}", f"{value!r} is not an absolute path", f"Set {name} to an absolute path")
    return path


def collapse_leading_slashes(path: str) -> str:
    """*path* with one slash at its beginning where it has two: another place to POSIX, not to Linux."""
    return f"/{path.lstrip('/')}" if path.startswith("//") else path


def _home() -> Path:
    home = os.environ.get("HOME")
    if not home:
        fix = "Set HOME, or X07_VM_STATE_DIR and X07_VM_CACHE_DIR"
        raise HostError("no place for state and images", "HOME is not set", fix)
    return _absolute(home, "HOME")


def private_dir(path: Path) -> Path:
    """Make *path* (and what is missing above it) with mode 0700, and check that it is ours alone. Raises HostError.

    No link is followed. The last folder must belong to the effective uid and be closed to group and others; folders
    above it must belong to that uid or to root and not be writable by others, but for sticky ones like /tmp.
    """
    if not path.is_absolute() or ".." in path.parts or len(path.parts) == 1:
        why = "it is not a plain absolute path"
        raise HostError(f"cannot use folder {path}", why, "Give an absolute path without '..'")
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for depth, part in enumerate(path.parts[1:], start=1):
            here = Path(*path.parts[: depth + 1])
            made = _mkdir(fd, part, here)
            child = _open_folder(fd, part, here)
            os.close(fd)
            fd = child
            _check_owner(os.fstat(fd), here, last=here == path, made=made)
    finally:
        os.close(fd)
    return path


def settings_file() -> Path:
    """The user's own settings: x07/sandbox.toml in XDG_CONFIG_HOME, else ~/.config. Raises HostError without a home."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    if config.startswith("/"):  # the XDG specification: any other is ignored
        return Path(config) / "x07" / "sandbox.toml"
    home = os.environ.get("HOME")
    if not home:
        raise HostError("no place for settings", "HOME is not set", "Set HOME")
    return Path(home) / ".config" / "x07" / "sandbox.toml"


def cache_folder(name: str) -> Path:
    """A folder of the cache; both are checked by private_dir(). Raises HostError."""
    return private_dir(private_dir(cache_dir()) / name)


def least_recently_used(found: Iterable[tuple[float, int, Path]], most_bytes: int) -> list[Path]:
    """Which of (time of last use, size in bytes, path) have to go so that the rest is at most *most_bytes*."""
    doomed = []
    for _, size, path in sorted(found, reverse=True):
        most_bytes -= size
        if most_bytes < 0:
            doomed.append(path)
    return doomed


def real_path(path: Path) -> Path:
    """*path* without links, absolute. Raises UsageError for a relative one where the current folder was removed."""
    try:
        return Path(os.path.realpath(path))
    except OSError as exc:  # from nothing but getcwd(2)
        why = f"the current folder is gone ({exc.strerror})"
        raise UsageError(f"cannot find {path}", why, "Go to a folder that is there") from exc


def is_file(path: Path) -> bool:
    """Whether a file is there. Unlike Path's own this is never an error: for what may not be looked at it is False."""
    return os.path.isfile(path)  # noqa: PTH113 - see above


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False for what may not be looked at."""
    return os.path.isdir(path)  # noqa: PTH112 - as above


def read_bounded(path: Path, what: str, max_bytes: int) -> bytes:
    """A regular file of at most *max_bytes*; nothing else, since a pipe or a device may never end.

    what: the thing that is in it, for the error. Raises UsageError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                why = "Is a directory" if stat.S_ISDIR(mode) else "it is no regular file"
                raise UsageError(f"cannot read the {what} {path}", why, "Name a file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the name
        why = getattr(exc, "strerror", None) or str(exc)
        raise UsageError(f"cannot read the {what} {path}", why, "Name a readable file") from exc
    if len(data) > max_bytes:
        raise UsageError(f"cannot read the {what} {path}", f"it has more than {max_bytes} bytes", "Name a smaller file")
    return data


def open_private_file(path: Path, flags: int) -> int:
    """A descriptor of a file of ours, which is made with mode 0600 where it is missing. Raises OSError."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _OWN)
    try:
        if os.fstat(fd).st_mode & _OWN != _OWN:  # a umask that takes its owner's rights away would lock us out
            os.fchmod(fd, _OWN)
    except BaseException:
        os.close(fd)
        raise
    return fd


def replace_file(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write *path* whole or not at all, mode 0600: a reader sees the old version or the new one.

    sync: also after a crash of the machine. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        fd = open_private_file(temporary, os.O_WRONLY | os.O_EXCL)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _mkdir(dir_fd: int, part: str, here: Path) -> bool:
    try:
        os.mkdir(part, 0o700, dir_fd=dir_fd)
        os.chmod(part, 0o700, dir_fd=dir_fd)  # whatever the umask took away
    except FileExistsError:
        return False
    except OSError as exc:
        from x07_sandbox.host.os_errors import fix_for

        fix = fix_for(exc, "Choose a folder that you can write, by X07_VM_STATE_DIR or X07_VM_CACHE_DIR")
        raise HostError(f"cannot make folder {here}", exc.strerror or str(exc), fix) from exc
    return True


def _open_folder(dir_fd: int, part: str, here: Path) -> int:
    try:
        return os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno not in {errno.ELOOP, errno.ENOTDIR}:
            raise
        why = f"it is a link or no folder ({exc.strerror})"
        raise HostError(f"cannot use folder {here}", why, "Name the real folder instead of the link") from exc


def _check_owner(info: os.stat_result, here: Path, *, last: bool, made: bool) -> None:
    what, uid, mode = f"cannot use folder {here}", info.st_uid, f"{stat.S_IMODE(info.st_mode):04o}"
    if last and not made and (uid != os.geteuid() or info.st_mode & 0o077):
        why = f"it is uid {uid}'s with mode {mode}, and must be yours with 0700"
        raise HostError(what, why, _how_to_be_private(info, here))
    if _others_can_change(info):
        fix = "Choose a folder below one that only you or root can write, by X07_VM_STATE_DIR or X07_VM_CACHE_DIR"
        raise HostError(what, f"others can change it (uid {uid}, mode {mode})", fix)


def _others_can_change(info: os.stat_result) -> bool:
    """Whether somebody but us and root could put another folder in the place of one that is in it."""
    theirs = info.st_uid not in {0, os.geteuid()}
    return theirs or bool(info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX)


def _how_to_be_private(info: os.stat_result, here: Path) -> str:
    """What to do about a folder that is not ours alone. To close a shared one, /tmp say, could break the host."""
    uid = os.geteuid()
    shared = bool(info.st_mode & (stat.S_ISVTX | stat.S_IWGRP | stat.S_IWOTH))
    if info.st_uid == uid != 0 and not shared:
        return "If nobody else needs it run chmod 0700 on it, or choose another folder"
    below = f"a new folder below it, such as {here / 'x07-sandbox'}"
    makes = info.st_uid == uid or info.st_mode & stat.S_ISVTX
    where = below if makes and not _others_can_change(info) else "a folder of your own"
    return f"Leave it as it is and choose {where}, by X07_VM_STATE_DIR or X07_VM_CACHE_DIR"


def why_not_ours(info: os.stat_result, kind: Callable[[int], bool]) -> str:
    """Why something is not ours to remove; empty if it is. kind: S_ISDIR or S_ISREG, so that no link is taken."""
    if not kind(info.st_mode):
        return "it is a link, or another kind of file"
    return "" if info.st_uid == os.geteuid() else f"it is uid {info.st_uid}'s"
