"""The program's network namespace: routes that keep every packet local, and rules that direct packets to the relay.

The boundary is the egress gate, a process on the host, because the guest has no network card. These rules are a second
barrier that denies fast.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from x07_sandbox.channel import egress
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.netlink import HeldPackets, add_elements, deliver_locally

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
