"""Answers of `x07 mcp`: facts for the model, marked output, and commands that may take longer than a call."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import errno
import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from x07_sandbox.errors import RefusedError, SandboxError, UsageError, escaped
from x07_sandbox.integrations.mcp_calls import ERRORS_MAX, OUTPUT_MAX, CallError, marked, shown
from x07_sandbox.policy.outcomes import REASONS
from x07_sandbox.sessions.command import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from x07_sandbox.library.async_sandbox import AsyncSandbox
    from x07_sandbox.policy.denials import Denial
    from x07_sandbox.sessions.command import Ended, StreamName
    from x07_sandbox.sessions.result import Changes, Result

_NAMES_MAX: Final = 100
_DENIALS_MAX: Final = 10
_PERSON: Final = "The person who started this server can: "
_ADVICE: Final = {
    errno.ENOENT: "Paths are those of the sandbox, not of the host.",
    errno.EROFS: "Write below the working folder, or in /tmp.",
    errno.EACCES: "Use files below the working folder, or in /tmp.",
    errno.EISDIR: "Use sandbox_list for a folder.",
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What whoever starts the server has fixed.

    options: keywords of `Sandbox`, without those of its life. about: sentences for the model about what they grant.
    open_max: VMs at once. idle_s, lifetime_s: see `Sandbox`. timeout_s: limit of each command or program. answer_s:
    after this time a call answers that its command still runs. apply: whether changes to folders are applied. network:
    whether programs can connect to any server.
    """

    options: dict[str, Any] = {}
    about: str = ""
    open_max: int = 8
    idle_s: float = 600.0
    lifetime_s: float = 3600.0
    timeout_s: float = 300.0
    answer_s: float = 45.0
    apply: bool = False
    network: bool = False


class Answer(NamedTuple):
    """The answer to a call. untrusted: marked text from the sandbox, or ""."""

    facts: dict[str, Any]
    untrusted: str = ""


class Running:
    """A command or program that goes on if its call does not wait for its end."""

    def __init__(self, sandbox: str, work: Callable[[Running], Coroutine[Any, Any, Answer]]) -> None:
        self.id = secrets.token_urlsafe(16)
        self.sandbox = sandbox
        self.began = dt.datetime.now(dt.UTC)
        self.kept: dict[StreamName, Kept] = {"stdout": Kept(OUTPUT_MAX, "both"), "stderr": Kept(ERRORS_MAX, "both")}
        self._began_s = time.monotonic()
        self.cancelled = False
        self.task = asyncio.create_task(self._outcome(work))

    def cancel(self) -> None:
        """Kill the command, unless it has ended."""
        self.cancelled = self.task.cancel() or self.cancelled

    async def _outcome(self, work: Callable[[Running], Coroutine[Any, Any, Answer]]) -> Answer | CallError:
        try:
            return await work(self)
        except CallError as exc:
            return exc

    def take(self, name: StreamName, data: bytes) -> None:
        """Keep output as it arrives."""
        self.kept[name].take(data)

    @property
    def elapsed_s(self) -> float:
        """For how long it has been running."""
        return time.monotonic() - self._began_s

    def answer(self) -> Answer:
        """Return the answer to a call at this moment. Raises CallError."""
        if not self.task.done():
            facts = {"state": "running", "running": self.id, "elapsed_s": round(self.elapsed_s, 1)}
            return Answer(facts | {"next": "Call the tool again with running, to wait for the end."}, self.output())
        if self.cancelled:
            raise CallError("it was killed, because a call that waited for it was cancelled. Start it again if needed.")
        if isinstance(found := self.task.result(), CallError):
            raise found
        return found

    def output(self, *more: tuple[str, str]) -> str:
        """Return the marked output, with more untrusted texts and their titles."""
        limits = {"stdout": OUTPUT_MAX, "stderr": ERRORS_MAX}
        return marked([*((name, shown(one.data(), limits[name])) for name, one in self.kept.items()), *more])


@contextlib.contextmanager
def errors(what: str, sandbox: AsyncSandbox | None = None) -> Iterator[None]:
    """Turn errors of the library into CallError. The advice of a SandboxError is for people who set the options."""
    try:
        yield
    except TimeoutError:
        raise CallError(f"{what}: there was no answer in time. Try again later.") from None
    except OSError as exc:
        advice = _ADVICE.get(exc.errno or 0, "Check the path.")
        raise CallError(f"{what}: {exc.strerror or 'it failed'}. {advice}", "" if exc.strerror else str(exc)) from exc
    except SandboxError as exc:
        if sandbox is not None and not sandbox.alive:
            raise CallError(f"{what}: the sandbox has ended. Open a new one with sandbox_open.", exc.why) from exc
        if isinstance(exc, UsageError | RefusedError):  # about what the model or that person asked for
            fix = f"{exc.fix}{exc.stop}" if exc.code == "usage" else f"{_PERSON}{exc.fix}."
            raise CallError(f"{what}: {exc.what}: {exc.why}. {fix}") from exc
        raise CallError(f"{what}: {exc.what}. {_PERSON}{exc.fix}.", exc.why) from exc


def reason_of(ended: Ended | Result) -> str:
    """Return why something ended, or "" if the reason may contain text of a guest."""
    return "" if "{problem}" in REASONS.get(ended.reason_code, "{problem}") else ended.reason


def untrusted(ended: Ended | Result) -> Iterator[tuple[str, str]]:
    """Yield untrusted texts and their titles: the reason for the end, unless `reason_of` returns it, and denials."""
    yield "reason", "" if reason_of(ended) else escaped(ended.reason)
    yield "denied", denied(ended.denials)


def denied(denials: Sequence[Denial]) -> str:
    """Return untrusted text about what was denied."""
    lines = (f"{one.action} {one.subject[:200]} ({_allowed_by(one)})" for one in denials[:_DENIALS_MAX])
    return "\n".join(map(escaped, lines))


def _allowed_by(denial: Denial) -> str:
    flag = "" if denial.how_to_allow is None else denial.how_to_allow.flag
    why = f"{denial.reason[:200]}; " if denial.reason else ""
    return f"{why}{denial.field}; allowed by {flag[:200]}" if flag else f"{why}{denial.field}"


def names(changes: Changes) -> str:
    """Return untrusted text with the names of changed files."""
    return "\n".join(json.dumps(one.name)[:300] for one in changes.names[:_NAMES_MAX])


def changes_of(result: Result) -> dict[str, Any]:
    """Return what became of changes to folders of the host."""
    found = result.changes
    if found.state == "none":
        return {}
    counts = {"added": found.added, "changed": found.changed, "deleted": found.deleted, "left_out": found.left_out}
    facts: dict[str, Any] = {"changes": {"state": found.state, **counts}}
    if found.state == "kept":
        facts["review"] = (
            f"The host's folders are unchanged. A person can use: x07 diff {result.run}; x07 apply {result.run}"
        )
    return facts
