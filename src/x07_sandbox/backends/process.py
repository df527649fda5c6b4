"""The backends `os` and `none`: a confined process on this host, and an unconfined process.

A confined process sees the system's programs, read-only, no user's files, and the agent's code. That code is a cached
zip for the host's own interpreter. Guest images contain the same code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.backends.base import Availability, Handshake, Job, greet
from x07_sandbox.backends.jailed import Ends, Start, StreamInstance, running
from x07_sandbox.backends.prerequisites import Need, require, version_in
from x07_sandbox.channel.link import State
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import memory_file, require_own_proc
from x07_sandbox.host.paths import cache_folder, replace_file
from x07_sandbox.host.processes import Launch, output_of
from x07_sandbox.host.verdicts import Verdict, file_state
from x07_sandbox.host.waiting import Deadline
from x07_sandbox.images.store import FILTERS, PACK, PLACES, GuestCode, installed_code, read_guest_code
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.jail.bwrap import BWRAP, PERL, SETPRIV, may_nest, supervisor_argv
from x07_sandbox.jail.resources import lease_uid, program_groups, remove_groups
from x07_sandbox.kernel import landlock_version
from x07_sandbox.policy.features import LEAVES_TREE, NO_ROOT, NOT_OBSERVED, Features
from x07_sandbox.records.reader import StoredJob
from x07_sandbox.records.runs import Claim, JobRecord, create_record, drop_unstarted, new_run_id
from x07_sandbox.records.stopping import stop_recorded

PYTHON: Final = "/usr/bin/python3"
AGENT: Final = "/run/x07/agent.zip"
SCRATCH: Final = "/run/x07/scratch"
GROUP: Final = "/run/x07/cgroup"
NFT: Final = "/usr/sbin/nft"
_ANSWER_S: Final = 5.0
_CANNOT_START: Final = "cannot start a confined process"
_NEED_PYTHON: Final = (Need("program", PYTHON, "python3"), Need("program", PERL, "perl-base"))
_NEW_PYTHON: Final = Need("version", PYTHON, "python3", least=(3, 12))  # the agent needs os.unshare and os.setns
_NEED_JAIL: Final = (
    Need("program", BWRAP, "bubblewrap"),
    Need("program", SETPRIV, "util-linux"),
    Need("library", "libseccomp.so.2", "libseccomp2"),
    Need("not-setuid", BWRAP),
)
_NAMESPACES: Final = Need("namespaces", "user namespaces", optional=True)
_NEW_JAIL: Final = Need("version", BWRAP, "bubblewrap", least=(0, 8))
_WALLS: Final = frozenset({"host-files", "no-host-files", "no-host-variables", "no-network"})
_PER_PROCESS: Final = frozenset({"limits.fds", "limits.core_dumps"})
_BY_CONTROLLER: Final = {"memory": "limits.mem_bytes", "pids": "limits.procs", "cpuacct": "limits.cpu_ms"}
_TASKS_APART: Final = (5, 14)  # since this Linux a process limit counts each user namespace separately
_LANDLOCK_LEAST: Final = 2  # the first version that allows moving files between folders
_SHARED: Final = {
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    "observed-connections": NOT_OBSERVED,
    "connect-fails": "the relay accepts a connection before the gate decides, and resets it if the gate refuses",
}
_NO_IMAGE: Final = dict.fromkeys(("image-digest", "damaged-image"), "it uses this host's programs instead of an image")
_NO_COPIES: Final = "an unconfined program cannot get copies of folders"
_UNCONFINED: Final = {
    "whole-command": LEAVES_TREE,
    "root-inside": NO_ROOT,
    **dict.fromkeys(("cpu", "cpu-of-one"), "CPU time of children that are not waited for is not counted"),
    **dict.fromkeys(
        ("memory", "tasks", "memory-together", "tasks-together"),
        "no control group holds the program and its children together",
    ),
    **dict.fromkeys(("read-root", "write-root", "out-folder", "changes-so-far"), _NO_COPIES),
    **dict.fromkeys(("no-network", "no-host-servers", "observed-connections"), "the program uses this host's network"),
    **dict.fromkeys(("unlisted-name", "gate-asked", "connect-fails"), "nothing limits the program to a list of hosts"),
    **dict.fromkeys(("file-permissions", "file-root"), "the file server can use its user's files, and root any file"),
    "no-host-files": "the program can use its user's files",
    "no-host-variables": "the program can read the environment of its user's processes",
    "no-host-processes": "the program is one of its user's processes",
    "no-capabilities": "the program has its user's capabilities",
    **dict.fromkeys(("no-more-tasks", "no-execution"), "nothing filters its system calls"),
}
_CONFINED_DEPTH: Final = 2  # below the supervisor: bubblewrap, then the agent
_FREE_DEPTH: Final = 1
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
_BUILD_S: Final = 120
_KEEP: Final = 8  # other versions may be in use
# Paths that change when programs are installed or removed.
_CHANGES: Final = ("/var/lib/dpkg/status", "/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/libexec", "/etc/ld.so.cache")


class _Backend(ABC):
    """The common part of the `os` and `none` backends."""

    name: str
    known_gaps: Mapping[str, str]
    uses_image = False
    engine_images = None
    cloning = None
    snapshots = None

    @abstractmethod
    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:
        """Return what this host can limit. Raises HostError if programs are missing."""

    def least_features(self) -> Features:
        """Return what this host can limit. Raises HostError if programs are missing."""
        return self.probe(boot=False).features

    @abstractmethod
    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        """Start an agent, without the handshake. Raises BackendError, HostError."""

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[StreamInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        record = create_record(job.claim, backend=self.name, image_digest="")
        with self._started(record, job.claim.deadline_s) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def stop(self, record: JobRecord) -> bool:
        """Stop a recorded job, and remove its control groups and files."""

        def remove(stored: StoredJob) -> bool:
            groups = stored.owner is None or remove_groups(stored.owner.cgroups)
            return remove_folder(files_folder(record)) and groups

        return stop_recorded(record, remove)

    def _prove(self) -> str:
        """Start an agent and return why it did not answer, or "" if it did. Raises SandboxError."""
        claim = Claim(run_id=new_run_id(), phase="probe", wall_ms=int(_ANSWER_S * 1000))
        record = create_record(claim, backend=self.name, image_digest="")
        with self._started(record, int(_ANSWER_S) + 5) as instance:
            failure = Handshake(instance, State.WAITING).until(State.GREETED, Deadline.after(_ANSWER_S))
            return "" if failure is None else failure.text


class OsBackend(_Backend):
    """Confined processes: bubblewrap, user namespaces, and the agent's own confinement."""

    name = "os"
    known_gaps = _NO_IMAGE | _SHARED
    needs = (*_NEED_JAIL, *_NEED_PYTHON, _NAMESPACES, _NEW_JAIL, _NEW_PYTHON)

    def __init__(self) -> None:
        self._controllers: tuple[str, ...] = ()

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:
        """Return what this host can limit, proven once per boot by starting a process. Raises HostError."""
        require((*_NEED_JAIL, *_NEED_PYTHON), _CANNOT_START)
        self._controllers = _controllers()
        features = _confined_features(self._controllers)
        proof = f"x07's agent answered from a confined process under Linux {os.uname().release}"
        verdict = Verdict("confined", file_state(BWRAP), os.geteuid(), agent_code(confined=True).name)
        known = bool(verdict.read())
        if not known and boot:
            require((_NEW_JAIL, _NEW_PYTHON), _CANNOT_START)
            if why := self._prove():
                fix = "Allow user namespaces here (in a container: --privileged), or use another backend"
                raise HostError(_CANNOT_START, why, fix)
            verdict.write({"proof": proof})
            known = True
        warnings = ["the program's system calls reach this host's kernel"]
        if missing := sorted(set(_BY_CONTROLLER.values()) - features.can_enforce):
            warnings.append(f"this host provides no control groups for {', '.join(missing)}")
        proof = proof if known else "not tested on this host yet"
        return Availability(features=features, proof=proof, known=known, warnings=tuple(warnings))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        return start_confined(record, deadline_s, self._controllers)


class NoneBackend(_Backend):
    """Ordinary processes of the user, without isolation."""

    name = "none"
    known_gaps = _NO_IMAGE | _UNCONFINED
    needs = (*_NEED_PYTHON, _NEW_PYTHON)

    def probe(self, _image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - nothing boots
        """Return what this host can limit. Raises HostError if the agent's interpreter is missing."""
        require(self.needs, "cannot start the agent")
        root = os.geteuid() == 0  # root may raise its own limits again
        features = Features(isolation="none", own_kernel=False, can_enforce=frozenset() if root else _PER_PROCESS)
        proof = "programs run as ordinary processes, without confinement"
        whose = "root's" if root else "this user's"
        warning = f"nothing protects {whose} files, processes and network from the program"
        return Availability(features=features, proof=proof, warnings=(warning,))

    def _started(self, record: JobRecord, deadline_s: int) -> AbstractContextManager[StreamInstance]:
        return start_unconfined(record, deadline_s)


def _controllers() -> tuple[str, ...]:
    """Return the controllers for which this host lets this process make control groups."""
    groups = program_groups(f"probe-{os.urandom(8).hex()}", uid=os.geteuid())
    groups.remove()
    return groups.holds


def _confined_features(controllers: tuple[str, ...]) -> Features:
    held = set(_WALLS | _PER_PROCESS)
    if os.access(NFT, os.X_OK):  # needed by the agent for the relay's rules
        held.add("network")
    if landlock_version() >= _LANDLOCK_LEAST:
        held.add("confinement")
    if version_in(os.uname().release) >= _TASKS_APART:
        held.add("limits.procs")
    held |= {_BY_CONTROLLER[controller] for controller in controllers}
    return Features(isolation="process", own_kernel=False, can_enforce=frozenset(held))


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


def agent_code(*, confined: bool) -> Path:
    """Return the path of the agent's zip. confined: whether to include its seccomp filters. Raises HostError."""
    folder = cache_folder("agent")
    key = _key(confined=confined)
    for path in folder.glob(f"{key}-*.zip"):
        if path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
            return path
        path.unlink(missing_ok=True)  # damaged
    data = _build(read_guest_code(), this_system(), confined=confined)
    path = folder / f"{key}-{hashlib.sha256(data).hexdigest()}.zip"
    replace_file(path, data)
    for old in sorted(folder.glob("*.zip"), key=lambda one: one.stat().st_mtime)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def _key(*, confined: bool) -> str:
    """Return a digest of everything that the zip depends on."""
    parts: list[object] = [installed_code(), confined, os.uname().machine]
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
