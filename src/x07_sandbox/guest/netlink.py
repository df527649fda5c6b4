"""Netlink, as far as the relay needs it: addresses and routes (rtnetlink(7)), and held packets (nfnetlink_queue).

Numbers are those of linux/rtnetlink.h and linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_ERROR: Final = struct.Struct("=i")
_ERROR_TYPE: Final = 2
_REQUEST_ACK: Final = 0x1 | 0x4
_CREATE: Final = 0x400

_NEW_ADDRESS: Final = 20
_NEW_ROUTE: Final = 24
_IFA_LOCAL: Final = 2
_RTA_DESTINATION: Final = 1
_RTA_OIF: Final = 4
_RTA_PRIORITY: Final = 6
_RTA_SOURCE: Final = 7
_TABLE_MAIN: Final = 254
_STATIC: Final = 4
_SCOPE_HOST: Final = 254
_LOCAL: Final = 2
_PROHIBIT: Final = 8
_LAST_PRIORITY: Final = 1024

_NETFILTER: Final = 12
_QUEUE: Final = 3 << 8
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_CFG_COMMAND, _CFG_PARAMETERS, _CFG_LENGTH = 1, 2, 3
_BIND: Final = 1
_COPY_PACKET: Final = 2
_COPY_BYTES: Final = 64  # the headers
_PACKET_HEADER, _VERDICT_HEADER, _MARK, _PAYLOAD = 1, 2, 3, 10
_HELD_MAX: Final = 512
_READ: Final = 65536
_ACCEPT: Final = 1
_TCP: Final = 6
_IPV4_HEADER: Final = 20
_TCP_PORTS: Final = 4


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def _request(sock: socket.socket, kind: int, flags: int, body: bytes) -> None:
    """One request and its answer. Raises OSError with the kernel's error."""
    sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_ACK | flags, 1, 0) + body)
    answer = sock.recv(_READ)
    number = -_ERROR.unpack_from(answer, _HEADER.size)[0]
    if _HEADER.unpack_from(answer)[1] != _ERROR_TYPE or number:
        raise OSError(number, os.strerror(number), "netlink")


class Routes:
    """Addresses and routes on `lo` of the current network namespace."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._lo = socket.if_nametoindex("lo")

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def add_address(self, address: str) -> None:
        """Give `lo` an address more. Raises OSError."""
        body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, _SCOPE_HOST, self._lo)
        _request(self._sock, _NEW_ADDRESS, _CREATE, body + _attribute(_IFA_LOCAL, socket.inet_aton(address)))

    def deliver_here(self, network: str, source: str) -> None:
        """Deliver what is for *network* (CIDR) to this machine's own stack; programs send from *source*."""
        address, _, bits = network.partition("/")
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, int(bits), 0, 0, _TABLE_MAIN, _STATIC, _SCOPE_HOST, _LOCAL, 0)
        body += _attribute(_RTA_DESTINATION, socket.inet_aton(address)) if int(bits) else b""
        body += _attribute(_RTA_OIF, struct.pack("=I", self._lo)) + _attribute(_RTA_SOURCE, socket.inet_aton(source))
        _request(self._sock, _NEW_ROUTE, _CREATE, body)

    def refuse_the_rest(self) -> None:
        """Answer EACCES at once to what no other route is for."""
        body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, _TABLE_MAIN, _STATIC, 0, _PROHIBIT, 0)
        _request(self._sock, _NEW_ROUTE, _CREATE, body + _attribute(_RTA_PRIORITY, struct.pack("=I", _LAST_PRIORITY)))


class Held(NamedTuple):
    """A packet that waits for a verdict: the first one of a connection. ends: (address, port) of source and target."""

    number: int
    source: tuple[str, int]
    target: tuple[str, int]


class HeldPackets:
    """The packets that rules send to queue 0 in the current network namespace."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
        self._configure(_CFG_COMMAND, struct.pack(">BBH", _BIND, 0, socket.AF_INET))
        self._configure(_CFG_PARAMETERS, struct.pack(">IB", _COPY_BYTES, _COPY_PACKET))
        self._configure(_CFG_LENGTH, struct.pack(">I", _HELD_MAX))
        self._sock.setblocking(False)  # noqa: FBT003 - it takes no names

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._sock.fileno()

    def _configure(self, kind: int, data: bytes) -> None:
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, 0) + _attribute(kind, data)
        _request(self._sock, _QUEUE | _CONFIG, 0, body)

    def read(self) -> Iterator[Held]:
        """What has come, as far as it is the start of a TCP connection over IPv4."""
        try:
            data = self._sock.recv(_READ)
        except (BlockingIOError, OSError):  # the kernel had no room for all (ENOBUFS): those are sent again
            return
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                return
            if kind == _QUEUE | _PACKET and (held := _held(data[at + _HEADER.size + 4 : at + length])) is not None:
                yield held
            at += length + -length % 4

    def release(self, number: int, mark: int) -> None:
        """Let a packet go on, with a mark for the rules that come later."""
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, 0)
        body += _attribute(_VERDICT_HEADER, struct.pack(">II", _ACCEPT, number))
        body += _attribute(_MARK, struct.pack(">I", mark))
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), _QUEUE | _VERDICT, 1, 0, 0) + body)


def _held(attributes: bytes) -> Held | None:
    number, packet, at = -1, b"", 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size:
            return None
        value = attributes[at + _ATTRIBUTE.size : at + length]
        if kind == _PACKET_HEADER:
            number = struct.unpack_from(">I", value)[0]
        elif kind == _PAYLOAD:
            packet = value
        at += length + -length % 4
    size = (packet[0] & 15) * 4 if packet else 0
    if number < 0 or size < _IPV4_HEADER or len(packet) < size + _TCP_PORTS or packet[9] != _TCP:
        return None
    source_port, port = struct.unpack_from(">HH", packet, size)
    return Held(number, (socket.inet_ntoa(packet[12:16]), source_port), (socket.inet_ntoa(packet[16:20]), port))
