"""Command line of the bubblewrap jail around a host process. Pure.

root   Without a user namespace. The supervisor and bubblewrap keep uid 0 but drop every capability. They close every
       descriptor except the lock of the job's uid. Inside the jail, setpriv changes to that uid and clears all
       capabilities.
user   In a user namespace, under a uid that is not 0, without capabilities.

Both forms have their own mount, pid, ipc, uts, net and cgroup namespaces. Their read-only root contains only the listed
files, and no /proc. bubblewrap loads a system call filter as its last step before it executes the program (or setpriv).
See docs/explanation/design.md, "The jail".
"""

import os
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import mounts
from x07_sandbox.jail.criu import Criu

BWRAP: Final = "/usr/bin/bwrap"
SETPRIV: Final = "/usr/bin/setpriv"
PERL: Final = "/usr/bin/perl"
INNER_UID: Final = 64000  # in the user form, the uid inside

SUPERVISOR: Final = str(Path(__file__).with_name("data") / "supervisor.pl")
_PROBE_S: Final = 10
_EMPTY_IN_PROC: Final = b"/proc/sys/fs/binfmt_misc"  # an empty folder, so nothing is hidden there
_CALLS: Final = ("prctl", "rt_sigprocmask", "rt_sigtimedwait", "capset", "close_range", "unshare", "mount", "dup3")


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """The files, descriptors and devices that one confined process may use, and its limits.

    files: host paths, read-only, under the same path inside the jail.
    fd_files: (descriptor, path inside) of opened files, read-only. fd_copies: files to copy into the jail's root.
    fd_writable: writable files. Only a machine that is being saved has any.
    fds: other inherited descriptors. limits: (soft, hard) by RLIMIT number, if the jail sets its own limits.
    devices: device nodes of the host, under the same path inside the jail. uid: the host uid in the root form, else
    None.
    mark: the random text that identifies the job's processes. deadline_s: when the kernel ends the jail.
    runner_pid: the x07 process; the jail ends when that process ends.
    nest: whether to add a pid namespace around the jail, so that it ends even if its supervisor is killed (`may_nest`).
    filter_fd: the pipe from which bubblewrap, as its last step, reads the system call filter. The jail waits for it. If
        the pipe ends without data, for example because x07 died, the kernel rejects the empty filter and the jail ends.
        (With --block-fd the jail would continue.)
    criu: if the process is dumped or restored; filter_fd is then read by data/criu.pl.
    """

    files: tuple[str, ...]
    fd_files: tuple[tuple[int, str], ...]
    devices: tuple[str, ...]
    uid: int | None
    mark: str
    deadline_s: int
    runner_pid: int
    filter_fd: int
    nest: bool
    lock_fd: int | None = None
    fd_copies: tuple[tuple[int, str], ...] = ()
    fd_writable: tuple[tuple[int, str], ...] = ()
    fds: tuple[int, ...] = ()
    limits: dict[int, tuple[int, int]] = {}
    criu: Criu | None = None


def may_nest() -> bool:
    """Whether this process may mount its own /proc, for `Jail.nest`. If parts of /proc are hidden, only root may."""
    if os.geteuid() == 0:
        return True
    return all(mounted.place == _EMPTY_IN_PROC or not mounted.place.startswith(b"/proc/") for mounted in mounts())


def jail_argv(jail: Jail, command: list[str], *, named: bool = True) -> list[str]:
    """Return the whole command line: supervisor, bubblewrap, setpriv (only if root), then *command*.

    named: whether to hide the host's name. A container's filter may forbid that alone.
    """
    criu = jail.criu
    argv = [BWRAP, *(_namespaces(jail.uid, named=named) if criu is None else criu.namespaces())]
    argv += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "X07_INSTANCE", jail.mark]
    argv += ["--setenv", "MALLOC_ARENA_MAX", "1"]  # mallopt(3): one heap instead of one per thread saves 0.3 MB
    opened = [path for _, path in (*jail.fd_files, *jail.fd_copies, *jail.fd_writable)]
    for path in _folders([*jail.files, *opened, *jail.devices, *(("/proc/-",) if criu else ())]):
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
    argv += ["--remount-ro", "/"] if criu is None else [*criu.mounts(), "--remount-ro", "/"]
    if jail.lock_fd is not None:
        argv += ["--sync-fd", str(jail.lock_fd)]
    if criu is None:
        argv += ["--seccomp", str(jail.filter_fd), "--", *_as_user(jail.uid), *command]
    else:
        inner = [*_as_user(None if jail.uid is None else INNER_UID, always=True), *command]
        argv += ["--", *criu.program(PERL), *criu.command(jail.filter_fd, inner)]
    userns = None if criu is None or criu.userns_fd is None else (criu.userns_fd, f"0 0 1,{INNER_UID} {jail.uid} 1")
    return supervisor_argv(
        argv,
        deadline_s=jail.deadline_s,
        runner_pid=jail.runner_pid,
        nest=jail.nest,
        keep_fd=jail.lock_fd,
        userns=userns,
    )


def probe_argv(files: tuple[str, ...], *, named: bool) -> list[str]:
    """Return a command line that prints "ok" if a jail with namespaces works. files: printf(1) and its libraries."""
    argv = [BWRAP, *_namespaces(0 if os.geteuid() == 0 else None, named=named), "--die-with-parent", "--new-session"]
    argv += [word for path in files for word in ("--ro-bind", path, path)]
    command = [*argv, "--remount-ro", "/", "--", files[0], "ok"]
    return supervisor_argv(command, deadline_s=_PROBE_S, runner_pid=os.getpid(), nest=may_nest())


def supervisor_argv(  # noqa: PLR0913 - the words of its command line
    command: list[str],
    *,
    deadline_s: int,
    runner_pid: int,
    nest: bool,
    keep_fd: int | None = None,
    uid: int | None = None,
    userns: tuple[int, str] | None = None,
) -> list[str]:
    """Return the command line of the supervisor and its command.

    uid: the user who runs both, if root starts them. userns: a descriptor to replace by a user namespace, and its map.
    """
    kept = -1 if keep_fd is None else keep_fd
    syscalls = host_arch().syscalls
    numbers = (deadline_s, runner_pid, kept, int(nest), *(userns or (-1, "")), *(syscalls[name] for name in _CALLS))
    # Another user may not be able to read our installation.
    script = [SUPERVISOR] if uid is None else ["-e", Path(SUPERVISOR).read_text(encoding="utf-8"), "--"]
    return [*_as_user(uid), PERL, *script, *map(str, numbers), *command]


def _namespaces(uid: int | None, *, named: bool) -> list[str]:
    name = ["--hostname", "x07"] if named else []
    if uid is None:
        inner = str(INNER_UID)
        return ["--unshare-all", *name, "--uid", inner, "--gid", inner, "--cap-drop", "ALL"]
    kept = [word for cap in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP") for word in ("--cap-add", cap)]
    unshared = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    return [*unshared, *name, "--cap-drop", "ALL", *kept]


def _as_user(uid: int | None, *, always: bool = False) -> list[str]:
    """Return the words that make a command run without capabilities, as *uid* if given. always: also without *uid*."""
    if uid is None and not always:
        return []
    drop = [f"--{name}=-all" for name in ("bounding-set", "inh-caps", "ambient-caps")]
    ids = [] if uid is None else ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return [SETPRIV, *ids, *drop, "--no-new-privs", "--"]


def _folders(paths: list[str]) -> list[str]:
    """Return every folder on the way to *paths*, parents first."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")[1:-1]
        found |= dict.fromkeys("/" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return list(found)
