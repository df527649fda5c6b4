"""What of the changes that a guest tells of may be done on the host: pure, on names and digests only.

The net difference is judged: what a program made and removed again is nobody's business. An entry that may not be done
is left out, with what depends on it, and named; or, where all or nothing is asked for, it keeps the whole set back.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.channel.trees import can_hold_names
from x07_sandbox.errors import PeerError
from x07_sandbox.files.changes import STAGING, Change, Node, Refused, parent_folders, printable
from x07_sandbox.files.copy import DEPTH_MAX, FIELDS, NUMBER_MAX, link_stays_inside, value_for, why_left_out
from x07_sandbox.files.dependencies import with_dependents
from x07_sandbox.files.link_targets import OUT, Links

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from x07_sandbox.files.copy import Bounds, Reason, Skipped
    from x07_sandbox.files.incoming import ReportedEntry
    from x07_sandbox.files.protected import Protection

_SPECIAL_BITS: Final = 0o7000
_SPLITS_MAX: Final = 8
_Content = tuple[str, str, int, str]


class AllowedActions(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy allows to be done to folders and names.

    made: roots that are there for the program only; on the host they are made once they hold something.
    """

    mkdir: bool
    remove: bool
    rename: bool
    created: frozenset[str] = frozenset()


class CheckedChanges(msgspec.Struct, frozen=True, kw_only=True):
    """changes: those of a root. refused: every reason why one may not be done. All are sorted by name.

    left_out: changes that are not among the others, since they are refused or depend on one that is. is_whole: nothing
    could be left out, so that nothing may be done while anything is refused.
    What lies too deep, or is of no kind that a tree holds, is refused and no change. root_mode: which one the root, a
    folder, was given; on the host it keeps its own.
    """

    changes: tuple[Change, ...]
    refused: tuple[Refused, ...]
    root_mode: int | None = None
    left_out: tuple[Change, ...] = ()
    is_whole: bool = False


def judge(  # noqa: PLR0913 - the tree, what is told of it, and what is allowed
    before: Mapping[str, Node],
    skipped: Mapping[str, Skipped],
    reported: Iterable[ReportedEntry],
    bounds: Bounds,
    allowed: AllowedActions,
    protection: Protection,
    *,
    split: bool = False,
) -> CheckedChanges:
    """Judge what was told of one root. before: what was copied into it, by name from the root. stayed: what was not.

    split: leave out what is refused, with what depends on it, and judge the rest again.
    Raises PeerError where it contradicts itself, which an honest guest's never does.
    """
    near, refused = _near(reported, bounds.depth)
    after, others = _after(before, near)
    refused += others
    check = _Check(before, skipped, bounds, allowed, protection)
    changes, found = check(after)
    refused += found
    root = after.get("")
    moded = root is not None and root.kind == "folder" and not root.same(before.get(""))
    judged = CheckedChanges(
        changes=tuple(changes),
        refused=_sorted(refused),
        root_mode=root.mode if root is not None and moded else None,
    )
    return _split(judged, after, check) if split and refused else judged


def _split(judged: CheckedChanges, after: dict[str, Node], check: _Check) -> CheckedChanges:
    """Leave out what may not be done; as *judged* where the rest does not come to stand by itself."""
    refused = list(judged.refused)
    for _ in range(_SPLITS_MAX):
        left = with_dependents(judged.changes, {refusal.name for refusal in refused})
        rest, found = check(_reverted(after, check.before, left))
        if not found:
            out = tuple(change for change in judged.changes if change.name in left)
            return msgspec.structs.replace(judged, changes=tuple(rest), left_out=out, refused=_sorted(refused))
        refused += found
    return msgspec.structs.replace(judged, is_whole=True)


def _reverted(after: dict[str, Node], before: Mapping[str, Node], names: set[str]) -> dict[str, Node]:
    """What is to be there where *names* stay as they were."""
    found = {name: node for name, node in after.items() if name not in names or name in before}
    return found | {name: before[name] for name in names if name in before}


def _sorted(refused: Iterable[Refused]) -> tuple[Refused, ...]:
    return tuple(sorted(refused, key=lambda refusal: refusal.name))


class _Check:
    """Finds the changes that lead to a state of the tree, and every reason why one of them may not be done."""

    def __init__(
        self,
        before: Mapping[str, Node],
        skipped: Mapping[str, Skipped],
        bounds: Bounds,
        allowed: AllowedActions,
        protection: Protection,
    ) -> None:
        self.before = before
        self._stayed = skipped
        self._bounds = bounds
        self._allowed = allowed
        self._protection = protection

    def __call__(self, after: dict[str, Node]) -> tuple[list[Change], list[Refused]]:
        before, skipped, bounds, protection = self.before, self._stayed, self._bounds, self._protection
        if self._allowed.created:
            before, after = _without_made(before, after, self._allowed.created)
        changes = [
            Change(name=name, before=before.get(name), after=after.get(name))
            for name in sorted({*before, *after})
            if not _same(before.get(name), after.get(name)) and (name or not _is_folder(after.get(name)))
        ]
        moved = _moved(changes)
        links = Links(after, skipped)
        refused = [*_by_way_to_a_root(changes, before, skipped, bounds), *_by_place(changes, skipped, bounds)]
        for change in changes:
            refused += _by_name(change.name, bounds, protection)
            refused += _by_kind(change, bounds)
            refused += _by_way(change, links, skipped, bounds)
            refused += _by_deed(change, self._allowed, moved)
        told_of = {refusal.name for refusal in refused if refusal.rule == "protected"}
        written = [change.name for change in changes if change.after is not None]
        # One that was there is one, whatever is gone of it now, and what was not copied in counts.
        for name, why in protection.repositories({**before, **after, **skipped}, written).items():
            if name not in told_of:
                refused.append(_protected(name, why))
        return changes, refused


def _protected(name: str, why: str) -> Refused:
    return Refused(name=name, rule="protected", why=why, flag="--allow-protected")


def _is_folder(node: Node | None) -> bool:
    return node is not None and node.kind == "folder"


def _same(one: Node | None, other: Node | None) -> bool:
    return one is other or (one is not None and one.same(other))


def _near(reported: Iterable[ReportedEntry], most: int) -> tuple[list[ReportedEntry], list[Refused]]:
    """What lies no deeper than *most* parts; the rest is refused by its uppermost folder that does, and not judged."""
    near: list[ReportedEntry] = []
    deep: dict[str, int] = {}
    for one in reported:
        depth = one.name.count("/") + 1
        if depth <= most:
            near.append(one)
            continue
        top = "/".join(one.name.split("/", most + 1)[: most + 1])
        deep[top] = max(depth, deep.get(top, 0))
    why = "it lies too deep, with all that is below it"
    return near, [
        Refused(name=name, rule="fs.max_depth", why=why, value=depth if depth <= DEPTH_MAX else None)
        for name, depth in deep.items()
    ]


def _after(before: Mapping[str, Node], reported: Iterable[ReportedEntry]) -> tuple[dict[str, Node], list[Refused]]:
    """What is to be there, and what of it no tree can hold."""
    after = dict(before)
    refused: list[Refused] = []
    heard: set[str] = set()
    for one in reported:
        if one.name in heard and one.other is None:
            raise PeerError("bad changes", "something is told of twice")
        if not one.name:
            _check_root(one, before.get(""))
        heard.add(one.name)
        if one.other is not None:
            refused.append(Refused(name=one.name, rule="kind", why=_what(one.name, one.other)))
        elif one.node is not None:
            after[one.name] = one.node
        elif after.pop(one.name, None) is None:
            raise PeerError("bad changes", "what was never there is said to be gone")
    others = {refusal.name for refusal in refused}
    whole = after.get("")  # no node where the root itself was not there: it is made as a folder
    for name in after:
        above = name.rpartition("/")[0]
        is_folder = _is_folder(after.get(above)) or (not above and whole is None) or above in others
        if name and not is_folder:
            raise PeerError("bad changes", "something lies in what is no folder")
    return after, refused


def _without_made(
    before: Mapping[str, Node], after: dict[str, Node], created: frozenset[str]
) -> tuple[Mapping[str, Node], dict[str, Node]]:
    """Both without folders that were made for the program only; after: as far as nothing has come of them."""
    unused = {name for name in created - parent_folders(after) if _same(before[name], after.get(name))}
    return (
        {name: node for name, node in before.items() if name not in created},
        {name: node for name, node in after.items() if name not in unused},
    )


def _check_root(reported: ReportedEntry, before: Node | None) -> None:
    """The root itself is mounted where the program finds it: it stays, and stays what it is. Raises PeerError."""
    kind = before.kind if before else "folder"
    if reported.other is not None:
        # It was given extended attributes.
        same = stat.S_IFMT(reported.other) == (stat.S_IFREG if kind == "file" else stat.S_IFDIR)
    else:
        same = reported.node is not None and reported.node.kind == kind
    if not same:
        raise PeerError("bad changes", "a root is said to be gone, or to be something else now")


def _what(name: str, mode: int) -> str:
    kinds = {0o1: "a pipe", 0o2: "a character device", 0o6: "a block device", 0o14: "a socket"}
    kinds |= {0o4: "a folder with extended attributes", 0o10: "a file with extended attributes"}
    if stat.S_ISDIR(mode) and not can_hold_names(os.fsencode(name)):
        return "it is too deep to be named"
    return f"it is {kinds.get(mode >> 12, 'of no kind that a tree holds')}"


def _by_name(name: str, bounds: Bounds, protection: Protection) -> Iterator[Refused]:
    if why := protection.why(name):
        yield _protected(name, why)
    if bounds.deny_hidden and "/." in f"/{name}":
        why = "its name begins with a dot, and fs.deny_hidden is true"
        yield Refused(name=name, rule="fs.deny_hidden", why=why, value=False, flag="--allow-hidden")
    if protection.is_reserved(name):
        yield Refused(name=name, rule="reserved", why="x07 keeps its own records, or its cache, there")
    if f"/{STAGING}" in f"/{name}":
        yield Refused(name=name, rule="reserved", why=f"names that begin with {STAGING} are for what applies changes")


def _by_kind(change: Change, bounds: Bounds) -> Iterator[Refused]:
    name, node = change.name, change.after
    if node is None:
        return
    if node.kind == "link":
        if not link_stays_inside(name, node.target):
            yield Refused(name=name, rule="fs.allow_symlinks", why="it is a link that leads out of its root")
        elif not bounds.allow_symlinks:
            why = "it is a link, and fs.allow_symlinks is false"
            yield Refused(name=name, rule="fs.allow_symlinks", why=why, value=True, flag="--allow-symlinks")
        return
    if node.mode & _SPECIAL_BITS:
        yield Refused(name=name, rule="kind", why="it has a set-id or sticky bit")
    if node.kind == "file" and node.size > bounds.write_bytes:
        value = node.size if node.size <= NUMBER_MAX else None
        yield Refused(name=name, rule="fs.max_write_bytes", why="it is too large", value=value)


def _by_way(change: Change, links: Links, skipped: Mapping[str, Skipped], bounds: Bounds) -> Iterator[Refused]:
    """Of a link whose own target stays inside: what others make of it."""
    name, node = change.name, change.after
    if node is None or node.kind != "link" or not link_stays_inside(name, node.target):
        return
    through = links.through(name)
    if through in skipped:
        yield _by_stayed(
            name, f"it is a link that leads through {printable(through)}", through, skipped[through], bounds
        )
    elif through == OUT:
        why = "it is a link that leads out of its root, by way of another"
        yield Refused(name=name, rule="fs.allow_symlinks", why=why)
    elif through:
        yield Refused(name=name, rule="fs.allow_symlinks", why="it is a link that leads through too many others")


def _by_way_to_a_root(
    changes: Iterable[Change], before: Mapping[str, Node], skipped: Mapping[str, Skipped], bounds: Bounds
) -> Iterator[Refused]:
    """What is in a folder that stayed on the host, and is there only as the way to another root."""
    ways = [name for name in skipped if name in before]
    for change in changes if ways else ():
        for way in ways:
            if change.name == way or change.name.startswith(f"{way}/"):
                yield _by_stayed(change.name, f"it lies in {printable(way)}", way, skipped[way], bounds)


def _by_place(changes: Iterable[Change], skipped: Mapping[str, Skipped], bounds: Bounds) -> Iterator[Refused]:
    """What would be put where something lies that stayed on the host, or would take away a folder in which it does."""
    folders: set[str] = set()
    for change in changes:
        there = skipped.get(change.name)
        # By its name a hidden one is refused anyway.
        if there is not None and change.after is not None and there.reason != "hidden":
            yield _by_stayed(change.name, "something of that name is there", change.name, there, bounds)
        if _is_folder(change.before) and not _is_folder(change.after):
            folders.add(change.name)
    if not folders:
        return
    worst: dict[tuple[str, Reason], tuple[str, Skipped]] = {}
    for name, there in skipped.items():
        for folder in parent_folders([name]) & folders:
            held = worst.setdefault((folder, there.reason), (name, there))
            if held[1].most < there.most:
                worst[folder, there.reason] = name, there
    for (folder, _), (name, there) in worst.items():
        yield _by_stayed(folder, f"{printable(name)} is in it", name, there, bounds)


def _by_stayed(name: str, why: str, skipped: str, there: Skipped, bounds: Bounds) -> Refused:
    """*why* names what stayed on the host and lies in the way."""
    return Refused(
        name=name,
        rule=FIELDS[there.reason],
        why=f"{why}, which was not copied in: {why_left_out(there.reason, bounds)}",
        value=value_for(there.reason, there.most, bounds),
        reveal=skipped if there.reason in {"chosen", "secret"} else "",
    )


def _by_deed(change: Change, allowed: AllowedActions, moved: set[str]) -> Iterator[Refused]:
    name, before, after = change.name, change.before, change.after
    if _is_folder(after) and not _is_folder(before) and not allowed.mkdir and name not in allowed.created:
        yield Refused(name=name, rule="fs.allow_mkdir", why="it is a new folder", value=True)
    lost = before is not None and (after is None or after.kind != before.kind)
    if not lost:
        return
    # The one does not stand for the other: where things may be removed they may not for that be renamed.
    if name in moved:
        if not allowed.rename:
            yield Refused(name=name, rule="fs.allow_rename", why="it was given another name", value=True)
    elif not allowed.remove:
        yield Refused(name=name, rule="fs.allow_remove", why="it was removed", value=True)


def _moved(changes: Sequence[Change]) -> set[str]:
    """Names whose content is there under another that did not have it, each of these for one; folders whose all is."""
    held = parent_folders(change.name for change in changes if change.before is not None)
    holding = parent_folders(change.name for change in changes if change.after is not None)
    new: dict[_Content, int] = defaultdict(int)
    for change in changes:
        if _is_folder(change.before) and _is_folder(change.after):
            continue  # what lies in it need not be among the changes
        key = _content(change.after, empty=change.name not in holding)
        if key and key != _content(change.before, empty=change.name not in held):
            new[key] += 1
    moved: set[str] = set()
    folders: set[str] = set()
    lost: set[str] = set()
    for change in changes:
        if change.after is not None or change.before is None:
            continue
        key = _content(change.before, empty=change.name not in held)
        if key and new[key] > 0:
            new[key] -= 1
            moved.add(change.name)
        elif key:
            lost.add(change.name)
        else:
            folders.add(change.name)
    return moved | ((folders & parent_folders(moved)) - parent_folders(lost))


def _content(node: Node | None, *, empty: bool) -> _Content | None:
    """What makes it the same under another name. empty: whether nothing lies below it; None for a folder that holds."""
    if node is None or (node.kind == "folder" and not empty):
        return None
    return node.kind, node.sha256, node.size, node.target
