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

from x07_sandbox.backends.handshake import greet
from x07_sandbox.errors import BackendError
from x07_sandbox.host import close_on_fork
from x07_sandbox.host.paths import cache_folder, state_dir
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.jobs.record import record_from, record_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from x07_sandbox.backends.base import Backend, Instance, Job

PROTOCOL: Final = 3
SOCKET: Final = "socket"
MESSAGE_MAX: Final = 64 * 1024
ANSWER_S: Final = 5.0
GONE_S: Final = 15.0
_FDS_MAX: Final = 16
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
    room = socket.CMSG_SPACE(_FDS_MAX * fds.itemsize)
    try:
        data, rights, _, _ = connection.recvmsg(MESSAGE_MAX, room, socket.MSG_CMSG_CLOEXEC)
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


class _Lease:
    """The connection to the pool's process, as `base.Lease` has it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._status: int | None = None
        self._gone = False

    def exit_status(self) -> int | None:
        if self._status is None and wait_readable(self._connection.fileno(), 0):
            self._hear()
        return self._status

    def _hear(self) -> None:
        answer = receive(self._connection)
        if answer is None:  # the pool's process is gone, and every machine of its with it
            self._status = -9
        else:
            self._status, self._gone = int(answer[0]["status"]), bool(answer[0]["gone"])

    def give_back(self) -> bool:
        if self._status is None:
            with contextlib.suppress(OSError):
                send(self._connection, {"protocol": PROTOCOL, "over": True})
            self._connection.settimeout(GONE_S)
            self._hear()
        return self._gone


class PoolMachines:
    """The pool's process of this user, as `Machines` has it."""

    def claim(self, backend: Backend, job: Job) -> contextlib.AbstractContextManager[Instance] | None:
        """One of its machines, for *job*. Raises BackendError: the pool may have that job on record now."""
        connection = None if backend.cloning is None else connected()
        if connection is None:
            return None
        claim = job.claim
        wanted = {"protocol": PROTOCOL, "want": "claim", "state_dir": str(state_dir()), "backend": backend.name}
        wanted |= {"run_id": claim.run_id, "phase": claim.phase, "wall_ms": claim.wall_ms, "kind": job.kind.key}
        wanted["ram_bytes"] = job.used_ram_bytes
        try:
            send(connection, wanted)
            answer = receive(connection)
        except OSError:
            answer = None
        if answer is not None and answer[1]:
            return _leased(backend, job, connection, *answer)
        connection.close()
        if answer is None:
            raise BackendError("cannot take a machine from the pool", "it does not answer", "See x07 pool status")
        return None


@contextlib.contextmanager
def _leased(
    backend: Backend, job: Job, connection: socket.socket, told: dict[str, Any], owned_fds: list[int]
) -> Iterator[Instance]:
    close_on_fork.add(connection.fileno())  # it would last as long as any child that is forked meanwhile
    try:
        instance = _instance_of(backend, connection, told, owned_fds)
        try:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance
        finally:
            instance.stop()
    finally:
        close_on_fork.discard(connection.fileno())
        connection.close()
        for fd in owned_fds:
            os.close(fd)


def _instance_of(backend: Backend, connection: socket.socket, told: dict[str, Any], owned_fds: list[int]) -> Instance:
    assert backend.cloning is not None  # noqa: S101 - it was looked at before the machine was claimed
    try:
        fds = dict(zip(told["fds"], owned_fds, strict=True))
        instance = backend.cloning.leased(_Lease(connection), record_from(told["record"]), str(told["jail"]), fds)
        instance.notes = tuple(map(str, told["notes"]))
    except (KeyError, ValueError, TypeError) as exc:
        what = "cannot take a machine from the pool"
        raise BackendError(what, f"its answer is damaged ({exc})", "Run x07 pool stop, and try again") from exc
    return instance


def handed_over(backend: Backend, instance: Instance) -> tuple[dict[str, object], list[int]]:
    """What the claimer gets of a machine: the answer, and descriptors, which stay the pool's."""
    assert backend.cloning is not None  # noqa: S101 - a pool has machines only of such a backend
    fds = backend.cloning.descriptors(instance)
    message = {"protocol": PROTOCOL, "jail": instance.jail, "notes": instance.notes, "fds": list(fds)}
    return message | {"record": record_values(instance.record)}, list(fds.values())
