# mypy: ignore-errors
"""Lies of a guest over its channel: told by a real guest (hostile_agent.py), or by a test at the end of a socket pair.

`DEEDS` claim that the program runs, those of `UNSTARTED` do not.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from x07_sandbox.channel import messages, streams
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Closed, Denied, Exited, Failed
from x07_sandbox.channel.streams import HEADER
from x07_sandbox.channel.trees import Entry, segment
from x07_sandbox.channel.trees import Kind as R

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from x07_sandbox.channel.connection import Connection
    from x07_sandbox.channel.link import Link

DENIED = Denied(id=1, by="kernel", call="openat", errno=13, path="/root/x", write=False, times=1)
EXITED = Exited(
    id=1,
    wait_status=0,
    cpu_us=1,
    memory_peak_bytes=1,
    oom_kills=0,
    tasks_peak=1,
    tasks_refused=0,
    cpu_exceeded=False,
    stopped=False,
    disk_full=False,
    memory_full=False,
    denials_lost=0,
    wall_us=1,
)
CLOSED = Closed(output_bytes=None, output_problem=None, left_files=0, left_bytes=0)


class Lies:
    """What a guest sends over a connection, allowed or not."""

    connection: Connection
    link: Link

    def say(self) -> None:
        """Let all that is queued go."""
        while self.link.pending():
            if not self.connection.flush():
                raise BrokenPipeError  # the host listens no more
            time.sleep(0.001)

    def raw(self, kind: int, stream: int, payload: bytes = b"", code: int = 0, size: int | None = None) -> None:
        """One frame as it is, whatever the link thinks of it."""
        header = HEADER.pack(kind, code, 0, stream, len(payload) if size is None else size)
        write(self.connection.fd, header + payload)

    def raw_message(self, message: messages.Message) -> None:
        """One message, whatever the link thinks of it."""
        code, payload = messages.encode(message)
        self.raw(streams.MESSAGE, 0, payload, code)

    def raw_open(self, number: int, stream: Stream, subject: int) -> None:
        """Open a stream, whatever the link thinks of it."""
        self.raw(streams.OPEN, number, struct.pack(">I", subject), stream)

    def open(self, stream: Stream, data: bytes = b"", subject: int = 0) -> int:
        """Open a stream as the protocol allows, and send data."""
        number = self.link.open(stream, subject)
        self.link.streams.send(number, data)
        self.say()
        return number

    def end(self, **lies: object) -> None:
        """Claim the program's end."""
        self.link.send(EXITED._replace(**lies))
        self.say()

    def close(self, **lies: object) -> None:
        """Claim that all has been sent."""
        self.link.send(CLOSED._replace(**lies))
        self.say()

    def end_and_close(self, **lies: object) -> None:
        """Claim the program's end, and that all has been sent."""
        self.end(**lies)
        self.close()


def write(fd: int, data: bytes) -> None:
    """Write all."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            time.sleep(0.001)


def pour(fd: int, data: bytes) -> None:
    """Write the same for ever."""
    while True:
        write(fd, data)


def for_ever() -> None:
    """Do nothing any more."""
    while True:
        time.sleep(1000)


def flood_output(agent: Lies) -> None:
    """More output than the window allows."""
    number = agent.open(Stream.STDOUT, subject=1)
    while True:
        agent.raw(streams.DATA, number, bytes(32768))


def lie_about_file(agent: Lies, announced: int, sent: int) -> None:
    """Send a file, and state another size."""
    agent.end()
    if sent:
        agent.link.streams.finish(agent.open(Stream.OUTPUT, bytes(sent)))
    agent.close(output_bytes=announced)


def endless_file(agent: Lies) -> None:
    """Keep to the window and send a file for ever."""
    agent.end()
    number = agent.open(Stream.OUTPUT)
    while True:
        agent.link.streams.send(number, bytes(32768))
        agent.connection.flush()
        for _ in agent.connection.read() or ():
            pass


def one_denial(agent: Lies) -> None:
    """Say of one thing that it was refused, with control characters and a huge count."""
    agent.link.send(DENIED._replace(path="/root/\x1b[2Jx", call="\x1b", times=2**62))
    agent.end_and_close()


def fail(agent: Lies, command: int) -> None:
    """Say that something failed while the program runs."""
    agent.raw_message(Failed(command, "x", 5, "\x1b[2J it broke"))


def message(agent: Lies, kind: type, payload: bytes) -> None:
    """Send any payload as a message."""
    agent.raw(streams.MESSAGE, 0, payload, messages.FORMS[kind].number)


def closed_twice(agent: Lies) -> None:
    """Claim twice, in one write, that all has been sent, with other counts."""
    agent.end()
    frames = [messages.encode(CLOSED), messages.encode(CLOSED._replace(left_files=7))]
    parts = [HEADER.pack(streams.MESSAGE, code, 0, 0, len(payload)) + payload for code, payload in frames]
    write(agent.connection.fd, b"".join(parts))


def after_the_end(agent: Lies) -> None:
    """Send more output after the end of the output."""
    number = agent.open(Stream.STDOUT, b"all", 1)
    agent.link.streams.finish(number)
    agent.say()
    agent.raw(streams.DATA, number, b" and more")
    agent.raw(streams.FIN, number)
    agent.end_and_close()


def abort_all(agent: Lies) -> None:
    """Abort every stream: those of the host, which carry files and input, and an own one with output."""
    own = agent.open(Stream.STDOUT, b"out", 1)
    for number in (*agent.of_host, own):
        agent.link.streams.reset(number)
    agent.say()
    for number in (*agent.of_host, own):
        agent.raw(streams.RESET, number)  # and once more
    agent.end_and_close()


def told(kind: R, name: bytes, **fields: object) -> bytes:
    """A record of the stream of changes."""
    return Entry(kind, name, **fields).encoded()  # type: ignore[arg-type] # its own check


def file(name: bytes, content: bytes = b"x", mode: int = 0o644) -> bytes:
    """A file in it."""
    return told(R.FILE, name, mode=mode, size=len(content)) + segment(len(content)) + content


def million() -> Iterator[bytes]:
    """More entries than anybody wants."""
    for number in range(1_000_000):
        yield file(b"%d" % number)


CHANGES: dict[str, Callable[[], Iterable[bytes]]] = {
    "up": lambda: [file(b"../evil")],
    "absolute": lambda: [file(b"/evil")],
    "inside": lambda: [file(b"a/../../evil")],
    "zero": lambda: [file(b"a\0b")],
    "device": lambda: [told(R.UNSUPPORTED, b"null", mode=stat.S_IFCHR | 0o666)],
    "git": lambda: [told(R.FOLDER, b".GIT", mode=0o755), file(b".GIT/config", b"[core] fsmonitor = evil")],
    "bare": lambda: [told(R.FOLDER, name, mode=0o755) for name in (b"r", b"r/refs", b"r/objects")] + [file(b"r/HEAD")],
    "link": lambda: [told(R.LINK, b"l", target=b"/etc/passwd")],
    "through": lambda: [told(R.LINK, b"l", target=b"."), file(b"l/evil")],
    "set-id": lambda: [file(b"s", mode=0o4755)],
    "bomb": lambda: [told(R.FILE, b"b", mode=0o644, size=1 << 40) + segment(1 << 40, hole=True)],
    "million": million,
    "root": lambda: [told(R.ROOT, b"7"), file(b"evil")],
    "twice": lambda: [file(b"x"), file(b"x", b"y")],
    "unsaid": lambda: [told(R.FILE, b"x", mode=0o644, size=1 << 20) + segment(5) + b"12345"],
    "hidden": lambda: [told(R.DELETED, b".kept-back")],
    "root-link": lambda: [told(R.DELETED, b"a"), told(R.LINK, b"", target=b".ssh")],
    "typed": lambda: [file(b"s", mode=0o100644)],
    "silent": list,
}


def changes(agent: Lies, records: Iterable[bytes]) -> None:
    """Claim the program's end, and then these changes of the first root, at the host's pace."""
    agent.end()
    number = agent.open(Stream.CHANGES)
    for record in itertools.chain([told(R.ROOT, b"0")], records, [told(R.END, b"")]):
        if not agent.link.streams.is_open(number):  # the host wants no more
            break
        rest = record
        while rest and agent.link.streams.is_open(number):
            window = agent.link.streams.window(number)
            if window:
                rest = rest[agent.link.streams.send(number, rest[:window]) :]
            if not window or agent.link.pending() > 1 << 16:
                agent.connection.flush()
                for _ in agent.connection.read() or ():
                    pass
    agent.link.streams.finish(number)
    agent.close()


DEEDS = {
    **{f"changes-{name}": lambda agent, made=made: changes(agent, made()) for name, made in CHANGES.items()},
    "mute": lambda _agent: for_ever(),
    "garbage": lambda agent: pour(agent.connection.fd, os.urandom(65536)),
    "window": flood_output,
    "status": lambda agent: agent.end_and_close(wait_status=0x137F),
    "failed": lambda agent: fail(agent, 0),
    "unstarted": lambda agent: fail(agent, 1),
    "json": lambda agent: message(agent, Denied, b'[1,"kernel","x",NaN,"",false,1]'),
    "denial": one_denial,
    "ok": lambda agent: agent.end_and_close(),
    "longer": lambda agent: lie_about_file(agent, 10, 20),
    "shorter": lambda agent: lie_about_file(agent, 20, 10),
    "unsent": lambda agent: lie_about_file(agent, 10, 0),
    "endless": endless_file,
    "withheld": lambda agent: agent.end(),
    "changes": lambda agent: agent.open(Stream.CHANGES),
    "closed": closed_twice,
    "more": after_the_end,
    "abort": abort_all,
}
# Those that do not claim that the program runs.
UNSTARTED = {
    "unready": lambda _agent: for_ever(),
    "early": lambda agent: agent.raw_open(1, Stream.STDOUT, 1),
    "early-exit": lambda agent: agent.raw_message(EXITED),
}
