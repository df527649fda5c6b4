"""The registry of backends, one row for each. No other module imports the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from x07_sandbox.plan.features import Isolation

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
    the backend from its name; None if this version lacks it.
    """

    name: str
    sandbox_class: Class
    isolation: tuple[Isolation, ...]
    linux: bool = True
    macos_from: int = 0
    auto: bool = False
    if_installed: bool = False
    factory: Factory | None = None

    @property
    def built(self) -> bool:
        """Whether this version contains the backend."""
        return self.factory is not None

    @property
    def weaker(self) -> bool:
        """Whether its isolation is weaker than a virtual machine's. The user must then accept it."""
        return self.isolation[0] in _WEAKER

    def runs_on(self, platform: Platform) -> bool:
        """Return whether the backend supports this platform."""
        if platform.system == "linux":
            return self.linux
        return platform.system == "macos" and 0 < self.macos_from <= platform.macos_major

    def unsupported(self, platform: Platform) -> str:
        """Return why this version cannot use the backend on this platform, or "" if it can."""
        places = ["Linux"] * self.linux + [f"macOS {self.macos_from} or newer"] * bool(self.macos_from)
        here, only = self.runs_on(platform), f"only on {' and '.join(places)}"
        if not self.built:
            return "not supported in this version" + ("" if here else f", and {only}")
        return "" if here else f"not supported on {platform}, {only}"


def _qemu(_name: str) -> Backend:
    from x07_sandbox.backends.qemu.backend import QemuBackend

    return QemuBackend()


def _process(name: str) -> Backend:
    from x07_sandbox.backends.process.backend import NoneBackend, OsBackend

    return OsBackend() if name == "os" else NoneBackend()


def _container(name: str) -> Backend:
    from x07_sandbox.backends.container.backend import EngineBackend

    return EngineBackend("podman" if name == "podman" else "docker")


def _containerd(_name: str) -> Backend:
    from x07_sandbox.backends.containerd.backend import ContainerdBackend

    return ContainerdBackend()


def _gvisor(_name: str) -> Backend:
    from x07_sandbox.backends.gvisor.backend import GvisorBackend

    return GvisorBackend()


def _firecracker(_name: str) -> Backend:
    from x07_sandbox.backends.firecracker.backend import FirecrackerBackend

    return FirecrackerBackend()


def _vz(_name: str) -> Backend:
    from x07_sandbox.backends.vz.backend import VzBackend

    return VzBackend()


_ROWS: Final = (
    BackendRow("firecracker-ctr", "vm", ("vm-hardware",), auto=True, if_installed=True, factory=_firecracker),
    BackendRow("apple-container", "vm", ("vm-hardware",), linux=False, macos_from=26, auto=True),
    BackendRow("qemu", "vm", ("vm-hardware", "vm-emulated"), auto=True, factory=_qemu),
    BackendRow("vz", "vm", ("vm-hardware",), linux=False, macos_from=13, auto=True, factory=_vz),
    BackendRow("gvisor", "vm", ("user-kernel",), factory=_gvisor),
    BackendRow("podman", "vm", ("container",), factory=_container),
    BackendRow("docker", "vm", ("container",), factory=_container),
    BackendRow("containerd", "vm", ("container",), factory=_containerd),
    BackendRow("os", "os", ("process",), factory=_process),
    BackendRow("none", "none", ("none",), factory=_process),
)
# In order of preference.
BY_NAME: Final = {row.name: row for row in _ROWS}


def create(name: str) -> Backend:
    """Return a new instance of the backend *name*, without probing it."""
    factory = BY_NAME[name].factory
    assert factory is not None  # noqa: S101 - only built backends are selected
    return factory(name)


def built() -> tuple[str, ...]:
    """Return the names of the backends in this version."""
    return tuple(row.name for row in BY_NAME.values() if row.built)
