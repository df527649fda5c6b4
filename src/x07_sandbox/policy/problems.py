"""Problems of a policy document, and the error that lists them."""

import json
from collections.abc import Iterable, Sequence

import msgspec

from x07_sandbox.errors import Command, Text, UsageError

HUGE: int = 10**20  # replaces every larger number in a document; outside the range of every field
MISSING = "is missing"  # the message for a required field that is absent
ADVICE = "Correct the policy. docs/reference/policy.md describes every field"
_SHOWN_CHARS = 80  # of an untrusted key, in a message


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One problem at one place of the document.

    json_path: the place, such as ``$.limits.cpu_ms`` or ``$.net.allow_hosts[2].ports``. message: without a full stop.
    suggestion: the key or value that the author probably meant.
    """

    json_path: str
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        """Return one line of a list: place, colon, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else f"{self.json_path}:")

    @property
    def sentence(self) -> str:
        """One sentence: place, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else self.json_path)

    def _line(self, place: str) -> str:
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return f"{place} {self.message}{hint}"


class PolicyError(UsageError):
    """A policy document is invalid. ``problems`` lists all its problems.

    in_schema: whether the document matches the schema and violates only rules that a schema cannot express.
    """

    code = "policy"
    before_fix = "\n  "

    def __init__(
        self, what: str, why: str, fix: Text, problems: Iterable[Problem] = (), *, in_schema: bool = False
    ) -> None:
        super().__init__(what, why, fix)
        # Not in args: pickle rebuilds from args and then restores these attributes.
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.in_schema = in_schema

    @classmethod
    def of(cls, source: str, problems: Sequence[Problem], *, in_schema: bool = False) -> "PolicyError":
        """Return the error for *problems* (at least one) in the document called *source*."""
        why = "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        if len(problems) == 1:
            why = problems[0].sentence
        fix: Text = ADVICE
        if any(problem.message == MISSING for problem in problems):
            fix = (f"{ADVICE}. To write a complete policy: ", Command("x07 policy new"))
        return cls(f"policy {source} is invalid", why, fix, problems, in_schema=in_schema)


def json_path(parts: Iterable[str | int]) -> str:
    """Return a path like ``$.a.b[3]``. A key that is not an identifier is quoted, escaped and truncated."""
    text = "$"
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.isascii() and len(part) <= _SHOWN_CHARS:
            text += f".{part}"
        else:
            shown = part if len(part) <= _SHOWN_CHARS else part[:_SHOWN_CHARS] + "..."
            text += f"[{json.dumps(shown)}]"
    return text
