"""Packing of selected host files as one archive. Links that lead out of the tree are not followed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.files.patterns import Walk
from x07_sandbox.host import settings
from x07_sandbox.host.project import ProjectFolder
from x07_sandbox.images.cpio import TRAILER, Entry, file, folder, pack

FILES_MAX: Final = 10_000
_PART_MAX: Final = 255
_PATH_MAX: Final = 1024


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """A newc archive (cpio(5)) and its files. archive: without mtimes, so its digest is stable. timed: with mtimes."""

    archive: bytes
    files: dict[str, bytes]
    timed: bytes = b""


def pack_tree(
    root: Path,
    patterns: Sequence[str],
    *,
    what: str = "",
    check: Callable[[], None] = lambda: None,
    mtimes: bool = False,
) -> Packed:
    """Pack the files below *root* that match *patterns* (glob(7), and `**` for any folders). Raises UsageError.

    Hidden files match only patterns that start with a dot. A link to a file below *root* is packed as that file.
    what: the first part of error messages.
    check: called repeatedly; it raises an exception to cancel.
    mtimes: whether to fill `Packed.timed`.
    """
    folder = ProjectFolder(root, what)
    found: dict[str, tuple[bytes, int, int]] = {}
    left = settings.SOURCE_MAX_BYTES
    for name in Walk(folder, patterns, check).files():
        check()
        check_name(name, f"the files of {root}")
        data, info = folder.content(name, left)
        left -= len(data)
        found[name] = data, 0o755 if info.st_mode & 0o100 else 0o644, info.st_mtime_ns
        if left < 0 or len(found) > FILES_MAX:
            many = f"are more than {FILES_MAX}" if left >= 0 else f"have more than {settings.SOURCE_MAX_BYTES} bytes"
            raise folder.refused(f"its files {many}", "List fewer files, or remove files that are not needed")
    ordered = dict(sorted(found.items()))
    return Packed(
        archive=_archive({name: (data, mode, 0) for name, (data, mode, _) in ordered.items()}),
        files={name: data for name, (data, _, _) in ordered.items()},
        timed=_archive(ordered) if mtimes else b"",
    )


def pack_files(files: Mapping[str, bytes], what: str) -> Packed:
    """Pack files from memory. Raises UsageError. what: a description of the files, for messages."""
    total = sum(map(len, files.values()))
    if len(files) > FILES_MAX or total > settings.SOURCE_MAX_BYTES:
        why = f"{len(files)} files of {total} bytes exceed a limit ({FILES_MAX}, {settings.SOURCE_MAX_BYTES} bytes)"
        raise UsageError(f"cannot use {what}", why, "Use fewer or smaller files")
    for name, data in files.items():
        if not isinstance(data, bytes):
            raise UsageError(f"cannot use {what}", f"the content of {name!r} is not bytes", "Encode the content")
        check_name(name, what)
    names = set(files)
    for name in files:
        if any(str(parent) in names for parent in PurePosixPath(name).parents):
            raise UsageError(f"cannot use {what}", f"{name!r} is below a file", "Rename one of them")
    ordered = dict(sorted(files.items()))
    return Packed(archive=_archive({name: (data, 0o644, 0) for name, data in ordered.items()}), files=ordered)


def check_name(name: str, what: str) -> None:
    """Raise UsageError if a relative name leads out of its folder or is not plain text."""
    parts = name.split("/") if isinstance(name, str) else [""]
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    # os.fsdecode replaces bytes that are not UTF-8 by surrogates, which are not printable.
    plain = all(part not in {"", ".", ".."} and part.isprintable() for part in parts)
    if parts[0] == TRAILER:
        raise UsageError(f"cannot use {what}", f"the name {TRAILER} marks the end of an archive", "Rename that file")
    if not plain or max(sizes) > _PART_MAX or sum(sizes) + len(sizes) > _PATH_MAX:
        why = f"{name!r} is not a plain relative path"
        raise UsageError(f"cannot use {what}", why, "Use names without '..', '//' and control characters")


def _archive(files: Mapping[str, tuple[bytes, int, int]]) -> bytes:
    folders: dict[str, Entry] = {}
    for name in files:
        for parent in reversed(PurePosixPath(name).parents):
            if str(parent) != ".":
                folders.setdefault(str(parent), folder(str(parent)))
    return pack([*folders.values(), *(file(name, *content) for name, content in files.items())])
