"""The `gvisor` backend: containers whose system calls go to gVisor, a kernel that is a process of the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.container.backend import GAPS, ContainerBackend
from x07_sandbox.backends.container.instance import ContainerInstance
from x07_sandbox.backends.engines import CLIENT_ENV, Client
from x07_sandbox.backends.gvisor.runsc import Runsc
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import HostError
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import cache_folder, find_program, private_dir, state_dir
from x07_sandbox.images.archive import add_agent
from x07_sandbox.images.base import unpack_root
from x07_sandbox.images.store import Image, find_image
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import VM_CAPABILITIES, Features
from x07_sandbox.records.record import state_home

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
    *(
        "held-connections",
        "observed-connections",
        "command-groups",
        "network",
        "limits.cpu_ms",
        "limits.mem_bytes",
        "limits.procs",
    )
}


class GvisorBackend(ContainerBackend):
    """The backend for gVisor's runtime."""

    name = "gvisor"
    engine_images = None
    known_gaps: Mapping[str, str] = _GAPS
    needs = (
        Need("program", "runsc", "runsc", "X07_VM_RUNSC_BIN"),
        Need("program", "/usr/bin/fsck.erofs", "erofs-utils"),
    )
    other = "Set X07_VM_RUNSC_BIN and X07_VM_STATE_DIR to the values that they had when it was started"

    def _runtime(self) -> Runsc:
        require(self.needs, f"cannot use {self.name}")
        if os.geteuid() != 0:
            raise HostError(f"cannot use {self.name}", "runsc needs root to set limits", "Run x07 as root")
        binary = find_program(self.needs[0].place) or self.needs[0].name
        folder = private_dir(state_home(private_dir(state_dir())) / "gvisor")
        options = ("--root", str(folder / "state"), *_FLAGS)
        client = Client(name=self.name, binary=binary, env=dict(CLIENT_ENV), options=options)
        return Runsc(client=client, folder=folder, roots=cache_folder("gvisor"))

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        assert job.kind.image is not None  # noqa: S101 - for the type checker
        _unpack(job.kind.image)
        with super().start(job) as instance:
            yield instance

    def least_features(self) -> Features:
        """Return the features of a container on gVisor's kernel."""
        return Features(isolation="user-kernel", own_kernel=True, can_enforce=VM_CAPABILITIES - _NOT_HELD)

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what gVisor can limit here. Raises HostError."""
        self._runtime()
        warning = "gVisor's kernel is a process of this host, which limits its system calls"
        return Availability(features=self.least_features(), proof="runsc is installed", warnings=(warning,))


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
