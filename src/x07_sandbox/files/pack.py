"""A tree of the host's as one archive for a machine: chosen files, read once, no link followed out of the tree."""

from __future__ import annotations

import glob
import os
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host import settings
from x07_sandbox.images.cpio import Entry, file, folder, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FILES_MAX: Final = 10_000
_PART_MAX: Final = 255
_PATH_MAX: Final = 1024


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """An archive (newc, cpio(5)), and what is in it: relative name of each file, and its content."""

    archive: bytes
    files: dict[str, bytes]


def pack_tree(root: Path, patterns: Sequence[str]) -> Packed:
    """The files below *root* that *patterns* name (glob(7), and `**` for any folders), hidden ones only if named so.

    A link counts as the file it leads to, if that lies below *root* too. Raises UsageError.
    """
    base = os.path.realpath(root)
    found: dict[str, tuple[bytes, int]] = {}
    total = 0
    for name in _chosen(root, patterns):
        data_mode = _read(root, base, name, settings.SOURCE_MAX_BYTES - total)
        if data_mode is None:
            continue
        found[name] = data_mode
        total += len(data_mode[0])
        if len(found) > FILES_MAX:
            raise _refused(root, f"its files are more than {FILES_MAX}", "Name fewer files")
    return Packed(
        archive=_archive({name: found[name] for name in sorted(found)}),
        files={name: found[name][0] for name in sorted(found)},
    )


def pack_files(files: Mapping[str, bytes], what: str) -> Packed:
    """The same from contents in memory. what: names them in errors. Raises UsageError."""
    total = sum(map(len, files.values()))
    if len(files) > FILES_MAX or total > settings.SOURCE_MAX_BYTES:
        why = f"it has {len(files)} files with {total} bytes; {FILES_MAX} and {settings.SOURCE_MAX_BYTES} may be"
        raise UsageError(f"cannot take {what}", why, "Give fewer or smaller files")
    for name, data in files.items():
        if not isinstance(data, bytes):
            raise UsageError(f"cannot take {what}", f"the content of {name!r} is no bytes", "Encode it")
        check_name(name, what)
    names = set(files)
    for name in files:
        if any(str(parent) in names for parent in PurePosixPath(name).parents):
            raise UsageError(f"cannot take {what}", f"{name!r} lies below a file", "Rename one of them")
    ordered = {name: files[name] for name in sorted(files)}
    return Packed(archive=_archive({name: (data, 0o644) for name, data in ordered.items()}), files=ordered)


def check_name(name: str, what: str) -> None:
    """Refuse a relative name that leads out, or that is no plain text. Raises UsageError."""
    parts = name.split("/") if isinstance(name, str) else [""]
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    # Half a surrogate, as os.fsdecode makes of what is no UTF-8, is not printable.
    plain = all(part not in {"", ".", ".."} and part.isprintable() for part in parts)
    if not plain or max(sizes) > _PART_MAX or sum(sizes) + len(sizes) > _PATH_MAX:
        why = f"{name!r} is no relative path of plain names"
        raise UsageError(f"cannot take {what}", why, "Use names without '..', '//', control characters")


def _chosen(root: Path, patterns: Sequence[str]) -> Iterator[str]:
    """Names that match, each once; a pattern that names nothing is an error, since a build would miss it later."""
    seen: set[str] = set()
    for pattern in patterns:
        some = False
        for name in glob.iglob(pattern, root_dir=root, recursive=True):  # noqa: PTH207 - Path.glob takes hidden ones too
            clean = os.path.normpath(name)
            some = True
            if clean not in seen:
                seen.add(clean)
                check_name(clean, f"the files of {root}")
                yield clean
            if len(seen) > 2 * FILES_MAX:  # folders are among them
                raise _refused(root, f"{pattern!r} names more than {FILES_MAX} files", "Name fewer files")
        if not some:
            raise _refused(root, f"no file matches {pattern!r}", "Correct `files` in its manifest")


def _read(root: Path, base: str, name: str, most: int) -> tuple[bytes, int] | None:
    """Content and mode; None for a folder. The opened file's own place decides, so that no link leads out."""
    try:
        fd = os.open(root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            place = str(Path(f"/proc/self/fd/{fd}").readlink())
            if place != base and not place.startswith(f"{base}/"):
                raise _refused(root, f"{name} leads out of it, to {place}", "Copy the file into the project")
            if stat.S_ISDIR(info.st_mode):
                return None
            if not stat.S_ISREG(info.st_mode):
                raise _refused(root, f"{name} is no regular file", "Leave it out of `files`")
            with os.fdopen(fd, "rb", closefd=False) as opened:
                data = opened.read(most + 1)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _refused(root, f"{name}: {exc.strerror or exc}", "Make it readable, or leave it out of `files`") from exc
    if len(data) > most:
        raise _refused(root, f"its files have more than {settings.SOURCE_MAX_BYTES} bytes", "Name fewer files")
    return data, 0o755 if info.st_mode & 0o100 else 0o644


def _archive(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    folders: dict[str, Entry] = {}
    for name in files:
        for parent in reversed(PurePosixPath(name).parents):
            if str(parent) != ".":
                folders.setdefault(str(parent), folder(str(parent)))
    return pack([*folders.values(), *(file(name, data, mode) for name, (data, mode) in files.items())])


def _refused(root: Path, why: str, fix: str) -> UsageError:
    return UsageError(f"cannot take the project {root}", why, fix)
