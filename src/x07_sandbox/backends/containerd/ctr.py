"""Containers of containerd, by its client `ctr`. What its commands print was seen with version 1.7."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.backends.container.engine import bounded_labels
from x07_sandbox.backends.container.runtime import CONTAINERS_MAX, CREATE, is_name, removing_program, until_gone
from x07_sandbox.backends.containerd.create import FDS_MAX, create_argv, differences
from x07_sandbox.backends.engines import Answer, Client
from x07_sandbox.errors import BackendError, Flag, HostError
from x07_sandbox.host.processes import kill_identity, processes_with_mark, wait_gone
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.records.stopping import Orphan

_STEP_S: Final = 5.0
_SHIM_S: Final = 1.0
# Arguments of a container's shim, the process of a task, which containerd starts before it knows the task; and of the
# client that starts the task. As long as the client runs, containerd may start a shim, also after the container was
# deleted. `ctr` cannot name the task of a deleted container, but containerd removes a task whose shim has ended.
_SHIM: Final = "-id\0{}\0"
_CLIENT: Final = "tasks\0start\0{}\0"
_IMAGE: Final = re.compile(r"(\S{1,512}) +\S+ +(sha256:[0-9a-f]{64}) ")  # REF TYPE DIGEST SIZE ...
_IMPORT: Final = "Import the guest image again"


class Ctr(msgspec.Struct, frozen=True, kw_only=True):
    """A containerd and the way to use it. See `Runtime`.

    oci_runtime: such as "io.containerd.runc.v2". in_machine: whether each container runs in a VM of its own.
    """

    client: Client
    snapshotter: str
    oci_runtime: str
    in_machine: bool = False

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.client.name

    @property
    def place(self) -> str:
        """The client, the socket and the namespace."""
        return " ".join((self.client.binary, *self.client.options))

    @property
    def env(self) -> dict[str, str]:
        """The environment of the client."""
        return self.client.env

    def images(self) -> dict[str, str]:
        """Return the digests of the manifests of all images, by name. Raises BackendError."""
        answer = self.client.call("images", "ls")
        if answer.status:
            raise BackendError(f"cannot use {self.name}", answer.error or "it lists no images", "Run x07 doctor")
        rows = map(_IMAGE.match, answer.text.splitlines())
        return {row[1]: row[2] for row in rows if row is not None}

    def content(self, digest: str) -> dict[str, Any]:
        """Return a JSON document from containerd's content store. Raises BackendError."""
        return self._document(self.client.call("content", "get", digest), _IMPORT)

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its name. Raises BackendError, HostError."""
        if spec.needs.fds > FDS_MAX:
            why = f"containerd gives a container at most {FDS_MAX} open files, not {spec.needs.fds}"
            raise HostError(CREATE, why, ("Lower the limit with ", Flag("--fds"), ", or use another backend"))
        reference = self._reference(spec.image)
        words = create_argv(
            spec, reference, snapshotter=self.snapshotter, runtime=self.oci_runtime, in_machine=self.in_machine
        )
        answer = self.client.call(*words)
        if answer.status:
            raise BackendError(CREATE, answer.error or f"status {answer.status}", "Run x07 doctor")
        made = self._info(spec.name)
        found = ["its name"]
        if made is not None:
            found = differences(spec, made, self.oci_runtime, in_machine=self.in_machine)
        if self._reference(spec.image) != reference:
            found.append("its image")
        if found:
            fix = "Check the configuration of containerd, which applies to every container"
            raise BackendError("cannot use the container", f"{self.name} changed {', '.join(found)}", fix)
        return spec.name

    def _reference(self, digest: str) -> str:
        """Return the name of the image with this digest: `ctr` takes only names. Raises BackendError."""
        names = sorted(name for name, found in self.images().items() if found == digest)
        if not names:
            raise BackendError(CREATE, f"{self.name} does not have the image {digest} any more", _IMPORT)
        return names[0]

    def _info(self, container: str) -> dict[str, Any] | None:
        answer = self.client.call("containers", "info", container)
        return None if answer.absent else self._document(answer, "Run x07 doctor")

    def _document(self, answer: Answer, fix: str) -> dict[str, Any]:
        try:
            return msgspec.json.decode(answer.text, type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise BackendError(f"cannot use {self.name}", answer.error or str(exc), fix) from exc

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("tasks", "start", container)

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container."""
        return removing_program(self, container)

    def remove(self, container: str) -> bool:
        """Kill and remove a container, and return whether it is proven gone. Raises BackendError."""

        def remove() -> bool:  # a step fails if there is nothing to do
            self.client.call("tasks", "kill", "--signal", "SIGKILL", container, timeout_s=_STEP_S)
            deleted = self.client.call("tasks", "delete", "--force", container, timeout_s=_STEP_S)
            machine_gone = self.end_machine(container)
            shim, client = _SHIM.format(container), _CLIENT.format(container)
            if _ended(shim, _SHIM_S):
                self.client.call("containers", "delete", container, timeout_s=_STEP_S)
            elif deleted.absent or not deleted.status:  # containerd has no task with this shim
                _kill(shim)
            if not machine_gone or self.find(container) is not None:
                return False
            if not _ended(client, _STEP_S):
                _kill(client)  # containerd then cancels its request; a shim started before that is found next time
                return False
            return _ended(shim, _SHIM_S)

        return until_gone(remove)

    def end_machine(self, container: str) -> bool:  # noqa: ARG002 - there is none
        """End the VM of a container, and return whether it is proven gone. Raises BackendError."""
        return True

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""
        made = self._info(container)
        return None if made is None else Orphan(id=container, labels=bounded_labels(made.get("Labels") or {}))

    def listed(self) -> Sequence[str]:
        """Return the names of the containers with x07's label. Raises BackendError."""
        answer = self.client.call("containers", "ls", "--quiet", 'labels."io.x07.schema"==1')
        return [] if answer.status else [word for word in answer.text.split() if is_name(word)][:CONTAINERS_MAX]


def _ended(words: str, timeout_s: float) -> bool:
    """Wait until the processes with these arguments have ended, for a limited time. Return whether they have."""
    deadline = Deadline.after(timeout_s)
    return all(wait_gone(process, deadline.left_s()) for process in processes_with_mark(words))


def _kill(words: str) -> None:
    for process in processes_with_mark(words):
        with contextlib.suppress(PermissionError):  # an ordinary user's: the container is then not proven gone
            kill_identity(process, words)
