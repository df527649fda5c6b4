"""Change sets as patches in git's extended unified format. The work is limited, because the new content is hostile."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from x07_sandbox.errors import escaped

if TYPE_CHECKING:
    from x07_sandbox.files.changes import Change, ChangeSet, Node, RootChanges

    _Code = tuple[Literal["replace", "delete", "insert", "equal"], int, int, int, int]
    Content = Callable[[str, str, Node], bytes | None]  # of a node, given its root and name; None if it is missing

TEXT_MAX: Final = 1 << 20
_COMPARED_MAX: Final = 1500  # lines of either side
# Limits for visited pairs of equal lines, in all files and in one. Repeated lines cause millions of pairs, and difflib
# visits them again for each block, which took minutes. 10 million take a second.
PAIRS_MAX: Final = 20_000_000
_PAIRS_OF_ONE_MAX: Final = 5_000_000
_CONTEXT: Final = 3
_PLAIN: Final = re.compile(rb"[\x20-\x21\x23-\x5b\x5d-\x7e]+")
_SHORT: Final = 12  # digits of a commit
_MODES: Final = {"file": 0o100000, "link": 0o120000}


def patch(changes: ChangeSet, before: Content, after: Content) -> Iterator[bytes]:
    """Yield the patch root by root, deletions first, left-out changes last. before, after: the old and new contents."""
    yield from _commits(changes)
    work = Work(PAIRS_MAX)
    for root in changes.roots:
        if not (root.changes or root.left_out or root.refused):
            continue
        yield b"# in " + _quoted(os.fsencode(root.root)) + b"\n"
        word = b"not allowed" if changes.all_or_nothing else b"left out"
        refused = _refused(root)
        depends = dict.fromkeys((change.name for change in root.left_out), "depends on a change that is left out")
        every = [*sorted(root.changes, key=_deletions_first), *sorted(root.left_out, key=_deletions_first)]
        for change in every:
            why = refused.get(change.name) or depends.get(change.name)
            if why:
                yield _note(word, root.root, change.name, _quoted(why.encode()))
            yield from _one(root.root, change, before, after, work)
        for name in sorted(set(refused) - {change.name for change in every}):
            yield _note(word, root.root, name, refused[name].encode())


def _refused(root: RootChanges) -> dict[str, str]:
    """Return why each name was refused."""
    refused: dict[str, str] = {}
    for refusal in root.refused:
        refused[refusal.name] = "; ".join(filter(None, (refused.get(refusal.name), refusal.why)))
    return refused


def summarize(changes: ChangeSet, before: Content, after: Content) -> Iterator[bytes]:
    """Yield a line for each change. A new or deleted folder and its contents share one line."""
    yield from _commits(changes)
    work = Work(PAIRS_MAX)
    for root in changes.roots:
        yield b"# in " + _quoted(os.fsencode(root.root)) + b"\n"
        left_out = {change.name for change in root.left_out}
        groups: dict[tuple[str, str, bool], list[Change]] = {}
        for change in sorted((*root.changes, *root.left_out), key=lambda change: change.name):
            kind = change.action, change.name in left_out
            tops = (change.name[:at] for at, char in enumerate(change.name) if char == "/")
            top = next((top for top in tops if kind[0] != "changed" and (top, *kind) in groups), change.name)
            groups.setdefault((top, *kind), []).append(change)
        for (name, action, is_out), group in groups.items():
            nodes = [node for change in group if (node := change.after or change.before)]
            detail = f"{sum(node.size for node in nodes)} bytes"
            if nodes[0].kind == "folder":
                detail = f"{sum(node.kind != 'folder' for node in nodes)} files, {detail}"
            elif body := list(
                itertools.dropwhile(lambda line: line[:2] != b"@@", _one(root.root, group[0], before, after, work))
            ):
                detail = "+{} -{}".format(*(sum(line.startswith(sign) for line in body) for sign in (b"+", b"-")))
            words = f"{action}{' (left out)' if is_out else ''}: "
            yield words.encode() + _quoted(os.fsencode(name or root.root)) + f" ({detail})\n".encode()
        refused = _refused(root)
        for name in sorted(refused.keys() - {change.name for change in (*root.changes, *root.left_out)}):
            yield b"left out: %b (%b)\n" % (_quoted(os.fsencode(name or root.root)), _quoted(refused[name].encode()))


def _commits(changes: ChangeSet) -> Iterator[bytes]:
    """Yield a line for each branch with new commits, and for each of these."""
    found = changes.commits
    if found is None:
        return
    lines = [f"commits left out: {name} ({why})" for name, why in found.left_out.items()]
    lines += [f"branch {name}: {oid}" for name, oid in found.branches.items()]
    lines += [f"commit {one.id[:_SHORT]} on {one.branch}: {one.subject} ({one.author})" for one in found.listed]
    lines += [f"{more} more commits"] if (more := found.count - len(found.listed)) else []
    for line in lines:
        yield f"# {escaped(line)}\n".encode()


def _deletions_first(change: Change) -> bool:
    return change.action != "deleted"


def _note(word: bytes, root: str, name: str, why: bytes) -> bytes:
    return b"# " + word + b": " + _quoted(os.fsencode(name or root)) + b" (" + why + b")\n"


def _one(root: str, change: Change, before: Content, after: Content, work: Work) -> Iterator[bytes]:
    """Yield the patch for one name. Folders become comments, because git would create files for them."""
    old, new = change.before, change.after
    if old is not None and new is not None and old.kind != new.kind:
        for part in (msgspec.structs.replace(change, after=None), msgspec.structs.replace(change, before=None)):
            yield from _one(root, part, before, after, work)
        return
    name = os.fsencode(change.name) or os.fsencode(Path(root).name)
    if "folder" in {old and old.kind, new and new.kind}:
        words = b"new folder" if old is None else b"folder removed" if new is None else b"folder"
        yield b"# " + words + b": " + _quoted(name) + _modes(old, new) + b"\n"
        return
    texts = [_text(root, change.name, old, before), _text(root, change.name, new, after)]
    if None in texts:
        yield b"# " + _quoted(name) + b": " + _summary(old, new) + _modes(old, new) + b"\n"
        return
    head = _head(old, new)
    if not head and (modes := _modes(old, new)):
        yield b"# " + _quoted(name) + modes + b"\n"
    one, two = _quoted(b"a/" + name), _quoted(b"b/" + name)
    if head or texts[0] != texts[1]:
        yield b"diff --git " + one + b" " + two + b"\n" + head
    if texts[0] != texts[1]:
        yield b"--- " + (one if old is not None else b"/dev/null") + b"\n"
        yield b"+++ " + (two if new is not None else b"/dev/null") + b"\n"
        yield from hunks(texts[0] or b"", texts[1] or b"", work)


def _text(root: str, name: str, node: Node | None, content: Content) -> bytes | None:
    if node is None:
        return b""
    data = os.fsencode(node.target) if node.kind == "link" else content(root, name, node)
    return None if data is None or len(data) > TEXT_MAX or b"\0" in data else data


def _head(old: Node | None, new: Node | None) -> bytes:
    if old is None:
        return b"new file mode %06o\n" % _mode(new) if new is not None else b""
    if new is None:
        return b"deleted file mode %06o\n" % _mode(old)
    return b"old mode %06o\nnew mode %06o\n" % (_mode(old), _mode(new)) if _mode(old) != _mode(new) else b""


def _modes(old: Node | None, new: Node | None) -> bytes:
    if old is None or new is None or old.mode == new.mode:
        return b""
    return b", mode %04o -> %04o" % (old.mode, new.mode)


def _summary(old: Node | None, new: Node | None) -> bytes:
    sides = [
        "nothing"
        if node is None
        else f"{node.size} bytes, sha256 {node.sha256 or 'unknown'}"
        if node.kind == "file"
        else node.kind
        for node in (old, new)
    ]
    return f"not shown, {sides[0]} -> {sides[1]}".encode()


def _mode(node: Node) -> int:
    # Git stores only whether the owner may execute a file.
    if node.kind == "file":
        return _MODES["file"] | (0o755 if node.mode & 0o100 else 0o644)
    return _MODES[node.kind]


class Work:
    """The remaining budget for comparing files. left: how many more pairs of equal lines may be visited."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Bounded(difflib.SequenceMatcher[bytes]):
    """Matcher that stops once the budget is used up. The remaining lines then form one replaced block."""

    def __init__(self, one: list[bytes], two: list[bytes], work: Work) -> None:
        super().__init__(None, one, two, autojunk=False)
        self._work = work
        self._least = work.left - _PAIRS_OF_ONE_MAX
        times = Counter(two)
        pairs = (1 + times[line] for line in one)
        self._pairs = list(itertools.accumulate(pairs, initial=0))  # the pairs of all lines before each line

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        left = self._work.left - self._pairs[-1 if ahi is None else ahi] + self._pairs[alo]
        if left < max(0, self._least):
            return difflib.Match(alo, blo, 0)
        self._work.left = left
        return super().find_longest_match(alo, ahi, blo, bhi)


class _Compared(difflib.SequenceMatcher[bytes]):
    """Matcher whose opcodes are known already, to be grouped."""

    def __init__(self, codes: list[_Code]) -> None:
        super().__init__(None, (), ())
        self._codes = codes

    def get_opcodes(self) -> list[_Code]:
        return self._codes


def hunks(old: bytes, new: bytes, work: Work) -> Iterator[bytes]:
    """Yield the hunks of a unified diff. work: the budget, which every compared pair of lines reduces."""
    one, two = _lines(old), _lines(new)
    start = 0
    while start < min(len(one), len(two)) and one[start] == two[start]:
        start += 1
    end = 0
    while end < min(len(one), len(two)) - start and one[-1 - end] == two[-1 - end]:
        end += 1
    middle = one[start : len(one) - end], two[start : len(two) - end]
    codes: list[_Code] = [("replace", 0, len(middle[0]), 0, len(middle[1]))]
    if max(map(len, middle)) <= _COMPARED_MAX:
        codes = _Bounded(*middle, work).get_opcodes()
    codes = [(tag, a + start, b + start, c + start, d + start) for tag, a, b, c, d in codes]
    if codes:
        codes = [
            ("equal", 0, start, 0, start),
            *codes,
            ("equal", len(one) - end, len(one), len(two) - end, len(two)),
        ]
    for group in _Compared(codes).get_grouped_opcodes(_CONTEXT):
        yield from _hunk(one, two, group)


def _lines(data: bytes) -> list[bytes]:
    """Return the lines of *data* with their line ends. Unlike in bytes.splitlines, only a line feed ends a line."""
    found = [line + b"\n" for line in data.split(b"\n")]
    last = found.pop().removesuffix(b"\n")
    return [*found, last] if last else found


def _hunk(one: list[bytes], two: list[bytes], group: Sequence[tuple[str, int, int, int, int]]) -> Iterator[bytes]:
    (_, old_from, _, new_from, _), (_, _, old_to, _, new_to) = group[0], group[-1]
    yield b"@@ -%s +%s @@\n" % (_range(old_from, old_to - old_from), _range(new_from, new_to - new_from))
    for tag, a, b, c, d in group:
        lines = [b" " + line for line in one[a:b]]
        if tag != "equal":
            lines = [*(b"-" + line for line in one[a:b]), *(b"+" + line for line in two[c:d])]
        for line in lines:
            yield line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"


def _range(start: int, size: int) -> bytes:
    if size == 1:
        return b"%d" % (start + 1)
    return b"%d,%d" % (start + 1 if size else start, size)


def _quoted(name: bytes) -> bytes:
    if _PLAIN.fullmatch(name):
        return name
    return b'"' + b"".join(map(_escaped, name)) + b'"'


def _escaped(byte: int) -> bytes:
    if (at := b'\a\b\t\n\v\f\r"\\'.find(byte)) >= 0:
        return b"\\" + b'abtnvfr"\\'[at : at + 1]
    return bytes([byte]) if b" "[0] <= byte <= b"~"[0] else b"\\%03o" % byte
