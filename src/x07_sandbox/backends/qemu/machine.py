"""The virtual machine and QEMU's command line, without I/O. A saved VM resumes only on an identical machine.

Measured: microvm with the PIT off and a given TSC frequency always booted under emulation; the second port `x07.net`
needs max_ports=3. An initramfs may overlap microvm's ACPI tables by up to a page: with a size of 3,828 or 4,028 modulo
4,096, between one in 4 and one in 1,232 boots hung in a checksum loop. So an image's last page is nearly empty
(`Arch.initrd_tail_bytes`).
"""

import enum
import itertools
import json
from collections.abc import Mapping
from typing import Final

import msgspec

from x07_sandbox.host.arch import Arch

OVERCOMMIT: Final = "/proc/sys/vm/overcommit_memory"  # read by QEMU before it leaves memory unreserved


class Origin(enum.Enum):
    """The source of a machine's memory."""

    COLD = "cold"  # booted, in anonymous memory
    SAVING = "saving"  # booted, in a file that is kept
    CLONE = "clone"  # resumed from such a file, copy-on-write
    FORK = "fork"  # resumed from a snapshot of a running VM, copy-on-write
    HOT = "hot"  # restored with its process; the command line is that of the dumped process
    WARMING = "warming"  # a clone whose process will be dumped; criu without privileges can dump no filter


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """The paths of QEMU's files: below the jail's root, or of descriptors if the jail has no root of its own."""

    kernel: str = "/img/vmlinux"
    initrd: str = "/img/initrd.cpio"
    root: str = "/img/root.erofs"
    program: str = "/img/program.erofs"
    ram: str = "/img/ram"
    state: str = "/img/state"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine: sizes, processor, and the descriptors that QEMU inherits.

    kvm_fd: an open /dev/kvm, or None for emulation. reserve: whether QEMU reserves all RAM on the host at once.
    any_timer: whether the guest accepts a timer that its kernel calibrated wrong (guest/boot/init.c).
    program: whether programs have a root file system of their own.
    tsc_khz: frequency of the host's time stamp counter, or None if the guest can measure it.
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
    program: bool = False
    paths: Paths = Paths()


def kernel_command_line(machine: Machine) -> str:
    """Return the kernel's command line. It does not depend on the job, so a saved VM can serve any job."""
    words = ["console=ttyS0" if machine.arch.machine == "microvm" else "console=ttyAMA0", "quiet", "panic=-1"]
    if machine.arch.machine == "microvm":
        words += ["reboot=t", "tsc=reliable", "no_timer_check"]
    # Only the security modules in use: the others lengthen every path.
    words += ["psi=0", "noautogroup", "nowatchdog", "lsm=lockdown,landlock,yama"]
    # No cipher tests and no jitter entropy: the host provides entropy, and under emulation the two take a quarter of
    # the time until the root file system is mounted.
    words += ["cryptomgr.notests", "initcall_blacklist=jent_mod_init"]
    if machine.kvm_fd is None:
        words.append("mitigations=off")  # an emulated processor does not speculate
    if machine.tsc_khz is not None:
        words.append(f"tsc_early_khz={machine.tsc_khz}")
    if machine.any_timer:
        words.append("x07.timer=any")
    return " ".join(words)


def qemu_argv(machine: Machine) -> list[str]:
    """Return QEMU's command line. All values come from x07, so none contains a comma."""
    megabytes = machine.ram_bytes // (1024 * 1024)
    accel = "tcg,thread=single" if machine.kvm_fd is None else "kvm,device=/dev/fdset/3"
    argv = [machine.arch.qemu_binary, "-name", f"x07-{machine.mark}", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-no-reboot"]
    if machine.origin is not Origin.WARMING:
        argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    devices = "acpi=on,pcie=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off,"
    kind = f"{machine.arch.machine},{devices if machine.arch.machine == 'microvm' else ''}memory-backend=ram0"
    argv += ["-object", _memory(machine, megabytes), "-M", kind]
    cpu = machine.arch.emulated_cpu if machine.kvm_fd is None else "host"
    argv += ["-m", f"{megabytes}M", "-smp", "1", "-cpu", cpu, "-accel", accel]
    if machine.origin is Origin.FORK:
        argv += ["-global", "migration.send-configuration=off"]  # a state without RAM does not begin with it
        argv[argv.index("-M") + 1] += ",suppress-vmdesc=on"  # nor end with that
    if machine.origin in {Origin.CLONE, Origin.WARMING, Origin.FORK}:
        argv += ["-incoming", "defer"]
    else:
        argv += ["-kernel", machine.paths.kernel, "-initrd", machine.paths.initrd]
        argv += ["-append", kernel_command_line(machine)]
    argv += _disk(machine.paths.root, "root", read_only=True)
    argv += ["-add-fd", f"set=2,fd={machine.scratch_fd}"]
    argv += _disk("/dev/fdset/2", "scratch", read_only=False)
    if machine.program:
        argv += _disk(machine.paths.program, "program", read_only=True)
    if machine.kvm_fd is not None:
        argv += ["-add-fd", f"set=3,fd={machine.kvm_fd}"]
    argv += ["-device", "virtio-serial-device,max_ports=3"]
    argv += ["-chardev", f"socket,id=channel,fd={machine.channel_fd}"]
    argv += ["-device", "virtserialport,chardev=channel,nr=1,name=x07.0"]
    argv += ["-chardev", f"socket,id=net,fd={machine.net_fd}"]
    argv += ["-device", "virtserialport,chardev=net,nr=2,name=x07.net"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng"]
    argv += ["-chardev", f"socket,id=console,fd={machine.console_fd}", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=qmp,fd={machine.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    return _in_order(argv) if machine.arch.machine == "virt" else argv


def _in_order(argv: list[str]) -> list[str]:
    """Put the virtio devices on buses in order. By itself, "virt" gives Linux the last disk as the first, /dev/vda."""
    buses = itertools.count()
    return [f"{word},bus=virtio-mmio-bus.{next(buses)}" if word.startswith("virtio-") else word for word in argv]


def _memory(machine: Machine, megabytes: int) -> str:
    # Not reserved: an 8 GiB build machine, of which a part is used, would not start on a host with less RAM and swap
    # (proc(5): vm.overcommit_memory).
    backend = f"id=ram0,size={megabytes}M,reserve={'on' if machine.reserve else 'off'}"
    if machine.origin is Origin.COLD:
        return f"memory-backend-ram,{backend}"
    # share=on in a clone would corrupt the saved machine (measured); readonly=on rules that out.
    sharing = "share=on" if machine.origin is Origin.SAVING else "share=off,readonly=on,rom=off"
    return f"memory-backend-file,{backend},mem-path={machine.paths.ram},{sharing}"


_CAPABILITIES: Final = {"execute": "qmp_capabilities"}
_IGNORE_SHARED: Final = {
    "execute": "migrate-set-capabilities",
    "arguments": {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
}


def _qmp(*commands: Mapping[str, object]) -> bytes:
    return b"".join(json.dumps(command).encode() + b"\n" for command in commands)


QMP_QUERY_SAVE: Final = _qmp({"execute": "query-migrate"})  # asks for the progress of saving
# A dumped process must be paused, so that its guest's clock continues where it stopped.
QMP_PAUSE: Final = _qmp({"execute": "stop"})
QMP_CONTINUE: Final = _qmp({"execute": "cont"})


def qmp_save(state: str) -> bytes:
    """Return the commands that save the device state. They do not stop the VM, since its clones would start stopped."""
    return _qmp(_CAPABILITIES, _IGNORE_SHARED, {"execute": "migrate", "arguments": {"uri": f"file:{state}"}})


def qmp_resume(state: str) -> bytes:
    """Return the commands that resume a clone from the file *state*. They may be written before QEMU is ready."""
    resume = {"execute": "migrate-incoming", "arguments": {"uri": f"file:{state}"}}
    return _qmp(_CAPABILITIES, _IGNORE_SHARED, resume)


def _disk(path: str, name: str, *, read_only: bool) -> list[str]:
    mode = "read-only=on" if read_only else "read-only=off,cache.no-flush=on,discard=unmap"
    node = f"driver=raw,node-name={name},{mode},file.driver=file,file.filename={path},file.locking=off"
    if not read_only:
        node += ",file.discard=unmap,file.cache.no-flush=on"
    # A full host disk is an error in the guest; by default the machine would pause.
    device = f"virtio-blk-device,drive={name},serial=x07{name},werror=report,rerror=report"
    return ["-blockdev", node, "-device", device]
