"""Every error that a user can meet: what failed, why, and what to do about it.

Standard library only: the guest agent and the channel import this module too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self


def printable(text: str) -> str:
    r"""A text for people with all that does not print as escapes, such as \x1b: names of files may hold anything.

    A line of its own is only what is set in by two blanks, so that no name makes a line that looks like ours.
    """
    return "\n  ".join(
        "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        for line in text.split("\n  ")
    )


class SandboxError(Exception):
    """Base of all errors raised on purpose. Its texts can be printed anywhere, whatever names they hold.

    what: the thing that failed, without a full stop.
    why: the cause, without a full stop.
    fix: one sentence on what to do, without its full stop.
    """

    # The run's Result, where there is one. Not typed as such: this module knows nothing of the others.
    result: Any = None
    # Where a field of the policy is the cause: that field, and the value that would let it; None where none does.
    policy_cause: tuple[str, Any] | None = None

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)  # all arguments, so that the error survives pickling

    def caused_by(self, field: str, value: object) -> Self:
        """Itself, with the field of the policy that is the cause, like "fs.enabled"; value: as above."""
        self.policy_cause = field, value
        return self

    @property
    def what(self) -> str:
        """The thing that failed."""
        return printable(str(self.args[0]))

    @property
    def why(self) -> str:
        """The cause."""
        return printable(str(self.args[1]))

    @property
    def fix(self) -> str:
        """What to do."""
        return printable(str(self.args[2]))

    def __str__(self) -> str:
        end = "" if ": x07 " in self.fix else "."  # a command at the end can be pasted as it is
        return f"{self.what}: {self.why}{'' if self.why.endswith('?') else '.'} {self.fix}{end}"


class UsageError(SandboxError):
    """The request itself is wrong: a flag, a variable, a missing program (exit 2)."""


class RefusedError(SandboxError):
    """Nothing was run because a promise could not be kept (exit 125, outcome ``refused``)."""


class HostError(SandboxError):
    """The host lacks or denies something that the tool needs."""


class ImageError(SandboxError):
    """A guest image is missing, damaged, or could not be built."""


class BackendError(SandboxError):
    """A virtual machine could not be started or stopped."""


class Cancelled(SandboxError):  # noqa: N818 - it is no error of anybody
    """The user ended it before there was a run (exit 130 after Ctrl-C, else 143).

    signal: the one that asked for it; 0 or None for a request without one.
    """

    signal: int | None = None


class PeerError(SandboxError):
    """The other end of the channel broke the protocol: their fault, never ours."""

    def __init__(self, what: str, why: str, fix: str = "The connection is of no more use") -> None:
        super().__init__(what, why, fix)


class ChannelUsageError(RuntimeError):
    """Our own code used the channel out of order: a bug on this side."""
