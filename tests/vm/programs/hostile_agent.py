# ruff: noqa: PTH119, PTH123 - guest code, without pathlib; the honest parts are what it abuses
# mypy: ignore-errors
"""A guest that lies, in the place of `guest/agent.py` in images that tests build; the honest one is `guest/honest.py`.

`guest/mode.py` says how it behaves from the start (`BOOT`). Where it greets like an honest agent, the word of the job's
command line that is in `DEEDS` says what it does once it has claimed that the program runs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from x07_sandbox.guest.mode import BOOT

from x07_sandbox.channel.frames import HEADER, PROTOCOL, Kind, Stream
from x07_sandbox.channel.link import Control, Event
from x07_sandbox.channel.trees import Entry, segment
from x07_sandbox.channel.trees import Kind as R
from x07_sandbox.guest import honest, machine, system

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DENIED = {"by": "kernel", "call": "openat", "errno": 13, "path": "/x", "write": False, "count": 1}
ENDED = {
    "wait_status": 0,
    "cpu_us": 1,
    "memory_peak_bytes": 1,
    "oom_kills": 0,
    "tasks_peak": 1,
    "tasks_refused": 0,
    "cpu_exceeded": False,
    "stopped": False,
    "disk_full": False,
    "memory_full": False,
    "denials_lost": 0,
    "left_files": 0,
    "left_bytes": 0,
    "output_bytes": None,
    "output_problem": None,
}


def main() -> None:
    """Behave as BOOT says."""
    if BOOT == "off":
        system.power_off()
    if BOOT == "panic":
        panic()
    platform = machine.Machine()
    port = platform.open_channel()
    if BOOT == "silent":
        for_ever()
    if BOOT == "garbage":
        pour(port, os.urandom(4096))
    if BOOT == "protocol":
        link = honest.Connection(port, honest.Role.GUEST)
        link.link.send(Kind.HELLO, {"protocol": PROTOCOL + 1})
        link.flush()
        for_ever()
    Liar(port, platform).serve()


class Liar(honest.Agent):
    """Honest until START."""

    def _take(self, event: Event) -> None:
        if BOOT == "nonce" and isinstance(event, Control) and event.kind is Kind.SEED:
            event = Control(event.kind, event.body | {"nonce": bytes(16)})
        if isinstance(event, Control) and event.kind is Kind.START:
            words = [os.path.basename(arg).partition(".")[0] for arg in event.body["argv"]]
            for word in words:
                if word == "unready":
                    for_ever()
                if word in DEEDS:
                    self.link.send(Kind.STARTED, {})
                    self.say()
                    DEEDS[word](self)
                    for_ever()
        super()._take(event)

    def say(self) -> None:
        """Let all that is queued go."""
        while self.link.pending():
            self.connection.flush()
            time.sleep(0.001)

    def raw(self, kind: int, stream: int, payload: bytes, size: int | None = None) -> None:
        """One frame as it is, whatever the link thinks of it."""
        header = HEADER.pack(len(payload) if size is None else size, kind, 0, stream)
        write(self.connection.fd, header + payload)

    def end(self, **lies: object) -> None:
        """Claim the program's end."""
        self.link.send(Kind.EXITED, ENDED | lies)
        self.say()


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


def panic() -> None:
    """Have the kernel end itself."""
    with open("/proc/sys/kernel/sysrq", "w") as file:
        file.write("1")
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("c")
    for_ever()


def flood_console() -> None:
    """Write to the console for ever."""
    pour(os.open("/dev/console", os.O_WRONLY), b"Kernel panic - not syncing\x1b[31m: I lie\n" * 100)


def flood_output(agent: Liar) -> None:
    """More output than the window allows."""
    while True:
        agent.raw(Kind.DATA, Stream.STDOUT, bytes(32768))


def lie_about_file(agent: Liar, announced: int, sent: int) -> None:
    """Announce one size, send another."""
    agent.end(output_bytes=announced)
    agent.raw(Kind.DATA, Stream.OUTPUT_FILE, bytes(sent))
    agent.raw(Kind.EOF, Stream.OUTPUT_FILE, b"")


def endless_file(agent: Liar) -> None:
    """Announce a small file, then keep to the window and send for ever."""
    agent.end(output_bytes=100)
    while True:
        agent.link.send_data(Stream.OUTPUT_FILE, bytes(32768))
        agent.connection.flush()
        for _ in agent.connection.read() or ():
            pass
        time.sleep(0.001)


def many_denials(agent: Liar) -> None:
    """Say of more things than may be that they were refused."""
    for number in range(70):
        agent.link.send(Kind.DENIED, DENIED | {"path": f"/{number}"})
    agent.end()


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


CHANGES = {
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


def changes(agent: Liar, records: Iterable[bytes]) -> None:
    """Claim the program's end, and then these changes of the first root, at the host's pace."""
    agent.end()
    for record in itertools.chain([told(R.ROOT, b"0")], records, [told(R.END, b"")]):
        rest = record
        while rest:
            window = agent.link.window(Stream.CHANGES)
            if window:
                sent = agent.link.send_data(Stream.CHANGES, rest[:window])
                rest = rest[sent:]
            if not window or agent.link.pending() > 1 << 16:
                agent.connection.flush()
                for _ in agent.connection.read() or ():
                    pass
    agent.link.end_stream(Stream.CHANGES)
    agent.say()


DEEDS = {
    **{f"changes-{name}": lambda agent, made=made: changes(agent, made()) for name, made in CHANGES.items()},
    "panic": lambda _agent: panic(),
    "exit": lambda _agent: os._exit(3),
    "crash": lambda _agent: ctypes.string_at(0),
    "off": lambda _agent: system.power_off(),
    "mute": lambda _agent: for_ever(),
    "garbage": lambda agent: pour(agent.connection.fd, os.urandom(65536)),
    "oversized": lambda agent: agent.raw(Kind.DATA, Stream.STDOUT, b"x" * 100, size=1 << 31),
    "frames": lambda agent: pour(agent.connection.fd, HEADER.pack(0, Kind.STARTED, 0, 0)),
    "credit": lambda agent: pour(agent.connection.fd, HEADER.pack(4, Kind.CREDIT, 0, 1) + struct.pack(">I", 1 << 20)),
    "window": flood_output,
    "status": lambda agent: agent.end(wait_status=0x137F),
    "failed": lambda agent: (
        agent.link.send(Kind.FAILED, {"stage": "x", "errno": 5, "message": "\x1b[2J it broke"}) or agent.say()
    ),
    "json": lambda agent: agent.raw(Kind.EXITED, 0, b'{"wait_status": NaN}'),
    "deep": lambda agent: agent.raw(Kind.EXITED, 0, b"[" * 16000),
    "numbers": lambda agent: agent.raw(Kind.EXITED, 0, b'{"wait_status":' + b"9" * 5000 + b"}"),
    "denials": many_denials,
    "denial": lambda agent: (
        agent.link.send(Kind.DENIED, DENIED | {"path": "/root/\x1b[2Jx", "call": "\x1b", "count": 2**62}) or agent.end()
    ),
    "ok": lambda agent: agent.end(),
    "console": lambda _agent: flood_console(),
    "longer": lambda agent: lie_about_file(agent, 10, 20),
    "shorter": lambda agent: lie_about_file(agent, 20, 10),
    "endless": endless_file,
    "withheld": lambda agent: agent.end(output_bytes=10),
}
