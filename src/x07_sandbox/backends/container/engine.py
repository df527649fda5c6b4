"""Containers of podman and docker."""

from collections.abc import Sequence
from typing import Final

import msgspec

from x07_sandbox.backends.container.create import ContainerSpec, create_argv, differences
from x07_sandbox.backends.container.runtime import CONTAINERS_MAX, CREATE, until_gone
from x07_sandbox.backends.engines import Engine, container_id, is_id
from x07_sandbox.errors import BackendError
from x07_sandbox.host.verdicts import forget
from x07_sandbox.records.stopping import Orphan

IMAGE_IDS: Final = "podman-image"  # the kind of verdict that holds an image's id (backend)


class EngineRuntime(msgspec.Struct, frozen=True):
    """The containers of an engine. See `Runtime`."""

    engine: Engine

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.engine.name

    @property
    def place(self) -> str:
        """The engine's client, and its socket if one was chosen."""
        return self.engine.place

    @property
    def env(self) -> dict[str, str]:
        """The environment of the client."""
        return self.engine.env

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its id. Raises BackendError."""
        answer = self.engine.call(*create_argv(spec))
        container = container_id(answer)
        if not container:
            forget(IMAGE_IDS)  # the cause may be that the image is gone
            raise BackendError(CREATE, answer.error or f"status {answer.status}", "Run x07 doctor")
        made = self.engine.call("inspect", "--type", "container", container).single_object(self.name)
        if found := differences(spec, made):
            why = f"{self.name} changed {', '.join(found)}"
            fix = f"Check {self.name}'s configuration, which applies to every container"
            raise BackendError("cannot use the container", why, fix)
        return container

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.engine.argv("start", "--attach", "--interactive", container)

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container."""
        return self.engine.argv(*self._removing(container))

    def remove(self, container: str) -> bool:
        """Kill and remove a container, and return whether it is proven gone. Raises BackendError."""

        def remove() -> bool:  # docker may answer "removal is already in progress"
            done = self.engine.call(*self._removing(container))
            return not done.status or self.engine.call("inspect", "--type", "container", container).absent

        return until_gone(remove)

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""
        answer = self.engine.call("inspect", "--type", "container", container)
        if answer.absent:
            return None
        made = answer.single_object(self.name)
        labels = (made.get("Config") or {}).get("Labels") or {}
        return Orphan(id=str(made.get("Id", "")), labels=bounded_labels(labels))

    def listed(self) -> Sequence[str]:
        """Return the ids of the containers with x07's label. Raises BackendError."""
        answer = self.engine.call("ps", "--all", "--no-trunc", "--quiet", "--filter", "label=io.x07.schema=1")
        return [] if answer.status else [word for word in answer.text.split() if is_id(word)][:CONTAINERS_MAX]

    def _removing(self, container: str) -> tuple[str, ...]:
        return ("rm", "--force", *(("--time", "0") if self.name == "podman" else ()), "--volumes", container)


def bounded_labels(labels: dict[str, object]) -> dict[str, str]:
    """Return the labels that a runtime printed as text of bounded size."""
    return {str(key)[:256]: str(value)[:4096] for key, value in labels.items()}
