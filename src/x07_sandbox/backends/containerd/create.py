"""The command line that creates a container by `ctr` (containerd 1.7), and the check of the created one. No I/O."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.images.manifest import ENTRY

# Those of containerd's default, which `ctr` adds unless each is dropped.
_DEFAULT: Final = (
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
)
_CGROUP: Final = "/sys/fs/cgroup"
_NAMESPACES: Final = {"cgroup", "ipc", "mount", "network", "pid", "uts"}
# The mounts of containerd's default, and the control group. They belong to root, and hold nothing of the host.
_USUAL: Final = {
    "/proc": "proc",
    "/dev": "tmpfs",
    "/dev/pts": "devpts",
    "/dev/mqueue": "mqueue",
    "/sys": "sysfs",
    _CGROUP: "cgroup",
}
FDS_MAX: Final = 1024  # containerd's default limit, which `ctr` cannot change
_PERIOD_US: Final = 100_000


def create_argv(
    spec: ContainerSpec, reference: str, *, snapshotter: str, runtime: str, in_machine: bool
) -> Iterator[str]:
    """Yield the words of the command line after the options of `ctr`. reference: the image's name.

    in_machine: whether the container runs in a VM of the same name. `ctr` has no limit on tasks: in a VM the agent
    limits them, and else the backend does.
    """
    ours = spec.listening_capabilities
    yield from ("containers", "create", "--snapshotter", snapshotter, "--runtime", runtime, "--read-only", "--seccomp")
    for name in _DEFAULT:
        if f"CAP_{name}" not in ours:
            yield from ("--cap-drop", f"CAP_{name}")
    for name in ours:
        yield from ("--cap-add", name)
    yield from ("--memory-limit", str(spec.memory_bytes), "--hostname", "x07", "--user", "0:0", "--cwd", "/")
    yield from ("--cpu-quota", str(_PERIOD_US), "--cpu-period", str(_PERIOD_US), "--with-ns", "cgroup:")
    yield from ("--mount", f"type=cgroup,src=cgroup,dst={_CGROUP},options=ro:nosuid:noexec:nodev")
    for place, options in spec.tmpfs().items():
        yield from ("--mount", f"type=tmpfs,src=tmpfs,dst={place},options={options.replace(',', ':')}")
    for label, value in spec.labels.items():
        yield from ("--label", f"{label}={value}")
    if in_machine:
        yield from ("--annotation", f"aws.firecracker.vm.id={spec.name}")
    yield from (reference, spec.name, *_arguments(spec, in_machine=in_machine))


def _arguments(spec: ContainerSpec, *, in_machine: bool) -> list[str]:
    return [*ENTRY, *spec.agent_words(limits_tasks=in_machine)]


def differences(spec: ContainerSpec, made: Mapping[str, Any], runtime: str, *, in_machine: bool) -> list[str]:
    """Return how a created container differs from *spec*. made: containerd's description of it (`containers info`)."""
    oci = made.get("Spec") or {}
    process, linux, labels = oci.get("process") or {}, oci.get("linux") or {}, made.get("Labels") or {}
    user = process.get("user") or {}
    held = {name for names in (process.get("capabilities") or {}).values() for name in names or ()}
    mounts = {(str(mount.get("destination")), mount.get("type")) for mount in oci.get("mounts") or ()}
    expected = _USUAL | dict.fromkeys(spec.tmpfs(), "tmpfs")
    namespaces = linux.get("namespaces") or ()
    seen = {
        "its runtime": (made.get("Runtime") or {}).get("Name") == runtime,
        "its command": process.get("args") == _arguments(spec, in_machine=in_machine),
        "its user": (user.get("uid"), user.get("gid")) == (0, 0),
        "its rights": process.get("noNewPrivileges") is True and bool(linux.get("seccomp")),
        "its capabilities": held == set(spec.listening_capabilities),
        "its writable root": (oci.get("root") or {}).get("readonly") is True,
        "its namespaces": {one.get("type") for one in namespaces} == _NAMESPACES,
        "the owner of its namespaces": not any(one.get("path") for one in namespaces),
        "its devices": not linux.get("devices"),
        "its hooks": not any((oci.get("hooks") or {}).values()),
        "its limit on memory": ((linux.get("resources") or {}).get("memory") or {}).get("limit") == spec.memory_bytes,
        "its mounts": mounts == set(expected.items()),
        "its labels": all(labels.get(label) == value for label, value in spec.labels.items()),
    }
    return [name for name, right in seen.items() if not right]
