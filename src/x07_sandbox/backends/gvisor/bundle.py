"""The description of a container for `runsc`: config.json of the OCI runtime specification 1.0. No I/O."""

from typing import Any, Final

from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.images.manifest import ENTRY

_NAMESPACES: Final = ("ipc", "mount", "network", "pid", "uts")
_AGENT_FDS: Final = 64
GROUPS: Final = "/x07-sandbox"  # the folder of our control groups


def config(spec: ContainerSpec, root: str) -> dict[str, Any]:
    """Return the description. root: the folder with the image's files."""
    fds = spec.needs.fds + _AGENT_FDS
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    mounts += [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}]  # type: ignore[dict-item]
    for place, options in {"/dev": "nosuid,mode=0755", **spec.tmpfs()}.items():
        mounts.append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options.split(",")})  # type: ignore[dict-item]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [*ENTRY, *spec.agent_words(limits_tasks=True)],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), spec.listening_capabilities),
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": fds, "soft": fds}],
        },
        "root": {"path": root, "readonly": True},
        "hostname": "x07",
        "mounts": mounts,
        "annotations": dict(spec.labels),
        "linux": {
            "namespaces": [{"type": kind} for kind in _NAMESPACES],
            "resources": {"memory": {"limit": spec.memory_bytes + SENTRY_BYTES}},
            "cgroupsPath": f"{GROUPS}/{spec.name}",
        },
    }


SENTRY_BYTES: Final = 128 << 20  # for gVisor's own kernel
