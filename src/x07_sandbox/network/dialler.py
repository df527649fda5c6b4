"""Dialling: resolve a name, check the resolved addresses, and connect to them in order, perhaps through a proxy."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from functools import partial
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Final, NamedTuple

import h11
from msgspec.structs import replace

from x07_sandbox.channel import egress
from x07_sandbox.network import resolver
from x07_sandbox.network.hosts import (
    HOST_ADDRESS,
    HOST_NAME,
    NAT64_NAME,
    Address,
    Host,
    embedded_ipv4,
    nat64_prefixes,
    unmapped,
)
from x07_sandbox.network.rules import Allowlist, Decision, Proxy, decide_address

LOOK_UP_S: Final = resolver.LATE_S
_CACHE_S: Final = 10.0
_CACHED_MAX: Final = 256
_TRIES: Final = 3
_TRY_S: Final = 5.0
_ALL_TRIES_S: Final = 10.0
_PREFIXES_S: Final = 60.0  # how long the network's NAT64 prefixes count as known
_NO_PREFIXES_S: Final = 10.0  # after a failed look-up of them
_PROXY_HEAD_MAX: Final = 8192
_CODES: Final = {
    errno.ECONNREFUSED: egress.REFUSED,
    errno.ENETUNREACH: egress.NET_UNREACHABLE,
    errno.EADDRNOTAVAIL: egress.NET_UNREACHABLE,
    errno.ETIMEDOUT: egress.TIMED_OUT,
}


class NotDialledError(Exception):
    """No connection was made. code: for the guest. rule, reason: for the ledger. address: the last address tried."""

    def __init__(self, code: int, rule: str, reason: str, address: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.rule = rule
        self.reason = reason
        self.address = address


class Dialled(NamedTuple):
    """A connected socket and the server's address, or "" if the proxy has chosen the address."""

    sock: socket.socket
    address: str


class ResolverClient:
    """Client of the resolver process. sock: a packet socket, which this object owns."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._waiting: dict[int, asyncio.Future[tuple[int, list[Address]]]] = {}
        self._queries: dict[str, asyncio.Task[list[Address]]] = {}
        self._number = 0
        self._cache: dict[str, tuple[float, list[Address]]] = {}
        self.lost = asyncio.Event()
        sock.setblocking(False)  # noqa: FBT003 - it takes no names
        loop.add_reader(sock, self._receive)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(resolver.ANSWER_MAX + 1)
            number, status, addresses = resolver.decode_answer(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # it has exited or misbehaves
            self._loop.remove_reader(self._sock)
            self.lost.set()
            return
        if (waits := self._waiting.pop(number, None)) is not None and not waits.done():
            waits.set_result((status, addresses))

    async def look_up(self, name: str) -> list[Address]:
        """Return the addresses of a name. Raises NotDialledError if there are none."""
        known = self._cache.get(name)
        if known is not None and self._loop.time() < known[0]:
            return known[1]
        task = self._queries.get(name)
        if task is None:
            task = self._queries[name] = self._loop.create_task(self._query(name))
            task.add_done_callback(partial(self._finished, name))
        await asyncio.wait({task})  # unlike shield(), it never reports the task's exception to the loop
        return task.result()

    def _finished(self, name: str, task: asyncio.Task[list[Address]]) -> None:
        del self._queries[name]
        if not task.cancelled():
            task.exception()  # retrieve it, since no waiter may be left

    async def _query(self, name: str) -> list[Address]:
        self._number = self._number % (2**32 - 1) + 1
        number = self._number
        waits: asyncio.Future[tuple[int, list[Address]]] = self._loop.create_future()
        self._waiting[number] = waits
        try:
            self._sock.send(resolver.NUMBER.pack(number) + name.encode("ascii"))
            async with asyncio.timeout(LOOK_UP_S):
                status, addresses = await waits
        except TimeoutError:
            raise NotDialledError(egress.TIMED_OUT, "name:timeout", f"resolving {name} timed out") from None
        except OSError as exc:
            raise NotDialledError(egress.TIMED_OUT, "name:failed", f"{name} cannot be resolved") from exc
        finally:
            self._waiting.pop(number, None)
        if status == resolver.NO_NAME:
            raise NotDialledError(egress.NO_NAME, "name:unknown", f"{name} has no address")
        if status != resolver.FOUND:
            raise NotDialledError(egress.TIMED_OUT, "name:failed", f"resolving {name} failed")
        if len(self._cache) >= _CACHED_MAX:
            self._cache.clear()
        self._cache[name] = (self._loop.time() + _CACHE_S, addresses)
        return addresses


class Dialler:
    """Makes the connections of one gate. own_by_bind: the result of `bind_reveals_own`."""

    def __init__(
        self, allowlist: Allowlist, names: ResolverClient, loop: asyncio.AbstractEventLoop, *, own_by_bind: bool = True
    ) -> None:
        self._own_by_bind = own_by_bind
        self._allowlist = allowlist
        self._names = names
        self._loop = loop
        self._nat64: set[IPv6Network] = set()
        self._nat64_known = False
        self._nat64_until = 0.0

    async def dial(self, decision: Decision) -> Dialled:
        """Connect to the destination of an allowed request. Raises NotDialledError if no address answers."""
        host = decision.request.host
        by_proxy = self._allowlist.settings.resolves(host)
        try:
            targets: Sequence[Host] = [host] if by_proxy else await self._addresses(decision)
            async with asyncio.timeout(_ALL_TRIES_S):
                return await self._try(decision, targets)
        except TimeoutError:
            raise NotDialledError(egress.TIMED_OUT, "dial:timeout", "no address answered in time") from None

    async def _addresses(self, decision: Decision) -> list[Address]:
        """Return the addresses that may be dialled. Raises NotDialledError if no address is left."""
        host = decision.request.host
        good, refused = [], NotDialledError(egress.NO_NAME, "name:unknown", f"{host} has no address")
        for address in await self._resolved(host):
            try:
                self._check_rules(decision, address)
                self._check_own(decision, address)
                for embedded in embedded_ipv4(address, await self._prefixes(address)):
                    self._check_rules(decision, embedded)
                    self._check_own(decision, embedded)
            except NotDialledError as exc:
                refused = exc
            else:
                good.append(address)
        if not good:
            raise refused
        return good

    async def _resolved(self, host: Host) -> list[Address]:
        if host == HOST_NAME:
            return [HOST_ADDRESS]
        # An IPv4-mapped address would not be recognised as the IPv4 address to which it leads.
        return [unmapped(one) for one in await self._names.look_up(host)] if isinstance(host, str) else [host]

    def _check_rules(self, decision: Decision, address: Address) -> None:
        """Raise NotDialledError if the allowlist denies the address."""
        found = decide_address(self._allowlist, decision, address)
        if not found.allowed:
            raise NotDialledError(egress.POLICY, found.rule, found.reason, str(address))

    def _check_own(self, decision: Decision, address: Address, *, known_own: bool = False) -> None:
        """Raise NotDialledError for this host's own addresses, even public ones, unless the settings allow them."""
        opened = self._allowlist.settings.lists(address, decision.request.port)
        if not opened and (known_own or (self._own_by_bind and _is_own(address))):
            why = f"{address} is an address of this host"
            raise NotDialledError(egress.POLICY, "deny-floor:own", why, str(address))

    async def _prefixes(self, address: Address) -> set[IPv6Network]:
        """Return the prefixes of this network's NAT64. Raises NotDialledError for IPv6 if they cannot be learnt."""
        if isinstance(address, IPv6Address) and self._loop.time() >= self._nat64_until:
            try:
                self._nat64 |= nat64_prefixes(await self._names.look_up(NAT64_NAME))
                self._nat64_known = True
            except NotDialledError as exc:
                self._nat64_known = exc.code == egress.NO_NAME
            self._nat64_until = self._loop.time() + (_PREFIXES_S if self._nat64_known else _NO_PREFIXES_S)
        if isinstance(address, IPv6Address) and not self._nat64_known:
            why = f"whether {address} embeds an IPv4 address (NAT64) is unknown, since {NAT64_NAME} cannot be resolved"
            raise NotDialledError(egress.TIMED_OUT, "nat64:unknown", why, str(address))
        return self._nat64

    async def _try(self, decision: Decision, targets: Sequence[Host]) -> Dialled:
        last = NotDialledError(egress.HOST_UNREACHABLE, "dial:failed", "no address could be tried")
        for target in targets[:_TRIES]:
            servers, proxy = [(str(target), decision.request.port)], None
            # Addresses that the user's settings have opened belong to this host's own networks.
            direct = not isinstance(target, str) and self._allowlist.settings.allows(target, decision.request.port)
            if not direct and (proxy := self._allowlist.settings.proxy) is not None:
                found = await self._names.look_up(proxy.host) if isinstance(proxy.host, str) else [proxy.host]
                servers = [(str(address), proxy.port) for address in found[:_TRIES]]
            for server in servers:
                try:
                    return await self._connect(decision, target, server, proxy)
                except NotDialledError as exc:
                    last = exc
        raise last

    async def _connect(self, decision: Decision, target: Host, server: tuple[str, int], proxy: Proxy | None) -> Dialled:
        """Connect to *server*, which is the target, or the proxy that then connects to it."""
        request, address = decision.request, "" if isinstance(target, str) else str(target)
        rule, who = ("dial", "it") if proxy is None else ("proxy", "the proxy")
        kind = socket.SOCK_DGRAM if request.transport == "udp" else socket.SOCK_STREAM
        with contextlib.ExitStack() as stack:
            try:
                sock = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, kind)
                stack.callback(sock.close)
                sock.setblocking(False)  # noqa: FBT003 - it takes no names
                async with asyncio.timeout(_TRY_S):
                    await self._loop.sock_connect(sock, server)
                if proxy is not None:
                    async with asyncio.timeout(_TRY_S):
                        await self._ask(sock, proxy, str(replace(request, host=target)), address)
                elif sock.getpeername()[0] == sock.getsockname()[0] and not isinstance(target, str):
                    self._check_own(decision, target, known_own=True)
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except TimeoutError as exc:
                why = f"{who} did not answer in time"
                raise NotDialledError(egress.TIMED_OUT, f"{rule}:timeout", why, address) from exc
            except OSError as exc:
                code = _CODES.get(exc.errno or 0, egress.HOST_UNREACHABLE)
                why = os.strerror(exc.errno or 0)  # since asyncio replaces the exception's own text
                if proxy is not None:
                    code, why = egress.HOST_UNREACHABLE, f"the proxy cannot be reached: {why}"
                raise NotDialledError(code, f"{rule}:failed", why, address) from exc
            stack.pop_all()
        return Dialled(sock, address)

    async def _ask(self, sock: socket.socket, proxy: Proxy, target: str, address: str) -> None:
        """Ask a connected proxy for a connection to *target*, HOST:PORT. Raises NotDialledError, OSError."""
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", target)] + [("Proxy-Authorization", proxy.authorization)] * bool(proxy.authorization)
        request = connection.send(h11.Request(method="CONNECT", target=target, headers=headers)) or b""
        connection.send(h11.EndOfMessage())
        await self._loop.sock_sendall(sock, request)
        head = bytearray()
        while len(head) < _PROXY_HEAD_MAX and not head.endswith(b"\r\n\r\n"):
            # Byte by byte, since the bytes behind the head are the server's, and belong to the program.
            if not (byte := await self._loop.sock_recv(sock, 1)):
                break
            head += byte
        connection.receive_data(bytes(head))
        try:
            answer = connection.next_event()
        except h11.RemoteProtocolError:
            answer = None
        status = answer.status_code if isinstance(answer, h11.Response | h11.InformationalResponse) else 0
        if connection.trailing_data[0]:
            status = 0
        if not 200 <= status < 300:  # noqa: PLR2004 - RFC 9110
            why = f"the proxy answered with status {status}" if status else "the proxy's answer is no HTTP response"
            raise NotDialledError(egress.HOST_UNREACHABLE, f"proxy:{status}", why, address)


def bind_reveals_own() -> bool:
    """Return whether only this host's own addresses can be bound, as by default (ip(7): ip_nonlocal_bind)."""
    for version in ("ipv4", "ipv6"):
        with contextlib.suppress(OSError):
            path = Path(f"/proc/sys/net/{version}/ip_nonlocal_bind")
            if path.read_text(encoding="ascii").strip() != "0":
                return False
    return True


def _is_own(address: Address) -> bool:
    """Return whether an address is one of this host's own: a socket can be bound to it."""
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((str(address), 0))
    except OSError:
        return False
    return True
