"""The X07 language's toolchain in an image: a host folder packed for /usr/local/lib/x07, with its programs on PATH."""

import errno
import hashlib
import os
import stat
import tarfile
from pathlib import Path
from typing import Final

from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.images import tar

PLACE: Final = "usr/local/lib/x07"
ENTRIES_MAX: Final = 100_000
MAX_BYTES: Final = 2 * 1024**3
_FIX: Final = "Choose a folder with the X07 toolchain for Linux: bin/x07-os-runner and the files it needs"


def pack(source: Path, target: Path) -> str:
    """Write the toolchain at *source* to the new tar archive *target*, to be unpacked at the root of an image.

    Return the archive's digest, which depends on names, contents and executable bits. Raises UsageError, HostError. The
    archive contains the parent folders too, since mkfs.erofs would give missing ones the mode 0777.
    """
    if not os.access(source / "bin" / "x07-os-runner", os.X_OK):
        raise UsageError(f"cannot use the X07 toolchain {source}", "bin/x07-os-runner is not an executable", _FIX)
    try:
        total = 0
        for count, path in enumerate(tar.paths_below(source), start=1):
            total += _checked_size(source, path)
            if count > ENTRIES_MAX or total > MAX_BYTES:
                why = f"it has more than {ENTRIES_MAX} entries or {MAX_BYTES >> 20} MiB"
                raise UsageError(f"cannot use the X07 toolchain {source}", why, _FIX)
        with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as archive:
            for name in (".", "usr", "usr/local", "usr/local/bin", "usr/local/lib", PLACE):
                archive.addfile(tar.entry(name, tarfile.DIRTYPE, 0o755))
            tar.add_tree(archive, source, f"{PLACE}/")
            for path in sorted((source / "bin").iterdir()):
                link = f"../lib/x07/bin/{path.name}"
                archive.addfile(tar.entry(f"usr/local/bin/{path.name}", tarfile.SYMTYPE, 0o777, link=link))
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            fix = "Free disk space, or set X07_VM_CACHE_DIR to a folder on a larger disk"
            raise HostError("cannot copy the X07 toolchain", f"{exc.strerror} ({target.parent})", fix) from exc
        raise UsageError(f"cannot read the X07 toolchain {source}", str(exc)[:300], _FIX) from exc


def _checked_size(source: Path, path: Path) -> int:
    """Return the size of a file in the toolchain. Raises UsageError if an image cannot hold the file."""
    info, name = path.lstat(), path.relative_to(source)
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
    return info.st_size
