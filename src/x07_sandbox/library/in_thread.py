"""Blocking work for callers that use asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T], cancel: Callable[[], object]) -> _T:
    """Return what *work* returns, which runs in a thread of its own. Raises what it raises.

    cancel: called if the task is cancelled; *work* must then end soon, and is waited for.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()
    ended = asyncio.Event()

    def finish(found: list[_T], problem: BaseException | None) -> None:
        ended.set()
        if done.cancelled():
            return
        if problem is not None:
            done.set_exception(problem)
        else:
            done.set_result(found[0])

    def carry_out() -> None:
        found: list[_T] = []
        problem = None
        try:
            found.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised again where it is awaited
            problem = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, found, problem)

    # This does not use the loop's executor: work that waits for a VM must not take its threads.
    threading.Thread(target=carry_out, name="x07-async", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        cancel()
        while not ended.is_set():  # also if cancelled again
            with contextlib.suppress(asyncio.CancelledError):
                await ended.wait()
        raise
