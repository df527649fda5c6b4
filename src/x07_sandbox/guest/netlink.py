"""Netlink for the relay: routes (rtnetlink(7)), nftables set elements, held packets (nfnetlink_queue)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_ERROR_TYPE: Final = 2
_REQUEST_ACK: Final = 0x1 | 0x4
_CREATE: Final = 0x400

_NEW_ADDRESS: Final = 20  # linux/rtnetlink.h, from here on
_NEW_ROUTE: Final = 24
_IFA_LOCAL: Final = 2
_NO_DUPLICATES: Final = 2  # IFA_F_NODAD: use an IPv6 address at once, without duplicate detection
_RTA_OIF: Final = 4
_RTA_SOURCE: Final = 7
_TABLE_MAIN: Final = 254
_STATIC: Final = 4
_SCOPE_HOST: Final = 254
_LOCAL: Final = 2

_NETFILTER: Final = 12  # linux/netfilter/nfnetlink_queue.h, from here on
_QUEUE: Final = 3 << 8
_TABLES: Final = 10 << 8  # nf_tables; linux/netfilter/nf_tables.h
_NEW_ELEMENT: Final = 12
_BATCH: Final = (0x10, 0x11)  # begin and end of a transaction
_NESTED: Final = 0x8000
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS_LIST = 1, 2, 3
_ELEMENT, _ELEMENT_VALUE, _ELEMENT_KEY, _ELEMENT_KEY_END = 1, 1, 1, 10
_ELEMENTS_A_MESSAGE: Final = 1000  # their total length is a 16-bit number
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_CFG_COMMAND, _CFG_PARAMETERS, _CFG_LENGTH = 1, 2, 3
_BIND: Final = 1
_COPY_PACKET: Final = 2
_COPY_BYTES: Final = 64  # the headers
_PACKET_HEADER, _VERDICT_HEADER, _MARK, _PAYLOAD = 1, 2, 3, 10
_HELD_MAX: Final = 512
_READ: Final = 65536
_ACCEPT: Final = 1
_NETFILTER_HEADER: Final = 4  # family, version, number of the queue
_V6: Final = 6
_IPV4_HEADER: Final = 20
_IPV6_HEADER: Final = 40
_PORTS: Final = 4


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def _request(sock: socket.socket, kind: int, flags: int, body: bytes) -> None:
    sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_ACK | flags, 1, 0) + body)
    _check_answer(sock.recv(_READ))


def _check_answer(answer: bytes) -> None:
    """Raise OSError unless the answer is an acknowledgement without error."""
    number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
    if _HEADER.unpack_from(answer)[1] != _ERROR_TYPE or number:
        raise OSError(number, os.strerror(number), "netlink")


def deliver_locally(sources: Iterable[str]) -> None:
    """Add one address per family to `lo` in this network namespace, and deliver all packets here. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        lo = socket.if_nametoindex("lo")
        for source in sources:
            family, packed = packed_address(source)
            body = struct.pack("=BBBBI", family, len(packed) * 8, _NO_DUPLICATES, _SCOPE_HOST, lo)
            _request(sock, _NEW_ADDRESS, _CREATE, body + _attribute(_IFA_LOCAL, packed))
            body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _TABLE_MAIN, _STATIC, _SCOPE_HOST, _LOCAL, 0)
            body += _attribute(_RTA_OIF, struct.pack("=I", lo)) + _attribute(_RTA_SOURCE, packed)
            _request(sock, _NEW_ROUTE, _CREATE, body)


def packed_address(address: str) -> tuple[int, bytes]:
    """Return family and bytes of an address. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def add_elements(table: str, name: str, elements: list[tuple[str, str, int]]) -> None:
    """Add (first address, last address, port) elements to a set of the addresses' family. Raises OSError."""
    # Starting nft would cost a clone a tenth of a second.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as sock:
        for at in range(0, len(elements), _ELEMENTS_A_MESSAGE):
            body = struct.pack(">BBH", packed_address(elements[0][0])[0], 0, 0)
            body += _attribute(_ELEMENTS_TABLE, table.encode() + b"\0")
            body += _attribute(_ELEMENTS_SET, name.encode() + b"\0")
            rows = [_element(*row) for row in elements[at : at + _ELEMENTS_A_MESSAGE]]
            body += _attribute(_ELEMENTS_LIST | _NESTED, b"".join(rows))
            kind = _TABLES | _NEW_ELEMENT
            change = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_ACK | _CREATE, 1, 0) + body
            edge = struct.pack(">BBH", socket.AF_UNSPEC, 0, _TABLES >> 8)
            begin, end = (_HEADER.pack(_HEADER.size + len(edge), kind, 1, 0, 0) + edge for kind in _BATCH)
            sock.send(begin + change + end)
            _check_answer(sock.recv(_READ))


def _element(first: str, last: str, port: int) -> bytes:
    ends = [packed_address(address)[1] + struct.pack(">Hxx", port) for address in (first, last)]
    low, high = (_attribute(_ELEMENT_VALUE, end) for end in ends)
    both = _attribute(_ELEMENT_KEY | _NESTED, low) + _attribute(_ELEMENT_KEY_END | _NESTED, high)
    return _attribute(_ELEMENT | _NESTED, both)


class Held(NamedTuple):
    """A packet that waits for a decision: its id (two numbers), its IP protocol, and address and port of both ends."""

    queue: int
    number: int
    transport: int
    source: tuple[str, int]
    target: tuple[str, int]


class HeldPackets:
    """The packets that wait for a decision in some netfilter queues of the current network namespace."""

    def __init__(self, *queues: int) -> None:
        """Bind to these queue numbers. Raises OSError."""
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
        for queue in queues:
            self._configure(queue, _CFG_COMMAND, struct.pack(">BBH", _BIND, 0, socket.AF_INET))
            self._configure(queue, _CFG_PARAMETERS, struct.pack(">IB", _COPY_BYTES, _COPY_PACKET))
            self._configure(queue, _CFG_LENGTH, struct.pack(">I", _HELD_MAX))
        self._sock.setblocking(False)  # noqa: FBT003

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._sock.fileno()

    def _configure(self, queue: int, kind: int, data: bytes) -> None:
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, queue) + _attribute(kind, data)
        _request(self._sock, _QUEUE | _CONFIG, 0, body)

    def read(self) -> Iterator[Held]:
        """Yield the TCP and UDP packets that have arrived."""
        try:
            data = self._sock.recv(_READ)
        except OSError:  # ENOBUFS: packets were dropped, and will be retransmitted
            return
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                return
            if kind == _QUEUE | _PACKET and (held := _held(data[at + _HEADER.size : at + length])) is not None:
                yield held
            at += length + -length % 4

    def release(self, queue: int, number: int, mark: int) -> None:
        """Release a packet with a packet mark, for later nftables rules. Raises OSError if it no longer waits."""
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, queue)
        body += _attribute(_VERDICT_HEADER, struct.pack(">II", _ACCEPT, number))
        body += _attribute(_MARK, struct.pack(">I", mark))
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), _QUEUE | _VERDICT, 1, 0, 0) + body)


def _held(message: bytes) -> Held | None:
    queue = struct.unpack_from(">H", message, 2)[0]
    number, packet, at = -1, b"", _NETFILTER_HEADER
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            return None
        value = message[at + _ATTRIBUTE.size : at + length]
        if kind == _PACKET_HEADER:
            number = struct.unpack_from(">I", value)[0]
        elif kind == _PAYLOAD:
            packet = value
        at += length + -length % 4
    found = _ends(packet)
    return Held(queue, number, *found) if number >= 0 and found is not None else None


def _ends(packet: bytes) -> tuple[int, tuple[str, int], tuple[str, int]] | None:
    """Return transport, source and target of an IP packet. Return None if it is neither TCP nor UDP."""
    if packet[:1] and packet[0] >> 4 == _V6:
        size, family = _IPV6_HEADER, socket.AF_INET6
        transport, addresses = packet[6:7], packet[8:_IPV6_HEADER]
    else:
        size, family = (packet[0] & 15) * 4 if packet else 0, socket.AF_INET
        transport, addresses = packet[9:10], packet[12:_IPV4_HEADER]
    if size < _IPV4_HEADER or len(packet) < size + _PORTS:
        return None
    if transport[0] not in {socket.IPPROTO_TCP, socket.IPPROTO_UDP}:
        return None
    ports = struct.unpack_from(">HH", packet, size)
    half = len(addresses) // 2
    source, target = (socket.inet_ntop(family, one) for one in (addresses[:half], addresses[half:]))
    return transport[0], (source, ports[0]), (target, ports[1])
