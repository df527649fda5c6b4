"""What the backends share that run a job in a container: the backend itself, its images, and the started container."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.backends.base import Availability, Job, greet
from x07_sandbox.backends.container import reaper
from x07_sandbox.backends.container.runtime import ContainerSpec, Runtime, is_ours
from x07_sandbox.backends.engines import DEFAULT_REFERENCE
from x07_sandbox.backends.jailed import Ends, RunningAgent
from x07_sandbox.backends.prerequisites import Need
from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.errors import BackendError, Flag, HostError, ImageError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import boot_ms, open_pidfd
from x07_sandbox.host.paths import raised_as, read_bounded
from x07_sandbox.host.processes import Launch, identify, launch, own_identity
from x07_sandbox.host.variables import text
from x07_sandbox.images import store
from x07_sandbox.images.store import installed_code
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import LEAVES_TREE, NO_ROOT, NOT_OBSERVED, VM_CAPABILITIES, Features
from x07_sandbox.records.runs import JobRecord, create_record, drop_unstarted, mark_done, write_owner
from x07_sandbox.records.stopping import Orphan, stop_recorded

_REFERENCE_MAX: Final = 512
_EXIT_S: Final = 10.0
_RESOLV_CONF: Final = "resolv.conf"
_ENGINE: Final = "engine"
_ENGINE_MAX: Final = 8192
GAPS: Final = {
    "connect-fails": "the relay accepts a connection before the gate decides, and resets it if the gate refuses",
    "observed-connections": NOT_OBSERVED,
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    "damaged-image": "the engine stores the image, and only its id is checked",
}
# What a container with our agent can enforce.
_HELD: Final = VM_CAPABILITIES - {"held-connections", "observed-connections", "command-groups"}
SHARED_KERNEL: Final = Features(isolation="container", own_kernel=False, can_enforce=_HELD)
OWN_MACHINE: Final = Features(isolation="vm-hardware", own_kernel=True, can_enforce=_HELD)
OWN_MACHINE_GAPS: Final = GAPS | {"root-inside": "in its VM, the program is in a container with few rights"}


class ContainerBackend(ABC):
    """The common part of the backends that run a job in a container.

    variables: those that select the runtime, for an error about a job that was started with another one.
    """

    name: str
    uses_image = True
    cloning = None
    snapshots = None
    needs: Sequence[Need]
    known_gaps: Mapping[str, str] = GAPS
    features = SHARED_KERNEL
    warnings: tuple[str, ...] = ("the program's system calls reach this host's kernel",)
    variables: tuple[str, ...]

    @abstractmethod
    def _runtime(self) -> Runtime:
        """Return the runtime of this host. Raises HostError."""

    @abstractmethod
    def _prove(self, *, boot: bool) -> str:
        """Check that the runtime works, and return the proof. Raises HostError, BackendError. boot: see `probe`."""

    def least_features(self) -> Features:
        """Return the features of a container that runs x07's agent."""
        return self.features

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - needs no image
        """Return what a container can limit here. Raises HostError, BackendError if the runtime cannot be used."""
        return Availability(features=self.features, proof=self._prove(boot=boot), warnings=self.warnings)

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[ContainerInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        assert job.kind.image is not None
        with _started(self._runtime(), job, job.kind.image) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def stop(self, record: JobRecord) -> bool:
        """Remove a recorded job's container and files. Return whether the container is proven gone."""
        return stop_recorded(
            record, lambda _stored: self._removed(record) and _remove_files(record.folder), signals=False
        )

    def _removed(self, record: JobRecord) -> bool:
        runtime = self._runtime()
        if (other := _recorded_runtime(record.folder)) not in {"", runtime.place}:
            why = f"it was started with another {self.name}: {other}"
            values = "value that it had" if len(self.variables) == 1 else "values that they had"
            fix = f"Set {' and '.join(self.variables)} to the {values} when it was started"
            raise BackendError("cannot stop the container", why, fix)
        name = container_name(record)
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
        return is_ours(orphan.id) and self._runtime().remove(orphan.id)


class WithImages(ContainerBackend):
    """The common part of the backends whose runtime stores the images."""

    image_variable = ""

    @abstractmethod
    def _image(self, wanted: str) -> tuple[str, object]:
        """Return the id and the labels of an image. Raises HostError, BackendError, and ImageError (`_missing`)."""

    def _missing(self, wanted: str, why: str = "") -> ImageError:
        why = why or f"{self.name} does not have it"
        return ImageError(f"there is no guest image {wanted}", why, self.fix_image)

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
        if not identity:
            raise ImageError(f"cannot use the image {wanted}", f"{self.name} reports no id for it", self.fix_image)
        if not (data := store.manifest_in(labels)):
            why = "it lacks x07's labels, so x07's agent is not in it"
            raise ImageError(f"cannot use the image {wanted}", why, self.fix_image)
        found = store.decode_manifest(data, f"the guest image {wanted}")
        if found.guest_code != installed_code():
            why = "another version of x07-sandbox made it, so its agent may not be compatible"
            raise ImageError(f"cannot use the image {wanted}", why, self.fix_image)
        digest = f"sha256:{identity.removeprefix('sha256:')}"
        return OpenImage(fds={}, manifest=msgspec.structs.replace(found, digest=digest))


class ContainerInstance(RunningAgent):
    """A started container. reaper_fd: readable once the reaper has ended; None until it is known."""

    reaper_fd: int | None = None
    spec: ContainerSpec

    def __init__(
        self, runtime: Runtime, record: JobRecord, container: str, client: subprocess.Popen[bytes], ends: Ends
    ) -> None:
        self.record = record
        self.jail = f"a container of {runtime.name}"
        self.pidfd = open_pidfd(client.pid)
        self._runtime = runtime
        self._container = container
        self.client = client
        self.channel_fd = ends.channel_fd
        self.shown = (ends.errors,)
        self._gone = False

    def side_fds(self) -> tuple[int, ...]:
        """Return the descriptors of the error stream and the reaper."""
        return super().side_fds() + (() if self.reaper_fd is None else (self.reaper_fd,))

    def drain(self, fd: int) -> None:
        """Read the error stream, or end the run because nothing but its reaper would keep its deadline."""
        if fd == self.reaper_fd:
            self.reaper_fd = None
            self.notes += ("the run was ended because the container's reaper had ended",)
            self.client.kill()
        else:
            super().drain(fd)

    def exit_status(self) -> int | None:
        """Return the exit status of the runtime's client, which is that of the container."""
        return self.client.poll()

    def stop(self) -> bool:
        """Remove the container and return whether it is proven gone. May be called again."""
        if not self._gone:
            self._gone = self._runtime.remove(self._container)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.client.wait(_EXIT_S)
            if self.client.poll() is None:
                self.client.kill()
                self.client.wait()
        return self._gone


@contextlib.contextmanager
def _started(runtime: Runtime, job: Job, image: OpenImage) -> Iterator[ContainerInstance]:
    """Create and start a container, and remove it when the context ends. Raises BackendError, HostError."""
    record = create_record(job.claim, backend=runtime.name, image_digest=image.manifest.digest)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        # First of all: if this process is killed, the sweep finds what it left by the record's name.
        write_owner(record, runner=own_identity(), processes={}, cgroups=())
        ends = Ends(stack)
        runner_r, runner_w = os.pipe()
        ends.given.add(runner_r)
        stack.callback(os.close, runner_w)
        instance = reaper_process = None
        try:
            spec = _spec(runtime, job, record, image)
            reaper_process = _start_reaper(runtime, record, job.claim.deadline_s, runner_r)
            container = runtime.create(spec)
            argv, env = runtime.attach_argv(container), runtime.client.env
            client = launch(Launch(argv=argv, pass_fds=(), stderr_fd=ends.stderr_fd, stdio_fd=ends.far_fd, env=env))
            instance = ContainerInstance(runtime, record, container, client, ends)
            instance.spec = spec
            instance.reaper_fd = open_pidfd(reaper_process.pid)
            stack.callback(os.close, instance.reaper_fd)
            ends.given.close()
            # The job's processes are the runtime's; these two only serve it.
            found = {"client": identify(instance.client.pid), "reaper": identify(reaper_process.pid)}
            processes = {name: identity for name, identity in found.items() if identity is not None}
            write_owner(record, runner=own_identity(), processes=processes, cgroups=())
            yield instance
        finally:
            if instance is not None:
                _hang_up(instance.channel_fd)
                stack.callback(os.close, instance.pidfd)
            if reaper_process is not None:
                stack.callback(_leave, reaper_process)
            gone = runtime.remove(container_name(record)) if instance is None else instance.stop()
            _remove_files(record.folder)
            if gone:
                with contextlib.suppress(OSError):
                    os.write(runner_w, b"g")
                with contextlib.suppress(HostError):  # on a full disk the sweep records it later
                    mark_done(record)
                if reaper_process is not None:
                    reaper_process.wait()


def _leave(reaper_process: subprocess.Popen[bytes]) -> None:
    """Let the reaper go on if the container could not be removed. Its object would warn about that."""
    if reaper_process.poll() is None:
        reaper_process.returncode = 0


def _hang_up(channel_fd: int) -> None:
    """End the input of the agent, which then exits. The runtime removes an ended container sooner than it kills one."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(channel_fd)) as channel:
        channel.shutdown(socket.SHUT_WR)


def _write_files(runtime: Runtime, record: JobRecord, *, network: bool) -> Path:
    """Write the container's files into the folder of the job's record. Return the file for /etc/resolv.conf."""
    resolv_conf = record.folder / _RESOLV_CONF
    try:
        (record.folder / _ENGINE).write_text(runtime.place, encoding="utf-8")
        resolv_conf.write_text(RESOLV_CONF if network else "", encoding="ascii")
        resolv_conf.chmod(0o644)
    except OSError as exc:
        why = f"{exc.strerror} ({exc.filename})"
        raise HostError("cannot make the job's files", why, "Free disk space") from exc
    return resolv_conf


def _remove_files(folder: Path) -> bool:
    """Remove the container's files. Return True. Raises OSError."""
    for name in (_RESOLV_CONF, _ENGINE):
        (folder / name).unlink(missing_ok=True)
    return True


def _recorded_runtime(folder: Path) -> str:
    """Return the runtime that started a job's container, or "" if that is unknown."""
    try:
        return read_bounded(folder / _ENGINE, "record", _ENGINE_MAX).decode("utf-8", "replace")
    except (OSError, UsageError):
        return ""


def _spec(runtime: Runtime, job: Job, record: JobRecord, image: OpenImage) -> ContainerSpec:
    assert job.needs is not None  # sessions/job sets them
    spec = ContainerSpec(
        runtime=runtime.name,
        image=image.manifest.digest,
        name=container_name(record),
        mark=record.mark,
        labels=record.labels(),
        needs=job.needs,
        resolv_conf=str(_write_files(runtime, record, network=job.kind.network)),
        network=job.kind.network,
    )
    for path in (spec.resolv_conf, *spec.tmpfs()):
        if "," in path or ":" in path:
            why = f"{path!r} has a comma or a colon, which {runtime.name} does not accept in a path"
            fix = ("Rename the folder, or use ", Flag("--sandbox-backend vm"))
            raise HostError("cannot mount a folder in the container", why, fix)
    return spec


def _start_reaper(runtime: Runtime, record: JobRecord, deadline_s: int, runner_fd: int) -> subprocess.Popen[bytes]:
    """Start the process that removes the container after its deadline or this process's end. Raises BackendError."""
    until = (boot_ms() + settings.CLEANUP_MS) / 1000 + deadline_s
    removing = runtime.removing_argv(container_name(record))
    argv = [sys.executable, "-I", "-S", reaper.__file__, str(record.folder), str(until), str(runner_fd), *removing]
    with raised_as(BackendError, "cannot start the reaper", "Run x07 doctor"):
        return launch(Launch(argv=argv, pass_fds=(runner_fd,), stderr_fd=subprocess.DEVNULL, env=runtime.client.env))


def container_name(record: JobRecord) -> str:
    """Return the name of a job's container."""
    return f"x07-{record.job_id}"
