"""The resolver: a separate process that may only resolve names, with this host's own configuration.

    python -I -S -c CODE GATE_FD UID

`processes.py` starts it. UID: the uid to switch to if root started the process, else -1.

It reads names from a packet socket and returns addresses. The names have passed the gate's strict parser, and the gate
checks every answer. A request is a number (u32) and the name. An answer is the number, a status byte, and for each
address one byte for the IP version and the 4 or 16 bytes of the address.
"""

import contextlib
import ctypes
import os
import queue
import socket
import struct
import sys
import threading
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.hosts import NAT64_NAME, Address

NUMBER: Final = struct.Struct(">I")
REQUEST_MAX: Final = NUMBER.size + 253
ADDRESSES_MAX: Final = 16
ANSWER_MAX: Final = NUMBER.size + 1 + 17 * ADDRESSES_MAX
FOUND: Final = 0
NO_NAME: Final = 1
FAILED: Final = 2
LATE_S: Final = 5.0  # the gate does not wait longer for an answer
_WORKERS: Final = 32
_HOSTS_FILE: Final = Path("/etc/hosts")


def encode_answer(number: int, status: int, addresses: list[Address]) -> bytes:
    """Return an answer with at most ADDRESSES_MAX addresses."""
    packed = b"".join(bytes([address.version]) + address.packed for address in addresses[:ADDRESSES_MAX])
    return NUMBER.pack(number) + bytes([status]) + packed


def decode_answer(data: bytes) -> tuple[int, int, list[Address]]:
    """Return number, status and addresses of an answer. Raises ValueError if it is malformed."""
    if not NUMBER.size < len(data) <= ANSWER_MAX or data[NUMBER.size] > FAILED:
        raise ValueError("not an answer")
    addresses: list[Address] = []
    at = NUMBER.size + 1
    while at < len(data):
        size = {4: 4, 6: 16}.get(data[at], 0)  # by IP version
        packed = data[at + 1 : at + 1 + size]
        if not size or len(packed) != size:
            raise ValueError("not an address")
        addresses.append(IPv4Address(packed) if size == 4 else IPv6Address(packed))  # noqa: PLR2004 - bytes of IPv4
        at += 1 + size
    return NUMBER.unpack_from(data)[0], data[NUMBER.size], addresses


def look_up(name: str) -> tuple[int, list[Address]]:
    """Return the status and the addresses of a name, in this host's order of preference."""
    if of_file := hosts_file_addresses(name):
        return FOUND, of_file
    try:
        # Only IPv6 counts for NAT64, and an IPv4 answer would hide that the look-up of IPv6 failed.
        family = socket.AF_INET6 if name == NAT64_NAME else socket.AF_UNSPEC
        # The final dot disables the search list. The C library then ignores the hosts file too.
        rows = socket.getaddrinfo(f"{name}.".encode("ascii"), None, family, socket.SOCK_STREAM)
    except socket.gaierror as exc:
        known = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
        return (NO_NAME if exc.errno in known else FAILED), []
    except OSError:
        return FAILED, []
    found: dict[Address, None] = {}
    for family, _, _, _, ends in rows:
        text = str(ends[0]).partition("%")[0]
        if family == socket.AF_INET:
            found[IPv4Address(text)] = None
        elif family == socket.AF_INET6:
            found[IPv6Address(text)] = None
    return (FOUND if found else NO_NAME), list(found)


def hosts_file_addresses(name: str, path: Path = _HOSTS_FILE) -> list[Address]:
    """Return the addresses that the hosts file (hosts(5)) gives a name."""
    found: dict[Address, None] = {}
    with contextlib.suppress(OSError), path.open(encoding="ascii", errors="replace") as file:
        for line in file:
            address, *names = line.partition("#")[0].lower().split() or [""]
            if name in names:
                with contextlib.suppress(ValueError):
                    found[ip_address(address.partition("%")[0])] = None
    return list(found)


def serve(sock: socket.socket) -> None:
    """Answer requests until the gate exits. A slow name blocks only one worker, for some seconds."""
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
    for _ in range(_WORKERS):
        threading.Thread(target=_work, args=(sock, waiting), daemon=True).start()
    while data := sock.recv(REQUEST_MAX):
        waiting.put((time.monotonic(), data))


def _work(sock: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    while True:
        asked_at, data = waiting.get()
        if time.monotonic() - asked_at > LATE_S:  # expired; else slow names would block all others
            continue
        number = NUMBER.unpack_from(data)[0]
        status, addresses = look_up(data[NUMBER.size :].decode("ascii"))
        sock.send(encode_answer(number, status, addresses))


_STACK_BYTES: Final = 512 * 1024
_ARENA_MAX: Final = -8


def main() -> None:
    """Run the resolver until the gate exits."""
    sock_fd, uid = map(int, sys.argv[1:])
    # With default stacks and heaps (mallopt(3)) the threads would exceed the address space limit.
    threading.stack_size(_STACK_BYTES)
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    os.environ["RES_OPTIONS"] = "timeout:2 attempts:2"  # resolv.conf(5): the gate does not wait longer
    sock = socket.socket(fileno=sock_fd)
    confine("resolver", uid=None if uid < 0 else uid)
    serve(sock)
