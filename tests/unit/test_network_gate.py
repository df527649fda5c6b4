"""The egress gate: what connections may do, how they end, and what they cannot exhaust.

Gate, dialler and ledger are real, on a real event loop. The relay is the other end of the frames, the resolver a
socket with scripted answers, and `Outside` leads a dialled address to a loopback server, after all checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import socket
import time
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING, Any, Final, ParamSpec, cast

import pytest
from msgspec.structs import replace

from tests.fuzz.tls import hello, sni
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import TCP, UDP, WINDOW, Target
from x07_sandbox.channel.streams import Event, Role, Streams
from x07_sandbox.network import dialler, gate, resolver
from x07_sandbox.network.dialler import Dialler, ResolverClient
from x07_sandbox.network.flows import TcpFlow
from x07_sandbox.network.gate import NAMES_MAX, NAMES_OF_WILDCARD, WAITING_MAX, Gate
from x07_sandbox.network.hosts import unmapped
from x07_sandbox.network.ledger import Ledger
from x07_sandbox.network.rules import NetSettings, decide, make_allowlist, parse_request
from x07_sandbox.network.settings import parse_settings
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.hosts import Addresses
from x07_sandbox.policy.model import HostPorts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from x07_sandbox.policy.denials import NetworkUse
    from x07_sandbox.policy.model import Policy

P = ParamSpec("P")
GOOD: Final = "93.184.215.14"  # an address that nothing in the floor holds
OTHER: Final = "93.184.215.15"
PORTS: Final = (22, 53, 80, 443)
TEST_S: Final = 60.0
NAT64: Final = "ipv4only.arpa"
HELLO: Final = hello(sni(b"a.example"))
OTHER_HELLO: Final = hello(sni(b"b.example"))
LIMITS: Final = NetSettings()
FAST: Final = NetSettings(connections_per_second=100_000)  # no limit that a test would notice
# The table of a guest that opens more streams than it may.
UNBOUNDED: Final = egress.STREAMS._replace(
    streams={code: kind._replace(at_once=1 << 20) for code, kind in egress.STREAMS.streams.items()}
)
GET: Final = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"


def policy_with(*hosts: str, ports: tuple[int, ...] = PORTS) -> Policy:
    """The default policy with these hosts, for TCP and UDP."""
    base = default_policy()
    entries = tuple(HostPorts(host=host, ports=ports) for host in hosts)
    return replace(base, net=replace(base.net, allow_udp=True, allow_hosts=entries))


LISTED: Final = policy_with("a.example", "b.example", "*.wild.example", "93.184.215.0/24")


async def until(true: Callable[[], object]) -> None:
    """Wait until the condition holds, which each turn of the loop may change."""
    while not true():  # noqa: ASYNC110 - there is no event for what several ends do
        await asyncio.sleep(0)


class Outside:
    """The network behind the host as `Dialler` sees it.

    routes: by address and port, the real target, an error, or an event before which there is no answer. own:
    addresses of the host itself; connections to them come from them.
    """

    def __init__(self) -> None:
        self.routes: dict[tuple[str, int], tuple[str, int] | OSError | asyncio.Event] = {}
        self.dialled: list[tuple[str, int]] = []
        self.own: set[str] = set()
        self.cancelled = asyncio.Event()
        self.small_buffers = False  # whether a socket takes only some KiB that the server has not read

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the rest is as in the loop
        """Return a method of the loop."""
        return getattr(asyncio.get_running_loop(), name)

    async def sock_connect(self, sock: socket.socket, target: tuple[str, int]) -> None:
        """Like `loop.sock_connect`."""
        self.dialled.append(target)
        if self.small_buffers:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        where = self.routes.get(target, OSError(errno.ENETUNREACH, "Network is unreachable"))
        if isinstance(where, asyncio.Event):
            try:
                await where.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            where = self.routes[target]
            assert isinstance(where, tuple)
        if isinstance(where, OSError):
            raise where
        if target[0] not in self.own:
            sock.bind(("127.0.0.2", 0))  # not the address that it leads to, which would be the host itself
        await asyncio.get_running_loop().sock_connect(sock, where)


class Resolver:
    """The resolver's end of its socket.

    answers: addresses of names, or a status; other names are never answered.
    """

    def __init__(self) -> None:
        self.ours, self.gates = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)  # noqa: FBT003 - it takes no names
        self.answers: dict[str, list[str] | int] = {NAT64: resolver.NO_NAME, "a.example": [GOOD], "b.example": [OTHER]}
        self.asked: list[str] = []
        self.unknown: int | None = None  # the status of other names
        asyncio.get_running_loop().add_reader(self.ours, self._answer)

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self.ours.recv(resolver.REQUEST_MAX + 1):
                assert len(data) <= resolver.REQUEST_MAX
                name = data[resolver.NUMBER.size :].decode("ascii")
                self.asked.append(name)
                answer = self.answers.get(name, self.unknown)
                if answer is None:
                    continue
                found = [] if isinstance(answer, int) else [ip_address(text) for text in answer]
                status = answer if isinstance(answer, int) else resolver.FOUND
                self.ours.send(resolver.encode_answer(resolver.NUMBER.unpack_from(data)[0], status, found))

    def times(self, name: str) -> int:
        """The number of look-ups of a name."""
        return self.asked.count(name)

    def close(self) -> None:
        """Close both sockets."""
        loop = asyncio.get_running_loop()
        for sock in (self.ours, self.gates):
            loop.remove_reader(sock)
            sock.close()


class Relay(asyncio.Protocol):
    """The relay in the guest. takes: whether the program reads."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.link = Streams(Role.GUEST, UNBOUNDED)
        self.events: dict[int, list[Event]] = {}
        self.got: dict[int, bytearray] = {}
        self.rest: dict[int, bytes] = {}  # bytes that wait for credit
        self.finishing: set[int] = set()
        self.count = 0
        self.takes = True
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Record that the gate has closed."""
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        """Handle frames of the gate."""
        for event in self.link.receive(data):
            self.count += 1
            self.events.setdefault(event.stream, []).append(event)
            if event.type == streams.DATA:
                self.got.setdefault(event.stream, bytearray()).extend(event.data)
                if self.takes:
                    self.link.consumed(event.stream, len(event.data))
            elif event.type == streams.CREDIT:
                self._push(event.stream)
        self.flush()

    def flush(self) -> None:
        """Write all queued bytes."""
        while data := self.link.data_to_send():
            self.transport.write(data)
            self.link.sent(len(data))

    def ask(self, host: str, port: int = 443, transport: int = TCP) -> int:
        """Request a connection; return its stream."""
        stream = self.open(host.encode(), port, transport)
        self.flush()
        return stream

    def open(self, host: bytes, port: int, transport: int = TCP) -> int:
        """Queue the request for a connection; return its stream."""
        return self.link.open(transport, Target(transport, host, port).opening())

    async def answer(self, stream: int) -> int:
        """Wait for the result code of a request."""
        await until(lambda: self.events.get(stream))
        first = self.events[stream][0]
        assert first.type == streams.ANSWER
        return first.code

    async def connect(self, host: str, port: int = 443, transport: int = TCP) -> int:
        """Open a connection; return its stream."""
        stream = self.ask(host, port, transport)
        assert await self.answer(stream) == egress.OK
        return stream

    def send(self, stream: int, data: bytes) -> None:
        """Send bytes as credit allows."""
        self.rest[stream] = self.rest.get(stream, b"") + data
        self._push(stream)
        self.flush()

    def _push(self, stream: int) -> None:
        rest = self.rest.get(stream, b"")
        self.rest[stream] = rest[self.link.send(stream, rest) :]
        if stream in self.finishing and not self.rest[stream]:
            self.link.finish(stream)

    def datagram(self, stream: int, data: bytes) -> None:
        """Send a datagram."""
        self.link.send_datagram(stream, data)
        self.flush()

    def finish(self, stream: int) -> None:
        """End the stream after the queued bytes."""
        self.finishing.add(stream)
        self._push(stream)
        self.flush()

    def reset(self, stream: int) -> None:
        """Reset a connection."""
        self.link.reset(stream)
        self.flush()

    async def data(self, stream: int, count: int) -> bytes:
        """Wait for the first *count* bytes."""
        await until(lambda: len(self.got.get(stream, b"")) >= count)
        return bytes(self.got[stream][:count])

    async def end(self, stream: int) -> tuple[int, int]:
        """Wait for the end of a connection: FIN or RESET, and the code."""
        ends = {streams.FIN, streams.RESET}
        await until(lambda: self.events.get(stream) and self.events[stream][-1].type in ends)
        last = self.events[stream][-1]
        return last.type, last.code if last.type == streams.RESET else 0

    def datagrams(self, stream: int) -> list[bytes]:
        """The datagrams received on a UDP flow."""
        return [event.data for event in self.events.get(stream, []) if event.type == streams.DATAGRAM]


class Far(asyncio.Protocol):
    """One connection at a loopback server."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.got = bytearray()
        self.ended = False
        self.error: Exception | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast("asyncio.Transport", transport)
        if not self.server.reads:
            self.transport.pause_reading()
        self.server.connections.append(self)

    def data_received(self, data: bytes) -> None:
        """Keep the bytes, and echo them if the server does."""
        if not self.got and self.server.says:
            self.transport.write(self.server.says)
        self.got += data
        if self.server.echoes:
            self.transport.write(data)

    def eof_received(self) -> bool:
        """Record the end of the program's data."""
        self.ended = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the end of the connection."""
        self.error = exc
        self.lost.set()

    async def over(self) -> None:
        """Wait for the end of the program's data or of the connection."""
        await until(lambda: self.ended or self.lost.is_set())

    async def data(self, count: int) -> bytes:
        """Wait for the first *count* bytes."""
        await until(lambda: len(self.got) >= count)
        return bytes(self.got[:count])


class Server:
    """A loopback server and its connections in order. says: its answer to the first bytes."""

    def __init__(self, *, echoes: bool = False, reads: bool = True, says: bytes = b"") -> None:
        self.echoes = echoes
        self.says = says
        self.reads = reads
        self.connections: list[Far] = []
        self.target = ("", 0)

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Listen until *stack* is closed."""
        listening = await asyncio.get_running_loop().create_server(lambda: Far(self), "127.0.0.1", 0)
        stack.push_async_callback(self._stop, listening)
        self.target = listening.sockets[0].getsockname()
        if not self.reads:
            listening.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    async def _stop(self, listening: asyncio.Server) -> None:
        listening.close()
        for far in self.connections:
            far.transport.abort()
            await far.lost.wait()

    async def connection(self, number: int = 0) -> Far:
        """Wait for the connection of that number."""
        await until(lambda: len(self.connections) > number)
        return self.connections[number]


class Lab:
    """A gate, its relay, and the network behind it. resolver, names: of the latest gate."""

    resolver: Resolver
    names: ResolverClient

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.outside = Outside()
        self.log: list[dict[str, Any]] = []
        self._stack = stack
        self.gate: Gate
        self.ledger: Ledger
        self.relay: Relay

    async def server(self, address: str, port: int, **how: Any) -> Server:  # noqa: ANN401 - as for Server
        """A server at an outside address."""
        server = Server(**how)
        await server.start(self._stack)
        self.outside.routes[address, port] = server.target
        return server

    async def open(self, host: str, port: int) -> tuple[int, Far]:
        """Connect to a new server at GOOD; return the stream and the server's end of the connection."""
        made = await self.server(GOOD, port)
        stream = await self.relay.connect(host, port)
        return stream, await made.connection()

    async def stopped(self, stream: int, far: Far) -> None:
        """Wait for a reset by policy, and check that the server got nothing."""
        assert await self.relay.end(stream) == (streams.RESET, egress.POLICY)
        await far.over()
        assert far.got == b""

    async def another(
        self, policy: Policy, denied: Mapping[str, set[int] | None] | None = None, settings: NetSettings | None = None
    ) -> tuple[Gate, Relay, Ledger]:
        """Another gate with the same outside, and its relay. By default, port 22 is not inspected."""
        loop = asyncio.get_running_loop()
        allowlist = make_allowlist(policy, denied, settings or NetSettings(opaque_ports=frozenset({22})))
        ledger = Ledger(self._write, loop.time)
        self.resolver = Resolver()
        self._stack.callback(self.resolver.close)
        names = self.names = ResolverClient(self.resolver.gates, loop)
        made = Gate(allowlist, Dialler(allowlist, names, cast("asyncio.AbstractEventLoop", self.outside)), ledger, loop)
        near, far = socket.socketpair()
        relay = Relay()
        for sock, protocol in ((near, made), (far, relay)):
            sock.setblocking(False)  # noqa: FBT003 - it takes no names
            await loop.create_connection(lambda protocol=protocol: protocol, sock=sock)  # type: ignore[misc]
        self._stack.push_async_callback(_stop, made, relay)
        return made, relay, ledger

    def _write(self, line: bytes) -> bool:
        self.log.append(json.loads(line))
        return True

    async def logged(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for the log line of the *count*-th such event."""
        await until(lambda: len([line for line in self.log if line["event"] == event]) >= count)
        return [line for line in self.log if line["event"] == event][count - 1]

    def use(self) -> NetworkUse:
        """The account of connections."""
        return self.ledger.use()

    def denied(self) -> list[tuple[str, str]]:
        """Host and rule of each refusal."""
        return [(contact.host, contact.rule) for contact in self.use().denied]


async def _stop(made: Gate, relay: Relay) -> None:
    made.close()
    relay.transport.abort()
    await relay.closed.wait()


@contextlib.asynccontextmanager
async def lab(
    policy: Policy = LISTED, denied: Mapping[str, set[int] | None] | None = None, settings: NetSettings | None = None
) -> AsyncIterator[Lab]:
    """A gate with its surroundings, closed on exit."""
    async with contextlib.AsyncExitStack() as stack:
        made = Lab(stack)
        made.gate, made.relay, made.ledger = await made.another(policy, denied, settings)
        yield made


def on_a_loop(scenario: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Turn a coroutine into a test with a timeout that fails on any error of a callback or task."""

    @functools.wraps(scenario)
    def test(*args: P.args, **words: P.kwargs) -> None:
        faults: list[dict[str, Any]] = []

        async def bounded() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
            async with asyncio.timeout(TEST_S):
                await scenario(*args, **words)

        asyncio.run(bounded())
        assert not faults

    return test


@pytest.mark.parametrize("first", ["program", "far end"])
@on_a_loop
async def test_a_listed_name_carries_both_ways_to_the_end(first: str) -> None:
    """A connection to a listed name carries data both ways until both ends close, whichever of them does first."""
    async with lab() as it:
        stream, far = await it.open("A.Example.", 22)
        if first == "far end":
            far.transport.write(b"answer")
            far.transport.write_eof()
            assert await it.relay.end(stream) == (streams.FIN, 0)
        it.relay.send(stream, b"\0question")
        it.relay.finish(stream)
        assert await far.data(9) == b"\0question"
        await until(lambda: far.ended)
        if first == "program":
            far.transport.write(b"answer")
            assert await it.relay.data(stream, 6) == b"answer"
            far.transport.write_eof()
            assert await it.relay.end(stream) == (streams.FIN, 0)
        assert (await it.logged("closed"))["received_bytes"] == 6
        assert not it.relay.link.is_open(stream)
        (row,) = it.use().allowed
        assert (row.host, row.port, row.rule, row.address) == ("a.example", 22, "net.allow_hosts[0]", GOOD)
        assert (row.count, row.sent_bytes, row.received_bytes) == (1, 9, 6)
        assert it.outside.dialled == [(GOOD, 22)]


@on_a_loop
async def test_connect_succeeds_after_the_far_end_accepts() -> None:
    """A program's connect succeeds only when the far end has accepted."""
    async with lab() as it:
        answered = asyncio.Event()
        server = await it.server(GOOD, 22)
        it.outside.routes[GOOD, 22] = answered
        stream = it.relay.ask("a.example", 22)
        await until(lambda: it.outside.dialled)
        assert await it.relay.answer(it.relay.ask("unlisted.example")) == egress.POLICY
        assert stream not in it.relay.events
        it.outside.routes[GOOD, 22] = server.target
        answered.set()
        assert await it.relay.answer(stream) == egress.OK


ERRORS: Final = {
    errno.ECONNREFUSED: egress.REFUSED,
    errno.EHOSTUNREACH: egress.HOST_UNREACHABLE,
    errno.ENETUNREACH: egress.NET_UNREACHABLE,
    errno.EADDRNOTAVAIL: egress.NET_UNREACHABLE,
    errno.EACCES: egress.HOST_UNREACHABLE,
}


@pytest.mark.parametrize("number", ERRORS)
@on_a_loop
async def test_a_program_gets_the_far_end_s_error(number: int) -> None:
    """A network error reaches the program unchanged and counts as failed, not denied."""
    async with lab() as it:
        it.outside.routes[GOOD, 22] = OSError(number, os.strerror(number))
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == ERRORS[number]
        (row,) = it.use().failed
        assert (row.rule, row.reason, row.address) == ("dial:failed", os.strerror(number), GOOD)
        assert not it.use().denied


@on_a_loop
async def test_addresses_of_a_name_are_tried_in_order() -> None:
    """The addresses of a name are tried in order, three at most."""
    async with lab() as it:
        tried = [f"93.184.215.{number}" for number in range(1, 6)]
        it.resolver.answers["a.example"] = tried
        await it.server(tried[2], 22)
        await it.server(tried[3], 53)
        await it.relay.connect("a.example", 22)
        assert it.outside.dialled == [(address, 22) for address in tried[:3]]
        assert await it.relay.answer(it.relay.ask("a.example", 53)) == egress.NET_UNREACHABLE


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timeouts for everything that waits."""
    monkeypatch.setattr(dialler, "_TRY_S", 0.05)
    monkeypatch.setattr(dialler, "LOOK_UP_S", 0.1)
    monkeypatch.setattr(dialler, "_ALL_TRIES_S", 0.2)
    monkeypatch.setattr(gate, "_TICK_S", 0.02)


@pytest.mark.usefixtures("hasty")
@on_a_loop
async def test_silence_ends_in_a_timeout() -> None:
    """A silent resolver or far end costs the program a bounded time."""
    async with lab() as it:
        it.outside.routes[GOOD, 22] = asyncio.Event()
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.TIMED_OUT
        assert await it.relay.answer(it.relay.ask("x.wild.example", 22)) == egress.TIMED_OUT
        assert [row.rule for row in it.use().failed] == ["dial:timeout", "name:timeout"]


@on_a_loop
async def test_missing_names_and_failed_look_ups_differ() -> None:
    """A name without addresses and a failed look-up have different errors."""
    async with lab() as it:
        it.resolver.answers |= {"a.example": resolver.NO_NAME, "b.example": resolver.FAILED, "c.wild.example": []}
        assert await it.relay.answer(it.relay.ask("a.example")) == egress.NO_NAME
        assert await it.relay.answer(it.relay.ask("b.example")) == egress.TIMED_OUT
        assert await it.relay.answer(it.relay.ask("c.wild.example")) == egress.NO_NAME
        assert [row.rule for row in it.use().failed] == ["name:unknown", "name:failed", "name:unknown"]


REFUSED: Final = """
unlisted.example:443 a.example:25 wild.example:443 a.example.evil.test:443 xa.example:443 93.184.216.1:443
93.184.215.14:444 127.0.0.1:80 10.0.0.1:80 169.254.169.254:80 198.18.0.16:443 0.0.0.0:443 255.255.255.255:443
224.0.0.1:443 100.100.100.200:80 168.63.129.16:80 localhost:80 x.local:443 intranet:443 [::1]:443 [2606:4700::1]:443
[::ffff:127.0.0.1]:443 [64:ff9b::a9fe:a9fe]:443 [2002:7f00:1::]:443 [fe80::1]:443 bad.wild.example:443
93.184.215.99:443 45.45.45.53:53 45.45.45.53:853
"""


@on_a_loop
async def test_refused_connections_fail_at_once() -> None:
    """A refused connection, or one to a malformed host, fails at once, without a look-up, with rule and reason."""
    denied: dict[str, set[int] | None] = {"bad.wild.example": None, "93.184.215.99": {443}}
    allowlist = make_allowlist(LISTED, denied)
    async with lab(denied=denied) as it:
        for endpoint in REFUSED.split():
            request = parse_request(endpoint)
            host = endpoint.rpartition(":")[0].strip("[]")
            assert await it.relay.answer(it.relay.ask(host, request.port)) == egress.POLICY, endpoint
            decision = decide(allowlist, request)
            row = it.use().denied[-1]
            assert (row.host, row.port, row.transport) == (str(request.host), request.port, "tcp")
            assert (row.rule, row.reason) == (decision.rule, decision.reason), endpoint
        assert len(it.use().denied) == len(REFUSED.split())
        for raw in (b"2130706433", b"a.example\0", b"\xff\xfe", b"x" * 255):
            stream = it.relay.open(raw, 443)
            it.relay.flush()
            assert await it.relay.answer(stream) == egress.POLICY, raw
            row = it.use().denied[-1]
            assert (row.rule, row.host.isascii(), row.host.isprintable()) == ("malformed", True, True)
        assert await it.relay.answer(it.relay.ask("a.example", 0)) == egress.POLICY
        assert it.resolver.asked == []
        assert it.outside.dialled == []


SPECIAL: Final = """
127.0.0.1 10.1.2.3 169.254.169.254 192.168.77.5 0.0.0.0 100.64.0.1 198.18.0.16 224.0.0.1 255.255.255.255 168.63.129.16
::ffff:127.0.0.1 64:ff9b::a9fe:a9fe 2002:7f00:1:: fe80::1 ::1 fd00::1 ::7f00:1 2001:db8::1
"""


@on_a_loop
async def test_special_addresses_of_names_are_refused() -> None:
    """A listed name that resolves to a special address is refused and not dialled."""
    async with lab() as it:
        for number, address in enumerate(SPECIAL.split()):
            it.resolver.answers[f"n{number}.wild.example"] = [address]
            assert await it.relay.answer(it.relay.ask(f"n{number}.wild.example")) == egress.POLICY, address
            row = it.use().denied[-1]
            assert row.rule.startswith("deny-floor:")
            assert row.address == str(unmapped(ip_address(address)))
            assert row.host == f"n{number}.wild.example"
        assert it.outside.dialled == []


@on_a_loop
async def test_only_public_addresses_are_dialled() -> None:
    """Among mixed addresses of a name, only the public ones are dialled."""
    async with lab() as it:
        it.resolver.answers["a.example"] = ["127.0.0.1", "::1", GOOD, "10.0.0.1"]
        await it.server(GOOD, 22)
        await it.relay.connect("a.example", 22)
        assert it.outside.dialled == [(GOOD, 22)]
        del it.outside.routes[GOOD, 22]
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.NET_UNREACHABLE
        assert it.outside.dialled == [(GOOD, 22)] * 2


NAT64_ADDRESSES: Final = """
2a01:4f8:c000:aa::           2a01:4f8:a9fe:a9fe::        2a01:4f8:5db8:d70e::        2a01:4f8:5db8:d763::
2a01:4f8:64c0:0:aa::         2a01:4f8:64a9:fea9:fe::     2a01:4f8:645d:b8d7:e::      2a01:4f8:645d:b8d7:63::
2a01:4f8:64:c000:0:aa00::    2a01:4f8:64:a9fe:a9:fe00::  2a01:4f8:64:5db8:d7:e00::   2a01:4f8:64:5db8:d7:6300::
2a01:4f8:64:c0:0:aa::        2a01:4f8:64:a9:fe:a9fe::    2a01:4f8:64:5d:b8:d70e::    2a01:4f8:64:5d:b8:d763::
2a01:4f8:64:1:c0:0:aa00:0    2a01:4f8:64:1:a9:fea9:fe00:0 2a01:4f8:64:1:5d:b8d7:e00:0 2a01:4f8:64:1:5d:b8d7:6300:0
2a01:4f8:64::c000:ab         2a01:4f8:64::a9fe:a9fe      2a01:4f8:64::5db8:d70e      2a01:4f8:64::5db8:d763
64:ff9b::c000:aa             64:ff9b::a9fe:a9fe          64:ff9b::5db8:d70e          64:ff9b::5db8:d763
"""
"""For each prefix: what ipv4only.arpa has, and the addresses of the metadata service, of GOOD, and of a denied host."""


@pytest.mark.parametrize("row", NAT64_ADDRESSES.strip().splitlines(), ids=lambda row: row.split()[0])
@on_a_loop
async def test_an_address_that_nat64_translates_is_judged_as_ipv4(row: str) -> None:
    """An IPv6 address in which the network's NAT64 embeds an IPv4 address is judged as that IPv4 address too."""
    known, metadata, good, denied = row.split()
    other = "2606:4700:64:64:c0:0:aa00:0"  # another translator's prefix, of 64 bits
    async with lab(denied={"93.184.215.99": None}) as it:
        it.resolver.answers |= {NAT64: [known, other], "a.example": [metadata], "c.wild.example": [good]}
        it.resolver.answers |= {"d.wild.example": [denied], "b.example": ["2606:4700:64:64:7f:0:100:0"]}
        assert await it.relay.answer(it.relay.ask("a.example")) == egress.POLICY
        assert await it.relay.answer(it.relay.ask("b.example")) == egress.POLICY
        assert await it.relay.answer(it.relay.ask("d.wild.example")) == egress.POLICY
        assert await it.relay.answer(it.relay.ask("c.wild.example")) == egress.NET_UNREACHABLE
        assert [rule for _, rule in it.denied()] == [
            *("deny-floor:metadata", "deny-floor:loopback", "deny-host:93.184.215.99")
        ]
        assert it.outside.dialled == [(str(ip_address(good)), 443)]
        assert it.resolver.times(NAT64) == 1


@on_a_loop
async def test_ipv6_is_not_dialled_while_nat64_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the prefixes of NAT64 cannot be learnt, only IPv4 addresses are dialled, and the gate learns again."""
    monkeypatch.setattr(dialler, "_NO_PREFIXES_S", 0.0)
    async with lab() as it:
        it.resolver.answers |= {
            NAT64: resolver.FAILED,
            "a.example": ["2606:4700::1"],
            "b.example": ["2606:4700::1", GOOD],
        }
        await it.server(GOOD, 22)
        await it.relay.connect("b.example", 22)
        assert await it.relay.answer(it.relay.ask("a.example")) == egress.TIMED_OUT
        assert it.use().failed[-1].rule == "nat64:unknown"
        assert it.outside.dialled == [(GOOD, 22)]
        it.resolver.answers[NAT64] = []
        assert await it.relay.answer(it.relay.ask("a.example")) == egress.NET_UNREACHABLE
        assert it.outside.dialled[1:] == [("2606:4700::1", 443)]


@on_a_loop
async def test_the_host_s_own_public_address_is_refused() -> None:
    """A connection that leads to the host itself is closed before a byte passes."""
    assert dialler._is_own(ip_address("127.0.0.1"))  # noqa: SLF001 - no other own address is on every machine
    assert not dialler._is_own(ip_address(GOOD))  # noqa: SLF001 - as above
    async with lab() as it:
        server = await it.server(GOOD, 22)
        it.outside.own.add(GOOD)
        it.outside.routes[GOOD, 22] = ("127.0.0.1", server.target[1])
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.POLICY
        assert await it.relay.answer(it.relay.ask(GOOD, 22)) == egress.POLICY
        assert it.denied() == [("a.example", "deny-floor:own"), (GOOD, "deny-floor:own")]
        for number in (0, 1):
            far = await server.connection(number)
            await far.over()
            assert far.got == b""


@on_a_loop
async def test_the_host_s_own_address_is_refused_behind_nat64(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IPv6 address in which NAT64 embeds a public address of this host is refused before it is dialled."""
    # The kernel's answer, since a test machine has no public address.
    monkeypatch.setattr(dialler, "_is_own", lambda address: address == ip_address(GOOD))
    async with lab() as it:
        it.resolver.answers |= {NAT64: ["64:ff9b::c000:aa"], "a.example": ["64:ff9b::5db8:d70e"]}
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.POLICY
        assert (it.denied(), it.outside.dialled) == ([("a.example", "deny-floor:own")], [])


@pytest.mark.parametrize("fresh", [True, False])
@on_a_loop
async def test_a_name_is_looked_up_once_for_a_connection(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 - as parametrize gives it
    """Look-ups are cached, and each connection dials the address that was checked, so DNS rebinding does not help."""
    monkeypatch.setattr(dialler, "_CACHE_S", 60.0 if fresh else 0.0)
    async with lab() as it:
        await it.server(GOOD, 22)
        await it.relay.connect("a.example", 22)
        it.resolver.answers["a.example"] = ["127.0.0.1"]
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == (egress.OK if fresh else egress.POLICY)
        assert it.resolver.times("a.example") == (1 if fresh else 2)
        assert it.outside.dialled == [(GOOD, 22)] * (2 if fresh else 1)


# an upstream proxy

PROXY_URL: Final = b'[net]\nproxy = "http://us%65r:pw@10.0.0.9:3128"\n'
BY_ADDRESS: Final = parse_settings(PROXY_URL, "here")
BY_NAME: Final = parse_settings(PROXY_URL + b"proxy_resolves = true\n", "here")
HEAD: Final = b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n"


@pytest.mark.parametrize(
    ("settings", "asked", "target", "address"),
    [
        (BY_ADDRESS, "a.example", f"{GOOD}:22", GOOD),
        (BY_ADDRESS, "b.example", f"{GOOD}:22", GOOD),
        (BY_NAME, "a.example", "a.example:22", ""),
        (BY_NAME, GOOD, f"{GOOD}:22", GOOD),
    ],
)
@on_a_loop
async def test_connections_can_go_through_a_proxy(settings: NetSettings, asked: str, target: str, address: str) -> None:
    """The proxy is asked for the checked address or, if it resolves, for the name; its later bytes are the server's."""
    async with lab(settings=settings) as it:
        it.resolver.answers["b.example"] = [f"::ffff:{GOOD}"]  # which is the IPv4 address
        server = await it.server("10.0.0.9", 3128, says=HEAD + b"SSH-2.0-a\r\n")
        stream = await it.relay.connect(asked, 22)
        assert await it.relay.data(stream, 11) == b"SSH-2.0-a\r\n"
        far = await server.connection()
        request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Basic dXNlcjpwdw==\r\n\r\n"
        it.relay.send(stream, b"SSH-2.0-b\r\n")
        assert await far.data(len(request) + 11) == request.encode() + b"SSH-2.0-b\r\n"
        assert it.resolver.times(asked) == (settings is BY_ADDRESS)
        assert it.outside.dialled == [("10.0.0.9", 3128)]
        (row,) = it.use().allowed
        assert (row.host, row.address, row.sent_bytes) == (asked, address, 11)
        assert "dXNlcjpwdw" not in f"{it.log} {it.use()} {settings}"


@on_a_loop
async def test_a_proxy_does_not_open_special_addresses() -> None:
    """The checks of addresses, first bytes and UDP are the same with a proxy; only its own address is free."""
    async with lab(policy_with("a.example", "10.0.0.9", "b.example"), settings=BY_NAME) as it:
        server = await it.server("10.0.0.9", 3128, says=HEAD)
        assert await it.relay.answer(it.relay.ask("10.0.0.9", 22)) == egress.POLICY
        assert await it.relay.answer(it.relay.ask("c.example", 22)) == egress.POLICY
        assert await it.relay.answer(it.relay.ask("a.example", 53, UDP)) == egress.POLICY
        stream = await it.relay.connect("a.example", 443)
        it.relay.send(stream, OTHER_HELLO)
        assert await it.relay.end(stream) == (streams.RESET, egress.POLICY)
        assert [rule for _, rule in it.denied()] == [
            "deny-floor:private",
            "net.allow_hosts",
            "proxy:udp",
            "tls:other-name",
        ]
        assert OTHER_HELLO not in (await server.connection()).got
    async with lab(settings=BY_ADDRESS) as it:
        await it.server("10.0.0.9", 3128, says=HEAD)
        it.resolver.answers["a.example"] = ["192.168.1.1"]
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.POLICY
        assert it.outside.dialled == []


@on_a_loop
async def test_addresses_that_the_settings_open_are_not_asked_of_the_proxy() -> None:
    """A special address in allow_local belongs to the host's own network, so the gate connects to it itself."""
    settings = parse_settings(PROXY_URL + b'allow_local = ["10.1.1.1:22"]\n', "here")
    async with lab(policy_with("10.1.1.1", "a.example"), settings=settings) as it:
        await it.server("10.1.1.1", 22)
        it.resolver.answers["a.example"] = ["10.1.1.1"]
        for host in ("10.1.1.1", "a.example"):
            await it.relay.connect(host, 22)
        assert it.outside.dialled == [("10.1.1.1", 22)] * 2


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("says", "rule"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "proxy:407"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "proxy:100"),
        (b"HTTP/1.1 200 OK\n\nbytes of the server\r\n\r\n", "proxy:0"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "proxy:0"),
        (b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", "proxy:0"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 9000 + b"\r\n\r\n", "proxy:0"),
        (b"SSH-2.0-x\r\n\r\n", "proxy:0"),
        (b"HTTP/1.1 200 OK\r\n", "proxy:timeout"),
    ],
)
@on_a_loop
async def test_only_a_proxys_success_opens_a_connection(says: bytes, rule: str) -> None:
    """Any answer of the proxy other than 2xx with a correct head of at most 8 KiB is a failed connection."""
    async with lab(settings=BY_ADDRESS) as it:
        await it.server("10.0.0.9", 3128, says=says)
        code = await it.relay.answer(it.relay.ask("a.example", 22))
        assert code == (egress.TIMED_OUT if rule == "proxy:timeout" else egress.HOST_UNREACHABLE)
        (row,) = it.use().failed
        assert (row.rule, row.address, "proxy" in row.reason) == (rule, GOOD, True)
    async with lab(settings=BY_ADDRESS) as it:
        it.outside.routes["10.0.0.9", 3128] = OSError(errno.ECONNREFUSED, "")
        assert await it.relay.answer(it.relay.ask("a.example", 22)) == egress.HOST_UNREACHABLE
        assert it.use().failed[0].reason == "the proxy cannot be reached: Connection refused"


# bounds


@on_a_loop
async def test_connections_that_are_being_made_are_bounded() -> None:
    """At most 128 connections are pending; others wait, and start in order when a pending one ends."""
    most = LIMITS.max_pending
    async with lab(settings=FAST) as it:
        numbers = [it.relay.ask(f"n{number}.wild.example") for number in range(most)]
        given_up, another = it.relay.ask("more.wild.example"), it.relay.ask("another.wild.example")
        assert await it.relay.answer(it.relay.ask("unlisted.example")) == egress.POLICY
        it.relay.reset(given_up)
        it.relay.reset(numbers[0])
        await until(lambda: it.resolver.times("another.wild.example"))
        assert another not in it.relay.events
        assert not it.resolver.times("more.wild.example")
        assert len(it.gate._pending) == most  # noqa: SLF001 - the bound is the promise
        assert [row.rule for row in it.use().failed] == ["dial:given-up"] * 2


@on_a_loop
async def test_giving_up_a_pending_connection_ends_its_dial() -> None:
    """Cancelling a pending connection, also before it is handled, stops its dialling and counts it as failed."""
    async with lab() as it:
        it.outside.routes[GOOD, 22] = asyncio.Event()
        stream = it.relay.ask("a.example", 22)
        await until(lambda: it.outside.dialled)
        it.relay.reset(stream)
        await it.outside.cancelled.wait()
        assert await it.relay.answer(it.relay.ask("unlisted.example")) == egress.POLICY
        assert stream not in it.relay.events
        assert not it.gate._pending  # noqa: SLF001 - that nothing is left is the promise
        assert not it.gate._link.is_open(stream)  # noqa: SLF001 - as above
        assert [row.rule for row in it.use().failed] == ["dial:given-up"]
        for _ in range(50):
            it.relay.link.reset(it.relay.open(b"a.example", 22))  # both frames arrive at once
        it.relay.flush()
        await it.logged("failed", 51)
        assert not it.gate._pending  # noqa: SLF001 - as above
        assert sum(row.count for row in it.use().failed if row.rule == "dial:given-up") == 51


@on_a_loop
async def test_open_connections_are_bounded() -> None:
    """Only as many connections as the user's settings allow are open, and others wait for the end of one."""
    async with lab(settings=replace(FAST, max_connections=5)) as it:
        await it.server(GOOD, 22)
        numbers = [await it.relay.connect(GOOD, 22) for _ in range(5)]
        waits = it.relay.ask(GOOD, 22)
        assert await it.relay.answer(it.relay.ask("unlisted.example")) == egress.POLICY
        assert waits not in it.relay.events
        assert it.outside.dialled == [(GOOD, 22)] * 5
        it.relay.reset(numbers[3])
        assert await it.relay.answer(waits) == egress.OK


@on_a_loop
async def test_the_rate_of_connections_is_bounded() -> None:
    """Connections beyond a burst of 200 wait until 100 a second allow them, and none is lost."""
    async with lab() as it:
        began = asyncio.get_running_loop().time()
        numbers = [it.relay.ask(GOOD, 22) for _ in range(300)]
        await it.relay.answer(numbers[199])
        at_once = len(it.outside.dialled)
        codes = [await it.relay.answer(stream) for stream in numbers]
        took = asyncio.get_running_loop().time() - began
        assert codes == [egress.NET_UNREACHABLE] * 300
        assert took >= 0.9
        assert 200 <= at_once <= 200 + 100 * took
        assert it.use().denied == []


@on_a_loop
async def test_a_request_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has waited for a limit too long is refused, and the record names the limit."""
    monkeypatch.setattr(gate, "_WAITING_S", 0.05)
    monkeypatch.setattr(gate, "_TICK_S", 0.02)
    settings = NetSettings(connections_per_second=1)
    async with lab(settings=settings) as it:
        numbers = [it.relay.ask(GOOD, 22) for _ in range(3)]
        assert [await it.relay.answer(stream) for stream in numbers] == [egress.NET_UNREACHABLE] * 2 + [egress.LIMIT]
        assert it.use().denied[-1].rule == "limit:connections_per_second"
    async with lab(settings=replace(FAST, max_pending=1)) as it:
        _, waits = it.relay.ask("x.wild.example"), it.relay.ask("y.wild.example")
        assert await it.relay.answer(waits) == egress.LIMIT
        assert it.use().denied[-1].rule == "limit:max_pending"
    async with lab(settings=replace(FAST, max_connections=1)) as it:
        await it.server(GOOD, 22)
        await it.relay.connect(GOOD, 22)
        assert await it.relay.answer(it.relay.ask(GOOD, 22)) == egress.LIMIT
        denied = it.use().denied[-1]
        assert denied.reason == "it waited 0.05 s because of the limit max_connections = 1"


@pytest.mark.parametrize(
    ("wildcards", "most", "reason"),
    [
        (1, NAMES_OF_WILDCARD, f"{NAMES_OF_WILDCARD} names of one entry were resolved"),
        (5, NAMES_MAX, f"{NAMES_MAX} names were resolved"),
    ],
)
@on_a_loop
async def test_names_that_are_looked_up_are_bounded(wildcards: int, most: int, reason: str) -> None:
    """At most 256 names below one wildcard, and 1024 in all, can be looked up."""
    policy = policy_with("a.example", *(f"*.w{number}.example" for number in range(wildcards)))
    async with lab(policy, settings=FAST) as it:
        it.resolver.unknown = resolver.NO_NAME
        codes = [
            await it.relay.answer(it.relay.ask(f"n{number}.w{number % wildcards}.example"))
            for number in range(most + 10)
        ]
        assert codes == [egress.NO_NAME] * most + [egress.LIMIT] * 10
        assert it.use().denied[-1].reason == reason
        assert await it.relay.answer(it.relay.ask("n0.w0.example")) == egress.NO_NAME
        other = egress.NET_UNREACHABLE if wildcards == 1 else egress.LIMIT
        assert await it.relay.answer(it.relay.ask("a.example")) == other
        assert len(it.resolver.asked) <= most + 2


@on_a_loop
async def test_ten_thousand_requests_at_once_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 requests at once are all answered, with bounded work and a bounded record."""
    monkeypatch.setattr(dialler, "LOOK_UP_S", TEST_S)  # the pending ones stay, however busy the host is
    count, left = 10_000, LIMITS.max_pending + WAITING_MAX
    async with lab() as it:
        most = 0
        made = it.gate._pending  # noqa: SLF001 - the bound is the promise
        numbers = [it.relay.open(b"n%d.wild.example" % (number % 100), 443) for number in range(count)]
        while data := it.relay.link.data_to_send():
            it.relay.transport.write(data)
            it.relay.link.sent(len(data))

        def answered() -> bool:
            nonlocal most
            most = max(most, len(made))
            return it.relay.count >= count - left

        await until(answered)
        assert 0 < most <= LIMITS.max_pending
        assert {events[0].code for events in it.relay.events.values()} == {egress.LIMIT}
        assert len(numbers) == count
        use = it.use()
        assert sum(row.count for row in use.denied) + use.more == count - left
        elapsed_s = (it.log[-1]["ms"] - it.log[0]["ms"]) / 1000
        assert len(it.log) <= 150 + 20 * elapsed_s  # the burst and the rate of the log


# hostile guests


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 12, b"\x04\0\0\0\0\0\0\x09\0\0\0\x01x", b"\x01\0\0\0\0\0\0\x01\0\0\0\0"]
)
@on_a_loop
async def test_a_violation_and_the_end_of_the_guest_end_all_connections(data: bytes) -> None:
    """A guest that breaks the protocol or ends loses all its connections, and the record names the violation."""
    async with lab() as it:
        server = await it.server(GOOD, 22)
        it.outside.routes[OTHER, 22] = asyncio.Event()
        for _ in range(2):
            await it.relay.connect("a.example", 22)
        it.relay.ask("b.example", 22)
        await until(lambda: (OTHER, 22) in it.outside.dialled)
        if data:
            it.relay.transport.write(data)
            await it.relay.closed.wait()
        else:
            it.relay.transport.abort()
        await it.gate.over.wait()
        for number in (0, 1):
            await (await server.connection(number)).over()
        await it.outside.cancelled.wait()
        assert it.denied() == ([("", "frames")] if data else [])
        assert len([line for line in it.log if line["event"] == "closed"]) == 2


@on_a_loop
async def test_a_reset_reaches_the_other_end() -> None:
    """A reset by the program reaches the far end, and one by the far end reaches the program."""
    async with lab() as it:
        stream, far = await it.open("a.example", 22)
        it.relay.send(stream, b"\0part")
        await far.data(5)
        it.relay.reset(stream)
        await far.over()
        assert isinstance(far.error, ConnectionResetError)
        stream, far = await it.open("a.example", 22)
        far.transport.abort()
        assert (await it.relay.end(stream))[0] in {streams.RESET, streams.FIN}


@on_a_loop
async def test_a_far_end_that_never_reads_delays_no_other() -> None:
    """A far end that never reads costs one window, and megabytes of another connection arrive intact meanwhile."""
    async with lab() as it:
        await it.server(GOOD, 22, reads=False)
        await it.server(OTHER, 22, echoes=True)
        for _ in range(20):
            it.relay.send(await it.relay.connect("a.example", 22), b"\0" * (16 << 20))
        data = b"\0" + bytes(range(256)) * (16 << 10)
        stream = await it.relay.connect("b.example", 22)
        it.relay.send(stream, data)
        assert await it.relay.data(stream, len(data)) == data
        for flow in it.gate._flows.values():  # noqa: SLF001 - the bound is the promise
            assert isinstance(flow, TcpFlow)
            assert flow.waiting_bytes() <= WINDOW
            assert flow.transport.get_write_buffer_size() <= WINDOW


@on_a_loop
async def test_many_small_writes_to_a_stalled_server_take_linear_time() -> None:
    """Data in tiny pieces, for a server that does not read, delays no other connection."""
    async with lab() as it:
        it.outside.small_buffers = True
        await it.server(GOOD, 22, reads=False)
        await it.server(OTHER, 22, echoes=True)
        stalled = await it.relay.connect("a.example", 22)
        other = await it.relay.connect("b.example", 22)
        start = time.process_time()
        it.relay.transport.write(
            (streams.HEADER.pack(streams.DATA, 0, 0, stalled, 1) + b"x") * 400_000
        )  # within the window
        it.relay.send(other, b"echo")
        assert await it.relay.data(other, 4) == b"echo"
        assert time.process_time() - start < 30  # with an entry for each piece, it took minutes


@on_a_loop
async def test_a_full_gate_opens_no_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate with too many buffered bytes opens no more connections."""
    monkeypatch.setattr(gate, "HELD_MAX_BYTES", WINDOW // 2)
    async with lab() as it:
        await it.server(GOOD, 22, reads=False)
        it.relay.send(await it.relay.connect("a.example", 22), b"\0" * (16 << 20))
        # The gate holds bytes only when the far end's buffers are full; each request shows a bit more of them.
        while (code := await it.relay.answer(it.relay.ask("a.example", 22))) == egress.OK:
            continue
        assert code == egress.LIMIT
        assert it.use().denied[-1].reason == "too many bytes are waiting to be sent"


@on_a_loop
async def test_a_program_that_never_reads_gets_one_window() -> None:
    """A program that never reads delays no other connection and costs one window of memory."""
    async with lab() as it:
        server = await it.server(GOOD, 22)
        await it.server(OTHER, 22, echoes=True)
        it.relay.takes = False
        full = [await it.relay.connect("a.example", 22) for _ in range(10)]
        for number, stream in enumerate(full):
            (await server.connection(number)).transport.write(b"\0" * (8 << 20))
            await it.relay.data(stream, WINDOW)
        it.relay.takes = True
        data = b"\0" * (4 << 20)
        stream = await it.relay.connect("b.example", 22)
        it.relay.send(stream, data)
        assert await it.relay.data(stream, len(data)) == data
        for stream in full:
            assert len(it.relay.got[stream]) == WINDOW
            flow = it.gate._flows[stream]  # noqa: SLF001 - the bound is the promise
            assert isinstance(flow, TcpFlow)
            assert flow.paused
            assert flow.waiting_bytes() <= egress.DATA_MAX


@on_a_loop
async def test_a_program_that_reads_late_gets_all() -> None:
    """Programs that read late get all data."""
    async with lab() as it:
        server = await it.server(GOOD, 22)
        it.relay.takes = False
        more = egress.DATA_MAX - 100  # the window is no multiple of the reads: of the last one the gate holds a part
        flows = cast("dict[int, TcpFlow]", it.gate._flows)  # noqa: SLF001 - nobody else knows what it holds
        numbers: list[int] = []
        while sum(flow.waiting_bytes() for flow in flows.values()) < 140_000:  # that many are "much" for the guest
            numbers.append(await it.relay.connect("a.example", 22))
            far = await server.connection(len(numbers) - 1)
            for size in (more, WINDOW):
                far.transport.write(b"\0" * size)
                await it.relay.data(numbers[-1], size)
        it.relay.takes = True
        for stream in numbers:
            for _ in range(4):
                it.relay.link.consumed(stream, WINDOW // 4)
        it.relay.flush()
        async with asyncio.timeout(5):
            for stream in numbers:
                await it.relay.data(stream, more + WINDOW)


@on_a_loop
async def test_a_guest_that_never_reads_stops_its_own_gate_only() -> None:
    """A guest that never reads stalls only its own gate."""
    async with lab() as it:
        server = await it.server(GOOD, 22)
        await it.server(OTHER, 22, echoes=True)
        numbers = [await it.relay.connect(GOOD, 22) for _ in range(40)]
        it.relay.transport.pause_reading()
        for number in range(len(numbers)):
            (await server.connection(number)).transport.write(b"\0" * (1 << 20))
        _, relay, _ = await it.another(LISTED)
        data = b"\0" * (8 << 20)
        stream = await relay.connect(OTHER, 22)
        relay.send(stream, data)
        assert await relay.data(stream, len(data)) == data
        # Each far end is read once before it has to wait.
        most = (4 + len(numbers)) * (egress.DATA_MAX + streams.HEADER.size)
        assert it.gate._queued() <= most  # noqa: SLF001 - the bound is the promise
        it.relay.transport.resume_reading()
        for stream in numbers:
            await it.relay.data(stream, 1 << 20)


@on_a_loop
async def test_guest_refusals_are_recorded() -> None:
    """A connection denied inside the guest is recorded with the deciding rule."""
    async with lab() as it:
        for host, port in ((b"unlisted.example", 443), (b"10.0.0.1", 80), (b"127.1", 443), (b"lookup.example", 0)):
            it.relay.link.message(egress.REFUSAL, Target(TCP, host, port).refusal())
        it.relay.flush()
        assert await it.relay.answer(it.relay.ask("a.example", 25)) == egress.POLICY
        rules = ["net.allow_hosts", "deny-floor:private", "malformed", "net.allow_hosts", "net.allow_hosts[0].ports"]
        assert [row.rule for row in it.use().denied] == rules
        assert it.outside.dialled == []
        assert it.resolver.asked == []


@on_a_loop
async def test_a_denial_is_recorded_if_the_guest_has_ended_since() -> None:
    """A gate that reads late records what the guest sent, also if it first writes to the guest, which has ended."""
    async with lab() as it:
        _, far = await it.open("a.example", 22)
        far.transport.write(b"for the guest")
        it.relay.link.message(egress.REFUSAL, Target(TCP, b"lookup.example", 0).refusal())
        it.relay.flush()
        it.relay.transport.abort()
        await it.gate.over.wait()
        assert it.denied() == [("lookup.example", "net.allow_hosts")]


# first bytes


@pytest.mark.parametrize(
    ("host", "port", "data", "rule", "name"),
    [
        ("a.example", 443, OTHER_HELLO, "tls:other-name", "b.example"),
        ("a.example", 443, b"SSH-2.0-x\r\n", "tls:not-tls", ""),
        ("a.example", 80, GET.replace(b"a.", b"b."), "http:other-host", "b.example"),
        ("a.example", 80, b"\x16\x03\x01\0\xff\x01" + bytes(300), "http:malformed", ""),
        ("a.example", 53, OTHER_HELLO, "tls:other-name", "b.example"),
        ("a.example", 53, GET.replace(b"a.", b"b."), "http:other-host", "b.example"),
        ("a.example", 53, b"\r\n" * 4096 + GET, "first-bytes:unknown", ""),
        (GOOD, 443, hello(sni(b"bad.example")), "name:denied", "bad.example"),
        (GOOD, 80, GET.replace(b"a.example", b"Bad.Example:80"), "name:denied", "bad.example"),
    ],
    ids=range(9),
)
@on_a_loop
async def test_first_bytes_for_another_host_are_not_delivered(
    host: str, port: int, data: bytes, rule: str, name: str
) -> None:
    """A connection whose first bytes name another host, or a denied one, is reset, and none of its bytes arrives."""
    async with lab(denied={"bad.example": None}) as it:
        stream, far = await it.open(host, port)
        it.relay.send(stream, data)
        await it.stopped(stream, far)
        (row,) = it.use().denied
        assert (row.host, row.rule, row.address, row.tls_name) == (host, rule, GOOD, name)


@on_a_loop
async def test_a_second_request_for_another_host_is_not_delivered() -> None:
    """A later request for another host is not delivered, and the connection is reset."""
    async with lab() as it:
        stream, far = await it.open("a.example", 80)
        it.relay.send(stream, GET)
        await far.data(len(GET))
        it.relay.send(stream, GET + GET.replace(b"a.", b"evil."))
        assert await it.relay.end(stream) == (streams.RESET, egress.POLICY)
        await far.over()
        assert b"evil" not in far.got
        assert far.got.count(b"HTTP/1.1") <= 2
        assert [row.tls_name for row in it.use().denied] == ["evil.example"]


@on_a_loop
async def test_the_end_of_held_data_follows_the_data() -> None:
    """Data that waits for the server's answer, and the end of the program's data, arrive after the answer."""
    async with lab() as it:
        stream, far = await it.open("a.example", 53)
        first, second = b"*1\r\n$4\r\nPING\r\n", b"*2\r\n$3\r\nGET\r\n$1\r\n\n\r\n"
        it.relay.send(stream, first + second)
        it.relay.finish(stream)
        assert await far.data(len(first)) == first
        assert not far.ended
        far.transport.write(b"+PONG\r\n")
        assert await far.data(len(first + second)) == first + second
        await far.over()
        far.transport.close()
        assert (await it.relay.end(stream))[0] == streams.FIN


@pytest.mark.usefixtures("hasty")
@on_a_loop
async def test_first_bytes_that_stay_unfinished_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished ClientHello times out, and none of it arrives."""
    monkeypatch.setattr(gate, "_FIRST_BYTES_S", 0.05)
    async with lab() as it:
        stream, far = await it.open("a.example", 443)
        it.relay.send(stream, HELLO[:-1])
        await it.stopped(stream, far)
        assert it.denied() == [("a.example", "first-bytes:timeout")]


@on_a_loop
async def test_a_banner_is_forwarded_first() -> None:
    """A server's banner is forwarded before the client sends anything."""
    async with lab() as it:
        stream, far = await it.open("a.example", 443)
        far.transport.write(b"220 ready")
        assert await it.relay.data(stream, 9) == b"220 ready"


# the user's own settings


@on_a_loop
async def test_a_network_in_the_settings_excludes_metadata_and_the_host() -> None:
    """An entry of allow_local for a network allows its addresses, but no metadata service and none of this host."""
    settings = parse_settings(b'[net]\nallow_local = ["100.64.0.0/10:80", "[fd00::/8]:80"]', "here")
    async with lab(policy_with("*.wild.example", ports=(80,)), settings=settings) as it:
        it.outside.own.add("100.64.0.2")
        it.outside.routes["100.64.0.2", 80] = (await it.server("100.64.0.3", 80)).target
        names = {"a": "100.64.0.3", "b": "100.100.100.200", "c": "fd00:ec2::254", "d": "100.64.0.2", "e": "10.0.0.1"}
        it.resolver.answers |= {f"{name}.wild.example": [address] for name, address in names.items()}
        codes = [await it.relay.answer(it.relay.ask(f"{name}.wild.example", 80)) for name in names]
        assert codes == [egress.OK, *[egress.POLICY] * 4]
        rules = ["metadata", "metadata", "own", "private"]
        assert [rule for _, rule in it.denied()] == [f"deny-floor:{rule}" for rule in rules]


@pytest.mark.parametrize(
    ("listed", "opened", "rule"),
    [(True, True, ""), (False, True, "net.allow_hosts"), (True, False, "deny-floor:loopback")],
)
@on_a_loop
async def test_a_local_service_needs_the_policy_and_the_settings(listed: bool, opened: bool, rule: str) -> None:  # noqa: FBT001 - as parametrize gives them
    """A local service is reached, as host.x07 too, only if both the policy and the user's settings list it."""
    local = "127.0.0.1"
    address = Addresses(4, int(IPv4Address(local)), int(IPv4Address(local)))
    policy = policy_with("a.example", *([local, "host.x07"] if listed else []), ports=(8080,))
    settings = NetSettings(allow_local=frozenset({(address, 8080 if opened else 8081)}))
    async with lab(policy, settings=settings) as it:
        await it.server(local, 8080)
        it.outside.own.add(local)
        it.resolver.answers["a.example"] = [local]
        for host in (local, "host.x07"):
            assert await it.relay.answer(it.relay.ask(host, 8080)) == (egress.POLICY if rule else egress.OK), host
        assert await it.relay.answer(it.relay.ask("x.host.x07", 8080)) == egress.POLICY
        assert it.resolver.asked == []
        assert await it.relay.answer(it.relay.ask("a.example", 8080)) == (egress.OK if opened else egress.POLICY)
        assert [row.rule for row in it.use().denied if row.host == local] == ([rule] if rule else [])


# UDP


@contextlib.asynccontextmanager
async def udp_server(outside: Outside, address: str, port: int) -> AsyncIterator[list[tuple[str, int]]]:
    """A datagram server at an outside address that echoes, and the senders of what it got."""
    loop, senders = asyncio.get_running_loop(), list[tuple[str, int]]()
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)  # noqa: FBT003 - it takes no names
        sock.bind(("127.0.0.1", 0))
        outside.routes[address, port] = sock.getsockname()

        def echo() -> None:
            data, sender = sock.recvfrom(1 << 16)
            senders.append(sender)
            sock.sendto(data, sender)

        loop.add_reader(sock, echo)
        try:
            yield senders
        finally:
            loop.remove_reader(sock)


@on_a_loop
async def test_only_the_dialled_peer_s_datagrams_come_in() -> None:
    """Only datagrams of the dialled peer reach the program."""
    async with lab() as it, udp_server(it.outside, GOOD, 53) as senders:
        stream = await it.relay.connect("a.example", 53, UDP)
        it.relay.datagram(stream, b"one")
        await until(lambda: it.relay.datagrams(stream) == [b"one"])
        with socket.socket(type=socket.SOCK_DGRAM) as third:
            third.bind(("127.0.0.1", 0))
            third.sendto(b"spoofed", senders[0])
        for data in (b"", b"x" * 30_000, b"two"):
            it.relay.datagram(stream, data)
        await until(lambda: len(it.relay.datagrams(stream)) == 4)
        assert it.relay.datagrams(stream) == [b"one", b"", b"x" * 30_000, b"two"]
        (row,) = it.use().allowed
        assert (row.transport, row.sent_bytes, row.received_bytes) == ("udp", 30_006, 30_006)
        it.relay.reset(stream)
        assert (await it.logged("closed"))["sent_bytes"] == 30_006


@pytest.mark.usefixtures("hasty")
@on_a_loop
async def test_an_idle_udp_flow_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle UDP flow is closed."""
    monkeypatch.setattr(gate, "_UDP_IDLE_S", 0.05)
    async with lab() as it, udp_server(it.outside, GOOD, 53):
        stream = await it.relay.connect("a.example", 53, UDP)
        assert await it.relay.end(stream) == (streams.RESET, egress.OK)
        await it.logged("closed")


@on_a_loop
async def test_a_closed_udp_port_does_no_harm() -> None:
    """Datagrams to a closed port are lost without harm."""
    async with lab() as it:
        with socket.socket(type=socket.SOCK_DGRAM) as nobody:
            nobody.bind(("127.0.0.1", 0))
            it.outside.routes[GOOD, 53] = nobody.getsockname()
        stream = await it.relay.connect("a.example", 53, UDP)
        for _ in range(5):
            it.relay.datagram(stream, b"x")
            assert await it.relay.answer(it.relay.ask("unlisted.example")) == egress.POLICY
        assert it.relay.datagrams(stream) == []


@on_a_loop
async def test_quic_is_refused_unless_its_port_is_opaque() -> None:
    """UDP port 443 is refused unless it is an opaque port."""
    async with lab() as it:
        assert await it.relay.answer(it.relay.ask("a.example", 443, UDP)) == egress.POLICY
        assert it.denied() == [("a.example", "udp-443")]
    async with lab(settings=NetSettings(opaque_ports=frozenset({443}))) as it, udp_server(it.outside, GOOD, 443):
        await it.relay.connect("a.example", 443, UDP)


# clocks and ends


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("rule", ["idle:idle_seconds", "idle:half-closed"])
@on_a_loop
async def test_an_idle_connection_times_out(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is idle for an hour, or half-closed for a minute, times out, and the record says why."""
    half = rule == "idle:half-closed"
    monkeypatch.setattr(gate, "_HALF_CLOSED_S", 0.05)
    async with lab(settings=NetSettings(idle_seconds=3600 if half else 0)) as it:
        stream, far = await it.open("a.example", 22)
        if half:
            it.relay.finish(stream)
        assert await it.relay.end(stream) == (streams.RESET, egress.TIMED_OUT)
        await far.over()
        (row,) = it.use().failed
        assert (row.rule, row.address, "idle for" in row.reason) == (rule, GOOD, True)
        assert (await it.logged("failed"))["rule"] == rule


@on_a_loop
async def test_the_end_of_the_resolver_is_noticed() -> None:
    """The gate notices a dead or misbehaving resolver, and ignores a late answer of it."""
    async with lab() as it:
        it.resolver.ours.send(b"\xff")
        await it.names.lost.wait()
    async with lab() as it:
        it.resolver.ours.send(resolver.encode_answer(77, resolver.FOUND, [ip_address(GOOD)]))  # late, and ignored
        await it.server(GOOD, 22)
        await it.relay.connect("a.example", 22)
        assert not it.names.lost.is_set()
        asyncio.get_running_loop().remove_reader(it.resolver.ours)
        it.resolver.ours.shutdown(socket.SHUT_RDWR)
        await it.names.lost.wait()
