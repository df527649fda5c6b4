"""The command line that creates a job's container, and the check of the created container. No I/O."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from x07_sandbox.backends.base import Needs
from x07_sandbox.backends.engines import Name
from x07_sandbox.host.settings import MIB

# The agent needs these to become another user and to end its processes. The program gets none of them.
CAPABILITIES: Final = ("KILL", "SETGID", "SETPCAP", "SETUID")
NETWORK_CAPABILITY: Final = "NET_ADMIN"  # for the relay's rules in the container's network namespace
_LISTEN_CAPABILITY: Final = "NET_BIND_SERVICE"  # for the relay's ports below 1024
AGENT_BYTES: Final = 64 * MIB
AGENT_TASKS: Final = 2  # agent and init; the relay is added
_AGENT_FDS: Final = 64
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
            "/opt/x07": f"{_TMPFS},{run},size={program},mode=1777",
            "/x07/out": f"{_TMPFS},{run},size={program},mode={'1777' if needs.out else '0755'}",
        }
        for place in needs.places:
            found[place.at] = f"{_TMPFS},{run},size={program},mode={'1777' if place.write else '0755'}"
        return found


def create_argv(spec: ContainerSpec) -> Iterator[str]:
    """Yield the words of the command line after the engine's name."""
    podman, needs = spec.runtime == "podman", spec.needs
    yield from ("create", "--interactive", "--pull", "never", "--name", spec.name, "--network", "none")
    yield from ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "0:0")
    for capability in spec.capabilities:
        yield from ("--cap-add", capability)
    yield from ("--memory", str(spec.memory_bytes), "--memory-swap", str(spec.memory_bytes))
    yield from ("--pids-limit", str(spec.tasks), "--cpus", "1")
    yield from ("--ipc", "private", "--cgroupns", "private", "--hostname", "x07", "--log-driver", "none")
    yield from ("--ulimit", f"nofile={needs.fds + _AGENT_FDS}:{needs.fds + _AGENT_FDS}", "--ulimit", "core=-1:-1")
    yield from ("--restart", "no", "--workdir", "/", "--no-healthcheck")
    if spec.network:  # the relay listens on ports below 1024 without a capability; docker's default
        yield from ("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")
    if podman:
        # For --rm, podman mounts the root so that unmounting it does not wait for the disk. We remove it all the same.
        yield from ("--rm", "--read-only-tmpfs=false", "--no-hosts", "--http-proxy=false", "--uts", "private")
    for place, options in spec.tmpfs().items():
        yield from ("--tmpfs", f"{place}:{options}{',notmpcopyup' if podman else ''}")
    for source, place in _binds(spec).items():
        yield from ("--mount", f"type=bind,src={source},dst={place},readonly")
    for label, value in spec.labels.items():
        yield from ("--label", f"{label}={value}")
        if podman:
            yield from ("--annotation", f"{label}={value}")
    yield from (spec.image, *spec.agent_words(limits_tasks=False))


def _binds(spec: ContainerSpec) -> dict[str, str]:
    return {spec.resolv_conf: "/etc/resolv.conf"}


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
    ours = set(_binds(spec).values()) | set(spec.tmpfs())
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
        "its mounts": mounts <= ours,
        "its labels": all(labels.get(label) == value for label, value in spec.labels.items()),
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
