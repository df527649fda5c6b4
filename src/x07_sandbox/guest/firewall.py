"""The program's network namespace: routes that keep every packet in this machine, and rules that give it to the relay.

There is no network card: nothing here is what keeps the program from the network. The gate on the host decides; these
rules are a second wall, and make refusals immediate.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import Any, Final

from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.netlink import HeldPackets, Routes
from x07_sandbox.guest.system import write_all

SOURCE: Final = "198.18.0.1"  # where a program's connections come from
SYNTHETIC: Final = "198.18.0.0/15"  # addresses that stand for names (RFC 2544: for benchmarks)
DNS: Final = "127.0.0.53"
DNS_PORT: Final = 53
TCP_PORT: Final = 1  # of the relay; below those that the kernel or an unprivileged program picks
UDP_PORT: Final = 2
RESOLV_CONF: Final = f"nameserver {DNS}\noptions timeout:5 attempts:2\n"

# Marks of packets that were held, as the second chain reads them.
PASSED: Final = 0x100
CONNECTION_REFUSED: Final = 1
HOST_UNREACHABLE: Final = 2
NET_UNREACHABLE: Final = 3
TIMED_OUT: Final = 4
PROHIBITED: Final = 5

NFT: Final = "/usr/sbin/nft"
_IP_TRANSPARENT: Final = 19  # linux/in.h
_IP_RECVORIGDSTADDR: Final = 20
_SOCKADDR: Final = struct.Struct(">2xH4s")
_BACKLOG: Final = 512
_OWN: Final = f"{{ 127.0.0.0/8, {SOURCE} }}"
_HOLD: Final = "    tcp flags & (fin|syn|rst|ack) == syn queue to 0\n"
_RULES: Final = f"""table ip x07 {{
  set tcp_ok {{ type ipv4_addr . inet_service; flags interval; }}
  set udp_ok {{ type ipv4_addr . inet_service; flags interval; }}
  chain hold {{
    type filter hook output priority -150; policy drop;
    ip daddr {_OWN} accept
    socket transparent 1 accept
    ip protocol tcp ip daddr . tcp dport != @tcp_ok reject with icmp type admin-prohibited
HOLD    ip protocol tcp accept
    ip protocol udp accept
  }}
  chain verdict {{
    type filter hook output priority 0; policy accept;
    meta mark {CONNECTION_REFUSED} reject with tcp reset
    meta mark {HOST_UNREACHABLE} reject with icmp type host-unreachable
    meta mark {NET_UNREACHABLE} reject with icmp type net-unreachable
    meta mark {TIMED_OUT} drop
    meta mark {PROHIBITED} reject with icmp type admin-prohibited
  }}
  chain deliver {{
    type filter hook prerouting priority -150; policy drop;
    iifname != "lo" drop
    ip daddr {_OWN} accept
    socket transparent 1 accept
    ip protocol tcp tproxy to 127.0.0.1:{TCP_PORT} accept
    ip daddr . udp dport @udp_ok tproxy to 127.0.0.1:{UDP_PORT} accept
    ip protocol udp reject with icmp type port-unreachable
  }}
}}
"""
_ELEMENTS_A_LINE: Final = 256


def build(*, hold: bool) -> None:
    """Make all that does not depend on a policy: nothing can be reached yet. Raises OSError, JobError.

    hold: whether the first packet of a connection waits for the gate's answer, which needs a part of the kernel.
    """
    routes = Routes()
    routes.add_address(SOURCE)
    routes.deliver_here(SYNTHETIC, SOURCE)
    routes.refuse_the_rest()
    routes.close()
    _load(_RULES.replace("HOLD", _HOLD if hold else ""))


def admit(network: dict[str, Any]) -> None:
    """Open what a policy lists. network: as START carries it (docs/guest-channel.md). Raises OSError, JobError."""
    routes = Routes()
    for cidr in network["routes"]:
        routes.deliver_here(cidr, SOURCE)
    routes.close()
    lines = [line for name in ("tcp", "udp") for line in _elements(f"{name}_ok", network[name])]
    if lines:
        _load("".join(lines))
    _verify(network)


def _elements(name: str, rows: list[tuple[str, str, list[int]]]) -> list[str]:
    """Lines that add the elements of one set. rows: first and last address, and ports."""
    elements = [
        f"{first}-{last} . {port}" if first != last else f"{first} . {port}"
        for first, last, ports in rows
        for port in ports
    ]
    return [
        f"add element ip x07 {name} {{ {', '.join(elements[at : at + _ELEMENTS_A_LINE])} }}\n"
        for at in range(0, len(elements), _ELEMENTS_A_LINE)
    ]


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


def _verify(network: dict[str, Any]) -> None:
    """Try that the rules hold: one address without a route, and a port that no policy can list. Raises JobError."""
    tries = [(SYNTHETIC.partition("/")[0], errno.EHOSTUNREACH)]  # stands for no name, so no set has it
    if not any(cidr.endswith("/0") for cidr in network["routes"]):
        tries.append(("240.0.0.1", errno.EACCES))
    for address, expected in tries:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            found = sock.connect_ex((address, 9))
        if found != expected:
            raise JobError("firewall", found, f"{address} is not refused as it should be")


class Sockets:
    """The relay's sockets in the current network namespace, bound; held: None where no packet waits."""

    def __init__(self, *, hold: bool) -> None:
        """Make them. Raises OSError."""
        self.tcp = transparent(socket.SOCK_STREAM, "127.0.0.1", TCP_PORT)
        self.tcp.listen(_BACKLOG)
        self.udp = transparent(socket.SOCK_DGRAM, "127.0.0.1", UDP_PORT)
        self.udp.setsockopt(socket.SOL_IP, _IP_RECVORIGDSTADDR, 1)
        self.dns_udp = transparent(socket.SOCK_DGRAM, DNS, DNS_PORT)
        self.dns_tcp = transparent(socket.SOCK_STREAM, DNS, DNS_PORT)
        self.dns_tcp.listen(_BACKLOG)
        self.held = HeldPackets() if hold else None


def transparent(kind: int, address: str, port: int) -> socket.socket:
    """A socket that may have any address, bound. kind: SOCK_STREAM or SOCK_DGRAM. Raises OSError."""
    sock = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
    sock.bind((address, port))
    return sock


def original_target(ancillary: list[tuple[int, int, bytes]]) -> tuple[str, int] | None:
    """Where a datagram was sent, from the kernel's word beside it (ip(7): IP_RECVORIGDSTADDR)."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_IP, _IP_RECVORIGDSTADDR) and len(data) >= _SOCKADDR.size:
            port, address = _SOCKADDR.unpack_from(data)
            return socket.inet_ntoa(address), port
    return None
