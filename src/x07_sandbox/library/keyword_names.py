"""What errors and reasons call the flags of `x07 run`, for callers from Python: by the keyword of `run_program`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from x07_sandbox.errors import SandboxError

_KEYWORDS: Final = {
    "--allow-hidden": "allow_hidden",
    "--allow-symlinks": "allow_symlinks",
    "--build-timeout": "build_timeout_s",
    "--changes": "changes",
    "--cpu-time": "cpu_s",
    "--env": "env",
    "--fds": "fds",
    "--image": "image",
    "--input": "input",
    "--max-output-bytes": "max_output_bytes",
    "--memory": "memory",
    "--out": "out",
    "--policy": "policy",
    "--procs": "procs",
    "--sandbox-backend vm": "X07_SANDBOX_BACKEND=vm",
    "--timeout": "timeout_s",
    "--toolchain": "toolchain",
    "--workdir": "workdir",
    "-c": "source",
}
_FLAG: Final = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, _KEYWORDS))})(?![\w-])(?: ([0-9][0-9.]*)\b)?")
_COMMAND: Final = re.compile(r"\bx07 [^.,;()]*$")  # a command to be typed keeps its flags


def in_python(text: str) -> str:
    """The text with keywords of `run_program` in place of flags."""
    if "-" not in text:
        return text

    def keyword(found: re.Match[str]) -> str:
        if _COMMAND.search(text[: found.start()]):
            return found[0]
        return f"{_KEYWORDS[found[1]]}={found[2]}" if found[2] else _KEYWORDS[found[1]]

    return _FLAG.sub(keyword, text)


def reword(error: SandboxError) -> None:
    """Have an error, in its three texts, name keywords."""
    error.args = tuple(in_python(part) if isinstance(part, str) else part for part in error.args)
