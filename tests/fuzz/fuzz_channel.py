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
from tests.guest.lies import EXITED
from tests.guest.messages import (
    CLOSE_NOW,
    GUEST,
    HOST,
    MESSAGES,
    SITUATIONS,
    credit,
    execute,
    frame,
    message,
    opening,
    steps_to,
)
from x07_sandbox.channel import streams
from x07_sandbox.channel.link import WINDOW, CommandState, State, Stream
from x07_sandbox.channel.messages import (
    FORMS,
    Changes,
    Close,
    Closed,
    Exec,
    Failed,
    Hello,
    Open,
    Output,
    Started,
    Stop,
    Warm,
)
from x07_sandbox.channel.streams import Role

AS_HOST, AS_GUEST, CUT, STALLED = 0, 0x80, b"\x03\x00\x06\x12", b"\x41\x63"


def said(role: Role, state: State, command: CommandState | None = None) -> bytes:
    """Return what the peer of a role says until a state."""
    return b"".join(message(one) for one in steps_to(state, command) if FORMS[type(one)].sender is not role)


def seeds() -> dict[str, bytes]:
    """Return each state, each message and each type of frame, for both ends, and some conversations for branches."""
    found: dict[str, bytes] = {}
    for role, first in ((HOST, AS_HOST), (GUEST, AS_GUEST)):
        head, running = bytes([first]), bytes([first]) + said(role, State.OPEN, CommandState.RUNNING)
        for state, command in SITUATIONS:
            found[f"{role.name}-{state.name}-{command and command.name}"] = head + said(role, state, command)
        for kind, one in MESSAGES.items():
            if FORMS[kind].sender is not role:
                found[f"{role.name}-{kind.__name__}"] = running + message(one) * 2
        for number in range(streams.OPEN + 1, streams.DATAGRAM + 1):
            found[f"{role.name}-frame-{number}"] = running + frame(number, 4 - (role is GUEST))
    running = said(HOST, State.OPEN, CommandState.RUNNING)
    output = opening(1, Stream.STDOUT, 1) + frame(streams.DATA, 1, b"hello\n") + opening(3, Stream.STDERR, 1)
    exited = running + output + frame(streams.FIN, 1) + frame(streams.FIN, 3) + message(EXITED)
    collected = opening(5, Stream.OUTPUT) + frame(streams.DATA, 5, b"\x7fEL") + frame(streams.FIN, 5)
    changes = opening(7, Stream.CHANGES) + frame(streams.DATA, 7, b"\7\0\0") + frame(streams.FIN, 7)
    opened = said(GUEST, State.OPEN)
    started, stop = opened + message(MESSAGES[Exec]), message(MESSAGES[Stop])
    files = opening(2, Stream.INPUT) + frame(streams.DATA, 2, b"#!/bin/sh\n") + frame(streams.FIN, 2)
    stdin = opening(4, Stream.STDIN, 1) + frame(streams.DATA, 4, b"in")
    quarter = credit(4, WINDOW // 4)
    to_host = {
        "output-stalled": STALLED + running + output + frame(streams.DATA, 1, b"hello") * 3,
        "credit": CUT + running + quarter,
        "resets": bytes(1) + running + frame(streams.RESET, 4) + quarter + output + frame(streams.RESET, 1),
        "datagram": bytes(1) + running + opening(1, Stream.STDOUT, 1) + frame(streams.DATAGRAM, 1),
        "exited-early": bytes(1) + running + output + message(EXITED),
        "changes-twice": bytes(1) + running + changes * 2,
        "exited-two": bytes(1) + exited + message(Started(2)) + opening(5, Stream.STDOUT, 2),
        "all": CUT + exited + collected + changes + message(MESSAGES[Closed]),
        "failed-command": bytes(1)
        + said(HOST, State.READY)
        + message(Failed(1, "exec", 2, "no"))
        + message(Started(2)),
        # In one piece, the fault hid the events before it; cut, it did not.
        "found-fault-after-events": CUT + running + output + b"\xff" + bytes(11),
        # A message rejected for its order was dropped, and the conversation continued after it.
        "found-life-after-fault": CUT + message(Started(1)) + message(MESSAGES[Hello]),
        # The host buffered 4 MiB of a message that the guest must not send, before it rejected it.
        "found-large-message": bytes(1)
        + streams.HEADER.pack(streams.MESSAGE, FORMS[Open].number, 0, 0, 4 << 20)
        + bytes(40_000),
        "found-no-credit": bytes(1) + running + credit(4, 0),
    }
    to_guest = {
        "files": started + files + stdin,
        "commands": started + message(execute(2)) + stop + message(Stop(2, 9)),
        "stop-skipped": opened + message(execute(2)) + stdin + stop,
        "stdin-late": started + stop + stdin,
        "changes": started + message(Changes()) * 2 + message(MESSAGES[Close]) + stop,
        "warm-again": started + message(CLOSE_NOW) + message(MESSAGES[Warm]) + opened + message(execute(1)),
        # The guest raised ValueError, TypeError, or (for the id) TypeError in its table of commands.
        "found-short-open": said(GUEST, State.READY) + frame(streams.MESSAGE, 0, b"[]", FORMS[Open].number),
        "found-no-limits": opened
        + frame(streams.MESSAGE, 0, b'[1,[],{},"",0,"",false,null,false]', FORMS[Exec].number),
        "found-text-as-id": opened
        + frame(streams.MESSAGE, 0, b'["1",[],{},"",[0,0,0,0,0],"",false,null,false]', FORMS[Exec].number),
        # The target's guest ended a command after it had closed the session.
        "found-stop-after-closed": started + message(Close(0, Output("/x07/out/a", 9), None)) + stop,
    }
    return found | to_host | {name: bytes([AS_GUEST]) + wire for name, wire in to_guest.items()}


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    check_any_cut(data, lambda role, stalled: Conversing(role, stalled=stalled))
