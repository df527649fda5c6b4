"""The `gvisor` backend: containers whose system calls go to gVisor, a kernel that is a process of the host.

gVisor's `runsc` (release 20240729) needs no engine: a folder of ours, its bundle, describes each container.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.base import Job
from x07_sandbox.backends.container.backend import GAPS, ContainerBackend, ContainerInstance
from x07_sandbox.backends.container.runtime import CREATE, ContainerSpec, Runtime
from x07_sandbox.backends.engines import client_of
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import BackendError, HostError, UsageError
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_folder, private_dir, raised_as, read_bounded, replace_file, state_dir
from x07_sandbox.images.archive import add_agent
from x07_sandbox.images.commands import unpack_root
from x07_sandbox.images.store import ENTRY, Image, find_image
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import VM_CAPABILITIES, Features
from x07_sandbox.records.runs import state_home

_FLAGS: Final = ("--platform=systrap", "--network=none", "--host-uds=none", "--overlay2=none")
_NO_FILTER: Final = "gVisor has no nftables, which the relay needs, so a policy that lists hosts is refused"
_MEMORY: Final = "a program over its limit is ended with an error of gVisor, which does not say that memory ran out"
_GAPS: Final = GAPS | {
    "damaged-image": "the image's files are unpacked once, and are not checked again",
    "root-inside": "the program is in a container with few rights",
    **dict.fromkeys(("unlisted-name", "gate-asked", "connect-fails"), _NO_FILTER),
    **dict.fromkeys(("memory", "memory-together"), _MEMORY),
    **dict.fromkeys(("tasks", "tasks-together"), "gVisor limits the processes of each command, and not exactly"),
    "cpu-of-one": "gVisor does not report the CPU time of single commands",
    "file-root": "gVisor lets programs read the environment of the agent, which contains only PATH",
    "commands-in-a-row": "gVisor does not show how many files and tasks exist",
}
# Limits that are not held as the policy says, and connections.
_NOT_HELD: Final = {
    "held-connections",
    "observed-connections",
    "command-groups",
    "network",
    "limits.cpu_ms",
    "limits.mem_bytes",
    "limits.procs",
}
_NAMESPACES: Final = ("ipc", "mount", "network", "pid", "uts")
_GROUPS: Final = "/x07-sandbox"  # the folder of our control groups
_CGROUPS: Final = Path("/sys/fs/cgroup")
_SENTRY_BYTES: Final = 128 << 20  # for gVisor's own kernel
_CONFIG_MAX: Final = 1 << 20


class GvisorBackend(ContainerBackend):
    """The backend for gVisor's runtime."""

    name = "gvisor"
    engine_images = None
    known_gaps: Mapping[str, str] = _GAPS
    needs = (
        Need("program", "runsc", "runsc", "X07_VM_RUNSC_BIN"),
        Need("program", "/usr/bin/fsck.erofs", "erofs-utils"),
    )
    features = Features(isolation="user-kernel", own_kernel=True, can_enforce=VM_CAPABILITIES - _NOT_HELD)
    warnings = ("gVisor's kernel is a process of this host, which limits its system calls",)
    variables = ("X07_VM_RUNSC_BIN", "X07_VM_STATE_DIR")

    def _runtime(self) -> Runsc:
        require(self.needs, f"cannot use {self.name}")
        if os.geteuid() != 0:
            raise HostError(f"cannot use {self.name}", "runsc needs root to set limits", "Run x07 as root")
        folder = private_dir(state_home(private_dir(state_dir())) / "gvisor")
        options = ("--root", str(folder / "state"), *_FLAGS)
        client = client_of(self.name, self.needs[0], *options)
        return Runsc(client=client, folder=folder, roots=cache_folder("gvisor"))

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        assert job.kind.image is not None
        _unpack(job.kind.image)
        with super().start(job) as instance:
            yield instance

    def _prove(self, *, boot: bool) -> str:  # noqa: ARG002 - nothing boots
        self._runtime()
        return "runsc is installed"


def _unpack(image: OpenImage) -> None:
    """Unpack the image's files for `runsc`, unless that was done before. Raises SandboxError."""
    digest = image.manifest.digest.removeprefix("sha256:")
    target = cache_folder("gvisor") / digest
    if target.exists():
        return
    stored: Image = find_image(image.manifest.digest)
    with file_lock(cache_folder("gvisor") / "lock", on_wait=lambda: None):
        if target.exists():
            return
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache_folder("gvisor")) as folder:
            root = unpack_root(Path(folder), Path(f"/proc/{os.getpid()}/fd/{image.fds['root']}"))
            with raised_as(HostError, "cannot unpack the image", "Free disk space"):
                shutil.rmtree(root / "dev")  # its devices would be those of the host
                add_agent(stored, root)
                root.rename(target)


class Runsc(Runtime, frozen=True, kw_only=True):
    """`runsc`, and the folder of its containers. See `Runtime`.

    roots: the folder with the unpacked files of images, by their digests.
    """

    folder: Path
    roots: Path

    @property
    def place(self) -> str:
        """The program and the folder."""
        return f"{self.client.binary} {self.folder}"

    def create(self, spec: ContainerSpec) -> str:
        """Write the bundle of a container, and return its name. Nothing is started. Raises BackendError."""
        bundle = self.folder / "bundles" / spec.name
        described = config(spec, str(self.roots / spec.image.removeprefix("sha256:")))
        with raised_as(BackendError, CREATE, "Free disk space"):
            bundle.mkdir(mode=0o700, parents=True)
            replace_file(bundle / "config.json", json.dumps(described).encode())  # as a whole: it says whose it is
        return spec.name

    def attach_argv(self, container: str) -> list[str]:
        """Return the command that starts a container and carries its standard streams."""
        return self.client.argv("run", "--bundle", str(self.folder / "bundles" / container), container)

    def _try_remove(self, container: str) -> bool:
        """Kill a container, and remove what is left of it. Return whether nothing is. Raises BackendError."""
        self.client.call("delete", "--force", container)
        if not self.client.call("state", container).absent or not _without_groups(container):
            return False
        for path in (self.folder / "state").glob(f"*{container}*"):  # of a killed runsc: its locks and sockets
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "bundles" / container, ignore_errors=True)
        return True

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """Return the description of a container, or None if there is none."""
        described = self.folder / "bundles" / container / "config.json"
        if not described.exists():
            return None
        try:
            found = json.loads(read_bounded(described, "configuration", _CONFIG_MAX))
        except (UsageError, ValueError):
            found = None
        return found if isinstance(found, dict) else {}  # a damaged bundle

    def _labels_in(self, made: Mapping[str, Any]) -> Mapping[str, object] | None:
        return made.get("annotations")

    def _names(self) -> Iterable[str]:
        try:
            return sorted(path.name for path in (self.folder / "bundles").iterdir())
        except OSError:
            return ()


def _without_groups(container: str) -> bool:
    """Remove the control groups that a killed runsc has left. Return whether none is left."""
    below = f"{_GROUPS[1:]}/{container}"
    for group in (_CGROUPS / below, *_CGROUPS.glob(f"*/{below}")):  # of versions 2 and 1
        try:
            group.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # a process of the container is ending
            return False
    return True


def config(spec: ContainerSpec, root: str) -> dict[str, Any]:
    """Return the description of a container, config.json of the OCI runtime specification 1.0.

    root: the folder with the image's files.
    """
    mounts: list[dict[str, object]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    mounts.append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]})
    for place, options in {"/dev": "nosuid,mode=0755", **spec.tmpfs()}.items():
        mounts.append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options.split(",")})
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [*ENTRY, *spec.agent_words(limits_tasks=True)],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), spec.listening_capabilities),
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": spec.fds, "soft": spec.fds}],
        },
        "root": {"path": root, "readonly": True},
        "hostname": "x07",
        "mounts": mounts,
        "annotations": dict(spec.labels),
        "linux": {
            "namespaces": [{"type": kind} for kind in _NAMESPACES],
            "resources": {"memory": {"limit": spec.memory_bytes + _SENTRY_BYTES}},
            "cgroupsPath": f"{_GROUPS}/{spec.name}",
        },
    }
