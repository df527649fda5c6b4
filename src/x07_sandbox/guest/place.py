"""The place made ready for a program: scratch disk, control group, namespaces, and a process that waits in them.

Nothing in it depends on the job, so that a machine can be saved with it and resumed for any job.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Final

from x07_sandbox.guest import confine, init, system
from x07_sandbox.guest.cgroup import ProgramGroup
from x07_sandbox.guest.errors import JobError

SCRATCH_SERIAL: Final = "x07scratch"


class Place:
    """One prepared place; descriptors are the agent's ends, all close-on-exec.

    usual: orders that are likely.
    interpreter: whether the process that waits is a started Python, as `x07_sandbox.guest.interpreter` has it.
    stdin_fd, stdout_fd, stderr_fd: the program's standard streams. report_fd: what init says, to its end.
    """

    def __init__(self, *, interpreter: bool = False, usual: confine.Orders | None = None) -> None:
        _mount_scratch()
        with open(confine.MACHINE_ID, "x", encoding="ascii"):
            pass  # filled when it is known
        self.group = ProgramGroup()
        self.report = b""
        stdin_r, self.stdin_fd = os.pipe2(os.O_CLOEXEC)
        self.stdout_fd, stdout_w = os.pipe2(os.O_CLOEXEC)
        self.stderr_fd, stderr_w = os.pipe2(os.O_CLOEXEC)
        self.report_fd, report_w = os.pipe2(os.O_CLOEXEC)
        orders_r, self._orders_fd = os.pipe2(os.O_CLOEXEC)
        world = confine.World(netns_fd=_network_namespace(), procs_fd=self.group.open_procs(), interpreter=interpreter)
        os.unshare(os.CLONE_NEWPID)  # for the next child only: it becomes PID 1 of the program's namespace
        if os.fork() == 0:
            init.run_init(world, usual, (stdin_r, stdout_w, stderr_w), orders_r, report_w)
        for fd in (stdin_r, stdout_w, stderr_w, report_w, orders_r, world.netns_fd, world.procs_fd):
            os.close(fd)

    def wait_ready(self) -> None:
        """Wait until the program's process waits for its orders. Raises JobError."""
        data = os.read(self.report_fd, 1)
        if data == init.READY:
            return
        while chunk := os.read(self.report_fd, 8192):
            data += chunk
        raise failure(data)

    def name(self, machine_id: str) -> None:
        """Fill in /etc/machine-id."""
        with open(confine.MACHINE_ID, "w", encoding="ascii") as file:
            file.write(machine_id + "\n")

    def order(self, orders: confine.Orders) -> None:
        """Let the program start; what follows is told by reports."""
        with contextlib.suppress(BrokenPipeError):  # init has ended, and its report says why
            view = memoryview(json.dumps(orders.as_dict()).encode())
            while view:
                view = view[os.write(self._orders_fd, view) :]
        os.close(self._orders_fd)


def failure(report: bytes) -> JobError:
    """What init says when it cannot go on."""
    if not report.startswith(init.FAILED):
        return JobError("init", 0, "the program's init ended without a report")
    told = json.loads(report[1:])
    return JobError(told["stage"], told["errno"], told["message"])


def _mount_scratch() -> None:
    device = _disk(SCRATCH_SERIAL)
    os.makedirs(confine.SCRATCH, mode=0o755, exist_ok=True)
    system.mount(
        device, confine.SCRATCH, "ext4", system.MS_NOATIME | system.MS_NODEV | system.MS_NOSUID, "noinit_itable"
    )
    for name, owner in (("in", 0), ("out", confine.UID), ("work", confine.UID)):
        os.mkdir(f"{confine.SCRATCH}/{name}", 0o755)
        os.chown(f"{confine.SCRATCH}/{name}", owner, owner)


def _disk(serial: str) -> str:
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/serial", encoding="ascii") as file:
            if file.read().strip("\0\n ") == serial:
                return f"/dev/{name}"
    raise JobError("scratch", 0, f"no disk {serial}")


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
