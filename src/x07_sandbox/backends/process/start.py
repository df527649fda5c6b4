"""Starting and ending an agent on this host, below a supervisor."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

from x07_sandbox.backends.jailed import Ends, Start, StreamInstance, running
from x07_sandbox.backends.process.agentcode import FILES, Sandbox, agent_argv, agent_code, sandbox_argv, this_system
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import memory_file, require_own_proc
from x07_sandbox.host.processes import Launch
from x07_sandbox.jail.bwrap import may_nest, supervisor_argv
from x07_sandbox.jail.cgroups import program_groups
from x07_sandbox.jail.uids import lease_uid
from x07_sandbox.records.record import JobRecord, drop_unstarted

_CONFINED_DEPTH: Final = 2  # below the supervisor: bubblewrap, then the agent
_FREE_DEPTH: Final = 1


@contextlib.contextmanager
def start_confined(record: JobRecord, deadline_s: int, controllers: tuple[str, ...] = ()) -> Iterator[StreamInstance]:
    """Start a confined agent. When the context ends, it is gone and recorded as gone. Raises BackendError, HostError.

    The agent runs as this user, or under a uid of its own if this user is root. controllers: of the control groups that
    the plan relies on.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        require_own_proc()
        code = agent_code(confined=True)
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        ends = Ends(stack)
        given = ends.given
        groups = program_groups(record.job_id, uid=os.geteuid() if uid is None else uid)
        stack.callback(groups.remove)
        if missing := sorted(set(controllers) - set(groups.holds)):
            why = f"the host provides no control group for {' and '.join(missing)}"
            raise HostError("cannot limit the process", why, "Try again; x07 doctor shows what this host provides")
        sandbox = Sandbox(
            system=this_system(),
            mark=record.mark,
            agent_fd=given.add(os.open(code, os.O_RDONLY | os.O_CLOEXEC)),
            file_fds={path: given.add(memory_file(content)) for path, content in FILES.items()},
            channel_fd=ends.far_fd,
            # The files are in memory: they may take at most half of this host's.
            scratch_bytes=min(settings.SCRATCH_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2),
            groups=groups.places,
            lock_fd=lock_fd,
        )
        argv = supervisor_argv(
            sandbox_argv(sandbox),
            deadline_s=deadline_s,
            runner_pid=os.getpid(),
            nest=may_nest(),
            keep_fd=lock_fd,
            uid=uid,
        )
        passed = [sandbox.agent_fd, *sandbox.file_fds.values(), ends.far_fd]
        passed += [] if lock_fd is None else [lock_fd]
        jail = f"user namespaces, {'a uid of its own' if uid is not None else 'the user'}; {groups.describe()}"
        start = Start(record, jail, given, _CONFINED_DEPTH, groups.remove, groups.names(), groups.add)
        yield stack.enter_context(_running(start, ends, argv, tuple(passed)))


@contextlib.contextmanager
def start_unconfined(record: JobRecord, deadline_s: int) -> Iterator[StreamInstance]:
    """Start an unconfined agent, with a folder of its own in the record's folder. Raises BackendError, HostError."""
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        require_own_proc()
        code = agent_code(confined=False)
        folder = files_folder(record)
        try:
            folder.mkdir(mode=0o700)
        except OSError as exc:
            why = f"{exc.strerror} ({folder})"
            raise HostError("cannot make the job's folder", why, "Free disk space") from exc
        ends = Ends(stack)
        argv = supervisor_argv(
            agent_argv(str(code), "none", str(ends.far_fd), str(folder), record.mark),
            deadline_s=deadline_s,
            runner_pid=os.getpid(),
            nest=False,
        )
        start = Start(record, "none", ends.given, _FREE_DEPTH, partial(remove_folder, folder))
        yield stack.enter_context(_running(start, ends, argv, (ends.far_fd,)))


def _running(
    start: Start, ends: Ends, argv: list[str], pass_fds: tuple[int, ...]
) -> AbstractContextManager[StreamInstance]:
    def not_built(status: int | None) -> BackendError:
        ends.errors.read()
        said = " ".join(ends.errors.text().split()) or f"it exited with status {status}"
        fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
        return BackendError("cannot start the process", said[:500], fix)

    request = Launch(argv=argv, pass_fds=pass_fds, stderr_fd=ends.stderr_fd)
    return running(start, request, partial(StreamInstance, start, ends), not_built)


def files_folder(record: JobRecord) -> Path:
    """Return the folder of an unconfined program's files."""
    return record.folder / "files"


def remove_folder(folder: Path) -> bool:
    """Remove a folder, even if a program has removed permissions in it. Return whether the folder is gone."""
    for place, inner, _ in os.walk(folder):
        for path in (Path(place, name) for name in inner):  # before it is entered
            # The runner and a process that stops its job may both be removing it.
            with contextlib.suppress(FileNotFoundError):
                if not path.is_symlink():
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)
