"""Containers of Apple's `container`, each in a virtual machine of its own."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from x07_sandbox.backends.apple.create import create_argv, described, differences, image_names, options_in
from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.backends.container.engine import bounded_labels
from x07_sandbox.backends.container.runtime import CONTAINERS_MAX, CREATE, is_name, removing_program, until_gone
from x07_sandbox.backends.engines import Answer, Client
from x07_sandbox.errors import BackendError
from x07_sandbox.records.stopping import Orphan

_DOCTOR: Final = "Run x07 doctor"


class AppleContainers(msgspec.Struct, frozen=True, kw_only=True):
    """Apple's `container` on this host. See `Runtime`."""

    client: Client

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.client.name

    @property
    def place(self) -> str:
        """The client. There is one service for each user."""
        return self.client.binary

    @property
    def env(self) -> dict[str, str]:
        """The environment of the client."""
        return self.client.env

    def options(self) -> frozenset[str]:
        """Return the options of `container create` of this version. Raises HostError, BackendError."""
        return options_in(self.client.call("create", "--help").text)

    def images(self) -> dict[str, str]:
        """Return the digests of all images, by name. Raises BackendError."""
        return image_names(self._objects(self.client.call("image", "list", "--format", "json")))

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its name. Raises BackendError, HostError."""
        options = self.options()
        names = sorted(name for name, digest in self.images().items() if digest == spec.image)
        if not names:  # `create` would pull it
            raise BackendError(CREATE, f"{self.name} does not have the image {spec.image} any more", "Load it again")
        answer = self.client.call(*create_argv(spec, names[0], options))
        if answer.status:
            raise BackendError(CREATE, answer.error or f"status {answer.status}", _DOCTOR)
        made = self._inspect(spec.name)
        if found := ["its name"] if made is None else differences(spec, made, options):
            fix = "Check the configuration of Apple's container, which applies to every container"
            raise BackendError("cannot use the container", f"{self.name} changed {', '.join(found)}", fix)
        return spec.name

    def inspect_image(self, reference: str) -> dict[str, Any] | None:
        """Return the description of an image, or None if there is none of this name. Raises BackendError."""
        answer = self.client.call("image", "inspect", reference)
        if answer.absent:
            return None
        return next(iter(self._objects(answer)), None)

    def _inspect(self, container: str) -> dict[str, Any] | None:
        """Return the configuration of a container. Before version 1.0 an unknown name gave an empty list."""
        answer = self.client.call("inspect", container)
        found = [] if answer.absent else map(described, self._objects(answer))
        return next((dict(made) for name, made in found if name == container), None)

    def _objects(self, answer: Answer) -> list[dict[str, Any]]:
        try:
            if answer.status:
                raise BackendError(f"cannot use {self.name}", answer.error or f"status {answer.status}", _DOCTOR)
            return msgspec.json.decode(answer.text, type=list[dict[str, Any]])
        except msgspec.DecodeError as exc:
            raise BackendError(f"cannot use {self.name}", answer.error or str(exc), _DOCTOR) from exc

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("start", "--attach", "--interactive", container)

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container."""
        return removing_program(self, container)

    def remove(self, container: str) -> bool:
        """End the VM of a container, remove both, and return whether they are proven gone. Raises BackendError."""

        def remove() -> bool:  # its words for an unknown container differ between versions
            self.client.call("delete", "--force", container)
            return self.find(container) is None

        return until_gone(remove)

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""
        made = self._inspect(container)
        return None if made is None else Orphan(id=container, labels=bounded_labels(made.get("labels") or {}))

    def listed(self) -> Sequence[str]:
        """Return the names of the containers with x07's label. Raises BackendError."""
        listed = map(described, self._objects(self.client.call("list", "--all", "--format", "json")))
        ours = (name for name, made in listed if (made.get("labels") or {}).get("io.x07.schema") == "1")
        return [name for name in ours if is_name(name)][:CONTAINERS_MAX]
