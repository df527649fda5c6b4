"""Measure the network from inside a guest. As process 1 of a VM, configure the network card first.

    network_guest.py HOST

Prints `stage NAME` lines while it works, and one line of JSON at the end. Uses only the standard library.
`bench.network` runs this file with `x07 run`, and instead of the agent in VMs that have a network card.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import selectors
import socket
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Final

PREFIX: Final = "x07-bench: "  # marks the JSON line, because the console also prints kernel messages
CARD: Final = "bench.card="  # on the kernel's command line: address, prefix length, router, resolver, MTU
ECHO, DISCARD, CHARGEN, HTTP = 7, 9, 19, 8000
REST_S: Final = 1.5
WARM_UP_S: Final = 1.0
FLOW_S: Final = 4.0
CONNECTS: Final = 30
LOOK_UPS: Final = 10
FLOWS: Final = 100
FLOW_BYTES: Final = 1 << 20
MANY_S: Final = 120.0
BLOCK: Final = bytes(64 * 1024)
MIB: Final = 1 << 20
MODULES: Final = "/run/x07/modules"
_FINIT_MODULE: Final = {"x86_64": 313, "aarch64": 273}
_POWER_OFF: Final = 0x4321FEDC
_NOBODY: Final = 65534


def measure(name: str) -> dict[str, object]:
    """Measure the network to the laboratory's servers."""
    stage("rest")
    time.sleep(REST_S)
    stage("connect")
    lookups = [lookup_ms(name) for _ in range(LOOK_UPS)]
    address = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    connects, echoes = zip(*(connect_ms(str(address), b"\1") for _ in range(CONNECTS)), strict=True)
    _, texts = zip(*(connect_ms(str(address), b"x") for _ in range(CONNECTS)), strict=True)
    found: dict[str, object] = {
        "look_up_ms": statistics.median(lookups),
        "connect_ms": statistics.median(connects),
        "connect_p90_ms": statistics.quantiles(connects, n=10)[-1],
        "echo_ms": statistics.median(echoes),
        "echo_text_ms": statistics.median(texts),
    }
    stage("up")
    upload(str(address), WARM_UP_S)
    found["up"] = upload(str(address), FLOW_S)
    stage("down")
    found["down"] = download(str(address), FLOW_S)
    stage("many")
    found |= Downloads(name, str(address)).run()
    stage("done")
    return found


def stage(name: str) -> None:
    """Tell the host which stage begins."""
    print(f"stage {name}", flush=True)


def lookup_ms(name: str) -> float:
    """Return the milliseconds for resolving a name."""
    started = time.monotonic()
    socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    return (time.monotonic() - started) * 1000


def connect_ms(address: str, byte: bytes) -> tuple[float, float]:
    """Return the ms until connect() returns and until *byte* is echoed. A letter could start an HTTP request."""
    with socket.socket() as sock:
        started = time.monotonic()
        sock.connect((address, ECHO))
        connected = time.monotonic()
        sock.send(byte)
        sock.recv(1)
        return (connected - started) * 1000, (time.monotonic() - started) * 1000


def upload(address: str, seconds: float) -> float:
    """Return the MiB/s of one upload. The server closes the connection after it has read everything."""
    count = 0
    with socket.create_connection((address, DISCARD)) as sock:
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            count += sock.send(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
        return count / MIB / (time.monotonic() - started)


def download(address: str, seconds: float) -> float:
    """Return the MiB/s of one download, after its first second."""
    buffer, count = bytearray(256 * 1024), 0
    with socket.create_connection((address, CHARGEN)) as sock:
        warm = time.monotonic() + WARM_UP_S
        while time.monotonic() < warm:
            sock.recv_into(buffer)
        started = now = time.monotonic()
        while now < started + seconds:
            count += sock.recv_into(buffer)
            now = time.monotonic()
        return count / MIB / (now - started)


class Downloads:
    """Many downloads of the same size at once, in one thread."""

    def __init__(self, name: str, address: str) -> None:
        self.request = f"GET /bytes/{FLOW_BYTES} HTTP/1.1\r\nHost: {name}:{HTTP}\r\nConnection: close\r\n\r\n".encode()
        self.address = address
        self.selector = selectors.DefaultSelector()
        self.got: dict[socket.socket, int] = {}
        self.ended: dict[socket.socket, float] = {}
        self.errors: list[str] = []
        self.at_first_end: list[int] = []
        self.buffer = bytearray(256 * 1024)

    def run(self) -> dict[str, object]:
        """Start all downloads and wait for them. Return the number of complete ones, speed and fairness."""
        self.started = time.monotonic()
        for _ in range(FLOWS):
            sock = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex((self.address, HTTP))
            self.got[sock] = 0
            self.selector.register(sock, selectors.EVENT_WRITE)
        while self.selector.get_map() and time.monotonic() < self.started + MANY_S:
            for key, mask in self.selector.select(1.0):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    self.serve(key.fileobj, mask)
                except OSError as exc:
                    self.errors.append(str(exc))
                    self.end(key.fileobj)
        seconds = [ended - self.started for ended in self.ended.values()]
        complete = sum(count >= FLOW_BYTES for count in self.got.values())
        return {
            "complete": complete,
            "errors": sorted(set(self.errors)),
            "many": sum(self.got.values()) / MIB / max(seconds, default=MANY_S),
            "first_s": min(seconds, default=0.0),
            "last_s": max(seconds, default=MANY_S),
            # Bytes of the slowest divided by those of the fastest, at the time when the fastest was complete.
            "fairness": min(self.at_first_end, default=0) / max(self.at_first_end, default=1),
        }

    def serve(self, sock: socket.socket, mask: int) -> None:
        """Continue one download. Raises OSError."""
        if mask & selectors.EVENT_WRITE:
            if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(number, os.strerror(number))
            sock.send(self.request)
            self.selector.modify(sock, selectors.EVENT_READ)
        elif count := sock.recv_into(self.buffer):
            self.got[sock] += count
            if self.got[sock] >= FLOW_BYTES:  # the count includes the small HTTP header
                self.end(sock)
        else:
            self.errors.append("ended early")
            self.end(sock)

    def end(self, sock: socket.socket) -> None:
        """Close the connection of one download."""
        self.selector.unregister(sock)
        sock.close()
        if self.got[sock] >= FLOW_BYTES:
            self.ended[sock] = time.monotonic()
            if not self.at_first_end:
                self.at_first_end = list(self.got.values())


# ------------------------------------------------------------------------------------------ in a VM with a network card


def bring_up_card(words: str) -> None:
    """Load the modules, and configure address, route and resolver."""
    libc = ctypes.CDLL(None, use_errno=True)
    for path in sorted(Path(MODULES).iterdir()):  # names begin with their position in the load order
        if path.name.startswith("card-"):
            with path.open("rb") as file:
                if libc.syscall(_FINIT_MODULE[os.uname().machine], file.fileno(), b"", 0):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path.name)
    address, bits, router, resolver, mtu = words.split(",")
    deadline = time.monotonic() + 10
    while not (cards := [name for _, name in socket.if_nameindex() if name != "lo"]):
        if time.monotonic() > deadline:
            raise OSError("there is no network card")
        time.sleep(0.01)
    name = cards[0].encode()
    mask = (0xFFFFFFFF << (32 - int(bits)) & 0xFFFFFFFF).to_bytes(4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _request(sock, 0x8914, b"lo", struct.pack("H", 0x41))  # netdevice(7): SIOCSIFFLAGS, up and running
        _request(sock, 0x8916, name, _sockaddr(socket.inet_aton(address)))  # SIOCSIFADDR
        _request(sock, 0x891C, name, _sockaddr(mask))  # SIOCSIFNETMASK
        _request(sock, 0x8922, name, struct.pack("i", int(mtu)))  # SIOCSIFMTU
        _request(sock, 0x8914, name, struct.pack("H", 0x41))
        # linux/route.h: rtentry, RTF_UP and RTF_GATEWAY; SIOCADDRT
        zero = _sockaddr(bytes(4))
        route = struct.pack("@L16s16s16sHhLPhPLLH", 0, zero, _sockaddr(socket.inet_aton(router)), zero, 3, 0, *[0] * 7)
        fcntl.ioctl(sock, 0x890B, route)
    Path("/run/resolv.conf").write_text(f"nameserver {resolver}\n", encoding="ascii")
    if libc.mount(b"/run/resolv.conf", b"/etc/resolv.conf", None, 4096, None):  # MS_BIND
        raise OSError(ctypes.get_errno(), "mount of resolv.conf")


def _request(sock: socket.socket, number: int, name: bytes, data: bytes) -> None:
    """Change one setting of a network card, see netdevice(7). Raises OSError."""
    fcntl.ioctl(sock, number, struct.pack("16s24s", name, data))


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, address)


def run_as_init() -> None:
    """Measure in an unprivileged child, as a program would run, and power off."""
    try:
        words = Path("/proc/cmdline").read_text(encoding="ascii").split()
        setting = next(word.removeprefix(CARD) for word in words if word.startswith(CARD))
        bring_up_card(setting)
        pid = os.fork()
        if pid == 0:
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
            print(PREFIX + json.dumps(measure("raw.lab.example")), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    finally:
        time.sleep(0.2)  # until the console has printed everything
        ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    if os.getpid() == 1:
        run_as_init()
    else:
        print(PREFIX + json.dumps(measure(sys.argv[1])), flush=True)
