"""The backends, one row for each, and the selection of one by flags, variables and the platform.

No other module imports the backends. The requested backend is used or refused, but never replaced by another. Isolation
weaker than a virtual machine needs the user's consent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.variables import (
    BACKENDS,
    FIRECRACKER_SOCKET,
    SANDBOX_BACKENDS,
    check_environment,
    flag,
    text,
)
from x07_sandbox.policy.features import Isolation

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Backend

    Factory = Callable[[str], Backend]
else:
    Factory = Any  # msgspec reads annotations

Class = Literal["vm", "os", "none"]
System = Literal["linux", "macos", "other"]
ACCEPT_FLAG: Final = "--i-accept-weaker-isolation"
ACCEPT_VARIABLE: Final = "X07_I_ACCEPT_WEAKER_ISOLATION"
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


class BackendRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The requested class and backend by their canonical names (host/variables); None if not requested.

    accepted: whether the user accepted weaker isolation. auto: the class that `auto` stands for. flags: the caller's
    flags, for advice; () if the caller has only variables.
    """

    sandbox_flag: str | None = None
    sandbox_variable: str | None = None
    backend_flag: str | None = None
    backend_variable: str | None = None
    accepted: bool = False
    auto: Class = "vm"
    flags: tuple[str, ...] = ("--sandbox-backend", "--backend")


class Choice(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The selected backend, by name."""

    backend: str

    @cached_property
    def made(self) -> Backend:
        """The backend, which was not probed yet."""
        return create(self.backend)

    @property
    def sandbox_backend(self) -> Class:
        """The backend's class for --sandbox-backend."""
        return BY_NAME[self.backend].sandbox_class


def select(platform: Platform, request: BackendRequest) -> Choice:
    """Select the backend. Raises UsageError for a contradictory request, RefusedError for an unavailable backend."""
    wanted_class, name = _wanted(platform, request)
    if name is None and wanted_class in {"os", "none"}:
        name = wanted_class
    if name is None:
        return _automatic(platform, request)
    row = BY_NAME[name]
    # A variable alone never selects less than a container. The flag does, since the user typed it for this run.
    named = (
        row.sandbox_class in {"vm", request.sandbox_flag or request.sandbox_variable} or name == request.backend_flag
    )
    if row.weaker and not (named and request.accepted):
        walls = {
            "user-kernel": "gVisor, a kernel that is a process",
            "container": "a container",
            "process": "a confined process on this system",
        }
        wall = walls.get(row.isolation[0], "no sandbox at all")
        why = f"it runs programs in {wall}; that is weaker isolation than a virtual machine and needs your consent"
        fix = instead(platform, request, row, named=named)
        raise RefusedError(f"cannot use the backend {row.name}", why, fix, code="weaker-isolation")
    if why := row.unsupported(platform):
        fix = instead(platform, request)
        raise RefusedError(f"cannot use the backend {row.name}", why, fix, code="backend-not-here")
    return Choice(backend=row.name)


def backend_request(
    *,
    sandbox: str | None = None,
    backend: str | None = None,
    accepted: bool = False,
    auto: Class = "vm",
    flags: tuple[str, ...] = ("--sandbox-backend", "--backend"),
) -> BackendRequest:
    """Return the request made by flags and environment. Raises UsageError."""
    return BackendRequest(
        sandbox_flag=SANDBOX_BACKENDS[sandbox] if sandbox else None,
        sandbox_variable=text("X07_SANDBOX_BACKEND"),
        backend_flag=backend_named(backend).name if backend else None,
        backend_variable=text("X07_VM_BACKEND"),
        accepted=accepted or flag(ACCEPT_VARIABLE),
        auto=auto,
        flags=flags,
    )


def choice_from_environment() -> Choice:
    """Return the choice made by environment variables. Raises RefusedError, or UsageError for any invalid one."""
    check_environment(os.environ)
    return select(this_platform(), backend_request(flags=()))


def backend_named(word: str) -> BackendRow:
    """Return the backend with this name or alias, in upper or lower case. Raises UsageError."""
    word = word.strip().lower()
    name = BACKENDS.get(word, word)
    if name not in BY_NAME:
        fix = f"Choose one of: {', '.join(BY_NAME)}"
        raise UsageError(f"cannot use backend {word!r}", "there is no such backend", fix)
    return BY_NAME[name]


def usable_flags(platform: Platform) -> tuple[str, ...]:
    """Return flags that select a backend on *platform* without consent to weaker isolation, or () if no flags do."""
    for row in BY_NAME.values():
        if not row.unsupported(platform) and not row.weaker and not row.if_installed:
            return "--sandbox-backend", row.sandbox_class, "--backend", row.name
    return ()


def _wanted(platform: Platform, request: BackendRequest) -> tuple[str, str | None]:
    """Return the wanted class, and the backend or None; flags precede variables. Raises UsageError."""
    by_variable = (request.sandbox_variable, "X07_SANDBOX_BACKEND", request.backend_variable, "X07_VM_BACKEND")
    for wanted, origin, name, name_origin, caller in (
        (request.sandbox_flag, "--sandbox-backend", request.backend_flag, "--backend", request),
        (*by_variable, replace(request, flags=())),
    ):
        if name is not None and _contradict(wanted, name):
            why = f"the backend {name} is of the kind {BY_NAME[name].sandbox_class}, not {wanted}"
            raise UsageError(f"{origin} and {name_origin} contradict each other", why, instead(platform, caller))
    if request.backend_flag is not None:
        return BY_NAME[request.backend_flag].sandbox_class, request.backend_flag
    wanted = request.sandbox_flag or request.sandbox_variable or "auto"
    # A variable is ignored if the command line selects another class.
    name = None if _contradict(wanted, request.backend_variable) else request.backend_variable
    return (request.auto if wanted == "auto" and name is None else wanted), name


def _contradict(wanted: str | None, name: str | None) -> bool:
    return name is not None and wanted not in {None, "auto", BY_NAME[name].sandbox_class}


def _automatic(platform: Platform, request: BackendRequest) -> Choice:
    candidates = [row for row in BY_NAME.values() if row.auto and row.may_run(platform)]
    if candidates:
        return Choice(backend=candidates[0].name)
    why = f"none supports {platform}"
    raise RefusedError("there is no virtual machine backend", why, instead(platform, request), code="no-backend")


def instead(
    platform: Platform, request: BackendRequest, weaker: BackendRow | None = None, *, named: bool = True
) -> str:
    """Return what the user can do instead.

    weaker: a backend that may be used after consent. named: whether the user also requested its class.
    """
    here = usable_flags(platform)
    words = _by_caller(request, here or usable_flags(Platform(system="linux")))
    parts = [f"Use {words}" if here else f"Run x07 on Linux with {words}"]
    if weaker is not None and not weaker.unsupported(platform):
        if request.flags:
            wall = "" if named else f"--sandbox-backend {weaker.sandbox_class} "
            parts.append(f"or add {wall}{ACCEPT_FLAG} (or {ACCEPT_VARIABLE}=1)")
        else:
            wall = "" if named else f"X07_SANDBOX_BACKEND={weaker.sandbox_class} and "
            parts.append(f"or set {wall}{ACCEPT_VARIABLE}=1")
    return ", ".join(parts)


def _by_caller(request: BackendRequest, flags: tuple[str, ...]) -> str:
    """Return `usable_flags` in the form of the caller's own flags, or else of the variables that are set."""
    found = dict(zip(flags[::2], flags[1::2], strict=True))
    if request.flags:
        return " ".join(f"{flag} {found[flag]}" for flag in request.flags)
    given = [(request.sandbox_variable, "X07_SANDBOX_BACKEND", "--sandbox-backend")]
    given.append((request.backend_variable, "X07_VM_BACKEND", "--backend"))
    words = [f"{variable}={found[flag]}" for word, variable, flag in given if word]
    if not words:  # an argument of a library call
        return "another backend"
    return f"{' and '.join(words)}, or unset {'it' if len(words) == 1 else 'them'}"


def _installed() -> frozenset[str]:
    """Return the backends whose program, socket and devices exist. Whether they work is for their probe to find."""
    binary = find_program(text("X07_VM_FIRECRACKER_CTR_BIN") or "firecracker-ctr")
    socket = text("X07_VM_FIRECRACKER_CONTAINERD_SOCK") or FIRECRACKER_SOCKET
    found = binary is not None and Path(socket).exists() and Path("/dev/kvm").exists()
    return frozenset({"firecracker-ctr"} if found else ())


def this_platform() -> Platform:
    """Return the platform of this process."""
    system = os.uname()
    if system.sysname == "Linux":
        return Platform(system="linux", installed=_installed())
    if system.sysname == "Darwin":
        import platform

        major = platform.mac_ver()[0].partition(".")[0]
        return Platform(system="macos", macos_major=int(major) if major.isdigit() else 0)
    return Platform(system="other")
