"""X07's own toolchain in an image: a folder of the host's, copied in as /usr/local/lib/x07.

It holds Linux builds: bin/x07-os-runner and what that needs (stdlib, deps/x07). Programs of its bin are on PATH too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.images import commands, manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE: Final = "usr/local/lib/x07"
DATE: Final = commands.EPOCH  # of all that is added
ENTRIES_MAX: Final = 100_000
MAX_BYTES: Final = 2 * 1024**3
_FIX: Final = "Name a folder with X07's Linux build: bin/x07-os-runner and what it needs"


def snapshot(source: Path, target: Path) -> str:
    """Copy the toolchain at *source* to the new folder *target*; the copy's sha256. Raises UsageError, HostError."""
    if not os.access(source / "bin" / "x07-os-runner", os.X_OK):
        raise UsageError(f"cannot use the X07 toolchain {source}", "bin/x07-os-runner is no program there", _FIX)
    try:
        _check_all(source)
        _copy(source, target)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            fix = "Free space there, or set X07_VM_CACHE_DIR to a larger disk"
            raise HostError("cannot copy the X07 toolchain", f"{target.parent}: {exc.strerror}", fix) from exc
        raise UsageError(f"cannot read the X07 toolchain {source}", str(exc)[:300], _FIX) from exc
    return _digest(target)


def _check_all(source: Path) -> None:
    total = 0
    for count, path in enumerate(_paths(source), start=1):
        info = path.lstat()
        total += info.st_size
        if count > ENTRIES_MAX or total > MAX_BYTES:
            why = f"it has more than {ENTRIES_MAX} entries or {MAX_BYTES >> 20} MiB"
            raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)
        _check(source, path, info)


def _copy(source: Path, target: Path) -> None:
    """Copy all below *source*, for its owner alone."""
    # Only a program's mode is kept: an ordinary user could not remove read-only folders, as package stores have them.
    target.mkdir(mode=0o700)
    for path in _paths(source):
        info, copied = path.lstat(), target / path.relative_to(source)
        if stat.S_ISLNK(info.st_mode):
            copied.symlink_to(path.readlink())
        elif stat.S_ISDIR(info.st_mode):
            copied.mkdir(mode=0o700)
        else:
            shutil.copyfile(path, copied)
            copied.chmod(0o700 if info.st_mode & 0o100 else 0o600)


def pack(folder: Path, tar: Path) -> None:
    """Write what `snapshot` made as an archive that is unpacked at the root of an image.

    The folders above it are in it too: mkfs.erofs gives those that are not the mode 0777, though they are there.
    """
    with tarfile.open(tar, "x", format=tarfile.PAX_FORMAT) as archive:
        for name in (".", "usr", "usr/local", "usr/local/bin", "usr/local/lib", PLACE):
            archive.addfile(entry(name, tarfile.DIRTYPE, 0o755))
        for path in _paths(folder):
            info, name = path.lstat(), f"{PLACE}/{path.relative_to(folder)}"
            if stat.S_ISLNK(info.st_mode):
                archive.addfile(entry(name, tarfile.SYMTYPE, 0o777, link=str(path.readlink())))
            elif stat.S_ISDIR(info.st_mode):
                archive.addfile(entry(name, tarfile.DIRTYPE, 0o755))
            else:
                mode = 0o755 if info.st_mode & 0o100 else 0o644
                with path.open("rb") as file:
                    archive.addfile(entry(name, tarfile.REGTYPE, mode, size=info.st_size), file)
        for path in sorted((folder / "bin").iterdir()):
            link = f"../lib/x07/bin/{path.name}"
            archive.addfile(entry(f"usr/local/bin/{path.name}", tarfile.SYMTYPE, 0o777, link=link))


def entry(name: str, kind: bytes, mode: int, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    """An entry of an archive that becomes part of an image: of root, with the one date."""
    made = tarfile.TarInfo(name)
    made.type, made.mode, made.size, made.linkname, made.mtime = kind, mode, size, link, DATE
    return made


def _paths(folder: Path) -> Iterator[Path]:
    """All below *folder*. Raises OSError for a folder that cannot be read."""
    for here, folders, names in os.walk(folder, onerror=_fail):
        folders.sort()
        yield from (Path(here) / name for name in sorted([*folders, *names]))


def _fail(exc: OSError) -> NoReturn:
    raise exc


def _check(source: Path, path: Path, info: os.stat_result) -> None:
    name = path.relative_to(source)
    why = ""
    if not str(name).isprintable():
        why = "a name in it is no plain text"
    elif stat.S_ISLNK(info.st_mode):
        target = os.path.normpath(name.parent / path.readlink())
        if path.readlink().is_absolute() or target.startswith(".."):
            why = f"{name} is a link that leads out of it"
    elif not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        why = f"{name} is neither file nor folder"
    if why:
        raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)


def _digest(folder: Path) -> str:
    rows: list[list[str]] = []
    for path in _paths(folder):
        info = path.lstat()
        name = str(path.relative_to(folder))
        if stat.S_ISLNK(info.st_mode):
            rows.append([name, "link", str(path.readlink())])
        elif stat.S_ISREG(info.st_mode):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            rows.append([name, "program" if info.st_mode & 0o100 else "file", content])
        else:
            rows.append([name, "folder", ""])
    return hashlib.sha256(manifest.canonical(rows)).hexdigest()
