"""A job's container: create, check, start and remove."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from x07_sandbox.backends.base import Greeting, Job, StartMode
from x07_sandbox.backends.container import reaper
from x07_sandbox.backends.container.create import ContainerSpec, create_argv, differences
from x07_sandbox.backends.engines import Engine, container_id
from x07_sandbox.backends.jailed import BoundedStream, RunningAgent, error_stream, socket_ends
from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.errors import BackendError, Flag, HostError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.close_on_fork import FdGroup
from x07_sandbox.host.linux import boot_ms, open_pidfd
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.processes import identify, own_identity
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jobs.launcher import Launch, launch
from x07_sandbox.jobs.record import JobRecord, create_record, drop_unstarted, mark_done, write_owner

_GONE_S: Final = 20.0
_EXIT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.05
_RESOLV_CONF: Final = "resolv.conf"
_ENGINE: Final = "engine"
_ENGINE_MAX: Final = 8192


class ContainerInstance(RunningAgent):
    """A started container. reaper_fd: readable once the reaper has ended; None until it is known."""

    reaper_fd: int | None = None
    channel_fd: int
    net_fd: int | None = None
    notes: tuple[str, ...] = ()
    greeting: Greeting
    start_mode: StartMode = "cold"

    def __init__(
        self, engine: Engine, record: JobRecord, container: str, client: subprocess.Popen[bytes], errors: BoundedStream
    ) -> None:
        self.record = record
        self.jail = f"a container of {engine.name}"
        self.pidfd = open_pidfd(client.pid)
        self._engine = engine
        self._container = container
        self.client = client
        self.shown = (errors,)
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
        """Return the exit status of the engine's client, which is that of the container."""
        return self.client.poll()

    def stop(self) -> bool:
        """Remove the container and return whether it is proven gone. May be called again."""
        if not self._gone:
            self._gone = remove(self._engine, self._container)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.client.wait(_EXIT_S)
            if self.client.poll() is None:
                self.client.kill()
                self.client.wait()
        return self._gone


@contextlib.contextmanager
def started(engine: Engine, job: Job, image: OpenImage) -> Iterator[ContainerInstance]:
    """Create and start a container, and remove it when the context ends. Raises BackendError, HostError."""
    record = create_record(job.claim, backend=engine.name, image_digest=image.manifest.digest)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        # First of all: if this process is killed, the sweep finds what it left by the record's name.
        write_owner(record, runner=own_identity(), processes={}, cgroups=())
        runner_r, runner_w = os.pipe()
        given = FdGroup()
        stack.callback(given.close)
        given.add(runner_r)
        stack.callback(os.close, runner_w)
        instance = reaper_process = None
        try:
            files = _Files(engine, record, network=job.kind.network)
            spec = _spec(engine, job, record, image, files)
            reaper_process = _start_reaper(engine, record, job.claim.deadline_s, runner_r)
            container = _created(engine, spec)
            channel_fd, far_fd = socket_ends(stack, given)
            errors, stderr_fd = error_stream(stack, given)
            argv = engine.argv("start", "--attach", "--interactive", container)
            client = launch(Launch(argv=argv, pass_fds=(), stderr_fd=stderr_fd, stdio_fd=far_fd, env=engine.env))
            instance = ContainerInstance(engine, record, container, client, errors)
            instance.channel_fd = channel_fd
            instance.reaper_fd = open_pidfd(reaper_process.pid)
            stack.callback(os.close, instance.reaper_fd)
            given.close()
            # The job's processes are the engine's; these two only serve it.
            found = {"client": identify(instance.client.pid), "reaper": identify(reaper_process.pid)}
            processes = {name: identity for name, identity in found.items() if identity is not None}
            write_owner(record, runner=own_identity(), processes=processes, cgroups=())
            yield instance
        finally:
            gone = remove(engine, container_name(record)) if instance is None else instance.stop()
            remove_files(record.folder)
            if gone:
                with contextlib.suppress(OSError):
                    os.write(runner_w, b"g")
                with contextlib.suppress(HostError):  # on a full disk the sweep records it later
                    mark_done(record)
            if gone and reaper_process is not None:
                reaper_process.wait()
            if instance is not None:
                os.close(instance.pidfd)


class _Files:
    """The container's files in the folder of the job's record."""

    def __init__(self, engine: Engine, record: JobRecord, *, network: bool) -> None:
        self.resolv_conf = record.folder / _RESOLV_CONF
        try:
            (record.folder / _ENGINE).write_text(engine.place, encoding="utf-8")
            self.resolv_conf.write_text(RESOLV_CONF if network else "", encoding="ascii")
            self.resolv_conf.chmod(0o644)
        except OSError as exc:
            why = f"{exc.strerror} ({exc.filename})"
            raise HostError("cannot make the job's files", why, "Free disk space") from exc


def remove_files(folder: Path) -> bool:
    """Remove the container's files. Return True. Raises OSError."""
    for name in (_RESOLV_CONF, _ENGINE):
        (folder / name).unlink(missing_ok=True)
    return True


def recorded_engine(folder: Path) -> str:
    """Return the engine that started a job's container, or "" if that is unknown."""
    try:
        return read_bounded(folder / _ENGINE, "record", _ENGINE_MAX).decode("utf-8", "replace")
    except (OSError, UsageError):
        return ""


def _spec(engine: Engine, job: Job, record: JobRecord, image: OpenImage, files: _Files) -> ContainerSpec:
    assert job.needs is not None  # noqa: S101 - runs/job sets them
    spec = ContainerSpec(
        engine=engine.name,
        image=image.manifest.digest,
        name=container_name(record),
        mark=record.mark,
        labels=record.labels(),
        needs=job.needs,
        resolv_conf=str(files.resolv_conf),
        network=job.kind.network,
    )
    for path in (spec.resolv_conf, *spec.tmpfs()):
        if "," in path or ":" in path:
            why = f"{path!r} has a comma or a colon, which {engine.name} does not accept in a path"
            fix = ("Rename the folder, or use ", Flag("--sandbox-backend vm"))
            raise HostError("cannot mount a folder in the container", why, fix)
    return spec


def _created(engine: Engine, spec: ContainerSpec) -> str:
    """Create the container, check it against *spec*, and return its id. Raises BackendError."""
    answer = engine.call(*create_argv(spec))
    container = container_id(answer)
    if not container:
        raise BackendError("cannot create the container", answer.error or f"status {answer.status}", "Run x07 doctor")
    made = engine.call("inspect", "--type", "container", container).single_object(engine.name)
    if found := differences(spec, made):
        why = f"{engine.name} changed {', '.join(found)}"
        fix = f"Check {engine.name}'s configuration, which applies to every container"
        raise BackendError("cannot use the container", why, fix)
    return container


def _start_reaper(engine: Engine, record: JobRecord, deadline_s: int, runner_fd: int) -> subprocess.Popen[bytes]:
    """Start the process that removes the container after its deadline or this process's end. Raises BackendError."""
    until = (boot_ms() + settings.CLEANUP_MS) / 1000 + deadline_s
    removing = engine.argv(*_removing(engine, container_name(record)))
    argv = [sys.executable, "-I", "-S", reaper.__file__, str(record.folder), str(until), str(runner_fd), *removing]
    with raised_as(BackendError, "cannot start the reaper", "Run x07 doctor"):
        return launch(Launch(argv=argv, pass_fds=(runner_fd,), stderr_fd=subprocess.DEVNULL, env=engine.env))


def container_name(record: JobRecord) -> str:
    """Return the name of a job's container."""
    return f"x07-{record.job_id}"


def _removing(engine: Engine, container: str) -> tuple[str, ...]:
    return ("rm", "--force", *(("--time", "0") if engine.name == "podman" else ()), "--volumes", container)


def remove(engine: Engine, container: str) -> bool:
    """Kill and remove a container by id or name and return whether it is proven gone. Raises BackendError."""
    deadline = Deadline.after(_GONE_S)
    while not deadline.passed():
        done = engine.call(*_removing(engine, container))
        if not done.status or engine.call("inspect", "--type", "container", container).absent:
            return True
        time.sleep(_LOOK_AGAIN_S)  # docker: "removal is already in progress"
    return False


def labels_of(made: dict[str, Any]) -> dict[str, str]:
    """Return the labels of a container that the engine described, as text."""
    labels = (made.get("Config") or {}).get("Labels") or {}
    return {str(key)[:256]: str(value)[:4096] for key, value in labels.items()}
