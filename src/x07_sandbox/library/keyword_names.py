"""The names of options for callers from Python: keyword arguments of `run_program` instead of flags of `x07 run`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

from x07_sandbox.options import BY_FLAG

if TYPE_CHECKING:
    from x07_sandbox.errors import Flag

# Options of `apply`, whose values are lists of patterns, quoted for a shell.
_LISTS: Final = {"--allow-protected": "allow_protected", "--only": "only", "--skip": "skip"}
_NUMBERS: Final = {"seconds", "number"}


def keyword(flag: Flag) -> str:
    """Return the keyword for a flag: `--memory 1G` becomes `memory="1G"`. A flag without a keyword stays."""
    name, _, value = flag.partition(" ")
    if name == "--sandbox-backend":  # Python callers select the backend by a variable
        return f"X07_SANDBOX_BACKEND={value}"
    if name in _LISTS:
        return f"{_LISTS[name]}={json.dumps(shlex.split(value))}" if value else _LISTS[name]
    row = BY_FLAG.get(name)
    if row is None or not row.keyword:
        return flag
    if not value:
        return row.keyword
    shown = value if row.kind in _NUMBERS else json.dumps([value] if row.repeats else value)
    return f"{row.keyword}={shown}"
