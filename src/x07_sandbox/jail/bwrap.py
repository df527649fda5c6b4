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
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import mounts

BWRAP: Final = "/usr/bin/bwrap"
SETPRIV: Final = "/usr/bin/setpriv"
PERL: Final = "/usr/bin/perl"
INNER_UID: Final = 64000  # in the user form, the uid inside

_DATA: Final = Path(__file__).with_name("data")
SUPERVISOR: Final = str(_DATA / "supervisor.pl")
_UNSHARED: Final = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
_PROBE_S: Final = 10
_EMPTY_IN_PROC: Final = b"/proc/sys/fs/binfmt_misc"  # an empty folder, so nothing is hidden there
_CALLS: Final = ("prctl", "rt_sigprocmask", "rt_sigtimedwait", "capset", "close_range", "unshare", "mount", "dup3")


CRIU: Final = "/usr/sbin/criu"
DUMPED_PID: Final = 64  # of the dumped process in its pid namespace: criu itself needs smaller numbers
_CRIU_CALLS: Final = (
    *("capset", "close", "close_range", "dup3", "prlimit64", "ptrace", "seccomp", "sendmsg", "setsid", "umount2"),
)
_CAPABILITIES: Final = (
    *("CHECKPOINT_RESTORE", "DAC_OVERRIDE", "KILL", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_PTRACE"),
    "SYS_RESOURCE",
)
# A file system of its own, so that it goes away as a whole: the folders of the programs, the dump, and criu's log.
_PLACE: Final = "/criu"
CRIU_NULL: Final = f"{_PLACE}/null"
_SCRIPT: Final = f"{_PLACE}/criu.pl"
_IMAGES: Final = f"{_PLACE}/images"
_CRIU_WORDS: Final = (
    *("--work-dir", f"{_PLACE}/logs", "--log-file", "log", "-v1", "--unprivileged", "--manage-cgroups=ignore"),
)


def _top(path: str) -> str:
    return "/" + path.split("/", 2)[1]


class Criu(msgspec.Struct, frozen=True, kw_only=True):
    """What criu(8) does in a jail: it dumps a process, or restores it in another jail.

    Both happen inside a jail as bubblewrap makes it, by its first process (data/criu.pl). criu needs capabilities, so
    the jail has a user namespace, and the capabilities mean nothing outside. When the restored process continues, its
    system call filter is loaded, criu and all capabilities are gone, and criu's files are unmounted.

    In the root form, the supervisor makes the user namespace. Inside it, uid 0 stands for root, for criu only, and
    INNER_UID for the job's uid. So each process restored from one dump has a uid of its own. In the user form,
    bubblewrap makes the user namespace, in which uid 0, which criu requires, stands for the user.

    files: host paths of criu, perl and their libraries. files_max: how many open files criu may have. images_fd: the
    folder of the dump.
    userns_fd: a descriptor that the supervisor replaces by the user namespace, if root starts the jail.
    restores: (descriptor, criu's name for it) of the sockets and files that the restored process gets, or None to dump.
    control_fd, socket_fds, scratch_fd, open_files: for dumping; see data/criu.pl.
    """

    files: tuple[str, ...]
    files_max: int
    images_fd: int
    userns_fd: int | None
    restores: tuple[tuple[int, str], ...] | None = None
    control_fd: int = -1
    socket_fds: tuple[int, ...] = ()
    scratch_fd: int = -1
    open_files: int = 0

    def fds(self) -> list[int]:
        """Return the descriptors that the jail inherits for criu."""
        found = [self.images_fd, self.userns_fd, None if self.restores is not None else self.control_fd]
        return [fd for fd in found if fd is not None]

    def namespaces(self) -> list[str]:
        """Return bubblewrap's words for the namespaces and capabilities."""
        if self.userns_fd is None:
            argv = ["--unshare-all", "--uid", "0", "--gid", "0"]
        else:
            argv = ["--userns", str(self.userns_fd)]
            argv += _UNSHARED
        kept = [word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
        return [*argv, "--hostname", "x07", "--cap-drop", "ALL", *kept, "--as-pid-1"]

    def mounts(self) -> list[str]:
        """Return bubblewrap's words for criu's files, /dev/null among them, and for /proc."""
        argv = ["--perms", "0700", "--tmpfs", _PLACE]
        for top in sorted(self._tops()):
            argv += ["--symlink", os.readlink(top)] if os.path.islink(top) else ["--ro-bind", top]  # noqa: PTH114, PTH115 - quicker
            argv.append(f"{self._below()}{top}")
        argv += ["--ro-bind", str(_DATA / "criu.pl"), _SCRIPT]
        if self.restores is not None:
            argv += ["--ro-bind-fd", str(self.images_fd), _IMAGES]
        return [*argv, "--dir", f"{_PLACE}/logs", "--dev-bind", "/dev/null", CRIU_NULL, "--proc", "/proc"]

    def not_covered(self, files: Iterable[str]) -> tuple[str, ...]:
        """Return those host paths that the jail of a restored process does not have among criu's files anyway."""
        covered = set() if self.restores is None else self._tops()
        return tuple(path for path in files if _top(path) not in covered)

    def _tops(self) -> set[str]:
        """Return the folders of the host's root that contain `files`. /lib, for example, may be a link to usr/lib."""
        return {"/usr", *map(_top, self.files)}

    def _below(self) -> str:
        # A restored process runs nothing until they are unmounted. One that is to be dumped must not reach them.
        return _PLACE if self.restores is None else ""

    def program(self, path: str) -> list[str]:
        """Return the words that start a program of `files`."""
        if not self._below():
            return [path]
        folders = dict.fromkeys(f"{_PLACE}{Path(file).parent}" for file in self.files)
        return [f"{_PLACE}{host_arch().loader}", "--library-path", ":".join(folders), f"{_PLACE}{path}"]

    def command(self, release_fd: int, command: list[str]) -> list[str]:
        """Return the words after perl of the jail's first process. command: the process to dump."""
        argv = [_SCRIPT]
        numbers = host_arch().syscalls
        calls = ",".join(f"{name}={numbers[name]}" for name in _CRIU_CALLS)
        begin = [str(release_fd), str(-1 if self.userns_fd is None else self.userns_fd), calls, str(DUMPED_PID)]
        criu = self.program(CRIU)
        if self.restores is None:
            sockets = ",".join(map(str, self.socket_fds))
            fds = (self.control_fd, self.images_fd, self.scratch_fd)
            argv += ["dump", *begin, *map(str, fds), sockets, str(self.open_files)]
            folder = f"/proc/self/fd/{self.images_fd}"  # mounted nowhere, so the process cannot reach it
            return [*argv, *criu, "dump", "--images-dir", folder, *_CRIU_WORDS, "--", *command]
        mounted = [_PLACE, "/proc", *(top for top in self._tops() if not os.path.islink(top))]  # noqa: PTH114 - as above
        argv += ["restore", *begin, ",".join(mounted), *criu, "restore", "--images-dir", _IMAGES, *_CRIU_WORDS]
        argv += ["--restore-detached", "--leave-stopped", "--skip-file-rwx-check"]
        return argv + [word for fd, name in self.restores for word in ("--inherit-fd", f"fd[{fd}]:{name}")]


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
    return [*_UNSHARED, *name, "--cap-drop", "ALL", *kept]


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
