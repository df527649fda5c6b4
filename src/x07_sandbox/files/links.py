"""Where the links of a tree lead, as far as the tree can tell: what stayed on the host may lead anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from x07_sandbox.files.changes import Node

_NESTED_MAX: Final = 40  # path_resolution(7): the kernel follows no more


class Links:
    """Those of one tree. nodes: all that is to be in it. stayed: names of what lies there too and is not known.

    Each is followed once, so that all of them cost as much as their targets are long.
    """

    def __init__(self, nodes: Mapping[str, Node], stayed: Container[str]) -> None:
        self._nodes = nodes
        self._stayed = stayed
        self._ends: dict[str, tuple[str | None, str]] = {}

    def through(self, name: str) -> str:
        """What of *stayed* the link *name* leads through or to, other links on its way followed; empty for nothing.

        Another name where too many links lie on the way. The targets are such that stays_inside() holds, or are
        refused for that.
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
        for part in self._nodes[name].target.split("/"):
            if part in {"", "."}:
                continue
            if part == "..":  # these stand first, where the place is no link's
                place = place.rpartition("/")[0] if place else place
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
