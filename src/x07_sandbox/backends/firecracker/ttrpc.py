"""Calls of firecracker-containerd over ttrpc, containerd's protocol for calls over a Unix socket.

A call is one request and one response, each a header and a message. https://github.com/containerd/ttrpc describes the
frames (PROTOCOL.md) and the messages (request.proto). A response has the status of google/rpc/status.proto. The fields
of the two calls are those of firecracker-containerd's proto/firecracker.proto and proto/types.proto.
"""

import socket
import struct
from collections.abc import Mapping
from typing import Final

from x07_sandbox.backends.protobuf import Message, encode
from x07_sandbox.errors import BackendError, Command, HostError, printable
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.waiting import Deadline

ANSWER_MAX: Final = 4 << 20  # the protocol's own limit
_HEADER: Final = struct.Struct(">IIBB")  # length of the message, stream, type, flags
HEADER_SIZE: Final = _HEADER.size
_STREAM: Final = 1  # the only one of its connection
_REQUEST, _RESPONSE = 1, 2
_READ: Final = 1 << 16
_SHOWN_MAX: Final = 500  # characters of a daemon's message

_WHAT: Final = "cannot use firecracker-containerd"
_DOCTOR: Final = ("Run ", Command("x07 doctor"))
_CONNECT_FIX: Final = "Start firecracker-containerd, or set X07_VM_FIRECRACKER_CONTAINERD_SOCK to its socket"

_SERVICE: Final = "Firecracker"
_NAMESPACE: Final = "containerd-namespace-ttrpc"  # containerd's namespaces/ttrpc.go; gRPC has another key
_CONTAINERS: Final = 1  # in each VM
_SPARE_S: Final = 5.0  # for the daemon's own work before and after a VM's timeout, such as killing the VM

UNIMPLEMENTED: Final = 12  # the status of a daemon without the service, such as plain containerd
# google/rpc/code.proto, by number
_STATUSES: Final = (
    *("ok", "cancelled", "unknown error", "invalid argument", "deadline exceeded", "not found", "already exists"),
    *("permission denied", "resource exhausted", "failed precondition", "aborted", "out of range", "unimplemented"),
    *("internal error", "unavailable", "data loss", "unauthenticated"),
)


class CallError(BackendError):
    """The daemon answered a call with an error. status: its number in google/rpc/code.proto."""

    status: int = 0


def create_vm(address: str, namespace: str, vm_id: str, *, memory_mib: int, vcpus: int, timeout_s: int) -> None:
    """Create a VM for one container and wait until its agent answers. It ends when its task is deleted.

    The VM has a network card if the daemon's runtime configuration lists one: see `runtime_config`.

    address: containerd's socket. timeout_s: whole seconds, at least 1. Raises HostError, BackendError.
    """
    machine = encode((3, memory_mib), (4, vcpus))
    # ContainerCount, ExitAfterAllTasksDeleted, TimeoutSeconds
    request = encode((1, vm_id), (2, machine), (8, _CONTAINERS), (9, True), (11, timeout_s))
    answer = _call_firecracker(address, namespace, "CreateVM", request, timeout_s)
    try:
        if Message(answer).single(1, b"") == vm_id.encode():
            return
    except ValueError:
        pass
    raise BackendError(_WHAT, "CreateVM: the answer is not about the requested VM", _DOCTOR)


def stop_vm(address: str, namespace: str, vm_id: str, timeout_s: int) -> None:
    """Stop a VM. After *timeout_s*, which must be at least 1, the daemon kills it.

    Raises HostError, BackendError. The daemon also answers with an error after it has killed the VM. So the caller must
    check the VM's processes after every error.
    """
    _call_firecracker(address, namespace, "StopVM", encode((1, vm_id), (2, timeout_s)), timeout_s)


def _call_firecracker(address: str, namespace: str, method: str, request: bytes, timeout_s: int) -> bytes:
    metadata = {_NAMESPACE: namespace}
    return call(f"{address}.ttrpc", _SERVICE, method, request, metadata=metadata, timeout_s=timeout_s + _SPARE_S)


def call(
    socket_path: str, service: str, method: str, payload: bytes, *, metadata: Mapping[str, str], timeout_s: float
) -> bytes:
    """Call a method on a connection of its own, and return the answer.

    The daemon learns *timeout_s* too, and gives up then. Raises HostError if it cannot be reached, CallError if it
    answers with an error, and BackendError if it does not answer within *timeout_s* or the answer is malformed.
    """
    deadline = Deadline.after(timeout_s)
    request = request_frame(service, method, payload, metadata, timeout_s)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        with raised_as(HostError, f"cannot connect to {socket_path}", _CONNECT_FIX):
            _limit(connection, deadline)
            connection.connect(socket_path)
        try:
            _limit(connection, deadline)
            connection.sendall(request)
            size = message_size(_received(connection, HEADER_SIZE, deadline))
            return payload_of(_received(connection, size, deadline), method)
        except TimeoutError as exc:
            raise BackendError(_WHAT, f"{method}: no answer within {timeout_s:g} s", _DOCTOR) from exc
        except OSError as exc:
            raise BackendError(_WHAT, f"{method}: {exc.strerror or exc}", _DOCTOR) from exc
        except ValueError as exc:
            raise BackendError(_WHAT, f"{method}: the answer is malformed: {exc}", _DOCTOR) from exc


def request_frame(service: str, method: str, payload: bytes, metadata: Mapping[str, str], timeout_s: float) -> bytes:
    """Return a request as bytes."""
    pairs = [(5, encode((1, key), (2, value))) for key, value in metadata.items()]
    message = encode((1, service), (2, method), (3, payload), (4, int(timeout_s * 1e9)), *pairs)
    return _HEADER.pack(len(message), _STREAM, _REQUEST, 0) + message


def message_size(header: bytes) -> int:
    """Return the size of the message after the header of a response. Raises ValueError."""
    size, *rest = _HEADER.unpack(header)
    if rest != [_STREAM, _RESPONSE, 0]:
        raise ValueError("it is not the response to the request")
    if size > ANSWER_MAX:
        raise ValueError(f"it has more than {ANSWER_MAX} bytes")
    return int(size)


def payload_of(message: bytes, method: str) -> bytes:
    """Return the answer in the message of a response. method: for errors. Raises ValueError, CallError."""
    response = Message(message)
    payload, status = response.single(2, b""), Message(response.single(1, b""))
    if number := status.single(1, 0):
        kind = _STATUSES[number] if number < len(_STATUSES) else f"status {number}"
        text = " ".join(status.single(2, b"")[: 4 * _SHOWN_MAX].decode("utf-8", "replace").split())
        error = CallError(_WHAT, f"{method}: {kind}: {printable(text)[:_SHOWN_MAX]}", _DOCTOR)
        error.status = number
        raise error
    return payload


def _limit(connection: socket.socket, deadline: Deadline) -> None:
    """Make the next operation end at the deadline."""
    if not (left_s := deadline.left_s()):  # 0 would mean not to wait at all
        raise TimeoutError("timed out")
    connection.settimeout(left_s)


def _received(connection: socket.socket, size: int, deadline: Deadline) -> bytes:
    data = bytearray()
    while len(data) < size:
        _limit(connection, deadline)
        piece = connection.recv(min(size - len(data), _READ))
        if not piece:
            raise ConnectionError("the daemon closed the connection")
        data += piece
    return bytes(data)
