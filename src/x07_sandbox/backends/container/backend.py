"""Backends whose jobs run in containers; `podman` and `docker` are `EngineBackend`."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.container import instance as containers
from x07_sandbox.backends.container.create import engine_gaps, is_beside, is_roots_podman, names_file
from x07_sandbox.backends.container.engine import IMAGE_IDS, EngineRuntime
from x07_sandbox.backends.container.runtime import Runtime, is_name
from x07_sandbox.backends.engines import CLIENTS, DEFAULT_REFERENCE, Engine, Name, engine, is_id
from x07_sandbox.backends.handshake import greet
from x07_sandbox.errors import BackendError, HostError, ImageError
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.variables import text
from x07_sandbox.host.verdicts import Verdict, file_state
from x07_sandbox.images import manifest
from x07_sandbox.images.guestcode import read_guest_code
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import LEAVES_TREE, NO_ROOT, NOT_OBSERVED, VM_CAPABILITIES, Features
from x07_sandbox.records.record import JobRecord
from x07_sandbox.records.stopping import Orphan, stop_recorded

_REFERENCE_MAX: Final = 512
# Where root's podman finds its store. A podman that reads another file is asked for its images each time.
_STORAGE_CONF: Final = ("/etc/containers/storage.conf", "/usr/share/containers/storage.conf")
GAPS: Final = {
    "connect-fails": "the relay accepts a connection before the gate decides, and resets it if the gate refuses",
    "observed-connections": NOT_OBSERVED,
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    "damaged-image": "the engine stores the image, and only its id is checked",
}
# What a container with our agent can enforce.
HELD: Final = VM_CAPABILITIES - {"held-connections", "observed-connections", "command-groups"}
WARNING: Final = "the program's system calls reach this host's kernel"


class ContainerBackend(ABC):
    """The common part of the backends that run a job in a container.

    other: what to do if a job was started with another runtime of this host.
    """

    name: str
    uses_image = True
    cloning = None
    other: str

    @abstractmethod
    def _runtime(self) -> Runtime:
        """Return the runtime of this host. Raises HostError."""

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[containers.ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        assert job.kind.image is not None  # noqa: S101 - for the type checker
        with containers.started(self._runtime(), job, job.kind.image) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def stop(self, record: JobRecord) -> bool:
        """Remove a recorded job's container and files. Return whether the container is proven gone."""
        return stop_recorded(
            record, lambda _stored: self._removed(record) and containers.remove_files(record.folder), signals=False
        )

    def _removed(self, record: JobRecord) -> bool:
        runtime = self._runtime()
        if (other := containers.recorded_runtime(record.folder)) not in {"", runtime.place}:
            why = f"it was started with another {self.name}: {other}"
            raise BackendError("cannot stop the container", why, self.other)
        name = containers.container_name(record)
        if (found := runtime.find(name)) is None:
            return runtime.remove(name)  # of a container that was never created there may be a VM
        # Anyone with access to the runtime can use that name.
        return found.labels.get("io.x07.run_id") == record.job_id and runtime.remove(found.id)

    def orphans(self) -> Sequence[Orphan]:
        """Return the containers with x07's label, or none if there is no working runtime, as on most hosts."""
        try:
            runtime = self._runtime()
        except HostError:
            return ()
        # One by one: a container that just went would fail a call for all.
        found = (self._found(runtime, one) for one in runtime.listed())
        return [orphan for orphan in found if orphan is not None]

    def _found(self, runtime: Runtime, container: str) -> Orphan | None:
        with contextlib.suppress(BackendError):
            return runtime.find(container)
        return None

    def remove(self, orphan: Orphan) -> bool:
        """Remove a container that `orphans` returned, and return whether it is proven gone."""
        return (is_id(orphan.id) or is_name(orphan.id)) and self._runtime().remove(orphan.id)


class WithImages(ContainerBackend):
    """The common part of the backends whose runtime stores the images."""

    image_variable = ""

    @abstractmethod
    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the id and the labels of an image. Raises HostError, BackendError, and ImageError with `fix_image`."""

    @property
    def fix_image(self) -> str:
        """What to do if there is no suitable image."""
        return f"Run x07 image load {self.name}, or scripts/build_guest_runner_image.sh; x07 never pulls an image"

    @property
    def engine_images(self) -> WithImages:
        """The runtime's image store."""
        return self

    def find(self, ref: str | None) -> OpenImage:
        """Return the image *ref* (None: the image in X07_VM_GUEST_IMAGE). Raises ImageError, HostError."""
        wanted = ref or text("X07_VM_GUEST_IMAGE") or DEFAULT_REFERENCE
        if len(wanted) > _REFERENCE_MAX or wanted.startswith("-"):
            raise ImageError(f"there is no guest image {wanted[:80]!r}", "this is not an image name", "Use NAME:TAG")
        identity, labels = self._image(wanted)
        if not (data := manifest.manifest_in(labels)):
            why = "it lacks x07's labels, so x07's agent is not in it"
            raise ImageError(f"cannot use the image {wanted}", why, self.fix_image)
        found = manifest.decode(data, f"the guest image {wanted}")
        if found.guest_code != read_guest_code().digest:
            why = "another version of x07-sandbox made it, so its agent may not be compatible"
            raise ImageError(f"cannot use the image {wanted}", why, self.fix_image)
        digest = f"sha256:{identity.removeprefix('sha256:')}"
        return OpenImage(fds={}, manifest=msgspec.structs.replace(found, digest=digest))


class EngineBackend(WithImages):
    """The backend for one container engine of this host."""

    known_gaps: Mapping[str, str] = GAPS

    def __init__(self, name: Name) -> None:
        self.name = name
        self._kind = name
        self.needs = (CLIENTS[name],)
        self.other = f"Set X07_VM_{name.upper()}_BIN and DOCKER_HOST to the values that they had when it was started"

    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the id and the labels of an image. Raises ImageError, HostError."""
        client = self._engine()
        kept, names = self._image_ids(client, wanted)
        if kept is not None and (known := kept.read()):
            return str(known["id"]), known["labels"]
        answer = client.call("image", "inspect", wanted)
        if answer.status:
            why = answer.error or f"{self.name} does not have it"
            raise ImageError(f"there is no guest image {wanted}", why, self.fix_image)
        image = answer.single_object(self.name)
        if not image.get("Id"):
            raise ImageError(f"cannot use the image {wanted}", f"{self.name} reports no id for it", self.fix_image)
        identity, labels = str(image["Id"]), (image.get("Config") or {}).get("Labels") or image.get("Labels")
        if kept is not None and is_beside(names, image):
            kept.write({"id": identity, "labels": labels})
        return identity, labels

    def _image_ids(self, client: Engine, wanted: str) -> tuple[Verdict | None, str]:
        """Return the stored id and labels of an image of root's podman, valid until a name changes, and `names_file`.

        None: nothing shows whether names have changed. Labels are part of what the id is a digest of.
        """
        limits = self._limits(client)
        if limits is None or not (names := self._checked(client, limits)):
            return None, ""
        try:
            return Verdict(IMAGE_IDS, limits.path.name, wanted, key=file_state(names)), names
        except OSError:
            return None, ""

    def _limits(self, client: Engine) -> Verdict | None:
        """Return the stored check of root's podman, valid until the host reboots, or None for other engines."""
        # A rootless podman depends on the session that calls it, docker on its daemon.
        if self._kind != "podman" or os.geteuid() != 0:
            return None
        settings = [file_state(path) if Path(path).exists() else path for path in _STORAGE_CONF]
        return Verdict(self.name, file_state(client.binary), *client.options, key=settings)

    def _checked(self, client: Engine, limits: Verdict | None, *, again: bool = False) -> str:
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
        return EngineRuntime(self._engine())

    def least_features(self) -> Features:
        """Return the features of a container that runs x07's agent."""
        return Features(isolation="container", own_kernel=False, can_enforce=HELD)

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what the engine can limit here. Raises HostError if the engine fails or would ignore a limit."""
        client = self._engine()
        self._checked(client, self._limits(client), again=not boot)
        proof = f"{self.name} answers and enforces limits on memory and tasks"
        return Availability(features=self.least_features(), proof=proof, warnings=(WARNING,))

    def _info(self, client: Engine) -> dict[str, Any]:
        answer = client.call("info", "--format", "json" if client.name == "podman" else "{{json .}}")
        try:
            info: dict[str, Any] = json.loads(answer.text) if not answer.status else {}
        except ValueError:
            info = {}
        if not info or info.get("ServerErrors"):
            why = answer.error or str(info.get("ServerErrors", "it printed no information"))[:300]
            raise HostError(f"cannot use {self.name}", why, f"Check that it works: {self.name} info")
        return info

    def _engine(self) -> Engine:
        client = engine(self._kind)
        # crun, podman's default runtime, refuses a host that mixes both versions of control groups.
        mixed = all(Path("/sys/fs/cgroup", name).exists() for name in ("memory", "unified/cgroup.procs"))
        if client.name == "podman" and mixed and (find_program("/usr/sbin/runc") or find_program("/usr/bin/runc")):
            return msgspec.structs.replace(client, options=("--runtime", "runc"))
        return client
