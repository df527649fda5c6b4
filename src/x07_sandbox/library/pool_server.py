"""The pool's process, which keeps machines warm and leases them to this user's commands over a private socket.

    python -m x07_sandbox.library.pool_server SIZE IDLE_S IMAGE READY_FD

IMAGE: a name or digest, "" for the default image. READY_FD: see `library/resident`. The process ends on SIGTERM,
SIGINT or a request, or after IDLE_S seconds without use. All its machines and its front (cli/front.py) end then.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from x07_sandbox.backends.lease import (
    ANSWER_S,
    GONE_S,
    SOCKET,
    Leased,
    Lend,
    NoneReady,
    Over,
    Query,
    Request,
    Stop,
    pool_dir,
    receive,
    send,
)
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import open_pidfd, peer_of
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import state_dir
from x07_sandbox.host.processes import identify, start_in_background
from x07_sandbox.host.sockets import listening
from x07_sandbox.host.variables import inherited_environment
from x07_sandbox.host.waiting import Deadline, input_poll, wait_readable
from x07_sandbox.library.resident import Problem, Progress, Ready, Server, Starter, run
from x07_sandbox.library.warm import WarmMachine, WarmMachines
from x07_sandbox.reports.commands import PoolStatus

_JOB_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,10}-[0-9]{1,10}-[a-z]{1,16}")
_WALL_MS_MAX: Final = 86_400_000
_FRONT_S: Final = 30.0
_FRONT_END_S: Final = 2.0


class PoolServer:
    """Serves connections to the pool, each in a thread, until the leased machine has ended."""

    def __init__(
        self, machines: WarmMachines, listener: socket.socket, idle_s: float, front: subprocess.Popen[bytes] | None
    ) -> None:
        self.machines = machines
        self._front = front
        self.idle_s = idle_s
        self.server = Server(listener, self._serve_one)
        self._filled = False
        self._leases = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Serve until the end of `server` or the pool has been idle for too long."""
        self.server.serve(self._unused, min(self.idle_s, 1.0))

    def wait_leases(self) -> None:
        """Wait, after the end, until every leased machine has ended and is recorded as gone."""
        deadline = Deadline.after(GONE_S)
        while self._leases and not deadline.passed():
            self.server.join(0.05)

    def _unused(self) -> bool:
        with self._lock:
            return self._filled and not self._leases and time.monotonic() - self.machines.used_at > self.idle_s

    def _serve_one(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_S)
        asked: Request | None = receive(connection, Request)
        match asked:
            case Lend():
                self._lend(connection, asked)
            case Query():
                send(connection, self.status())
            case Stop():
                self.server.end()
                connection.settimeout(None)
                connection.recv(1)  # the answer is the end of this process, which closes the connection
            case None:  # the client is gone
                pass

    def wait_filled(self) -> int:
        """Wait until all machines are warm, start the idle time, and return their number. Raises SandboxError."""
        if not self.machines.wait_ready(Deadline.after(settings.QUEUE_S)) and self.server.ended:
            raise HostError("cannot start the pool", "it was stopped during its start", "Start it again")
        self.machines.used_at = time.monotonic()
        self._filled = True
        return self.machines.ready()

    def status(self) -> PoolStatus:
        """Return the values for `x07 pool status`."""
        machines = self.machines
        problem, front = machines.problem, self._front
        return PoolStatus(
            pid=os.getpid(),
            front=front.pid if front is not None and front.poll() is None else None,
            size=machines.size,
            ready=machines.ready(),
            running=self._leases,
            claimed=machines.claimed,
            image=machines.kind.image_digest,
            idle_s=self.idle_s,
            unused_s=round(time.monotonic() - machines.used_at, 1),
            problem=None if problem is None else str(problem),
        )

    def _lend(self, connection: socket.socket, asked: Lend) -> None:
        pid, _ = peer_of(connection)
        machine = self._taken(asked, pid)
        if machine is None:
            send(connection, NoneReady())
            return
        with self._lock:
            self._leases += 1
        ended = False
        try:
            one, fds = machine.instance, self.machines.cloning.descriptors(machine.instance)
            send(connection, Leased(one.record, one.jail, one.notes, tuple(fds)), [*fds.values()])
            connection.settimeout(None)
            ended = self._wait_for_end(connection, machine.instance.pidfd, pid)
        finally:
            gone = machine.close()
            with self._lock:
                self._leases -= 1
            self.machines.used_at = time.monotonic()
        status = -signal.SIGTERM if ended else machine.instance.exit_status()
        send(connection, Over(status=-9 if status is None else status, gone=gone))

    def _wait_for_end(self, connection: socket.socket, machine_pidfd: int, claimer: int) -> bool:
        """Wait until the connection, the claimer, the machine or the server ends. Return whether the server ended."""
        with contextlib.ExitStack() as stack:
            fds = [connection.fileno(), machine_pidfd, self.server.end_fd]
            with contextlib.suppress(OSError):
                # A forked child of a dead claimer may hold the connection open.
                fds.append(open_pidfd(claimer))
                stack.callback(os.close, fds[-1])
            return any(fd == self.server.end_fd for fd, _ in input_poll(*fds).poll())

    def _taken(self, asked: Lend, pid: int) -> WarmMachine | None:
        """Return a machine as requested and record that the process *pid* owns it, or return None if none fits."""
        claim, kind = asked.claim, self.machines.kind
        ours = (str(state_dir()), self.machines.backend.name, kind.key)
        if (asked.state_dir, asked.backend, asked.kind) != ours or not 0 < asked.ram_bytes <= kind.ram_bytes:
            return None
        # The job's id becomes the name of a folder.
        if not _JOB_ID.fullmatch(claim.job_id) or not 0 < claim.wall_ms <= _WALL_MS_MAX:
            return None
        runner = identify(pid)
        return None if runner is None else self.machines.take(claim, runner, asked.ram_bytes)


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
        with listening(folder, SOCKET, socket.SOCK_SEQPACKET) as listener:
            yield listener


@contextlib.contextmanager
def _front() -> Iterator[subprocess.Popen[bytes] | None]:
    """Yield the front, or None if it cannot be started, which the log says. It ends with the context."""
    ready_r, ready_w = os.pipe()
    env = inherited_environment() | {"LC_ALL": "C.UTF-8"}
    child = None
    with os.fdopen(ready_r, "rb", buffering=0) as ready:
        try:
            module, log = "x07_sandbox.cli.front", sys.stderr.buffer
            child = start_in_background(module, ready_fd=ready_w, errors=log, stdin=subprocess.PIPE, env=env)
        except OSError as exc:
            sys.stderr.write(f"cannot start the front: {exc}\n")
        finally:
            os.close(ready_w)
        if child is not None:
            wait_readable(ready.fileno(), _FRONT_S)
    try:
        yield child
    finally:
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=_FRONT_END_S)  # its standard input ends, and so does it
            child.kill()
            child.wait()


def _keep(starter: Starter, size: int, idle_s: float, image: str | None) -> None:
    """Keep machines warm until the pool ends."""
    os.chdir("/")
    with _listening() as listener:

        def progress(text: str) -> None:
            starter.report(Progress.of(text))

        machines = WarmMachines(size, image=image, progress=progress)
        with _front() as front:
            pool = PoolServer(machines, listener, idle_s, front)
            pool.server.end_on_signals()
            machines.start()
            with contextlib.closing(machines):
                announce = threading.Thread(target=_announce, args=(pool, starter), daemon=True)
                announce.start()
                pool.serve()
                pool.wait_leases()
        announce.join(ANSWER_S)  # the thread may have to report the end


def _announce(pool: PoolServer, starter: Starter) -> None:
    try:
        starter.report(Ready(str(pool.wait_filled())))
    except SandboxError as exc:
        starter.report(Problem.of(exc))
    starter.close()


def main(words: list[str]) -> int:
    """Run the pool's process and return its exit status."""
    starter = Starter(int(words[3]))
    return run(starter, partial(_keep, starter, int(words[0]), float(words[1]), words[2] or None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
