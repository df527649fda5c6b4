"""A session that many threads use, and the thread that runs its event loop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings, start_thread
from x07_sandbox.host.waiting import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.channel.messages import Exec
    from x07_sandbox.sessions.execution import Execution
    from x07_sandbox.sessions.transfers import CommandStreams

_LOOK_S = 60.0  # between two looks at the time, if nothing else happens


class Life(NamedTuple):
    """How long a sandbox lasts: at most lifetime_s, and at most idle_s without a command and without a call.

    name, tags: by which users find it.
    """

    lifetime_s: float = settings.LIFETIME_S
    idle_s: float | None = None
    name: str = ""
    tags: Mapping[str, str] = MappingProxyType({})


class CommandSession(Protocol):
    """What a session must have, so that many threads can use it; the methods are described in `Session`."""

    waiting: contextlib.AbstractContextManager[object]

    @property
    def over(self) -> bool:
        """Whether the session has ended."""

    @property
    def busy(self) -> bool:
        """Whether a command is running."""

    def turn(self, within_s: float, wake_fd: int) -> None:
        """See `Session.turn`."""

    def execute(self, order: Exec, given: CommandStreams, wall_ms: int | None) -> Execution:
        """See `Session.execute`."""

    def stop(self, execution: Execution, number: int) -> None:
        """See `Session.stop`."""

    def resize(self, execution: Execution, rows: int, columns: int) -> None:
        """See `Session.resize`."""

    def read(self, execution: Execution, name: Literal["stdout", "stderr"]) -> bytes:
        """See `Session.read`."""


class _Released:
    """A context in which the lock of a condition is released."""

    def __init__(self, condition: threading.Condition) -> None:
        self._condition = condition

    def __enter__(self) -> None:
        self._condition.release()

    def __exit__(self, *_exc: object) -> None:
        self._condition.acquire()


class SharedSession:
    """A session for many threads, which call its methods in the context `using`. `until` blocks only its caller.

    Call `begin` once. until_s: when the session expires, on the monotonic clock. idle_s: how long it may be without a
    command and without a call; None for no limit. Then, and if the session is lost, *on_end* is called in the thread of
    the loop with `why`: "expired", "idle" or "lost". It is "" while the session is open, or if it was ended by a call.
    """

    def __init__(
        self, session: CommandSession, until_s: float, idle_s: float | None, on_end: Callable[[str], object]
    ) -> None:
        self._session = session
        self._until_s = until_s
        self._idle_s = idle_s
        self._used_at = time.monotonic()
        self._callers = 0  # that wait
        self._on_end = on_end
        self._changed = threading.Condition()
        self._wake = Event()
        self._stopping = self._ended = False
        self.why = ""
        self.problem: SandboxError | None = None
        session.waiting = _Released(self._changed)
        self._thread = threading.Thread(target=self._serve, name="x07-sandbox", daemon=True)

    def begin(self) -> None:
        """Start the loop. Raises OSError."""
        start_thread(self._thread)

    @property
    def over(self) -> bool:
        """Whether the session was closed, lost or has expired."""
        return self._stopping or self._session.over

    @property
    def until_s(self) -> float:
        """When the session expires, on the monotonic clock."""
        return self._until_s

    def extend(self, until_s: float) -> None:
        """Set when the session expires, on the monotonic clock."""
        with self.using():
            self._until_s = until_s

    def read(self, execution: Execution, name: Literal["stdout", "stderr"] = "stdout") -> bytes:
        """See `Session.read`."""
        with self._changed:
            data = self._session.read(execution, name)
            if data:  # the guest may send more; else this would wake the thread that waits for data, and so itself
                self._wake_loop()
        return data

    def until(self, done: Callable[[], bool], within_s: float | None = None) -> bool:
        """Wait until *done* returns True, the session is over, or time is up. Return the value of *done*."""
        with self._changed:
            self._callers += 1
            try:
                self._changed.wait_for(lambda: done() or self.over, within_s)
                return done()
            finally:
                self._callers -= 1
                self._used_at = time.monotonic()
                if self._idle_s is not None:
                    self._wake_loop()  # from now on it waits for less time

    def replace(self, session: CommandSession) -> None:
        """Go on with another session. Call this in the context `using`."""
        session.waiting = _Released(self._changed)
        self._session = session
        self._changed.notify_all()

    def wake(self) -> None:
        """Have all calls of `until` look again."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """End the loop."""
        with self.using():
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    @contextlib.contextmanager
    def using(self) -> Iterator[CommandSession]:
        """Keep other threads away from the session in the context, and have the loop look at it afterwards."""
        with self._changed:
            self._used_at = time.monotonic()
            yield self._session
            self._wake_loop()

    def _wake_loop(self) -> None:
        if not self._ended:
            self._wake.set()

    def _serve(self) -> None:
        why = "lost"  # also after a bug
        try:
            with self._changed:
                why = self._run()
        except SandboxError as exc:  # such as a full disk
            self.problem = exc
        finally:
            with self._changed:
                self._stopping, self.why = True, why
                self._changed.notify_all()
            if why:
                self._on_end(why)
            with self._changed:
                self._ended = True
                self._wake.close()
                self._changed.notify_all()

    def _run(self) -> str:
        """Run the loop. Return why the session ended by itself, or ""."""
        while not self.over:
            used = self._in_use()
            self._session.turn(min(self._left_s(), _LOOK_S), self._wake.fd)
            self._wake.clear()
            self._changed.notify_all()
            if used or self._in_use():
                self._used_at = time.monotonic()
            if expired := self._expired():
                return expired
        return "lost" if self._session.over else ""

    def _in_use(self) -> bool:
        return self._session.busy or self._callers > 0

    def _left_s(self) -> float:
        idle_s = self._until_s if self._idle_s is None or self._in_use() else self._used_at + self._idle_s
        return max(0.0, min(self._until_s, idle_s) - time.monotonic())

    def _expired(self) -> str:
        if self._left_s() > 0:
            return ""
        return "expired" if time.monotonic() >= self._until_s else "idle"
