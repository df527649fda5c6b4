"""Claiming a warm machine from the pool's process: what both sides say over its private socket, and the claimer's side.

One connection is one claim. The claimer asks with a JSON object; the pool answers with one, and with the machine's
descriptors. From then on the connection is the lease: when it ends, for whatever reason, the pool ends the machine.
The claimer ends it by saying so, and gets the word that the machine is gone. Both check the other's uid.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.backends.qemu.instance import Streams
from x07_sandbox.backends.qemu.machine import qmp_quit
from x07_sandbox.errors import BackendError
from x07_sandbox.host import forks
from x07_sandbox.host.paths import cache_folder, state_dir
from x07_sandbox.host.waiting import readable
from x07_sandbox.jobs.record import Claim, JobRecord, record_from, record_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from x07_sandbox.backends.base import Begun, MachineKind
    from x07_sandbox.backends.qemu.instance import QemuInstance

PROTOCOL: Final = 1
SOCKET: Final = "socket"
MESSAGE_MAX: Final = 64 * 1024
ANSWER_S: Final = 5.0
GONE_S: Final = 15.0
_FDS: Final = ("channel", "qmp", "console", "stderr", "supervisor", "inner")
_CREDENTIALS: Final = struct.Struct("3i")


def pool_dir() -> Path:
    """The folder of the pool's socket, lock and log. Raises HostError."""
    return cache_folder("pool")


@contextlib.contextmanager
def socket_address(folder: Path) -> Iterator[str]:
    """The socket's path below *folder*, by way of a descriptor: a path in an address may have 107 bytes only."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other side, by the kernel's word (unix(7): SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def send(connection: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """One message, with descriptors, which stay ours. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([json.dumps(message).encode()], rights)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One message and the descriptors that came with it, now ours; None at the end, and for what is no message."""
    fds = array.array("i")
    try:
        data, rights, _, _ = connection.recvmsg(
            MESSAGE_MAX, socket.CMSG_SPACE(len(_FDS) * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except OSError:
        return None
    for level, kind, content in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("protocol") != PROTOCOL:
        for fd in fds:
            os.close(fd)
        return None
    return message, list(fds)


def connected() -> socket.socket | None:
    """A connection to the pool's process of this user; None where there is none. Raises HostError."""
    folder = pool_dir()
    if not (folder / SOCKET).exists():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_S)
        with socket_address(folder) as address:
            connection.connect(address)
        if peer_of(connection)[1] == os.geteuid():
            return connection
    except OSError:
        pass  # it has ended, and left its socket
    connection.close()
    return None


class LeasedInstance(Streams):
    """A machine that the pool's process started and still watches; its descriptors are ours."""

    def __init__(self, lease: socket.socket, told: dict[str, Any], fds: dict[str, int]) -> None:
        super().__init__(fds)
        self.begun: Begun = "pool"
        self.cold_reason = ""
        self.jail = str(told["jail"])
        self.record: JobRecord = record_from(told["record"])
        self.pidfd = fds["supervisor"]
        self._inner_pidfd = fds["inner"]
        self._lease = lease
        self._status: int | None = None
        self._gone = False

    def release(self) -> None:
        """It runs already."""

    def exit_status(self) -> int | None:
        """How the machine's process ended: its parent tells, once it has."""
        if self._status is None and readable(self._lease.fileno(), 0):
            self._hear()
        return self._status

    def _hear(self) -> None:
        answer = receive(self._lease)
        if answer is None:  # the pool's process is gone, and every machine of its with it
            self._status = -9
            return
        self._status = int(answer[0]["status"])
        self._gone = bool(answer[0]["gone"])

    def stop(self) -> bool:
        """Ask QEMU to quit, tell the pool that it is over, and wait for its word; whether all is proven gone."""
        if self._status is None:
            self.tell(qmp_quit())
            with contextlib.suppress(OSError):
                send(self._lease, {"protocol": PROTOCOL, "over": True})
            self._lease.settimeout(GONE_S)
            self._hear()
        return readable(self._inner_pidfd, GONE_S) and self._gone


class PoolMachines:
    """The pool's process of this user, as `Machines` has it."""

    def claim(self, kind: MachineKind, claim: Claim) -> contextlib.AbstractContextManager[LeasedInstance] | None:
        """One of its machines, as the job of *claim*. Raises BackendError: the pool may have that job on record now."""
        connection = connected()
        if connection is None:
            return None
        wanted = {
            "protocol": PROTOCOL,
            "want": "claim",
            "run_id": claim.run_id,
            "phase": claim.phase,
            "wall_ms": claim.wall_ms,
            "state_dir": str(state_dir()),
            "kind": kind.key,
        }
        try:
            send(connection, wanted)
            answer = receive(connection)
        except OSError:
            answer = None
        if answer is not None and len(answer[1]) == len(_FDS):
            return _leased(connection, *answer)
        connection.close()
        if answer is None:
            raise BackendError("cannot take a machine from the pool", "it does not answer", "See x07 pool status")
        for fd in answer[1]:
            os.close(fd)
        return None


@contextlib.contextmanager
def _leased(lease: socket.socket, told: dict[str, Any], owned_fds: list[int]) -> Iterator[LeasedInstance]:
    forks.keep(lease.fileno())  # it would last as long as any child that is forked meanwhile
    try:
        instance = _instance_of(lease, told, owned_fds)
        try:
            yield instance
        finally:
            instance.stop()
    finally:
        forks.forget(lease.fileno())
        lease.close()
        for fd in owned_fds:
            os.close(fd)


def _instance_of(lease: socket.socket, told: dict[str, Any], owned_fds: list[int]) -> LeasedInstance:
    try:
        return LeasedInstance(lease, told, dict(zip(_FDS, owned_fds, strict=True)))
    except (KeyError, ValueError, TypeError) as exc:
        what = "cannot take a machine from the pool"
        raise BackendError(what, f"its answer is damaged ({exc})", "Run x07 pool stop, and try again") from exc


def handed_over(instance: QemuInstance) -> tuple[dict[str, object], list[int]]:
    """What the claimer gets of a machine: the answer, and descriptors, which stay the pool's."""
    message = {"protocol": PROTOCOL, "jail": instance.jail, "record": record_values(instance.record)}
    ends = instance.ends
    return message, [*(ends[name] for name in _FDS[:4]), instance.pidfd, instance.inner_pidfd]
