"""The prepared environment of a program: folders, control group, namespaces, and a process that waits to run it."""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import select
import signal
import socket
import struct
import termios
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from x07_sandbox import kernel
from x07_sandbox.guest import confine, execution, init, interpreter, system, waiting
from x07_sandbox.guest.system import JobError, read_all, write_all, write_file
from x07_sandbox.guest.trees import as_program_user

if TYPE_CHECKING:
    from collections.abc import Mapping

    from x07_sandbox.channel.messages import CommandLimits, Confine, Exec, Network, Open, Seed, Terminal, Warm
    from x07_sandbox.guest.cgroup import NoGroup
    from x07_sandbox.guest.platform import Platform

IN_MEMORY_BYTES: Final = 256 * 1024  # input files up to this total are kept in memory
_FOLDERS: Final = {"in": False, "out": True, "work": True, "trees": False}  # by name: whether the program owns it
WAITING_BYTES: Final = 32 << 20  # memory allowed to the waiting process, whatever the job's limit
SPARE_CPU_S: Final = 5
_PIPE_BYTES: Final = 1024 * 1024
_EVENTS: Final = ("oom_kills", "tasks_refused")  # counters that only grow
_TIOCSPTLCK: Final = 0x40045431  # ioctl_tty(2)
_TIOCGPTPEER: Final = 0x5441
PRELOAD_CPU_S: Final = 300  # RLIMIT_CPU includes the time of imports; the agent's own CPU limit does not
PRELOAD_S: Final = 180.0  # timeout of all imports; the host's is longer (host/settings.py: PRELOAD_S)


class Process(NamedTuple):
    """The agent's ends of the pipes of a command's process. The process waits for `Environment.start`.

    key: names the process to init. A stream that it does not have is -1. status_fd: messages of the process until it
    executes the program, which closes the pipe. cpu_before_us, counts_before: CPU time (microseconds) and counters of
    its group before the command. python: whether it may be a copy of the waiting interpreter.
    """

    key: int
    stdin_fd: int
    stdout_fd: int
    stderr_fd: int
    start_fd: int
    status_fd: int
    group: NoGroup
    cpu_before_us: int
    counts_before: Mapping[str, int]
    python: bool = False

    def count(self, name: str) -> int:
        """Return a counter of the group (guest/cgroup) since the start of the command."""
        return self.group.count(name) - self.counts_before.get(name, 0)


class Environment:
    """One prepared environment of programs. Its descriptors belong to the agent, and all are close-on-exec.

    first: whether this machine had no environment before; close an environment before you make the next one.
    preload: modules that a waiting Python interpreter imports; None if the waiting process is no interpreter.
    network: whether there is a relay for connections. no_network: what observes attempts to connect without one, or
    None. init: process id of init. report_fd: init's messages.
    group: the control group of all commands. own_groups: whether each command has a group of its own below that one.
    shared: whether several commands have run in that one. in_memory_fds: the tmpfs folders, once `prepare` has
    returned.
    """

    def __init__(
        self,
        platform: Platform,
        *,
        first: bool = True,
        preload: list[str] | None = None,
        network: bool = False,
    ) -> None:
        self.platform = platform
        if first:
            platform.make_folders()
            with open(platform.machine_id, "x", encoding="ascii"):
                pass  # filled later
        if network:
            platform.make_resolv_conf()
        self.group = platform.group()
        self._preload = preload
        self._filters = known = execution.all_filters() if platform.filtered else {}
        self._split = {name: execution.split_at_token(known[name]) for name in known if name.endswith(execution.ONCE)}
        self.waiting_bytes = WAITING_BYTES
        self.spare_cpu_s = SPARE_CPU_S + (PRELOAD_CPU_S if preload else 0)
        self.in_memory_fds: list[int] = []
        self._settings: confine.JobSettings | None = None
        self._cpu_us: int | None = None
        self._last: int | None = init.FIRST  # key of the process after whose end init kills all others
        self.shared = False
        self._nonce = b""  # of the last SEED of a copy of the VM
        self._own_modules = False
        self._machine_id_fd = os.open(platform.machine_id, os.O_WRONLY | os.O_CLOEXEC)
        self._make_folders()
        self._first, pipes = self._pipes(init.FIRST)
        self.own_groups = self._first.group.OF_COMMAND
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.report_fd, report_w = os.pipe2(os.O_CLOEXEC)
        netns_fd = _network_namespace() if platform.namespaces else -1
        self.no_network = None if network else platform.no_network(netns_fd)
        world = confine.World(
            netns_fd=netns_fd,
            procs_fds=self._first.group.open_procs(),
            preload=preload,
            base_filter=self._filters.get(execution.BASE, b""),
            quiet_filter=self._filters.get(execution.QUIET, b""),
            readable=execution.readable_places() if platform.filtered else [],
            namespaces=platform.namespaces,
            resolver=network or self.no_network is not None,
            group_folder=self._first.group.shown,
            program_uid=-1 if platform.program_uid is None else platform.program_uid,
            user_fd=platform.user_fd,
            program_root=platform.program_root,
        )
        self.relay = platform.relay(world.netns_fd) if network else None
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        if platform.namespaces:
            os.unshare(os.CLONE_NEWPID)  # the next child becomes PID 1 of the program's namespace
        self.init = os.fork()
        if self.init == 0:
            init.run_init(world, pipes, theirs, report_w, platform.confinement)
        if platform.namespaces:
            os.setns(own, os.CLONE_NEWPID)  # further children stay in our namespace
        for fd in (own, report_w, *pipes.all(), *world.procs_fds):
            os.close(fd)
        theirs.close()
        if world.netns_fd >= 0:
            os.close(world.netns_fd)

    def admit(self, network: Network | None) -> None:
        """Send the configuration of the network to the relay. `start` waits for the relay. Raises JobError."""
        if (network is None) != (self.relay is None):
            raise JobError("relay", 0, "the session's network setting differs from the environment's")
        if self.relay is not None and network is not None:
            self.relay.wait_built()
            self.relay.admit(network)

    def prepare(self, settings: confine.JobSettings) -> None:
        """Wait for the program's process, and make init apply the settings that have changed. Raises JobError."""
        if self._settings == settings:
            return
        if self._settings is None and (status := self._first_status()) != init.CONFINED:
            if status := status + read_all(self._first.status_fd):
                raise exec_failure(status)
            raise failure(self.next_report())
        self._settings = settings
        with contextlib.suppress(BrokenPipeError):  # init has ended; its report has the reason
            init.send(self._control.fileno(), (init.SETTINGS, tuple(settings)))
        report = self.next_report()
        if report[0] != init.READY:
            raise failure(report)
        if not self.in_memory_fds and self.platform.namespaces:
            # Init, and with it the program's view, stays until the machine ends.
            view = f"/proc/{self.init}/root"
            self.in_memory_fds = [os.open(f"{view}{name}", os.O_PATH | os.O_CLOEXEC) for name in confine.IN_MEMORY]

    def next_report(self) -> tuple[Any, ...]:
        """Wait for the next message of init."""
        received = init.receive(self.report_fd)
        return (init.FAILED, "init", 0, "init ended without a report") if received is None else received

    def _pipes(self, key: int, order: Exec | None = None) -> tuple[Process, init.Pipes]:
        """Make the streams of a process and its control group. order: the command, if it is known."""
        if order is not None and order.terminal is not None:
            try:
                ours, theirs = self._terminal(order.terminal)
            except OSError as exc:  # programs have opened all
                raise JobError("exec", exc.errno or 0, f"no terminal: {exc.strerror}") from exc
        else:
            if order is not None and order.detached:
                stdin_r, stdin_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), -1
            else:
                stdin_r, stdin_fd = os.pipe2(os.O_CLOEXEC)
            stdout_fd, stdout_w = os.pipe2(os.O_CLOEXEC)
            merged = order is not None and order.merge
            stderr_fd, stderr_w = (-1, os.dup(stdout_w)) if merged else os.pipe2(os.O_CLOEXEC)
            for fd in (stdin_r, stdout_w, stderr_w):
                with contextlib.suppress(OSError):  # gVisor cannot do it
                    os.fchmod(fd, 0o666)  # the program, another user, may open /dev/stderr, which is this pipe
            for fd in (stdin_r, stdout_w):  # so that a program and the agent take turns less often
                with contextlib.suppress(OSError):  # over a limit of this system, or /dev/null
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            ours, theirs = (stdin_fd, stdout_fd, stderr_fd), (stdin_r, stdout_w, stderr_w)
        status_fd, status_w = os.pipe2(os.O_CLOEXEC)
        start_r, start_fd = os.pipe2(os.O_CLOEXEC)
        process = Process(key, *ours, start_fd, status_fd, self.group.of_command(key), 0, {})
        return process, init.Pipes(theirs, start_r, status_w)

    def _terminal(self, size: Terminal) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Create a terminal in the devpts instance of the programs.

        Return our ends of the streams, and the ends of the process.
        """
        view = f"/proc/{self.init}/root" if self.platform.namespaces else ""
        folder = os.open(f"{view}/dev/pts", os.O_PATH | os.O_CLOEXEC)
        try:
            with as_program_user(self.platform.program_uid):  # so that this user owns the terminal
                master = os.open("ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        termios.tcsetwinsize(slave, size)
        return (master, os.dup(master), -1), (slave, os.dup(slave), os.dup(slave))

    def first(self) -> Process:
        """Return the process that has waited from the start."""
        return self._first._replace(cpu_before_us=self.baseline_cpu_us())

    def add(
        self, order: Exec, limits: tuple[tuple[int, int], ...], confined: Confine, *, python: bool = False
    ) -> Process:
        """Start one more process. limits: resource limits as (number, value). Its key is the command's id.

        python: see `Process`.
        """
        process, pipes = self._pipes(order.id, order)
        procs_fds = process.group.open_procs()
        listed = order.argv[0] if confined.programs is not None and not order.service else ""
        fds = (*pipes.all(), *procs_fds)
        how = limits, order.service, order.terminal is not None, python
        init.send_fds(self._control, (init.COMMAND, order.id, listed, *how), fds)
        for fd in fds:
            os.close(fd)
        self.shared = not self.own_groups
        before = {name: process.group.count(name) for name in _EVENTS} if self.shared else {}
        return process._replace(cpu_before_us=process.group.cpu_us(self.init), counts_before=before, python=python)

    def end(self) -> None:
        """Have init kill all processes. Its report is `init.READY`."""
        with contextlib.suppress(BrokenPipeError):
            init.send(self._control.fileno(), (init.END,))

    def end_with(self, key: int | None) -> None:
        """Have init kill all other processes once the process *key* has ended; None: after no process."""
        if self._last == key:
            return
        self._last = key
        with contextlib.suppress(BrokenPipeError):
            init.send(self._control.fileno(), (init.LAST, key))

    def signal(self, process: Process, number: int = signal.SIGKILL) -> None:
        """Send a signal to a command; SIGKILL goes to all its processes, as far as this platform can identify them."""
        of_command = self.own_groups or process.key == self._last
        if number == signal.SIGKILL and process.group.KILLS and of_command:
            process.group.kill(self.init)
        else:
            with contextlib.suppress(BrokenPipeError):
                init.send(self._control.fileno(), (init.SIGNAL, process.key, int(number)))

    def _first_status(self) -> bytes:
        """Return the first status byte of the waiting process. Raises JobError if its imports time out.

        For each imported module, the process writes a line: "M", the name, a space, the seconds it took.
        """
        if not self._preload:
            return os.read(self._first.status_fd, 1)
        until, status = time.monotonic() + PRELOAD_S, b""
        imported: list[str] = []
        while True:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self._first.status_fd], [], [], left_s)[0]:
                raise JobError("preload", 0, preload_timeout(self._preload, imported))
            chunk = os.read(self._first.status_fd, 4096)
            status += chunk
            while status[:1] == b"M" and b"\n" in status:
                line, _, status = status.partition(b"\n")
                imported.append(line[1:].decode("ascii", "replace"))
            if not chunk or status[:1] not in {b"", b"M"}:
                return status

    def measure(self) -> None:
        """Measure the memory of the waiting process. Before the start, the memory limit must not be below that size."""
        self.waiting_bytes = max(WAITING_BYTES, 2 * self._first.group.count("memory_bytes"))

    def baseline_cpu_us(self) -> int:
        """Return the CPU time used before the job, in microseconds. Only the first call measures it."""
        if self._cpu_us is None:
            self._cpu_us = self._first.group.cpu_us(self.init)
        return self._cpu_us

    def name(self, machine_id: bytes) -> None:
        """Write *machine_id* to the file that the program sees as /etc/machine-id."""
        os.pwrite(self._machine_id_fd, machine_id.hex().encode() + b"\n", 0)

    def rejoin(self, seed: Seed) -> None:
        """Become the environment of a copy of the VM: with another name, and no connections. Raises JobError."""
        self.name(seed.machine_id)
        if self.relay is not None and seed.nonce != self._nonce:  # SEED may come again, with the time
            self.relay.rejoin(seed.nonce)
            self._nonce = seed.nonce

    def mounted(self) -> None:
        """Record whether the mounted folders contain user site-packages, which the waiting interpreter has not read."""
        self._own_modules = os.path.lexists(f"/proc/{self.init}/root{interpreter.OWN_MODULES}")

    def becomes(self, argv: list[str], env: dict[str, str], confined: Confine) -> bool:
        """Return whether the waiting interpreter can run this command itself."""
        # Landlock binds only the calling thread, and a filter does not end existing threads.
        alone = confined.programs is not None or not confined.threads
        return self._preload is not None and interpreter.can_become(
            argv, env, preload=bool(self._preload), alone=alone, own_modules=self._own_modules
        )

    def keeps_interpreter(self, order: Exec, confined: Confine) -> bool:
        """Return whether the waiting interpreter has preloaded modules, and is to be copied for later commands."""
        return bool(self._preload) and not self.becomes(order.argv, order.env, confined)

    def copies(self, order: Exec, confined: Confine) -> bool:
        """Return whether a copy of the waiting interpreter can run this command.

        Only if the policy limits no processes: an earlier command may have changed the interpreter, which would then
        not apply the limits to itself.
        """
        if not self._preload or order.service or order.terminal is not None or not self.platform.namespaces:
            return False
        free = confined.programs is None and confined.threads and confined.spawn and confined.execute
        own_modules = os.path.lexists(f"/proc/{self.init}/root{interpreter.OWN_MODULES}")  # also made by a program
        return free and interpreter.can_fork(order.argv, order.env, own_modules=own_modules)

    def start(self, process: Process, order: Exec, confined: Confine) -> float:
        """Start the program, and return when, on the monotonic clock. Raises JobError.

        `Process.status_fd` and init's reports then have the result.
        """
        if self.relay is not None:
            self.relay.wait_admitted()
        argv, env = order.argv, order.env
        become = process.python or (process.key == init.FIRST and self.becomes(argv, env, confined))
        name = execution.filter_name(threads=confined.threads, spawn=confined.spawn, execute=confined.execute)
        token = b"" if become or confined.execute else os.urandom(kernel.TOKEN_BYTES)
        if token:
            code = execution.with_token(*self._split[name + execution.ONCE], token)
        else:
            code = self._filters[name] if name else b""
        rules_fd = -1 if confined.programs is None else waiting.RULES_FD
        started_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `status_fd` has the reason
            write_all(process.start_fd, marshal.dumps((become, argv, env, order.cwd, code, rules_fd, token)))
        os.close(process.start_fd)
        return started_at

    def folder(self, *, on_disk: bool) -> str:
        """Return the folder that the program sees as /x07/in."""
        return f"{self.platform.scratch if on_disk else self.platform.memory}/in"

    def close(self) -> None:
        """Kill init and the relay, and remove all files, so that another environment can be made in this machine."""
        import shutil

        for network in (self.relay, self.no_network):
            if network is not None:
                network.close()
        os.kill(self.init, signal.SIGKILL)
        os.waitpid(self.init, 0)
        self._control.close()
        for fd in (self.report_fd, self._machine_id_fd, *self.in_memory_fds):
            os.close(fd)
        for path in (f"{self.platform.memory}/in", *(self.platform.folder(name) for name in _FOLDERS)):
            shutil.rmtree(path)
        shutil.rmtree(confine.LAYER, ignore_errors=True)  # few environments have one
        self.group.remove()

    def _make_folders(self) -> None:
        if self.platform.memory != self.platform.scratch:
            os.mkdir(f"{self.platform.memory}/in", 0o755)
        for name, of_program in _FOLDERS.items():
            self.platform.make_job_folder(name, of_program=of_program)


def job_settings(
    session: Open | Warm, limits: CommandLimits, spare_cpu_s: int, *, inputs_on_disk: bool = False
) -> confine.JobSettings:
    """Return init's settings for a command with these limits.

    spare_cpu_s: added to the CPU limit for what the process uses before the command, in seconds.
    """
    return confine.JobSettings(
        hostname=session.hostname,
        tmp_bytes=session.tmp_bytes,
        out_writable=session.out_writable,
        inputs_on_disk=inputs_on_disk,
        fds=limits.fds,
        cpu_s=limits.cpu_ms // 1000 + spare_cpu_s,
        core_bytes=limits.core_bytes,
        tasks=limits.tasks,
        execution=None,
    )


def failure(report: tuple[Any, ...]) -> JobError:
    """Return the error that init has reported."""
    _, stage, number, message = report
    return JobError(stage, number, message[:1000])


def preload_timeout(preload: list[str], imported: list[str]) -> str:
    """Return a message with the module that was too slow, and the time that each earlier module took."""
    done = "; ".join(f"{line.replace(' ', ' took ')} s" for line in imported)
    slow = preload[len(imported)] if len(imported) < len(preload) else "Python itself"
    return f"{slow} was not imported within {PRELOAD_S:.0f} s for all" + (f"; {done}" if done else "")


def exec_failure(status: bytes) -> JobError:
    """Decode a failure status of the program's process: the errno of execve or 0, a space, and a message."""
    number, _, message = status.decode("utf-8", "replace").partition(" ")
    return JobError("exec", int(number) if number.isdigit() else 0, message)


def _network_namespace() -> int:
    with system.own_network_kept():
        os.unshare(os.CLONE_NEWNET)
        system.loopback_up()
        with contextlib.suppress(OSError):  # on a shared system, /proc/sys may be read-only
            write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")  # all its ports belong to programs
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
