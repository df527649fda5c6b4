"""The private socket of the pool's process: its messages, and the side of the client that gets a VM.

Each connection requests one VM. The client sends JSON, and the pool answers with JSON and the VM's descriptors. From
then on the connection is the lease. The client ends the lease with a message or by closing the connection. The pool
then ends the VM, and confirms that in answer to the message. Each side checks the uid of the other.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.base import Backend, Instance, Job, greet
from x07_sandbox.errors import BackendError
from x07_sandbox.host.paths import cache_folder, state_dir
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.sockets import connected, received
from x07_sandbox.host.waiting import wait_readable
from x07_sandbox.records.runs import record_from, record_values

PROTOCOL: Final = 3
SOCKET: Final = "socket"
FRONT: Final = "front"  # the socket of cli/front.py, also in cli/x07_front_client.py
MESSAGE_MAX: Final = 64 * 1024
ANSWER_S: Final = 5.0
GONE_S: Final = 15.0
_FDS_MAX: Final = 16


def pool_dir() -> Path:
    """Return the folder of the pool's socket, lock and log. Raises HostError."""
    return cache_folder("pool")


def send(connection: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors, which the caller keeps and must close. Raises OSError."""
    socket.send_fds(connection, [json.dumps(message).encode()], fds)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive a message and its descriptors, which the caller must close.

    Return None if the connection has ended, or if the message is malformed.
    """
    try:
        data, fds, _ = received(connection, MESSAGE_MAX, _FDS_MAX)
    except OSError:
        return None
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("protocol") != PROTOCOL:
        for fd in fds:
            os.close(fd)
        return None
    return message, fds


def connect_to_pool() -> socket.socket | None:
    """Connect to this user's pool process. Return None if there is no such process. Raises HostError."""
    folder = pool_dir()
    if not (folder / SOCKET).exists():
        return None
    try:
        return connected(folder, SOCKET, ANSWER_S, socket.SOCK_SEQPACKET)
    except OSError:  # the process has ended and left its socket behind
        return None


class _Lease:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._status: int | None = None
        self._gone = False

    def exit_status(self) -> int | None:
        if self._status is None and wait_readable(self._connection.fileno(), 0):
            self._read_answer()
        return self._status

    def _read_answer(self) -> None:
        answer = receive(self._connection)
        if answer is None:  # the pool's process is gone, and with it its machines
            self._status = -9
        else:
            self._status, self._gone = int(answer[0]["status"]), bool(answer[0]["gone"])

    def end_lease(self) -> bool:
        if self._status is None:
            with contextlib.suppress(OSError):
                send(self._connection, {"protocol": PROTOCOL, "over": True})
            self._connection.settimeout(GONE_S)
            self._read_answer()
        return self._gone


class PoolClient:
    """The pool process of this user, as a `MachineSource`."""

    def claim(self, backend: Backend, job: Job) -> contextlib.AbstractContextManager[Instance] | None:
        """Return a VM of the pool for *job*, or None. Raises BackendError, perhaps after the job was recorded."""
        connection = None if backend.cloning is None else connect_to_pool()
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
            raise BackendError("cannot take a VM from the pool", "the pool did not answer", "See x07 pool status")
        return None


@contextlib.contextmanager
def _leased(
    backend: Backend, job: Job, connection: socket.socket, answer: dict[str, Any], owned_fds: list[int]
) -> Iterator[Instance]:
    close_on_fork.add(connection.fileno())  # a forked child must not prolong the lease
    with contextlib.ExitStack() as stack:
        for fd in owned_fds:
            stack.callback(os.close, fd)
        stack.callback(connection.close)
        stack.callback(close_on_fork.discard, connection.fileno())
        instance = _instance_of(backend, connection, answer, owned_fds)
        stack.callback(instance.stop)
        greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
        yield instance


def _instance_of(backend: Backend, connection: socket.socket, answer: dict[str, Any], owned_fds: list[int]) -> Instance:
    assert backend.cloning is not None  # checked by `claim`
    try:
        fds = dict(zip(answer["fds"], owned_fds, strict=True))
        instance = backend.cloning.leased(_Lease(connection), record_from(answer["record"]), str(answer["jail"]), fds)
        instance.notes = tuple(map(str, answer["notes"]))
    except (KeyError, ValueError, TypeError) as exc:
        why = f"the answer of the pool is malformed ({exc})"
        raise BackendError("cannot take a VM from the pool", why, "Run x07 pool stop, then try again") from exc
    return instance


def handover(backend: Backend, instance: Instance) -> tuple[dict[str, object], list[int]]:
    """Return the answer and the descriptors for the client that gets a VM. The pool keeps owning the descriptors."""
    assert backend.cloning is not None  # else there is no pool
    fds = backend.cloning.descriptors(instance)
    message = {"protocol": PROTOCOL, "jail": instance.jail, "notes": instance.notes, "fds": list(fds)}
    return message | {"record": record_values(instance.record)}, list(fds.values())
