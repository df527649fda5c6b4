"""The rules for changes that a guest reports, without I/O. They compare the trees before and after the run."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from x07_sandbox.channel.trees import can_hold_names
from x07_sandbox.errors import PeerError, escaped
from x07_sandbox.files import copy
from x07_sandbox.files.changes import (
    DEPTH_MAX,
    STAGING,
    Change,
    Node,
    Refused,
    is_folder,
    parent_folders,
    renames,
    same_node,
    with_dependents,
)
from x07_sandbox.files.copy import Bounds, Reason, Skipped
from x07_sandbox.files.incoming import ReportedEntry
from x07_sandbox.files.protected import Protection
from x07_sandbox.host import settings
from x07_sandbox.options import size_text

_SPECIAL_BITS: Final = 0o7000
_SPLITS_MAX: Final = 8


class AllowedActions(msgspec.Struct, frozen=True, kw_only=True):
    """The actions on names that a policy allows. created: mount points made in the VM for missing roots."""

    mkdir: bool
    remove: bool
    rename: bool
    created: frozenset[str] = frozenset()


class CheckedChanges(msgspec.Struct, frozen=True, kw_only=True):
    """The changes of a root, and the reasons why some are forbidden. Each tuple is sorted by name.

    left_out: the refused changes and the changes that depend on them. They are not in *changes*.
    repositories: the folders that git treats as repositories, as folded names.
    is_whole: whether no change can be left out, so that nothing may be applied while anything is refused.
    Entries that are too deep or of an unknown kind are refused but are not listed as changes.
    """

    changes: tuple[Change, ...]
    refused: tuple[Refused, ...]
    left_out: tuple[Change, ...] = ()
    repositories: tuple[str, ...] = ()
    is_whole: bool = False


def check_changes(  # noqa: PLR0913 - the tree, the reported entries, and what is allowed
    before: Mapping[str, Node],
    skipped: Mapping[str, Skipped],
    reported: Iterable[ReportedEntry],
    bounds: Bounds,
    allowed: AllowedActions,
    protection: Protection,
    *,
    split: bool = False,
) -> CheckedChanges:
    """Check the entries that the guest reported for one root. Raises PeerError for an impossible report.

    before, skipped: the entries that were copied in and those that were not, by name.
    split: whether to leave out refused changes and those that depend on them, and then check the remaining ones again.
    """
    near, refused = _near(reported, bounds.depth)
    after, others = _after(before, near)
    refused += others
    check = _Check(before, skipped, bounds, allowed, protection)
    changes, found, repositories = check(after)
    refused += found
    checked = CheckedChanges(changes=tuple(changes), refused=_sorted(refused), repositories=tuple(sorted(repositories)))
    return _split(checked, after, check) if split and refused else checked


def _split(checked: CheckedChanges, after: dict[str, Node], check: _Check) -> CheckedChanges:
    refused = list(checked.refused)
    for _ in range(_SPLITS_MAX):
        left = with_dependents(checked.changes, {refusal.name for refusal in refused})
        before = check.before
        kept = {name: node for name, node in after.items() if name not in left}
        rest, found, _ = check(kept | {name: before[name] for name in left if name in before})
        if not found:
            out = tuple(change for change in checked.changes if change.name in left)
            return msgspec.structs.replace(checked, changes=tuple(rest), left_out=out, refused=_sorted(refused))
        refused += found
    return msgspec.structs.replace(checked, is_whole=True)


def _sorted(refused: Iterable[Refused]) -> tuple[Refused, ...]:
    return tuple(sorted(refused, key=lambda refusal: refusal.name))


class _Check(NamedTuple):
    before: Mapping[str, Node]
    skipped: Mapping[str, Skipped]
    bounds: Bounds
    allowed: AllowedActions
    protection: Protection

    def __call__(self, after: dict[str, Node]) -> tuple[list[Change], list[Refused], set[str]]:
        before, skipped, bounds, allowed, protection = self
        if allowed.created:
            before, after = _without_made(before, after, allowed.created)
        changes = [
            Change(name=name, before=before.get(name), after=after.get(name))
            for name in sorted({*before, *after})
            if not same_node(before.get(name), after.get(name)) and (name or not is_folder(after.get(name)))
        ]
        moved = _moved(changes)
        links = Links(after, skipped)
        refused = [*_by_way_to_a_root(changes, before, skipped, bounds), *_by_place(changes, skipped, bounds)]
        for change in changes:
            refused += _by_name(change.name, bounds, protection)
            refused += _by_kind(change, bounds)
            refused += _by_link(change, links, skipped, bounds)
            refused += _by_action(change, allowed, moved)
        protected = {refusal.name for refusal in refused if refusal.rule == "protected"}
        written = [change.name for change in changes if change.after is not None]
        # Removed parts of a repository count. Parts that were not copied in count too.
        repositories = protection.repositories({**before, **after, **skipped})
        for name, why in protection.refused_in(repositories, written).items():
            if name not in protected:
                refused.append(_protected(name, why))
        return changes, refused, repositories


def _protected(name: str, why: str) -> Refused:
    return Refused(name=name, rule="protected", why=why, flag="--allow-protected")


def _near(reported: Iterable[ReportedEntry], most: int) -> tuple[list[ReportedEntry], list[Refused]]:
    near: list[ReportedEntry] = []
    deep: dict[str, int] = {}
    for one in reported:
        depth = one.name.count("/") + 1
        if depth <= most:
            near.append(one)
            continue
        top = "/".join(one.name.split("/", most + 1)[: most + 1])
        deep[top] = max(depth, deep.get(top, 0))
    why = "deeper than fs.max_depth, like everything below it"
    return near, [
        Refused(name=name, rule="fs.max_depth", why=why, value=depth if depth <= DEPTH_MAX else None)
        for name, depth in deep.items()
    ]


def _after(before: Mapping[str, Node], reported: Iterable[ReportedEntry]) -> tuple[dict[str, Node], list[Refused]]:
    """Return the tree after the run, and refusals for entries that a tree cannot hold. Raises PeerError."""
    after = dict(before)
    refused: list[Refused] = []
    seen: set[str] = set()
    for one in reported:
        if one.name in seen and one.other is None:
            raise PeerError("bad changes", "an entry is reported twice")
        if not one.name:
            _check_root(one, before.get(""))
        seen.add(one.name)
        if one.other is not None:
            refused.append(Refused(name=one.name, rule="kind", why=_kind_of(one.name, one.other)))
        elif one.node is not None:
            after[one.name] = one.node
        elif after.pop(one.name, None) is None:
            raise PeerError("bad changes", "an entry that never existed is reported as removed")
    others = {refusal.name for refusal in refused}
    whole = after.get("")  # None for a missing root, which is created as a folder
    for name in after:
        above = name.rpartition("/")[0]
        if name and not (is_folder(after.get(above)) or (not above and whole is None) or above in others):
            raise PeerError("bad changes", "an entry lies in something that is not a folder")
    return after, refused


def _without_made(
    before: Mapping[str, Node], after: dict[str, Node], created: frozenset[str]
) -> tuple[Mapping[str, Node], dict[str, Node]]:
    """Return *before* without the folders *created* for the program, and *after* without the unused ones of them."""
    unused = {name for name in created - parent_folders(after) if same_node(before[name], after.get(name))}
    return (
        {name: node for name, node in before.items() if name not in created},
        {name: node for name, node in after.items() if name not in unused},
    )


def _check_root(reported: ReportedEntry, before: Node | None) -> None:
    kind = before.kind if before else "folder"
    if reported.other is not None:  # it was given extended attributes
        same = stat.S_IFMT(reported.other) == (stat.S_IFREG if kind == "file" else stat.S_IFDIR)
    else:
        same = reported.node is not None and reported.node.kind == kind
    if not same:
        raise PeerError("bad changes", "a root is reported as removed or of another kind")


def _kind_of(name: str, mode: int) -> str:
    kinds = {0o1: "a pipe", 0o2: "a character device", 0o6: "a block device", 0o14: "a socket"}
    kinds |= {0o4: "a folder with extended attributes", 0o10: "a file with extended attributes"}
    if stat.S_ISDIR(mode) and not can_hold_names(os.fsencode(name)):
        return "its path is too long"
    return kinds.get(mode >> 12, "of a kind that cannot be copied")


def _by_name(name: str, bounds: Bounds, protection: Protection) -> Iterator[Refused]:
    if why := protection.why(name):
        yield _protected(name, why)
    if bounds.deny_hidden and "/." in f"/{name}":
        why = "hidden name, and fs.deny_hidden is true"
        yield Refused(name=name, rule="fs.deny_hidden", why=why, value=False, flag="--allow-hidden")
    if protection.is_reserved(name):
        yield Refused(name=name, rule="reserved", why="x07 keeps its own records or its cache there")
    if f"/{STAGING}" in f"/{name}":
        yield Refused(name=name, rule="reserved", why=f"names that begin with {STAGING} are reserved for x07 apply")


def _by_kind(change: Change, bounds: Bounds) -> Iterator[Refused]:
    name, node = change.name, change.after
    if node is None:
        return
    if node.mode & _SPECIAL_BITS:
        yield Refused(name=name, rule="kind", why="set-id or sticky bit")
    if node.kind == "file" and not node.mode & 0o400:
        yield Refused(name=name, rule="kind", why="its owner could not read the file, so undo would fail")
    if node.kind == "file" and node.size > bounds.write_bytes:
        value = node.size if node.size <= min(copy.NUMBER_MAX, settings.CHANGES_MAX_BYTES) else None
        why = f"larger than {size_text(bounds.write_bytes)}, fs.max_write_bytes"
        yield Refused(name=name, rule="fs.max_write_bytes", why=why, value=value)
    elif node.kind == "file" and node.at is None:
        why = f"all changed files together are larger than {size_text(settings.CHANGES_MAX_BYTES)}"
        yield Refused(name=name, rule="fs.max_write_bytes", why=why)


def _by_link(change: Change, links: Links, skipped: Mapping[str, Skipped], bounds: Bounds) -> Iterator[Refused]:
    """Refuse a link that is not allowed, or whose target is outside the root, by its text or through other links."""
    name, node = change.name, change.after
    if node is None or node.kind != "link":
        return
    if not copy.link_stays_inside(name, node.target):
        yield Refused(name=name, rule="fs.allow_symlinks", why="symbolic link to a path outside the folder")
        return
    if not bounds.allow_symlinks:
        why = "symbolic link, and fs.allow_symlinks is false"
        yield Refused(name=name, rule="fs.allow_symlinks", why=why, value=True, flag="--allow-symlinks")
    through = links.through(name)
    if through in skipped:
        yield _by_skipped(name, f"symbolic link through {escaped(through)}", through, skipped[through], bounds)
    elif through == OUT:
        why = "symbolic link to a path outside the folder, through another link"
        yield Refused(name=name, rule="fs.allow_symlinks", why=why)
    elif through:
        yield Refused(name=name, rule="fs.allow_symlinks", why="symbolic link through too many other links")


def _by_way_to_a_root(
    changes: Iterable[Change], before: Mapping[str, Node], skipped: Mapping[str, Skipped], bounds: Bounds
) -> Iterator[Refused]:
    """Refuse changes in a skipped folder that exists in the VM only because another root is below it."""
    ways = [name for name in skipped if name in before]
    for change in changes if ways else ():
        for way in ways:
            if change.name == way or change.name.startswith(f"{way}/"):
                yield _by_skipped(change.name, f"inside {escaped(way)}", way, skipped[way], bounds)


def _by_place(changes: Iterable[Change], skipped: Mapping[str, Skipped], bounds: Bounds) -> Iterator[Refused]:
    """Refuse to replace an entry that was not copied in, and to remove a folder that contains one."""
    folders: set[str] = set()
    for change in changes:
        there = skipped.get(change.name)
        # A hidden entry is already refused because of its name.
        if there is not None and change.after is not None and there.reason != "hidden":
            yield _by_skipped(change.name, "replaces an existing entry", change.name, there, bounds)
        if is_folder(change.before) and not is_folder(change.after):
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
        yield _by_skipped(folder, f"contains {escaped(name)}", name, there, bounds)


def _by_skipped(name: str, why: str, skipped: str, there: Skipped, bounds: Bounds) -> Refused:
    return Refused(
        name=name,
        rule=copy.FIELDS[there.reason],
        why=f"{why}, which was not copied into the VM ({copy.why_left_out(there.reason, bounds)})",
        value=copy.value_for(there.reason, there.most, bounds),
        reveal=skipped if there.reason in {"chosen", "secret"} else "",
    )


def _by_action(change: Change, allowed: AllowedActions, moved: set[str]) -> Iterator[Refused]:
    name, before, after = change.name, change.before, change.after
    if is_folder(after) and not is_folder(before) and not allowed.mkdir and name not in allowed.created:
        yield Refused(name=name, rule="fs.allow_mkdir", why="new folder, and fs.allow_mkdir is false", value=True)
    lost = before is not None and (after is None or after.kind != before.kind)
    if not lost:
        return
    # fs.allow_remove does not imply fs.allow_rename.
    if name in moved:
        if not allowed.rename:
            yield Refused(name=name, rule="fs.allow_rename", why="renamed, and fs.allow_rename is false", value=True)
    elif not allowed.remove:
        yield Refused(name=name, rule="fs.allow_remove", why="removed, and fs.allow_remove is false", value=True)


def _moved(changes: Sequence[Change]) -> set[str]:
    """Return the removed names whose content now has another name, and removed folders with only such names."""
    removed = {change.name: change.before for change in changes if change.before is not None and change.after is None}
    moved = {name for name, _ in renames(changes) if name in removed}
    lost = {name for name, node in removed.items() if name not in moved and not is_folder(node)}
    return (moved | (removed.keys() & parent_folders(moved))) - parent_folders(lost)


OUT: Final = ".."  # stands for a target outside the tree
_NESTED_MAX: Final = 40  # path_resolution(7): the kernel follows no more


class Links:
    """The links of the tree *nodes*. skipped: names of further entries, whose content is unknown.

    Each link is resolved once, so the length of all targets limits the total cost.
    """

    def __init__(self, nodes: Mapping[str, Node], skipped: Container[str]) -> None:
        self._nodes = nodes
        self._skipped = skipped
        self._ends: dict[str, tuple[str | None, str]] = {}

    def through(self, name: str) -> str:
        """Return the skipped entry that the link *name* leads through or to, or "" if there is none.

        Return OUT if the path leaves the tree, even if it comes back; some other name if the path has too many links.
        """
        return self._end(name, 0)[1]

    def _end(self, name: str, nested: int) -> tuple[str | None, str]:
        """Return where a link ends (None for nowhere) and the value that through() returns for the link."""
        if nested > _NESTED_MAX:
            return None, name
        if name not in self._ends:
            self._ends[name] = None, ""  # seen again while it is being resolved: a loop ends nowhere
            self._ends[name] = self._follow(name, nested)
        return self._ends[name]

    def _follow(self, name: str, nested: int) -> tuple[str | None, str]:
        place: str | None = name.rpartition("/")[0]
        target = self._nodes[name].target
        if target.startswith("/") or not name:  # the target of a root itself is outside
            return None, OUT
        for part in target.split("/"):
            if part in {"", "."}:
                continue
            if part == "..":  # only at the start, where *place* is not behind a link
                if not place:
                    return None, OUT
                place = place.rpartition("/")[0]
                continue
            place = f"{place}/{part}" if place else part
            if place in self._skipped:
                return None, place
            node = self._nodes.get(place)
            if node is not None and node.kind == "link":
                place, why = self._end(place, nested + 1)
                if place is None:
                    return None, why
        return place, ""
