"""How every document of ours is written as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from typing import Any


def render_json(document: msgspec.Struct) -> bytes:
    """One JSON object over several lines, and a line end."""
    # ASCII only: everything else, control characters of a guest's text above all, is escaped, also on a terminal.
    return json.dumps(plain(document), indent=2).encode("ascii") + b"\n"


def plain(document: msgspec.Struct) -> Any:  # noqa: ANN401 - what json takes
    """Its content; what is no Unicode in a name is spelt out.

    Not every reader of JSON makes a text of half a surrogate pair, and some then read none of the document.
    """
    return _spelt(msgspec.to_builtins(document))


def _spelt(value: object) -> object:
    if isinstance(value, dict):
        return {key: _spelt(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(inner) for inner in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
