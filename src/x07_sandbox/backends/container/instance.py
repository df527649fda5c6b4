"""A job's container: create, check, start and remove."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from x07_sandbox.backends.base import Greeting, Job, StartMode
from x07_sandbox.backends.container import reaper
from x07_sandbox.backends.container.create import ContainerSpec
from x07_sandbox.backends.container.runtime import Runtime
from x07_sandbox.backends.jailed import BoundedStream, RunningAgent, error_stream, socket_ends
from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.errors import BackendError, Flag, HostError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.close_on_fork import FdGroup
from x07_sandbox.host.linux import boot_ms, open_pidfd
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.processes import Launch, identify, launch, own_identity
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.records.record import JobRecord, create_record, drop_unstarted, mark_done, write_owner

_EXIT_S: Final = 10.0
_RESOLV_CONF: Final = "resolv.conf"
_ENGINE: Final = "engine"
_ENGINE_MAX: Final = 8192


class ContainerInstance(RunningAgent):
    """A started container. reaper_fd: readable once the reaper has ended; None until it is known."""

    reaper_fd: int | None = None
    spec: ContainerSpec
    channel_fd: int
    net_fd: int | None = None
    notes: tuple[str, ...] = ()
    greeting: Greeting
    start_mode: StartMode = "cold"

    def __init__(
        self,
        runtime: Runtime,
        record: JobRecord,
        container: str,
        client: subprocess.Popen[bytes],
        errors: BoundedStream,
    ) -> None:
        self.record = record
        self.jail = f"a container of {runtime.name}"
        self.pidfd = open_pidfd(client.pid)
        self._runtime = runtime
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
def started(runtime: Runtime, job: Job, image: OpenImage) -> Iterator[ContainerInstance]:
    """Create and start a container, and remove it when the context ends. Raises BackendError, HostError."""
    record = create_record(job.claim, backend=runtime.name, image_digest=image.manifest.digest)
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
            files = _Files(runtime, record, network=job.kind.network)
            spec = _spec(runtime, job, record, image, files)
            reaper_process = _start_reaper(runtime, record, job.claim.deadline_s, runner_r)
            container = runtime.create(spec)
            channel_fd, far_fd = socket_ends(stack, given)
            errors, stderr_fd = error_stream(stack, given)
            argv = runtime.attach_argv(container)
            client = launch(Launch(argv=argv, pass_fds=(), stderr_fd=stderr_fd, stdio_fd=far_fd, env=runtime.env))
            instance = ContainerInstance(runtime, record, container, client, errors)
            instance.spec, instance.channel_fd = spec, channel_fd
            instance.reaper_fd = open_pidfd(reaper_process.pid)
            stack.callback(os.close, instance.reaper_fd)
            given.close()
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
            remove_files(record.folder)
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


class _Files:
    """The container's files in the folder of the job's record."""

    def __init__(self, runtime: Runtime, record: JobRecord, *, network: bool) -> None:
        self.resolv_conf = record.folder / _RESOLV_CONF
        try:
            (record.folder / _ENGINE).write_text(runtime.place, encoding="utf-8")
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


def recorded_runtime(folder: Path) -> str:
    """Return the runtime that started a job's container, or "" if that is unknown."""
    try:
        return read_bounded(folder / _ENGINE, "record", _ENGINE_MAX).decode("utf-8", "replace")
    except (OSError, UsageError):
        return ""


def _spec(runtime: Runtime, job: Job, record: JobRecord, image: OpenImage, files: _Files) -> ContainerSpec:
    assert job.needs is not None  # noqa: S101 - sessions/job sets them
    spec = ContainerSpec(
        runtime=runtime.name,
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
        return launch(Launch(argv=argv, pass_fds=(runner_fd,), stderr_fd=subprocess.DEVNULL, env=runtime.env))


def container_name(record: JobRecord) -> str:
    """Return the name of a job's container."""
    return f"x07-{record.job_id}"
