"""The firecracker-ctr backend, with a real containerd and runc, and a stand-in for the calls about VMs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fuzz.fuzz_ttrpc import field, frame
from x07_sandbox import Sandbox, exec_command
from x07_sandbox.backends import firecracker
from x07_sandbox.backends.firecracker import HEADER_SIZE
from x07_sandbox.backends.protobuf import Message
from x07_sandbox.errors import BackendError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engines import EngineUnderTest

pytestmark = pytest.mark.root


class StandInMachines:
    """A stand-in for the calls about VMs. It starts a process in the folder of the VM, and knows no other VM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str]] = []
        self.memory_mib = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def answer(self, request: bytes) -> bytes:
        """Carry out a request and return the response."""
        message = Message(request)
        method, payload = message.single(2, b"").decode(), Message(message.single(3, b""))
        name = payload.single(1, b"").decode()
        self.calls.append((method, name))
        if method == "CreateVM":
            self.memory_mib = Message(payload.single(2, b"")).single(3, 0)
            place = self.folder / f"x07#{name}"
            place.mkdir()
            self._processes.append(subprocess.Popen(["/bin/sleep", "600"], cwd=place))
        return frame(field(2, field(1, name.encode())))

    def alive(self) -> int:
        """The number of VMs that still run."""
        return sum(process.poll() is None for process in self._processes)

    def end(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def machines(
    containerd: EngineUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Path
) -> Iterator[StandInMachines]:
    """The stand-in beside a real containerd, whose containers run with runc instead of Firecracker."""
    assert not state.exists()
    found = StandInMachines(tmp_path / "machines")
    found.folder.mkdir()
    place = tmp_path / "c.sock"
    place.symlink_to(containerd.env["X07_VM_CONTAINERD_SOCK"])
    config = tmp_path / "runtime.json"
    config.write_text(json.dumps({"kernel_image_path": "/k", "shim_base_dir": f"{found.folder}/"}), encoding="ascii")
    monkeypatch.setattr(firecracker.FirecrackerBackend, "oci_runtime", "io.containerd.runc.v2")
    monkeypatch.setattr(firecracker, "_CONFIG", str(config))
    variables = {
        "X07_VM_BACKEND": "firecracker-ctr",
        "X07_VM_FIRECRACKER_CTR_BIN": "/usr/bin/ctr",
        "X07_VM_FIRECRACKER_CONTAINERD_SOCK": str(place),
        "X07_VM_FIRECRACKER_SNAPSHOTTER": "overlayfs",
        "X07_VM_GUEST_IMAGE": containerd.env["X07_VM_GUEST_IMAGE"],
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("the backend needs /dev/kvm")
    with serving(f"{place}.ttrpc", found):
        yield found
    found.end()


@contextlib.contextmanager
def serving(address: str, machines: StandInMachines) -> Iterator[None]:
    """Answer calls on a socket until the context ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    head = connection.recv(HEADER_SIZE, socket.MSG_WAITALL)
                    size = int.from_bytes(head[:4], "big")
                    connection.sendall(machines.answer(connection.recv(size, socket.MSG_WAITALL)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_command_runs_in_a_vm_of_its_own_that_ends_with_it(
    machines: StandInMachines, containerd: EngineUnderTest
) -> None:
    """The VM is created with the memory of the job before its container, and is killed if it does not stop."""
    found = exec_command(["sh", "-c", "cat; exit 3"], input=b"in", memory="256M")
    assert (found.outcome, found.exit_code, found.stdout.text) == ("failed", 3, "in"), found.reason
    assert [*dict.fromkeys(method for method, _ in machines.calls)] == ["CreateVM", "StopVM"]
    assert 256 + 64 + 96 <= machines.memory_mib < 512
    assert machines.alive() == 0
    assert containerd.containers() == []


def test_sandboxes_work_and_tasks_are_limited_by_the_agent(
    machines: StandInMachines, containerd: EngineUnderTest
) -> None:
    """Commands, files and a limit on tasks work without any file of the host."""
    with Sandbox(backend="firecracker-ctr", procs=5) as sandbox:
        sandbox.files.write("a", b"1")
        assert sandbox.exec(["cat", "a"]).stdout == b"1"
        many = sandbox.exec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait"])
        assert b"fork" in many.stderr
        assert machines.alive() == 1
    assert machines.alive() == 0
    assert containerd.containers() == []


def test_a_vm_whose_container_cannot_be_created_is_ended(
    machines: StandInMachines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after the VM was created leaves no VM."""
    monkeypatch.setenv("X07_VM_FIRECRACKER_SNAPSHOTTER", "no-such-snapshotter")
    with pytest.raises(BackendError, match="no-such-snapshotter"):
        exec_command(["true"])
    assert machines.calls != []
    assert machines.alive() == 0


@pytest.mark.usefixtures("machines")
def test_a_configuration_with_a_network_card_is_refused(tmp_path: Path) -> None:
    """The backend refuses a daemon that would give every VM a network card."""
    config: dict[str, Any] = {"path": tmp_path / "runtime.json"}
    config["path"].write_text(
        '{"kernel_image_path": "/k", "root_drive": "/r", "default_network_interfaces": [{}]}', encoding="ascii"
    )
    with pytest.raises(HostError, match="network card"):
        firecracker.FirecrackerBackend().probe(None)
