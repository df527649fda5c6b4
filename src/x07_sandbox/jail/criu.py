"""Dumping a jail's process with criu(8), and restoring it in other jails. Pure.

Both happen inside a jail as bubblewrap makes it, by its first process (data/criu.pl). criu needs capabilities, so the
jail has a user namespace, and the capabilities mean nothing outside. When the restored process continues, its system
call filter is loaded, criu and all capabilities are gone, and criu's files are unmounted.

root   The supervisor makes the user namespace. Inside it, uid 0 stands for root, for criu only, and INNER_UID for the
       job's uid. So each process restored from one dump has a uid of its own.
user   bubblewrap makes the user namespace, in which uid 0, which criu requires, stands for the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.host.arch import host_arch

CRIU: Final = "/usr/sbin/criu"
PID: Final = 64  # of the dumped process in its pid namespace: criu itself needs smaller numbers
_CALLS: Final = (
    *("capset", "close", "close_range", "dup3", "prlimit64", "ptrace", "seccomp", "sendmsg", "setsid", "umount2"),
)
_CAPABILITIES: Final = (
    *("CHECKPOINT_RESTORE", "DAC_OVERRIDE", "KILL", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_PTRACE"),
    "SYS_RESOURCE",
)
# A file system of its own, so that it goes away as a whole: the folders of the programs, the dump, and criu's log.
_PLACE: Final = "/criu"
NULL: Final = f"{_PLACE}/null"
_SCRIPT: Final = f"{_PLACE}/criu.pl"
_IMAGES: Final = f"{_PLACE}/images"
_WORDS: Final = (
    *("--work-dir", f"{_PLACE}/logs", "--log-file", "log", "-v1", "--unprivileged", "--manage-cgroups=ignore"),
)


def _top(path: str) -> str:
    return "/" + path.split("/", 2)[1]


class Criu(msgspec.Struct, frozen=True, kw_only=True):
    """What criu does in a jail.

    files: host paths of criu, perl and their libraries. images_fd: the folder of the dump.
    userns_fd: a descriptor that the supervisor replaces by the user namespace, if root starts the jail.
    restores: (descriptor, criu's name for it) of the sockets and files that the restored process gets, or None to dump.
    control_fd, socket_fds, scratch_fd, open_files: for dumping; see data/criu.pl.
    """

    files: tuple[str, ...]
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

    def numbers(self) -> list[int]:
        """Return the descriptors of the process that is dumped or restored. criu's own must have higher numbers."""
        if self.restores is not None:
            return [fd for fd, _ in self.restores]
        return [*self.socket_fds, self.scratch_fd]

    def namespaces(self) -> list[str]:
        """Return bubblewrap's words for the namespaces and capabilities."""
        if self.userns_fd is None:
            argv = ["--unshare-all", "--uid", "0", "--gid", "0"]
        else:
            argv = ["--userns", str(self.userns_fd)]
            argv += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
        kept = [word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}")]
        return [*argv, "--hostname", "x07", "--cap-drop", "ALL", *kept, "--as-pid-1"]

    def mounts(self) -> list[str]:
        """Return bubblewrap's words for criu's files, /dev/null among them, and for /proc."""
        argv = ["--perms", "0700", "--tmpfs", _PLACE]
        for top in sorted(self._tops()):
            argv += ["--symlink", os.readlink(top)] if os.path.islink(top) else ["--ro-bind", top]  # noqa: PTH114, PTH115 - quicker
            argv.append(f"{self._below()}{top}")
        argv += ["--ro-bind", str(Path(__file__).with_name("data") / "criu.pl"), _SCRIPT]
        if self.restores is not None:
            argv += ["--ro-bind-fd", str(self.images_fd), _IMAGES]
        return [*argv, "--dir", f"{_PLACE}/logs", "--dev-bind", "/dev/null", NULL, "--proc", "/proc"]

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
        calls = ",".join(f"{name}={numbers[name]}" for name in _CALLS)
        begin = [str(release_fd), str(-1 if self.userns_fd is None else self.userns_fd), calls, str(PID)]
        criu = self.program(CRIU)
        if self.restores is None:
            sockets = ",".join(map(str, self.socket_fds))
            fds = (self.control_fd, self.images_fd, self.scratch_fd)
            argv += ["dump", *begin, *map(str, fds), sockets, str(self.open_files)]
            folder = f"/proc/self/fd/{self.images_fd}"  # mounted nowhere, so the process cannot reach it
            return [*argv, *criu, "dump", "--images-dir", folder, *_WORDS, "--", *command]
        mounted = [_PLACE, "/proc", *(top for top in self._tops() if not os.path.islink(top))]  # noqa: PTH114 - as above
        argv += ["restore", *begin, ",".join(mounted), *criu, "restore", "--images-dir", _IMAGES, *_WORDS]
        argv += ["--restore-detached", "--leave-stopped", "--skip-file-rwx-check"]
        return argv + [word for fd, name in self.restores for word in ("--inherit-fd", f"fd[{fd}]:{name}")]
