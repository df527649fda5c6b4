"""The backends `podman` and `docker`, whose command lines are nearly the same."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from x07_sandbox.backends.container.backend import WithImages
from x07_sandbox.backends.container.runtime import ContainerSpec, Runtime
from x07_sandbox.backends.engines import CLIENTS, Client, Name, engine
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.verdicts import Verdict, file_state, forget

_IMAGE_IDS: Final = "podman-image"  # the kind of verdict that holds an image's id
# Where root's podman finds its store. A podman that reads another file is asked for its images each time.
_STORAGE_CONF: Final = ("/etc/containers/storage.conf", "/usr/share/containers/storage.conf")
_RESOLV_CONF: Final = "/etc/resolv.conf"
_INSPECT: Final = ("inspect", "--type", "container")


class EngineBackend(WithImages):
    """The backend for one container engine of this host."""

    def __init__(self, name: Name) -> None:
        self.name = name
        self._kind = name
        self.needs = (CLIENTS[name],)
        self.variables = (f"X07_VM_{name.upper()}_BIN", "DOCKER_HOST")

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the id and the labels of an image. Raises ImageError, HostError."""
        client = self._engine()
        kept, names = self._image_ids(client, wanted)
        if kept is not None and (known := kept.read()):
            return str(known["id"]), known["labels"]
        answer = client.call("image", "inspect", wanted)
        if answer.status:
            raise self._missing(wanted, answer.error)
        image = next(iter(client.objects(answer)), {})
        identity = str(image.get("Id") or "")
        labels = (image.get("Config") or {}).get("Labels") or image.get("Labels")
        if kept is not None and is_beside(names, image):
            kept.write({"id": identity, "labels": labels})
        return identity, labels

    def _image_ids(self, client: Client, wanted: str) -> tuple[Verdict | None, str]:
        """Return the stored id and labels of an image of root's podman, valid until a name changes, and `names_file`.

        None: nothing shows whether names have changed. Labels are part of what the id is a digest of.
        """
        limits = self._limits(client)
        if limits is None or not (names := self._checked(client, limits)):
            return None, ""
        try:
            return Verdict(_IMAGE_IDS, limits.path.name, wanted, key=file_state(names)), names
        except OSError:
            return None, ""

    def _limits(self, client: Client) -> Verdict | None:
        """Return the stored check of root's podman, valid until the host reboots, or None for other engines."""
        # A rootless podman depends on the session that calls it, docker on its daemon.
        if self.name != "podman" or os.geteuid() != 0:
            return None
        settings = [file_state(path) if Path(path).exists() else path for path in _STORAGE_CONF]
        return Verdict(self.name, file_state(client.binary), *client.options, key=settings)

    def _checked(self, client: Client, limits: Verdict | None, *, again: bool = False) -> str:
        """Check that the engine enforces limits, unless that is stored in *limits*. Return its `names_file`, or "".

        Raises HostError if the engine fails or would ignore a limit.
        """
        # `podman info` takes longer than creating a container.
        if limits is not None and not again and "names" in (known := limits.read()):
            return str(known["names"])
        info = self._info(client)
        if gaps := engine_gaps(self._kind, info):
            ignored = f"{self.name} would ignore the limit on {' and '.join(gaps)} here"
            why = f"{ignored} (rootless, or without control groups)"
            raise HostError(f"cannot use {self.name}", why, "Use control groups of version 2, or run as root")
        if limits is None or not is_roots_podman(info):
            return ""
        names = names_file(info, _STORAGE_CONF)
        limits.write({"names": names})
        return names

    def _runtime(self) -> EngineRuntime:
        return EngineRuntime(client=self._engine())

    def _prove(self, *, boot: bool) -> str:
        client = self._engine()
        self._checked(client, self._limits(client), again=not boot)
        return f"{self.name} answers and enforces limits on memory and tasks"

    def _info(self, client: Client) -> dict[str, Any]:
        answer = client.call("info", "--format", "json" if client.name == "podman" else "{{json .}}")
        try:
            info: dict[str, Any] = json.loads(answer.text) if not answer.status else {}
        except ValueError:
            info = {}
        if not info or info.get("ServerErrors"):
            why = answer.error or str(info.get("ServerErrors", "it printed no information"))[:300]
            raise HostError(f"cannot use {self.name}", why, f"Check that it works: {self.name} info")
        return info

    def _engine(self) -> Client:
        client = engine(self._kind)
        # crun, podman's default runtime, refuses a host that mixes both versions of control groups.
        mixed = all(Path("/sys/fs/cgroup", name).exists() for name in ("memory", "unified/cgroup.procs"))
        if client.name == "podman" and mixed and (find_program("/usr/sbin/runc") or find_program("/usr/bin/runc")):
            return msgspec.structs.replace(client, options=("--runtime", "runc"))
        return client


class EngineRuntime(Runtime, frozen=True, kw_only=True):
    """The containers of an engine. See `Runtime`."""

    @property
    def place(self) -> str:
        """The engine's client, and its socket if one was chosen."""
        return f"{self.client.binary} {self.client.env.get('DOCKER_HOST', '')}".rstrip()

    def create(self, spec: ContainerSpec) -> str:
        """Create a container, check it against *spec*, and return its id. Raises BackendError."""
        try:
            return self.created(spec, create_argv(spec), partial(differences, spec))
        except BackendError:
            forget(_IMAGE_IDS)  # the cause may be that the image is gone
            raise

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """Return the engine's description of a container, or None if there is none. Raises BackendError."""
        return next(iter(self.client.objects(self.client.call(*_INSPECT, container))), None)

    def _labels_in(self, made: Mapping[str, Any]) -> Mapping[str, object] | None:
        return (made.get("Config") or {}).get("Labels")

    def _names(self) -> Iterable[str]:
        return self.client.listed("ps", "--all", "--no-trunc", "--quiet", "--filter", "label=io.x07.schema=1")

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("start", "--attach", "--interactive", container)

    def _try_remove(self, container: str) -> bool:
        """Remove a container. docker may answer that the removal is already in progress."""
        done = self.client.call(*self._removing(container))
        return not done.status or self.client.call(*_INSPECT, container).absent

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container: the engine's own, which imports nothing."""
        return self.client.argv(*self._removing(container))

    def _removing(self, container: str) -> tuple[str, ...]:
        return ("rm", "--force", *(("--time", "0") if self.name == "podman" else ()), "--volumes", container)


def create_argv(spec: ContainerSpec) -> Iterator[str]:
    """Yield the words of the command line after the engine's name."""
    podman = spec.runtime == "podman"
    yield from ("create", "--interactive", "--pull", "never", "--name", spec.name, "--network", "none")
    yield from ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "0:0")
    for capability in spec.capabilities:
        yield from ("--cap-add", capability)
    yield from ("--memory", str(spec.memory_bytes), "--memory-swap", str(spec.memory_bytes))
    yield from ("--pids-limit", str(spec.tasks), "--cpus", "1")
    yield from ("--ipc", "private", "--cgroupns", "private", "--hostname", "x07", "--log-driver", "none")
    yield from ("--ulimit", f"nofile={spec.fds}:{spec.fds}", "--ulimit", "core=-1:-1")
    yield from ("--restart", "no", "--workdir", "/", "--no-healthcheck")
    if spec.network:  # the relay listens on ports below 1024 without a capability; docker's default
        yield from ("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")
    if podman:
        # For --rm, podman mounts the root so that unmounting it does not wait for the disk. We remove it all the same.
        yield from ("--rm", "--read-only-tmpfs=false", "--no-hosts", "--http-proxy=false", "--uts", "private")
    for place, options in spec.tmpfs().items():
        yield from ("--tmpfs", f"{place}:{options}{',notmpcopyup' if podman else ''}")
    yield from ("--mount", f"type=bind,src={spec.resolv_conf},dst={_RESOLV_CONF},readonly")
    for label, value in spec.labels.items():
        yield from ("--label", f"{label}={value}")
        if podman:
            yield from ("--annotation", f"{label}={value}")
    yield from (spec.image, *spec.agent_words(limits_tasks=False))


def differences(spec: ContainerSpec, made: Mapping[str, Any]) -> list[str]:
    """Return how a created container differs from *spec*.

    made: the engine's description of the container (inspect). An engine's configuration may add mounts, devices or
    rights to every container.
    """
    host, config = made.get("HostConfig") or {}, made.get("Config") or {}
    labels = config.get("Labels") or {}
    added = {str(name).upper().removeprefix("CAP_") for name in host.get("CapAdd") or ()}
    options = [str(option) for option in host.get("SecurityOpt") or ()]
    mounts = {posixpath.normpath(str(mount.get("Destination"))) for mount in made.get("Mounts") or ()}
    seen = {
        "its image": str(made.get("Image", "")).removeprefix("sha256:") == spec.image.removeprefix("sha256:"),
        "its rights (privileged)": not host.get("Privileged"),
        "its network": host.get("NetworkMode") == "none",
        "its writable root": bool(host.get("ReadonlyRootfs")),
        "its namespaces": all(host.get(kind) != "host" for kind in ("PidMode", "IpcMode", "UTSMode", "CgroupnsMode")),
        "its capabilities": added <= set(spec.capabilities),
        "its devices": not host.get("Devices"),
        "its security options": not any("unconfined" in option or "disable" in option for option in options),
        "its limit on memory": host.get("Memory") == spec.memory_bytes,
        "its limit on tasks": host.get("PidsLimit") == spec.tasks,
        "its mounts": mounts <= {_RESOLV_CONF, *spec.tmpfs()},
        "its labels": spec.labels.items() <= labels.items(),
    }
    return [name for name, right in seen.items() if not right]


def is_roots_podman(info: Mapping[str, Any]) -> bool:
    """Return whether *info* is from a podman that runs as the host's root."""
    security = (info.get("host") or {}).get("security") or {}
    return security.get("rootless") is False


def names_file(info: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Return the file that root's podman replaces when an image gets or loses a name, or "" if that is not certain.

    info: the output of its `info` command. settings: the files that may name its store.
    """
    store = info.get("store") or {}
    root, driver, options = store.get("graphRoot"), store.get("graphDriverName"), store.get("graphOptions") or {}
    # A further store has names of its own, and a remote podman's files are not on this host.
    further = any("store" in str(option).lower() for option in options)
    remote = (info.get("host") or {}).get("serviceIsRemote")
    if not root or not driver or further or remote or store.get("configFile") not in settings:
        return ""
    return f"{root}/{driver}-images/images.json"


def is_beside(names: str, image: Mapping[str, Any]) -> bool:
    """Return whether an image is in the store of this `names_file`: `info` does not show a store for images only.

    image: podman's description of it (image inspect).
    """
    layer = ((image.get("GraphDriver") or {}).get("Data") or {}).get("UpperDir")
    return str(layer).startswith(f"{posixpath.dirname(posixpath.dirname(names))}/")


def engine_gaps(name: Name, info: Mapping[str, Any]) -> list[str]:
    """Return the limits that this engine would ignore on this host. info: the output of its `info` command."""
    if name == "docker":
        found = [] if info.get("MemoryLimit") else ["memory"]
        return found if info.get("PidsLimit") else [*found, "tasks"]
    host = info.get("host") or {}
    if is_roots_podman(info):
        return []
    if host.get("cgroupVersion") != "v2":
        return ["memory", "tasks"]  # podman only warns about it, and starts the container
    controllers = host.get("cgroupControllers") or ()
    return [word for word, controller in (("memory", "memory"), ("tasks", "pids")) if controller not in controllers]
