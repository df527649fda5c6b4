"""Methods of other classes, to be awaited: each call runs in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from x07_sandbox.sessions.command import caller


class _Wakes(Protocol):
    def wake(self) -> None:
        """Have all callers look whether they still wait."""


_P = ParamSpec("_P")
_T = TypeVar("_T")
_S = TypeVar("_S", bound=_Wakes)


def _nothing() -> None:
    pass


async def in_thread(work: Callable[[], _T], cancel: Callable[[], object] = _nothing) -> _T:
    """Return what *work* returns, which runs in a thread of its own. Raises what it raises.

    cancel: called if the task is cancelled; *work* must then end soon, and is waited for. From then on `given_up`
    returns True in its thread.
    """
    import asyncio  # the library is cheap to import for others

    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()
    ended, gone = asyncio.Event(), threading.Event()

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
        caller.gone = gone.is_set
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
        gone.set()
        cancel()
        while not ended.is_set():  # also if cancelled again
            with contextlib.suppress(asyncio.CancelledError):
                await ended.wait()
        raise


class Awaited(Generic[_S]):
    """The base of classes whose methods are those of another class, to be awaited."""

    @property
    def _target(self) -> _S:
        """The object whose methods are called."""
        raise NotImplementedError


def awaited(
    method: Callable[Concatenate[_S, _P], _T], note: str = ""
) -> Callable[Concatenate[Awaited[_S], _P], Coroutine[Any, Any, _T]]:
    """Return *method* to be awaited. It runs in a thread, and ends soon if the task is cancelled.

    A function `on_output` is called in the thread of the event loop. note: a sentence to add to the docstring.
    """

    @wraps(method)
    async def call(self: Awaited[_S], *args: _P.args, **options: _P.kwargs) -> _T:
        target = self._target
        on_output: Any = options.get("on_output")
        if on_output is not None:
            import asyncio  # as above

            options["on_output"] = partial(asyncio.get_running_loop().call_soon_threadsafe, on_output)
        return await in_thread(partial(method, target, *args, **options), target.wake)

    if note:
        # Before Python 3.13, the last line of a docstring of several lines is its indentation.
        _, found, indentation = (call.__doc__ or "").rpartition("\n")
        call.__doc__ = f"{call.__doc__}\n{indentation if found else ''}{note}"
    return call  # type: ignore[return-value]  # mypy takes `self` for a keyword, too
