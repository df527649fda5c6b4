"""The registry of backends, one row for each. No other module imports the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from x07_sandbox.policy.features import Isolation

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Backend

    Factory = Callable[[str], Backend]
else:
    Factory = Any  # msgspec reads annotations

Class = Literal["vm", "os", "none"]
System = Literal["linux", "macos", "other"]
_WEAKER: Final = frozenset({"user-kernel", "container", "process", "none"})


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """The system that x07 runs on.

    macos_major: the major version of macOS; 0 on other systems. installed: the backends with `if_installed` whose
    program, daemon and devices are there.
    """

    system: System
    macos_major: int = 0
    installed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        if self.system == "macos":
            return f"macOS {self.macos_major}"
        return "Linux" if self.system == "linux" else "this system"


class BackendRow(msgspec.Struct, frozen=True):
    """One backend.

    sandbox_class: its class for --sandbox-backend. isolation: the isolation classes that it can provide, best first.
    macos_from: the first version of macOS that it supports, or 0 for none. auto: whether `auto` may select it.
    if_installed: whether it needs a daemon that few hosts have, so that `auto` passes over it elsewhere. factory: makes
    the backend from its name.
    """

    name: str
    sandbox_class: Class
    isolation: tuple[Isolation, ...]
    factory: Factory
    linux: bool = True
    macos_from: int = 0
    auto: bool = False
    if_installed: bool = False

    @property
    def weaker(self) -> bool:
        """Whether its isolation is weaker than a virtual machine's. The user must then accept it."""
        return self.isolation[0] in _WEAKER

    def runs_on(self, platform: Platform) -> bool:
        """Return whether the backend supports this platform."""
        if platform.system == "linux":
            return self.linux
        return platform.system == "macos" and 0 < self.macos_from <= platform.macos_major

    def may_run(self, platform: Platform) -> bool:
        """Return whether the backend supports this platform and, with `if_installed`, is installed."""
        return self.runs_on(platform) and (not self.if_installed or self.name in platform.installed)

    def unsupported(self, platform: Platform) -> str:
        """Return why the backend cannot be used on this platform, or "" if it can."""
        places = ["Linux"] * self.linux + [f"macOS {self.macos_from} or newer"] * bool(self.macos_from)
        return "" if self.runs_on(platform) else f"not supported on {platform}, only on {' and '.join(places)}"


def _qemu(_name: str) -> Backend:
    from x07_sandbox.backends.qemu.backend import QemuBackend

    return QemuBackend()


def _process(name: str) -> Backend:
    from x07_sandbox.backends.process import NoneBackend, OsBackend

    return OsBackend() if name == "os" else NoneBackend()


def _container(name: str) -> Backend:
    from x07_sandbox.backends.podman import EngineBackend

    return EngineBackend("podman" if name == "podman" else "docker")


def _containerd(_name: str) -> Backend:
    from x07_sandbox.backends.containerd import ContainerdBackend

    return ContainerdBackend()


def _gvisor(_name: str) -> Backend:
    from x07_sandbox.backends.gvisor import GvisorBackend

    return GvisorBackend()


def _firecracker(_name: str) -> Backend:
    from x07_sandbox.backends.firecracker import FirecrackerBackend

    return FirecrackerBackend()


def _apple(_name: str) -> Backend:
    from x07_sandbox.backends.apple import AppleBackend

    return AppleBackend()


def _vz(_name: str) -> Backend:
    from x07_sandbox.backends.vz import VzBackend

    return VzBackend()


_ROWS: Final = (
    BackendRow("firecracker-ctr", "vm", ("vm-hardware",), _firecracker, auto=True, if_installed=True),
    BackendRow("apple-container", "vm", ("vm-hardware",), _apple, linux=False, macos_from=26, auto=True),
    BackendRow("qemu", "vm", ("vm-hardware", "vm-emulated"), _qemu, auto=True),
    BackendRow("vz", "vm", ("vm-hardware",), _vz, linux=False, macos_from=13, auto=True),
    BackendRow("gvisor", "vm", ("user-kernel",), _gvisor),
    BackendRow("podman", "vm", ("container",), _container),
    BackendRow("docker", "vm", ("container",), _container),
    BackendRow("containerd", "vm", ("container",), _containerd),
    BackendRow("os", "os", ("process",), _process),
    BackendRow("none", "none", ("none",), _process),
)
# In order of preference.
BY_NAME: Final = {row.name: row for row in _ROWS}


def create(name: str) -> Backend:
    """Return a new instance of the backend *name*, without probing it."""
    return BY_NAME[name].factory(name)


def find(name: str) -> Backend | None:
    """Return a new instance of the backend *name*, or None if this version has no such backend."""
    return create(name) if name in BY_NAME else None
