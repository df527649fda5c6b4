"""An epoll object whose descriptors have a function each."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Watcher:
    """Calls what belongs to a descriptor when that is ready. A descriptor that waits for nothing is not watched.

    So one whose peer has gone, which epoll would report at once again and again, costs nothing until it is of use.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], object]] = {}
        self._wanted: dict[int, int] = {}

    def watch(self, fd: int, call: Callable[[int], object], wanted: int = select.EPOLLIN) -> None:
        """Wait for *wanted* on a descriptor from now on; 0 for nothing."""
        before = self._wanted.get(fd, 0)
        self._calls[fd] = call
        self._wanted[fd] = wanted
        if wanted == before:
            return
        if not before:
            self._epoll.register(fd, wanted)
        elif wanted:
            self._epoll.modify(fd, wanted)
        else:
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Wait for it no more; to be called before it is closed."""
        if self._calls.pop(fd, None) is not None and self._wanted.pop(fd):
            self._epoll.unregister(fd)

    def turn(self, most_s: float) -> None:
        """Wait once, and call what is ready."""
        for fd, mask in self._epoll.poll(most_s):
            if (call := self._calls.get(fd)) is not None:
                call(mask)
