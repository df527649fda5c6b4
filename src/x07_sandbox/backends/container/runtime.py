"""What makes the containers of jobs: podman and docker (container/engine), containerd (containerd/ctr) and others."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.records.stopping import Orphan

CONTAINERS_MAX: Final = 1000
CREATE: Final = "cannot create the container"
_GONE_S: Final = 20.0
_LOOK_AGAIN_S: Final = 0.05
_NAME: Final = re.compile(r"x07-[a-z0-9-]{1,72}")
_REMOVE: Final = "import sys; from {} import {} as kind; from {} import remove_main; remove_main(kind, *sys.argv[1:])"


def is_name(word: str) -> bool:
    """Return whether *word* can be the name of one of our containers (instance.container_name)."""
    return _NAME.fullmatch(word) is not None


def until_gone(remove: Callable[[], bool]) -> bool:
    """Call *remove* until it returns that the container is gone, for a limited time. Return whether it did."""
    deadline = Deadline.after(_GONE_S)
    while not deadline.passed():
        if remove():
            return True
        time.sleep(_LOOK_AGAIN_S)
    return False


def removing_program(runtime: msgspec.Struct, container: str) -> list[str]:
    """Return a command that removes a container as *runtime* does, and fails if the container may still exist."""
    kind = type(runtime)
    program = _REMOVE.format(kind.__module__, kind.__name__, __name__)
    return [sys.executable, "-I", "-c", program, msgspec.json.encode(runtime, enc_hook=str).decode(), container]


def remove_main(kind: type[Any], described: str, container: str) -> None:
    """Run the program of `removing_program`."""
    runtime = msgspec.json.decode(described, type=kind, dec_hook=lambda wanted, text: wanted(text))
    sys.exit(not runtime.remove(container))


class Runtime(Protocol):
    """A container runtime of this host. A container is named by its name or its full id."""

    @property
    def name(self) -> str:
        """The name of the backend that uses it."""

    @property
    def place(self) -> str:
        """Text that identifies the runtime among several on one host, such as its client and its socket."""

    @property
    def env(self) -> dict[str, str]:
        """The environment of its client."""

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its id. Raises BackendError."""

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container, and fails if the container may still exist."""

    def remove(self, container: str) -> bool:
        """Kill and remove a container, and return whether it is proven gone. Raises BackendError."""

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""

    def listed(self) -> Sequence[str]:
        """Return the ids of the containers with x07's label, at most CONTAINERS_MAX. Raises BackendError."""
