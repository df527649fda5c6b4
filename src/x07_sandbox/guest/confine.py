"""Confinement of the program, as lists of steps that each name what they need. A step that fails ends the job.

`Confinement.world`: done by init, still root, builds what the program will see. `Confinement.rights`: done by the program's
own process, takes its rights away. Neither depends on the job, so both are done before a machine is saved.
`Confinement.job`: done by init, still root, when the orders have come. A step may need what a later one gives up.

`MACHINE` are those of a virtual machine; `guest/process.py` has those of the weaker platforms.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from x07_sandbox.guest import execution, interpreter, restrict, system

T = TypeVar("T")

PROGRAM_PID: Final = 2  # in the namespace of which our init is the first process
UID: Final = 65532  # fixed, in the image's passwd; holds nothing in the guest
ROOT: Final = "/run/x07/root"
MACHINE_ID: Final = "/run/x07/machine-id"
RESOLV_CONF: Final = "/run/x07/resolv.conf"
SCRATCH: Final = "/run/x07/scratch"
MEMORY: Final = "/run/x07/memory"
_ENTRIES: Final = 4096  # an archive of small files cannot hold more: a header has 110 bytes
CWD: Final = "/opt/x07"
IN_MEMORY: Final = ("/tmp", "/dev/shm")  # noqa: S108 - folders of the program that lie in the guest's memory
_INPUTS: Final = "/x07/in"
CGROUP_VIEW: Final = "/sys/fs/cgroup"
_PTYS_MAX: Final = 64  # the kernel's buffers of each are not counted as the program's memory


class World(NamedTuple):
    """What the steps before the job work on.

    netns_fd: the program's network namespace, made and kept by the agent.
    procs_fds: join the program's control groups. group_kills: whether these can end all their processes.
    namespaces: whether the program has its own.
    interpreter: whether a Python interpreter waits to become the program. preload: what it has imported by then.
    base_filter, quiet_filter: seccomp, for every program. readable: of the image, what holds no programs.
    network: whether names are looked up at the relay.
    group_folder: the program's control group, which it can read at CGROUP_VIEW; empty for none.
    """

    netns_fd: int
    procs_fds: tuple[int, ...]
    interpreter: bool
    preload: list[str]
    base_filter: bytes
    quiet_filter: bytes
    readable: list[str]
    group_kills: bool
    namespaces: bool
    network: bool
    group_folder: str


class JobSettings(NamedTuple):
    """What depends on the job. execution: an `execution.Execution`, as the plain tuple that can be sent.

    tmp_bytes: size of /tmp and of /dev/shm. cpu_s: the limit below that of the control group's counter.
    inputs_on_disk: whether the files of the job are too large to lie in memory.
    """

    hostname: str
    tmp_bytes: int
    out_writable: bool
    inputs_on_disk: bool
    fds: int
    cpu_s: int
    core_bytes: int
    tasks: int
    execution: tuple[Any, ...] | None


class StepError(Exception):
    """A step of the confinement failed: its name, the kernel's error number or 0, and a message, as args."""


class Step(NamedTuple, Generic[T]):
    """One measure: its name in reports, what it needs, the doing, and which fields of the orders decide it."""

    name: str
    needs: str
    apply: Callable[[T], None]
    fields: tuple[str, ...] = ()


class Confinement(NamedTuple):
    """The steps of one platform, in their order."""

    world: tuple[Step[World], ...]
    rights: tuple[Step[World], ...]
    job: tuple[Step[JobSettings], ...]


# Folders of the root that hold nothing of the image: something else is mounted there, or folders of the host.
_PROGRAM_FOLDERS: Final = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
_LOADERS: Final = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
_OWN: Final = frozenset({"dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "x07"})


def _namespaces(world: World) -> None:
    os.setns(world.netns_fd, os.CLONE_NEWNET)
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS | os.CLONE_NEWCGROUP)
    system.mount("none", "/", "", system.MS_REC | system.MS_PRIVATE)


def _read_only_system(_world: World) -> None:
    """A root of its own, in which folders of the host can have their places, and in it what the image has."""
    os.makedirs(ROOT, exist_ok=True)
    system.mount("tmpfs", ROOT, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=1m,nr_inodes=8192")
    for name in os.listdir("/"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{ROOT}/{name}")
        elif os.path.isdir(f"/{name}"):
            os.mkdir(f"{ROOT}/{name}")
            # A root of the host may lie in any of ours, /root for one: the way to it must be open.
            way = 0o755 if name in _OWN else 0
            os.chmod(f"{ROOT}/{name}", os.stat(f"/{name}").st_mode & 0o7777 | way)
            if name not in _OWN:
                system.bind(f"/{name}", f"{ROOT}/{name}", system.MS_RDONLY)
    os.mkdir(f"{ROOT}{CWD}")


def _proc(_world: World) -> None:
    flags = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
    system.mount("proc", f"{ROOT}/proc", "proc", flags, "hidepid=invisible")
    # What is left of /proc that speaks of the machine or changes it: bound over itself, read-only.
    for name in ("sys", "bus", "irq", "fs"):
        if os.path.isdir(f"{ROOT}/proc/{name}"):
            system.bind(f"{ROOT}/proc/{name}", f"{ROOT}/proc/{name}", system.MS_RDONLY)


def _make_device(name: str, path: str) -> None:
    os.mknod(path, 0o20666, os.stat(f"/dev/{name}").st_rdev)
    os.chmod(path, 0o666)  # noqa: S103 - these devices are for everybody


def _devices(_world: World) -> None:
    devices(_make_device)


def devices(make: Callable[[str, str], None]) -> None:
    """Mount /dev with the devices that every program may use, and pseudoterminals of its own.

    make: makes the device of a name at a path. /dev/tty opens the controlling terminal, which is none of the host's:
    the program's session has none until it opens one of its own.
    """
    dev = f"{ROOT}/dev"
    system.mount("tmpfs", dev, "tmpfs", system.MS_NOSUID, "mode=0755,size=64k,nr_inodes=64")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        make(name, f"{dev}/{name}")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{dev}/{name}")
    os.mkdir(f"{dev}/pts")
    pts = f"newinstance,mode=0620,ptmxmode=0666,max={_PTYS_MAX}"
    system.mount("devpts", f"{dev}/pts", "devpts", system.MS_NOSUID | system.MS_NOEXEC, pts)
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    os.mkdir(f"{dev}/shm")
    _tmpfs(f"{dev}/shm")
    system.mount("", dev, "", system.MS_REMOUNT | system.MS_BIND | system.MS_NOSUID | system.MS_RDONLY)


def _remount(path: str, flags: int) -> None:
    """Change the flags of a mount: MS_RDONLY, or 0 for writable."""
    system.mount("", path, "", system.MS_REMOUNT | system.MS_BIND | system.MS_NOSUID | system.MS_NODEV | flags)


def _tmpfs(path: str) -> None:
    """An empty one for the program, still without room: `_sizes` gives it that."""
    system.mount("tmpfs", path, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=1777,size=4k,nr_inodes=16")


def _temporary(world: World) -> None:
    _tmpfs(f"{ROOT}/tmp")  # noqa: S108 - the guest's own
    system.mount("tmpfs", f"{ROOT}/run", "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=64k")
    if world.interpreter:
        os.mkdir(f"{ROOT}{interpreter.FOLDER}")
        with open(f"{ROOT}{interpreter.FOLDER}/sitecustomize.py", "x", encoding="utf-8") as file:
            file.write(interpreter.hook(world.preload))
    system.bind(MACHINE_ID, f"{ROOT}/etc/machine-id", system.MS_RDONLY)
    if world.network:
        system.bind(RESOLV_CONF, f"{ROOT}/etc/resolv.conf", system.MS_RDONLY)
    _remount(f"{ROOT}/run", system.MS_RDONLY)


def _kernel_state(world: World) -> None:
    """Mount an empty /sys; in it, read-only, the program's own control group and no other.

    Runtimes (node, the JVM, Go) read the memory limit there to choose the size of their heaps.
    """
    system.mount("tmpfs", f"{ROOT}/sys", "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=4k")
    if world.group_folder:
        os.makedirs(f"{ROOT}{CGROUP_VIEW}")
        system.bind(world.group_folder, f"{ROOT}{CGROUP_VIEW}", system.MS_RDONLY | system.MS_NOEXEC)
    _remount(f"{ROOT}/sys", system.MS_RDONLY)


def _work_folders(_world: World) -> None:
    x07 = f"{ROOT}/x07"
    system.mount("tmpfs", x07, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=64k")
    for name in ("in", "out"):
        os.mkdir(f"{x07}/{name}")
    # Files of the job lie in memory, unless they are large: then the upper mount is taken off.
    system.bind(f"{SCRATCH}/in", f"{x07}/in", system.MS_RDONLY)
    system.bind(f"{MEMORY}/in", f"{x07}/in", system.MS_RDONLY)
    system.bind(f"{SCRATCH}/out", f"{x07}/out", system.MS_RDONLY)
    _remount(x07, system.MS_RDONLY)
    system.bind(f"{SCRATCH}/work", f"{ROOT}{CWD}")


def _enter(_world: World) -> None:
    system.pivot_root(ROOT)
    root_mode(system.MS_RDONLY)


def rules(world: World) -> None:
    """Landlock's rules for a program that may execute some programs only, made here since a clone would pay for each.

    `_programs` adds those of the job to the same ruleset; whether the program is put under them comes later.
    """
    fd = system.landlock_ruleset(files=system.FS_EXECUTE | system.FS_READ_FILE | system.FS_REFER)
    os.dup2(fd, interpreter.RULES_FD, inheritable=world.interpreter)
    os.close(fd)
    # Moving files from folder to folder is not theirs to forbid.
    system.landlock_allow(interpreter.RULES_FD, "/", system.FS_REFER)
    own = [f"/{name}" for name in sorted(_OWN) if os.path.isdir(f"/{name}")]
    for path in (*own, *world.readable):
        with contextlib.suppress(FileNotFoundError):  # a host may have removed it since
            system.landlock_allow(interpreter.RULES_FD, path, system.FS_READ_FILE)
    for path in _LOADERS:  # executed with every program, by the kernel itself
        with contextlib.suppress(FileNotFoundError):
            execution.allow_program(path)
    for folder in _PROGRAM_FOLDERS:
        execution.links(folder)  # known from now on


def root_mode(flags: int) -> None:
    """Make the root writable, 0, or not, MS_RDONLY."""
    _remount("/", flags)


def forget_interpreter() -> None:
    """Remove what the waiting interpreter has read of ours from the program's view."""
    _remount("/run", 0)
    os.unlink(f"{interpreter.FOLDER}/sitecustomize.py")
    os.rmdir(interpreter.FOLDER)
    _remount("/run", system.MS_RDONLY)


def _hostname(settings: JobSettings) -> None:
    socket.sethostname(settings.hostname)


def _sizes(settings: JobSettings) -> None:
    # Inodes are bounded too: an empty file costs about 1 KiB of kernel memory.
    options = f"size={settings.tmp_bytes},nr_inodes={max(1024, settings.tmp_bytes // 4096)}"
    for path in IN_MEMORY:
        system.mount("tmpfs", path, "", system.MS_REMOUNT | system.MS_NOSUID | system.MS_NODEV, options)


def _output(settings: JobSettings) -> None:
    _remount("/x07/out", 0 if settings.out_writable else system.MS_RDONLY)


def _inputs(settings: JobSettings) -> None:
    if settings.inputs_on_disk:
        system.unmount("/x07/in")


def resource_limits(settings: JobSettings) -> tuple[tuple[int, int], ...]:
    """The limits of each single process, by resource."""
    # The cgroup's counter decides on cpu-limit. This one is higher: its signal could be the program's own.
    return (
        (resource.RLIMIT_CPU, settings.cpu_s),
        (resource.RLIMIT_NOFILE, settings.fds),
        (resource.RLIMIT_CORE, settings.core_bytes),
        (resource.RLIMIT_MEMLOCK, 65536),
        (resource.RLIMIT_MSGQUEUE, 65536),
        (resource.RLIMIT_SIGPENDING, 1024),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_RTPRIO, 0),
    )


def _resource_limits(settings: JobSettings) -> None:
    for which, value in resource_limits(settings):
        resource.prlimit(PROGRAM_PID, which, (value, value))


def _programs(settings: JobSettings) -> None:
    if settings.execution is not None:
        execution.allow(execution.Execution(*settings.execution))


def _no_execution(settings: JobSettings) -> None:
    if settings.execution is not None:
        execution.close(execution.Execution(*settings.execution), [*IN_MEMORY, "/x07/out", CWD], _INPUTS)


# A remount of its size takes the flag off again.
_OF_NO_EXECUTION: Final = ("execution", "tmp_bytes", "out_writable", "inputs_on_disk")
RESOURCES: Final = ("fds", "cpu_s", "core_bytes")
VIEW: Final[tuple[Step[JobSettings], ...]] = (
    Step("host name", "CAP_SYS_ADMIN", _hostname, ("hostname",)),
    Step("sizes", "CAP_SYS_ADMIN", _sizes, ("tmp_bytes",)),
    Step("output folder", "CAP_SYS_ADMIN", _output, ("out_writable",)),
    Step("large inputs", "CAP_SYS_ADMIN", _inputs, ("inputs_on_disk",)),
    Step("programs", "Landlock", _programs, ("execution",)),
    Step("no execution", "CAP_SYS_ADMIN", _no_execution, _OF_NO_EXECUTION),
)


def _control_group(world: World) -> None:
    for fd in world.procs_fds:
        os.write(fd, b"0")
    if world.group_folder:
        os.unshare(os.CLONE_NEWCGROUP)  # so that /proc/self/cgroup names the group at CGROUP_VIEW "/"
    system.write_file("/proc/self/oom_score_adj", "500")  # not the agent's, which the kernel must never choose


def no_capabilities(_world: World) -> None:
    """Take all capabilities from what this process will execute."""
    last = int(system.read_file("/proc/sys/kernel/cap_last_cap"))
    for cap in range(last + 1):
        system.prctl(system.PR_CAPBSET_DROP, cap)
    system.prctl(system.PR_CAP_AMBIENT, system.PR_CAP_AMBIENT_CLEAR_ALL)


def _own_user(_world: World) -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)  # from 0 to another: the kernel clears all capability sets


def _no_new_privileges(_world: World) -> None:
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)


def scopes(_world: World) -> None:
    """No signal to a process above, no abstract socket of one: namespaces part them already, and this does it again."""
    scopes = system.SCOPE_SIGNAL | system.SCOPE_ABSTRACT_UNIX_SOCKET
    # Measured: where a later ruleset is about files, this one too forbids moving them unless it allows it.
    fd = system.landlock_ruleset(files=system.FS_REFER, scopes=scopes)
    system.landlock_allow(fd, "/", system.FS_REFER)
    restrict.exec_functions()[0](b"", fd)
    os.close(fd)


def _system_calls(world: World) -> None:
    restrict_self, _ = restrict.exec_functions()
    restrict_self(world.quiet_filter, -1, recorded=False)
    restrict_self(world.base_filter, -1)


def _fresh_signals(_world: World) -> None:
    for number in range(1, 32):
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


FRESH_SIGNALS: Final = Step[World]("fresh signals", "", _fresh_signals)
MACHINE: Final = Confinement(
    world=(
        Step("namespaces", "CAP_SYS_ADMIN", _namespaces),
        Step("read-only system", "CAP_SYS_ADMIN", _read_only_system),
        Step("proc", "CAP_SYS_ADMIN", _proc),
        Step("devices", "CAP_SYS_ADMIN, CAP_MKNOD", _devices),
        Step("temporary folders", "CAP_SYS_ADMIN", _temporary),
        Step("kernel state", "CAP_SYS_ADMIN", _kernel_state),
        Step("work folders", "CAP_SYS_ADMIN, a scratch folder", _work_folders),
        Step("root", "CAP_SYS_ADMIN", _enter),
        Step("rules about programs", "Landlock", rules),
    ),
    rights=(
        Step("control group", "a control group that can be written to", _control_group),
        Step("no capabilities", "CAP_SETPCAP", no_capabilities),
        Step("own user", "CAP_SETUID, CAP_SETGID", _own_user),
        Step("no new privileges", "", _no_new_privileges),
        FRESH_SIGNALS,
        # What depends on the policy is taken away later, by the process itself (`restrict`).
        Step("scopes", "Landlock", scopes),
        Step("system calls", "no new privileges", _system_calls),
    ),
    job=(*VIEW, Step("resource limits", "CAP_SYS_RESOURCE", _resource_limits, RESOURCES)),
)


def mount_memory() -> None:
    """Mount the folder for small files of a job."""
    os.makedirs(MEMORY, mode=0o755, exist_ok=True)
    flags = system.MS_NODEV | system.MS_NOSUID
    system.mount("tmpfs", MEMORY, "tmpfs", flags, f"mode=0755,size=32m,nr_inodes={_ENTRIES}")


def _same(step: Step[T], before: T, what: T) -> bool:
    for name in step.fields:  # noqa: SIM110 - a generator is code that a fresh clone would meet here for the first time
        if getattr(before, name) != getattr(what, name):
            return False
    return True


def apply(steps: tuple[Step[T], ...], what: T, before: T | None = None) -> None:
    """Do the steps in order. Raises StepError at the first that fails.

    before: what they were done with before; what would be the same again is not done again.
    """
    for step in steps:
        if before is not None and _same(step, before, what):
            continue
        try:
            step.apply(what)
        except (OSError, ValueError) as exc:
            number = exc.errno if isinstance(exc, OSError) and exc.errno else 0
            raise StepError(step.name, number, str(exc)) from exc
