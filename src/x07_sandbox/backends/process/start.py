"""Starting an agent on this host below the supervisor, and ending it with all that it has started."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.jailed import Given, Jailed, end_supervisor, inner_process
from x07_sandbox.backends.process.agentcode import agent_code
from x07_sandbox.backends.process.view import FILES, Sandbox, agent_argv, sandbox_argv, scratch_bytes, this_system
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.bounded_stream import SideStream
from x07_sandbox.host.processes import own_identity
from x07_sandbox.host.troubles import need_own_proc
from x07_sandbox.jail.bwrap import may_nest, supervisor_argv
from x07_sandbox.jail.cgroups import ProgramGroups, program_groups
from x07_sandbox.jail.uids import lease_uid
from x07_sandbox.jobs.launcher import Launch, launch
from x07_sandbox.jobs.record import drop_unstarted, mark_done, write_owner

if TYPE_CHECKING:
    import subprocess

    from x07_sandbox.backends.base import Greeting, StartMode
    from x07_sandbox.host.processes import Identity
    from x07_sandbox.jobs.record import JobRecord

_CONFINED_DEPTH: Final = 2  # below the supervisor: bubblewrap, which waits, and the agent
_FREE_DEPTH: Final = 1


class ProcessInstance(Jailed):
    """An agent on this host. Made by `start_confined` or `start_unconfined`, which also end it."""

    net_fd: int | None = None
    start_mode: StartMode = "cold"
    notes: tuple[str, ...] = ()
    greeting: Greeting

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        child: subprocess.Popen[bytes],
        inner: Identity,
        record: JobRecord,
        remove: Callable[[], bool],
        cgroups: tuple[str, ...],
        *,
        channel_fd: int,
        errors: SideStream,
        jail: str,
    ) -> None:
        super().__init__(child, inner, record, remove, cgroups)
        self.channel_fd = channel_fd
        self.jail = jail
        self._errors = errors

    def release(self) -> None:
        """Nothing: the agent is ours, and starts no program before the channel says so."""

    def side_fds(self) -> tuple[int, ...]:
        """What agent, bubblewrap and supervisor have to say."""
        return () if self._errors.ended else (self._errors.fd,)

    def drain(self, _fd: int) -> None:
        """Read it, keeping no more than its bound."""
        self._errors.read()

    def console_tail(self) -> str:
        """The last of that, control characters replaced."""
        self._errors.read()
        return self._errors.text()


@contextlib.contextmanager
def start_confined(record: JobRecord, deadline_s: int, controllers: tuple[str, ...] = ()) -> Iterator[ProcessInstance]:
    """A confined agent for a job; on the way out it is gone and its record says so. Raises BackendError, HostError.

    It runs as an ordinary user: as the one that we are, or where that is root, as one that no other job has.
    controllers: those of which it must have a control group, since a plan relies on them.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        need_own_proc()
        code = agent_code(confined=True)
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        given = Given()
        stack.callback(given.close)
        channel_fd, far_fd = _channel(stack, given)
        groups = program_groups(record.job_id, uid=os.geteuid() if uid is None else uid)
        stack.callback(groups.remove)
        if missing := sorted(set(controllers) - set(groups.holds)):
            why = f"the host gave no control group for {' and '.join(missing)}"
            raise HostError("cannot limit the process", why, "Try again; x07 doctor shows what this host gives")
        sandbox = Sandbox(
            system=this_system(),
            mark=record.mark,
            agent_fd=given.add(os.open(code, os.O_RDONLY | os.O_CLOEXEC)),
            file_fds={path: given.add(_text(path, content)) for path, content in FILES.items()},
            channel_fd=far_fd,
            scratch_bytes=scratch_bytes(settings.SCRATCH_BYTES),
            groups=groups.places,
            lock_fd=lock_fd,
        )
        argv = supervisor_argv(
            sandbox_argv(sandbox),
            deadline_s=deadline_s,
            runner_pid=os.getpid(),
            syscalls=host_arch().syscalls,
            nest=may_nest(),
            keep_fd=lock_fd,
            uid=uid,
        )
        passed = [sandbox.agent_fd, *sandbox.file_fds.values(), far_fd, *([] if lock_fd is None else [lock_fd])]
        start = _Start(record, given, channel_fd, _CONFINED_DEPTH, groups)
        jail = f"user namespaces, {'a uid of its own' if uid is not None else 'the user'}; {groups.describe()}"
        yield from start.run(argv, tuple(passed), jail)


@contextlib.contextmanager
def start_unconfined(record: JobRecord, deadline_s: int) -> Iterator[ProcessInstance]:
    """An agent without confinement, with a folder in the record's. Raises BackendError, HostError."""
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        need_own_proc()
        code = agent_code(confined=False)
        folder = files_folder(record)
        try:
            folder.mkdir(mode=0o700)
        except OSError as exc:
            why = f"{folder}: {exc.strerror}"
            raise HostError("cannot make the job's folder", why, "Free space there") from exc
        given = Given()
        stack.callback(given.close)
        channel_fd, far_fd = _channel(stack, given)
        argv = supervisor_argv(
            agent_argv(str(code), "none", str(far_fd), str(folder), record.mark),
            deadline_s=deadline_s,
            runner_pid=os.getpid(),
            syscalls=host_arch().syscalls,
            nest=False,
        )
        start = _Start(record, given, channel_fd, _FREE_DEPTH, ProgramGroups(folders=(), holds=(), places={}), folder)
        yield from start.run(argv, (far_fd,), "none")


class _Start:
    """What both have in common. given: is the child's once it has it. depth: as `inner_process` has it.

    folder: of the job's files, which goes with it.
    """

    def __init__(
        self,
        record: JobRecord,
        given: Given,
        channel_fd: int,
        depth: int,
        groups: ProgramGroups,
        folder: Path | None = None,
    ) -> None:
        self.record = record
        self.given = given
        self.channel_fd = channel_fd
        self.depth = depth
        self.groups = groups
        self.folder = folder

    def remove(self) -> bool:
        """Remove what outlives the processes; whether it is gone."""
        gone = self.groups.remove()
        return (self.folder is None or remove_folder(self.folder)) and gone

    def run(self, argv: list[str], pass_fds: tuple[int, ...], jail: str) -> Iterator[ProcessInstance]:
        """Start it, record it, yield it, end it."""
        child = None
        instance = None
        gone = False
        errors_fd, theirs = os.pipe2(os.O_CLOEXEC)
        self.given.add(theirs)
        os.set_blocking(errors_fd, False)
        errors = SideStream(errors_fd, keep_bytes=settings.STDERR_MAX_BYTES)
        try:
            # First without processes: whatever is left by a runner killed from here on carries the mark that stands
            # there.
            runner = own_identity()
            write_owner(self.record, runner=runner, processes={}, cgroups=self.groups.names())
            try:
                child = launch(Launch(argv=argv, pass_fds=pass_fds, stderr_fd=theirs))
            except OSError as exc:
                why = f"{argv[0]}: {exc.strerror}"
                raise BackendError("cannot start the process", why, "Run x07 doctor") from exc
            self.given.close()  # the child has its own by now
            try:
                inner = inner_process(child, self.depth)
                self.groups.add(inner.pid)
                instance = ProcessInstance(
                    child,
                    inner,
                    self.record,
                    self.remove,
                    self.groups.names(),
                    channel_fd=self.channel_fd,
                    errors=errors,
                    jail=jail,
                )
            except ProcessLookupError as exc:
                raise _not_started(child, errors) from exc
            instance.record_owner(runner)
            yield instance
        finally:
            if instance is not None:
                gone = instance.stop()
                instance.close()
            else:
                if child is not None:
                    end_supervisor(child)
                gone = self.remove()
            os.close(errors_fd)
            if gone:
                with contextlib.suppress(HostError):  # a full disk: the sweep will find that nothing is left
                    mark_done(self.record)


def _not_started(child: subprocess.Popen[bytes], errors: SideStream) -> BackendError:
    end_supervisor(child)
    errors.read()
    said = " ".join(errors.text().split()) or f"it ended with status {child.returncode}"
    fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
    return BackendError("cannot start the process", said[:500], fix)


def _channel(stack: contextlib.ExitStack, given: Given) -> tuple[int, int]:
    """Our end, and the agent's."""
    near, far = socket.socketpair()
    channel_fd = near.detach()
    stack.callback(os.close, channel_fd)
    os.set_blocking(channel_fd, False)
    return channel_fd, given.add(far.detach())


def _text(path: str, content: bytes) -> int:
    """A descriptor from which *content* can be read."""
    fd = os.memfd_create(Path(path).name, os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def files_folder(record: JobRecord) -> Path:
    """Where an unconfined program has its files."""
    return record.folder / "files"


def remove_folder(folder: Path) -> bool:
    """Remove a folder in which a program may have taken rights from its own folders; whether it is gone."""
    for place, inner, _ in os.walk(folder):
        for path in (Path(place, name) for name in inner):  # before it is entered
            # Another process may remove it too: the runner, and whoever stops its job by the record.
            with contextlib.suppress(FileNotFoundError):
                if not path.is_symlink():
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)
