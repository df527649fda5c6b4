"""A job's container: made, checked, started, and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.backends.container import reaper
from x07_sandbox.backends.container.create import Wanted, create_argv, differences
from x07_sandbox.backends.engines import container_id
from x07_sandbox.backends.jailed import OwnAgent, error_stream, socket_ends
from x07_sandbox.channel.egress import RESOLV_CONF
from x07_sandbox.errors import BackendError, HostError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.clocks import Deadline
from x07_sandbox.host.close_on_fork import FdGroup
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.host.poll import wait_readable
from x07_sandbox.host.processes import identify, own_identity
from x07_sandbox.jobs.launcher import Launch, launch
from x07_sandbox.jobs.record import create_record, drop_unstarted, mark_done, write_owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from x07_sandbox.backends.base import Greeting, Job, StartMode
    from x07_sandbox.backends.engines import Engine
    from x07_sandbox.host.bounded_stream import BoundedStream
    from x07_sandbox.images.verify import OpenImage
    from x07_sandbox.jobs.record import JobRecord

_GONE_S: Final = 20.0
_EXIT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.05
_NET: Final = "net"
_RESOLV_CONF: Final = "resolv.conf"
_ENGINE: Final = "engine"
_ENGINE_MAX: Final = 8192


class ContainerInstance(OwnAgent):
    """A started container, as `backends/base.Instance` has it."""

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
        self.pidfd = os.pidfd_open(client.pid)
        self._engine = engine
        self._container = container
        self._client = client
        self._errors = errors
        self._gone = False

    @property
    def client_pid(self) -> int:
        """The engine's client."""
        return self._client.pid

    def exit_status(self) -> int | None:
        """How the engine's client ended; it passes on the container's status."""
        return self._client.poll()

    def stop(self) -> bool:
        """Remove the container; whether it is proven gone. Safe to call again."""
        if not self._gone:
            self._gone = remove(self._engine, self._container)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._client.wait(_EXIT_S)
            if self._client.poll() is None:
                self._client.kill()
                self._client.wait()
        return self._gone


@contextlib.contextmanager
def started(engine: Engine, job: Job, image: OpenImage) -> Iterator[ContainerInstance]:
    """Make and start a container; on the way out it is gone and its record says so. Raises BackendError, HostError."""
    record = create_record(job.claim, backend=engine.name, image_digest=image.manifest.digest)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        # Before there is anything: whatever is left by a runner killed from here on is found by the record's name.
        write_owner(record, runner=own_identity(), processes={}, cgroups=())
        runner_r, runner_w = os.pipe2(os.O_CLOEXEC)
        given = FdGroup()
        stack.callback(given.close)
        given.add(runner_r)
        stack.callback(os.close, runner_w)
        instance = watching = None
        try:
            files = _Files(engine, record, network=job.kind.network, stack=stack)
            wanted = _wanted(engine, job, record, image, files)
            watching = _reaper(engine, record, job.claim.deadline_s, runner_r)
            container = _created(engine, wanted)
            instance = _running(engine, record, container, stack, given)
            given.close()
            _record_processes(record, instance, watching)
            if files.listener is not None:
                instance.net_fd = files.accepted(instance, stack)
            yield instance
        finally:
            gone = remove(engine, container_name(record)) if instance is None else instance.stop()
            remove_files(record.folder)
            if gone:
                with contextlib.suppress(OSError):
                    os.write(runner_w, b"g")
                with contextlib.suppress(HostError):  # a full disk: the sweep will find that nothing is left
                    mark_done(record)
            if gone and watching is not None:
                watching.wait()
            if instance is not None:
                os.close(instance.pidfd)


def _record_processes(record: JobRecord, instance: ContainerInstance, watching: subprocess.Popen[bytes]) -> None:
    """Write down that the job has begun. Its processes are the engine's; these two are only about it."""
    found = {"client": identify(instance.client_pid), "reaper": identify(watching.pid)}
    processes = {name: identity for name, identity in found.items() if identity is not None}
    write_owner(record, runner=own_identity(), processes=processes, cgroups=())


class _Files:
    """What the container has of the record's folder: the gate's socket, and /etc/resolv.conf."""

    def __init__(self, engine: Engine, record: JobRecord, *, network: bool, stack: contextlib.ExitStack) -> None:
        self.resolv_conf = record.folder / _RESOLV_CONF
        self.net = record.folder / _NET
        self.listener: socket.socket | None = None
        try:
            (record.folder / _ENGINE).write_text(engine.place, encoding="utf-8")
            self.resolv_conf.write_text(RESOLV_CONF if network else "", encoding="ascii")
            self.resolv_conf.chmod(0o644)
            if network:
                self.net.mkdir(mode=0o755)
                self.net.chmod(0o755)
                self.listener = stack.enter_context(self._listening())
        except OSError as exc:
            raise HostError(
                "cannot make the job's files", f"{exc.filename}: {exc.strerror}", "Free space there"
            ) from exc

    def _listening(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        folder_fd = os.open(self.net, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # by the descriptor: such a name has room for 107 bytes
            listener.bind(f"/proc/self/fd/{folder_fd}/relay")
        finally:
            os.close(folder_fd)
        (self.net / "relay").chmod(0o666)
        listener.listen(1)
        return listener

    def accepted(self, instance: ContainerInstance, stack: contextlib.ExitStack) -> int:
        """The agent's connection; nobody else can make one then. Raises BackendError."""
        assert self.listener is not None  # noqa: S101 - for the type checker
        deadline = Deadline.after(settings.BOOT_S)
        while not wait_readable(self.listener.fileno(), 0.05):
            if instance.exit_status() is not None or deadline.passed():
                said = " ".join(instance.console_tail().split())[-300:]
                raise BackendError("the container did not start", said or "its agent never came", "Run x07 doctor")
        sock, _ = self.listener.accept()
        self.listener.close()
        (self.net / "relay").unlink()
        fd = sock.detach()
        stack.callback(os.close, fd)
        os.set_blocking(fd, False)
        return fd


def remove_files(folder: Path) -> bool:
    """Remove what a record's folder holds for its container; whether it is gone."""
    shutil.rmtree(folder / _NET, ignore_errors=True)
    for name in (_RESOLV_CONF, _ENGINE):
        (folder / name).unlink(missing_ok=True)
    return not os.path.lexists(folder / _NET)


def recorded_engine(folder: Path) -> str:
    """Which engine has the container of a job, by its record's folder; empty where that is not known."""
    try:
        return read_bounded(folder / _ENGINE, "record", _ENGINE_MAX).decode("utf-8", "replace")
    except (OSError, UsageError):
        return ""


def _wanted(engine: Engine, job: Job, record: JobRecord, image: OpenImage, files: _Files) -> Wanted:
    assert job.needs is not None  # noqa: S101 - runs/job gives them
    wanted = Wanted(
        engine=engine.name,
        image=image.manifest.digest,
        name=container_name(record),
        mark=record.mark,
        labels=record.labels(),
        needs=job.needs,
        resolv_conf=str(files.resolv_conf),
        net_folder=str(files.net) if job.kind.network else "",
    )
    for path in (wanted.resolv_conf, *wanted.tmpfs()):
        if "," in path or ":" in path:
            why = f"{path!r} has a comma or a colon, which {engine.name} takes for the end of a name"
            raise HostError("cannot bring a folder into a container", why, "Rename it, or use --sandbox-backend vm")
    return wanted


def _created(engine: Engine, wanted: Wanted) -> str:
    """The id of a new container, which is what was asked for. Raises BackendError."""
    answer = engine.call(*create_argv(wanted))
    container = container_id(answer)
    if not container:
        raise BackendError("cannot make the container", answer.error or f"status {answer.status}", "Run x07 doctor")
    made = engine.call("inspect", "--type", "container", container).only(engine.name)
    if found := differences(wanted, made):
        why = f"{engine.name} made it other than was asked for: {', '.join(found)}"
        fix = f"Look at {engine.name}'s configuration: it changes every container"
        raise BackendError("cannot use the container", why, fix)
    return container


def _running(
    engine: Engine, record: JobRecord, container: str, stack: contextlib.ExitStack, given: FdGroup
) -> ContainerInstance:
    channel_fd, far_fd = socket_ends(stack, given)
    errors, stderr_fd = error_stream(stack, given)
    argv = engine.argv("start", "--attach", "--interactive", container)
    client = launch(Launch(argv=argv, pass_fds=(), stderr_fd=stderr_fd, stdio_fd=far_fd, env=engine.env))
    instance = ContainerInstance(engine, record, container, client, errors)
    instance.channel_fd = channel_fd
    return instance


def _reaper(engine: Engine, record: JobRecord, deadline_s: int, runner_fd: int) -> subprocess.Popen[bytes]:
    """What removes the container when the time is up or this process is gone. Raises BackendError."""
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + deadline_s + settings.CLEANUP_MS / 1000
    removing = engine.argv(*_removing(engine, container_name(record)))
    argv = [sys.executable, "-I", "-S", reaper.__file__, str(record.folder), str(until), str(runner_fd), *removing]
    try:
        return launch(Launch(argv=argv, pass_fds=(runner_fd,), stderr_fd=subprocess.DEVNULL, env=engine.env))
    except OSError as exc:
        raise BackendError("cannot start the reaper", exc.strerror or str(exc), "Run x07 doctor") from exc


def container_name(record: JobRecord) -> str:
    """Its container's name."""
    return f"x07-{record.job_id}"


def _removing(engine: Engine, container: str) -> tuple[str, ...]:
    return ("rm", "--force", *(("--time", "0") if engine.name == "podman" else ()), "--volumes", container)


def remove(engine: Engine, container: str) -> bool:
    """Kill and remove a container by its id or name; whether it is proven gone. Raises BackendError."""
    deadline = Deadline.after(_GONE_S)
    while not deadline.passed():
        engine.call(*_removing(engine, container))
        if engine.call("inspect", "--type", "container", container).absent:
            return True
        time.sleep(_LOOK_AGAIN_S)  # "removal is already in progress", as docker has it
    return False


def labels_of(made: dict[str, Any]) -> dict[str, str]:
    """The labels of an inspected container, as text."""
    labels = (made.get("Config") or {}).get("Labels") or {}
    return {str(key)[:256]: str(value)[:4096] for key, value in labels.items()}
