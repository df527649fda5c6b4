"""What each backend needs, whether it is here, and what to do: for `x07 doctor`, on any machine.

`gather` looks, without starting anything; `backend_states` is pure, so it can be tested for any machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from x07_sandbox.backends.engines import PACKAGES
from x07_sandbox.backends.registry import BY_NAME, BackendRow, Platform, System
from x07_sandbox.backends.selection import usable_flags
from x07_sandbox.host.arch import ARCHES

Kind = Literal["program", "socket", "device", "folder", "namespaces"]
State = Literal["proven", "untried", "failed", "later", "not-here"]

CONNECT_S: Final = 0.5
_KVM: Final = "/dev/kvm"


class Need(msgspec.Struct, frozen=True):
    """One thing that a backend needs. variable: may name another one. optional: it works without, but worse."""

    kind: Kind
    name: str
    variable: str = ""
    system: System | None = None
    optional: bool = False


class Seen(msgspec.Struct, frozen=True):
    """Whether something is here and usable, and how that looks."""

    good: bool
    text: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A machine, as far as backends ask. machine: as uname -m has it. seen: by (kind, name)."""

    platform: Platform
    machine: str
    environ: Mapping[str, str]
    seen: Mapping[tuple[str, str], Seen]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What became of starting a machine as a run does. good: None where nothing was started. fixes: where it failed."""

    good: bool | None
    text: str
    fixes: tuple[str, ...] = ()


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was looked for. good: None where it is missing and nothing depends on it."""

    what: str
    good: bool | None
    text: str


class BackendState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One backend on this machine.

    state: proven (it has started a machine here), untried (all that it needs is here), failed, later (not in this
    version), not-here (not for this platform). needs_acceptance: whether it is weaker than a virtual machine.
    remedies: three; none where it is proven or untried.
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
    "firecracker-ctr": (
        Need("program", "firecracker-ctr", "X07_VM_FIRECRACKER_CTR_BIN"),
        Need("socket", "/run/firecracker-containerd/containerd.sock", "X07_VM_FIRECRACKER_CONTAINERD_SOCK"),
        Need("device", _KVM),
    ),
    "apple-container": (Need("program", "container"),),
    "qemu": (Need("device", _KVM, optional=True),),  # and the programs of its architecture
    "vz": (Need("program", "x07-vz-helper", "X07_VM_VZ_HELPER_BIN"), Need("folder", "", "X07_VM_VZ_GUEST_BUNDLE")),
    "podman": (Need("program", "podman", "X07_VM_PODMAN_BIN"),),
    "docker": (Need("program", "docker", "X07_VM_DOCKER_BIN"),),
    "os": (Need("namespaces", "user namespaces", system="linux"),),
    "none": (),
}
_COMING: Final = {
    "firecracker-ctr": "start firecracker-containerd, and give this user its socket and /dev/kvm",
    "apple-container": "install Apple's container, and run container system start",
    "vz": "build x07-vz-helper, and name its guest bundle in X07_VM_VZ_GUEST_BUNDLE",
}
_NO_ARCHITECTURE: Final = (
    f"Run x07 on one of: {', '.join(sorted(ARCHES))}",
    "Start an emulated x86_64 Debian 13 machine of your own here, and run x07 inside it: slow, but whole",
    "Give this architecture a row in host/arch.py, and tell us how it goes",
)


def needs_of(name: str, system: System, machine: str) -> tuple[Need, ...]:
    """What the backend *name* needs there."""
    wanted = (need for need in NEEDS.get(name, ()) if need.system in {None, system})
    return (*(Need("program", path) for path in BY_NAME[name].tools(machine)), *wanted)


def place_of(need: Need, environ: Mapping[str, str]) -> str:
    """Where to look: where its variable says, else its usual place; empty where neither names one."""
    return environ.get(need.variable, "").strip() or need.name


def gather(platform: Platform, environ: Mapping[str, str]) -> Facts:
    """Look for everything that a backend of this platform needs. Nothing is started; a socket has CONNECT_S."""
    machine = os.uname().machine
    seen: dict[tuple[str, str], Seen] = {}
    for row in BY_NAME.values():
        for need in needs_of(row.name, platform.system, machine) if row.runs_on(platform) else ():
            place = place_of(need, environ)
            seen[need.kind, place] = _LOOKS[need.kind](place)
    return Facts(platform=platform, machine=machine, environ=dict(environ), seen=seen)


def _program(name: str) -> Seen:
    path = shutil.which(name)
    return Seen(path is not None, "not found" if path is None else "here" if path == name else path)


def _device(path: str) -> Seen:
    if not Path(path).exists():
        return Seen(good=False, text="not here")
    usable = os.access(path, os.R_OK | os.W_OK)
    return Seen(usable, "can be opened" if usable else "here, but not for this user")


def _folder(path: str) -> Seen:
    good = bool(path) and Path(path).is_dir()
    return Seen(good, "here" if good else "no such folder" if path else "none is named")


def _socket(path: str) -> Seen:
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return Seen(good=False, text="no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_S)
            connection.connect(path)
    except FileNotFoundError:
        return Seen(good=False, text="not here")
    except OSError as exc:
        return Seen(good=False, text=f"nobody answers ({exc.strerror or exc})")
    return Seen(good=True, text="somebody listens")


def _namespaces(_name: str) -> Seen:
    """Whether the kernel's switches forbid user namespaces; where none does, only a try would tell."""
    for path, forbids in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        with contextlib.suppress(OSError):
            value = Path(path).read_text(encoding="ascii").strip()
            if value == forbids and (os.geteuid() != 0 or "max" in path):
                return Seen(good=False, text=f"forbidden: {path} is {value}")
    return Seen(good=True, text="no switch of the kernel forbids them")


_LOOKS = {"program": _program, "socket": _socket, "device": _device, "folder": _folder, "namespaces": _namespaces}


def backend_states(facts: Facts, proofs: Mapping[str, Proof]) -> tuple[BackendState, ...]:
    """Every backend, in the order of preference. proofs: by the name of the backend, of those that were tried."""
    return tuple(_state(row, facts, proofs.get(row.name)) for row in BY_NAME.values())


def _state(row: BackendRow, facts: Facts, proof: Proof | None) -> BackendState:
    looks = _looks(row, facts) if row.runs_on(facts.platform) else ()
    found: tuple[State, str, tuple[str, ...]]
    if not row.runs_on(facts.platform):
        found = "not-here", f"it is not for {facts.platform}", _elsewhere(row, facts.platform)
    elif not row.built:
        coming = f"For the version that brings it: {_COMING[row.name]}"
        text = "not supported in this version"
        found = "later", text, (*advice(facts.platform), coming)
    elif proof is not None and proof.good:
        found = "proven", proof.text, ()
    elif proof is not None and proof.good is None:
        found = "untried", proof.text, ()
    else:
        found = "failed", *_failure(row, facts, looks, proof)
    kind = row.sandbox_class
    return BackendState(row.name, kind, row.isolation, row.weaker, found[0], found[1], looks, found[2])


def _looks(row: BackendRow, facts: Facts) -> tuple[Look, ...]:
    found = []
    for need in needs_of(row.name, facts.platform.system, facts.machine):
        place = place_of(need, facts.environ)
        seen = facts.seen.get((need.kind, place), Seen(good=False, text="not looked for"))
        found.append(Look(place or need.variable, seen.good or (None if need.optional else False), seen.text))
    return tuple(found)


def _failure(
    row: BackendRow, facts: Facts, looks: tuple[Look, ...], proof: Proof | None
) -> tuple[str, tuple[str, ...]]:
    """Why a backend cannot be used, and three things to do about it."""
    if facts.machine not in ARCHES:
        return f"no virtual machine for architecture {facts.machine}", _NO_ARCHITECTURE
    if missing := [look.what for look in looks if look.good is False]:
        packages = {**row.tools(facts.machine), **{str(name): package for name, package in PACKAGES.items()}}
        names = " ".join(sorted({packages[path] for path in missing if path in packages}))
        return f"missing: {', '.join(missing)}", (
            f"Run apt-get install --no-install-recommends {names}",
            "Run scripts/setup.sh in a checkout of x07-sandbox, which installs what is missing",
            "Run x07 in a Debian 13 machine or container that has them",
        )
    if proof is None:
        return "nothing was started", _NO_START
    return proof.text, (*filter(None, proof.fixes), *_NO_START)[:3]


_NO_START: Final = (
    "Allow user and mount namespaces: sysctl kernel.unprivileged_userns_clone=1, or run x07 as root",
    "In a container start it with --privileged",
    "Run x07 on another Linux machine with --sandbox-backend vm --backend qemu",
)


def advice(platform: Platform) -> tuple[str, str]:
    """Two things to do instead of taking a backend that cannot be had there."""
    words = " ".join(usable_flags(platform))
    if words:
        return f"Use {words}", "Leave --backend and X07_VM_BACKEND out: then what this version has is taken"
    return (
        f"Run x07 on Linux with {' '.join(usable_flags(Platform(system='linux')))}",
        "Start a Linux virtual machine of your own here, and run x07 inside it",
    )


def _elsewhere(row: BackendRow, platform: Platform) -> tuple[str, ...]:
    places = [*(["Linux"] if row.linux else []), *([f"macOS {row.macos_from} or newer"] if row.macos_from else [])]
    later = "" if row.built else ", with the version that brings it"
    return (*advice(platform), f"Run x07 on {' or '.join(places)}{later}")
