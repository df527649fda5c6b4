"""A link over a non-blocking descriptor: the only I/O that host and guest share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.link import Event, Link, State

if TYPE_CHECKING:
    from x07_sandbox.channel.frames import Role

READ_SIZE: Final = 128 * 1024
WRITE_SIZE: Final = 64 * 1024


class Connection:
    """A `Link` and the descriptor that carries it. The descriptor is lent: its opener closes it."""

    def __init__(self, fd: int, role: Role, state: State = State.WAITING) -> None:
        self.fd = fd
        self.link = Link(role, state)
        os.set_blocking(fd, False)

    def read(self) -> Iterable[Event] | None:
        """Read once; the events, decoded one by one, or None if the peer has closed.

        Raises OSError; the iteration raises PeerError (see `Link.receive`).
        """
        try:
            data = os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return ()
        except ConnectionResetError:
            return None
        return self.link.receive(data) if data else None

    def flush(self) -> bool:
        """Write what is queued until the descriptor takes no more; False means that the peer has closed."""
        while self.link.pending():
            try:
                self.link.sent(os.write(self.fd, self.link.data_to_send(WRITE_SIZE)))
            except BlockingIOError:
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False
        return True
