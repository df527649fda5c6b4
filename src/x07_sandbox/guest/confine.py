"""Confinement of the program as lists of steps, which state their requirements. A failing step ends the job.

`Steps.world`: init, still root, builds the file system that the program sees. `Steps.rights`: the program's
process drops its rights. Neither depends on the job, so both are done before the VM is saved. `Steps.job`: init,
still root, applies the job's settings. The order matters: a step may need a right that a later step drops.

`MACHINE` is for VMs; `guest/process` defines the weaker platforms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from x07_sandbox import kernel
from x07_sandbox.channel.messages import CWD, IN, OUT
from x07_sandbox.guest import execution, interpreter, system, waiting

T = TypeVar("T")

PROGRAM_PID: Final = 2  # in its namespace, where init is 1
UID: Final = 65532  # in the image's passwd; owns nothing in the guest
ROOT: Final = "/run/x07/root"
MACHINE_ID: Final = "/run/x07/machine-id"
GENERATION: Final = "/run/x07/generation"  # for programs that want to notice that they run in a copy of their VM
RESOLV_CONF: Final = "/run/x07/resolv.conf"
SCRATCH: Final = "/run/x07/scratch"
LAYER: Final = f"{SCRATCH}/layer"
MEMORY: Final = "/run/x07/memory"
# More than fit into trees of IN_MEMORY_BYTES, in which a folder has at least 14 bytes and a file with content 31.
_ENTRIES: Final = 20_000
_PAGES_BYTES: Final = 48 << 20
IN_MEMORY: Final = ("/tmp", "/dev/shm")  # noqa: S108 - the program's tmpfs folders
CGROUP_VIEW: Final = "/sys/fs/cgroup"
_IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # by init, as by Python
ROOTED_IDS: Final = f"0 {UID} 1\n1 100001 65535\n"  # the program's user is root inside; see user_namespaces(7)
# CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, SETFCAP (capabilities(7)).
_CAPABILITIES: Final = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 8, 10, 31))
_RUN_BYTES: Final = 16 << 20
_PTYS_MAX: Final = 64  # their kernel buffers are not charged to the program


class World(NamedTuple):
    """Input of the steps that run before the job is known.

    netns_fd: the program's network namespace. namespaces: whether the program has its own namespaces.
    procs_fds: files through which a process joins the control groups.
    preload: modules imported by a Python interpreter that waits to become the program; None for no interpreter.
    base_filter, quiet_filter: seccomp filters for every program. readable: paths in the image without programs.
    resolver: whether programs have a DNS server.
    group_folder: the control group that the program can read at CGROUP_VIEW, or "" if there is none.
    program_uid: the user of programs, if that is another one. user_fd: the user namespace of programs, if they have
    one and it exists. program_root: where the root file system of programs is mounted, if they have one of their own.
    """

    netns_fd: int
    procs_fds: tuple[int, ...]
    preload: list[str] | None
    base_filter: bytes
    quiet_filter: bytes
    readable: list[str]
    namespaces: bool
    resolver: bool
    group_folder: str
    program_uid: int = -1
    user_fd: int = -1
    program_root: str = ""


class JobSettings(NamedTuple):
    """Settings of one job, which init applies.

    tmp_bytes: size of /tmp and of /dev/shm. cpu_s: RLIMIT_CPU, a backstop for the agent's own CPU limit.
    inputs_on_disk: whether the input files are too large for memory. execution: an `execution.ExecutionRules` as a
    plain tuple, for marshal.
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
    """A confinement step failed. The args are the step's name, the errno or 0, and a message."""


class Step(NamedTuple, Generic[T]):
    """One step: its name in reports, its requirements, its function, and the job settings on which it depends."""

    name: str
    needs: str
    apply: Callable[[T], None]
    fields: tuple[str, ...] = ()


class Steps(NamedTuple):
    """The steps of one platform, in order."""

    world: tuple[Step[World], ...]
    rights: tuple[Step[World], ...]
    job: tuple[Step[JobSettings], ...]


_PROGRAM_FOLDERS: Final = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
_LOADERS: Final = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
# Top-level folders that are not taken from the image: mount points, and places for host folders.
_OWN: Final = frozenset({"dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "x07"})


def _namespaces(world: World) -> None:
    os.setns(world.netns_fd, os.CLONE_NEWNET)
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS | os.CLONE_NEWCGROUP)
    system.mount("none", "/", "", system.MS_REC | system.MS_PRIVATE)


def _read_only_system(_world: World) -> None:
    """Build a new root on tmpfs, with mount points for host folders, and bind the image's folders read-only."""
    os.makedirs(ROOT, exist_ok=True)
    system.mount("tmpfs", ROOT, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=1m,nr_inodes=8192")
    for name in os.listdir("/"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{ROOT}/{name}")
        elif os.path.isdir(f"/{name}"):
            os.mkdir(f"{ROOT}/{name}")
            # A host folder may be mounted in any of ours, such as /root: the program must be able to enter it.
            enter = 0o755 if name in _OWN else 0
            os.chmod(f"{ROOT}/{name}", os.stat(f"/{name}").st_mode & 0o7777 | enter)
            if name not in _OWN:
                system.bind(f"/{name}", f"{ROOT}/{name}", system.MS_RDONLY)
    os.mkdir(f"{ROOT}{CWD}")


def _layered_system(world: World) -> None:
    """Mount a writable layer over the programs' image.

    If programs have a user namespace, the image's files belong to its users.
    """
    os.makedirs(ROOT, exist_ok=True)
    lower, upper, work = (f"{LAYER}/{name}" for name in ("lower", "upper", "work"))
    for path in (LAYER, lower, upper, work):
        os.mkdir(path, 0o755)
    image = system.open_tree(world.program_root or "/")
    if world.user_fd >= 0:
        os.chown(upper, UID, UID)
        system.map_ids(image, world.user_fd)
    system.move_mount(image, lower)
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on"
    system.mount("overlay", ROOT, "overlay", system.MS_NOSUID | system.MS_NODEV, options)
    for name in sorted(_OWN):
        os.makedirs(f"{ROOT}/{name}", exist_ok=True)
    os.makedirs(f"{ROOT}{CWD}", exist_ok=True)


def _proc(_world: World) -> None:
    flags = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
    system.mount("proc", f"{ROOT}/proc", "proc", flags, "hidepid=invisible")
    # The parts of /proc that describe or change the machine: read-only.
    for name in ("sys", "bus", "irq", "fs"):
        if os.path.isdir(f"{ROOT}/proc/{name}"):
            system.bind(f"{ROOT}/proc/{name}", f"{ROOT}/proc/{name}", system.MS_RDONLY)


def _make_device(name: str, path: str) -> None:
    os.mknod(path, 0o20666, os.stat(f"/dev/{name}").st_rdev)
    os.chmod(path, 0o666)  # noqa: S103 - these devices are for everybody


def _devices(_world: World) -> None:
    devices(_make_device)


def devices(make: Callable[[str, str], None]) -> None:
    """Mount /dev with devices that *make*(name, path) creates, and private pseudoterminals."""
    dev = f"{ROOT}/dev"
    system.mount("tmpfs", dev, "tmpfs", system.MS_NOSUID, "mode=0755,size=64k,nr_inodes=64")
    # /dev/tty is harmless: the program's session has no terminal until the program opens one of its own.
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
    system.mount("", path, "", system.MS_REMOUNT | system.MS_BIND | system.MS_NOSUID | system.MS_NODEV | flags)


def _tmpfs(path: str) -> None:
    """Mount a tmpfs for the program. `_sizes` sets the size later."""
    system.mount("tmpfs", path, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=1777,size=4k,nr_inodes=16")


def _temporary(world: World) -> None:
    _tmpfs(f"{ROOT}/tmp")  # noqa: S108 - in the guest
    system.mount("tmpfs", f"{ROOT}/run", "tmpfs", system.MS_NOSUID | system.MS_NODEV, "mode=0755,size=128k")
    if world.preload is not None:
        os.mkdir(f"{ROOT}{waiting.FOLDER}")
        with open(f"{ROOT}{waiting.FOLDER}/sitecustomize.py", "x", encoding="utf-8") as file:
            file.write(interpreter.hook(world.preload))
    os.mkdir(f"{ROOT}{os.path.dirname(GENERATION)}")
    with open(f"{ROOT}{GENERATION}", "x", encoding="ascii"):
        pass
    for path in ("/etc/machine-id", GENERATION):
        system.bind(MACHINE_ID, f"{ROOT}{path}", system.MS_RDONLY)
    if world.resolver:
        system.bind(RESOLV_CONF, f"{ROOT}/etc/resolv.conf", system.MS_RDONLY)
    _remount(f"{ROOT}/run", system.MS_RDONLY)


def _writable_run(world: World) -> None:
    _temporary(world)
    run = f"{ROOT}/run"
    system.mount("", run, "", system.MS_REMOUNT | system.MS_NOSUID | system.MS_NODEV, f"size={_RUN_BYTES}")
    _remount(run, 0)
    os.chown(run, UID, UID)


def _kernel_state(world: World) -> None:
    """Mount a read-only /sys that contains only the program's control group: Node, the JVM and Go read limits there."""
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
    # Inputs are in memory; for large ones `_inputs` removes the upper mount.
    system.bind(f"{SCRATCH}/in", f"{x07}/in", system.MS_RDONLY)
    system.bind(f"{MEMORY}/in", f"{x07}/in", system.MS_RDONLY)
    system.bind(f"{SCRATCH}/out", f"{x07}/out", system.MS_RDONLY)
    _remount(x07, system.MS_RDONLY)
    system.bind(f"{SCRATCH}/work", f"{ROOT}{CWD}")


def _enter(_world: World) -> None:
    _enter_writable(_world)
    root_mode(system.MS_RDONLY)


def _enter_writable(_world: World) -> None:
    system.pivot_root(ROOT)


def rules(world: World) -> None:
    """Create the Landlock ruleset for programs with an execution list, and add the rules that all jobs share.

    This is done before the VM is saved, since a clone would need time for each rule. `_programs` adds the job's rules.
    `restrict` enforces the ruleset if the job has an execution list.
    """
    fd = kernel.landlock_ruleset(kernel.EXECUTE | kernel.READ_FILE | kernel.REFER)
    os.dup2(fd, waiting.RULES_FD, inheritable=world.preload is not None)
    os.close(fd)
    # Do not forbid moving files between folders.
    kernel.landlock_allow(waiting.RULES_FD, "/", kernel.REFER)
    own = [f"/{name}" for name in sorted(_OWN) if os.path.isdir(f"/{name}")]
    for path in (*own, *world.readable):
        with contextlib.suppress(FileNotFoundError):  # on a shared system, it may have been removed
            kernel.landlock_allow(waiting.RULES_FD, path, kernel.READ_FILE)
    for path in _LOADERS:  # the kernel executes them with every program
        with contextlib.suppress(FileNotFoundError):
            execution.allow_program(path)
    for folder in _PROGRAM_FOLDERS:
        execution.link_targets(folder)  # fill its cache


def root_mode(flags: int) -> None:
    """Make the root writable (0) or read-only (MS_RDONLY)."""
    _remount("/", flags)


def forget_interpreter() -> None:
    """Remove the waiting interpreter's start-up module from the file system that the program sees."""
    _remount("/run", 0)
    os.unlink(f"{waiting.FOLDER}/sitecustomize.py")
    os.rmdir(waiting.FOLDER)
    _remount("/run", system.MS_RDONLY)


def _hostname(settings: JobSettings) -> None:
    socket.sethostname(settings.hostname)


def _sizes(settings: JobSettings) -> None:
    # Bound inodes too: an empty file costs about 1 KiB of kernel memory.
    options = f"size={settings.tmp_bytes},nr_inodes={max(1024, settings.tmp_bytes // 4096)}"
    for path in IN_MEMORY:
        system.mount("tmpfs", path, "", system.MS_REMOUNT | system.MS_NOSUID | system.MS_NODEV, options)


def _output(settings: JobSettings) -> None:
    _remount(OUT, 0 if settings.out_writable else system.MS_RDONLY)


def _inputs(settings: JobSettings) -> None:
    if settings.inputs_on_disk:
        system.unmount(IN)


def resource_limits(settings: JobSettings) -> tuple[tuple[int, int], ...]:
    """The limits of each single process, as (RLIMIT number, value)."""
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
        execution.allow(execution.ExecutionRules(*settings.execution))


def _no_execution(settings: JobSettings) -> None:
    if settings.execution is not None:
        rules = execution.ExecutionRules(*settings.execution)
        execution.forbid_elsewhere(rules, [*IN_MEMORY, OUT, CWD], IN)


# A remount by another step clears the flag again.
_NO_EXECUTION_FIELDS: Final = ("execution", "tmp_bytes", "out_writable", "inputs_on_disk")
RESOURCES: Final = ("fds", "cpu_s", "core_bytes")
VIEW: Final[tuple[Step[JobSettings], ...]] = (
    Step("host name", "CAP_SYS_ADMIN", _hostname, ("hostname",)),
    Step("sizes", "CAP_SYS_ADMIN", _sizes, ("tmp_bytes",)),
    Step("output folder", "CAP_SYS_ADMIN", _output, ("out_writable",)),
    Step("large inputs", "CAP_SYS_ADMIN", _inputs, ("inputs_on_disk",)),
    Step("programs", "Landlock", _programs, ("execution",)),
    Step("no execution", "CAP_SYS_ADMIN", _no_execution, _NO_EXECUTION_FIELDS),
)


def _control_group(world: World) -> None:
    for fd in world.procs_fds:
        os.write(fd, b"0")
    if world.group_folder:
        os.unshare(os.CLONE_NEWCGROUP)  # /proc/self/cgroup then shows "/" for the group at CGROUP_VIEW
    system.write_file("/proc/self/oom_score_adj", "500")  # do not inherit the agent's protection


def _bounding_set(_world: World) -> None:
    """Drop the bounding set of init, whose children inherit it. Init keeps its other sets, and executes nothing."""
    kernel.drop_bounding_set()


def no_capabilities(_world: World) -> None:
    """Drop the bounding and ambient sets, so that nothing that this process executes has capabilities."""
    kernel.drop_bounding_set()
    _no_ambient_set(_world)


def _no_ambient_set(_world: World) -> None:
    try:
        kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # gVisor has no ambient set
            raise


def _own_user(_world: World) -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)  # leaving uid 0 clears all capability sets


def _root_inside(world: World) -> None:
    """Become root in the programs' user namespace, with the capabilities that packages need to be installed."""
    os.setns(world.user_fd, os.CLONE_NEWUSER)
    os.close(world.user_fd)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    kernel.limit_capabilities(_CAPABILITIES)


def _no_new_privileges(_world: World) -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def _system_calls(world: World) -> None:
    kernel.load_filter(world.quiet_filter)
    kernel.load_filter(world.base_filter, audited=True)


def own_signals() -> None:
    """Reset all signals of init but those that Python ignores."""
    for number in range(1, 32):
        if number not in {signal.SIGKILL, signal.SIGSTOP, *_IGNORED}:
            signal.signal(number, signal.SIG_DFL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _fresh_signals(_world: World) -> None:
    for number in _IGNORED:  # init has reset the others
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


BOUNDING_SET: Final = "bounding set"
NO_CAPABILITIES: Final = "no capabilities"
FRESH_SIGNALS: Final = Step[World]("fresh signals", "", _fresh_signals)
MACHINE: Final = Steps(
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
        Step(BOUNDING_SET, "CAP_SETPCAP", _bounding_set),
    ),
    rights=(
        Step("control group", "a control group that can be written to", _control_group),
        Step(NO_CAPABILITIES, "CAP_SETPCAP", _no_ambient_set),  # without a bounding set since `world`
        Step("own user", "CAP_SETUID, CAP_SETGID", _own_user),
        Step("no new privileges", "", _no_new_privileges),
        FRESH_SIGNALS,
        # The process applies the restrictions of the policy itself, later (`restrict`).
        Step("system calls", "no new privileges", _system_calls),
    ),
    job=(*VIEW, Step("resource limits", "CAP_SYS_RESOURCE", _resource_limits, RESOURCES)),
)


_LAYERED: Final = Step("read-only system", "CAP_SYS_ADMIN, overlayfs", _layered_system)
# For programs with a root file system of their own.
LAYERED: Final = MACHINE._replace(
    world=tuple(_LAYERED if step.name == _LAYERED.name else step for step in MACHINE.world)
)
_INSTEAD: Final = {
    step.name: step
    for step in (
        _LAYERED._replace(needs="CAP_SYS_ADMIN, overlayfs, idmapped mounts"),
        Step("temporary folders", "CAP_SYS_ADMIN", _writable_run),
        Step("root", "CAP_SYS_ADMIN", _enter_writable),
        Step("own user", "CAP_SYS_ADMIN, a user namespace", _root_inside),
    )
}
# For programs that are root in a user namespace of their own. The network namespace stays ours.
ROOTED: Final = Steps(
    world=tuple(_INSTEAD.get(step.name, step) for step in MACHINE.world),
    rights=tuple(_INSTEAD.get(step.name, step) for step in MACHINE.rights),
    job=MACHINE.job,
)


def mount_memory() -> None:
    """Mount the tmpfs for small input files."""
    os.makedirs(MEMORY, mode=0o755, exist_ok=True)
    flags = system.MS_NODEV | system.MS_NOSUID
    system.mount("tmpfs", MEMORY, "tmpfs", flags, f"mode=0755,size={_PAGES_BYTES},nr_inodes={_ENTRIES}")


def _unchanged(step: Step[T], before: T, value: T) -> bool:
    for name in step.fields:  # noqa: SIM110 - a generator would be new code to a fresh clone
        if getattr(before, name) != getattr(value, name):
            return False
    return True


def apply(steps: tuple[Step[T], ...], value: T, before: T | None = None) -> None:
    """Apply the steps in order. Skip a step if its fields of *value* are as in *before*. Raises StepError."""
    for step in steps:
        if before is not None and _unchanged(step, before, value):
            continue
        try:
            step.apply(value)
        except (OSError, ValueError) as exc:
            number = exc.errno if isinstance(exc, OSError) and exc.errno else 0
            raise StepError(step.name, number, str(exc)) from exc
