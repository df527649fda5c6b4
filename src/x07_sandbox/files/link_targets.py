"""Where the links of a tree lead, as far as the tree can tell: what stayed on the host may lead anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from x07_sandbox.files.changes import Node

OUT: Final = ".."  # in place of a name: out of the tree
_NESTED_MAX: Final = 40  # path_resolution(7): the kernel follows no more


class Links:
    """Those of one tree. nodes: all that is to be in it. stayed: names of what lies there too and is not known.

    Each is followed once, so that all of them cost as much as their targets are long.
    """

    def __init__(self, nodes: Mapping[str, Node], skipped: Container[str]) -> None:
        self._nodes = nodes
        self._stayed = skipped
        self._ends: dict[str, tuple[str | None, str]] = {}

    def through(self, name: str) -> str:
        """What of *stayed* the link *name* leads through or to, other links on its way followed; empty for nothing.

        OUT where the way leaves the tree, by way of a link that was there before, say, even if it would come back: what
        lies outside is not known. Another name where too many links lie on it.
        """
        return self._end(name, 0)[1]

    def _end(self, name: str, nested: int) -> tuple[str | None, str]:
        """Where it ends, None for nowhere; and through()."""
        if nested > _NESTED_MAX:
            return None, name
        if name not in self._ends:
            self._ends[name] = None, ""  # for whoever comes by it again on its own way: a circle ends nowhere
            self._ends[name] = self._follow(name, nested)
        return self._ends[name]

    def _follow(self, name: str, nested: int) -> tuple[str | None, str]:
        place: str | None = name.rpartition("/")[0]
        target = self._nodes[name].target
        if target.startswith("/") or not name:  # a root's own target lies beside it
            return None, OUT
        for part in target.split("/"):
            if part in {"", "."}:
                continue
            if part == "..":  # these stand first, where the place is no link's
                if not place:
                    return None, OUT
                place = place.rpartition("/")[0]
                continue
            place = f"{place}/{part}" if place else part
            if place in self._stayed:
                return None, place
            node = self._nodes.get(place)
            if node is not None and node.kind == "link":
                place, why = self._end(place, nested + 1)
                if place is None:
                    return None, why
        return place, ""
