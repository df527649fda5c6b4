"""Folders for state and caches, created private and without links; where programs are; other path helpers."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.errors import Command, HostError, SandboxError, Text, UsageError
from x07_sandbox.host.linux import new_unnamed_file, path_flag, require_own_proc

SYSTEM: Final = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
PROGRAMS: Final = (*SYSTEM, "/usr/local/bin", "/opt/homebrew/bin")
_OWN: Final = 0o600
# For the root of a volume. A folder that x07 made in it would be no safer: other users of the volume could replace it.
_IN_A_POD: Final = (
    "In a pod, let an init container run mkdir -m 0700 {}/private, and mount that folder with subPath: private (see"
    " docs/how-to/run-in-a-container.md)"
)


def cache_dir() -> Path:
    """Return the cache folder: X07_VM_CACHE_DIR, else XDG_CACHE_HOME/x07-sandbox, else ~/.cache/x07-sandbox."""
    if named := os.environ.get("X07_VM_CACHE_DIR"):
        return _absolute(named, "X07_VM_CACHE_DIR")
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(xdg, "XDG_CACHE_HOME") / "x07-sandbox"
    return _home() / ".cache" / "x07-sandbox"


def state_dir() -> Path:
    """Return the folder of job records: X07_VM_STATE_DIR, else ~/.x07/vm/jobs."""
    if named := os.environ.get("X07_VM_STATE_DIR"):
        return _absolute(named, "X07_VM_STATE_DIR")
    return _home() / ".x07" / "vm" / "jobs"


def _absolute(value: str, name: str) -> Path:
    path = Path(collapse_leading_slashes(value))
    if not path.is_absolute():
        raise HostError(f"cannot use {name}", f"{value!r} is not an absolute path", f"Set {name} to an absolute path")
    return path


def collapse_leading_slashes(path: str) -> str:
    """Return *path* with a single leading slash. POSIX treats exactly two leading slashes specially; Linux does not."""
    return f"/{path.lstrip('/')}" if path.startswith("//") else path


def _home() -> Path:
    home = os.environ.get("HOME")
    if not home:
        fix = "Set HOME, or X07_VM_STATE_DIR and X07_VM_CACHE_DIR"
        raise HostError("cannot find a folder for state and images", "HOME is not set", fix)
    return _absolute(home, "HOME")


def private_dir(path: Path, *, private: int = 1) -> Path:
    """Create *path* and missing parents with mode 0700. Raises HostError if the folder is not private.

    No link is followed. The folder must belong to the effective uid and be closed to group and others. Its parents must
    belong to that uid or root and must not be writable by others, except sticky folders like /tmp. private: how many
    folders at the end of the path must be private.
    """
    if not path.is_absolute() or ".." in path.parts or len(path.parts) == 1:
        why = "it is not an absolute path without '..'"
        raise HostError(f"cannot use folder {path}", why, "Use an absolute path without '..'")
    flags, here = path_flag() | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, ""
    fd = os.open("/", flags)
    try:
        parent = os.fstat(fd)
        for depth, part in enumerate(path.parts[1:], start=2):
            here, made = f"{here}/{part}", False
            try:
                child = os.open(part, flags, dir_fd=fd)
            except OSError as exc:
                made = exc.errno == errno.ENOENT and _mkdir(fd, part, here)
                child = _open_folder(fd, part, here, flags)
            os.close(fd)
            fd = child
            info = os.fstat(fd)
            _check_owner(info, here, parent, last=depth > len(path.parts) - private, made=made)
            parent = info
    finally:
        os.close(fd)
    return path


def settings_file() -> Path:
    """Return the user's settings file: x07/sandbox.toml in XDG_CONFIG_HOME, else in ~/.config. Raises HostError."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    if config.startswith("/"):  # XDG: a relative path is ignored
        return Path(config) / "x07" / "sandbox.toml"
    home = os.environ.get("HOME")
    if not home:
        raise HostError("cannot find the settings", "HOME is not set", "Set HOME")
    return Path(home) / ".config" / "x07" / "sandbox.toml"


def cache_folder(name: str) -> Path:
    """Return the private folder *name* in the cache, created if missing. Raises HostError if it is not private."""
    return private_dir(cache_dir() / name, private=2)


def least_recently_used(found: Iterable[tuple[float, int, Path]], most_bytes: int) -> list[Path]:
    """Return the least recently used paths whose removal leaves *most_bytes* or less. found: last use, size, path."""
    doomed = []
    for _, size, path in sorted(found, reverse=True):
        most_bytes -= size
        if most_bytes < 0:
            doomed.append(path)
    return doomed


def real_path(path: Path) -> Path:
    """Return the absolute path without links. Raises UsageError if the current folder was removed."""
    try:
        return Path(os.path.realpath(path))
    except OSError as exc:  # from getcwd(2)
        why = f"the current folder does not exist ({exc.strerror})"
        raise UsageError(f"cannot find {path}", why, "Change to an existing folder") from exc


def is_file(path: Path) -> bool:
    """Return whether *path* is a file, or False if this user may not access the path."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file() raises PermissionError


def is_folder(path: Path) -> bool:
    """Return whether *path* is a folder, or False if this user may not access the path."""
    return os.path.isdir(path)  # noqa: PTH112 - as above


def entries(folder: Path) -> list[Path]:
    """Return the sorted paths of a folder's entries, or an empty list if the folder does not exist."""
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in found)
    except FileNotFoundError:
        return []


def find_program(name: str) -> str | None:
    """Return the absolute path of the program *name*, itself an absolute path or a name in PROGRAMS; None if missing.

    PATH is never searched, because it may name the current folder, or a folder that a sandboxed program can change.
    """
    places = [name] if name.startswith("/") else [f"{folder}/{name}" for folder in PROGRAMS if "/" not in name]
    return next((place for place in places if is_file(Path(place)) and os.access(place, os.X_OK)), None)


def read_bounded(path: Path, what: str, max_bytes: int) -> bytes:
    """Return a regular file's content. what: the kind of file. Raises UsageError if unreadable or too large."""
    try:
        with closing_fd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                why = "Is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
                raise UsageError(f"cannot read the {what} {path}", why, "Name a file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the name
        why = getattr(exc, "strerror", None) or str(exc)
        raise UsageError(f"cannot read the {what} {path}", why, "Use a readable file") from exc
    if len(data) > max_bytes:
        raise UsageError(f"cannot read the {what} {path}", f"it has more than {max_bytes} bytes", "Use a smaller file")
    return data


@contextlib.contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Yield *fd*, and close it at the end of the context."""
    try:
        yield fd
    finally:
        os.close(fd)


def open_private_file(path: Path, flags: int) -> int:
    """Open a private file of this user, created with mode 0600 if missing. Raises OSError if that fails."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _OWN)
    try:
        if os.fstat(fd).st_mode & _OWN != _OWN:  # a umask may remove the owner's rights
            os.fchmod(fd, _OWN)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unnamed_file(folder: Path, what: str) -> int:
    """Create a file without a name on the disk of *folder* and return its descriptor. Raises HostError, with *what*."""
    try:
        return new_unnamed_file(folder)
    except OSError as exc:
        fix = fix_for(exc, "Set X07_VM_STATE_DIR to a folder on ext4, xfs or btrfs")
        raise HostError(what, f"{exc.strerror} ({folder})", fix) from exc


def replace_file(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Replace a file atomically, with mode 0600. sync: make it atomic even if the machine crashes. Raises OSError."""
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


def _mkdir(dir_fd: int, part: str, here: str) -> bool:
    try:
        os.mkdir(part, 0o700, dir_fd=dir_fd)
        os.chmod(part, 0o700, dir_fd=dir_fd)  # regardless of the umask
    except FileExistsError:
        return False
    except OSError as exc:
        fix = fix_for(exc, "Set X07_VM_STATE_DIR or X07_VM_CACHE_DIR to a writable folder")
        raise HostError(f"cannot create folder {here}", exc.strerror or str(exc), fix) from exc
    return True


def _open_folder(dir_fd: int, part: str, here: str, flags: int) -> int:
    try:
        return os.open(part, flags, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno not in {errno.ELOOP, errno.ENOTDIR}:
            raise
        why = f"it is a link or not a folder ({exc.strerror})"
        raise HostError(f"cannot use folder {here}", why, "Use the real folder instead of the link") from exc


def _check_owner(info: os.stat_result, here: str, parent: os.stat_result, *, last: bool, made: bool) -> None:
    exposed = last and not made and (info.st_uid != os.geteuid() or info.st_mode & 0o077)
    if not exposed and not _others_can_change(info):
        return
    what, uid, mode = f"cannot use folder {here}", info.st_uid, f"{stat.S_IMODE(info.st_mode):04o}"
    if exposed:
        why = f"it belongs to uid {uid} with mode {mode}; it must belong to you and have mode 0700"
        raise HostError(what, why, _how_to_be_private(info, here, parent))
    fix = "Set X07_VM_STATE_DIR or X07_VM_CACHE_DIR to a folder whose parents only you or root can write"
    fix = f"{_IN_A_POD.format(here)}. Elsewhere: {fix}" if info.st_dev != parent.st_dev else fix
    raise HostError(what, f"other users can change it (uid {uid}, mode {mode})", fix)


def _others_can_change(info: os.stat_result) -> bool:
    """Whether a user other than this one and root could replace a folder whose parent has this stat."""
    theirs = info.st_uid not in {0, os.geteuid()}
    return theirs or bool(info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX)


def _how_to_be_private(info: os.stat_result, here: str, parent: os.stat_result) -> Text:
    """Return the advice for a folder that is not private. A shared folder such as /tmp must keep its mode."""
    uid = os.geteuid()
    shared = bool(info.st_mode & (stat.S_ISVTX | stat.S_IWGRP | stat.S_IWOTH))
    reached = parent.st_uid != uid or parent.st_mode & 0o077  # by others: they may need it
    if info.st_uid == uid and not (reached and (shared or uid == 0)):
        import shlex

        command = Command(f"chmod 0700 {shlex.quote(here)}")
        return "Use another folder. Or, if nobody else needs this one, run: " if reached else "Run: ", command
    if info.st_dev != parent.st_dev and _others_can_change(info):
        return _IN_A_POD.format(here)
    creatable = (info.st_uid == uid or info.st_mode & stat.S_ISVTX) and not _others_can_change(info)
    folder = f"a new folder in it, such as {here}/x07-sandbox" if creatable else "a folder of your own"
    return f"Set X07_VM_STATE_DIR or X07_VM_CACHE_DIR to {folder}"


def why_not_ours(info: os.stat_result, kind: Callable[[int], bool]) -> str:
    """Return why this user must not remove a file or folder, or "" if the user may.

    kind: S_ISDIR or S_ISREG, the test for the expected type. A link passes neither test.
    """
    if not kind(info.st_mode):
        return "it is a link or another type of file"
    return "" if info.st_uid == os.geteuid() else f"it belongs to uid {info.st_uid}"


_WRONG_TYPE: Final = "Remove it; x07 creates its own"
_FIXES: Final[dict[int, Text]] = {
    errno.EISDIR: _WRONG_TYPE,
    errno.ENOTDIR: _WRONG_TYPE,
    errno.ELOOP: _WRONG_TYPE,
    errno.EMFILE: ("Raise the limit on open files: ", Command("ulimit -n")),
    errno.ENFILE: "Close programs; the system is out of file descriptors",
    errno.EFBIG: ("Raise the limit on file size: ", Command("ulimit -f")),
    errno.ENOSPC: "Free disk space, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EDQUOT: "Free disk space, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EROFS: "Set X07_VM_STATE_DIR and X07_VM_CACHE_DIR to folders that can be written",
    errno.EACCES: "Change its owner to yourself and its mode to 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EPERM: "Change its owner to yourself and its mode to 0700, or set X07_VM_STATE_DIR and X07_VM_CACHE_DIR",
    errno.EIO: "Check the system log; the disk may be failing",
    errno.ENOMEM: ("Close programs, or raise the limit on memory: ", Command("ulimit -v")),
    errno.ENOSYS: "Use Linux 5.6 or newer",
    errno.EAGAIN: ("Raise the limit on processes: ", Command("ulimit -u")),
}

_SIGXCPU: Final = {-24, 128 + 24}  # as status of subprocess, and of a shell


def host_error(exc: OSError | MemoryError) -> HostError | None:
    """Return the error to show to the user, or None if *exc* is a bug."""
    if isinstance(exc, MemoryError):  # Python's form of ENOMEM
        exc = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    fix = _FIXES.get(exc.errno or 0)
    if fix is None:
        try:
            require_own_proc()
        except HostError as error:  # the likely cause of a missing file
            return error
        return None
    place = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else ""
    return HostError(f"cannot use {place}" if place else "cannot continue", exc.strerror or str(exc), fix)


def out_of_cpu_time(status: int | None) -> str:
    """Return a clause for messages if *status* shows that the shell's CPU time limit ended a process, else ""."""
    return "reached the CPU time limit of this shell (ulimit -H -t)" if status in _SIGXCPU else ""


@contextlib.contextmanager
def raised_as(kind: type[SandboxError], what: str, fix: Text) -> Iterator[None]:
    """Raise an OSError in the context as an error of this kind, with the system's words for why.

    fix: what to do, unless there are too many open files.
    """
    try:
        yield
    except OSError as exc:
        fix = _FIXES[exc.errno] if exc.errno in {errno.EMFILE, errno.ENFILE} else fix
        raise kind(what, exc.strerror or str(exc), fix) from exc


def fix_for(exc: OSError, otherwise: Text) -> Text:
    """Return the advice for a full or read-only file system or too many open files, or *otherwise* for other errors."""
    known = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}
    return _FIXES[exc.errno] if exc.errno in known else otherwise
