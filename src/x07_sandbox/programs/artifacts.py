"""The artifact cache: what was built before from the same source, by the same tools, in the same image.

cache/building/<xx>: locked by whoever builds one whose key begins so, that others may wait for it.
cache/artifacts/<key>: one line of JSON, padded to HEADER_BYTES, then the artifact, then notes about its build. It is
one file, so that it is there whole or not at all. Whoever uses an artifact hashes it again while copying it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.host import settings
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder, least_recently_used

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEMA: Final = "x07.sandbox.artifact@0.2.0"
HEADER_BYTES: Final = 512
NOTES_MAX_BYTES: Final = settings.MIB


class CachedArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact that is there. fd: lent, its content starts at HEADER_BYTES. sha256: what it must hash to.

    notes: what was noted about its build, as it was given.
    """

    fd: int
    size: int
    sha256: str
    notes: bytes = b""


def artifact_key(*parts: object) -> str:
    """The name of an artifact: a hash of everything that what a build makes depends on."""
    return hashlib.sha256(json.dumps([SCHEMA, *parts], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def cached_artifact(key: str) -> Iterator[CachedArtifact | None]:
    """The artifact *key*, or None where there is none that can be used."""
    try:
        fd = os.open(_folder() / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield _described(fd, key)
    finally:
        os.close(fd)


def _described(fd: int, key: str) -> CachedArtifact | None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        return None
    try:
        told = json.loads(os.pread(fd, HEADER_BYTES, 0))
        size, count = int(told["bytes"]), int(told["notes_bytes"])
        if info.st_size != HEADER_BYTES + size + count or size < 0 or not 0 <= count <= NOTES_MAX_BYTES:
            return None
        notes = os.pread(fd, count, HEADER_BYTES + size)
        found = CachedArtifact(fd=fd, size=size, sha256=str(told["sha256"]), notes=notes)
        good = told["schema_version"] == SCHEMA and told["key"] == key and told["notes_sha256"] == _sha256(notes)
    except (ValueError, KeyError, TypeError, OverflowError):  # the last: of 1e999
        return None
    if not good:
        return None
    with contextlib.suppress(OSError):
        os.utime(fd)  # when it was last used: the oldest go first when space runs short
    return found


def store_artifact(key: str, fd: int, size: int, sha256: str, notes: bytes = b"") -> None:
    """Keep what was built; fd: its content from offset 0. Where that cannot be written the next run builds again.

    What is very large is not kept, nor what has more than NOTES_MAX_BYTES of notes: a part of them would be no record.
    """
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
            position = 0
            while position < size and (count := os.sendfile(file.fileno(), fd, position, size - position)):
                position += count
            file.seek(0, os.SEEK_END)
            file.write(notes)
        temporary.replace(folder / key)
        _make_room(folder)
    except OSError:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def build_lock(key: str, pause: Callable[[], None], most_s: float) -> Iterator[bool]:
    """Let one process at a time build *key*; yields whether another built it before.

    pause: called repeatedly during the wait; what it raises ends it. most_s: seconds after which the wait ends anyway,
    since the other may be stopped (Ctrl-Z). Where nothing can be locked, all build.
    """
    waits: list[str] = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # A few files, so that they need not be removed; two keys that share one are only built one after the other.
            place = cache_folder("building") / key[:2]
            stack.enter_context(file_lock(place, on_wait=lambda: waits.append(key), most_s=most_s, pause=pause))
        yield bool(waits)


def remove_artifact(key: str) -> None:
    """Forget one that is not what it should be."""
    (_folder() / key).unlink(missing_ok=True)


def _make_room(folder: Path) -> None:
    """Remove the least recently used above the size limit, and what killed processes left half written."""
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
