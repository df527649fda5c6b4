"""The relay's process: prepared before a machine is saved, told the policy's hosts when the job has come."""

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
    """The process, as its parent has it. status_fd: ends with it, which ends the job too."""

    def __init__(self, netns_fd: int, open_port: Callable[[], int], keep: tuple[int, ...] = (), *, hold: bool) -> None:
        """Start it in a network namespace, -1 for this one.

        open_port: opens the stream to the gate. keep: descriptors that this needs. hold: as firewall.build has it.
        """
        self._built = False
        orders_r, self._orders_fd = os.pipe2(os.O_CLOEXEC)
        self.status_fd, told_w = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            system.close_descriptors_except(netns_fd, orders_r, told_w, *keep)
            _run(netns_fd, open_port, orders_r, told_w, hold=hold)
        os.close(orders_r)
        os.close(told_w)

    def wait_built(self) -> None:
        """Wait until it has made all that does not depend on a policy; at once the second time. Raises JobError."""
        if not self._built:
            self._wait()
        self._built = True

    def wait_admitted(self) -> None:
        """Wait until what the policy lists can be reached. Raises JobError."""
        self._wait()

    def _wait(self) -> None:
        if (told := os.read(self.status_fd, 1)) != _READY:
            raise JobError("relay", 0, (told + os.read(self.status_fd, 4096)).decode("utf-8", "replace")[:1000])

    def admit(self, network: dict[str, Any]) -> None:
        """Tell it the policy's hosts, as START carries them."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `wait` says
            write_all(self._orders_fd, marshal.dumps(network))
        os.close(self._orders_fd)

    def take_end(self) -> str:
        """Why it has ended, once `status_fd` says that it has."""
        return os.read(self.status_fd, 4096).decode("utf-8", "replace")[:1000] or "it was killed"

    def close(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.status_fd)


def _run(netns_fd: int, open_port: Callable[[], int], orders_fd: int, status_fd: int, *, hold: bool) -> NoReturn:
    try:
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
        if netns_fd >= 0:
            os.setns(netns_fd, os.CLONE_NEWNET)
        firewall.build(hold=hold)
        sockets = firewall.Sockets(hold=hold)
        port_fd = open_port()
        os.write(status_fd, _READY)
        network = marshal.loads(read_all(orders_fd))  # noqa: S302 - it is our agent that speaks
        firewall.admit(network, sockets)
        relay = Relay(port_fd, NameTable(network["names"], network["wildcards"]), sockets)
        os.write(status_fd, _READY)
        relay.serve()
        os.write(status_fd, b"the gate has ended")
    except JobError as exc:
        os.write(status_fd, f"{exc.args[0]}: {exc.args[2]}".encode("utf-8", "replace"))
    except Exception as exc:  # noqa: BLE001 - whatever it is ends the job, and is told
        os.write(status_fd, f"{type(exc).__name__}: {exc}".encode("utf-8", "replace")[:1000])
    finally:
        os._exit(0)
