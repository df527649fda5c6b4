"""Text for a language model: what a command printed and how it ended.

All text that a guest may have chosen is escaped and bounded. Facts and untrusted text stay apart until they are
rendered, so that each caller can mark what is untrusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from x07_sandbox.errors import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from x07_sandbox.policy.denials import Denial, Outcome

OUTPUT_MAX: Final = 20_000
"""Bytes of text that a model gets of a command's output, or of a file."""
ERRORS_MAX: Final = OUTPUT_MAX // 2
"""Bytes of these that standard error may take."""
_DENIALS_MAX: Final = 10
_SUBJECT_MAX: Final = 200
_MARKED: Final = "see the untrusted text"


class Ending(Protocol):
    """How a command or a run ended. See `Ended` and `Result`."""

    @property
    def outcome(self) -> Outcome: ...  # noqa: D102 - see there
    @property
    def exit_code(self) -> int | None: ...  # noqa: D102
    @property
    def reason_code(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def denials(self) -> Sequence[Denial]: ...  # noqa: D102


class Answer(NamedTuple):
    """An answer to a call of a model. facts: from x07-sandbox. parts: untrusted texts, each with its title."""

    facts: dict[str, Any]
    parts: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """Return one text: the facts in the first line, then the untrusted texts. No such text can add a fact."""
        facts = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in self.facts.items())
        return "\n".join([facts, *(f"{title}:\n{text}" for title, text in self.parts if text)])


def bounded(text: str, most: int) -> str:
    """Return the beginning and the end of a text of more than *most* bytes, and between them how much was left out."""
    data = text.encode()
    if len(data) <= most:
        return text
    half = most // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[len(data) - half :]))
    return f"{head}\n[... {len(data) - 2 * half} bytes left out ...]\n{tail}"


def shown(data: bytes, most: int) -> str:
    """Return what a model sees of untrusted bytes, in at most about *most* bytes."""
    return bounded(escaped(data.decode("utf-8", "surrogateescape"), kept="\n\t"), most)


def answer_of(ended: Ending, stdout: bytes, stderr: bytes, most: int) -> Answer:
    """Return the answer about a command and its output, of which it has at most about *most* bytes."""
    errors = shown(stderr, most // 2)
    output = shown(stdout, most - len(errors.encode()))
    title = "stdout" if errors else "output"
    return Answer(facts_of(ended), (*untrusted(ended), (title, output), ("stderr", errors)))


def facts_of(ended: Ending) -> dict[str, Any]:
    """Return the facts about the end of a command or run."""
    facts: dict[str, Any] = {"outcome": ended.outcome, "exit_code": ended.exit_code}
    if ended.outcome != "ok":
        facts["reason"] = reason_of(ended) or _MARKED
    if ended.denials:
        facts["denied"] = "only the person who set this up can allow what was denied"
    return facts


def reason_of(ended: Ending) -> str:
    """Return why something ended, or "" if the reason may contain text of a guest."""
    from x07_sandbox.policy.outcomes import REASONS  # not imported by commands that nobody tells a model about

    return "" if "{problem}" in REASONS.get(ended.reason_code, "{problem}") else ended.reason


def untrusted(ended: Ending) -> Iterator[tuple[str, str]]:
    """Yield untrusted texts and their titles: the reason for the end, unless `reason_of` returns it, and denials."""
    yield "reason", "" if reason_of(ended) else escaped(ended.reason)
    yield "denied", denied(ended.denials)


def denied(denials: Sequence[Denial]) -> str:
    """Return untrusted text about what was denied, and what would allow it."""
    lines = [f"{one.action} {one.subject[:_SUBJECT_MAX]} ({_allowed_by(one)})" for one in denials[:_DENIALS_MAX]]
    more = [f"and {len(denials) - len(lines)} more"] if len(denials) > len(lines) else []
    return "\n".join(map(escaped, lines + more))


def _allowed_by(denial: Denial) -> str:
    flag = "" if denial.how_to_allow is None else denial.how_to_allow.flag
    why = f"{denial.reason[:_SUBJECT_MAX]}; " if denial.reason else ""
    return f"{why}{denial.field}; allowed by {flag[:_SUBJECT_MAX]}" if flag else f"{why}{denial.field}"
