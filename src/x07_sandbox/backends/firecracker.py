"""The `firecracker-ctr` backend: a container in a virtual machine of firecracker-containerd.

The daemon has two more calls than containerd, to create and stop a VM. They go over ttrpc, containerd's protocol for
calls over a Unix socket. A call is one request and one response, each a header and a message.
https://github.com/containerd/ttrpc describes the frames (PROTOCOL.md) and the messages (request.proto). A response has
the status of google/rpc/status.proto. The fields of the two calls are those of firecracker-containerd's
proto/firecracker.proto and proto/types.proto.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from x07_sandbox.backends.container.backend import OWN_MACHINE, OWN_MACHINE_GAPS, ContainerInstance
from x07_sandbox.backends.container.runtime import ContainerSpec
from x07_sandbox.backends.containerd import ContainerdBackend, Ctr
from x07_sandbox.backends.engines import Client
from x07_sandbox.backends.prerequisites import KVM, Need, require
from x07_sandbox.backends.protobuf import Message, encode
from x07_sandbox.errors import BackendError, Command, HostError, SandboxError, printable
from x07_sandbox.host.linux import open_pidfd, process_ids, send_signal
from x07_sandbox.host.paths import raised_as, read_bounded
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.variables import FIRECRACKER_SOCKET, text
from x07_sandbox.host.waiting import Deadline

_CONFIG: Final = "/etc/containerd/firecracker-runtime.json"
_GUEST_BYTES: Final = 96 * MIB  # for the VM's kernel and firecracker-containerd's agent
_CREATE_S: Final = 60
_STOP_S: Final = 5
RUNTIME_CONFIG_MAX: Final = 1 << 20  # bytes
MACHINES: Final = "/var/lib/firecracker-containerd/shim-base"
_INTERFACES: Final = "default_network_interfaces"
_FILES: Final = ("kernel_image_path", "root_drive", "shim_base_dir")
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
_NAMESPACE_KEY: Final = "containerd-namespace-ttrpc"  # containerd's namespaces/ttrpc.go; gRPC has another key
_CONTAINERS: Final = 1  # in each VM
_SPARE_S: Final = 5.0  # for the daemon's own work before and after a VM's timeout, such as killing the VM

# google/rpc/code.proto, by number
_STATUSES: Final = (
    *("ok", "cancelled", "unknown error", "invalid argument", "deadline exceeded", "not found", "already exists"),
    *("permission denied", "resource exhausted", "failed precondition", "aborted", "out of range", "unimplemented"),
    *("internal error", "unavailable", "data loss", "unauthenticated"),
)


class FirecrackerBackend(ContainerdBackend):
    """The backend for a firecracker-containerd of this host."""

    name = "firecracker-ctr"
    needs = (
        Need("program", "firecracker-ctr", "", "X07_VM_FIRECRACKER_CTR_BIN"),
        msgspec.structs.replace(KVM, optional=False),
    )
    known_gaps = OWN_MACHINE_GAPS
    features = OWN_MACHINE
    warnings = ()
    variables = ("X07_VM_FIRECRACKER_CONTAINERD_SOCK", "X07_VM_CONTAINERD_NAMESPACE")
    oci_runtime = "aws.firecracker"

    def __init__(self) -> None:
        super().__init__()
        self._socket = text("X07_VM_FIRECRACKER_CONTAINERD_SOCK") or FIRECRACKER_SOCKET
        self._snapshotter = text("X07_VM_FIRECRACKER_SNAPSHOTTER") or "devmapper"

    def _made(self, client: Client) -> Ctr:
        machines = self._config().machines
        return FirecrackerCtr(
            client=client, snapshotter=self._snapshotter, oci_runtime=self.oci_runtime, machines=machines
        )

    def _config(self) -> RuntimeConfig:
        """Return what x07 needs of the daemon's configuration. Raises HostError if it cannot be read.

        Only `probe` refuses one with problems: VMs must be ended under any.
        """
        with raised_as(HostError, f"cannot read {_CONFIG}", "Check the installation of firecracker-containerd"):
            return runtime_config(read_bounded(Path(_CONFIG), "configuration", RUNTIME_CONFIG_MAX))

    def _limit_tasks(self, instance: ContainerInstance) -> None:
        """Do nothing, since the agent limits tasks: the container's control group is in the VM."""

    def _prove(self, *, boot: bool) -> str:
        require(self.needs, f"cannot use {self.name}")
        if os.geteuid() != 0:  # nobody else can see that a VM is gone
            raise HostError(f"cannot use {self.name}", "only root sees the processes of VMs", "Run x07 as root")
        if problems := self._config().problems:
            raise HostError(f"cannot use {self.name}", f"in {_CONFIG}, {' and '.join(problems)}", f"Correct {_CONFIG}")
        return f"{super()._prove(boot=boot)}, and /dev/kvm can be opened"


class FirecrackerCtr(Ctr, frozen=True, kw_only=True):
    """Containers of firecracker-containerd, each in a VM of its own that has the container's name."""

    in_machine: bool = True
    machines: str = MACHINES

    @property
    def _address(self) -> str:
        return self.client.options[1]

    @property
    def _namespace(self) -> str:
        return self.client.options[3]

    def create(self, spec: ContainerSpec) -> str:
        """Create a VM and the container in it, and return its name. Raises BackendError, HostError."""
        memory_mib = -(-(spec.memory_bytes + _GUEST_BYTES) // MIB)
        # Without this call, the daemon itself would make a VM of 128 MiB.
        create_vm(self._address, self._namespace, spec.name, memory_mib=memory_mib, vcpus=1, timeout_s=_CREATE_S)
        return super().create(spec)

    def end_machine(self, container: str) -> bool:
        """End the VM of a container, and return whether its processes are gone. Raises BackendError."""
        # The daemon asks the guest first, and answers with an error also after it has killed the VM.
        with contextlib.suppress(SandboxError):
            stop_vm(self._address, self._namespace, container, _STOP_S)
        for pid in self._machine(container):
            self._kill(pid, container)
        return not self._machine(container)

    def _machine(self, container: str) -> list[int]:
        """Return the processes of a container's VM, which have its working folder."""
        return [pid for pid in process_ids() if self._is_machine(pid, container)]

    def _is_machine(self, pid: int, container: str) -> bool:
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/{pid}/cwd").readlink()) == f"{self.machines}/{self._namespace}#{container}"
        return False

    def _kill(self, pid: int, container: str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            pidfd = open_pidfd(pid)
            try:
                if self._is_machine(pid, container):  # else the pid was used again
                    send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


class RuntimeConfig(NamedTuple):
    """What x07 needs to know. machines: the folder with the working folders of VMs.

    problems: why x07 cannot use this configuration, one clause for each problem.
    """

    machines: str = MACHINES
    problems: tuple[str, ...] = ()


def runtime_config(data: bytes) -> RuntimeConfig:
    """Return what x07 needs of this configuration. The jailer in it is used only by calls that ask for it.

    A VM without a list of network cards gets default_network_interfaces. An empty list in the call changes nothing.
    """
    if len(data) > RUNTIME_CONFIG_MAX:
        return RuntimeConfig(problems=(f"it has more than {RUNTIME_CONFIG_MAX} bytes",))
    try:
        # Pairs instead of dictionaries: the daemon accepts a key several times, and in any case.
        pairs = json.loads(data.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return RuntimeConfig(problems=("it is not valid JSON",))
    if not isinstance(pairs, tuple):
        return RuntimeConfig(problems=("it is not a JSON object",))
    found: dict[str, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key.casefold(), []).append(value)
    problems = [
        f"{name} is not an absolute path"
        for name in _FILES
        if not all(isinstance(value, str) and value.startswith("/") for value in found.get(name, []))
    ]
    if any(value not in (None, []) for value in found.get(_INTERFACES, [])):
        problems.append(f"{_INTERFACES} is not empty, so every VM would have a network card")
    places = {str(value).rstrip("/") for value in found.get("shim_base_dir", [])} or {MACHINES}
    if len(places) > 1:
        problems.append("shim_base_dir is set twice")
    return RuntimeConfig(machines=min(places), problems=tuple(problems))


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
    metadata = {_NAMESPACE_KEY: namespace}
    return call(f"{address}.ttrpc", _SERVICE, method, request, metadata=metadata, timeout_s=timeout_s + _SPARE_S)


def call(
    socket_path: str, service: str, method: str, payload: bytes, *, metadata: Mapping[str, str], timeout_s: float
) -> bytes:
    """Call a method on a connection of its own, and return the answer.

    The daemon learns *timeout_s* too, and gives up then. Raises HostError if it cannot be reached, and BackendError
    if it answers with an error, does not answer within *timeout_s*, or the answer is malformed.
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
    """Return the answer in the message of a response. method: for errors. Raises ValueError, BackendError."""
    response = Message(message)
    payload, status = response.single(2, b""), Message(response.single(1, b""))
    if number := status.single(1, 0):
        kind = _STATUSES[number] if number < len(_STATUSES) else f"status {number}"
        text = " ".join(status.single(2, b"")[: 4 * _SHOWN_MAX].decode("utf-8", "replace").split())
        raise BackendError(_WHAT, f"{method}: {kind}: {printable(text)[:_SHOWN_MAX]}", _DOCTOR)
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
