"""Kernel calls that Python's standard library does not provide, small file helpers, and the agent's error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Final

from x07_sandbox.kernel import check, libc

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_NOATIME: Final = 1024
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

_RNDADDENTROPY: Final = 0x40085203  # _IOW('R', 0x03, int[2])
_RNDRESEEDCRNG: Final = 0x5207  # _IO('R', 0x07)
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP_RUNNING: Final = 0x41
_RB_POWER_OFF: Final = 0x4321FEDC

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture
_OPENAT2, _RESOLVE_IN_ROOT = 437, 0x10
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_MOUNT_ATTR_IDMAP: Final = 0x00100000
_FINIT_MODULE: Final = {"x86_64": 313, "aarch64": 273}

libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system. Raises OSError with the target as its file name."""
    check(libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode()), target)


def bind(source: str, target: str, flags: int = 0) -> None:
    """Bind-mount *source* recursively on *target*, and add *flags* such as MS_RDONLY."""
    mount(source, target, "", MS_BIND | MS_REC)
    change_mount(target, flags, below=True)


def pivot_root(new_root: str) -> None:
    """Make *new_root* the root of this mount namespace and detach the old one."""
    os.chdir(new_root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def open_tree(path: str) -> int:
    """Return a detached copy of the mount at *path*. Raises OSError."""
    return check(libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC), path)


def change_mount(mount: int | str, flags: int, *, below: bool = False) -> None:
    """Add MS_NOSUID, MS_NODEV and *flags* (MS_RDONLY, MS_NOEXEC) to a mount. Raises OSError.

    mount: a path, or a detached mount. below: include mounts below this mount. Flags that the host set stay set.
    """
    fd, path, how = (mount, b"", _AT_EMPTY_PATH) if isinstance(mount, int) else (_AT_FDCWD, os.fsencode(mount), 0)
    attributes = struct.pack("=4Q", MS_NOSUID | MS_NODEV | flags, 0, 0, 0)  # the first four bits are those of mount(2)
    how |= _AT_RECURSIVE if below else 0
    check(libc.syscall(_MOUNT_SETATTR, fd, path, how, attributes, len(attributes)), f"mount_setattr {mount}")


def map_ids(fd: int, user_fd: int) -> None:
    """Map the owners of a detached mount's files by a user namespace (MOUNT_ATTR_IDMAP). Raises OSError."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_IDMAP, 0, 0, user_fd)
    check(libc.syscall(_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, attributes, len(attributes)), "mount_setattr idmap")


def user_namespace(ids: str) -> int:
    """Return the descriptor of a new user namespace without processes. ids: as in its uid_map. Raises OSError."""
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    go_r, go_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.unshare(os.CLONE_NEWUSER)
            os.write(ready_w, b"1")
        os.close(ready_w)
        os.close(go_w)
        os.read(go_r, 1)
        os._exit(0)
    os.close(ready_w)
    os.close(go_r)
    try:
        if not read_all(ready_r):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), "unshare CLONE_NEWUSER")
        for name in ("uid_map", "gid_map"):
            write_file(f"/proc/{pid}/{name}", ids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go_w)
        os.waitpid(pid, 0)


def move_mount(fd: int, target: str) -> None:
    """Attach a detached mount. Raises OSError with the target as its file name."""
    check(libc.syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)


def is_program(root: str, path: str) -> bool:
    """Whether *path* is an executable file, with links resolved below the folder *root* (openat2: RESOLVE_IN_ROOT)."""
    folder = os.open(root or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    how = struct.pack("=3Q", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    try:
        fd = check(libc.syscall(_OPENAT2, folder, os.fsencode(path), how, len(how)), path)
    except OSError:
        return False
    finally:
        os.close(folder)
    try:
        mode = os.fstat(fd).st_mode
        return stat.S_ISREG(mode) and bool(mode & 0o111)
    finally:
        os.close(fd)


def unmount(target: str) -> None:
    """Unmount the topmost mount at *target*. Raises OSError."""
    check(libc.umount2(target.encode(), 0), target)


def load_module(path: str) -> None:
    """Load a kernel module, unless it is already loaded. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        result = libc.syscall(_FINIT_MODULE[os.uname().machine], fd, b"", 0)
        if result < 0 and ctypes.get_errno() != errno.EEXIST:
            check(result, path)
    finally:
        os.close(fd)


def add_entropy(random_fd: int, seed: bytes) -> None:
    """Add *seed* to the kernel's pool (random(4)) over /dev/urandom, credit it, and reseed. Raises OSError."""
    fcntl.ioctl(random_fd, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
    fcntl.ioctl(random_fd, _RNDRESEEDCRNG)


# Not open(): its layers are thousands of instructions that would be new, and so slow, in a fresh clone.
def read_file(path: str) -> bytes:
    """Read up to 64 KiB of a kernel file with one system call. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def write_file(path: str, text: str) -> None:
    """Write *text* to an existing kernel file with one system call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data* to a blocking descriptor. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_all(fd: int) -> bytes:
    """Read a blocking descriptor to its end and close it. Raises OSError."""
    chunks = []
    while chunk := os.read(fd, 65536):
        chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks)


def children_of(pid: int) -> list[int]:
    """Return the children of all threads of a process (proc(5)); empty if the process is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += [int(word) for word in read_file(f"/proc/{pid}/task/{thread}/children").split()]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def close_descriptors_except(*keep: int) -> None:
    """Close all descriptors except *keep*. Standard descriptors become /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1, 2):
        if target not in keep:
            os.dup2(null, target)
    open_fds = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in open_fds:
            try:
                os.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself


@contextlib.contextmanager
def own_network_kept() -> Iterator[None]:
    """Return to the present network namespace at the end of the context, which may enter another. Raises OSError."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)


def loopback_up() -> None:
    """Bring up `lo` in the current network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING))


def power_off() -> None:
    """Power off the machine. Never returns."""
    libc.reboot(_RB_POWER_OFF)
    os._exit(0)


class JobError(Exception):
    """The job failed. The args are the stage, the errno (or 0) and a message. The host gets them in a FAILED frame."""
