#!/usr/bin/env python3
"""A STAND-IN for x07-vz-helper: it runs QEMU on Linux, and never Apple's Virtualization framework.

It has the command line, streams and exit codes of docs/backends/vz.md, so it shows what x07's `vz` backend does with a
helper, and nothing of what a Mac does. The CPU is emulated, of the kernel's architecture (QEMU's q35 or virt, with
virtio devices on PCI), and QEMU also starts the ELF kernel of an image for x86_64. Its `preflight` says that macOS is
"stand-in".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

ENDED, FAILED, REFUSED, DEADLINE = 0, 1, 2, 124
MIB = 1024 * 1024
QEMU = {"x86_64": ("q35", "max,-erms,-fsrm"), "aarch64": ("virt", "max,pauth-impdef=on")}
MAGIC = ((0, b"\x7fELF", "x86_64"), (0x202, b"HdrS", "x86_64"), (56, b"ARMd", "aarch64"))  # of kernels
NUMBERS = frozenset({"mem-bytes", "cpus", "wall-ms", "net-fd", "console-bytes"})
REQUIRED = ("kernel", "command-line", "root", "scratch-from", "scratch", "mem-bytes", "wall-ms")
KNOWN = frozenset({*REQUIRED, *NUMBERS, "initrd", "program"})
LOOK_AGAIN_S = 0.2


def say(message: str) -> None:
    """Write one line to stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"x07-vz-helper (stand-in): {message}\n".encode())


def refuse(why: str) -> NoReturn:
    """End this process, because something does not allow a start."""
    say(why)
    sys.exit(REFUSED)


def options_of(words: list[str]) -> dict[str, str]:
    """Return the options. Each takes a value and may appear once."""
    found: dict[str, str] = {}
    for flag, value in zip(words[::2], [*words[1::2], None][: len(words[::2])], strict=True):
        name = flag.removeprefix("--")
        if value is None or name not in KNOWN or flag == name or name in found:
            refuse(f"{flag} is unknown, appears twice or needs a value")
        if name in NUMBERS and not (value.isascii() and value.isdigit()):
            refuse(f"{flag} must be a number")
        found[name] = value
    if missing := [name for name in REQUIRED if name not in found]:
        refuse(f"--{missing[0]} is missing")
    return found


def copy(from_fd: int, to_fd: int, at_end: Callable[[], object], most: int | None = None) -> None:
    """Copy a stream until one side ends, and then call *at_end*. most: how much to write; the rest is discarded."""
    with contextlib.suppress(OSError):
        while data := os.read(from_fd, 65536):
            view = memoryview(data)[:most]
            most = None if most is None else most - len(view)
            while view:
                view = view[os.write(to_fd, view) :]
    at_end()


def qemu_argv(arch: str, given: dict[str, str], channel_fd: int, net_fd: int | None) -> list[str]:
    """Return QEMU's command line, with the devices that the helper gives a machine on a Mac."""
    machine, cpu = QEMU[arch]
    argv = [f"/usr/bin/qemu-system-{arch}", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-M", machine, "-cpu", cpu, "-accel", "tcg,thread=single", "-smp", given.get("cpus", "1")]
    argv += ["-m", f"{-(-int(given['mem-bytes']) // MIB)}M", "-kernel", given["kernel"]]
    argv += ["-initrd", given["initrd"]] if "initrd" in given else []
    argv += ["-append", given["command-line"]]
    for name in ("root", "scratch", "program"):
        if name in given:
            path, mode = given[name].replace(",", ",,"), "off,cache=unsafe" if name == "scratch" else "on"
            argv += ["-drive", f"file={path},format=raw,if=none,id={name},file.locking=off,readonly={mode}"]
            argv += ["-device", f"virtio-blk-pci,drive={name},serial=x07{name}"]
    argv += ["-chardev", "stdio,id=console,signal=off"]
    argv += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"]
    argv += ["-device", "virtio-serial-pci,id=ports"]
    for number, (name, fd) in enumerate((("x07.0", channel_fd), ("x07.net", net_fd)), 1):
        if fd is not None:
            argv += ["-chardev", f"socket,id=port{number},fd={fd}"]
            argv += ["-device", f"virtserialport,bus=ports.0,chardev=port{number},nr={number},name={name}"]
    return [*argv, "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]


class Machine:
    """One virtual machine, which ends with this process. The first reason to end counts."""

    def __init__(self, arch: str, given: dict[str, str]) -> None:
        self._given = given
        self._ending = threading.Lock()
        self._until = time.monotonic() + int(given["wall-ms"]) / 1000
        self._parent = os.getppid()
        near, far = socket.socketpair()
        self._channel = near.detach()
        net_fd = int(given["net-fd"]) if "net-fd" in given else None
        net = None if net_fd is None else socket.socketpair()
        for fd in (0, 1, *(() if net_fd is None else (net_fd,))):
            os.set_blocking(fd, True)
        passed = [far.detach(), *(() if net is None else (net[1].detach(),))]
        argv = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--", *qemu_argv(arch, given, passed[0], (*passed, None)[1])]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        self._qemu = subprocess.Popen(argv, stdin=none, stdout=pipe, stderr=subprocess.STDOUT, pass_fds=passed)
        for fd in passed:
            os.close(fd)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: self.end(128 + number, f"signal {number}"))
        assert self._qemu.stdout is not None
        self._start(self._qemu.stdout.fileno(), 2, lambda: None, int(given.get("console-bytes", 65536)))
        closed = "the caller closed the channel"
        self._start(0, self._channel, lambda: self.end(ENDED, closed))
        self._output = self._start(self._channel, 1, lambda: None)
        if net is not None and net_fd is not None:
            near_net = net[0].detach()
            self._start(net_fd, near_net, lambda: None)
            self._start(near_net, net_fd, lambda: None)

    def _start(self, *words: object) -> threading.Thread:
        thread = threading.Thread(target=copy, args=words, daemon=True)
        thread.start()
        return thread

    def watch(self) -> NoReturn:
        """Wait for a reason to end."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._qemu.wait(LOOK_AGAIN_S)
                self._output.join()  # what the guest wrote before it powered off
                self.end(FAILED if status else ENDED, f"QEMU ended with status {status}")
            if time.monotonic() > self._until:
                self.end(DEADLINE, "the deadline has passed")
            if os.getppid() != self._parent:
                self.end(ENDED, "the caller exited")

    def end(self, code: int, why: str) -> None:
        """Kill the machine, remove its scratch disk and exit. A later call does nothing."""
        if not self._ending.acquire(blocking=False):
            return
        say(why)
        self._qemu.kill()
        self._qemu.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._given["scratch"])  # noqa: PTH108 - a text
        os._exit(code)


def run(words: list[str]) -> NoReturn:
    """Run one machine."""
    given = options_of(words)
    try:
        with open(given["kernel"], "rb") as kernel:  # noqa: PTH123 - a text
            head = kernel.read(1024)
    except OSError as exc:
        refuse(f"cannot read the kernel: {exc.strerror}")
    arch = next((name for at, magic, name in MAGIC if head[at : at + len(magic)] == magic), None)
    if arch is None:
        refuse(f"cannot start the kernel {given['kernel']}")
    if os.path.lexists(given["scratch"]):
        refuse(f"{given['scratch']} exists")
    clone = ["/usr/bin/cp", "--sparse=always", "--reflink=auto", "--", given["scratch-from"], given["scratch"]]
    if subprocess.run(clone, stdin=subprocess.DEVNULL, check=False).returncode:
        refuse("cannot clone the scratch disk")
    Machine(arch, given).watch()


def preflight() -> None:
    """Print what this stand-in can do."""
    found: dict[str, object] = {"schema_version": "x07.vz.preflight@0.1.0", "macos": "stand-in"}
    found |= {
        "arch": os.uname().machine,
        "supported": True,
        "entitled": True,
        "memory_bytes": [128 * MIB, 1 << 40],
        "cpus": [1, 8],
        "ok": True,
    }
    os.write(1, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["preflight"]:
        preflight()
    elif sys.argv[1:2] == ["run"]:
        run(sys.argv[2:])
    else:
        refuse("usage: x07-vz-helper preflight | run ...")
