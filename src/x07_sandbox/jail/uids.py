"""A separate host uid for each job that root starts.

bubblewrap keeps the uid's lock open until the last process of the jail has ended. Only then is the uid free again.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.errors import HostError
from x07_sandbox.host import close_on_fork
from x07_sandbox.host.paths import private_dir

COUNT: Final = 4096
_FOLDER: Final = Path("/run/x07-sandbox/uids")
_CANDIDATES: Final = (0x70000000, 0x60000000, 1_000_000_000, 500_000_000, 60_100)
_TRIES: Final = 64


def _ranges(path: str, first: int, count: int) -> list[tuple[int, int]]:
    """Return the ranges (first, count) in a file of colon-separated fields. first, count: indexes of the fields."""
    found = []
    with contextlib.suppress(FileNotFoundError), Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.strip().split(":")
            with contextlib.suppress(IndexError, ValueError):
                found.append((int(fields[first]), int(fields[count]) if count else 1))
    return found


def free_range() -> int:
    """Return the first of COUNT mapped uids that are not in passwd, group, subuid or subgid. Raises HostError."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    mapped = [tuple(int(word) for word in line.split()) for line in lines]
    taken = [*_ranges("/etc/passwd", 2, 0), *_ranges("/etc/group", 2, 0)]
    taken += [*_ranges("/etc/subuid", 1, 2), *_ranges("/etc/subgid", 1, 2)]
    for first in _CANDIDATES:
        inside = any(start <= first and first + COUNT <= start + size for start, _, size in mapped)
        clash = any(first < start + size and start < first + COUNT for start, size in taken)
        if inside and not clash:
            return first
    fix = "Run as an ordinary user, or map more uids into this container"
    raise HostError("cannot assign a uid to the job", "no free range of 4096 uids is mapped here", fix)


@contextlib.contextmanager
def lease_uid() -> Iterator[tuple[int, int]]:
    """Yield a uid that no other job on this machine uses, and its lock's descriptor. Raises HostError."""
    first = free_range()
    for _ in range(_TRIES):
        uid = first + int.from_bytes(os.urandom(4), "big") % COUNT
        fd = close_on_fork.add(_lock_file(str(uid)))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            close_on_fork.close(fd)
            continue
        try:
            yield uid, fd
        finally:
            close_on_fork.close(fd)
        return
    raise HostError(
        "cannot assign a uid to the job", f"{_TRIES} random uids were all in use", "Wait for other jobs to end"
    )


def _lock_file(name: str) -> int:
    """Open the lock file of one uid. Its path is fixed, so that all jobs of the machine share it."""
    try:
        private_dir(_FOLDER.parent)
        return os.open(private_dir(_FOLDER) / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (HostError, OSError) as exc:
        why = f"{exc.what} ({exc.why})" if isinstance(exc, HostError) else f"{exc.strerror} ({_FOLDER})"
        fix = "Make /run writable for root (in a container: a tmpfs), or run as an ordinary user"
        raise HostError("cannot assign a uid to the job", why, fix) from exc
