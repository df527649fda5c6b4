"""The agent as PID 1 of a virtual machine: virtio port, scratch disk, sysctls, clock, power."""

from __future__ import annotations

import contextlib
import os
import select
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from x07_sandbox.guest import confine, execution, system
from x07_sandbox.guest.audit import Audit
from x07_sandbox.guest.cgroup import RootGroup
from x07_sandbox.guest.dns import RESOLV_CONF, NoNetwork
from x07_sandbox.guest.platform import Platform
from x07_sandbox.guest.system import JobError, write_file

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import Seed
    from x07_sandbox.guest.relay import RelayProcess

PORT: Final = "x07.0"
NET_PORT: Final = "x07.net"
_NET_MODULES: Final = "/run/x07/modules"
SCRATCH_SERIAL: Final = "x07scratch"
PROGRAM_SERIAL: Final = "x07program"
_PROGRAM_ROOT: Final = "/run/x07/program"

# Attack surface that no program here needs.
_HARDENING: Final = (
    ("user/max_user_namespaces", "0"),
    ("kernel/io_uring_disabled", "2"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/yama/ptrace_scope", "1"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "2"),
    ("dev/tty/ldisc_autoload", "0"),
)
# Periodic kernel work for long-lived machines: the first time costs a clone milliseconds.
_NO_BACKGROUND_WORK: Final = (
    ("kernel/sched_autogroup_enabled", "0"),
    ("vm/compaction_proactiveness", "0"),
    ("vm/stat_interval", "3600"),
)


class Machine(Platform):
    """A virtual machine, which has a kernel of its own."""

    confinement = confine.MACHINE
    program_uid = confine.UID
    scratch = confine.SCRATCH
    memory = confine.MEMORY
    machine_id = confine.MACHINE_ID
    filtered = True
    namespaces = True

    def open_channel(self) -> int:
        """Set sysctls, and open the virtio port."""
        write_file("/proc/self/oom_score_adj", "-1000")  # the OOM killer must never choose the agent
        for name, value in _HARDENING:
            write_file(f"/proc/sys/{name}", value)
        for name, value in _NO_BACKGROUND_WORK:
            with contextlib.suppress(FileNotFoundError):
                write_file(f"/proc/sys/{name}", value)
        # The control group enforces and reports the memory limit; overcommit heuristics would only fail an allocation.
        write_file("/proc/sys/vm/overcommit_memory", "1")
        # Let the policy's descriptor limit apply, not the kernel's 128 instances.
        write_file("/proc/sys/fs/inotify/max_user_instances", "1048576")
        self._random_fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        return open_port(PORT)

    def make_folders(self) -> None:
        """Mount the scratch disk, and a tmpfs for small files."""
        os.makedirs(self.scratch, mode=0o755, exist_ok=True)
        flags = system.MS_NODEV | system.MS_NOSUID
        # Without either option, a thread of the kernel would work on the disk in each clone.
        lazy = "noinit_itable,no_prefetch_block_bitmaps"
        if not (scratch := _disk(SCRATCH_SERIAL)):
            raise JobError("scratch", 0, f"no disk {SCRATCH_SERIAL}")
        system.mount(scratch, self.scratch, "ext4", system.MS_NOATIME | flags, lazy)
        confine.mount_memory()
        if disk := _disk(PROGRAM_SERIAL):
            os.mkdir(_PROGRAM_ROOT)
            system.mount(disk, _PROGRAM_ROOT, "erofs", system.MS_RDONLY | flags)
            self.program_root, self.confinement = _PROGRAM_ROOT, confine.LAYERED

    def become_rooted(self) -> None:
        """Make the next environment one whose programs are root in a user namespace of their own."""
        limit = "/proc/sys/user/max_user_namespaces"
        write_file(limit, "1")
        try:
            self.user_fd = system.user_namespace(confine.ROOTED_IDS)
        finally:
            write_file(limit, "0")  # programs can make none
        self.confinement = confine.ROOTED

    def relay(self, netns_fd: int) -> RelayProcess:
        """Start a relay, which opens its own virtio port and delays first packets until the gate has decided."""
        from x07_sandbox.guest.relay import RelayProcess

        for name in sorted(os.listdir(_NET_MODULES)):  # the names are numbered in loading order
            system.load_module(f"{_NET_MODULES}/{name}")
        return RelayProcess(netns_fd, partial(open_port, NET_PORT), hold=True)

    def no_network(self, netns_fd: int) -> NoNetwork:
        """Start a DNS server that refuses every name, and make it the programs' server."""
        self.make_resolv_conf(RESOLV_CONF)
        return NoNetwork(netns_fd)

    def audit(self) -> Audit:
        """Return the audit records of this kernel."""
        return Audit(*execution.call_numbers())

    def group(self) -> RootGroup:
        """Make a control group."""
        return RootGroup()

    def seed(self, seed: Seed) -> None:
        """Set the clock, and add entropy to the kernel's pool."""
        try:
            time.clock_settime_ns(time.CLOCK_REALTIME, seed.unix_ns)
        except OSError:
            # EINVAL: the kernel rejects a time before its own boot, which a host with an unset clock may send.
            time.clock_settime_ns(time.CLOCK_REALTIME, time.monotonic_ns() + 10**9)
        system.add_entropy(self._random_fd, seed.entropy)

    def end(self) -> None:
        """Power off."""
        system.power_off()


def open_port(name: str) -> int:
    """Open a virtio port by name once the host has opened its end. Raises JobError."""
    base = "/sys/class/virtio-ports"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for port in os.listdir(base) if os.path.isdir(base) else []:
            # A console's port has no name, and any port gets its name after its folder.
            with contextlib.suppress(FileNotFoundError), open(f"{base}/{port}/name", encoding="ascii") as file:
                if file.read().strip() == name:
                    return _connected(f"/dev/{port}", deadline)
        time.sleep(0.002)  # without udev, there is no event for the driver's probe
    raise JobError("port", 0, f"no virtio port {name}")


def _connected(path: str, deadline: float) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while time.monotonic() < deadline:
        mask = poll.poll(1000)
        if mask and not mask[0][1] & select.POLLHUP:
            return fd
        time.sleep(0.002)  # POLLHUP stays set until the host opens its end, so poll cannot wait for it
    raise JobError("port", 0, "the host never opened its end")


def _disk(serial: str) -> str:
    """Return the device of the disk with this serial number, or "" if there is none."""
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/serial", encoding="ascii") as file:
            if file.read().strip("\0\n ") == serial:
                return f"/dev/{name}"
    return ""
