"""The X07 language's toolchain in an image: a host folder copied to /usr/local/lib/x07, with its programs on PATH."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tarfile
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.images import manifest, tar

if TYPE_CHECKING:
    from pathlib import Path

PLACE: Final = "usr/local/lib/x07"
ENTRIES_MAX: Final = 100_000
MAX_BYTES: Final = 2 * 1024**3
_FIX: Final = "Choose a folder with the X07 toolchain for Linux: bin/x07-os-runner and the files it needs"


def snapshot(source: Path, target: Path) -> str:
    """Copy the toolchain at *source* to the new folder *target*. Return its digest. Raises UsageError, HostError."""
    if not os.access(source / "bin" / "x07-os-runner", os.X_OK):
        raise UsageError(f"cannot use the X07 toolchain {source}", "bin/x07-os-runner is not an executable", _FIX)
    try:
        _copy(source, target)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            fix = "Free disk space, or set X07_VM_CACHE_DIR to a folder on a larger disk"
            raise HostError("cannot copy the X07 toolchain", f"{exc.strerror} ({target.parent})", fix) from exc
        raise UsageError(f"cannot read the X07 toolchain {source}", str(exc)[:300], _FIX) from exc
    return _digest(target)


def _copy(source: Path, target: Path) -> None:
    # Keep only the executable bit: an ordinary user could not remove a copy with read-only folders.
    target.mkdir(mode=0o700)
    total = 0
    for count, path in enumerate(tar.paths_below(source), start=1):
        info, copied = path.lstat(), target / path.relative_to(source)
        total += info.st_size
        if count > ENTRIES_MAX or total > MAX_BYTES:
            why = f"it has more than {ENTRIES_MAX} entries or {MAX_BYTES >> 20} MiB"
            raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)
        _check(source, path, info)
        if stat.S_ISLNK(info.st_mode):
            copied.symlink_to(path.readlink())
        elif stat.S_ISDIR(info.st_mode):
            copied.mkdir(mode=0o700)
        else:
            shutil.copyfile(path, copied)
            copied.chmod(0o700 if info.st_mode & 0o100 else 0o600)


def pack(folder: Path, target: Path) -> None:
    """Write the copy that `snapshot` made as a tar archive, to be unpacked at the root of an image.

    The archive contains the parent folders too, since mkfs.erofs would give missing ones the mode 0777.
    """
    with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as archive:
        for name in (".", "usr", "usr/local", "usr/local/bin", "usr/local/lib", PLACE):
            archive.addfile(tar.entry(name, tarfile.DIRTYPE, 0o755))
        tar.add_tree(archive, folder, f"{PLACE}/")
        for path in sorted((folder / "bin").iterdir()):
            link = f"../lib/x07/bin/{path.name}"
            archive.addfile(tar.entry(f"usr/local/bin/{path.name}", tarfile.SYMTYPE, 0o777, link=link))


def _check(source: Path, path: Path, info: os.stat_result) -> None:
    name = path.relative_to(source)
    why = ""
    if not str(name).isprintable():
        why = "a file name contains unprintable characters"
    elif stat.S_ISLNK(info.st_mode):
        target = os.path.normpath(name.parent / path.readlink())
        if path.readlink().is_absolute() or target.startswith(".."):
            why = f"{name} is a link out of the folder"
    elif not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        why = f"{name} is neither a file nor a folder"
    if why:
        raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)


def _digest(folder: Path) -> str:
    rows: list[list[str]] = []
    for path in tar.paths_below(folder):
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
