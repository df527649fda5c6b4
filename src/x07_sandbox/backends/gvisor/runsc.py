"""Containers of gVisor's `runsc` (release 20240729), each described by a folder of ours, its bundle."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.backends.container.engine import bounded_labels
from x07_sandbox.backends.container.runtime import CONTAINERS_MAX, CREATE, is_name, removing_program, until_gone
from x07_sandbox.backends.engines import Client
from x07_sandbox.backends.gvisor.bundle import GROUPS, config
from x07_sandbox.errors import BackendError, UsageError
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import read_bounded, replace_file
from x07_sandbox.records.stopping import Orphan

_CONFIG_MAX: Final = 1 << 20
_CGROUPS: Final = Path("/sys/fs/cgroup")


class Runsc(msgspec.Struct, frozen=True, kw_only=True):
    """`runsc`, and the folder of its containers. See `Runtime`.

    roots: the folder with the unpacked files of images, by their digests.
    """

    client: Client
    folder: Path
    roots: Path

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.client.name

    @property
    def place(self) -> str:
        """The program and the folder."""
        return f"{self.client.binary} {self.folder}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of the program."""
        return self.client.env

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

    def removing_argv(self, container: str) -> list[str]:
        """Return a command that removes a container."""
        return removing_program(self, container)

    def remove(self, container: str) -> bool:
        """Kill and remove a container, and return whether it is proven gone. Raises BackendError."""

        def remove() -> bool:
            self.client.call("delete", "--force", container)
            return self.client.call("state", container).absent and _without_groups(container)

        if gone := until_gone(remove):
            for path in (self.folder / "state").glob(f"*{container}*"):  # of a killed runsc: its locks and sockets
                path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "bundles" / container, ignore_errors=True)
        return gone

    def find(self, container: str) -> Orphan | None:
        """Return a container, or None if there is none of this name. Raises BackendError."""
        described = self.folder / "bundles" / container / "config.json"
        if not described.exists():
            return None
        try:
            labels = json.loads(read_bounded(described, "configuration", _CONFIG_MAX)).get("annotations") or {}
        except (UsageError, ValueError, AttributeError):
            labels = {}  # a damaged bundle
        return Orphan(id=container, labels=bounded_labels(labels))

    def listed(self) -> Sequence[str]:
        """Return the names of the containers, at most CONTAINERS_MAX."""
        try:
            names = sorted(path.name for path in (self.folder / "bundles").iterdir())
        except OSError:
            return []
        return [name for name in names if is_name(name)][:CONTAINERS_MAX]


def _without_groups(container: str) -> bool:
    """Remove the control groups that a killed runsc has left. Return whether none is left."""
    below = f"{GROUPS[1:]}/{container}"
    for group in (_CGROUPS / below, *_CGROUPS.glob(f"*/{below}")):  # of versions 2 and 1
        try:
            group.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # a process of the container is ending
            return False
    return True
