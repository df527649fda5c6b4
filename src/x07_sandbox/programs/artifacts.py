"""The artifact cache: built programs, identified by their source, tools and image.

The file cache/artifacts/<key> contains one line of JSON, padded to HEADER_BYTES, the artifact, and notes about its
build. The caller checks the artifact's hash again when it copies the artifact. The file cache/building/<xx> is the lock
for builds of all keys that start with <xx>.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host import settings
from x07_sandbox.host.linux import copy_range
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder, closing_fd, least_recently_used

SCHEMA: Final = "x07.sandbox.artifact@0.4.0"
HEADER_BYTES: Final = 512
NOTES_MAX_BYTES: Final = settings.MIB


class CachedArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact in the cache, open for reading."""

    fd: int  # the file, with the artifact at HEADER_BYTES; the caller must not close it
    size: int
    sha256: str  # the digest that the artifact must have
    notes: bytes = b""  # about its build


def artifact_key(*parts: object) -> str:
    """Return the key of an artifact: a hash of everything that its build depends on."""
    return hashlib.sha256(json.dumps([SCHEMA, *parts], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def cached_artifact(key: str) -> Iterator[CachedArtifact | None]:
    """Open and yield the artifact with that key, or yield None if the cache has no valid artifact."""
    try:
        fd = os.open(_folder() / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    with closing_fd(fd):
        yield _described(fd, key)


def _described(fd: int, key: str) -> CachedArtifact | None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        return None
    try:
        header = json.loads(os.pread(fd, HEADER_BYTES, 0))
        size, count = int(header["bytes"]), int(header["notes_bytes"])
        if info.st_size != HEADER_BYTES + size + count or size < 0 or not 0 <= count <= NOTES_MAX_BYTES:
            return None
        notes = os.pread(fd, count, HEADER_BYTES + size)
        found = CachedArtifact(fd=fd, size=size, sha256=str(header["sha256"]), notes=notes)
        valid = header["schema_version"] == SCHEMA and header["key"] == key
        if not valid or header["notes_sha256"] != _sha256(notes):
            return None
    except (ValueError, KeyError, TypeError, OverflowError):  # the last one for 1e999
        return None
    with contextlib.suppress(OSError):
        os.utime(fd)  # the least recently used artifacts are removed first
    return found


def store_artifact(key: str, fd: int, size: int, sha256: str, notes: bytes = b"") -> None:
    """Try to store the artifact at offset 0 of *fd*. An artifact is not stored if it or its notes are too large."""
    if size > settings.ARTIFACTS_MAX_BYTES // 4 or len(notes) > NOTES_MAX_BYTES:
        return
    folder = _folder()
    header = {"schema_version": SCHEMA, "key": key, "sha256": sha256, "bytes": size}
    header |= {"notes_bytes": len(notes), "notes_sha256": _sha256(notes)}
    temporary = folder / f".{key}.{os.urandom(8).hex()}"
    try:
        with temporary.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
            file.flush()
            copy_range(fd, file.fileno(), size)
            file.seek(0, os.SEEK_END)
            file.write(notes)
        temporary.replace(folder / key)
        _make_room(folder)
    except OSError:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def build_lock(
    key: str, pause: Callable[[], None], most_s: float, progress: Callable[[str], None] = lambda _text: None
) -> Iterator[bool]:
    """Let one process at a time build *key*; yield whether this process had to wait. If locking fails, all may build.

    pause: called repeatedly while waiting; an exception from it ends the wait. most_s: timeout in seconds, because the
    other builder may be stopped (Ctrl-Z).
    """
    mostly_waited = False

    def on_wait() -> None:
        nonlocal mostly_waited
        mostly_waited = True
        progress("waiting: another run builds the same program")

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # There are at most 256 lock files, so none is removed. Keys with the same lock are built one by one.
            place = cache_folder("building") / key[:2]
            stack.enter_context(file_lock(place, on_wait=on_wait, most_s=most_s, pause=pause))
        yield mostly_waited


def remove_artifact(key: str) -> None:
    """Remove an artifact from the cache."""
    (_folder() / key).unlink(missing_ok=True)


def _make_room(folder: Path) -> None:
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            info = path.stat()
            found.append((info.st_mtime, info.st_blocks * 512, path))
    for path in least_recently_used(found, settings.ARTIFACTS_MAX_BYTES):
        path.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder() -> Path:
    return cache_folder("artifacts")
