"""The egress gate, the guest's only network access. It decides on each connection (rules.py), dials and forwards.

The gate runs in one unprivileged process per job, which processes.py starts. It confines itself (jail/own_limits)
before it reads hostile data. It owns the stream from the guest's relay, on which everything is hostile.

    python -I -S -c CODE CONTROL_FD CONFIG_FD LOG_FD ACCOUNT_FD RESOLVER_FD UID

CONTROL_FD: a packet socket. The gate reports its confinement on it and receives the guest's stream from it, with the
message STREAM. In a fork, a nonce follows that word: in both directions the stream begins after these bytes, since
the rest of what the relay and another gate had sent each other may precede them. Later, the
gate writes its account to ACCOUNT_FD for each message ACCOUNT, and sends the message back. It exits when the other end
is closed. UID: the uid to switch to if root started the process, else -1.
"""

import array
import asyncio
import contextlib
import encodings.punycode  # noqa: F401 - used by idna
import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import idna  # noqa: F401 - hosts.py imports it lazily, which fails in a confined process
import msgspec
from msgspec.structs import replace

from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.egress import Target
from x07_sandbox.channel.streams import Event, Role, Streams
from x07_sandbox.errors import PeerError, UsageError
from x07_sandbox.jail.own_limits import confine
from x07_sandbox.network.dialler import Dialled, Dialler, NotDialledError, ResolverClient, bind_reveals_own
from x07_sandbox.network.first_bytes import Inspector, Mode
from x07_sandbox.network.flows import Flow, TcpFlow, UdpFlow
from x07_sandbox.network.hosts import parse_guest_host
from x07_sandbox.network.ledger import ACCOUNT, STREAM, Ledger
from x07_sandbox.network.protocols import InspectionError
from x07_sandbox.network.rules import Allowlist, Decision, Request, Transport, decide, denied_name, make_allowlist
from x07_sandbox.network.settings import settings_from_json
from x07_sandbox.policy.decode import decode_policy
from x07_sandbox.policy.denials import Contact

WAITING_MAX: Final = 256  # requests that wait until the limits of connections allow them
NAMES_MAX: Final = 1024
NAMES_OF_WILDCARD: Final = 256
HELD_MAX_BYTES: Final = 32 << 20  # above this, the gate opens no more connections
_BURST_S: Final = 2.0  # as many connections as the limit allows in that time may be opened at once
_WAITING_S: Final = 10.0
_QUEUED_MAX: Final = 128 * 1024  # bytes for the guest: above this, servers are not read
_ROUND_MAX: Final = 3 << 20  # bytes that all flows read in one iteration of the loop
_STALLED_MAX: Final = 1 << 20  # above this, the guest is not read either
_FIRST_BYTES_S: Final = 10.0
_SKIPPED_MAX: Final = 4 << 20  # before the nonce; more than a relay and the devices of a VM hold
_HALF_CLOSED_S: Final = 60.0
_UDP_IDLE_S: Final = 60.0
_TICK_S: Final = 1.0
_READ: Final = 64 * 1024
_TLS_PORTS: Final = frozenset({443, 8443})
_HTTP_PORTS: Final = frozenset({80, 8080})
READY: Final = "ready"
RESOLVER_LOST: Final = 3
BUG: Final = 4
_MESSAGE_MAX: Final = 4096
_GIVEN_UP: Final = "the program closed the connection before it was made"


class Gate(asyncio.BufferedProtocol):
    """asyncio protocol of the stream from the relay. Owns the guest's connections."""

    transport: asyncio.Transport

    def __init__(self, allowlist: Allowlist, dialler: Dialler, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self._allowlist = allowlist
        self._dialler = dialler
        self._ledger = ledger
        self._loop = loop
        self.now = loop.time
        self.over = asyncio.Event()
        self.starting: asyncio.Task[object] | None = None  # a reference, since the loop keeps only weak ones
        self._link = Streams(Role.HOST, egress.STREAMS)
        self._buffer = bytearray(_READ)
        self._flows: dict[int, Flow] = {}
        self._limits = allowlist.settings
        self._waiting: dict[int, tuple[Decision, float]] = {}  # by stream, in order; until when it waits
        self._pending: dict[int, asyncio.Task[None]] = {}
        self._names: dict[str, set[str]] = {}  # requested names, by the rule that allowed them
        self._opens = _BURST_S * self._limits.connections_per_second
        self._opens_at = loop.time()
        self._reading = True
        self.nonce, self._skipped, self._skipped_bytes = b"", b"", 0
        self._was_busy = False
        self._tick: asyncio.TimerHandle | None = None  # set once a guest is connected
        self._next_start: asyncio.TimerHandle | None = None

    # the stream from the relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and start the timer."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=_QUEUED_MAX, low=_QUEUED_MAX // 2)
        self._tick = self._loop.call_later(_TICK_S, self._check_timeouts)
        self._link.preface(self.nonce)
        self.flush()

    def get_buffer(self, _sizehint: int) -> bytearray:
        """Return the receive buffer."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes from the guest."""
        self._receive(nbytes)
        self.flush()

    def _receive(self, nbytes: int) -> None:
        try:
            data = memoryview(self._buffer)[:nbytes]
            for event in self._link.receive(self._after_nonce(bytes(data)) if self.nonce else data):
                self._take(event)
        except PeerError as exc:
            why = f"{exc.what}: {exc.why}"
            self._ledger.denied(Contact(host="", port=0, transport="tcp", rule="frames", reason=why))
            self.close()

    def _after_nonce(self, data: bytes) -> bytes:
        """Return the bytes after the nonce. Raises PeerError."""
        before, found, after = (self._skipped + data).partition(self.nonce)
        if found:
            self.nonce = b""
            return after
        self._skipped_bytes += len(data)
        if self._skipped_bytes > _SKIPPED_MAX:
            raise PeerError("bad frame", "the relay did not begin anew")
        self._skipped = before[-len(self.nonce) :]
        return b""

    def eof_received(self) -> bool:
        """Close the stream."""
        return False

    def connection_lost(self, _exc: Exception | None) -> None:
        """Take what the guest had sent, and close all its connections."""
        # A late gate may write to a guest that has ended, which fails, before it reads the guest's last bytes.
        with contextlib.suppress(OSError):
            stream_fd = self.transport.get_extra_info("socket").fileno()
            while not self.over.is_set() and (nbytes := os.readv(stream_fd, [self._buffer])):
                self._receive(nbytes)
        self.close()

    def resume_writing(self) -> None:
        """Write more queued data to the guest."""
        self.flush()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        if self.over.is_set():
            return
        self.over.set()
        if self._tick is not None:
            self._tick.cancel()
            self.transport.abort()
        if self._next_start is not None:
            self._next_start.cancel()
        self._waiting.clear()
        for task in self._pending.values():
            task.cancel()
        for flow in list(self._flows.values()):
            self._end(flow)

    def _queued(self) -> int:
        return self._link.pending() + self.transport.get_write_buffer_size()

    def busy(self) -> bool:
        """Return whether the queue to the guest is too long for more reads from servers. `flush` resumes them."""
        busy = self._queued() > _QUEUED_MAX
        self._was_busy |= busy
        return busy

    def share(self) -> int:
        """Return how many bytes one flow may read at a time.

        All flows share one limit, since all ready flows read before anything is written.
        """
        return min(egress.DATA_MAX, _ROUND_MAX // max(1, len(self._flows)))

    def flush(self) -> None:
        """Write queued data to the guest, and resume the flows that waited for that."""
        if self._tick is None or self.over.is_set():
            return
        if self._waiting:
            self._start_waiting()
        self._write()
        while self._was_busy and self._queued() <= _QUEUED_MAX:
            self._was_busy = False
            for flow in [flow for flow in self._flows.values() if isinstance(flow, TcpFlow) and flow.paused]:
                flow.pump()
            self._write()
        stalled = self._queued() > _STALLED_MAX
        if stalled == self._reading and not self.transport.is_closing():
            self._reading = not stalled
            (self.transport.pause_reading if stalled else self.transport.resume_reading)()

    def _write(self) -> None:
        while self.transport.get_write_buffer_size() <= _QUEUED_MAX and (data := self._frames()):
            self.transport.write(data)

    def _frames(self) -> bytes:
        """Return the next frames for one write: the transport keeps each write apart, and adds up all their sizes."""
        joined = bytearray()
        while len(joined) < _READ and (data := self._link.data_to_send()):
            joined += data
            self._link.sent(len(data))
        return bytes(joined)

    # from the guest

    def _take(self, event: Event) -> None:
        if event.type == streams.OPEN:
            self._request(event.stream, egress.opened(event.code, event.data))
            return
        if event.type == streams.MESSAGE:
            self._request(0, egress.refused(event.data))
            return
        flow = self._flows.get(event.stream)
        if flow is None:
            if event.type == streams.RESET:
                self._give_up(event.stream)
            return
        if event.type == streams.RESET:
            self._end(flow)
        elif event.type in {streams.DATA, streams.DATAGRAM}:  # the link checks which type a flow may have
            flow.from_guest(event.data)
        elif isinstance(flow, TcpFlow):
            if event.type == streams.FIN:
                flow.guest_finished()
            else:  # the window grew
                flow.pump()

    def _request(self, stream: int, target: Target) -> None:
        """Decide on a connection that the guest requests, or (stream 0) record one that the guest itself denied."""
        transport: Transport = "udp" if target.transport == egress.UDP else "tcp"
        try:
            request = Request(host=parse_guest_host(target.host), port=target.port, transport=transport)
        except UsageError as exc:
            host = ascii(target.host)[2:-1]
            contact = Contact(host=host, port=target.port, transport=transport, rule="malformed", reason=exc.why)
            self._refuse(stream, egress.POLICY, contact)  # not answered if it has no stream
            return
        decision = decide(self._allowlist, request)
        if not stream:
            reason = decision.reason if not decision.allowed else "denied inside the guest"
            self._ledger.denied(_of(decision, reason=reason))
            return
        if not decision.allowed:
            self._refuse(stream, egress.POLICY, _of(decision, reason=decision.reason))
        elif limit := self._limit(decision):
            self._refuse(stream, egress.LIMIT, _of(decision, rule="limit", reason=limit))
        else:
            self._waiting[stream] = decision, self.now() + _WAITING_S
            self._start_waiting()

    def _refuse(self, stream: int, code: int, contact: Contact) -> None:
        self._ledger.denied(contact)
        self._link.answer(stream, code)

    def _limit(self, decision: Decision) -> str:
        """Return the limit that another request would exceed, or "" if it would exceed none."""
        if len(self._waiting) >= WAITING_MAX:
            return f"{WAITING_MAX} connections are waiting to be opened"
        if sum(flow.waiting_bytes() for flow in self._flows.values() if isinstance(flow, TcpFlow)) > HELD_MAX_BYTES:
            return "too many bytes are waiting to be sent"
        return self._too_many_names(decision)

    def _start_waiting(self) -> None:
        """Open the connections that wait, in order, as far as the limits allow."""
        now, rate = self.now(), self._limits.connections_per_second
        self._opens = min(_BURST_S * rate, self._opens + (now - self._opens_at) * rate)
        self._opens_at = now
        while self._waiting and not self._full():
            stream = next(iter(self._waiting))
            decision, _ = self._waiting.pop(stream)
            self._opens -= 1
            self._pending[stream] = task = self._loop.create_task(self._open(stream, decision))
            task.add_done_callback(partial(self._end_pending, stream, decision))
        if self._next_start is not None:
            self._next_start.cancel()
        if self._waiting and self._opens < 1:  # else the end of another connection comes first
            self._next_start = self._loop.call_later((1 - self._opens) / rate, self.flush)

    def _full(self) -> str:
        """Return the setting that does not allow another connection now, or ""."""
        limits = self._limits
        if self._opens < 1:
            return "connections_per_second"
        if len(self._pending) >= limits.max_pending:
            return "max_pending"
        return "max_connections" * (len(self._flows) + len(self._pending) >= limits.max_connections)

    def _end_waiting(self, now: float) -> None:
        """Refuse the requests that have waited too long."""
        self._start_waiting()
        for stream, (decision, until) in list(self._waiting.items()):
            if now < until:
                return
            del self._waiting[stream]
            limit = self._full()
            reason = f"it waited {_WAITING_S:g} s because of the limit {limit} = {getattr(self._limits, limit)}"
            self._refuse(stream, egress.LIMIT, _of(decision, rule=f"limit:{limit}", reason=reason))

    def _give_up(self, stream: int) -> None:
        """Forget a connection that the program closed before it was open."""
        if (task := self._pending.get(stream)) is not None:
            task.cancel()
        elif (waiting := self._waiting.pop(stream, None)) is not None:
            self._ledger.failed(_of(waiting[0], rule="dial:given-up", reason=_GIVEN_UP))

    def _too_many_names(self, decision: Decision) -> str:
        host = decision.request.host
        if not isinstance(host, str):
            return ""
        names = self._names.setdefault(decision.rule, set())
        if host in names:
            return ""
        if len(names) >= NAMES_OF_WILDCARD:
            return f"{NAMES_OF_WILDCARD} names of one entry were resolved"
        if sum(map(len, self._names.values())) >= NAMES_MAX:
            return f"{NAMES_MAX} names were resolved"
        names.add(host)
        return ""

    async def _open(self, stream: int, decision: Decision) -> None:
        """Resolve the name, check the addresses and dial them, then answer the guest."""
        dialled: Dialled | None = None
        try:
            dialled = await self._dialler.dial(decision)
            flow = await self._carry(stream, decision, dialled)
        except NotDialledError as exc:
            if self._link.is_open(stream):
                contact = _of(decision, rule=exc.rule, reason=exc.reason, address=exc.address)
                count = self._ledger.denied if exc.code == egress.POLICY else self._ledger.failed
                count(contact)
                self._link.answer(stream, exc.code)
        except asyncio.CancelledError:
            if dialled is not None:
                dialled.sock.close()
            self._ledger.failed(_of(decision, rule="dial:given-up", reason=_GIVEN_UP))
        else:
            self._answer(stream, flow)

    def _end_pending(self, stream: int, decision: Decision, task: asyncio.Task[None]) -> None:
        del self._pending[stream]
        if task.cancelled():  # it never started
            self._ledger.failed(_of(decision, rule="dial:given-up", reason=_GIVEN_UP))
        self.flush()

    def _answer(self, stream: int, flow: Flow) -> None:
        """Report a new connection to the guest."""
        if not self._link.is_open(stream) or self.over.is_set():  # the program has closed it meanwhile
            flow.abort()
            return
        self._link.answer(stream)
        if flow.lost:
            self._link.reset(stream)
            return
        self._flows[stream] = flow
        if isinstance(flow, TcpFlow):
            flow.pump()

    async def _carry(self, stream: int, decision: Decision, dialled: Dialled) -> Flow:
        contact = _of(decision, address=dialled.address)
        counters = self._ledger.allowed(contact)
        if decision.request.transport == "udp":
            datagrams = UdpFlow(stream, contact, counters, self._link, self)
            await self._loop.create_datagram_endpoint(lambda: datagrams, sock=dialled.sock)
            return datagrams
        host, port = decision.request.host, decision.request.port
        mode = mode_of(port, self._allowlist)
        inspector = Inspector(mode, host, port, lambda name: denied_name(self._allowlist, name, port))
        flow = TcpFlow(stream, contact, counters, self._link, inspector, self)
        await self._loop.create_connection(lambda: flow, sock=dialled.sock)
        return flow

    # ends

    def refuse(self, flow: TcpFlow, problem: InspectionError) -> None:
        """Deny a flow because of the client's first bytes."""
        contact = replace(flow.contact, rule=problem.rule, reason=problem.reason, tls_name=problem.name)
        self._ledger.denied(contact)
        self._link.reset(flow.stream, egress.POLICY)
        self._end(flow)
        self.flush()

    def ended(self, flow: Flow, *, clean: bool) -> None:
        """Forget a flow whose server side is closed. clean: whether both sides had finished sending."""
        flow.lost = True
        if self._flows.pop(flow.stream, None) is None:
            return
        self._ledger.closed(flow.contact, flow.sent, flow.received)
        if not clean:
            self._link.reset(flow.stream)
        if not self.over.is_set():
            self.flush()

    def _end(self, flow: Flow) -> None:
        if self._flows.pop(flow.stream, None) is not None:
            self._ledger.closed(flow.contact, flow.sent, flow.received)
        flow.abort()

    def _check_timeouts(self) -> None:
        self._tick = self._loop.call_later(_TICK_S, self._check_timeouts)
        now = self.now()
        self._end_waiting(now)
        for flow in list(self._flows.values()):
            if isinstance(flow, UdpFlow):
                if now - flow.touched > _UDP_IDLE_S:
                    self._link.reset(flow.stream)
                    self._end(flow)
            elif isinstance(flow, TcpFlow):
                self._check_tcp_timeouts(flow, now)
        self.flush()

    def _check_tcp_timeouts(self, flow: TcpFlow, now: float) -> None:
        if flow.held_since is not None and now - flow.held_since > _FIRST_BYTES_S:
            why = "the client's first bytes are not a complete message"
            self.refuse(flow, InspectionError("first-bytes:timeout", why))
            return
        quiet_s, idle_s = now - flow.touched, self._limits.idle_seconds
        if flow.half_closed_at is not None and min(quiet_s, now - flow.half_closed_at) > _HALF_CLOSED_S:
            rule, reason = "idle:half-closed", f"it was closed in one direction and idle for {_HALF_CLOSED_S:g} s"
        elif quiet_s > idle_s:
            rule, reason = "idle:idle_seconds", f"it was idle for {idle_s} s"
        else:
            return
        self._ledger.failed(replace(flow.contact, rule=rule, reason=reason))
        self._link.reset(flow.stream, egress.TIMED_OUT)
        self._end(flow)


def mode_of(port: int, allowlist: Allowlist) -> Mode:
    """Return the protocol that a connection to a port must use."""
    if port in allowlist.settings.opaque_ports:
        return "opaque"
    return "tls" if port in _TLS_PORTS else "http" if port in _HTTP_PORTS else "any"


def _of(decision: Decision, *, rule: str = "", reason: str = "", address: str = "") -> Contact:
    request = decision.request
    return Contact(
        host=str(request.host),
        port=request.port,
        transport=request.transport,
        rule=rule or decision.rule,
        reason=reason,
        address=address,
    )


# the process


async def _serve(
    allowlist: Allowlist,
    control: socket.socket,
    resolver: socket.socket,
    log_fd: int,
    account_fd: int,
    *,
    own_by_bind: bool,
) -> Ledger:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    ledger = Ledger(partial(_write, log_fd), loop.time)
    names = ResolverClient(resolver, loop)
    gate = Gate(allowlist, Dialler(allowlist, names, loop, own_by_bind=own_by_bind), ledger, loop)
    control.setblocking(False)  # noqa: FBT003 - it takes no names
    finished = asyncio.Event()
    loop.add_reader(control, _hear, control, gate, finished, partial(_write_account, account_fd, ledger))
    lost = loop.create_task(names.lost.wait())
    done = loop.create_task(finished.wait())
    await asyncio.wait({lost, done}, return_when=asyncio.FIRST_COMPLETED)
    gate.close()
    if not finished.is_set():
        sys.exit(RESOLVER_LOST)
    return ledger


def _fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exit on an unhandled exception. asyncio would only log the exception, but a faulty gate must not decide."""
    exc = context.get("exception")
    os.write(2, f"{context['message']}: {type(exc).__name__}: {exc}\n".encode("ascii", "backslashreplace"))
    os._exit(BUG)


def _write(fd: int, line: bytes) -> bool:
    """Append a line to the log. Return whether that succeeded; a full disk only loses log lines."""
    try:
        return os.write(fd, line) == len(line)
    except OSError:
        return False


def _write_account(fd: int, ledger: Ledger) -> None:
    data = msgspec.json.encode(ledger.use())
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))


def _answer(control: socket.socket, write_account: Callable[[], None]) -> None:
    write_account()
    control.send(ACCOUNT)


def _hear(control: socket.socket, gate: Gate, finished: asyncio.Event, write_account: Callable[[], None]) -> None:
    """Receive the guest's stream, answer ACCOUNT, or notice that the control socket was closed."""
    loop = asyncio.get_running_loop()
    fds = array.array("i")
    data, rights, _, _ = control.recvmsg(_MESSAGE_MAX, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    if data == ACCOUNT and not fds:
        # What the guest sent before is readable now, and is read in this turn of the loop.
        loop.call_soon(_answer, control, write_account)
        return
    if not data or len(fds) != 1:
        loop.remove_reader(control)
        finished.set()
        return
    gate.nonce = data.removeprefix(STREAM)
    stream = socket.socket(fileno=fds[0])
    stream.setblocking(False)  # noqa: FBT003 - it takes no names
    gate.starting = loop.create_task(loop.create_connection(lambda: gate, sock=stream))


def main() -> None:
    """Run the gate."""
    control_fd, config_fd, log_fd, account_fd, resolver_fd, uid = map(int, sys.argv[1:])
    with os.fdopen(config_fd, "rb") as file:
        config = json.load(file)
    policy = decode_policy(config["policy"].encode(), source="the policy")
    denied = {host: None if ports is None else frozenset(ports) for host, ports in config["denied"].items()}
    allowlist = make_allowlist(policy, denied, settings_from_json(config["settings"]))
    control, resolver = socket.socket(fileno=control_fd), socket.socket(fileno=resolver_fd)
    own_by_bind = bind_reveals_own()
    if any(mode_of(port, allowlist) == "any" for entry in allowlist.entries for port in entry.ports):
        import hpack  # noqa: F401 - http_requests.py imports it lazily, since it is slow to import
    # The loop opens a socket pair and an epoll descriptor, which the confinement would forbid.
    with asyncio.Runner() as runner:
        runner.get_loop()
        walls = confine("gate", uid=None if uid < 0 else uid)
        gc.freeze()
        control.send(json.dumps({"state": READY, "walls": walls}).encode())
        ledger = runner.run(_serve(allowlist, control, resolver, log_fd, account_fd, own_by_bind=own_by_bind))
    _write_account(account_fd, ledger)
