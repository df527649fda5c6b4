"""The pool's process, which keeps machines warm and leases them to this user's commands over a private socket.

    python -m x07_sandbox.library.pool_server SIZE IDLE_S IMAGE READY_FD

IMAGE: a name or digest, "" for the default image. READY_FD gets JSON lines: {"progress": TEXT}, then {"ready": SIZE} or
an error. The process ends on SIGTERM, SIGINT or a request, or after IDLE_S seconds without use. All its machines end
then.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from x07_sandbox.backends import lease
from x07_sandbox.backends.handshake import input_poll
from x07_sandbox.backends.lease import ANSWER_S, GONE_S, PROTOCOL, SOCKET, handover, pool_dir, receive, send
from x07_sandbox.errors import HostError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.linux import open_pidfd, peer_of
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.os_errors import host_error
from x07_sandbox.host.paths import state_dir
from x07_sandbox.host.processes import identify
from x07_sandbox.host.waiting import Deadline, Event, wait_readable
from x07_sandbox.library.warm import WarmMachine, WarmMachines
from x07_sandbox.records.record import Claim

_WAITING_MAX: Final = 128
_JOB_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,10}-[0-9]{1,10}-[a-z]{1,16}")
_WALL_MS_MAX: Final = 86_400_000
_NO_FDS_S: Final = 0.2


class Starter:
    """Sender of messages about the pool's start to the process that started the pool. Owns the descriptor."""

    def __init__(self, owned_fd: int) -> None:
        self._file = os.fdopen(owned_fd, "wb", buffering=0)

    def report(self, value: dict[str, object]) -> None:
        """Write one JSON object as a line. Do nothing if the descriptor is closed. Any thread may call this."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        self._file.close()


class Server:
    """Accepts connections to the pool. A separate thread serves each connection until the leased machine has ended."""

    def __init__(self, machines: WarmMachines, listener: socket.socket, idle_s: float) -> None:
        self.machines = machines
        self.listener = listener
        self.idle_s = idle_s
        self._end = Event()
        self._filled = False
        self._ended = False
        self._leases = 0
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def end(self, *_: object) -> None:
        """Stop serving. A signal handler may call this, and more than one call is allowed."""
        self._ended = True
        self._end.set()

    def serve(self) -> None:
        """Serve until `end` is called or the pool has been idle for too long."""
        poll = input_poll(self.listener.fileno(), self._end.fd)
        while not self._unused():
            for fd, _ in poll.poll(min(self.idle_s, 1.0) * 1000):
                if fd == self._end.fd:
                    return
                try:
                    connection, _ = self.listener.accept()
                except OSError:  # out of descriptors until a lease ends
                    wait_readable(self._end.fd, _NO_FDS_S)
                    continue
                thread = threading.Thread(target=self._serve_one, args=(connection,), name="x07-lease", daemon=True)
                thread.start()
                self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    def wait_leases(self) -> None:
        """Wait, after `end`, until every leased machine has ended and is recorded as gone."""
        deadline = Deadline.after(GONE_S)
        while not deadline.passed():
            with self._lock:
                if not self._leases:
                    return
            for thread in self._threads:
                thread.join(0.05)

    def _unused(self) -> bool:
        with self._lock:
            return self._filled and not self._leases and time.monotonic() - self.machines.used_at > self.idle_s

    def _serve_one(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(ANSWER_S)
            pid, uid = peer_of(connection)
            message, fds = (receive(connection) if uid == os.geteuid() else None) or ({}, [])
            for fd in fds:
                os.close(fd)
            want = None if fds else message.get("want")
            with contextlib.suppress(OSError):
                if want == "claim":
                    self._lend(connection, message, pid)
                elif want == "status":
                    send(connection, {"protocol": PROTOCOL, **self.status()})
                elif want == "stop":
                    self.end()
                    connection.settimeout(None)
                    connection.recv(1)  # the answer is the end of this process, which closes the connection

    def wait_filled(self) -> int:
        """Wait until all machines are warm, start the idle time, and return their number. Raises SandboxError."""
        if not self.machines.wait_ready(Deadline.after(settings.QUEUE_S)) and self._ended:
            raise HostError("cannot start the pool", "it was stopped during its start", "Start it again")
        self.machines.used_at = time.monotonic()
        self._filled = True
        return self.machines.ready()

    def status(self) -> dict[str, object]:
        """Return the values for `x07 pool status`."""
        machines = self.machines
        problem = machines.problem
        return {
            "pid": os.getpid(),
            "size": machines.size,
            "ready": machines.ready(),
            "running": self._leases,
            "claimed": machines.claimed,
            "image": machines.kind.image_digest,
            "idle_s": self.idle_s,
            "unused_s": round(time.monotonic() - machines.used_at, 1),
            "problem": None if problem is None else str(problem),
        }

    def _lend(self, connection: socket.socket, asked: dict[str, Any], pid: int) -> None:
        machine = self._taken(asked, pid)
        if machine is None:
            send(connection, {"protocol": PROTOCOL})
            return
        with self._lock:
            self._leases += 1
        ended = False
        try:
            message, fds = handover(self.machines.backend, machine.instance)
            send(connection, message, fds)
            connection.settimeout(None)
            ended = self._wait_for_end(connection, machine.instance.pidfd, pid)
        finally:
            gone = machine.close()
            with self._lock:
                self._leases -= 1
            self.machines.used_at = time.monotonic()
        status = -signal.SIGTERM if ended else machine.instance.exit_status()
        send(connection, {"protocol": PROTOCOL, "status": -9 if status is None else status, "gone": gone})

    def _wait_for_end(self, connection: socket.socket, machine_pidfd: int, claimer: int) -> bool:
        """Wait until the connection, the claimer, the machine or the server ends. Return whether the server ended."""
        with contextlib.ExitStack() as stack:
            fds = [connection.fileno(), machine_pidfd, self._end.fd]
            with contextlib.suppress(OSError):
                # A forked child of a dead claimer may hold the connection open.
                fds.append(open_pidfd(claimer))
                stack.callback(os.close, fds[-1])
            return any(fd == self._end.fd for fd, _ in input_poll(*fds).poll())

    def _taken(self, asked: dict[str, Any], pid: int) -> WarmMachine | None:
        """Return a machine as requested and record that the process *pid* owns it, or return None if none fits."""
        ours = (str(state_dir()), self.machines.backend.name, list(self.machines.kind.key))
        runner = identify(pid)
        claim, ram_bytes = _claim(asked), asked.get("ram_bytes")
        if type(ram_bytes) is not int or not 0 < ram_bytes <= self.machines.kind.ram_bytes:
            return None
        if claim is None or runner is None or tuple(map(asked.get, ("state_dir", "backend", "kind"))) != ours:
            return None
        return self.machines.take(claim, runner, ram_bytes)


def _claim(asked: dict[str, Any]) -> Claim | None:
    """Return the job in the request, or None if it is malformed. The job's id becomes the name of a folder."""
    with contextlib.suppress(msgspec.ValidationError):
        claim = msgspec.convert({name: asked.get(name) for name in ("run_id", "phase", "wall_ms")}, prepared(Claim))
        if _JOB_ID.fullmatch(claim.job_id) and 0 < claim.wall_ms <= _WALL_MS_MAX:
            return claim
    return None


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    """Yield the socket on which the pool accepts connections. Raises HostError if this user already has a pool."""
    folder = pool_dir()

    def taken() -> None:
        raise HostError(
            "cannot start the pool", "this user has one already", "See x07 pool status, or run x07 pool stop"
        )

    with file_lock(folder / "lock", on_wait=taken):
        with contextlib.suppress(OSError):
            os.ftruncate(sys.stderr.fileno(), 0)  # start a new log
        (folder / SOCKET).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener, lease.socket_address(folder) as address:
            listener.bind(address)
            listener.listen(_WAITING_MAX)
            try:
                yield listener
            finally:
                (folder / SOCKET).unlink(missing_ok=True)


def main(words: list[str]) -> int:
    """Run the pool's process and return its exit status."""
    size, idle_s, image, starter = int(words[0]), float(words[1]), words[2] or None, Starter(int(words[3]))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a machine takes about ten descriptors
    try:
        with _listening() as listener:
            machines = WarmMachines(size, image=image, progress=lambda text: starter.report({"progress": text}))
            server = Server(machines, listener, idle_s)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, server.end)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            machines.start()
            with contextlib.closing(machines):
                announce = threading.Thread(target=_announce, args=(server, starter), daemon=True)
                announce.start()
                server.serve()
                server.wait_leases()
            announce.join(ANSWER_S)  # the thread may have to report the end
    except (SandboxError, OSError) as exc:
        if (error := exc if isinstance(exc, SandboxError) else host_error(exc)) is None:
            raise
        starter.report(_error_values(error))
        return 125
    return 0


def _error_values(exc: SandboxError) -> dict[str, object]:
    """Return an error as JSON values for `x07 pool start`. The value `usage` tells a UsageError from others."""
    return {"what": exc.what, "why": exc.why, "fix": exc.fix, "usage": isinstance(exc, UsageError)}


def _announce(server: Server, starter: Starter) -> None:
    try:
        starter.report({"ready": server.wait_filled()})
    except SandboxError as exc:
        starter.report(_error_values(exc))
    starter.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
