"""The relay: terminates the program's connections on the guest's stack, and requests each from the gate on the host.

The relay runs as root in the program's network namespace. It leaves all decisions to the gate. If packets are held, the
first packet of a connection waits for the gate's answer, so that connect() returns the far end's result. Otherwise the
relay accepts the connection first, and resets it if the gate refuses.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

from x07_sandbox import kernel
from x07_sandbox.channel import egress, streams
from x07_sandbox.channel.connection import ReadBuffer
from x07_sandbox.channel.egress import Target
from x07_sandbox.channel.messages import Network
from x07_sandbox.channel.streams import Role, Streams
from x07_sandbox.guest import firewall, system
from x07_sandbox.guest.dns import QUERY_MAX, NameTable, answer
from x07_sandbox.guest.system import JobError, read_all, write_all

if TYPE_CHECKING:
    from x07_sandbox.channel.streams import Event
    from x07_sandbox.guest.firewall import Held, HeldPackets, Sockets


_CHUNK: Final = egress.DATA_MAX - streams.HEADER.size  # a frame then fills four 32 KiB writes of the driver
_QUEUED_MAX: Final = 64 * 1024  # bytes queued for the gate; with more, do not read sockets
_FLOWS_MAX: Final = 896  # more than the gate accepts, and fewer than the descriptors that a process may have
_WAITING_DATAGRAMS: Final = 16  # per flow that is not open yet
_ACCEPT_S: Final = 10.0  # how long an opened flow waits for the program's connection
_TICK_S: Final = 1.0
_LINGER: Final = struct.pack("ii", 1, 0)  # reset on close
# Marks of the codes for which firewall's chain "verdict" has no rule.
_MARKS: Final = {
    egress.OK: firewall.PASSED,
    egress.LIMIT: egress.REFUSED,  # which clients retry
    egress.NO_NAME: egress.HOST_UNREACHABLE,
}
_Endpoints = tuple[tuple[str, int], tuple[str, int]]  # source and target

_READY: Final = b"R"


class _Flow:
    """One connection, or the datagrams between two endpoints.

    held: the packet that waits for the gate. sock: the program's end. out: bytes for *sock*. waiting: early datagrams.
    """

    def __init__(self, stream: int, endpoints: _Endpoints, transport: int) -> None:
        self.stream = stream
        self.endpoints = endpoints
        self.transport = transport
        self.held: Held | None = None
        self.sock: socket.socket | None = None
        self.out = bytearray()
        self.waiting: list[bytes] = []
        self.open = self.from_gate_ended = self.from_program_ended = False
        self.opened_at = 0.0


class Watcher:
    """A poll loop that calls a descriptor's callback when the descriptor is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], object]] = {}
        self._wanted: dict[int, int] = {}

    def watch(self, fd: int, call: Callable[[int], object], wanted: int = select.EPOLLIN) -> None:
        """Set a descriptor's callback, and the events to wait for; 0 for none."""
        before = self._wanted.get(fd, 0)
        self._calls[fd] = call
        self._wanted[fd] = wanted
        if wanted == before:
            return
        if not before:
            self._epoll.register(fd, wanted)
        elif wanted:
            self._epoll.modify(fd, wanted)
        else:
            self._epoll.unregister(fd)  # else epoll would report a hangup on it again and again

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor; call this before closing it."""
        if self._calls.pop(fd, None) is not None and self._wanted.pop(fd):
            self._epoll.unregister(fd)

    def turn(self, most_s: float) -> None:
        """Wait once and call the callbacks of ready descriptors."""
        for fd, mask in self._epoll.poll(most_s):
            if (call := self._calls.get(fd)) is not None:
                call(mask)


class Relay:
    """The relay's event loop. port_fd: the stream to the gate."""

    def __init__(self, port_fd: int, names: NameTable, sockets: Sockets) -> None:
        self._port_fd = port_fd
        self._names = names
        self._sockets = sockets
        self._link = Streams(Role.GUEST, egress.STREAMS)
        self._watcher = watcher = Watcher()
        self._flows: dict[int, _Flow] = {}
        self._by_endpoints: dict[tuple[int, _Endpoints], _Flow] = {}
        self._connected = True
        self._nonce, self._skipped = b"", b""  # see `rejoin`
        self._buffer = ReadBuffer()
        watcher.watch(port_fd, self._serve_port)
        for sock in sockets.tcp:
            watcher.watch(sock.fileno(), partial(self._accept, sock))
        for sock in sockets.udp:
            watcher.watch(sock.fileno(), partial(self._take_first_datagram, sock))
        if sockets.held is not None:
            watcher.watch(sockets.held.fileno(), partial(self._take_held, sockets.held))
        names.on_unlisted = self._report_name
        watcher.watch(sockets.dns.fileno(), self._answer_dns)

    def serve(self) -> None:
        """Run until the gate disconnects. Raises PeerError, OSError."""
        tick_at = time.monotonic() + _TICK_S
        while self._connected:
            self._watcher.turn(_TICK_S)
            if time.monotonic() >= tick_at:
                self._end_stale()
                tick_at = time.monotonic() + _TICK_S
            self._flush()

    # the gate's side

    def _serve_port(self, mask: int) -> None:
        if not mask & ~select.EPOLLOUT:
            return
        try:
            data = self._buffer.read(self._port_fd)
        except BlockingIOError:
            return
        if not data:
            self._connected = False
            return
        if self._nonce:
            before, found, rest = (self._skipped + data).partition(self._nonce)
            if not found:
                self._skipped = before[-len(self._nonce) :]
                return
            data, self._nonce, self._skipped = memoryview(rest), b"", b""
        for event in self._link.receive(data):
            if (flow := self._flows.get(event.stream)) is not None:
                self._take(flow, event)

    def watch_orders(self, fd: int, done: Callable[[], object]) -> None:
        """For each nonce that arrives on *fd*, begin anew with another gate, and call *done*."""

        def obey(_mask: int) -> None:
            self._rejoin(os.read(fd, egress.NONCE_BYTES))
            done()

        self._watcher.watch(fd, obey)

    def _rejoin(self, nonce: bytes) -> None:
        """End all flows. What the other gate sends begins with *nonce*, and so does what is sent to it.

        In a copy of a VM, the rest of a frame may precede it in either direction.
        """
        for flow in list(self._flows.values()):
            self._release(flow.held, egress.REFUSED)
            self._end(flow, reset=True)
        self._nonce, self._skipped = nonce, b""
        self._link = Streams(Role.GUEST, egress.STREAMS)
        self._link.preface(nonce)

    def _flush(self) -> None:
        before, wanted = self._link.pending(), select.EPOLLIN
        while data := self._link.data_to_send():
            try:
                self._link.sent(os.write(self._port_fd, data))
            except BlockingIOError:
                wanted |= select.EPOLLOUT
                break
        self._watcher.watch(self._port_fd, self._serve_port, wanted)
        if before > _QUEUED_MAX >= self._link.pending():
            for flow in list(self._flows.values()):
                self._watch(flow)

    def _take(self, flow: _Flow, event: Event) -> None:
        if event.type == streams.ANSWER:
            self._opened(flow, event.code)
        elif event.type == streams.DATA:
            self._take_data(flow, event.data)
        elif event.type == streams.FIN:
            flow.from_gate_ended = True
            self._write(flow)
        elif event.type == streams.CREDIT:
            self._watch(flow)
        elif event.type == streams.RESET:
            self._end(flow, reset=True)
        elif event.type == streams.DATAGRAM and flow.sock is not None:
            with contextlib.suppress(OSError):
                flow.sock.send(event.data)

    def _take_data(self, flow: _Flow, data: bytes) -> None:
        if not flow.out and flow.sock is not None:
            count = self._give(flow, flow.sock, data)
            if count is None or count == len(data):
                return
            data = data[count:]
        flow.out += data
        self._watch(flow)

    def _give(self, flow: _Flow, sock: socket.socket, data: bytes | bytearray) -> int | None:
        """Send bytes to the program. Return how many it accepted, or None if the connection failed and was ended."""
        try:
            count = sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._link.reset(flow.stream)
            self._end(flow, reset=True)
            return None
        self._link.consumed(flow.stream, count)
        return count

    def _opened(self, flow: _Flow, code: int) -> None:
        self._release(flow.held, _MARKS.get(code, code))
        flow.held = None
        if code != egress.OK:
            self._end(flow, reset=True)
            return
        flow.open = True
        flow.opened_at = time.monotonic()
        for data in flow.waiting:
            self._link.send_datagram(flow.stream, data)
        flow.waiting.clear()
        self._watch(flow)

    def _ask(self, transport: int, endpoints: _Endpoints) -> _Flow | None:
        """Request a connection from the gate. Return its flow, or None if there are too many flows."""
        address, port = endpoints[1]
        if len(self._flows) >= _FLOWS_MAX:
            return None
        stream = self._link.open(transport, self._target(transport, address, port).opening())
        flow = _Flow(stream, endpoints, transport)
        self._flows[flow.stream] = self._by_endpoints[transport, endpoints] = flow
        return flow

    # connections of the program

    def _take_held(self, packets: HeldPackets, _mask: int) -> None:
        for held in packets.read():
            self._hold(held)

    def _hold(self, held: Held) -> None:
        endpoints = held.source, held.target
        if held.queue == firewall.TO_REFUSE:
            self._report(self._target(held.transport, *held.target))
            self._flush()  # the gate knows of it before the program does, so that the program's end can tell
            self._release(held, egress.POLICY)
            return
        flow = self._by_endpoints.get((egress.TCP, endpoints))
        if flow is None:
            if (flow := self._ask(egress.TCP, endpoints)) is None:
                self._release(held, egress.REFUSED)
            else:
                flow.held = held
        elif flow.open:
            self._release(held, firewall.PASSED)
        else:
            # A retransmission: hold it instead of the first packet.
            self._release(flow.held, egress.TIMED_OUT)
            flow.held = held

    def _release(self, held: Held | None, mark: int) -> None:
        if self._sockets.held is not None and held is not None:
            with contextlib.suppress(OSError):
                self._sockets.held.release(held.queue, held.number, mark)

    def _report_name(self, name: str) -> None:
        """Report the lookup of an unlisted name."""
        self._report(Target(egress.TCP, name.encode("ascii"), 0))

    def _target(self, transport: int, address: str, port: int) -> Target:
        return Target(transport, (self._names.host_at(address) or address).encode("ascii"), port)

    def _report(self, target: Target) -> None:
        """Report a refusal, unless too much is queued already."""
        if self._link.pending() < egress.WINDOW and 0 < len(target.host) <= egress.HOST_MAX:
            self._link.message(egress.REFUSAL, target.refusal())

    def _accept(self, listener: socket.socket, _mask: int) -> None:
        try:
            sock, source = listener.accept()
        except OSError:
            return
        sock.setblocking(False)  # noqa: FBT003
        endpoints = source[:2], sock.getsockname()[:2]
        flow = self._by_endpoints.get((egress.TCP, endpoints))
        # A connection to the relay's own address has no target.
        if flow is None and self._sockets.held is None and endpoints[1][1] != firewall.TCP_PORT:
            flow = self._ask(egress.TCP, endpoints)
        if flow is None or flow.sock is not None:
            _close(sock, reset=True)
            return
        flow.sock = sock
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._write(flow)

    def _serve(self, flow: _Flow, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._write(flow)
        if mask & ~select.EPOLLOUT and flow.sock is not None:
            self._read(flow, flow.sock)

    def _read(self, flow: _Flow, sock: socket.socket) -> None:
        room = min(_CHUNK, self._link.window(flow.stream))
        if room and self._link.pending() <= _QUEUED_MAX:
            try:
                data = sock.recv(room)
            except BlockingIOError:
                return
            except OSError:
                self._link.reset(flow.stream)
                self._end(flow, reset=True)
                return
            if data:
                self._link.send(flow.stream, data)
            else:
                flow.from_program_ended = True
                self._link.finish(flow.stream)
        self._settle(flow)

    def _write(self, flow: _Flow) -> None:
        if flow.sock is None:
            return
        if flow.out:
            count = self._give(flow, flow.sock, flow.out)
            if count is None:
                return
            del flow.out[:count]
        if flow.from_gate_ended and not flow.out:
            with contextlib.suppress(OSError):
                flow.sock.shutdown(socket.SHUT_WR)
        self._settle(flow)

    def _settle(self, flow: _Flow) -> None:
        if flow.from_gate_ended and flow.from_program_ended and not flow.out:
            self._end(flow, reset=False)
        else:
            self._watch(flow)

    def _watch(self, flow: _Flow) -> None:
        """Watch a flow's socket for the events that can be handled at the moment."""
        if flow.sock is None:
            return
        if flow.transport == egress.UDP:
            self._watcher.watch(flow.sock.fileno(), partial(self._take_datagram, flow, flow.sock))
            return
        wanted = select.EPOLLOUT if flow.out else 0
        if not flow.from_program_ended and self._link.window(flow.stream) and self._link.pending() <= _QUEUED_MAX:
            wanted |= select.EPOLLIN
        self._watcher.watch(flow.sock.fileno(), partial(self._serve, flow), wanted)

    def _end(self, flow: _Flow, *, reset: bool) -> None:
        if flow.sock is not None:
            self._watcher.forget(flow.sock.fileno())
            _close(flow.sock, reset=reset)
            flow.sock = None
        self._flows.pop(flow.stream, None)
        self._by_endpoints.pop((flow.transport, flow.endpoints), None)

    def _end_stale(self) -> None:
        """End flows that the gate has opened but that the program no longer wants."""
        latest = time.monotonic() - _ACCEPT_S
        for flow in list(self._flows.values()):
            if flow.open and flow.sock is None and flow.opened_at < latest:
                self._link.reset(flow.stream)
                self._end(flow, reset=True)

    # datagrams of the program

    def _answer_dns(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            query, source = self._sockets.dns.recvfrom(QUERY_MAX)
            if (reply := answer(query, self._names)) is not None:
                if self._link.pending():
                    self._flush()  # as in `_hold`
                self._sockets.dns.sendto(reply, source)

    def _take_first_datagram(self, listener: socket.socket, _mask: int) -> None:
        """Handle the first datagram between two endpoints. The socket made here gets all later ones."""
        try:
            data, ancillary, _, source = listener.recvmsg(egress.DATAGRAM_MAX, 256)
        except OSError:
            return
        target = firewall.original_target(ancillary)
        if target is None or target[1] == firewall.UDP_PORT:
            return
        endpoints = source[:2], target
        flow = self._by_endpoints.get((egress.UDP, endpoints))
        if flow is None:
            try:
                sock = firewall.transparent(socket.SOCK_DGRAM, *target)
                sock.connect(source)
            except OSError:
                return
            if (flow := self._ask(egress.UDP, endpoints)) is None:
                sock.close()
                return
            flow.sock = sock
            self._watch(flow)
        self._pass_on(flow, data)

    def _take_datagram(self, flow: _Flow, sock: socket.socket, _mask: int) -> None:
        with contextlib.suppress(OSError):
            self._pass_on(flow, sock.recv(egress.DATAGRAM_MAX))

    def _pass_on(self, flow: _Flow, data: bytes) -> None:
        if not flow.open:
            if len(flow.waiting) < _WAITING_DATAGRAMS:
                flow.waiting.append(data)
        elif self._link.pending() <= _QUEUED_MAX:
            self._link.send_datagram(flow.stream, data)


class RelayProcess:
    """The relay's process. When it ends, *status_fd* becomes readable and the job ends too.

    carried_fd: carries the relay's bytes from and to the channel, if the relay shares it; else -1.
    """

    def __init__(self, netns_fd: int, open_port: Callable[[], int], keep: tuple[int, ...] = (), *, hold: bool) -> None:
        """Start the process in a network namespace; -1 stands for the current one.

        open_port: opens the stream to the gate. keep: descriptors that *open_port* needs. hold: see `firewall.build`.
        """
        self._built = self._admitted = False
        self.carried_fd = -1
        settings_r, self._settings_fd = os.pipe2(os.O_CLOEXEC)
        orders_r, self._orders_fd = os.pipe2(os.O_CLOEXEC)
        self.status_fd, status_w = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            system.close_descriptors_except(netns_fd, settings_r, orders_r, status_w, *keep)
            _run(netns_fd, open_port, (settings_r, orders_r), status_w, hold=hold)
        os.close(settings_r)
        os.close(orders_r)
        os.close(status_w)

    def wait_built(self) -> None:
        """Wait until everything is ready that does not depend on the policy. Raises JobError."""
        if not self._built:
            self._wait()
        self._built = True

    def wait_admitted(self) -> None:
        """Wait until the policy's hosts can be reached. Raises JobError."""
        if not self._admitted:
            self._wait()
        self._admitted = True

    def _wait(self) -> None:
        if (status := os.read(self.status_fd, 1)) != _READY:
            raise JobError("relay", 0, (status + os.read(self.status_fd, 4096)).decode("utf-8", "replace")[:1000])

    def admit(self, network: Network) -> None:
        """Send the configuration to the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; `wait_admitted` raises
            write_all(self._settings_fd, marshal.dumps(tuple(network)))
        os.close(self._settings_fd)

    def rejoin(self, nonce: bytes) -> None:
        """End all connections, and wait until the process talks to another gate. Raises JobError."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._orders_fd, nonce)
        self._wait()

    def end_reason(self) -> str:
        """Return why the process has ended, once `status_fd` is readable."""
        return os.read(self.status_fd, 4096).decode("utf-8", "replace")[:1000] or "it was killed"

    def close(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.status_fd)
        os.close(self._orders_fd)


def on_shared_channel(netns_fd: int) -> RelayProcess:
    """Start a relay that shares the channel. It delays no packets, since the host's kernel may be unable to."""
    ours, theirs = socket.socketpair()
    os.set_blocking(theirs.fileno(), False)
    with theirs:
        relay = RelayProcess(netns_fd, theirs.fileno, (theirs.fileno(),), hold=False)
    relay.carried_fd = ours.detach()
    return relay


def _close(sock: socket.socket, *, reset: bool) -> None:
    if reset and sock.type == socket.SOCK_STREAM:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    sock.close()


def _run(netns_fd: int, open_port: Callable[[], int], fds: tuple[int, int], status_fd: int, *, hold: bool) -> NoReturn:
    settings_fd, orders_fd = fds
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if netns_fd >= 0:
            os.setns(netns_fd, os.CLONE_NEWNET)
        firewall.build(hold=hold)
        sockets = firewall.Sockets(hold=hold)
        port_fd = open_port()
        os.write(status_fd, _READY)
        network = Network(*marshal.loads(read_all(settings_fd)))  # noqa: S302 - from our agent
        firewall.admit(network, sockets)
        wildcards = [(suffix, first) for suffix, first in network.wildcards]
        relay = Relay(port_fd, NameTable(network.names, wildcards), sockets)
        relay.watch_orders(orders_fd, partial(os.write, status_fd, _READY))
        os.write(status_fd, _READY)
        relay.serve()
        os.write(status_fd, b"the gate has disconnected")
    except JobError as exc:
        os.write(status_fd, f"{exc.args[0]}: {exc.args[2]}".encode("utf-8", "replace"))
    except Exception as exc:  # noqa: BLE001 - any error ends the job, and is reported
        os.write(status_fd, f"{type(exc).__name__}: {exc}".encode("utf-8", "replace")[:1000])
    finally:
        os._exit(0)
