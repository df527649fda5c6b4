"""The `containerd` backend: containers of an existing containerd, with runc on this host's kernel."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.container.backend import GAPS, HELD, WARNING, WithImages
from x07_sandbox.backends.container.instance import ContainerInstance
from x07_sandbox.backends.containerd.ctr import Ctr
from x07_sandbox.backends.engines import CLIENT_ENV, Client
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import BackendError, HostError, ImageError
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.variables import text
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import Features

_CONNECT_S: Final = 2.0
_NAMESPACE: Final = "x07"
_GROUPS: Final = ("/sys/fs/cgroup/pids", "/sys/fs/cgroup")  # of versions 1 and 2
_SOCKET: Final = "/run/containerd/containerd.sock"


class ContainerdBackend(WithImages):
    """The backend for a containerd of this host."""

    known_gaps: Mapping[str, str] = GAPS
    other = "Set X07_VM_CONTAINERD_SOCK and X07_VM_CONTAINERD_NAMESPACE to the values that they had when it was started"
    oci_runtime = "io.containerd.runc.v2"

    def __init__(self) -> None:
        self.name = "containerd"
        self._client = Need("program", "ctr", "containerd", "X07_VM_CTR_BIN")
        self._socket = text("X07_VM_CONTAINERD_SOCK") or _SOCKET
        self._snapshotter = text("X07_VM_CONTAINERD_SNAPSHOTTER") or "overlayfs"
        self._namespace = text("X07_VM_CONTAINERD_NAMESPACE") or _NAMESPACE
        self.needs: Sequence[Need] = (self._client,)

    @property
    def fix_image(self) -> str:
        """What to do if there is no suitable image."""
        words = f"{self._client.name} --address {self._socket} --namespace {self._namespace} images import"
        return f"Run x07 image load --archive FILE, and then {words} --snapshotter {self._snapshotter} FILE"

    def _runtime(self) -> Ctr:
        require([self._client], f"cannot use {self.name}")
        self._connect()  # the client itself would wait for ten seconds
        options = ("--address", self._socket, "--namespace", self._namespace)
        binary = find_program(self._client.place) or self._client.name
        return self._made(Client(name=self.name, binary=binary, env=dict(CLIENT_ENV), options=options))

    def _made(self, client: Client) -> Ctr:
        return Ctr(client=client, snapshotter=self._snapshotter, oci_runtime=self.oci_runtime)

    def _connect(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_CONNECT_S)
            try:
                sock.connect(self._socket)
            except OSError as exc:
                why = f"{exc.strerror or exc} ({self._socket})"
                fix = "Start it, and run x07 as a user who may use its socket, such as root"
                raise HostError(f"cannot connect to {self.name}", why, fix) from exc

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the digest of an image's manifest, and the image's labels. Raises ImageError, BackendError."""
        runtime = self._runtime()
        if (digest := runtime.images().get(wanted)) is None:
            raise ImageError(f"there is no guest image {wanted}", f"{self.name} does not have it", self.fix_image)
        config = runtime.content(digest).get("config") or {}
        details = runtime.content(str(config.get("digest"))).get("config") or {}
        return digest, details.get("Labels")

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        with super().start(job) as instance:
            self._limit_tasks(instance)
            yield instance

    def _limit_tasks(self, instance: ContainerInstance) -> None:
        """Limit the tasks of a container by its control group, since `ctr` cannot. Raises BackendError."""
        try:
            group = next(
                folder
                for place in _GROUPS
                if (folder := Path(place, self._namespace, instance.spec.name)).joinpath("pids.max").exists()
            )
            (group / "pids.max").write_text(str(instance.spec.tasks), encoding="ascii")
        except (OSError, StopIteration) as exc:
            why = getattr(exc, "strerror", None) or "its control group was not found"
            raise BackendError("cannot limit the tasks of the container", why, "Use another backend") from exc

    def least_features(self) -> Features:
        """Return the features of a container that runs x07's agent."""
        return Features(isolation="container", own_kernel=False, can_enforce=HELD)

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what containers can limit here. Raises HostError, BackendError if containerd does not answer."""
        self._runtime().images()
        return Availability(features=self.least_features(), proof=f"{self.name} answers", warnings=(WARNING,))
