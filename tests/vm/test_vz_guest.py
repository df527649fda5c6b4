"""The guest half of the vz backend: an image on a machine with the devices that x07-vz-helper gives it.

QEMU's q35 with PCI devices stands in for a machine of Apple's framework, which no test here can start. The kernel is
the image's ELF file, which QEMU starts too.
"""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import need
from x07_sandbox.channel.messages import PROTOCOL
from x07_sandbox.host.arch import host_arch
from x07_sandbox.images.verify import open_image, write_disk
from x07_sandbox.images.vz_bundle import COMMAND_LINE

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

HELLO_BYTES = 16  # a frame of the channel with the version of the agent's protocol


def test_the_agent_answers_on_a_machine_with_pci_devices(image: Image, tmp_path: Path) -> None:
    """The agent finds its named port beside a console without a name, and speaks first."""
    need(host_arch().name == "x86_64", "an x86_64 host, whose QEMU has a q35", installable=False)
    ours, theirs = socket.socketpair()
    with ours, theirs, open_image(image) as opened, (tmp_path / "scratch").open("w+b") as scratch:
        write_disk(opened.fds["scratch"], image.manifest.scratch_disk, scratch.fileno())
        argv = [host_arch().qemu_binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-M", "q35", "-cpu", "max", "-m", "512M", "-accel", "tcg"]
        argv += ["-kernel", str(image.folder / "vmlinux"), "-initrd", str(image.folder / "initrd.cpio")]
        argv += ["-append", COMMAND_LINE]
        for name, path, read_only in (("root", image.folder / "root.erofs", "on"), ("scratch", scratch.name, "off")):
            argv += ["-drive", f"file={path},format=raw,if=none,id={name},readonly={read_only}"]
            argv += ["-device", f"virtio-blk-pci,drive={name},serial=x07{name}"]
        argv += ["-chardev", f"file,id=console,path={tmp_path / 'console'}"]
        argv += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"]
        argv += ["-chardev", f"socket,id=channel,fd={theirs.fileno()}", "-device", "virtio-serial-pci,id=ports"]
        argv += ["-device", "virtserialport,bus=ports.0,chardev=channel,nr=1,name=x07.0"]
        argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]) as vmm:
            theirs.close()
            try:
                ours.settimeout(120)
                hello = ours.recv(HELLO_BYTES, socket.MSG_WAITALL)
            finally:
                vmm.kill()
    assert hello[-4:] == PROTOCOL.to_bytes(4, "big"), (tmp_path / "console").read_text(errors="replace")
