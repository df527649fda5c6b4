"""Forks of an open sandbox, in the process that has opened it, or each with a process of its own."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from x07_sandbox.host.waiting import Cancel
from x07_sandbox.library.run import run_uninterrupted
from x07_sandbox.library.snapshots import checked_count, started
from x07_sandbox.sessions.sandbox import OpenSandbox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from x07_sandbox.sessions.command import AnySandbox


def forks_of(opened: AnySandbox, count: int, given: Mapping[str, Any]) -> Sequence[tuple[AnySandbox, Cancel | None]]:
    """Return *count* forks, each with what cancels it. given: keywords of `Sandbox`. Raises SandboxError."""
    from x07_sandbox.library.opening import checked_life

    count = checked_count(count)
    checked_life(given)
    if not isinstance(opened, OpenSandbox):
        from x07_sandbox.library.held import HeldSandbox

        assert isinstance(opened, HeldSandbox)  # there is no other kind
        return [(fork, None) for fork in opened.fork(count, given)]
    cancels: list[Cancel] = []

    def cancel_all() -> None:
        for one in cancels:
            one()

    return run_uninterrupted(cancel_all, lambda: _own_forks(opened, count, given, cancels))


def _own_forks(
    opened: OpenSandbox, count: int, given: Mapping[str, Any], cancels: list[Cancel]
) -> list[tuple[OpenSandbox, Cancel]]:
    from x07_sandbox.library.opening import open_sandbox

    with contextlib.ExitStack() as stack, opened.saved(count) as place:

        def start() -> tuple[OpenSandbox, Cancel]:
            cancel = Cancel()
            cancels.append(cancel)
            stack.callback(cancel.close)
            return open_sandbox({**given, "snapshot": place.path}, cancel), cancel

        found = started(count, start, lambda one: one[0].finish("discard"))
        stack.pop_all()
    return found


def fork_runs(opened: OpenSandbox, count: int, given: Mapping[str, Any], *, flags: bool) -> list[str]:
    """Return the ids of *count* forks, each held by a process of its own. Raises SandboxError."""
    from x07_sandbox.library.held import create, discard
    from x07_sandbox.library.held_messages import Create

    with contextlib.closing(Cancel()) as cancel, opened.saved(count) as place:
        asked = Create({**given, "snapshot": place.path}, None, flags=flags)
        return started(count, partial(create, asked, cancel.fd), discard)
