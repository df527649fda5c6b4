"""The process of the relay, and its streams to the agent."""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import socket
from collections.abc import Callable
from typing import Final, NoReturn

from x07_sandbox import kernel
from x07_sandbox.channel.messages import Network
from x07_sandbox.guest import firewall, system
from x07_sandbox.guest.dns import NameTable
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.relay import Relay
from x07_sandbox.guest.system import read_all, write_all

_READY: Final = b"R"


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
        self.status_fd, status_w = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            system.close_descriptors_except(netns_fd, settings_r, status_w, *keep)
            _run(netns_fd, open_port, settings_r, status_w, hold=hold)
        os.close(settings_r)
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

    def end_reason(self) -> str:
        """Return why the process has ended, once `status_fd` is readable."""
        return os.read(self.status_fd, 4096).decode("utf-8", "replace")[:1000] or "it was killed"

    def close(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.status_fd)


def on_shared_channel(netns_fd: int) -> RelayProcess:
    """Start a relay that shares the channel. It delays no packets, since the host's kernel may be unable to."""
    ours, theirs = socket.socketpair()
    os.set_blocking(theirs.fileno(), False)
    with theirs:
        relay = RelayProcess(netns_fd, theirs.fileno, (theirs.fileno(),), hold=False)
    relay.carried_fd = ours.detach()
    return relay


def _run(netns_fd: int, open_port: Callable[[], int], settings_fd: int, status_fd: int, *, hold: bool) -> NoReturn:
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
        os.write(status_fd, _READY)
        relay.serve()
        os.write(status_fd, b"the gate has disconnected")
    except JobError as exc:
        os.write(status_fd, f"{exc.args[0]}: {exc.args[2]}".encode("utf-8", "replace"))
    except Exception as exc:  # noqa: BLE001 - any error ends the job, and is reported
        os.write(status_fd, f"{type(exc).__name__}: {exc}".encode("utf-8", "replace")[:1000])
    finally:
        os._exit(0)
