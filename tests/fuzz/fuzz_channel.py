"""Fuzz target: the channel between host and guest.

`check_any_cut` in tests/guest/answering.py says what an input is. Our side answers as a correct host or agent does: the
host opens a session with two commands, and closes it after the first. Invariants:

* only messages, events or PeerError come out, and after a PeerError nothing but PeerError;
* the states change only along NEXT and COMMAND_NEXT;
* buffered input is at most one frame that the peer may send; queued output is at most what we sent ourselves plus
  one credit frame for each quarter of a window;
* the streams and commands that are remembered are limited;
* no stream has more than WINDOW bytes in flight, and nothing arrives on it before its opening or after its end;
* messages, events and errors do not depend on how the stream was cut.
"""

from __future__ import annotations

from tests.guest.answering import Conversing, check_any_cut


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    check_any_cut(data, lambda role, stalled: Conversing(role, stalled=stalled))
