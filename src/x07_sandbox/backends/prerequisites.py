"""The prerequisites of backends: for each kind, its check with the advice.

Each backend lists its own (`Backend.needs`). Its probe requires them, and `x07 doctor` prints them.
"""

import contextlib
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from x07_sandbox.errors import Command, HostError, Text
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.processes import output_of
from x07_sandbox.host.variables import text

_INSTALL: Final = "apt-get install --no-install-recommends"


class Need(msgspec.Struct, frozen=True):
    """One prerequisite.

    code: its kind. name: a path, or the name of a program or library. package: the Debian packages that contain it.
    variable: the environment variable that sets another path. optional: whether the backend may work without it.
    least: the oldest version that works.
    """

    code: Literal["program", "library", "firmware", "not-setuid", "version", "device", "namespaces"]
    name: str
    package: str = ""
    variable: str = ""
    optional: bool = False
    least: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        """Where to look: the value of the variable, or else the name."""
        return (text(self.variable) if self.variable else None) or self.name


class Found(NamedTuple):
    """Whether a prerequisite is met, with details. why, fix: for an error; "" if a package is to be installed."""

    text: str
    why: str = ""
    fix: Text = ""
    good: bool = False


Looks = Sequence[tuple[Need, Found]]
"""Prerequisites, each with what its check found."""
KVM: Final = Need("device", "/dev/kvm", optional=True)
NO_KVM: Final = "Use a host where KVM works"


def check(needs: Sequence[Need]) -> Looks:
    """Check prerequisites."""
    return [(need, _CHECKS[need.code](need)) for need in needs]


def unmet(looks: Looks) -> Looks:
    """Return the prerequisites that are not met and not optional."""
    return [(need, found) for need, found in looks if not (found.good or need.optional)]


def advice(failed: Looks) -> tuple[str, Text]:
    """Return why the first of these prerequisites makes an action fail, and what to do."""
    if (first := failed[0][1]).why:
        return first.why, first.fix
    packages = " ".join(need.package for need, found in failed if not found.why)
    return f"missing: {packages}", ("Run: ", Command(f"{_INSTALL} {packages}"))


def require(needs: Sequence[Need], what: str) -> None:
    """Raise HostError unless all *needs* are met, optional ones aside. what: the first part of the error."""
    if failed := unmet(check(needs)):
        raise HostError(what, *advice(failed))


def _program(need: Need) -> Found:
    if (path := find_program(need.place)) is not None:
        return Found("found" if path == need.place else path, good=True)
    why = fix = ""
    if need.place != need.name:
        why = f"{need.variable} is {need.place}, which is no executable program"
        fix = f"Set {need.variable} to an absolute path"
    elif need.variable:
        install = f"Run: {_INSTALL} {need.package}" if need.package else "Install it (Debian has no package)"
        why, fix = f"missing: {need.name}", f"{install}, or set {need.variable}"
    return Found("not found", why, fix)


def _library(need: Need) -> Found:
    import ctypes  # few backends need a library

    with contextlib.suppress(OSError):
        ctypes.CDLL(need.name)
        return Found("found", good=True)
    return Found("not found")


def _firmware(need: Need) -> Found:
    if os.access(need.name, os.R_OK):
        return Found("found", good=True)
    fix = ("Run: ", Command(f"apt-get install --reinstall {need.package}"))
    return Found("not found", f"missing: {need.name}", fix)


def _not_setuid(need: Need) -> Found:
    with contextlib.suppress(OSError):  # it is missing, which another check finds
        if Path(need.name).stat().st_mode & stat.S_ISUID:
            why = f"{need.name} is set-user-ID, which gives it more rights than it needs"
            return Found("set-user-ID", why, ("Run: ", Command(f"chmod u-s {need.name}")))
    return Found("not set-user-ID", good=True)


def _version(need: Need) -> Found:
    said = b""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = output_of([need.name, "--version"], timeout_s=30).stdout
    least, found = ".".join(map(str, need.least)), version_in(said.decode("ascii", "replace"))
    if found >= need.least:
        return Found(f"version {'.'.join(map(str, found))}", good=True)
    fix = f"Install {need.package} {least} or newer, or use another backend"
    return Found(f"older than version {least}", f"{need.name} is too old", fix)


def version_in(said: str) -> tuple[int, ...]:
    """Return the first version number in *said* as (major, minor), or () if there is none."""
    import re

    found = re.search(r"(\d+)\.(\d+)", said)
    return tuple(int(word) for word in found.groups()) if found else ()


def _device(need: Need) -> Found:
    device = Path(need.name)
    if not device.exists():
        return Found("not found", f"there is no {device}", NO_KVM)
    if os.access(device, os.R_OK | os.W_OK):
        return Found("accessible", good=True)
    import pwd

    fix = f"As root, allow this user (uid {os.geteuid()}) to read and write {device}"
    with contextlib.suppress(KeyError):  # the uid or gid has no name
        user = pwd.getpwuid(os.geteuid()).pw_name
        if device.group() == "kvm":
            fix = f"As root, run usermod -aG kvm {user}, and then log in again as {user}"
    return Found("not accessible for this user", f"{device} cannot be opened by this user", fix)


def _namespaces(_need: Need) -> Found:
    """Check the kernel's settings, which can forbid namespaces. Only a start proves that namespaces work."""
    for path, forbids in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        with contextlib.suppress(OSError):
            value = Path(path).read_text(encoding="ascii").strip()
            if value == forbids and (os.geteuid() != 0 or "max" in path):
                return Found(f"disabled: {path} is {value}")
    return Found("allowed by the kernel's settings", good=True)


_CHECKS: Final = {
    "program": _program,
    "library": _library,
    "firmware": _firmware,
    "not-setuid": _not_setuid,
    "version": _version,
    "device": _device,
    "namespaces": _namespaces,
}
