"""The command line that makes a container for one job, and whether what was made is what was asked for. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.backends.base import Needs
from x07_sandbox.host.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.engines import Name

# What the agent needs to become another user, to take that one's rights, and to end it. All of it is taken from the
# program, with everything else.
CAPABILITIES: Final = ("KILL", "SETGID", "SETPCAP", "SETUID")
NETWORK_CAPABILITY: Final = "NET_ADMIN"  # for the rules around the relay, in the container's own network namespace
AGENT_BYTES: Final = 64 * MIB
AGENT_TASKS: Final = 2  # agent and init; with network, the relay too
_NET_PLACE: Final = "/run/x07-net"
_FIXED_FDS: Final = 64  # of the agent
_TMPFS: Final = "rw,nosuid,nodev"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One container. image: its id. name, mark, labels: of the job. net_folder: with the gate's socket; "" for none.

    resolv_conf: a file of the host's.
    """

    engine: str
    image: str
    name: str
    mark: str
    labels: Mapping[str, str]
    needs: Needs
    resolv_conf: str
    net_folder: str = ""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Those of its first process."""
        return (*CAPABILITIES, NETWORK_CAPABILITY) if self.net_folder else CAPABILITIES

    @property
    def memory_bytes(self) -> int:
        """The limit for all of it: the program's, the agent's, and files that come in, which lie in memory."""
        return self.needs.mem_bytes + AGENT_BYTES + 2 * self.needs.files_bytes

    @property
    def tasks(self) -> int:
        """The limit for all of it."""
        return self.needs.tasks + AGENT_TASKS + bool(self.net_folder)

    def tmpfs(self) -> dict[str, str]:
        """Folders in memory by their place, with mount options."""
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


def create_argv(wanted: Wanted) -> Iterator[str]:
    """The words after the engine's name."""
    podman, needs = wanted.engine == "podman", wanted.needs
    yield from ("create", "--interactive", "--pull", "never", "--name", wanted.name, "--network", "none")
    yield from ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "0:0")
    for capability in wanted.capabilities:
        yield from ("--cap-add", capability)
    yield from ("--memory", str(wanted.memory_bytes), "--memory-swap", str(wanted.memory_bytes))
    yield from ("--pids-limit", str(wanted.tasks), "--cpus", "1")
    yield from ("--ipc", "private", "--cgroupns", "private", "--hostname", "x07", "--log-driver", "none")
    yield from ("--ulimit", f"nofile={needs.fds + _FIXED_FDS}:{needs.fds + _FIXED_FDS}", "--ulimit", "core=-1:-1")
    yield from ("--restart", "no", "--workdir", "/", "--no-healthcheck")
    if wanted.net_folder:  # the relay's own ports are low ones, and it has no capability for them; docker has it so
        yield from ("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")
    if podman:
        yield from ("--read-only-tmpfs=false", "--no-hosts", "--http-proxy=false", "--uts", "private")
    for place, options in wanted.tmpfs().items():
        yield from ("--tmpfs", f"{place}:{options}{',notmpcopyup' if podman else ''}")
    for source, place in _binds(wanted).items():
        yield from ("--mount", f"type=bind,src={source},dst={place},readonly")
    for label, value in wanted.labels.items():
        yield from ("--label", f"{label}={value}")
        if podman:
            yield from ("--annotation", f"{label}={value}")
    yield from (wanted.image, "container", *(["network"] if wanted.net_folder else []), wanted.mark)


def _binds(wanted: Wanted) -> dict[str, str]:
    binds = {wanted.resolv_conf: "/etc/resolv.conf"}
    return binds | ({wanted.net_folder: _NET_PLACE} if wanted.net_folder else {})


def differences(wanted: Wanted, made: Mapping[str, Any]) -> list[str]:
    """What a created container has other than was asked for, by its engine's inspect; each as a short text.

    An engine's configuration may add mounts, devices or rights to every container.
    """
    host, config = made.get("HostConfig") or {}, made.get("Config") or {}
    labels = config.get("Labels") or {}
    added = {str(name).upper().removeprefix("CAP_") for name in host.get("CapAdd") or ()}
    options = [str(option) for option in host.get("SecurityOpt") or ()]
    mounts = {posixpath.normpath(str(mount.get("Destination"))) for mount in made.get("Mounts") or ()}
    ours = set(_binds(wanted).values()) | set(wanted.tmpfs())
    seen = {
        "its image": str(made.get("Image", "")).removeprefix("sha256:") == wanted.image.removeprefix("sha256:"),
        "its rights (privileged)": not host.get("Privileged"),
        "its network": host.get("NetworkMode") == "none",
        "its root, which can be written to": bool(host.get("ReadonlyRootfs")),
        "its namespaces": all(host.get(kind) != "host" for kind in ("PidMode", "IpcMode", "UTSMode", "CgroupnsMode")),
        "its capabilities": added <= set(wanted.capabilities),
        "its devices": not host.get("Devices"),
        "its security options": not any("unconfined" in option or "disable" in option for option in options),
        "its limit on memory": host.get("Memory") == wanted.memory_bytes,
        "its limit on tasks": host.get("PidsLimit") == wanted.tasks,
        "its mounts": mounts <= ours,
        "its labels": all(labels.get(label) == value for label, value in wanted.labels.items()),
    }
    return [name for name, right in seen.items() if not right]


def engine_gaps(name: Name, told: Mapping[str, Any]) -> list[str]:
    """Which limits this engine would ignore here, by its `info`; each as a short text."""
    if name == "docker":
        found = [] if told.get("MemoryLimit") else ["memory"]
        return found if told.get("PidsLimit") else [*found, "tasks"]
    host = told.get("host") or {}
    if not (host.get("security") or {}).get("rootless"):
        return []
    if host.get("cgroupVersion") != "v2":
        return ["memory", "tasks"]  # podman says so on its standard error, and starts the container all the same
    controllers = host.get("cgroupControllers") or ()
    return [word for word, controller in (("memory", "memory"), ("tasks", "pids")) if controller not in controllers]
