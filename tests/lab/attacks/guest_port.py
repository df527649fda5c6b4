"""Runs in the guest: opens the stream to the gate as root, in place of the relay."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from dataclasses import dataclass, field

HEADER = struct.Struct(">BBHII")
MESSAGE, OPEN, ANSWER, DATA, CREDIT, FIN, RESET, DATAGRAM = range(1, 9)
REFUSAL = 1  # the message
TCP, UDP = 6, 17
PORTS = "/sys/class/virtio-ports"


def mount(source: str, target: str, kind: str) -> None:
    """Mount a file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


def port_path() -> str | None:
    """Return the device of the stream to the gate, created where the program sees it; None if the machine has none."""
    if not os.path.isdir("/sys/class"):  # noqa: PTH112
        mount("sysfs", "/sys", "sysfs")
    for port in sorted(os.listdir(PORTS)) if os.path.isdir(PORTS) else []:  # noqa: PTH112, PTH208
        with open(f"{PORTS}/{port}/name", encoding="ascii") as file:  # noqa: PTH123
            if file.read().strip() != "x07.net":
                continue
        with open(f"{PORTS}/{port}/dev", encoding="ascii") as file:  # noqa: PTH123
            major, minor = map(int, file.read().split(":"))
        if not os.path.exists("/mnt/port"):  # noqa: PTH110
            mount("tmpfs", "/mnt", "tmpfs")  # a file system on which devices work
            os.mknod("/mnt/port", 0o20600, os.makedev(major, minor))
        return "/mnt/port"
    return None


def frame(kind: int, stream: int, payload: bytes = b"", code: int = 0) -> bytes:
    """Return one frame."""
    return HEADER.pack(kind, code, 0, stream, len(payload)) + payload


def asking(stream: int, host: bytes, port: int, transport: int = TCP) -> bytes:
    """Return the frame that asks for a connection."""
    return frame(OPEN, stream, struct.pack(">H", port) + host, transport)


def claim(host: bytes, port: int, transport: int = TCP) -> bytes:
    """Return the message that reports a refusal inside the guest."""
    return frame(MESSAGE, 0, struct.pack(">BH", transport, port) + host, REFUSAL)


@dataclass
class Stream:
    """The data received on one stream. code: of ANSWER; reset: code of RESET."""

    code: int | None = None
    reset: int | None = None
    ended: bool = False
    data: bytearray = field(default_factory=bytearray)
    received: int = 0

    @property
    def over(self) -> bool:
        """Whether the stream has ended."""
        return bool(self.code) or self.reset is not None


class Port:
    """The stream to the gate. lost: the gate has closed it."""

    def __init__(self) -> None:
        path = port_path()
        if path is None:
            raise FileNotFoundError("no stream to the gate")
        # The port is not free at once after a relay was killed.
        for _ in range(200):
            try:
                # Nonblocking, since a gate that does not read must not hang the attack.
                self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
                break
            except OSError:
                time.sleep(0.01)
        else:
            raise OSError("the port stays busy")
        self.last = -1  # the guest uses odd numbers
        self.lost = False
        self.streams: dict[int, Stream] = {}
        self._in = bytearray()

    def write(self, data: bytes, within_s: float = 20.0) -> int:
        """Write what the gate takes in that time and return its size; read meanwhile."""
        view, deadline = memoryview(data), time.monotonic() + within_s
        while view and not self.lost and time.monotonic() < deadline:
            try:
                view = view[os.write(self.fd, view[:32768]) :]
            except BlockingIOError:
                self.read(0.01, out=True)
            except OSError:
                self.lost = True
        return len(data) - len(view)

    def read(self, wait_s: float = 0.0, *, out: bool = False) -> bool:
        """Read once; return whether there was data."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN | (select.POLLOUT if out else 0))
        ready = poll.poll(max(0, round(wait_s * 1000)))
        if not ready or not ready[0][1] & ~select.POLLOUT:
            return False
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.lost = True
            return False
        self._in += data
        at = 0
        while len(self._in) - at >= HEADER.size:
            kind, code, _, stream, length = HEADER.unpack_from(self._in, at)
            if len(self._in) < at + HEADER.size + length:
                break
            self._take(kind, code, stream, bytes(self._in[at + HEADER.size : at + HEADER.size + length]))
            at += HEADER.size + length
        del self._in[:at]
        return True

    def _take(self, kind: int, code: int, stream: int, payload: bytes) -> None:
        known = self.streams.setdefault(stream, Stream())
        if kind == ANSWER:
            known.code = code
        elif kind == RESET:
            known.reset = code
        elif kind == FIN:
            known.ended = True
        elif kind != CREDIT:
            known.received += len(payload)
            if len(known.data) < 4096:
                known.data += payload
            if kind == DATA:
                self.write(frame(CREDIT, stream, struct.pack(">I", len(payload))))

    def open(self, host: bytes, port: int, transport: int = TCP) -> int:
        """Open a stream; return its number."""
        self.last += 2
        self.streams[self.last] = Stream()
        self.write(asking(self.last, host, port, transport))
        return self.last

    def until(self, stream: int, what: str, wait_s: float) -> Stream:
        """Wait until the attribute *what* of a stream is true or not None, or the stream has ended."""
        deadline = time.monotonic() + wait_s
        known = self.streams[stream]
        while time.monotonic() < deadline and not self.lost and not known.over:
            value = getattr(known, what)
            if value is not None and value is not False and value != b"":
                break
            self.read(min(0.1, deadline - time.monotonic()))
        return known

    def quiet(self, wait_s: float) -> None:
        """Read for that time."""
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0 and not self.lost:
            self.read(left)
