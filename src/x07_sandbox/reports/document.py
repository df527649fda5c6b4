"""The result as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from x07_sandbox.runs.result import Result


def render_json(result: Result) -> bytes:
    """One JSON object and a line end."""
    # ASCII only: everything else, control characters of a guest's text above all, is escaped, also on a terminal.
    return json.dumps(msgspec.to_builtins(result), indent=2).encode("ascii") + b"\n"
