"""The `firecracker-ctr` backend: a container in a virtual machine of firecracker-containerd."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.backends.base import Availability
from x07_sandbox.backends.container.backend import GAPS, HELD
from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.backends.container.instance import ContainerInstance
from x07_sandbox.backends.containerd.backend import ContainerdBackend
from x07_sandbox.backends.containerd.ctr import Ctr
from x07_sandbox.backends.engines import Client
from x07_sandbox.backends.firecracker.runtime_config import MACHINES, RUNTIME_CONFIG_MAX, RuntimeConfig, runtime_config
from x07_sandbox.backends.firecracker.ttrpc import create_vm, stop_vm
from x07_sandbox.backends.prerequisites import KVM, Need, require
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host.linux import open_pidfd, process_ids, send_signal
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.variables import FIRECRACKER_SOCKET, text
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import Features

_CONFIG: Final = "/etc/containerd/firecracker-runtime.json"
_GUEST_BYTES: Final = 96 * MIB  # for the VM's kernel and firecracker-containerd's agent
_CREATE_S: Final = 60
_STOP_S: Final = 5


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


class FirecrackerBackend(ContainerdBackend):
    """The backend for a firecracker-containerd of this host."""

    known_gaps: Mapping[str, str] = GAPS | {"root-inside": "in its VM, the program is in a container with few rights"}
    other = (
        "Set X07_VM_FIRECRACKER_CONTAINERD_SOCK and X07_VM_CONTAINERD_NAMESPACE to the values that they had when it was"
        " started"
    )
    oci_runtime = "aws.firecracker"

    def __init__(self) -> None:
        super().__init__()
        self.name = "firecracker-ctr"
        self._client = Need("program", "firecracker-ctr", "", "X07_VM_FIRECRACKER_CTR_BIN")
        self._socket = text("X07_VM_FIRECRACKER_CONTAINERD_SOCK") or FIRECRACKER_SOCKET
        self._snapshotter = text("X07_VM_FIRECRACKER_SNAPSHOTTER") or "devmapper"
        self.needs = (self._client, msgspec.structs.replace(KVM, optional=False))

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

    def least_features(self) -> Features:
        """Return the features of a container in a VM."""
        return Features(isolation="vm-hardware", own_kernel=True, can_enforce=HELD)

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what VMs can limit here. Raises HostError, BackendError if they cannot be used."""
        require(self.needs, f"cannot use {self.name}")
        if os.geteuid() != 0:  # nobody else can see that a VM is gone
            raise HostError(f"cannot use {self.name}", "only root sees the processes of VMs", "Run x07 as root")
        if problems := self._config().problems:
            raise HostError(f"cannot use {self.name}", f"in {_CONFIG}, {' and '.join(problems)}", f"Correct {_CONFIG}")
        self._runtime().images()
        return Availability(features=self.least_features(), proof=f"{self.name} answers, and /dev/kvm can be opened")
