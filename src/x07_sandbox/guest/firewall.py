"""The program's network namespace: routes that keep every packet local, and rules that direct packets to the relay.

The boundary is the egress gate, a process on the host, because the guest has no network card. These rules are a second
barrier that denies fast.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.channel import egress
from x07_sandbox.guest.system import JobError

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Network


DNS_PORT: Final = 53
TCP_PORT: Final = 1  # of the relay; a privileged port, so the program cannot bind it
UDP_PORT: Final = 2
TO_ASK: Final = 0  # queue of first packets that wait for the gate's answer
TO_REFUSE: Final = 1  # queue of packets that the policy does not allow: reported, then refused

PASSED: Final = 0x100  # mark of an allowed packet; the other marks in the chain "verdict" are codes of channel/egress

NFT: Final = "/usr/sbin/nft"
_BACKLOG: Final = 512
_TABLE: Final = "x07"

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


class Family(NamedTuple):
    """The parameters of one version of IP.

    number: AF_INET or AF_INET6. source: address of the program's connections. unlisted: an address that no policy can
    list. name, address, own, relay, unreachable: texts used in the rules. level, transparent, original: socket options
    (linux/in.h, linux/in6.h). sockaddr: the part of a sockaddr after its family, which is port and address.
    """

    number: int
    source: str
    unlisted: str
    name: str
    address: str
    own: str
    relay: str
    unreachable: tuple[str, str, str]
    level: int
    transparent: int
    original: int
    sockaddr: struct.Struct


V4: Final = Family(
    number=socket.AF_INET,
    source="192.0.0.8",
    unlisted="192.0.0.9",
    name="ip",
    address="ipv4_addr",
    own="127.0.0.0/8, 192.0.0.8",
    relay="127.0.0.1",
    unreachable=("icmp type host-unreachable", "icmp type net-unreachable", "icmp type admin-prohibited"),
    level=socket.SOL_IP,
    transparent=19,
    original=20,
    sockaddr=struct.Struct(">2xH4s"),
)
V6: Final = Family(
    number=socket.AF_INET6,
    source="fd78:3037::1",
    unlisted="fd78:3037::",
    name="ip6",
    address="ipv6_addr",
    own="::1, fd78:3037::1",
    relay="::1",
    unreachable=("icmpv6 type addr-unreachable", "icmpv6 type no-route", "icmpv6 type admin-prohibited"),
    level=socket.IPPROTO_IPV6,
    transparent=75,
    original=74,
    sockaddr=struct.Struct(">2xH4x16s"),
)
# The first packet of a connection waits here, so that connect() returns the far end's result.
_HOLD: Final = f"""
    tcp flags & (fin|syn|rst|ack) == syn IP daddr . tcp dport @tcp_ok queue to {TO_ASK}
    tcp flags & (fin|syn|rst|ack) == syn queue to {TO_REFUSE}
    meta l4proto udp IP daddr . udp dport != @udp_ok queue to {TO_REFUSE}
"""
_RULES: Final = f"""table IP {_TABLE} {{
  set tcp_ok {{ type ADDRESS . inet_service; flags interval; }}
  set udp_ok {{ type ADDRESS . inet_service; flags interval; }}
  chain hold {{
    type filter hook output priority -150; policy drop;
    IP daddr {{ OWN }} accept
    socket transparent 1 accept
HOLD
    meta l4proto {{ tcp, udp }} accept
  }}
  chain verdict {{
    type filter hook output priority 0; policy accept;
    meta mark {egress.REFUSED} reject with tcp reset
    meta mark {egress.HOST_UNREACHABLE} reject with UNREACHABLE_HOST
    meta mark {egress.NET_UNREACHABLE} reject with UNREACHABLE_NET
    meta mark {egress.TIMED_OUT} drop
    meta mark {egress.POLICY} reject with UNREACHABLE_POLICY
  }}
  chain deliver {{
    type filter hook prerouting priority -150; policy drop;
    iifname != "lo" drop
    IP daddr {{ OWN }} accept
    socket transparent 1 accept
    meta l4proto tcp tproxy to RELAY:{TCP_PORT} accept
    meta l4proto udp tproxy to RELAY:{UDP_PORT} accept
  }}
}}
"""
_ANY_PORT: Final = 9
_VERIFY_MS: Final = 5000


def families() -> tuple[Family, ...]:
    """Return the versions of IP that this kernel supports."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return (V4,)
    return (V4, V6)


def build(*, hold: bool) -> None:
    """Set up routes and rules. No target is reachable yet. Raises OSError, JobError.

    hold: whether the first packet of a connection waits for the gate, which needs nfnetlink_queue. Otherwise the relay
    accepts every connection and then asks the gate, and the sets of allowed targets are not used.
    """
    found = families()
    deliver_locally(family.source for family in found)
    _load("".join(_rules(family, hold=hold) for family in found))


def _rules(family: Family, *, hold: bool) -> str:
    rules = _RULES.replace("HOLD", _HOLD if hold else "").replace("ADDRESS", family.address)
    for what, word in zip(("HOST", "NET", "POLICY"), family.unreachable, strict=True):
        rules = rules.replace(f"UNREACHABLE_{what}", word)
    relay = f"[{family.relay}]" if ":" in family.relay else family.relay
    return rules.replace("RELAY", relay).replace("OWN", family.own).replace("IP ", f"{family.name} ")


def admit(network: Network, sockets: Sockets) -> None:
    """Allow the targets of *network*, and verify the rules. Raises OSError, JobError."""
    found = families()
    for family in found:
        for name in ("tcp", "udp"):
            rows = [row for row in getattr(network, name) if (":" in row[0]) == (family is V6)]
            add_elements(_TABLE, f"{name}_ok", [(first, last, port) for first, last, ports in rows for port in ports])
        _verify(sockets, family)


def _load(rules: str) -> None:
    """Load rules atomically with nft. Raises JobError."""
    rules_fd, output_fd = (os.memfd_create(name) for name in ("rules", "output"))
    os.pwrite(rules_fd, rules.encode(), 0)
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((rules_fd, output_fd, output_fd))]
    environment = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"}
    pid = os.posix_spawn(NFT, [NFT, "-f", "-"], environment, file_actions=actions)
    status, output = os.waitpid(pid, 0)[1], os.pread(output_fd, 500, 0)
    os.close(rules_fd)
    os.close(output_fd)
    if status:
        message = output.decode("ascii", "replace").strip()
        raise JobError("firewall", 0, f"nft did not load the rules: {message}")


def _verify(sockets: Sockets, family: Family) -> None:
    """Verify that a connection to an unlisted address reaches the relay. Raises JobError, OSError."""
    unlisted = family.unlisted, _ANY_PORT
    listener = next(sock for sock in sockets.tcp if sock.family == family.number)
    listens = listener if sockets.held is None else sockets.held
    poll = select.poll()
    poll.register(listens.fileno(), select.POLLIN)
    with socket.socket(family.number, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect_ex(unlisted)
        if not poll.poll(_VERIFY_MS):
            raise JobError("firewall", 0, "a test connection did not reach the relay")
        if sockets.held is None:
            accepted, _ = listener.accept()
            refused = accepted.getsockname()[:2] == unlisted
            accepted.close()
        else:
            held = list(sockets.held.read())
            for one in held:
                sockets.held.release(one.queue, one.number, egress.POLICY)
            refused = [(one.queue, one.target) for one in held] == [(TO_REFUSE, unlisted)]
    if not refused:
        raise JobError("firewall", 0, "the rules allow a test connection to an unlisted address")


class Sockets:
    """The relay's bound sockets in this network namespace: TCP and UDP for each version of IP. Raises OSError."""

    def __init__(self, *, hold: bool) -> None:
        found = families()
        self.tcp = [transparent(socket.SOCK_STREAM, family.relay, TCP_PORT) for family in found]
        self.udp = [transparent(socket.SOCK_DGRAM, family.relay, UDP_PORT) for family in found]
        for family, sock in zip(found, self.udp, strict=True):
            sock.setsockopt(family.level, family.original, 1)
        self.dns = transparent(socket.SOCK_DGRAM, egress.DNS, DNS_PORT)
        for sock in self.tcp:
            sock.listen(_BACKLOG)
        self.held = HeldPackets(TO_ASK, TO_REFUSE) if hold else None


def transparent(kind: int, address: str, port: int) -> socket.socket:
    """Return a socket bound to *address*, which need not be local. kind: SOCK_STREAM or SOCK_DGRAM. Raises OSError."""
    family = V6 if ":" in address else V4
    sock = socket.socket(family.number, kind | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(family.level, family.transparent, 1)
    if family is V6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address, port))
    return sock


def original_target(ancillary: list[tuple[int, int, bytes]]) -> tuple[str, int] | None:
    """Return the original destination of a datagram (ip(7), ipv6(7): IP_RECVORIGDSTADDR)."""
    for level, kind, data in ancillary:
        for family in (V4, V6):
            if (level, kind) == (family.level, family.original) and len(data) >= family.sockaddr.size:
                port, address = family.sockaddr.unpack_from(data)
                return socket.inet_ntop(family.number, address), port
    return None


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
