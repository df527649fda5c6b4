"""The prerequisites of each backend, whether they are met, and what to do otherwise: for `x07 doctor`.

`gather` inspects the machine without starting anything. `backend_states` does no I/O.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from x07_sandbox.backends.engines import PACKAGES
from x07_sandbox.backends.registry import BY_NAME, BackendRow, Platform
from x07_sandbox.backends.selection import usable_flags
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.host.programs import find_program

Kind = Literal["program", "device", "namespaces"]
State = Literal["proven", "untried", "failed", "later", "not-here"]

_KVM: Final = "/dev/kvm"


class Need(msgspec.Struct, frozen=True):
    """One prerequisite.

    variable: the environment variable that sets another path. optional: whether the backend also works without it.
    """

    kind: Kind
    name: str
    variable: str = ""
    optional: bool = False


class Seen(msgspec.Struct, frozen=True):
    """Whether a prerequisite is met, with details."""

    good: bool
    text: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a machine that backends depend on. machine: from uname -m. seen: by (kind, path or name)."""

    platform: Platform
    machine: str
    environ: Mapping[str, str]
    seen: Mapping[tuple[str, str], Seen]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a test start of a backend. good: None if untried. fixes: what the user can do after a failure."""

    good: bool | None
    text: str
    fixes: tuple[str, ...] = ()


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prerequisite on this host.

    good: null if the prerequisite is missing but optional.
    """

    what: str
    good: bool | None
    text: str


class BackendState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One backend on this host.

    state: "proven" (it has started a VM here), "untried" (its prerequisites are met), "failed", "later" (not in this
    version) or "not-here" (not for this platform).
    needs_acceptance: whether its isolation is weaker than that of a virtual machine.
    looks: its prerequisites.
    remedies: what to do; empty if the state is "proven" or "untried".
    """

    name: str
    sandbox_backend: str
    isolation: tuple[str, ...]
    needs_acceptance: bool
    state: State
    text: str
    looks: tuple[Look, ...]
    remedies: tuple[str, ...]


NEEDS: Final[dict[str, tuple[Need, ...]]] = {
    "qemu": (Need("device", _KVM, optional=True),),
    "podman": (Need("program", "podman", "X07_VM_PODMAN_BIN"),),
    "docker": (Need("program", "docker", "X07_VM_DOCKER_BIN"),),
    "os": (Need("namespaces", "user namespaces"),),
}
_NO_ARCHITECTURE: Final = (
    f"Run x07 on one of: {', '.join(sorted(ARCHES))}",
    "Run x07 in an emulated x86_64 Debian 13 VM here (slow, but complete)",
    "Add a row for this architecture to host/arch.py, and report whether it works",
)
_NO_START: Final = (
    "Allow user and mount namespaces: sysctl kernel.unprivileged_userns_clone=1, or run x07 as root",
    "If x07 itself runs in a container, start that container with --privileged",
    "Run x07 on another Linux host with --sandbox-backend vm --backend qemu",
)


def needs_of(name: str, machine: str) -> tuple[Need, ...]:
    """Return the prerequisites of the backend *name*: the programs that it needs on *machine*, then those in NEEDS."""
    return (*(Need("program", path) for path in BY_NAME[name].tools(machine)), *NEEDS.get(name, ()))


def place_of(need: Need, environ: Mapping[str, str]) -> str:
    """Return where to look for a prerequisite: the value of its variable, or else its usual place."""
    return environ.get(need.variable, "").strip() or need.name


def gather(platform: Platform, environ: Mapping[str, str]) -> Facts:
    """Check the prerequisites of all backends for this platform."""
    machine = os.uname().machine
    seen: dict[tuple[str, str], Seen] = {}
    for row in BY_NAME.values():
        for need in needs_of(row.name, machine) if row.runs_on(platform) else ():
            place = place_of(need, environ)
            seen[need.kind, place] = _CHECKS[need.kind](place)
    return Facts(platform=platform, machine=machine, environ=dict(environ), seen=seen)


def _program(name: str) -> Seen:
    path = find_program(name)
    return Seen(path is not None, "not found" if path is None else "found" if path == name else path)


def _device(path: str) -> Seen:
    if not Path(path).exists():
        return Seen(good=False, text="not found")
    usable = os.access(path, os.R_OK | os.W_OK)
    return Seen(usable, "accessible" if usable else "not accessible for this user")


def _namespaces(_name: str) -> Seen:
    """Check the kernel's settings, which can forbid namespaces. Only a start proves that namespaces work."""
    for path, forbids in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        with contextlib.suppress(OSError):
            value = Path(path).read_text(encoding="ascii").strip()
            if value == forbids and (os.geteuid() != 0 or "max" in path):
                return Seen(good=False, text=f"disabled: {path} is {value}")
    return Seen(good=True, text="allowed by the kernel's settings")


_CHECKS = {"program": _program, "device": _device, "namespaces": _namespaces}


def backend_states(facts: Facts, proofs: Mapping[str, Proof]) -> tuple[BackendState, ...]:
    """Return the state of every backend, preferred ones first. proofs: results of trial starts, by backend name."""
    return tuple(_state(row, facts, proofs.get(row.name)) for row in BY_NAME.values())


def _state(row: BackendRow, facts: Facts, proof: Proof | None) -> BackendState:
    looks = _looks(row, facts) if row.runs_on(facts.platform) else ()
    found: tuple[State, str, tuple[str, ...]]
    if not row.runs_on(facts.platform):
        places = [*(["Linux"] if row.linux else []), *([f"macOS {row.macos_from} or newer"] if row.macos_from else [])]
        found = "not-here", f"not for {facts.platform}, only for {' and '.join(places)}", advice(facts.platform)
    elif not row.built:
        found = "later", "not supported in this version", advice(facts.platform)
    elif proof is not None and proof.good is not False:
        found = "proven" if proof.good else "untried", proof.text, ()
    else:
        found = "failed", *_failure(row, facts, looks, proof)
    kind = row.sandbox_class
    return BackendState(row.name, kind, row.isolation, row.weaker, found[0], found[1], looks, found[2])


def _looks(row: BackendRow, facts: Facts) -> tuple[Look, ...]:
    found = []
    for need in needs_of(row.name, facts.machine):
        place = place_of(need, facts.environ)
        seen = facts.seen[need.kind, place]
        found.append(Look(place, seen.good or (None if need.optional else False), seen.text))
    return tuple(found)


def _failure(
    row: BackendRow, facts: Facts, looks: tuple[Look, ...], proof: Proof | None
) -> tuple[str, tuple[str, ...]]:
    """Return why a backend cannot be used, and three remedies."""
    if facts.machine not in ARCHES:
        return f"no virtual machine for architecture {facts.machine}", _NO_ARCHITECTURE
    if missing := [look.what for look in looks if look.good is False]:
        packages = {**row.tools(facts.machine), **{str(name): package for name, package in PACKAGES.items()}}
        names = " ".join(sorted({packages[path] for path in missing if path in packages}))
        return f"missing: {', '.join(missing)}", (
            f"Run apt-get install --no-install-recommends {names}",
            "Run scripts/setup.sh in a checkout of x07-sandbox, which installs what is missing",
            "Run x07 in a Debian 13 VM or container that has them",
        )
    if proof is None:
        return "nothing was started", _NO_START
    more = () if row.isolation == ("container",) else _NO_START  # an engine's own error says what it needs
    return proof.text, (*filter(None, proof.fixes), *more)[:3]


def advice(platform: Platform) -> tuple[str, str]:
    """Return two alternatives to a backend that is not available."""
    if words := " ".join(usable_flags(platform)):
        return f"Use {words}", "Leave out --backend and X07_VM_BACKEND; x07 then selects a backend that works"
    return (
        f"Run x07 on Linux with {' '.join(usable_flags(Platform(system='linux')))}",
        "Run x07 in a Linux virtual machine here",
    )
