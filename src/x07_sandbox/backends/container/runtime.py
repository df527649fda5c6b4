"""A job's container, and what a container runtime must do for it: create, check, find, list and remove.

`Runtime` has what all runtimes share. Each backend adds its own commands, and its own check of a created container.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from x07_sandbox.backends.base import Needs
from x07_sandbox.backends.engines import DOCTOR, Client
from x07_sandbox.channel.messages import CWD, OUT
from x07_sandbox.errors import BackendError
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.records.stopping import Orphan

CREATE: Final = "cannot create the container"
_CONTAINERS_MAX: Final = 1000
_GONE_S: Final = 20.0
_LOOK_AGAIN_S: Final = 0.05
# A container's id, or its name (backend.container_name).
_OURS: Final = re.compile(r"[0-9a-f]{64}|x07-[a-z0-9-]{1,72}")
_REMOVE: Final = "import sys; from {} import {} as kind; from {} import remove_main; remove_main(kind, *sys.argv[1:])"
# The agent needs these to become another user and to end its processes. The program gets none of them.
CAPABILITIES: Final = ("KILL", "SETGID", "SETPCAP", "SETUID")
NETWORK_CAPABILITY: Final = "NET_ADMIN"  # for the relay's rules in the container's network namespace
_LISTEN_CAPABILITY: Final = "NET_BIND_SERVICE"  # for the relay's ports below 1024
AGENT_BYTES: Final = 64 * MIB
AGENT_TASKS: Final = 2  # agent and init; the relay is added
_AGENT_FDS: Final = 64  # open files
_TMPFS: Final = "rw,nosuid,nodev"


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The container to create for a job.

    image: the id of its image. mark: the random text that identifies the job's processes. resolv_conf: the host file to
    mount as /etc/resolv.conf. network: whether the agent starts a relay.
    """

    runtime: str
    image: str
    name: str
    mark: str
    labels: Mapping[str, str]
    needs: Needs
    resolv_conf: str
    network: bool = False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities of the container's first process."""
        return (*CAPABILITIES, NETWORK_CAPABILITY) if self.network else CAPABILITIES

    @property
    def listening_capabilities(self) -> tuple[str, ...]:
        """The same by their full names, and one more for a relay whose runtime cannot set a sysctl."""
        names = (*self.capabilities, _LISTEN_CAPABILITY) if self.network else self.capabilities
        return tuple(f"CAP_{name}" for name in names)

    def agent_words(self, *, limits_tasks: bool) -> list[str]:
        """Return the agent's arguments. limits_tasks: whether it must limit tasks, because the runtime does not."""
        return ["container", *["network"] * self.network, *["tasks"] * limits_tasks, self.mark]

    @property
    def memory_bytes(self) -> int:
        """The memory limit, for the program, the agent and the input files, which are in memory."""
        return self.needs.mem_bytes + AGENT_BYTES + 2 * self.needs.files_bytes

    @property
    def tasks(self) -> int:
        """The limit on processes and threads."""
        return self.needs.tasks + AGENT_TASKS + self.network

    @property
    def fds(self) -> int:
        """The limit on the open files of a process."""
        return self.needs.fds + _AGENT_FDS

    def tmpfs(self) -> dict[str, str]:
        """Return the mount options of the folders in memory, by path."""
        needs = self.needs
        run = "noexec" if needs.closed else "exec"
        files, program = 3 * needs.files_bytes + 16 * MIB, needs.mem_bytes + needs.files_bytes
        found = {
            "/run": f"{_TMPFS},noexec,size={MIB},mode=0755",
            "/tmp": f"{_TMPFS},{run},size={needs.tmp_bytes},mode=1777",  # noqa: S108 - the container's
            "/dev/shm": f"{_TMPFS},{run},size={needs.tmp_bytes},mode=1777",  # noqa: S108 - as above
            "/x07": f"{_TMPFS},{'exec' if needs.alone or not needs.closed else 'noexec'},size={files},mode=0755",
            CWD: f"{_TMPFS},{run},size={program},mode=1777",
            OUT: f"{_TMPFS},{run},size={program},mode={'1777' if needs.out else '0755'}",
        }
        for place in needs.places:
            found[place.at] = f"{_TMPFS},{run},size={program},mode={'1777' if place.write else '0755'}"
        return found


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """A container runtime of this host. A container is named by its name or its full id."""

    client: Client

    @property
    def name(self) -> str:
        """The name of the backend that uses it."""
        return self.client.name

    @property
    def place(self) -> str:
        """Text that identifies the runtime among several on one host, such as its client and its socket."""
        return " ".join((self.client.binary, *self.client.options))

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its name or id. Raises BackendError, HostError."""
        raise NotImplementedError

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """Return the runtime's description of a container, or None if there is none. Raises BackendError."""
        raise NotImplementedError

    def _labels_in(self, made: Mapping[str, Any]) -> Mapping[str, object] | None:
        """Return the labels in such a description."""
        raise NotImplementedError

    def _names(self) -> Iterable[str]:
        """Return the names or ids of the containers with x07's label. Raises BackendError."""
        raise NotImplementedError

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        raise NotImplementedError

    def _try_remove(self, container: str) -> bool:
        """Try once to kill and remove a container. Return whether it is proven gone. Raises BackendError."""
        raise NotImplementedError

    def created(
        self, spec: ContainerSpec, words: Iterable[str], differences: Callable[[Mapping[str, Any]], list[str]]
    ) -> str:
        """Call the client with *words*, which create a container. Return its name or id. Raises BackendError.

        differences: returns how the container differs from *spec*, by its description.
        """
        answer = self.client.call(*words)
        if answer.status:
            raise BackendError(CREATE, answer.error or f"status {answer.status}", DOCTOR)
        made = self.inspect(spec.name)
        found = ["its name"] if made is None else differences(made)
        if made is None or found:
            fix = f"Check the configuration of {self.name}, which applies to every container"
            raise BackendError("cannot use the container", f"{self.name} changed {', '.join(found)}", fix)
        return self._orphan(spec.name, made).id

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""
        made = self.inspect(container)
        return None if made is None else self._orphan(container, made)

    def _orphan(self, container: str, made: Mapping[str, Any]) -> Orphan:
        labels = {str(key)[:256]: str(value)[:4096] for key, value in (self._labels_in(made) or {}).items()}
        return Orphan(id=str(made.get("Id") or container), labels=labels)  # podman and docker have ids beside names

    def listed(self) -> Sequence[str]:
        """Return the names or ids of the containers with x07's label, of a limited number. Raises BackendError."""
        return [word for word in self._names() if is_ours(word)][:_CONTAINERS_MAX]

    def remove(self, container: str) -> bool:
        """Kill and remove a container, in several tries, and return whether it is proven gone. Raises BackendError."""
        deadline = Deadline.after(_GONE_S)
        while not deadline.passed():
            if self._try_remove(container):
                return True
            time.sleep(_LOOK_AGAIN_S)
        return False

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container, and fails if the container may still exist."""
        kind = type(self)
        program = _REMOVE.format(kind.__module__, kind.__name__, __name__)
        return [sys.executable, "-I", "-c", program, msgspec.json.encode(self, enc_hook=str).decode(), container]

    def image_name(self, digest: str) -> str:
        """Return a name of the image with this digest, for clients that take only names. Raises BackendError."""
        names = sorted(name for name, found in self.images().items() if found == digest)
        if not names:  # `create` would pull it
            why = f"{self.name} does not have the image {digest} any more"
            raise BackendError(CREATE, why, "Load the guest image again")
        return names[0]

    def images(self) -> Mapping[str, str]:
        """Return the digests of all images, by name. Raises BackendError."""
        raise NotImplementedError


def remove_main(kind: type[Runtime], described: str, container: str) -> None:
    """Run the program of `Runtime.removing_argv`."""
    runtime = msgspec.json.decode(described, type=kind, dec_hook=lambda wanted, text: wanted(text))
    sys.exit(not runtime.remove(container))


def is_ours(word: str) -> bool:
    """Return whether *word* can be the name or the id of one of our containers."""
    return _OURS.fullmatch(word) is not None
