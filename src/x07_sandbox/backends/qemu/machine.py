"""The machine that QEMU is told to be: pure, and final, because a saved machine can only be resumed on the same one.

Measured: microvm with the PIT off and a given TSC frequency never failed to boot under emulation; the second
port `x07.net` needs max_ports=3; nothing that belongs to one job is on this command line but descriptors.

microvm lets an initramfs overlap its firmware's ACPI tables by up to a page: measured, an archive whose size is 3,828
or 4,028 modulo 4,096 leaves the kernel in an endless sum over a table's length, one of 4 to 1,232 boots. So an image's
last page is all but empty (`Arch.initrd_tail_bytes`).
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.host.arch import Arch

if TYPE_CHECKING:
    from collections.abc import Mapping

KERNEL: Final = "/img/vmlinux"
INITRD: Final = "/img/initrd.cpio"
ROOT: Final = "/img/root.erofs"
RAM: Final = "/img/ram"
STATE: Final = "/img/state"
OVERCOMMIT: Final = "/proc/sys/vm/overcommit_memory"  # QEMU reads it before it leaves memory unreserved
SCRATCH_SERIAL: Final = "x07scratch"
ROOT_SERIAL: Final = "x07root"


class Origin(enum.Enum):
    """Where a machine's memory comes from."""

    COLD = "cold"  # it boots, in memory of its own
    SAVING = "saving"  # it boots, in a file that is kept
    CLONE = "clone"  # it goes on from such a file, copy-on-write


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """Where QEMU finds its files: below the jail's own root, or as descriptors in a jail without one."""

    kernel: str = KERNEL
    initrd: str = INITRD
    root: str = ROOT
    ram: str = RAM
    state: str = STATE


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine: sizes, how the processor is provided, and the descriptors that QEMU inherits.

    kvm_fd: an opened /dev/kvm, or None for emulation.
    reserve: whether QEMU asks the host for all of the RAM at once.
    any_timer: whether the guest goes on with a timer that its kernel has measured wrong (guest/boot/init.c).
    tsc_khz: frequency of the host's time stamp counter; None where the guest can find it itself.
    """

    arch: Arch
    ram_bytes: int
    kvm_fd: int | None
    tsc_khz: int | None
    scratch_fd: int
    channel_fd: int
    net_fd: int
    qmp_fd: int
    console_fd: int
    mark: str
    origin: Origin = Origin.COLD
    reserve: bool = False
    any_timer: bool = False
    paths: Paths = Paths()


def kernel_command_line(machine: Machine) -> str:
    """Nothing that belongs to one job: a machine that was saved and resumed serves any."""
    words = ["console=ttyS0" if machine.arch.machine == "microvm" else "console=ttyAMA0", "quiet", "panic=-1"]
    if machine.arch.machine == "microvm":
        words += ["reboot=t", "tsc=reliable", "no_timer_check"]
    # No statistics of stalls, no groups of sessions, no watchdog, and of the security modules those that hold something
    # here: the others only lengthen every path.
    words += ["psi=0", "noautogroup", "nowatchdog", "lsm=lockdown,landlock,yama"]
    # Nor are its ciphers tested, or entropy gathered from the jitter of a clock: no secret is kept here, and the host
    # gives entropy. Under emulation the two are a quarter of the time until the root file system is mounted.
    words += ["cryptomgr.notests", "initcall_blacklist=jent_mod_init"]
    if machine.kvm_fd is None:
        words.append("mitigations=off")  # an emulated processor does not speculate
    if machine.tsc_khz is not None:
        words.append(f"tsc_early_khz={machine.tsc_khz}")
    if machine.any_timer:
        words.append("x07.timer=any")
    return " ".join(words)


def qemu_argv(machine: Machine) -> list[str]:
    """QEMU's command line. Commas cannot occur in any value: all are ours."""
    megabytes = machine.ram_bytes // (1024 * 1024)
    accel = "tcg,thread=single" if machine.kvm_fd is None else "kvm,device=/dev/fdset/3"
    argv = [machine.arch.qemu_binary, "-name", f"x07-{machine.mark}", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-no-reboot"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += ["-object", _memory(machine, megabytes), "-M", _machine_type(machine)]
    cpu = machine.arch.emulated_cpu if machine.kvm_fd is None else "host"
    argv += ["-m", f"{megabytes}M", "-smp", "1", "-cpu", cpu, "-accel", accel]
    if machine.origin is Origin.CLONE:
        argv += ["-incoming", "defer"]
    else:
        argv += ["-kernel", machine.paths.kernel, "-initrd", machine.paths.initrd]
        argv += ["-append", kernel_command_line(machine)]
    argv += _disk(machine.paths.root, "root", ROOT_SERIAL, read_only=True)
    argv += ["-add-fd", f"set=2,fd={machine.scratch_fd}"]
    argv += _disk("/dev/fdset/2", "scratch", SCRATCH_SERIAL, read_only=False)
    if machine.kvm_fd is not None:
        argv += ["-add-fd", f"set=3,fd={machine.kvm_fd}"]
    argv += ["-device", "virtio-serial-device,max_ports=3"]
    argv += ["-chardev", f"socket,id=channel,fd={machine.channel_fd}"]
    argv += ["-device", "virtserialport,chardev=channel,nr=1,name=x07.0"]
    argv += ["-chardev", f"socket,id=net,fd={machine.net_fd}"]
    argv += ["-device", "virtserialport,chardev=net,nr=2,name=x07.net"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng"]
    argv += ["-chardev", f"socket,id=console,fd={machine.console_fd}", "-serial", "chardev:console"]
    return [*argv, "-chardev", f"socket,id=qmp,fd={machine.qmp_fd}", "-mon", "chardev=qmp,mode=control"]


def _memory(machine: Machine, megabytes: int) -> str:
    # Memory is taken as the guest touches it. Reserved beforehand, a machine of 8 GiB, of which a build uses a part,
    # would not start on a host with less RAM and swap (proc(5): vm.overcommit_memory).
    backend = f"id=ram0,size={megabytes}M,reserve={'on' if machine.reserve else 'off'}"
    if machine.origin is Origin.COLD:
        return f"memory-backend-ram,{backend}"
    # share=on in a clone would ruin the saved machine for all (measured); readonly=on makes that impossible.
    sharing = "share=on" if machine.origin is Origin.SAVING else "share=off,readonly=on,rom=off"
    return f"memory-backend-file,{backend},mem-path={machine.paths.ram},{sharing}"


def qmp_save(state: str) -> bytes:
    """Commands that save the device state. Not after `stop`: clones of a stopped machine are stopped too."""
    return _qmp(_CAPABILITIES, _IGNORE_SHARED, {"execute": "migrate", "arguments": {"uri": f"file:{state}"}})


def qmp_resume(state: str) -> bytes:
    """What makes a clone go on from the state at that path; may be written in one piece, before QEMU reads."""
    resume = {"execute": "migrate-incoming", "arguments": {"uri": f"file:{state}"}}
    return _qmp(_CAPABILITIES, _IGNORE_SHARED, resume)


def qmp_saved() -> bytes:
    """The question how far saving is."""
    return _qmp({"execute": "query-migrate"})


def qmp_quit() -> bytes:
    """What ends QEMU in good order, whether or not it was spoken to before."""
    return _qmp(_CAPABILITIES, {"execute": "quit"})


_CAPABILITIES: Final = {"execute": "qmp_capabilities"}
_IGNORE_SHARED: Final = {
    "execute": "migrate-set-capabilities",
    "arguments": {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
}


def _qmp(*commands: Mapping[str, object]) -> bytes:
    return b"".join(json.dumps(command).encode() + b"\n" for command in commands)


def _machine_type(machine: Machine) -> str:
    if machine.arch.machine == "microvm":
        devices = "acpi=on,pcie=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off"
        return f"microvm,{devices},memory-backend=ram0"
    return f"{machine.arch.machine},memory-backend=ram0"


def _disk(path: str, name: str, serial: str, *, read_only: bool) -> list[str]:
    mode = "read-only=on" if read_only else "read-only=off,cache.no-flush=on,discard=unmap"
    node = f"driver=raw,node-name={name},{mode},file.driver=file,file.filename={path},file.locking=off"
    if not read_only:
        node += ",file.discard=unmap,file.cache.no-flush=on"
    # A full disk of the host is an error in the guest, not a machine that waits for ever.
    device = f"virtio-blk-device,drive={name},serial={serial},werror=report,rerror=report"
    return ["-blockdev", node, "-device", device]
