"""The selection of a backend, from the platform and from the request made by flags and variables. No I/O.

The requested backend is used or refused, but never replaced by another. Isolation weaker than a virtual machine needs
the user's consent.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.registry import BY_NAME, BackendRow, Class, Platform, create
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

if TYPE_CHECKING:
    from x07_sandbox.backends.base import Backend

ACCEPT_FLAG: Final = "--i-accept-weaker-isolation"
ACCEPT_VARIABLE: Final = "X07_I_ACCEPT_WEAKER_ISOLATION"


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
