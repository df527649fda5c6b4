"""The jail around a host process, by bubblewrap: building its command line is pure.

Two forms (docs/explanation/design.md, "The jail"):

root   no user namespace. The supervisor and bubblewrap's two processes keep uid 0 but drop every capability, and every
       descriptor except the lock of the job's uid; setpriv inside changes to that uid and clears all capability sets.
user   a user namespace in which the process has a uid that is not 0, and no capability.

In both: own mount, pid, ipc, uts, net and cgroup namespaces, a read-only root of just the named files, no /proc, and a
filter of system calls, loaded as the last thing before the program (or setpriv).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host.mounts import mounts

BWRAP: Final = "/usr/bin/bwrap"
SETPRIV: Final = "/usr/bin/setpriv"
PERL: Final = "/usr/bin/perl"
INNER_UID: Final = 64000  # in the user form: the uid that the process sees itself under

SUPERVISOR: Final = str(Path(__file__).with_name("data") / "supervisor.pl")
_PROBE_S: Final = 10
_EMPTY_IN_PROC: Final = b"/proc/sys/fs/binfmt_misc"  # an empty folder, which hides nothing
_CALLS: Final = ("prctl", "rt_sigprocmask", "rt_sigtimedwait", "capset", "close_range", "unshare", "mount")


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """What one confined process may have.

    files: host paths that appear inside under the same path, read-only.
    fd_files: (descriptor, path inside), read-only: the opened file itself, whatever its path says by then.
    fd_copies: the same for what bubblewrap copies into the jail's own root.
    fd_writable: the same for files that may be written; only a machine that is made to be saved has any.
    fds: other descriptors that it is given. limits: (soft, hard) by RLIMIT's number, where it sets its own.
    devices: device nodes of the host, under the same path.
    uid: host uid for the root form; None for the user form.
    mark: random text that proves, in the arguments, that our launcher started this.
    deadline_s: when the kernel ends it, in whole seconds.
    runner_pid: the process with which it dies. syscalls: numbers of the system calls here.
    nest: whether a pid namespace is put around it, so that it ends even if its supervisor is killed: see `may_nest`.
    filter_fd: a pipe from which bubblewrap reads the filter of system calls, as its last step, until the pipe's end.
        The jail waits there; where the pipe ends without a filter, as when the runner dies, the kernel refuses the
        empty one and the jail ends. (--block-fd goes on at either.)
    """

    files: tuple[str, ...]
    fd_files: tuple[tuple[int, str], ...]
    devices: tuple[str, ...]
    uid: int | None
    mark: str
    deadline_s: int
    runner_pid: int
    syscalls: dict[str, int]
    filter_fd: int
    nest: bool
    lock_fd: int | None = None
    fd_copies: tuple[tuple[int, str], ...] = ()
    fd_writable: tuple[tuple[int, str], ...] = ()
    fds: tuple[int, ...] = ()
    limits: dict[int, tuple[int, int]] = {}


def may_nest() -> bool:
    """Whether this process may mount a /proc of its own, as a pid namespace around bubblewrap needs.

    An ordinary user may only where /proc is fully visible: containers hide parts of it.
    """
    if os.geteuid() == 0:
        return True
    return all(mounted.place == _EMPTY_IN_PROC or not mounted.place.startswith(b"/proc/") for mounted in mounts())


def jail_argv(jail: Jail, command: list[str]) -> list[str]:
    """The whole command line: supervisor, bubblewrap, where root setpriv, then *command*."""
    argv = [BWRAP, *_namespaces(jail.uid)]
    argv += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "X07_INSTANCE", jail.mark]
    argv += ["--setenv", "MALLOC_ARENA_MAX", "1"]  # mallopt(3): a heap for each of QEMU's threads is 0.3 MB more
    opened = [path for _, path in (*jail.fd_files, *jail.fd_copies, *jail.fd_writable)]
    for path in _folders([*jail.files, *opened, *jail.devices]):
        argv += ["--perms", "0755", "--dir", path]
    for path in jail.files:
        argv += ["--ro-bind", path, path]
    for fd, path in jail.fd_files:
        argv += ["--ro-bind-fd", str(fd), path]
    for fd, path in jail.fd_copies:
        argv += ["--perms", "0444", "--file", str(fd), path]
    for fd, path in jail.fd_writable:
        argv += ["--bind-fd", str(fd), path]
    for path in jail.devices:
        argv += ["--dev-bind", path, path]
    argv += ["--remount-ro", "/", "--seccomp", str(jail.filter_fd)]
    if jail.lock_fd is not None:
        argv += ["--sync-fd", str(jail.lock_fd)]
    return supervisor_argv(
        [*argv, "--", *_as_user(jail.uid), *command],
        deadline_s=jail.deadline_s,
        runner_pid=jail.runner_pid,
        syscalls=jail.syscalls,
        nest=jail.nest,
        keep_fd=jail.lock_fd,
    )


def probe_argv(files: tuple[str, ...], runner_pid: int, syscalls: dict[str, int], *, nest: bool) -> list[str]:
    """A command line that says "ok" where a jail with namespaces can be made. files: printf(1) and all it needs."""
    argv = [BWRAP, *_namespaces(0 if os.geteuid() == 0 else None), "--die-with-parent", "--new-session"]
    argv += [word for path in files for word in ("--ro-bind", path, path)]
    command = [*argv, "--remount-ro", "/", "--", files[0], "ok"]
    return supervisor_argv(command, deadline_s=_PROBE_S, runner_pid=runner_pid, syscalls=syscalls, nest=nest)


def supervisor_argv(  # noqa: PLR0913 - the supervisor's own arguments
    command: list[str],
    *,
    deadline_s: int,
    runner_pid: int,
    syscalls: dict[str, int],
    nest: bool,
    keep_fd: int | None = None,
    uid: int | None = None,
) -> list[str]:
    """The command line of the supervisor and its command. uid: as whom all of it runs, where root starts it."""
    kept = -1 if keep_fd is None else keep_fd
    numbers = (deadline_s, runner_pid, kept, int(nest), *(syscalls[name] for name in _CALLS))
    # Another user may not reach the file where we are installed.
    script = [SUPERVISOR] if uid is None else ["-e", Path(SUPERVISOR).read_text(encoding="utf-8"), "--"]
    return [*_as_user(uid), PERL, *script, *map(str, numbers), *command]


def _namespaces(uid: int | None) -> list[str]:
    if uid is None:
        inner = str(INNER_UID)
        return ["--unshare-all", "--hostname", "x07", "--uid", inner, "--gid", inner, "--cap-drop", "ALL"]
    kept = [word for cap in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP") for word in ("--cap-add", cap)]
    unshared = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    return [*unshared, "--hostname", "x07", "--cap-drop", "ALL", *kept]


def _as_user(uid: int | None) -> list[str]:
    if uid is None:
        return []
    drop = [f"--{name}=-all" for name in ("bounding-set", "inh-caps", "ambient-caps")]
    ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return [SETPRIV, *ids, *drop, "--no-new-privs", "--"]


def _folders(paths: list[str]) -> list[str]:
    """Every folder on the way to *paths*, parents first."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")[1:-1]
        found |= dict.fromkeys("/" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return list(found)
