"""Starting gate and resolver for a job, and their end. What they are: gate_process.py."""

from __future__ import annotations

import array
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host import close_on_fork
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.jail.uids import lease_uid
from x07_sandbox.jobs.launcher import Launch, launch
from x07_sandbox.network.rules import DeniedHosts, NetSettings
from x07_sandbox.network.settings import settings_to_json
from x07_sandbox.network.summary import NetworkUse

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_S: Final = 20.0
_END_S: Final = 5.0
_ACCOUNT_MAX: Final = 4 << 20
_SAID_MAX: Final = 4096
# asyncio and msgspec do without these two, which take megabytes.
_UNWANTED: Final = {"ssl": None, "typing_extensions": None}
_CODE: Final = (
    "import sys; sys.path[:] = {paths!r}; sys.modules.update({unwanted!r}); "
    "from x07_sandbox.network.{module} import main; main()"
)
_NEEDED: Final = ("x07_sandbox", "msgspec", "idna", "h11")


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate decides by. policy: the document in force."""

    policy: bytes
    denied: DeniedHosts
    settings: NetSettings

    def encoded(self) -> bytes:
        """As the gate reads it."""
        denied = {host: None if ports is None else sorted(ports) for host, ports in self.denied.items()}
        words: dict[str, Any] = {
            "policy": self.policy.decode(),
            "denied": denied,
            "settings": settings_to_json(self.settings),
        }
        return json.dumps(words).encode()


class GateProcess:
    """A running gate. pidfd: readable when it has ended. walls: what holds it."""

    def __init__(self, child: subprocess.Popen[bytes], control: socket.socket, account_fd: int, said_fd: int) -> None:
        self._child = child
        self._control = control
        self._account_fd = account_fd
        self._said_fd = said_fd
        self.pidfd = os.pidfd_open(child.pid)
        self.walls: tuple[str, ...] = ()

    def _wait_ready(self) -> None:
        """Wait until it is confined and listens. Raises HostError."""
        answer = b""
        if wait_readable(self._control.fileno(), READY_S):
            with contextlib.suppress(OSError):
                answer = self._control.recv(_SAID_MAX)
        try:
            self.walls = tuple(json.loads(answer)["walls"])
        except ValueError as exc:
            why = self.said() or "it did not answer"
            raise HostError("cannot start the egress gate", why, "Run x07 doctor") from exc

    def send_stream(self, stream_fd: int | None) -> None:
        """Give it the stream from the guest's relay, once it is ready; in our hands nothing of it is left.

        Raises HostError.
        """
        if stream_fd is None:
            raise HostError("cannot carry connections", "the backend gave no stream for them", "Use another backend")
        self._wait_ready()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [stream_fd]))]
        try:
            self._control.sendmsg([b"stream"], rights)
        except OSError as exc:
            why = self.said() or exc.strerror or str(exc)
            raise HostError("cannot reach the egress gate", why, "Run x07 doctor") from exc
        # Its number stays taken, as its owner will close it.
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, stream_fd, inheritable=False)
        os.close(null)

    def said(self) -> str:
        """The last line of what it said in its last moments."""
        with contextlib.suppress(OSError):
            lines = os.pread(self._said_fd, 1 << 16, 0).decode("ascii", "replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "")[:_SAID_MAX]
        return ""

    def end(self) -> int:
        """Have it end, kill it if it does not; its exit status. Safe to call again."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        try:
            return self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            return self._child.wait()

    def account(self) -> NetworkUse | None:
        """Have it end, and return what it has seen; None where it was lost."""
        if self.end():
            return None
        data = os.pread(self._account_fd, _ACCOUNT_MAX, 0)
        try:
            return msgspec.json.decode(data, type=NetworkUse)
        except msgspec.DecodeError:
            return None


@contextlib.contextmanager
def gate_running(config: GateConfig, log_fd: int) -> Iterator[GateProcess]:
    """Start a gate and its resolver; they are gone on the way out. log_fd: gets the log, lent. Raises HostError."""
    with contextlib.ExitStack() as stack:
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (-1, None)
        locks = () if lock_fd is None else (lock_fd,)
        given = close_on_fork.FdGroup()
        stack.callback(given.close)
        ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        close_on_fork.add(ours.fileno())
        stack.callback(lambda: close_on_fork.close(ours.detach()))
        control_fd = given.add(control.detach())
        names = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gate_fd, resolver_fd = (given.add(end.detach()) for end in names)
        files = {name: _memory(stack, name) for name in ("config", "account", "said", "resolver-said")}
        os.write(files["config"], config.encoded())
        os.lseek(files["config"], 0, os.SEEK_SET)
        fds = (control_fd, files["config"], log_fd, files["account"], gate_fd)
        paths = _paths()
        child = _start(paths, "gate", (*map(str, fds), str(uid)), (*fds, *locks), files["said"])
        gate = GateProcess(child, ours, files["account"], files["said"])
        stack.callback(os.close, gate.pidfd)
        stack.callback(gate.end)
        resolver = _start(
            paths, "resolver", (str(resolver_fd), str(uid)), (resolver_fd, *locks), files["resolver-said"]
        )
        stack.callback(_end_resolver, resolver)
        given.close()  # theirs now
        yield gate


def _start(
    paths: list[str], kind: str, words: tuple[str, ...], fds: tuple[int, ...], said_fd: int
) -> subprocess.Popen[bytes]:
    code = _CODE.format(paths=paths, unwanted=_UNWANTED, module=f"{kind}_process")
    argv = [sys.executable, "-I", "-S", "-c", code, *words]
    try:
        return launch(Launch(argv=argv, pass_fds=fds, stderr_fd=said_fd))
    except OSError as exc:
        raise HostError(f"cannot start the {kind}", exc.strerror or str(exc), "Run x07 doctor") from exc


def _end_resolver(child: subprocess.Popen[bytes]) -> None:
    child.kill()  # it has nothing to say any more
    child.wait()


def _paths() -> list[str]:
    """Where those modules are found that they import: the standard library, and the folders of a few packages."""
    folders = [str(Path(os.__file__).parent), *(path for path in sys.path if path.endswith("lib-dynload"))]
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise HostError("cannot start the egress gate", f"the Python package {name} is missing", f"Install {name}")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


def _memory(stack: contextlib.ExitStack, name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
