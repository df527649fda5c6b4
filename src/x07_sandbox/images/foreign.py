"""Images of another architecture than the host's. The host executes their programs through binfmt_misc and QEMU.

mmdebstrap and the second stage of a build execute programs of the image. The kernel's registration of the interpreter
is one setting for the whole host, so x07 only verifies it.
"""

from typing import Final

from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import Arch, is_foreign
from x07_sandbox.images import commands

PACKAGES: Final = ("qemu-user-static", "arch-test")
_SLOWER: Final = 4  # measured: mmdebstrap takes 12 times as long as for the host, a fifth of its usual limit


def slower(arch: Arch) -> int:
    """Return the factor for time limits of commands that execute programs of this architecture."""
    return _SLOWER if is_foreign(arch) else 1


def require_execution(arch: Arch) -> None:
    """Raise HostError unless this host can execute programs of this architecture."""
    if not is_foreign(arch):
        return
    what, install = f"cannot build an image for {arch.deb}", f"run apt-get install {' '.join(PACKAGES)}"
    try:
        commands.capture([commands.tool("arch-test"), arch.deb])
    except HostError as exc:
        raise HostError(what, exc.why, f"To execute {arch.deb} programs here, {install}") from exc
    except ImageError as exc:
        why = f"this host cannot execute {arch.deb} programs"
        fix = f"As root, {install}. If they are installed, run systemctl restart systemd-binfmt. Without systemd, run"
        fix += " mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc (unless it is mounted) and"
        fix += f" cat /usr/lib/binfmt.d/qemu-{arch.name}.conf >/proc/sys/fs/binfmt_misc/register"
        raise HostError(what, why, fix) from exc
