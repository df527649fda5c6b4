"""The relay's process: prepared before the snapshot, given the policy's hosts with the job."""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
from typing import TYPE_CHECKING, Any, Final, NoReturn

from x07_sandbox.guest import firewall, system
from x07_sandbox.guest.dns import NameTable
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.relay import Relay
from x07_sandbox.guest.system import read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

_READY: Final = b"R"


class RelayProcess:
    """The relay's process. status_fd: readable when it has ended, which ends the job too."""

    def __init__(self, netns_fd: int, open_port: Callable[[], int], keep: tuple[int, ...] = (), *, hold: bool) -> None:
        """Start it in a network namespace; -1: the current one.

        open_port: opens the stream to the gate. keep: descriptors needed for that. hold: see `firewall.build`.
        """
        self._built = False
        settings_r, self._settings_fd = os.pipe2(os.O_CLOEXEC)
        self.status_fd, status_w = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            system.close_descriptors_except(netns_fd, settings_r, status_w, *keep)
            _run(netns_fd, open_port, settings_r, status_w, hold=hold)
        os.close(settings_r)
        os.close(status_w)

    def wait_built(self) -> None:
        """Wait until the parts that do not depend on the policy are ready. Raises JobError."""
        if not self._built:
            self.wait_admitted()
        self._built = True

    def wait_admitted(self) -> None:
        """Wait until the policy's hosts can be reached. Raises JobError."""
        if (status := os.read(self.status_fd, 1)) != _READY:
            raise JobError("relay", 0, (status + os.read(self.status_fd, 4096)).decode("utf-8", "replace")[:1000])

    def admit(self, network: dict[str, Any]) -> None:
        """Send START's `network` field."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; `wait_admitted` raises
            write_all(self._settings_fd, marshal.dumps(network))
        os.close(self._settings_fd)

    def end_reason(self) -> str:
        """Return why it has ended, once `status_fd` is readable."""
        return os.read(self.status_fd, 4096).decode("utf-8", "replace")[:1000] or "it was killed"

    def close(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.status_fd)


def _run(netns_fd: int, open_port: Callable[[], int], settings_fd: int, status_fd: int, *, hold: bool) -> NoReturn:
    try:
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        if netns_fd >= 0:
            os.setns(netns_fd, os.CLONE_NEWNET)
        firewall.build(hold=hold)
        sockets = firewall.Sockets(hold=hold)
        port_fd = open_port()
        os.write(status_fd, _READY)
        network = marshal.loads(read_all(settings_fd))  # noqa: S302 - from our agent
        firewall.admit(network, sockets)
        relay = Relay(port_fd, NameTable(network["names"], network["wildcards"]), sockets)
        os.write(status_fd, _READY)
        relay.serve()
        os.write(status_fd, b"the gate has disconnected")
    except JobError as exc:
        os.write(status_fd, f"{exc.args[0]}: {exc.args[2]}".encode("utf-8", "replace"))
    except Exception as exc:  # noqa: BLE001 - any error ends the job, and is reported
        os.write(status_fd, f"{type(exc).__name__}: {exc}".encode("utf-8", "replace")[:1000])
    finally:
        os._exit(0)
