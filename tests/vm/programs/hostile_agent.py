# ruff: noqa: PTH119, PTH123 - guest code, without pathlib; the honest parts are what it abuses
# mypy: ignore-errors
"""A guest that lies, in the place of `guest/agent.py` in images that tests build; the honest one is `guest/honest.py`.

The kernel's command line says how it behaves from the start (`BOOT`). Where it greets like an honest agent, the word of
the job's command line that is in `DEEDS` (here and in lies.py) says what it does once it has claimed that the program
runs.
"""

from __future__ import annotations

import ctypes
import os

from x07_sandbox.channel import messages, streams
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Close, Exec, Hello, Seed, Started
from x07_sandbox.channel.streams import Event, Role
from x07_sandbox.guest import honest, lies, machine, system

with open("/proc/cmdline") as words:
    BOOT = words.read().partition("x07.lie=")[2].strip()


def main() -> None:
    """Behave as BOOT says."""
    if BOOT == "off":
        system.power_off()
    if BOOT == "panic":
        panic()
    platform = machine.Machine()
    port = platform.open_channel()
    if BOOT == "silent":
        lies.for_ever()
    if BOOT == "garbage":
        lies.pour(port, os.urandom(4096))
    if BOOT == "protocol":
        link = honest.Connection(port, Role.GUEST)
        link.link.send(Hello(messages.PROTOCOL + 1))
        link.flush()
        lies.for_ever()
    Liar(port, platform).serve()


class Liar(lies.Lies, honest.Agent):
    """Honest until CLOSE, which the host sends right after EXEC."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self.deed = ""
        self.asked = False  # whether CLOSE has come
        self.of_host: list[int] = []  # streams that the host has opened

    def _take(self, event: messages.Message | Event) -> None:
        if BOOT == "nonce" and isinstance(event, Seed):
            event = event._replace(nonce=bytes(16))
        if isinstance(event, Event) and event.type == streams.OPEN:
            self.of_host.append(event.stream)
        if self.deed and isinstance(event, Event) and event.code == Stream.STDIN:
            return  # the honest agent would abort it
        if isinstance(event, Exec):
            words = (os.path.basename(arg).partition(".")[0] for arg in event.argv)
            self.deed = next((word for word in words if word in DEEDS or word in lies.UNSTARTED), "")
            if self.deed:
                return  # the honest agent never hears of the command
        if isinstance(event, Close) and self.deed:
            self.asked = True
            return
        super()._take(event)

    def _turn(self) -> bool:
        going = super()._turn()
        if self.asked:
            if self.deed in DEEDS:
                self.link.send(Started(1))
                self.say()
            {**DEEDS, **lies.UNSTARTED}[self.deed](self)
            lies.for_ever()
        return going


def panic() -> None:
    """Have the kernel end itself."""
    with open("/proc/sys/kernel/sysrq", "w") as file:
        file.write("1")
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("c")
    lies.for_ever()


def flood_console() -> None:
    """Write to the console for ever."""
    lies.pour(os.open("/dev/console", os.O_WRONLY), b"Kernel panic - not syncing\x1b[31m: I lie\n" * 100)


DEEDS = lies.DEEDS | {
    "panic": lambda _agent: panic(),
    "exit": lambda _agent: os._exit(3),
    "crash": lambda _agent: ctypes.string_at(0),
    "off": lambda _agent: system.power_off(),
    "console": lambda _agent: flood_console(),
}
