"""The private socket of the pool's process: its messages, and the side of the client that gets a VM.

Each connection carries one request, and each message is one packet. LEND is answered with LEASED and the VM's
descriptors, or with NONE_READY. From LEASED on, the connection is the lease: the client ends it by closing its
direction of the connection, or all of it. The pool then ends the VM, and confirms that with OVER. Each side checks the
uid of the other.
"""

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from x07_sandbox.backends.base import Backend, Instance, Job, claimed
from x07_sandbox.errors import BackendError
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.paths import cache_folder, state_dir
from x07_sandbox.host.processes import FdGroup, close_on_fork
from x07_sandbox.host.sockets import Message, connected, received
from x07_sandbox.records.runs import Claim, JobRecord

SOCKET: Final = "socket"
FRONT: Final = "front"  # the socket of cli/front.py, also in cli/x07_front_client.py
ANSWER_S: Final = 5.0
GONE_S: Final = 15.0
_MESSAGE_MAX: Final = 64 * 1024
_FDS_MAX: Final = 16


class Lend(Message, frozen=True):
    """Ask for a VM. kind: `MachineKind.key`. ram_bytes: the most RAM that the job can use."""

    claim: Claim
    state_dir: str
    backend: str
    kind: tuple[str, int, str, bool]
    ram_bytes: int


class Query(Message, frozen=True):
    """Ask for the pool's `PoolStatus` (reports/commands)."""


class Stop(Message, frozen=True):
    """End the pool. The answer is the end of the connection."""


Request = Lend | Query | Stop


class Leased(Message, frozen=True):
    """A VM. fds: the names of its descriptors, which come with the message in this order."""

    record: JobRecord
    jail: str
    notes: tuple[str, ...]
    fds: tuple[str, ...]


class NoneReady(Message, frozen=True):
    """The pool has no VM for this job."""


class Over(Message, frozen=True):
    """The VM has ended. status: its exit status. gone: whether the pool has proven it gone."""

    status: int
    gone: bool


def pool_dir() -> Path:
    """Return the folder of the pool's socket, lock and log. Raises HostError."""
    return cache_folder("pool")


def send(connection: socket.socket, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
    """Send one message with descriptors, which the caller keeps and must close. Raises OSError."""
    socket.send_fds(connection, [msgspec.msgpack.encode(message, enc_hook=str)], fds)


def receive(connection: socket.socket, types: Any, owned: FdGroup | None = None) -> Any:  # noqa: ANN401 - one of *types*
    """Return a message of one of *types*, or None if the connection has ended. Raises msgspec.MsgspecError.

    owned: gets the descriptors of the message. None: it must have none.
    """
    try:
        data, fds, _ = received(connection, _MESSAGE_MAX, 0 if owned is None else _FDS_MAX)
    except OSError:
        return None
    if owned is not None:
        for fd in fds:
            owned.add(fd)
    return msgspec.msgpack.decode(data, type=prepared(types), dec_hook=lambda _path, text: Path(text)) if data else None


def ask(connection: socket.socket, request: Request, types: Any, owned: FdGroup | None = None) -> Any:  # noqa: ANN401 - as above
    """Send a request, and return the answer, see `receive`."""
    with contextlib.suppress(OSError):  # the pool has ended, so there is no answer
        send(connection, request)
    return receive(connection, types, owned)


def end(lease: socket.socket) -> Over:
    """End the lease, if its VM has not ended yet, and return how it has ended."""
    with contextlib.suppress(OSError):
        lease.shutdown(socket.SHUT_WR)
    lease.settimeout(GONE_S)
    over: Over | None = receive(lease, Over)
    return over or Over(status=-9, gone=False)  # the pool's process is gone, and with it its machines


def connect_to_pool() -> socket.socket | None:
    """Connect to this user's pool process. Return None if there is no such process. Raises HostError."""
    folder = pool_dir()
    if not (folder / SOCKET).exists():
        return None
    try:
        return connected(folder, SOCKET, ANSWER_S, socket.SOCK_SEQPACKET)
    except OSError:  # the process has ended and left its socket behind
        return None


class PoolClient:
    """The pool process of this user, as a `MachineSource`."""

    def claim(self, backend: Backend, job: Job) -> contextlib.AbstractContextManager[Instance] | None:
        """Return a VM of the pool for *job*, or None. Raises BackendError, perhaps after the job was recorded."""
        connection = None if backend.cloning is None else connect_to_pool()
        if backend.cloning is None or connection is None:
            return None
        lend = Lend(job.claim, str(state_dir()), backend.name, job.kind.key, job.used_ram_bytes)
        what, fds = "cannot take a VM from the pool", FdGroup()
        with contextlib.ExitStack() as stack:
            stack.callback(fds.close)
            stack.enter_context(connection)
            close_on_fork.add(connection.fileno())  # a forked child must not prolong the lease
            stack.callback(close_on_fork.discard, connection.fileno())
            try:
                answer: Leased | NoneReady | None = ask(connection, lend, Leased | NoneReady, fds)
                if isinstance(answer, NoneReady):
                    return None
                if answer is None:
                    raise BackendError(what, "the pool did not answer", "See x07 pool status")
                named = dict(zip(answer.fds, fds.fds, strict=True))
                instance = backend.cloning.leased(connection, answer.record, answer.jail, named)
            except (msgspec.MsgspecError, KeyError, ValueError) as exc:
                why = f"the answer of the pool is malformed ({exc})"
                raise BackendError(what, why, "Run x07 pool stop, then try again") from exc
            instance.notes = answer.notes
            stack.callback(instance.stop)
            return claimed(instance, job, stack.pop_all().close)
