"""The program's network namespace: routes that keep every packet in this machine, and rules that give it to the relay.

There is no network card: nothing here is what keeps the program from the network. The gate on the host decides; these
rules are a second wall, and make refusals immediate.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import Any, Final, NamedTuple

from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.netlink import HeldPackets, Routes, add_elements
from x07_sandbox.guest.system import write_all

DNS: Final = "127.0.0.53"
DNS_PORT: Final = 53
TCP_PORT: Final = 1  # of the relay; below those that the kernel or an unprivileged program picks
UDP_PORT: Final = 2
RESOLV_CONF: Final = f"nameserver {DNS}\noptions timeout:5 attempts:2\n"
TO_ASK: Final = 0  # queue of first packets for which the gate is asked
TO_REFUSE: Final = 1  # queue of those that no policy can allow: they are told of, and refused

# Marks of packets that were held, as the second chain reads them.
PASSED: Final = 0x100
CONNECTION_REFUSED: Final = 1
HOST_UNREACHABLE: Final = 2
NET_UNREACHABLE: Final = 3
TIMED_OUT: Final = 4
PROHIBITED: Final = 5

NFT: Final = "/usr/sbin/nft"
_BACKLOG: Final = 512
_TABLE: Final = "x07"


class Family(NamedTuple):
    """What differs between the versions of IP.

    number: of the family (AF_INET). source: where a program's connections come from. nobody: stands for no name, so no
    policy can list it. name, address, own, relay, unreachable: words of the rules. level, transparent, original: of
    socket options (linux/in.h, linux/in6.h). ends: address and port of a sockaddr, after its family.
    """

    number: int
    source: str
    nobody: str
    name: str
    address: str
    own: str
    relay: str
    unreachable: tuple[str, str, str]
    level: int
    transparent: int
    original: int
    ends: struct.Struct


V4: Final = Family(
    number=socket.AF_INET,
    source="198.18.0.1",
    nobody="198.18.0.0",
    name="ip",
    address="ipv4_addr",
    own="127.0.0.0/8, 198.18.0.1",
    relay="127.0.0.1",
    unreachable=("icmp type host-unreachable", "icmp type net-unreachable", "icmp type admin-prohibited"),
    level=socket.SOL_IP,
    transparent=19,
    original=20,
    ends=struct.Struct(">2xH4s"),
)
V6: Final = Family(
    number=socket.AF_INET6,
    source="fd78:3037::1",
    nobody="fd78:3037::",
    name="ip6",
    address="ipv6_addr",
    own="::1, fd78:3037::1",
    relay="::1",
    unreachable=("icmpv6 type addr-unreachable", "icmpv6 type no-route", "icmpv6 type admin-prohibited"),
    level=socket.IPPROTO_IPV6,
    transparent=75,
    original=74,
    ends=struct.Struct(">2xH4x16s"),
)
# The first packet of a connection waits here, so that connect() in the program fails as the far end says.
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
    meta mark {CONNECTION_REFUSED} reject with tcp reset
    meta mark {HOST_UNREACHABLE} reject with UNREACHABLE_HOST
    meta mark {NET_UNREACHABLE} reject with UNREACHABLE_NET
    meta mark {TIMED_OUT} drop
    meta mark {PROHIBITED} reject with UNREACHABLE_POLICY
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
    """The versions of IP that this kernel has."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return (V4,)
    return (V4, V6)


def build(*, hold: bool) -> None:
    """Make all that does not depend on a policy: nothing can be reached yet. Raises OSError, JobError.

    hold: whether first packets wait, which needs a part of the kernel (nfnetlink_queue). Without, the relay accepts
    every connection and then asks the gate, so the sets are not used.
    """
    routes = Routes()
    for family in families():
        routes.add_address(family.source)
        routes.deliver_here(family.source)
    routes.close()
    _load("".join(_rules(family, hold=hold) for family in families()))


def _rules(family: Family, *, hold: bool) -> str:
    """The table of one version of IP, as nft reads it."""
    rules = _RULES.replace("HOLD", _HOLD if hold else "").replace("ADDRESS", family.address)
    for what, word in zip(("HOST", "NET", "POLICY"), family.unreachable, strict=True):
        rules = rules.replace(f"UNREACHABLE_{what}", word)
    relay = f"[{family.relay}]" if ":" in family.relay else family.relay
    return rules.replace("RELAY", relay).replace("OWN", family.own).replace("IP ", f"{family.name} ")


def admit(network: dict[str, Any], sockets: Sockets) -> None:
    """Open what a policy lists, and try that the rules hold. Raises OSError, JobError.

    network: as START carries it (docs/guest-channel.md).
    """
    found = families()
    for family in found:
        for name in ("tcp", "udp"):
            rows = [row for row in network[name] if (":" in row[0]) == (family is V6)]
            add_elements(_TABLE, f"{name}_ok", [(first, last, port) for first, last, ports in rows for port in ports])
        _verify(sockets, family)


def _load(rules: str) -> None:
    """Have nft load rules, all or none. Raises JobError."""
    rules_r, rules_w = os.pipe2(os.O_CLOEXEC)
    said_r, said_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(rules_r, 0)
            os.dup2(said_w, 1)
            os.dup2(said_w, 2)
            os.execve(NFT, [NFT, "-f", "-"], {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"})
        finally:
            os._exit(127)
    os.close(rules_r)
    os.close(said_w)
    with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
        write_all(rules_w, rules.encode())
    os.close(rules_w)
    said = os.read(said_r, 4096)
    while os.read(said_r, 4096):
        pass
    os.close(said_r)
    if os.waitpid(pid, 0)[1]:
        raise JobError("firewall", 0, f"nft did not load the rules: {said[:500].decode('ascii', 'replace').strip()}")


def _verify(sockets: Sockets, family: Family) -> None:
    """Connect to where nobody may: the rules have to bring that to the relay. Raises JobError, OSError."""
    nobody = family.nobody, _ANY_PORT
    listener = next(sock for sock in sockets.tcp if sock.family == family.number)
    listens = listener if sockets.held is None else sockets.held
    poll = select.poll()
    poll.register(listens.fileno(), select.POLLIN)
    with socket.socket(family.number, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect_ex(nobody)
        if not poll.poll(_VERIFY_MS):
            raise JobError("firewall", 0, "the rules do not bring connections to the relay")
        if sockets.held is None:
            accepted, _ = listener.accept()
            refused = accepted.getsockname()[:2] == nobody
            accepted.close()
        else:
            held = list(sockets.held.read())
            for one in held:
                sockets.held.release(one.queue, one.number, PROHIBITED)
            refused = [(one.queue, one.target) for one in held] == [(TO_REFUSE, nobody)]
    if not refused:
        raise JobError("firewall", 0, "the rules do not hold")


class Sockets:
    """The relay's sockets in the current network namespace, bound.

    tcp, udp: one for each version of IP. held: None where no packet waits.
    """

    def __init__(self, *, hold: bool) -> None:
        """Make them. Raises OSError."""
        found = families()
        self.tcp = [transparent(socket.SOCK_STREAM, family.relay, TCP_PORT) for family in found]
        self.udp = [transparent(socket.SOCK_DGRAM, family.relay, UDP_PORT) for family in found]
        for family, sock in zip(found, self.udp, strict=True):
            sock.setsockopt(family.level, family.original, 1)
        self.dns = transparent(socket.SOCK_DGRAM, DNS, DNS_PORT)
        for sock in self.tcp:
            sock.listen(_BACKLOG)
        self.held = HeldPackets(TO_ASK, TO_REFUSE) if hold else None


def transparent(kind: int, address: str, port: int) -> socket.socket:
    """A socket that may have any address, bound. kind: SOCK_STREAM or SOCK_DGRAM. Raises OSError."""
    family = V6 if ":" in address else V4
    sock = socket.socket(family.number, kind | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(family.level, family.transparent, 1)
    if family is V6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address, port))
    return sock


def original_target(ancillary: list[tuple[int, int, bytes]]) -> tuple[str, int] | None:
    """Where a datagram was sent, from the kernel's word beside it (ip(7), ipv6(7): IP_RECVORIGDSTADDR)."""
    for level, kind, data in ancillary:
        for family in (V4, V6):
            if (level, kind) == (family.level, family.original) and len(data) >= family.ends.size:
                port, address = family.ends.unpack_from(data)
                return socket.inet_ntop(family.number, address), port
    return None
