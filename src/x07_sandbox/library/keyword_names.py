"""Replace flags of `x07 run` in error messages by keyword arguments of `run_program`, for callers from Python."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from x07_sandbox.options import OPTIONS

if TYPE_CHECKING:
    from x07_sandbox.errors import SandboxError

KEYWORDS: Final = {
    **{row.flag: row.keyword for row in OPTIONS if row.flag and row.keyword},
    "--allow-protected": "allow_protected",
    "--only": "only",
    "--sandbox-backend vm": "X07_SANDBOX_BACKEND=vm",
    "--skip": "skip",
}
_FLAG: Final = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, KEYWORDS))})(?![\w-])(?: ([0-9][0-9.]*[KMG]?)\b)?")
_COMMAND: Final = re.compile(r"\bx07 [^.,;()]*$")  # in a command line, flags stay


def in_python(text: str) -> str:
    """Return the text with keyword arguments instead of flags: `--memory 1G` becomes `memory="1G"`."""
    if "-" not in text:
        return text

    def keyword(found: re.Match[str]) -> str:
        if _COMMAND.search(text[: found.start()]):
            return found[0]
        value = found[2] if not found[2] or found[2][-1].isdigit() else f'"{found[2]}"'
        return f"{KEYWORDS[found[1]]}={value}" if value else KEYWORDS[found[1]]

    return _FLAG.sub(keyword, text)


def reword(error: SandboxError) -> None:
    """Replace flags in the texts of an error by keyword arguments."""
    error.args = tuple(in_python(part) if isinstance(part, str) else part for part in error.args)
    error.what, error.why, error.fix = map(in_python, (error.what, error.why, error.fix))
