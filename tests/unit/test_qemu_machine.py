"""QEMU's command line: nothing of a job on it, and no access to the host except the given descriptors."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.backends.qemu.machine import (
    Machine,
    Origin,
    Paths,
    kernel_command_line,
    qemu_argv,
)
from x07_sandbox.guest import machine as guest_machine
from x07_sandbox.host.arch import ARCHES

MIB = 1024 * 1024
IMG = Paths()
FDS = {"scratch_fd": 102, "channel_fd": 103, "net_fd": 106, "qmp_fd": 104, "console_fd": 105}
MACHINES = [pytest.param(name, kvm, id=f"{name}-{'kvm' if kvm else 'tcg'}") for name in ARCHES for kvm in (None, 106)]


def machine(
    name: str = "x86_64",
    kvm_fd: int | None = None,
    *,
    ram_bytes: int = 512 * MIB,
    mark: str = "a" * 32,
    shift: int = 0,
    origin: Origin = Origin.COLD,
) -> Machine:
    """A VM of an architecture. shift: added to each descriptor number."""
    return Machine(
        arch=ARCHES[name],
        ram_bytes=ram_bytes,
        kvm_fd=None if kvm_fd is None else kvm_fd + shift,
        tsc_khz=2_000_000,
        mark=mark,
        scratch_fd=FDS["scratch_fd"] + shift,
        channel_fd=FDS["channel_fd"] + shift,
        net_fd=FDS["net_fd"] + shift,
        qmp_fd=FDS["qmp_fd"] + shift,
        console_fd=FDS["console_fd"] + shift,
        origin=origin,
    )


def values(argv: list[str], option: str) -> list[str]:
    """The values of an option."""
    return [argv[at + 1] for at, word in enumerate(argv) if word == option]


def test_only_the_last_attempt_accepts_any_timer() -> None:
    """Only the last boot attempt accepts a miscalibrated timer."""
    assert "x07.timer" not in kernel_command_line(machine())
    line = kernel_command_line(msgspec.structs.replace(machine(), any_timer=True))
    assert line == kernel_command_line(machine()) + " x07.timer=any"


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_two_jobs_differ_in_mark_and_descriptors_alone(name: str, kvm: int | None) -> None:
    """Command lines of two jobs differ only in mark and descriptor numbers, so a template serves any job."""
    one, other = machine(name, kvm), machine(name, kvm, mark="b" * 32, shift=100)
    assert values(qemu_argv(one), "-append") == [kernel_command_line(one)] == [kernel_command_line(other)]

    def plain(argv: list[str]) -> list[str]:
        return [re.sub(r"fd=\d+", "fd=N", word) for word in argv]

    different = [
        pair for pair in zip(plain(qemu_argv(one)), plain(qemu_argv(other)), strict=True) if len(set(pair)) > 1
    ]
    assert different == [(f"x07-{one.mark}", f"x07-{other.mark}")]


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_qemus_own_sandbox_is_on(name: str, kvm: int | None) -> None:
    """QEMU's own seccomp sandbox is fully enabled."""
    argv = qemu_argv(machine(name, kvm))
    (sandbox,) = values(argv, "-sandbox")
    assert set(sandbox.split(",")) == {
        "on",
        "obsolete=deny",
        "elevateprivileges=deny",
        "spawn=deny",
        "resourcecontrol=deny",
    }


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_there_is_no_network_card_and_no_default_device(name: str, kvm: int | None) -> None:
    """The VM has no network card and no default device."""
    argv = qemu_argv(machine(name, kvm))
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert values(argv, "-display") == ["none"]
    assert not {"-net", "-netdev", "-nic", "-usb", "-vnc", "-spice", "-monitor", "-qmp", "-gdb", "-s"} & set(argv)
    drivers = {value.partition(",")[0] for value in values(argv, "-device")}
    assert drivers == {"virtio-blk-device", "virtio-serial-device", "virtserialport", "virtio-rng-device"}
    assert not any(word in value for value in argv for word in ("vhost", "virtio-net", "9p", "virtiofs", "vsock"))


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_every_descriptor_is_given_once(name: str, kvm: int | None) -> None:
    """QEMU inherits exactly the given descriptors, each used once, and every VM has both of the agent's ports."""
    argv = qemu_argv(machine(name, kvm))
    given_fds = [int(number) for value in argv for number in re.findall(r"\bfd=(\d+)", value)]
    assert sorted(given_fds) == sorted([*FDS.values(), *([] if kvm is None else [kvm])])
    assert f"socket,id=channel,fd={FDS['channel_fd']}" in values(argv, "-chardev")
    assert f"socket,id=console,fd={FDS['console_fd']}" in values(argv, "-chardev")
    assert f"socket,id=qmp,fd={FDS['qmp_fd']}" in values(argv, "-chardev")
    assert values(argv, "-mon") == ["chardev=qmp,mode=control"]
    assert values(argv, "-serial") == ["chardev:console"]
    assert f"socket,id=net,fd={FDS['net_fd']}" in values(argv, "-chardev")
    ports = [value.partition(",bus=")[0] for value in values(argv, "-device")]
    assert "virtio-serial-device,max_ports=3" in ports
    assert f"virtserialport,chardev=channel,nr=1,name={guest_machine.PORT}" in ports
    assert "virtserialport,chardev=net,nr=2,name=x07.net" in ports


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_no_path_of_the_host_is_opened(name: str, kvm: int | None) -> None:
    """QEMU opens only paths inside its jail."""
    argv = qemu_argv(machine(name, kvm))[1:]
    paths = {path for value in argv for path in re.findall(r"(?:^|=)(/[^,\s]+)", value)}
    sets = {"/dev/fdset/2"} | (set() if kvm is None else {"/dev/fdset/3"})
    assert paths == {IMG.kernel, IMG.initrd, IMG.root, "/dev/urandom"} | sets
    assert all(path.startswith("/img/") for path in (IMG.kernel, IMG.initrd, IMG.root))


@pytest.mark.parametrize(("name", "kvm"), MACHINES)
def test_the_image_cannot_be_written_and_the_scratch_disk_can(name: str, kvm: int | None) -> None:
    """The root file system is read-only, and the scratch disk is writable."""
    argv = qemu_argv(machine(name, kvm))
    disks = {
        dict(part.split("=", 1) for part in node.split(","))["node-name"]: node for node in values(argv, "-blockdev")
    }
    assert disks.keys() == {"root", "scratch"}
    assert f"file.filename={IMG.root}," in disks["root"]
    assert "file.filename=/dev/fdset/2," in disks["scratch"]
    assert f"set=2,fd={FDS['scratch_fd']}" in values(argv, "-add-fd")
    assert ",read-only=on," in disks["root"]
    assert "read-only=off" not in disks["root"]
    assert ",read-only=off," in disks["scratch"]
    assert all("driver=raw" in node for node in disks.values()), "a guest could write a header that names other files"
    devices = [re.sub(r",bus=[a-z0-9.-]+$", "", value) for value in values(argv, "-device")]
    on_error = "werror=report,rerror=report"  # a full disk of the host must not make the machine wait for ever
    assert f"virtio-blk-device,drive=root,serial=x07root,{on_error}" in devices
    assert f"virtio-blk-device,drive=scratch,serial={guest_machine.SCRATCH_SERIAL},{on_error}" in devices


@given(st.integers(64 * MIB, 20 * 1024 * MIB), st.sampled_from(Origin))
def test_memory_is_what_was_asked_for(ram_bytes: int, origin: Origin) -> None:
    """The VM's memory is the requested size, and is not reserved on the host."""
    argv = qemu_argv(machine(ram_bytes=ram_bytes, origin=origin))
    (size,) = values(argv, "-m")
    assert int(size.removesuffix("M")) * MIB <= ram_bytes < (int(size.removesuffix("M")) + 1) * MIB
    (memory,) = (value for value in values(argv, "-object") if "id=ram0" in value)
    assert {f"size={size}", "reserve=off"} <= set(memory.split(","))


def test_kvm_is_used_by_descriptor() -> None:
    """KVM is used through the given descriptor; without it the VM is emulated."""
    hardware, emulated = qemu_argv(machine(kvm_fd=106)), qemu_argv(machine())
    assert values(hardware, "-accel") == ["kvm,device=/dev/fdset/3"]
    assert "set=3,fd=106" in values(hardware, "-add-fd")
    assert values(hardware, "-cpu") == ["host"]
    assert values(emulated, "-accel") == ["tcg,thread=single"]
    assert not any("kvm" in word for word in emulated)


def test_mitigations_are_off_only_under_emulation() -> None:
    """CPU mitigations are off only in emulated VMs."""
    assert "mitigations=off" in kernel_command_line(machine()).split()
    assert "mitigations=off" not in kernel_command_line(machine(kvm_fd=106))
    for weaker in ("nokaslr", "nosmep", "nosmap", "init=", "x07."):
        assert weaker not in kernel_command_line(machine())


def test_the_disks_of_a_virt_machine_are_in_order() -> None:
    """Each virtio device of the "virt" machine is on a numbered bus, since init mounts the first disk, /dev/vda."""
    devices = [word for word in values(qemu_argv(machine("aarch64")), "-device") if word.startswith("virtio-")]
    assert [word.rpartition(",")[2] for word in devices] == [f"bus=virtio-mmio-bus.{at}" for at in range(len(devices))]
    assert devices[0].startswith("virtio-blk-device,drive=root,")
    assert not any("bus=" in word for word in qemu_argv(machine("x86_64")))
