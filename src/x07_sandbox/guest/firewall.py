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
from typing import Any, Final

from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.netlink import HeldPackets, Routes, add_elements
from x07_sandbox.guest.system import write_all

SOURCE: Final = "198.18.0.1"  # where a program's connections come from
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
_IP_TRANSPARENT: Final = 19  # linux/in.h
_IP_RECVORIGDSTADDR: Final = 20
_SOCKADDR: Final = struct.Struct(">2xH4s")
_BACKLOG: Final = 512
_OWN: Final = f"{{ 127.0.0.0/8, {SOURCE} }}"
_TABLE: Final = "x07"
# The first packet of a connection waits here, so that connect() in the program fails as the far end says.
_HOLD: Final = f"""
    tcp flags & (fin|syn|rst|ack) == syn ip daddr . tcp dport @tcp_ok queue to {TO_ASK}
    tcp flags & (fin|syn|rst|ack) == syn queue to {TO_REFUSE}
    ip protocol udp ip daddr . udp dport != @udp_ok queue to {TO_REFUSE}
"""
_RULES: Final = f"""table ip {_TABLE} {{
  set tcp_ok {{ type ipv4_addr . inet_service; flags interval; }}
  set udp_ok {{ type ipv4_addr . inet_service; flags interval; }}
  chain hold {{
    type filter hook output priority -150; policy drop;
    ip daddr {_OWN} accept
    socket transparent 1 accept
HOLD
    ip protocol tcp accept
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
    ip protocol udp tproxy to 127.0.0.1:{UDP_PORT} accept
  }}
}}
"""
_NOBODY: Final = ("198.18.0.0", 9)  # stands for no name, so no policy can list it
_VERIFY_MS: Final = 5000


def build(*, hold: bool) -> None:
    """Make all that does not depend on a policy: nothing can be reached yet. Raises OSError, JobError.

    hold: whether first packets wait, which needs a part of the kernel (nfnetlink_queue). Without, the relay accepts
    every connection and then asks the gate, so the sets are not used.
    """
    routes = Routes()
    routes.add_address(SOURCE)
    routes.deliver_here(SOURCE)
    routes.close()
    _load(_RULES.replace("HOLD", _HOLD if hold else ""))


def admit(network: dict[str, Any], sockets: Sockets) -> None:
    """Open what a policy lists, and try that the rules hold. Raises OSError, JobError.

    network: as START carries it (docs/guest-channel.md).
    """
    for name in ("tcp", "udp"):
        rows = network[name]  # each first and last address, and ports
        add_elements(_TABLE, f"{name}_ok", [(first, last, port) for first, last, ports in rows for port in ports])
    _verify(sockets)


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


def _verify(sockets: Sockets) -> None:
    """Connect to where nobody may: the rules have to bring that to the relay. Raises JobError, OSError."""
    listens = sockets.tcp if sockets.held is None else sockets.held
    poll = select.poll()
    poll.register(listens.fileno(), select.POLLIN)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect_ex(_NOBODY)
        if not poll.poll(_VERIFY_MS):
            raise JobError("firewall", 0, "the rules do not bring connections to the relay")
        if sockets.held is None:
            accepted, _ = sockets.tcp.accept()
            found = accepted.getsockname()
            accepted.close()
            refused = found == _NOBODY
        else:
            held = list(sockets.held.read())
            for one in held:
                sockets.held.release(one.queue, one.number, PROHIBITED)
            refused = [(one.queue, one.target) for one in held] == [(TO_REFUSE, _NOBODY)]
    if not refused:
        raise JobError("firewall", 0, "the rules do not hold")


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
        self.held = HeldPackets(TO_ASK, TO_REFUSE) if hold else None


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
