"""Which files of a project its patterns name: one walk for all patterns, bounded, and round no loop of links."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from x07_sandbox.host.project import ProjectFolder

ENTRIES_MAX: Final = 50_000
# A name held against a star of a pattern. This many take about a second.
_STEPS_MAX: Final = 1_000_000
_DEPTH_MAX: Final = 512
_ANY: Final = "**"

_State = tuple[int, int]  # the number of a pattern, and of its part that a name in this folder has to match


class _Part(NamedTuple):
    """What stands between two slashes. regex: None for a plain name and for `**`. cost: of a match, in steps."""

    text: str
    regex: re.Pattern[str] | None
    cost: int

    def matches(self, name: str) -> bool:
        """Whether a name is one that it stands for."""
        if self.regex is None and self.text != _ANY:
            return name == self.text
        if name.startswith(".") and not self.text.startswith("."):
            return False
        return self.regex is None or self.regex.match(name) is not None


class Walk:
    """The walk through *folder*, by *patterns* (glob(7), and `**` for any folders).

    Hidden names are matched only by parts that begin with a dot. check: called again and again, raises to end it.
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
        self._passed_by = ""

    def files(self) -> Iterator[str]:
        """Names of what is no folder, each once, in no order.

        Raises UsageError: for a pattern that names nothing, since a build would miss it later; past a bound.
        """
        waiting: list[tuple[str, set[_State], tuple[tuple[int, int], ...]]] = []
        waiting.append(("", {state for states in self._states for state in states[0]}, ()))
        while waiting:
            self._check()
            name, states, above = waiting.pop()
            if len(above) >= _DEPTH_MAX:
                raise self._folder.refused(f"{name[:64]}... lies too deep", "Take it out of the project")
            with self._folder.look(name or ".", name or "the folder itself") as (fd, info):
                key = info.st_dev, info.st_ino
                # A folder that a link shows inside itself holds nothing new. Shown elsewhere it is walked once more.
                found = [] if key in above or not stat.S_ISDIR(info.st_mode) else self._found(fd, name, states)
            below = (*above, key)
            waiting.extend((inner, left, below) for inner, _, left in found if left)
            yield from (inner for inner, is_file, _ in found if is_file)
        for number, pattern in enumerate(self._patterns):
            if number not in self._matched:
                why = f"no file matches {pattern!r}{self._passed_by}"
                raise self._folder.refused(why, "Correct `files` in its manifest")

    def _found(self, fd: int, folder: str, states: set[_State]) -> list[tuple[str, bool, set[_State]]]:
        """What counts in a folder: its name, whether it is a file that was named, the states for what is below it."""
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
                self._matched.add(number)  # `**` stands for no folder too
        found = []
        for part_name, kind in self._listed(fd, folder, None if others else plain):
            matched, inner = self._step(part_name, (*others, *plain.get(part_name, ())))
            if not matched and not inner:
                continue
            name = f"{folder}/{part_name}" if folder else part_name
            behind = self._behind(name, told=bool(matched)) if kind == stat.S_IFLNK else kind
            self._matched |= matched
            is_folder = behind == stat.S_IFDIR
            found.append((name, bool(matched) and not is_folder, inner if is_folder else set()))
        return found

    def _listed(self, fd: int, folder: str, plain: Iterable[str] | None) -> Iterator[tuple[str, int]]:
        """Names in a folder, and the type of each, a link itself. plain: look for these alone."""
        try:
            if plain is None:
                inner = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    with os.scandir(inner) as entries:
                        for entry in entries:
                            self._count()
                            yield entry.name, _kind(entry)
                finally:
                    os.close(inner)
                return
            for name in plain:
                self._count()
                try:
                    yield name, stat.S_IFMT(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
                except (FileNotFoundError, ValueError):
                    continue
        except OSError as exc:
            why = f"{folder or 'the folder itself'}: {exc.strerror or exc}"
            raise self._folder.refused(why, "Make it readable, or take it out of the project") from exc

    def _step(self, name: str, states: Sequence[_State]) -> tuple[set[int], set[_State]]:
        """The patterns that a name completes, and the states for what is below it."""
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
            why = "its patterns are too many, or have too many stars, for so many names"
            raise self._folder.refused(why, "Name its files by fewer and simpler patterns")
        return matched, inner

    def _behind(self, name: str, *, told: bool) -> int:
        """The type of what a link leads to. told: whoever reads it says what is wrong with it."""
        try:
            with self._folder.look(name) as (_, info):
                return stat.S_IFMT(info.st_mode)
        except UsageError as exc:
            if not told:
                self._passed_by = f"; {exc.why}"
            return stat.S_IFLNK

    def _count(self) -> None:
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            why = f"its files are looked for among more than {ENTRIES_MAX} names"
            raise self._folder.refused(why, "Take out what does not belong to it, or name files without '**'")


def _parts(pattern: str) -> list[_Part]:
    found: list[_Part] = []
    texts = [text for text in pattern.split("/") if text not in {"", "."}]
    if pattern.endswith(("/", "/.")) or not texts:
        texts.append("")  # which no file is called
    for text in texts:
        if text == _ANY and found and found[-1].text == _ANY:
            continue
        regex = re.compile(fnmatch.translate(text)) if text != _ANY and glob.has_magic(text) else None
        found.append(_Part(text, regex, 1 + text.count("*")))
    return found


def _states(number: int, at: int, parts: Sequence[_Part]) -> tuple[_State, ...]:
    """Where a pattern is that has come to a part: at that, and at the next where the part stands for no folder too."""
    here = (number, at)
    return (here, (number, at + 1)) if parts[at].text == _ANY and at + 1 < len(parts) else (here,)


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG
