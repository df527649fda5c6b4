"""All errors: what failed, why, and what to do.

Standard library only: the guest agent and the channel import this module too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing import Self


# Programs of commands with which a message may end.
_COMMANDS: Final = (
    *("apt-get", "chmod", "docker", "kill", "mkdir", "pip", "podman", "ps", "sysctl", "ulimit", "unshare", "usermod"),
)


def with_full_stop(text: str) -> str:
    """Return the text with a full stop, unless it ends with a command, which must stay ready to paste."""
    last = text.rpartition(": ")[2]
    pasted = last.partition(" ")[0] in _COMMANDS and ", or " not in last and " (" not in last
    return text if pasted or ": x07 " in text or text.endswith((".", "?")) else f"{text}."


def printable(text: str) -> str:
    r"""Return the text with unprintable characters escaped, such as \x1b, since file names may contain any character.

    Only line breaks before two blanks are kept, so that no file name can imitate a message of this tool.
    """
    return "\n  ".join(
        "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        for line in text.split("\n  ")
    )


class SandboxError(Exception):
    """Base of all errors raised on purpose. what, why, fix: what failed, why, and what to do, without a full stop."""

    # The run's Result, if there is one; typed Any, since this module imports no other.
    result: Any = None
    # The policy field that caused the error and a value that avoids it, or None if no value of a field would help.
    policy_cause: tuple[str, Any] | None = None
    # The text between the cause and the fix: a blank, or a line break and two blanks.
    before_fix: str = " "

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)  # all arguments, so that the error survives pickling
        self.what, self.why, self.fix = (printable(str(part)) for part in (what, why, fix))

    def caused_by(self, field: str, value: object) -> Self:
        """Set the policy field that caused the error, such as "fs.enabled", and a value that avoids it. Return self."""
        self.policy_cause = field, value
        return self

    def __str__(self) -> str:
        end = "" if self.why.endswith("?") or "\n" in self.why else "."  # no line of a list ends with a full stop
        return f"{self.what}: {self.why}{end}{self.before_fix}{with_full_stop(self.fix)}"


class UsageError(SandboxError):
    """The request is wrong: a flag, a variable, a missing program (exit 2)."""


class RefusedError(SandboxError):
    """Nothing was run, because the sandbox could not enforce what was requested (exit 125, outcome ``refused``)."""


class HostError(SandboxError):
    """The host lacks something that is required, or denies access to it."""


class ImageError(SandboxError):
    """A guest image is missing, damaged, or could not be built."""


class BackendError(SandboxError):
    """A virtual machine could not be started or stopped."""


class Cancelled(SandboxError):  # noqa: N818 - not an error
    """The user cancelled before the run started (exit 130 after Ctrl-C, else 143). signal: its number, 0 or None."""

    signal: int | None = None


class PeerError(SandboxError):
    """The peer violated the channel protocol."""

    def __init__(self, what: str, why: str, fix: str = "The connection can no longer be used") -> None:
        super().__init__(what, why, fix)


class ChannelUsageError(RuntimeError):
    """Our code used the channel out of order: a bug on this side."""
