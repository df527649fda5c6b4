"""Sandboxes for other frameworks. Each module needs the package of its framework, and is imported only by its users."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from x07_sandbox import Ended, SandboxError

BAD_COMMAND = 126
"""The exit code for a command that cannot be started, as a shell has it for one that the kernel cannot execute."""


def was_stopped(ended: Ended) -> bool:
    """Return whether something else than the command itself decided its end, such as a timeout or the memory limit."""
    return ended.reason_code not in {"exited", "signal"}


def errors_of(ended: Ended) -> str:
    """Return standard error as text, and the reason if something else than the command itself decided its end."""
    text = ended.stderr.decode(errors="replace")
    return f"{text}{ended.reason}\n" if was_stopped(ended) else text


def require_usage(error: SandboxError) -> None:
    """Raise *error* again unless it is about the command, such as a text that is too long, which a model may write."""
    if error.code != "usage":
        raise error
