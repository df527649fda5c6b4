"""What a confined process sees of this host: the system's programs, read-only, no user's files, and the agent's code.

The agent's code is a cached zip for the host's own interpreter. Guest images contain the same code.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host.paths import cache_folder, replace_file
from x07_sandbox.host.processes import output_of
from x07_sandbox.host.verdicts import file_state
from x07_sandbox.images.guestcode import FILTERS, PACK, PLACES, GuestCode, read_guest_code
from x07_sandbox.jail.bwrap import BWRAP

PYTHON: Final = "/usr/bin/python3"
AGENT: Final = "/run/x07/agent.zip"
SCRATCH: Final = "/run/x07/scratch"
GROUP: Final = "/run/x07/cgroup"
_PROGRAMS: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SHOWN: Final = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")
_EMPTY: Final = ("home", "media", "mnt", "opt", "root", "srv", "sys", "tmp", "var", "x07")
FILES: Final = {
    "/etc/passwd": b"root:x:0:0:root:/root:/usr/sbin/nologin\n"
    b"x07:x:65532:65532:x07:/opt/x07:/usr/sbin/nologin\n"
    b"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "/etc/group": b"root:x:0:\nx07:x:65532:\nnogroup:x:65534:\n",
    "/etc/hosts": b"127.0.0.1\tlocalhost\n::1\tlocalhost\n",
    "/etc/machine-id": b"",
    "/etc/resolv.conf": b"",
    "/etc/nsswitch.conf": b"hosts: files dns\n",
}


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The system folders at the root: links with their targets, and real folders."""

    links: dict[str, str]
    folders: tuple[str, ...]


def this_system() -> System:
    """Return the system folders of this host."""
    links = {name: str(Path("/", name).readlink()) for name in _PROGRAMS if Path("/", name).is_symlink()}
    folders = tuple(name for name in _PROGRAMS if name not in links and Path("/", name).is_dir())
    return System(links=links, folders=folders)


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """One confined agent.

    mark: the random text that identifies the job's processes. agent_fd: the agent's code. file_fds: descriptors of
    FILES, by path. scratch_bytes: limit for the job's files, which are in memory. groups: the program's control groups,
    by their place below GROUP; the place is "" if there is only one. lock_fd: stays open as long as any process of the
    agent lives.
    """

    system: System
    mark: str
    agent_fd: int
    file_fds: dict[str, int]
    channel_fd: int
    scratch_bytes: int
    groups: dict[str, Path]
    lock_fd: int | None = None


def view_args(system: System) -> list[str]:
    """Return bubblewrap's options for a read-only system without the users' files."""
    args = ["--ro-bind", "/usr", "/usr"]
    for name, target in system.links.items():
        args += ["--symlink", target, f"/{name}"]
    for name in system.folders:
        args += ["--ro-bind", f"/{name}", f"/{name}"]
    for path in _SHOWN:
        args += ["--ro-bind-try", path, path]
    for name in _EMPTY:
        args += ["--perms", "0755", "--dir", f"/{name}"]
    return args


def sandbox_argv(sandbox: Sandbox) -> list[str]:
    """Return the command line of bubblewrap with the agent, which has all capabilities in its user namespace."""
    argv = [BWRAP, "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL"]
    # No cgroup namespace: processes could not be moved into a group outside of it. Init makes one later.
    argv += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts")]
    argv += ["--hostname", "x07", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("LC_ALL", "C.UTF-8"), ("X07_INSTANCE", sandbox.mark)):
        argv += ["--setenv", name, value]
    argv += ["--proc", "/proc", "--dev", "/dev", *view_args(sandbox.system), "--tmpfs", "/run"]
    for path, fd in sandbox.file_fds.items():
        argv += ["--perms", "0644", "--file", str(fd), path]
    argv += ["--perms", "0400", "--file", str(sandbox.agent_fd), AGENT]
    argv += ["--perms", "0755", "--size", str(sandbox.scratch_bytes), "--tmpfs", SCRATCH]
    for name, folder in sandbox.groups.items():
        argv += ["--bind", str(folder), f"{GROUP}/{name}".rstrip("/")]
    if sandbox.lock_fd is not None:
        argv += ["--sync-fd", str(sandbox.lock_fd)]
    words = agent_argv(AGENT, "os", str(sandbox.channel_fd), sandbox.mark)
    return [*argv, "--chdir", "/", "--", *words]


def agent_argv(code: str, *words: str) -> list[str]:
    """Return an agent's command line."""
    return [PYTHON, "-I", "-S", "-B", code, *words]


_BUILD_S: Final = 120
_KEEP: Final = 8  # other versions may be in use
# Paths that change when programs are installed or removed.
_CHANGES: Final = ("/var/lib/dpkg/status", "/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/libexec", "/etc/ld.so.cache")


def agent_code(*, confined: bool) -> Path:
    """Return the path of the agent's zip. confined: whether to include its seccomp filters. Raises HostError."""
    code, folder = read_guest_code(), cache_folder("agent")
    key = _key(code, confined=confined)
    for path in folder.glob(f"{key}-*.zip"):
        if path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
            return path
        path.unlink(missing_ok=True)  # damaged
    data = _build(code, this_system(), confined=confined)
    path = folder / f"{key}-{hashlib.sha256(data).hexdigest()}.zip"
    replace_file(path, data)
    for old in sorted(folder.glob("*.zip"), key=lambda one: one.stat().st_mtime)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def _key(code: GuestCode, *, confined: bool) -> str:
    """Return a digest of everything that the zip depends on."""
    parts: list[object] = [code.digest, confined, os.uname().machine]
    for path in (PYTHON, *(_CHANGES if confined else ())):
        try:
            parts.append(file_state(path))
        except OSError:
            parts.append(path)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(code: GuestCode, system: System, *, confined: bool) -> bytes:
    with tempfile.TemporaryDirectory(prefix="agent-", dir=cache_folder("tmp")) as name:
        work = Path(name)
        data, target = work / "data", work / "agent.zip"
        data.mkdir()
        code.write(work / "source")
        if confined:
            _run(_in_view(system, work, [f"/x07/source/{FILTERS}", "/x07/data"]))
            _run(_in_view(system, work, [f"/x07/source/{PLACES}", "/x07/data/places.json"]))
        script = [str(work / "source" / PACK), str(work / "source" / "agent"), str(data), str(target)]
        _run([PYTHON, "-I", "-S", *script])
        return target.read_bytes()


def _in_view(system: System, work: Path, script: list[str]) -> list[str]:
    """Return the command that runs *script* in the file system of a confined program, with *work* at /x07."""
    argv = [BWRAP, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--proc", "/proc"]
    argv += ["--dev", "/dev", *view_args(system), "--bind", str(work), "/x07", "--chdir", "/"]
    return [*argv, "--", PYTHON, "-I", "-S", *script]


def _run(argv: list[str]) -> None:
    try:
        done = output_of(argv, timeout_s=_BUILD_S, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HostError("cannot prepare the agent", f"{argv[0]} failed with {exc}", "Run x07 doctor") from exc
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        why = said or f"{argv[0]} exited with status {done.returncode}"
        raise HostError("cannot prepare the agent", why, "Allow user namespaces here, or use another backend")
