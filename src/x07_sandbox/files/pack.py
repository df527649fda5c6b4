"""Packing of selected host files as one tree (channel/trees). Links that lead out of the tree are not followed."""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import msgspec

from x07_sandbox.channel.trees import NO_TIME, Entry, Kind, file_record
from x07_sandbox.errors import Flag, UsageError
from x07_sandbox.files.changes import parent_folders
from x07_sandbox.host import settings
from x07_sandbox.programs.project import ProjectFolder

FILES_MAX: Final = 10_000
_PART_MAX: Final = 255
_PATH_MAX: Final = 1024


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """A tree stream and its files. tree: without mtimes, so its digest is stable. timed: with mtimes."""

    tree: bytes
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
        tree=tree_of({name: (data, mode, NO_TIME) for name, (data, mode, _) in ordered.items()}),
        files={name: data for name, (data, _, _) in ordered.items()},
        timed=tree_of(ordered) if mtimes else b"",
    )


def pack_files(files: Mapping[str, bytes], what: str) -> Packed:
    """Pack files from memory. Raises UsageError like `check_files`."""
    check_files(files, what)
    ordered = dict(sorted(files.items()))
    return Packed(tree=tree_of({name: (data, 0o644, NO_TIME) for name, data in ordered.items()}), files=ordered)


def check_files(files: Mapping[str, bytes], what: str) -> None:
    """Raise UsageError for files that cannot be packed together. what: a description of the files, for messages."""
    total = sum(map(len, files.values()))
    if len(files) > FILES_MAX or total > settings.SOURCE_MAX_BYTES:
        most = f"the limit is {FILES_MAX} files of {settings.SOURCE_MAX_BYTES // settings.MIB} MiB together"
        why = f"{len(files)} files have {total / settings.MIB:.1f} MiB, but {most}"
        fix = "Put large files into a folder, and pass it as ", Flag("--workdir"), " or ", Flag("--allow-read-root")
        raise UsageError(f"cannot use {what}", why, fix, code="files-too-large")
    for name, data in files.items():
        if not isinstance(data, bytes):
            raise UsageError(f"cannot use {what}", f"the content of {name!r} is not bytes", "Encode the content")
        check_name(name, what)
    names = set(files)
    for name in files:
        if any(str(parent) in names for parent in PurePosixPath(name).parents):
            raise UsageError(f"cannot use {what}", f"{name!r} is below a file", "Rename one of them")


def check_name(name: str, what: str) -> None:
    """Raise UsageError if a relative name leads out of its folder or is not plain text."""
    parts = name.split("/") if isinstance(name, str) else [""]
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    # os.fsdecode replaces bytes that are not UTF-8 by surrogates, which are not printable.
    plain = all(part not in {"", ".", ".."} and part.isprintable() for part in parts)
    if not plain or max(sizes) > _PART_MAX or sum(sizes) + len(sizes) > _PATH_MAX:
        why = f"{name!r} is not a plain relative path"
        raise UsageError(f"cannot use {what}", why, "Use names without '..', '//' and control characters")


def tree_of(files: Mapping[str, tuple[bytes, int, int]]) -> bytes:
    """Return the tree stream of files in memory: content, mode and mtime (or NO_TIME) by name. Folders are added."""
    folders = (Entry(Kind.FOLDER, name.encode(), mode=0o755).encoded() for name in sorted(parent_folders(files)))
    records = (file_record(name.encode(), *content) for name, content in files.items())
    return b"".join([*folders, *records, Entry(Kind.END, b"").encoded()])


ENTRIES_MAX: Final = 50_000
# Limit for comparisons of a name with a star in a pattern. This many take about a second.
_STEPS_MAX: Final = 1_000_000
_DEPTH_MAX: Final = 512
_ANY: Final = "**"

_State = tuple[int, int]  # indexes of a pattern and of its part that a name in this folder has to match


class _Part(NamedTuple):
    """The part of a pattern between two slashes. regex: None for a plain name and `**`. cost: steps per comparison."""

    text: str
    regex: re.Pattern[str] | None
    cost: int

    def matches(self, name: str) -> bool:
        """Return whether the part matches a name."""
        if self.regex is None and self.text != _ANY:
            return name == self.text
        if name.startswith(".") and not self.text.startswith("."):
            return False
        return self.regex is None or self.regex.match(name) is not None


class Walk:
    """A walk through *folder* by *patterns* (glob(7), and `**` for any number of folders).

    Hidden names match only parts that start with a dot. check: called repeatedly; it raises an exception to cancel.
    """

    def __init__(self, folder: ProjectFolder, patterns: Sequence[str], check: Callable[[], None]) -> None:
        self._folder = folder
        self._patterns = patterns
        self._check = check
        self._parts = [_parts(pattern) for pattern in patterns]
        self._states = [
            [_states(number, at, parts) for at in range(len(parts))] for number, parts in enumerate(self._parts)
        ]
        self._matched: set[int] = set()
        self._entries = 0
        self._steps = 0

    def files(self) -> Iterator[str]:
        """Yield each matching file once, unordered. Raises UsageError at a limit or if a pattern matches nothing."""
        waiting: list[tuple[str, set[_State], tuple[tuple[int, int], ...]]] = []
        waiting.append(("", {state for states in self._states for state in states[0]}, ()))
        while waiting:
            self._check()
            name, states, above = waiting.pop()
            if len(above) >= _DEPTH_MAX:
                raise self._folder.refused(f"{name[:64]}... is too deep", "Remove that folder from the project")
            with self._folder.look(name or ".", name or "the folder itself") as (fd, info):
                key = info.st_dev, info.st_ino
                # Skip a folder that a link shows inside itself. If a link shows it elsewhere, walk it again.
                found = [] if key in above or not stat.S_ISDIR(info.st_mode) else self._found(fd, name, states)
            below = (*above, key)
            waiting.extend((inner, left, below) for inner, _, left in found if left)
            yield from (inner for inner, is_file, _ in found if is_file)
        for number, pattern in enumerate(self._patterns):
            if number not in self._matched:
                why = f"no file matches {pattern!r}"
                raise self._folder.refused(why, "Correct `files` in the manifest")

    def _found(self, fd: int, folder: str, states: set[_State]) -> list[tuple[str, bool, set[_State]]]:
        """Return the relevant entries of a folder: path, whether it is a matching file, and states for names below."""
        plain: dict[str, list[_State]] = {}
        others: list[_State] = []
        for state in states:
            number, at = state
            part = self._parts[number][at]
            if part.regex is None and part.text != _ANY:
                plain.setdefault(part.text, []).append(state)
                continue
            others.append(state)
            if part.text == _ANY and at + 1 == len(self._parts[number]):
                self._matched.add(number)  # `**` also matches no folder
        found = []
        for part_name, kind in self._listed(fd, folder):
            matched, inner = self._step(part_name, (*others, *plain.get(part_name, ())))
            if not matched and not inner:
                continue
            name = f"{folder}/{part_name}" if folder else part_name
            target = self._target_kind(name) if kind == stat.S_IFLNK else kind
            self._matched |= matched
            is_folder = target == stat.S_IFDIR
            found.append((name, bool(matched) and not is_folder, inner if is_folder else set()))
        return found

    def _listed(self, fd: int, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the names in a folder and their types, without following links."""
        try:
            with os.scandir(f"/proc/self/fd/{fd}") as entries:
                for entry in entries:
                    self._count()
                    yield entry.name, _kind(entry)
        except OSError as exc:
            why = f"{folder or 'the folder itself'} cannot be read ({exc.strerror or exc})"
            raise self._folder.refused(why, "Make that folder readable, or remove it from the project") from exc

    def _step(self, name: str, states: Sequence[_State]) -> tuple[set[int], set[_State]]:
        matched: set[int] = set()
        inner: set[_State] = set()
        for state in states:
            number, at = state
            part = self._parts[number][at]
            self._steps += part.cost
            if not part.matches(name):
                continue
            if part.text == _ANY:
                inner.add(state)
            if at + 1 == len(self._parts[number]):
                matched.add(number)
            else:
                inner.update(self._states[number][at + 1])
        if self._steps > _STEPS_MAX:
            why = "its patterns have too many stars for its number of files"
            raise self._folder.refused(why, "Use fewer and simpler patterns")
        return matched, inner

    def _target_kind(self, name: str) -> int:
        """Return the type of a link's target; S_IFLNK if the link is broken or leads out of the project."""
        try:
            with self._folder.look(name) as (_, info):
                return stat.S_IFMT(info.st_mode)
        except UsageError:
            return stat.S_IFLNK

    def _count(self) -> None:
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            why = f"the search for its files visits more than {ENTRIES_MAX} names"
            raise self._folder.refused(why, "Remove unneeded files from the project, or avoid '**' in patterns")


def _parts(pattern: str) -> list[_Part]:
    found: list[_Part] = []
    texts = [text for text in pattern.split("/") if text not in {"", "."}]
    if pattern.endswith(("/", "/.")) or not texts:
        texts.append("")  # matches no file
    for text in texts:
        if text == _ANY and found and found[-1].text == _ANY:
            continue
        regex = re.compile(fnmatch.translate(text)) if text != _ANY and glob.has_magic(text) else None
        found.append(_Part(text, regex, 1 + text.count("*")))
    return found


def _states(number: int, at: int, parts: Sequence[_Part]) -> tuple[_State, ...]:
    """Return the states of a pattern at part *at*, and at the next part too if part *at* may match no folder."""
    here = (number, at)
    return (here, (number, at + 1)) if parts[at].text == _ANY and at + 1 < len(parts) else (here,)


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG
