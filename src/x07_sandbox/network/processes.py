"""Start and stop the gate and resolver of a job (gate.py, resolver.py)."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import memory_file
from x07_sandbox.host.paths import raised_as
from x07_sandbox.host.processes import FdGroup, Launch, close_on_fork, launch
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.jail.resources import lease_uid
from x07_sandbox.network.ledger import ACCOUNT, STREAM
from x07_sandbox.network.rules import DeniedHosts, NetSettings
from x07_sandbox.network.settings import settings_to_json
from x07_sandbox.policy.denials import NetworkUse

READY_S: Final = 20.0
_END_S: Final = 5.0
_ACCOUNT_MAX: Final = 4 << 20
_ACCOUNT_S: Final = 2.0
_MESSAGE_MAX: Final = 4096
# Optional imports of asyncio and msgspec that would take megabytes.
_UNWANTED: Final = {"ssl": None, "typing_extensions": None}
_CODE: Final = (
    "import sys; sys.path[:] = {paths!r}; sys.modules.update({unwanted!r}); "
    "from x07_sandbox.network.{module} import main; main()"
)
_NEEDED: Final = ("x07_sandbox", "msgspec", "idna", "h11", "hpack")


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a gate. policy: the effective policy document."""

    policy: bytes
    denied: DeniedHosts
    settings: NetSettings

    def encoded(self) -> bytes:
        """Return the configuration as JSON."""
        denied = {host: None if ports is None else sorted(ports) for host, ports in self.denied.items()}
        words = {"policy": self.policy.decode(), "denied": denied, "settings": settings_to_json(self.settings)}
        return json.dumps(words).encode()


class GateProcess:
    """A running gate. pidfd: readable once the gate has exited. walls: the names of its confinement measures."""

    def __init__(self, child: subprocess.Popen[bytes], control: socket.socket, account_fd: int, stderr_fd: int) -> None:
        self._child = child
        self._control = control
        self._account_fd = account_fd
        self._stderr_fd = stderr_fd
        self.pidfd = os.pidfd_open(child.pid)
        self.walls: tuple[str, ...] = ()
        self._asking = threading.Lock()

    def _wait_ready(self) -> None:
        """Wait until the gate is confined and ready for the stream. Raises HostError if it does not answer."""
        answer = b""
        if wait_readable(self._control.fileno(), READY_S):
            with contextlib.suppress(OSError):
                answer = self._control.recv(_MESSAGE_MAX)
        try:
            self.walls = tuple(json.loads(answer)["walls"])
        except ValueError as exc:
            why = self.last_message() or "it did not answer"
            raise HostError("cannot start the egress gate", why, "Run x07 doctor") from exc

    def connect(self, net_fd: int | None, stack: contextlib.ExitStack, nonce: bytes = b"") -> int | None:
        """Connect the gate to the relay. Raises HostError.

        net_fd: the relay's stream, if it has one of its own. Else return a descriptor for the relay's bytes.
        nonce: see `send_stream`.
        """
        if net_fd is not None:
            self.send_stream(net_fd, nonce)
            return None
        ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
        self.send_stream(theirs.fileno())
        return ours.fileno()

    def send_stream(self, stream_fd: int, nonce: bytes = b"") -> None:
        """Pass the relay's stream to the gate, and replace this process's copy with /dev/null. Raises HostError.

        nonce: in a fork, the bytes after which the stream begins.
        """
        self._wait_ready()
        try:
            socket.send_fds(self._control, [STREAM + nonce], [stream_fd])
        except OSError as exc:
            why = self.last_message() or exc.strerror or str(exc)
            raise HostError("cannot reach the egress gate", why, "Run x07 doctor") from exc
        # The number stays in use until its owner closes it.
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, stream_fd, inheritable=False)
        os.close(null)

    def last_message(self) -> str:
        """Return the last line of the gate's standard error."""
        with contextlib.suppress(OSError):
            lines = os.pread(self._stderr_fd, 1 << 16, 0).decode("ascii", "replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "")[:_MESSAGE_MAX]
        return ""

    def end(self) -> int:
        """Stop the gate, by SIGKILL if necessary; return its exit status. Idempotent."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        try:
            return self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            return self._child.wait()

    def account_so_far(self) -> NetworkUse | None:
        """Return the gate's record of what the guest has asked for until now, or None if the gate does not answer.

        Thread-safe. For a gate that has got its stream.
        """
        with self._asking, contextlib.suppress(OSError):
            self._control.send(ACCOUNT)
            if wait_readable(self._control.fileno(), _ACCOUNT_S) and self._control.recv(_MESSAGE_MAX) == ACCOUNT:
                return self._read_account()
        return None

    def account(self) -> NetworkUse | None:
        """Stop the gate and return its record of the network use, or None if the gate failed."""
        return None if self.end() else self._read_account()

    def _read_account(self) -> NetworkUse | None:
        data = os.pread(self._account_fd, _ACCOUNT_MAX, 0)
        try:
            return msgspec.json.decode(data, type=prepared(NetworkUse))
        except msgspec.DecodeError:
            return None


@contextlib.contextmanager
def gate_running(config: GateConfig, log_fd: int) -> Iterator[GateProcess]:
    """Run a gate and its resolver. log_fd: for the log; the caller closes it. Raises HostError if either fails."""
    with contextlib.ExitStack() as stack:
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (-1, None)
        locks = () if lock_fd is None else (lock_fd,)
        given = FdGroup()
        stack.callback(given.close)
        ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        close_on_fork.add(ours.fileno())
        stack.callback(lambda: close_on_fork.close(ours.detach()))
        control_fd = given.add(control.detach())
        names = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gate_fd, resolver_fd = (given.add(end.detach()) for end in names)
        files = FdGroup()
        stack.callback(files.close)
        contents = (config.encoded(), b"", b"", b"")
        config_fd, account_fd, stderr_fd, resolver_stderr_fd = (files.add(memory_file(data)) for data in contents)
        fds = (control_fd, config_fd, log_fd, account_fd, gate_fd)
        paths = _paths()
        child = _start(paths, "gate", (*map(str, fds), str(uid)), (*fds, *locks), stderr_fd)
        gate = GateProcess(child, ours, account_fd, stderr_fd)
        stack.callback(os.close, gate.pidfd)
        stack.callback(gate.end)
        words = (str(resolver_fd), str(uid))
        resolver = _start(paths, "resolver", words, (resolver_fd, *locks), resolver_stderr_fd)
        stack.callback(resolver.wait)
        stack.callback(resolver.kill)  # the stack calls this first
        given.close()
        yield gate


def _start(
    paths: list[str], module: str, words: tuple[str, ...], fds: tuple[int, ...], stderr_fd: int
) -> subprocess.Popen[bytes]:
    code = _CODE.format(paths=paths, unwanted=_UNWANTED, module=module)
    argv = [sys.executable, "-I", "-S", "-c", code, *words]
    with raised_as(HostError, f"cannot start the {module}", "Run x07 doctor"):
        return launch(Launch(argv=argv, pass_fds=fds, stderr_fd=stderr_fd))


def _paths() -> list[str]:
    """Return sys.path for gate and resolver: the standard library and the folders of a few packages."""
    folders = [str(Path(os.__file__).parent), *(path for path in sys.path if path.endswith("lib-dynload"))]
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise HostError("cannot start the egress gate", f"the Python package {name} is missing", f"Install {name}")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))
