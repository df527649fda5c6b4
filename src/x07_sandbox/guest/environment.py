"""The environment made ready for a program of any job: scratch disk, control group, namespaces, and a process that waits."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from x07_sandbox.guest import confine, filters, init, interpreter, restrict, system
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.system import read_all, write_all

if TYPE_CHECKING:
    from x07_sandbox.guest.platform import Platform

IN_MEMORY_BYTES: Final = 256 * 1024  # files of a job up to that together lie in memory
_FOLDERS: Final = {"in": False, "out": True, "work": True, "trees": False}  # and whether they are the program's
WAITING_BYTES: Final = 32 << 20  # what the process that waits may have, whatever the job's limit
SPARE_CPU_S: Final = 5
PRELOAD_CPU_S: Final = 300  # importing may have taken long; the control group's counter, which knows, is what decides
PRELOAD_S: Final = 180.0  # for all modules together; the host waits longer (host/settings.py: PRELOAD_S)


class Limits(NamedTuple):
    """What the policy forbids the program, as START says it.

    programs: paths of programs that it may execute; None where it may execute any, or none at all. prefixes: beginnings
    of further ones. alone: whether nothing that could be one lies beside the program.
    """

    threads: bool
    spawn: bool
    execute: bool
    programs: list[str] | None
    prefixes: list[str]
    alone: bool


class Environment:
    """One prepared environment; descriptors are the agent's ends, all close-on-exec.

    first: whether it is the first of this machine; before another is made, the last one is closed.
    interpreter: whether the process that waits is a started Python. preload: modules that it has imported.
    network: whether the program may have connections, so that there is a relay.
    init: process id of the first process of its namespaces. report_fd: what init says.
    status_fd: what the program's process says before it is the program; its end means that it is.
    in_memory_fds: the program's folders in memory, once the environment is prepared.
    """

    def __init__(
        self,
        platform: Platform,
        *,
        first: bool = True,
        interpreter: bool = False,
        preload: list[str] | None = None,
        network: bool = False,
    ) -> None:
        self.platform = platform
        if first:
            platform.make_folders()
            with open(platform.machine_id, "x", encoding="ascii"):
                pass  # filled when it is known
            if network:
                platform.make_resolv_conf()
        self.group = platform.group()
        self._interpreter = interpreter
        self._preload = preload or []
        self._filters = known = filters.all_filters() if platform.filtered else {}
        self._cut = {name: filters.cut_at_token(known[name]) for name in known if name.endswith(filters.ONCE)}
        self.waiting_bytes = WAITING_BYTES
        self.spare_cpu_s = SPARE_CPU_S + (PRELOAD_CPU_S if preload else 0)
        self.in_memory_fds: list[int] = []
        self._settings: confine.JobSettings | None = None
        self._cpu_us: int | None = None
        self._own_modules = False
        self._machine_id_fd = os.open(platform.machine_id, os.O_WRONLY | os.O_CLOEXEC)
        self._make_folders()
        stdin_r, self.stdin_fd = os.pipe2(os.O_CLOEXEC)
        self.stdout_fd, stdout_w = os.pipe2(os.O_CLOEXEC)
        self.stderr_fd, stderr_w = os.pipe2(os.O_CLOEXEC)
        self.report_fd, report_w = os.pipe2(os.O_CLOEXEC)
        self.status_fd, told_w = os.pipe2(os.O_CLOEXEC)
        start_r, self._start_fd = os.pipe2(os.O_CLOEXEC)
        settings_r, self._settings_fd = os.pipe2(os.O_CLOEXEC)
        ends = init.Ends((stdin_r, stdout_w, stderr_w), start_r, told_w, settings_r, report_w)
        world = confine.World(
            netns_fd=_network_namespace() if platform.namespaces else -1,
            procs_fds=self.group.open_procs(),
            interpreter=interpreter,
            preload=preload or [],
            base_filter=self._filters.get(filters.BASE, b""),
            quiet_filter=self._filters.get(filters.QUIET, b""),
            readable=filters.readable_places() if platform.filtered else [],
            group_kills=self.group.KILLS,
            namespaces=platform.namespaces,
            network=network,
            group_folder=self.group.SHOWN,
        )
        self.relay = None if not network else platform.relay(world.netns_fd)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        if platform.namespaces:
            os.unshare(os.CLONE_NEWPID)  # for the next child only: it becomes PID 1 of the program's namespace
        self.init = os.fork()
        if self.init == 0:
            init.run_init(world, ends, platform.confinement)
        if platform.namespaces:
            os.setns(own, os.CLONE_NEWPID)  # the child after it is again one of ours
        for fd in (own, *ends.of_program(), settings_r, report_w, *world.procs_fds):
            os.close(fd)
        if world.netns_fd >= 0:
            os.close(world.netns_fd)

    def admit(self, network: dict[str, Any] | None) -> None:
        """Tell the relay what a policy lists, as START carries it; None for nothing. Raises JobError.

        `start` waits until it is done.
        """
        if (network is None) != (self.relay is None):
            raise JobError("relay", 0, "this environment was not made for such a job")
        if self.relay is not None and network is not None:
            self.relay.wait_built()
            self.relay.admit(network)

    def prepare(self, settings: confine.JobSettings) -> None:
        """Wait until the program's process waits, and have init make what depends on the job. Raises JobError.

        May be called again with other settings: only what differs is done again.
        """
        if self._settings == settings:
            return
        if self._settings is None and (told := self._first_words()) != init.READY:
            if told := told + read_all(self.status_fd):
                raise exec_failure(told)
            os.close(self._settings_fd)
            raise failure(os.read(self.report_fd, 8192))
        self._settings = settings
        with contextlib.suppress(BrokenPipeError):  # init has ended, and its report says why
            write_all(self._settings_fd, marshal.dumps(tuple(settings)))
        report = os.read(self.report_fd, 8192)
        if report != init.READY:
            raise failure(report)
        if not self.in_memory_fds and self.platform.namespaces:
            # Its init waits until the machine ends, and with it the program's view.
            view = f"/proc/{self.init}/root"
            self.in_memory_fds = [os.open(f"{view}{name}", os.O_PATH | os.O_CLOEXEC) for name in confine.IN_MEMORY]

    def _first_words(self) -> bytes:
        """What the waiting process says once it has imported what is to be preloaded. Raises JobError if that is slow.

        It writes a line for each module: "M", its name, a space, how many seconds it took.
        """
        if not self._preload:
            return os.read(self.status_fd, 1)
        until, words = time.monotonic() + PRELOAD_S, b""
        took: list[str] = []
        while True:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self.status_fd], [], [], left_s)[0]:
                raise JobError("preload", 0, _too_slow(self._preload, took))
            chunk = os.read(self.status_fd, 4096)
            words += chunk
            while words[:1] == b"M" and b"\n" in words:
                line, _, words = words.partition(b"\n")
                took.append(line[1:].decode("ascii", "replace"))
            if not chunk or words[:1] not in {b"", b"M"}:
                return words

    def measure(self) -> None:
        """Measure the memory that the process that waits has, and will have until it is the program."""
        self.waiting_bytes = max(WAITING_BYTES, 2 * self.group.count("memory_bytes"))

    def baseline_cpu_us(self) -> int:
        """CPU time of what waits, in microseconds, as it was when this was first asked for; it does nothing since."""
        if self._cpu_us is None:
            self._cpu_us = self.group.cpu_us(self.init)
        return self._cpu_us

    def name(self, machine_id: bytes) -> None:
        """Fill in /etc/machine-id."""
        os.pwrite(self._machine_id_fd, machine_id.hex().encode() + b"\n", 0)

    def mounted(self) -> None:
        """See whether the host's folders bring modules of the user for the process that waits."""
        self._own_modules = os.path.lexists(f"/proc/{self.init}/root{interpreter.OWN_MODULES}")

    def becomes(self, argv: list[str], env: dict[str, str], limits: Limits) -> bool:
        """Whether the process that waits can be the program without executing another."""
        # Landlock binds one thread, and no filter ends those that there are.
        alone = limits.programs is not None or not limits.threads
        return self._interpreter and interpreter.can_become(
            argv, env, preload=bool(self._preload), alone=alone, own_modules=self._own_modules
        )

    def start(self, argv: list[str], env: dict[str, str], cwd: str, limits: Limits) -> None:
        """Let the process become the program; `status_fd` and `report_fd` say how that goes. Raises JobError."""
        if self.relay is not None:
            self.relay.wait_admitted()
        os.close(self._settings_fd)
        become = self.becomes(argv, env, limits)
        name = filters.filter_name(threads=limits.threads, spawn=limits.spawn, execute=limits.execute)
        token = b"" if become or limits.execute else os.urandom(restrict.TOKEN_BYTES)
        if token:
            code = filters.with_token(*self._cut[name + filters.ONCE], token)
        else:
            code = self._filters[name] if name else b""
        rules_fd = -1 if limits.programs is None else interpreter.RULES_FD
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `status_fd` tells
            write_all(self._start_fd, marshal.dumps((become, argv, env, cwd, code, rules_fd, token)))
        os.close(self._start_fd)

    def folder(self, *, on_disk: bool) -> str:
        """Where files of the job are written, so that the program finds them in /x07/in."""
        return f"{self.platform.scratch if on_disk else self.platform.memory}/in"

    def scratch(self, name: str) -> str:
        """A path on the scratch disk that the program does not see."""
        return f"{self.platform.scratch}/{name}"

    def kill(self) -> None:
        """End the program and all its children."""
        self.group.kill(self.init)

    def close(self) -> None:
        """End what is left of it, and remove what it wrote, so that another can be made in the same machine."""
        import shutil

        if self.relay is not None:
            self.relay.close()
        os.kill(self.init, signal.SIGKILL)
        os.waitpid(self.init, 0)
        for fd in (self._machine_id_fd, *self.in_memory_fds):
            os.close(fd)
        for path in (f"{self.platform.memory}/in", *(self.platform.folder(name) for name in _FOLDERS)):
            shutil.rmtree(path)
        self.group.remove()

    def _make_folders(self) -> None:
        if self.platform.memory != self.platform.scratch:
            os.mkdir(f"{self.platform.memory}/in", 0o755)
        for name, of_program in _FOLDERS.items():
            self.platform.make_place_folder(name, of_program=of_program)


def failure(report: bytes) -> JobError:
    """Why init cannot go on."""
    if not report.startswith(init.FAILED):
        return JobError("init", 0, "the program's init ended without a report")
    told = json.loads(report[1:])
    return JobError(told["stage"], told["errno"], told["message"])


def _too_slow(preload: list[str], took: list[str]) -> str:
    """Which module was too slow, and how long the ones before it took."""
    done = "; ".join(f"{line.replace(' ', ' took ')} s" for line in took)
    slow = preload[len(took)] if len(took) < len(preload) else "Python itself"
    return f"{slow} was not imported within {PRELOAD_S:.0f} s for all" + (f"; {done}" if done else "")


def exec_failure(told: bytes) -> JobError:
    """Why a process could not become the program: it sends the kernel's error for its execution, else 0, and words."""
    number, _, message = told.decode("utf-8", "replace").partition(" ")
    return JobError("exec", int(number) if number.isdigit() else 0, message)


def _network_namespace() -> int:
    """A new network namespace with only `lo`, held by its descriptor."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.unshare(os.CLONE_NEWNET)
        system.loopback_up()
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)
