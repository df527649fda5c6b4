"""Resolution of links within a tree. An entry that was not copied in may itself be a link to anywhere."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from x07_sandbox.files.changes import Node

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
