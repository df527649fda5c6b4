"""External commands for the image build, with an explicit environment, a bounded log, and a timeout.

A timeout kills the whole process group of the command. mmdebstrap and the second stage of a build execute programs of
the image. If its architecture is not the host's, the host executes them through binfmt_misc and QEMU. The kernel's
registration of the interpreter is one setting for the whole host, so x07 only verifies it.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import Arch, is_foreign
from x07_sandbox.host.linux import mounts, new_memory_file, open_pidfd
from x07_sandbox.host.paths import SYSTEM, cache_dir, closing_fd, find_program
from x07_sandbox.host.waiting import wait_readable

PACKAGES = {
    "apt-cache": "apt",
    "apt-config": "apt",
    "bwrap": "bubblewrap",
    "dpkg-deb": "dpkg",
    "fsck.erofs": "erofs-utils",
    "mkfs.erofs": "erofs-utils",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "rm": "coreutils",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "zstd": "zstd",
}
OPTIONAL = {
    "arch-test": "arch-test",  # only for images of another architecture
    "skopeo": "skopeo",  # only for images from a registry
}
EMULATORS = ("qemu-user-static", "arch-test")  # packages for images of another architecture
_SLOWER = 4  # measured: mmdebstrap takes 12 times as long as for the host, a fifth of its usual limit
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
EPOCH = 1735689600  # the one date in every image: 1 January 2025
LOG_BYTES = 64 * 1024
ERROR_LINES = 12
_ERROR = re.compile(r"\berror\b|^E: |returned error", re.IGNORECASE)
_SHORT_S = 60
GRACE_S = 10.0  # after SIGTERM, mmdebstrap unmounts and removes its tree


def tool(name: str) -> str:
    """Return the absolute path of a command in PACKAGES or OPTIONAL. Raises HostError."""
    if path := find_program(name):
        return path
    fix = f"Run apt install {(PACKAGES | OPTIONAL)[name]}"
    raise HostError("cannot build the guest image", f"the command {name} is missing", fix)


def missing_tools() -> dict[str, str]:
    """Return the missing commands of PACKAGES, and for each of them the Debian package that contains it."""
    return {name: package for name, package in PACKAGES.items() if not find_program(name)}


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a build command. It inherits only HOME and the proxy variables."""
    env = {"PATH": ":".join(SYSTEM), "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": str(EPOCH)}
    env |= {name: os.environ[name] for name in ("HOME", *PROXIES) if name in os.environ}
    return env | dict(extra or {})


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    timeout_s: float,
    extra_env: Mapping[str, str] | None = None,
    stdout_fd: int | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run *argv*, and kill it if the calling thread dies. Raises ImageError on failure or timeout.

    stdout_fd: destination of standard output; None for the log, which also gets standard error. The error shows the end
    of the log. on_line: called with each line of the log.
    """
    proc = subprocess.Popen(
        [tool("setpriv"), "--pdeathsig", "KILL", "--", *argv],
        cwd=cwd,
        env=environment(extra_env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout_fd is None else stdout_fd,
        stderr=subprocess.STDOUT if stdout_fd is None else subprocess.PIPE,
        process_group=0,
        umask=0o022,
    )
    log = bytearray()
    try:
        pipe = proc.stdout if stdout_fd is None else proc.stderr
        assert pipe is not None
        with pipe:
            in_time = _drain(pipe.fileno(), log, on_line, time.monotonic() + timeout_s)
        if in_time:
            proc.wait()
    finally:
        _end(proc)
    name = Path(argv[0]).name
    if not in_time:
        why = f"it timed out after {timeout_s:.0f} s"
        raise ImageError(f"cannot build the guest image with {name}", why, "Check the network, then try again")
    if proc.returncode:
        what = f"cannot build the guest image, because {name} exited with status {proc.returncode}"
        raise ImageError(what, _tail(log), "Check its output above, then try again")


def _drain(fd: int, log: bytearray, on_line: Callable[[str], None] | None, until: float) -> bool:
    """Read *fd* to its end into *log*, which keeps the last LOG_BYTES. Return False on timeout."""
    line = b""
    while (left_s := until - time.monotonic()) > 0 and wait_readable(fd, left_s):
        chunk = os.read(fd, 65536)
        if not chunk:
            return True
        log += chunk
        del log[:-LOG_BYTES]
        *whole, line = (line + chunk).split(b"\n")
        line = line[-LOG_BYTES:]
        if on_line is not None:
            for text in whole:
                on_line(text.decode(errors="replace"))
    return False


def _tail(log: bytearray) -> str:
    lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
    shown = [line for line in lines[:-ERROR_LINES] if _ERROR.search(line)][:ERROR_LINES] + lines[-ERROR_LINES:]
    return "\n  " + "\n  ".join(shown) if lines else "it printed nothing"


def _end(proc: subprocess.Popen[bytes]) -> None:
    if proc.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(proc.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            proc.wait(GRACE_S)
        if proc.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(proc.pid, signal.SIGKILL)
            proc.wait()


def capture(argv: Sequence[str], *, data: bytes = b"", max_bytes: int = 64 * 1024 * 1024) -> bytes:
    """Return the standard output of a short command, and kill what it leaves behind.

    data: its standard input. Raises ImageError if it fails, takes over a minute or prints more than *max_bytes*.
    """
    what = f"cannot build the guest image with {Path(argv[0]).name}"
    with contextlib.ExitStack() as stack:
        # No pipes: a failed `unshare --map-auto` leaves a process that waits forever, and would keep them open.
        given, output, errors = (stack.enter_context(os.fdopen(new_memory_file(), "w+b")) for _ in range(3))
        given.write(data)
        given.seek(0)
        proc = subprocess.Popen(argv, stdin=given, stdout=output, stderr=errors, env=environment(), process_group=0)
        try:
            with closing_fd(open_pidfd(proc.pid)) as pidfd:
                in_time = wait_readable(pidfd, _SHORT_S)
        finally:
            # Its number still belongs to it, since it has not been waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(proc.pid, signal.SIGKILL)
            proc.wait()
        if not in_time:
            raise ImageError(what, f"it timed out after {_SHORT_S} s", "Try again")
        output.seek(0)
        errors.seek(0)
        found = output.read(max_bytes + 1)
        if proc.returncode or len(found) > max_bytes:
            raise ImageError(what, _tail(bytearray(errors.read(LOG_BYTES))), "Try again")
    return found


def slower(arch: Arch) -> int:
    """Return the factor for time limits of commands that execute programs of this architecture."""
    return _SLOWER if is_foreign(arch) else 1


def require_execution(arch: Arch) -> None:
    """Raise HostError unless this host can execute programs of this architecture."""
    if not is_foreign(arch):
        return
    what, install = f"cannot build an image for {arch.deb}", f"run apt-get install {' '.join(EMULATORS)}"
    try:
        capture([tool("arch-test"), arch.deb])
    except HostError as exc:
        raise HostError(what, exc.why, f"To execute {arch.deb} programs here, {install}") from exc
    except ImageError as exc:
        why = f"this host cannot execute {arch.deb} programs"
        fix = f"As root, {install}. If they are installed, run systemctl restart systemd-binfmt. Without systemd, run"
        fix += " mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc (unless it is mounted) and"
        fix += f" cat /usr/lib/binfmt.d/qemu-{arch.name}.conf >/proc/sys/fs/binfmt_misc/register"
        raise HostError(what, why, fix) from exc


def own_namespaces() -> list[str]:
    """Return a command prefix that runs a command as root in namespaces of its own.

    All processes of the command end with the command. mmdebstrap's own isolation leaves things behind: in mode "root",
    mounts that the whole host sees; in mode "unshare", workers that outlive mmdebstrap and wait forever. So every user
    runs mmdebstrap in mode "root" behind this prefix.
    """
    argv = [tool("unshare"), "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        tool("newuidmap")
        _check_sub_uids()
        argv += ["--user", "--map-root-user", "--map-auto"]
    return [*argv, "--"]


def require_namespaces() -> None:
    """Raise HostError unless this user may create the namespaces in which an image is built."""
    try:
        capture([*own_namespaces(), "/bin/true"])
    except ImageError as exc:
        why = f"namespaces are forbidden here ({' '.join(exc.why.split())})"
        fix = "In a container, start it with --privileged. Or run x07 image build on a host that allows namespaces, and"
        fix += f" copy ~/.cache/x07-sandbox/images from there to {cache_dir() / 'images'}"
        raise HostError("cannot build the guest image", why, fix) from exc


def _check_sub_uids() -> None:
    """Raise HostError unless this user has subordinate uids and gids (subuid(5))."""
    uid, what = os.geteuid(), "cannot build the guest image"
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        why = f"uid {uid} has no passwd entry, and so no subordinate uids"
        raise HostError(what, why, "Build it as a user with a passwd entry, or as root") from None
    for path in ("/etc/subuid", "/etc/subgid"):
        try:
            owners = {line.partition(":")[0] for line in Path(path).read_text(encoding="utf-8").splitlines()}
        except OSError:
            owners = set()
        if not owners & {name, str(uid)}:
            fix = f"As root, run usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
            raise HostError(what, f"{path} has no range for {name}", fix)


def unpack_root(work: Path, image: Path) -> Path:
    """Unpack a root file system, the file *image*, to a folder in *work*; return that folder. Raises SandboxError."""
    root = work / "unpacked"
    argv = [tool("fsck.erofs"), f"--extract={root}", "--no-preserve", str(image)]
    run(argv, cwd=work, timeout_s=300)
    return root


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything below it. Raises ImageError if anything is mounted there."""
    below = os.fsencode(f"{folder}/")
    if any(mounted.place.startswith(below) for mounted in mounts()):
        why, fix = "a file system is mounted below it", "Unmount it (see findmnt), then try again"
        raise ImageError(f"cannot remove {folder}", why, fix)
    shutil.rmtree(folder)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise HostError if *folder* has too little free space."""
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    if free < needed_bytes:
        why = f"{folder.parent} has {free // 1024**2} MiB free, but a build needs {needed_bytes // 1024**2}"
        fix = "Free some space, or set X07_VM_CACHE_DIR to a folder on a larger disk"
        raise HostError("cannot build the guest image", why, fix)
