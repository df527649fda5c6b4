"""The `apple-container` backend: a container in a virtual machine of Apple's `container`.

The options and the JSON are those of versions 0.6 to 1.2 (github.com/apple/container, Sources/Services/
ContainerAPIService/Client: Flags.swift, Parser.swift, Utility.swift). Which options a version has is read from its help
text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final

from x07_sandbox.backends.container.backend import OWN_MACHINE, OWN_MACHINE_GAPS, WithImages
from x07_sandbox.backends.container.runtime import ContainerSpec, Runtime
from x07_sandbox.backends.engines import CLIENT_ENV, client_of
from x07_sandbox.backends.prerequisites import Need
from x07_sandbox.errors import HostError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.settings import MIB

_OPTION: Final = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_NEEDED: Final = frozenset({"--name", "--network", "--no-dns", "--mount", "--label", "--memory", "--cpus", "--uid"})
_MEMORY_LEAST_MIB: Final = 200  # version 0.10 and newer refuse less


class AppleBackend(WithImages):
    """The backend for Apple's `container` on this Mac."""

    name = "apple-container"
    needs = (Need("program", "container", "", "X07_VM_APPLE_CONTAINER_BIN"),)
    known_gaps = OWN_MACHINE_GAPS
    features = OWN_MACHINE
    warnings = ()
    variables = ("X07_VM_APPLE_CONTAINER_BIN",)

    @property
    def fix_image(self) -> str:
        """What to do if there is no suitable image."""
        return "Run x07 image load --archive FILE, and then container image load --input FILE"

    def _runtime(self) -> AppleContainers:
        # Not SSH_AUTH_SOCK, which its client would pass on, nor anything else of the caller.
        env = CLIENT_ENV | {key: os.environ[key] for key in ("HOME",) if key in os.environ}
        return AppleContainers(client=client_of(self.name, self.needs[0], env=env))

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the digest of an image, and the labels of its variant for this host. Raises ImageError."""
        client = self._runtime().client
        if not (found := client.objects(client.call("image", "inspect", wanted))):
            raise self._missing(wanted)
        return image_labels(found[0], host_arch().deb)

    def _prove(self, *, boot: bool) -> str:  # noqa: ARG002 - nothing boots
        runtime = self._runtime()
        status = runtime.client.call("system", "status")
        if status.status:
            why = status.error or "its service does not run"
            raise HostError(f"cannot use {self.name}", why, "Start its service: container system start")
        runtime.options()
        return "Apple's container answers"


class AppleContainers(Runtime, frozen=True, kw_only=True):
    """Apple's `container` on this host. See `Runtime`."""

    def options(self) -> frozenset[str]:
        """Return the options of `container create` of this version. Raises HostError, BackendError."""
        return options_in(self.client.call("create", "--help").text)

    def images(self) -> dict[str, str]:
        """Return the digests of all images, by name. Raises BackendError."""
        return image_names(self.client.objects(self.client.call("image", "list", "--format", "json")))

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its name. Raises BackendError, HostError."""
        options = self.options()
        words = create_argv(spec, self.image_name(spec.image), options)
        return self.created(spec, words, lambda made: differences(spec, made, options))

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """Return the configuration of a container. Before version 1.0 an unknown name gave an empty list."""
        found = map(described, self.client.objects(self.client.call("inspect", container)))
        return next((made for name, made in found if name == container), None)

    def _labels_in(self, made: Mapping[str, Any]) -> Mapping[str, object] | None:
        return made.get("labels")

    def _names(self) -> Iterable[str]:
        found = map(described, self.client.objects(self.client.call("list", "--all", "--format", "json")))
        return (name for name, made in found if (made.get("labels") or {}).get("io.x07.schema") == "1")

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("start", "--attach", "--interactive", container)

    def _try_remove(self, container: str) -> bool:
        """End the VM of a container, and remove both. Raises BackendError."""
        self.client.call("delete", "--force", container)
        return self.inspect(container) is None  # its words for an unknown container differ between versions


def options_in(help_text: str) -> frozenset[str]:
    """Return the options that the help text of `container create` names. Raises HostError if one is missing."""
    found = frozenset(_OPTION.findall(help_text))
    if absent := sorted(_NEEDED - found):
        why = f"its container create lacks {', '.join(absent)}"
        raise HostError("cannot use apple-container", why, "Install Apple's container 0.6 or newer")
    return found


def memory_mib(spec: ContainerSpec) -> int:
    """Return the memory of the VM in MiB. Raises HostError if the limit is lower than a VM can have."""
    if (found := -(-spec.memory_bytes // MIB)) < _MEMORY_LEAST_MIB:
        why = f"a VM has at least {_MEMORY_LEAST_MIB} MiB, and this limit needs one of {found} MiB"
        raise HostError("cannot create the container", why, "Raise limits.mem_bytes, or use another backend")
    return found


def create_argv(spec: ContainerSpec, reference: str, options: AbstractSet[str]) -> Iterator[str]:
    """Yield the words of the command line. reference: the image's name. options: those of this version."""
    yield from ("create", "--interactive", "--name", spec.name, "--network", "none", "--no-dns")
    yield from ("--cpus", "1", "--memory", f"{memory_mib(spec)}M", "--uid", "0", "--gid", "0", "--workdir", "/")
    if "--progress" in options:
        yield from ("--progress", "none")
    elif "--disable-progress-updates" in options:
        yield "--disable-progress-updates"
    if "--read-only" in options:
        yield "--read-only"
    if "--ulimit" in options:
        yield from ("--ulimit", f"nofile={spec.fds}:{spec.fds}")
    if "--cap-drop" in options:
        yield from ("--cap-drop", "ALL")
        for name in spec.listening_capabilities:
            yield from ("--cap-add", name)
    for place, words in spec.tmpfs().items():
        given = dict(word.partition("=")[::2] for word in words.split(","))
        size = -(-int(given["size"]) // MIB)
        yield from ("--mount", f"type=tmpfs,target={place},size={size}M,mode={given['mode']}")
    for label, value in spec.labels.items():
        yield from ("--label", f"{label}={value}")
    yield from (reference, *spec.agent_words(limits_tasks=True))


def differences(spec: ContainerSpec, made: Mapping[str, Any], options: AbstractSet[str]) -> list[str]:
    """Return how a created container differs from *spec*. made: its `configuration` (container inspect)."""
    image, process = made.get("image") or {}, made.get("initProcess") or {}
    resources, labels = made.get("resources") or {}, made.get("labels") or {}
    words = spec.agent_words(limits_tasks=True)
    given = (process.get("arguments") or [])[-len(words) :]
    mounts = {(str(one.get("destination")), *(one.get("type") or {})) for one in made.get("mounts") or ()}
    seen = {
        "its image": (image.get("descriptor") or {}).get("digest") == spec.image,
        "its network": made.get("networks") == [] and not made.get("publishedPorts"),
        "its name servers": not made.get("dns"),
        "its sockets": not made.get("publishedSockets") and not made.get("ssh"),
        "its runtime": not any(made.get(name) for name in ("rosetta", "virtualization", "useInit")),
        "its command": given == words and process.get("terminal") is False,
        "its user": process.get("user") == {"id": {"uid": 0, "gid": 0}},
        "its writable root": "--read-only" not in options or made.get("readOnly") is True,
        "its capabilities": "--cap-drop" not in options
        or (made.get("capDrop") == ["ALL"] and set(made.get("capAdd") or ()) == set(spec.listening_capabilities)),
        "its limit on memory": resources.get("memoryInBytes") == memory_mib(spec) * MIB and resources.get("cpus") == 1,
        "its mounts": mounts == {(place, "tmpfs") for place in spec.tmpfs()},
        "its labels": spec.labels.items() <= labels.items(),
    }
    return [name for name, right in seen.items() if not right]


def described(printed: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the id and the `configuration` of a container that `list` or `inspect` printed.

    Before version 1.0 the id was only in the configuration.
    """
    configuration = printed.get("configuration") or {}
    return str(configuration.get("id", "")), configuration


def image_names(printed: list[dict[str, Any]]) -> dict[str, str]:
    """Return the digests of the images that `image list` printed, by name.

    Before version 1.0 name and descriptor were at the top.
    """
    found = {}
    for one in printed:
        at = one.get("configuration") or one
        digest = (at.get("descriptor") or {}).get("digest")
        if isinstance(digest, str):
            found[str(at.get("name") or at.get("reference"))] = digest
    return found


def image_labels(printed: Mapping[str, Any], architecture: str) -> tuple[str, object]:
    """Return the digest and the labels of an image that `image inspect` printed.

    architecture: that of the variant to read, as OCI names it.
    """
    at = (printed.get("configuration") or {}).get("descriptor") or printed.get("index") or {}
    for variant in printed.get("variants") or ():
        if (variant.get("platform") or {}).get("architecture") == architecture:
            return str(at.get("digest", "")), ((variant.get("config") or {}).get("config") or {}).get("Labels")
    return str(at.get("digest", "")), None
