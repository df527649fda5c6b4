"""An epoll object with one callback per descriptor."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Watcher:
    """Call a descriptor's callback when it is ready.

    A descriptor without wanted events is not registered: epoll would report a hangup on it again and again.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], object]] = {}
        self._wanted: dict[int, int] = {}

    def watch(self, fd: int, call: Callable[[int], object], wanted: int = select.EPOLLIN) -> None:
        """Set a descriptor's callback and the events to wait for; 0 for none."""
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
        """Stop watching a descriptor; call this before closing it."""
        if self._calls.pop(fd, None) is not None and self._wanted.pop(fd):
            self._epoll.unregister(fd)

    def turn(self, most_s: float) -> None:
        """Wait once and call the callbacks of ready descriptors."""
        for fd, mask in self._epoll.poll(most_s):
            if (call := self._calls.get(fd)) is not None:
                call(mask)
