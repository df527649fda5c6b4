"""All errors: what failed, why, and what to do.

Standard library only: the guest agent and the channel import this module too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self


class Flag(str):
    """A flag of the command line in a message, with its value, if any: "--memory 1G". Python callers see a keyword."""

    __slots__ = ()


class Command(str):
    """A command or setting to paste. No full stop follows if a message ends with it."""

    __slots__ = ()


Text = str | tuple[str, ...]
"""A message, or its parts in order: plain words, flags and commands."""


def worded(text: Text, word: Callable[[Flag], str] = str) -> str:
    """Return a message as one string. word: returns the name of an option, for the reader."""
    parts = (text,) if isinstance(text, str) else text
    return "".join(word(part) if isinstance(part, Flag) else part for part in parts)


def listed(parts: Sequence[str], between: str) -> tuple[str, ...]:
    """Return the parts of a list in a message. between: the words between two items."""
    return tuple(word for part in parts for word in (between, part))[1:]


# Characters that str.isprintable() counts, and that show nothing: variation selectors, joiners and blank letters. Text
# can be hidden in them.
_BLANK: Final = frozenset(
    map(
        chr,
        (
            *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *range(0x180B, 0x1810),
            *range(0xFE00, 0xFE10),
            *range(0xE0100, 0xE01F0),
        ),
    )
)


def is_visible(text: str) -> bool:
    """Return whether every character of the text can be seen, or is an ordinary blank."""
    return text.isprintable() and _BLANK.isdisjoint(text)


def escaped(text: str, kept: str = "") -> str:
    r"""Return the text with characters that cannot be seen escaped, such as \x1b. kept: such characters that stay.

    All text that a guest chose passes through this function before it is printed. A byte that is not UTF-8, which
    os.fsdecode turns into a lone surrogate, becomes \x9b.
    """
    return "".join(char if is_visible(char) or char in kept else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    r"""Return the text with unprintable characters escaped, such as \x1b, since file names may contain any character.

    Only line breaks before two blanks are kept, so that no file name can imitate a message of this tool.
    """
    return "\n  ".join(map(escaped, text.split("\n  ")))


class SandboxError(Exception):
    """Base of all errors raised on purpose. what, why, fix: what failed, why, and what to do, without a full stop.

    code: the kind of error, for programs (docs/reference/codes.md).
    """

    code: str = "error"
    # The run's Result, if there is one; typed Any, since this module imports no other.
    result: Any = None
    # The policy field that caused the error and a value that avoids it, or None if no value of a field would help.
    policy_cause: tuple[str, Any] | None = None
    # The text between the cause and the fix: a blank, or a line break and two blanks.
    before_fix: str = " "
    # The full stop after the fix; empty after a command to paste.
    stop: str = "."

    def __init__(self, what: Text, why: Text, fix: Text, *, code: str = "") -> None:
        super().__init__(what, why, fix)  # all arguments, so that the error survives pickling
        if code:
            self.code = code
        last = fix[-1] if isinstance(fix, tuple) else fix
        if isinstance(last, Command) or last.endswith(("?", ".")):
            self.stop = ""
        self.word_for(str)

    def word_for(self, word: Callable[[Flag], str]) -> None:
        """Set the texts as a reader knows the options. word: see `worded`."""
        self.what, self.why, self.fix = (printable(worded(part, word)) for part in self.args)

    def caused_by(self, field: str, value: object) -> Self:
        """Set the policy field that caused the error, such as "fs.enabled", and a value that avoids it. Return self."""
        self.policy_cause = field, value
        return self

    @property
    def sentence(self) -> str:
        """The whole message, without a full stop at its end."""
        end = "" if self.why.endswith("?") or "\n" in self.why else "."  # no line of a list ends with a full stop
        return f"{self.what}: {self.why}{end}{self.before_fix}{self.fix}"

    def __str__(self) -> str:
        return f"{self.sentence}{self.stop}"


class UsageError(SandboxError):
    """The request is wrong: a flag, a variable, a missing program (exit 2)."""

    code = "usage"


class ArgumentError(UsageError):
    """An argument of a call from Python has a wrong type or value."""

    code = "bad-argument"


def whole_number(value: object, error: SandboxError, least: float = -math.inf, most: float = math.inf) -> int:
    """Return *value* if it is an int from *least* to *most*, and no bool. Raises *error*."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise error
    return value


class RefusedError(SandboxError):
    """Nothing was run, because the sandbox could not enforce what was requested (exit 125, outcome ``refused``)."""

    code = "refused"


class HostError(SandboxError):
    """The host lacks something that is required, or denies access to it."""

    code = "host"


class ImageError(SandboxError):
    """A guest image is missing, damaged, or could not be built."""

    code = "image"


class BackendError(SandboxError):
    """A virtual machine could not be started or stopped."""

    code = "backend"


class Cancelled(SandboxError):  # noqa: N818 - not an error
    """The user cancelled before the run started (exit 130 after Ctrl-C, else 143). signal: its number, 0 or None."""

    code = "cancelled"
    signal: int | None = None


class PeerError(SandboxError):
    """The peer violated the channel protocol."""

    code = "protocol"

    def __init__(self, what: str, why: str, fix: str = "The connection can no longer be used") -> None:
        super().__init__(what, why, fix)


class ChannelUsageError(RuntimeError):
    """Our code used the channel out of order: a bug on this side."""
