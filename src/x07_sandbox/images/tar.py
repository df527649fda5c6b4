"""Reproducible tar entries for images: owned by root, with one fixed date, in a fixed order."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo
from typing import NoReturn

from x07_sandbox.images import commands


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o444, *, size: int = 0, link: str = ""
) -> tarfile.TarInfo:
    """Return an entry, owned by root and with the fixed date."""
    made = TarInfo(name)
    made.type, made.mode, made.size, made.linkname, made.mtime = kind, mode, size, link, commands.EPOCH
    return made


def add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a read-only file to *archive*."""
    archive.addfile(entry(name, size=len(data)), io.BytesIO(data))


def add_tree(archive: tarfile.TarFile, folder: Path, prefix: str = "", *, exact_modes: bool = False) -> None:
    """Add everything below *folder* except devices, sockets and pipes, with *prefix* before each name. Raises OSError.

    exact_modes: keep modes (without setuid and setgid) and hard links; otherwise files become 0755 or 0644.
    """
    seen: dict[tuple[int, int], str] = {}
    for path in paths_below(folder):
        info, name = path.lstat(), f"{prefix}{path.relative_to(folder)}"
        mode = info.st_mode & 0o1777 if exact_modes else 0o755
        if stat.S_ISLNK(info.st_mode):
            archive.addfile(entry(name, tarfile.SYMTYPE, 0o777, link=str(path.readlink())))
        elif stat.S_ISDIR(info.st_mode):
            archive.addfile(entry(name, tarfile.DIRTYPE, mode))
        elif stat.S_ISREG(info.st_mode):
            first = seen.setdefault((info.st_dev, info.st_ino), name) if exact_modes else name
            if first != name:
                archive.addfile(entry(name, tarfile.LNKTYPE, mode, link=first))
                continue
            mode = mode if exact_modes or info.st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                archive.addfile(entry(name, tarfile.REGTYPE, mode, size=info.st_size), file)


def paths_below(folder: Path) -> Iterator[Path]:
    """Yield every path below *folder* in a fixed order, folders before their entries. Raises OSError."""
    for here, folders, names in os.walk(folder, onerror=_fail):
        folders.sort()
        yield from (Path(here) / name for name in sorted([*folders, *names]))


def _fail(exc: OSError) -> NoReturn:
    raise exc
