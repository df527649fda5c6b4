"""`podman` and `docker` as backends: what an engine offers here, its guest image, and starting jobs in containers."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from x07_sandbox.backends.base import Availability, Orphan
from x07_sandbox.backends.container.create import engine_gaps
from x07_sandbox.backends.container.instance import (
    ContainerInstance,
    container_name,
    labels_of,
    recorded_engine,
    remove,
    remove_files,
    started,
)
from x07_sandbox.backends.engine_images import DEFAULT_REFERENCE
from x07_sandbox.backends.engines import Engine, Name, engine, is_id
from x07_sandbox.backends.handshake import greet
from x07_sandbox.errors import BackendError, HostError, ImageError
from x07_sandbox.host.variables import text
from x07_sandbox.images import manifest
from x07_sandbox.images.archive import MANIFEST_LABEL
from x07_sandbox.images.guestcode import read_guest_code
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jobs.stopping import live_records, stop_recorded
from x07_sandbox.plan.features import container_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from x07_sandbox.backends.base import Job
    from x07_sandbox.jobs.record import JobRecord

_REFERENCE_MAX: Final = 512
_ORPHANS_MAX: Final = 1000
_GAPS: Final = {
    "connect-fails": "the relay accepts a connection before it asks, and resets it then",
    "damaged-image": "the engine keeps the image, and its id is what is checked",
}


class ContainerBackend:
    """A container engine of this host."""

    uses_image = True
    cloning = None
    known_gaps: Mapping[str, str] = _GAPS

    def __init__(self, name: Name) -> None:
        self.name: str = name
        self._kind = name

    @property
    def engine_images(self) -> ContainerBackend:
        """The engine's."""
        return self

    def find(self, ref: str | None) -> OpenImage:
        """The engine's image of that name, or what X07_VM_GUEST_IMAGE names. Raises ImageError, HostError."""
        wanted = ref or text("X07_VM_GUEST_IMAGE") or DEFAULT_REFERENCE
        if len(wanted) > _REFERENCE_MAX or wanted.startswith("-"):
            raise ImageError(f"no guest image {wanted[:80]!r}", "it is no name of an image", "Name one: NAME:TAG")
        client = self._engine()
        answer = client.call("image", "inspect", wanted)
        fix = f"Run x07 image load {self.name}, or scripts/build_guest_runner_image.sh; it is never pulled"
        if answer.status:
            raise ImageError(f"no guest image {wanted}", answer.error or f"{self.name} does not have it", fix)
        image = answer.only(self.name)
        if not image.get("Id"):
            raise ImageError(f"cannot use the image {wanted}", f"{self.name} tells no id of it", fix)
        digest = f"sha256:{str(image['Id']).removeprefix('sha256:')}"
        labels = (image.get("Config") or {}).get("Labels") or image.get("Labels")
        label = labels.get(MANIFEST_LABEL) if isinstance(labels, dict) else None
        if not isinstance(label, str):
            raise ImageError(f"cannot use the image {wanted}", "our agent is not in it: it lacks our label", fix)
        found = manifest.decode(label.encode(), f"the guest image {wanted}")
        if found.guest_code != read_guest_code().digest:
            why = "another version of x07-sandbox made it, and their agents may not understand each other"
            raise ImageError(f"cannot use the image {wanted}", why, fix)
        return OpenImage(fds={}, manifest=msgspec.structs.replace(found, digest=digest))

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - nothing boots
        """What the engine can hold here. Raises HostError where it cannot run, or would ignore a limit."""
        client = self._engine()
        told = self._told(client)
        if gaps := engine_gaps(self._kind, told):
            why = (
                f"{self.name} would ignore the limit on {' and '.join(gaps)} here (rootless, or without control groups)"
            )
            raise HostError(f"cannot use {self.name}", why, "Use control groups of version 2, or run as root")
        warning = "the program's system calls meet this host's own kernel"
        proof = f"{self.name} answered, and holds limits on memory and tasks"
        return Availability(features=container_features(), proof=proof, warnings=(warning,))

    def _told(self, client: Engine) -> dict[str, Any]:
        answer = client.call("info", "--format", "json" if client.name == "podman" else "{{json .}}")
        try:
            told: dict[str, Any] = json.loads(answer.text) if not answer.status else {}
        except ValueError:
            told = {}
        if not told or told.get("ServerErrors"):
            why = answer.error or str(told.get("ServerErrors", "it says nothing of itself"))[:300]
            raise HostError(f"cannot use {self.name}", why, f"See whether it answers: {self.name} info")
        return told

    def _engine(self) -> Engine:
        client = engine(self._kind)
        if client.name == "podman" and _needs_runc():
            return msgspec.structs.replace(client, options=("--runtime", "runc"))
        return client

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job, greeted. Raises NoAnswerError, BackendError, HostError."""
        assert job.kind.image is not None  # noqa: S101 - for the type checker
        with started(self._engine(), job, job.kind.image) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def list_owned(self) -> Sequence[JobRecord]:
        """Jobs of this user that are not recorded as gone."""
        return live_records(self.name)

    def stop(self, record: JobRecord) -> bool:
        """Remove the container of a record, and what the record's folder holds for it; whether it is proven gone."""
        return stop_recorded(
            record, lambda _stored: self._removed(record) and remove_files(record.folder), signals=False
        )

    def _removed(self, record: JobRecord) -> bool:
        client = self._engine()
        if (other := recorded_engine(record.folder)) not in {"", client.place}:
            fix = f"Set X07_VM_{self.name.upper()}_BIN and DOCKER_HOST as they were"
            raise BackendError("cannot stop the container", f"it was started with another {self.name}: {other}", fix)
        answer = client.call("inspect", "--type", "container", container_name(record))
        if answer.absent:
            return True
        made = answer.only(self.name)
        # Whoever may use the engine can call a container as they like.
        return labels_of(made).get("io.x07.run_id") == record.job_id and remove(client, str(made.get("Id", "")))

    def orphans(self) -> Sequence[Orphan]:
        """Containers with our label. None of an engine that does not answer: most users have none there."""
        try:
            client = self._engine()
        except HostError:
            return ()
        listed = client.call("ps", "--all", "--no-trunc", "--quiet", "--filter", "label=io.x07.schema=1")
        ids = [word for word in listed.text.split() if is_id(word)][:_ORPHANS_MAX]
        if listed.status or not ids:
            return ()
        found = []
        for one in ids:  # one by one: any of them may go meanwhile, and would fail the call for all
            answer = client.call("inspect", "--type", "container", one)
            if not answer.status:
                found.append(Orphan(id=one, labels=labels_of(answer.only(self.name))))
        return found

    def remove(self, orphan: Orphan) -> bool:
        """Remove one of them; whether it is proven gone."""
        return is_id(orphan.id) and remove(self._engine(), orphan.id)


def _needs_runc() -> bool:
    """Whether crun, podman's default, would refuse this host: all of version 1, and one of version 2 beside it."""
    hybrid = all(Path("/sys/fs/cgroup", name).exists() for name in ("memory", "unified/cgroup.procs"))
    return hybrid and any(os.access(path, os.X_OK) for path in ("/usr/sbin/runc", "/usr/bin/runc"))
