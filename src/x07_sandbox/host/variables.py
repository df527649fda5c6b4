"""Table of environment variables of X07's own VM sandbox and of this tool, and their parsing.

An invalid value is an error even if a flag overrides the variable, because a typo must never weaken isolation. A blank
value means unset. Unknown names with one of the prefixes give a warning.
"""

import os
import re
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import SYSTEM

PREFIXES: Final = ("X07_VM_", "X07_SANDBOX_", "X07_I_")
MOST_RUNNING: Final = 4096
_YES: Final = frozenset({"1", "true", "TRUE", "yes", "YES"})
_NO: Final = frozenset({"0", "false", "FALSE", "no", "NO"})
_SHOWN_CHARS: Final = 80
_DIGITS: Final = 18  # more are out of every range
# Variables that make programs load code: those of the dynamic loader, of shells and of interpreters.
_LOADING: Final = ("BASH_", "DYLD_", "ENV=", "LD_", "PERL", "PYTHON")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

# Accepted words and their meaning, also for flags.
SANDBOX_BACKENDS: Final[dict[str, str]] = {"auto": "auto", "vm": "vm", "os": "os", "native": "os", "none": "none"}
BACKENDS: Final[dict[str, str]] = {
    "firecracker-ctr": "firecracker-ctr",
    "firecracker": "firecracker-ctr",
    "qemu": "qemu",
    "apple-container": "apple-container",
    "container": "apple-container",
    "vz": "vz",
    "gvisor": "gvisor",
    "podman": "podman",
    "docker": "docker",
    "containerd": "containerd",
    "os": "os",
    "none": "none",
}

Kind = Literal["flag", "choice", "number", "folder", "digest", "text"]


class Variable(msgspec.Struct, frozen=True):
    """One environment variable."""

    name: str
    kind: Kind
    doc: str
    default: str = "unset"  # the behaviour while the variable is unset, in words
    effect: str = "always"  # when the variable has an effect
    choices: Mapping[str, str] | None = None  # accepted words, in any case, and their meanings
    lo: int = 0  # to hi: the range of a number
    hi: int = 0


FIRECRACKER_SOCKET: Final = "/run/firecracker-containerd/containerd.sock"
_OF_FIRECRACKER: Final = "with the firecracker-ctr backend"
_OF_CONTAINERD: Final = "with the containerd backend"
_OF_VZ: Final = "with the vz backend"
_NO_EFFECT: Final = "never: a VM does not get the host's variables, and builds have no network"


def _text(name: str, doc: str, default: str = "unset", effect: str = "always") -> Variable:
    return Variable(name, "text", doc, default, effect)


_ROWS: Final = (
    Variable(
        "X07_SANDBOX_BACKEND",
        "choice",
        "Kind of isolation. The flag --sandbox-backend overrides it.",
        "auto",
        choices=SANDBOX_BACKENDS,
    ),
    Variable(
        "X07_I_ACCEPT_WEAKER_ISOLATION",
        "flag",
        "Allow a backend that is not a virtual machine, if you select it by name.",
        "0",
    ),
    Variable(
        "X07_VM_BACKEND",
        "choice",
        "Name of the backend. The flag --backend overrides it.",
        "the platform's default",
        choices=BACKENDS,
    ),
    Variable("X07_VM_STATE_DIR", "folder", "Folder of job records.", "`$HOME/.x07/vm/jobs`"),
    Variable(
        "X07_VM_CACHE_DIR",
        "folder",
        "Folder of images, saved VMs and built programs.",
        "`$XDG_CACHE_HOME/x07-sandbox`, else `~/.cache/x07-sandbox`",
    ),
    Variable("X07_VM_REQUIRE_HARDWARE", "flag", "Refuse VMs with an emulated CPU.", "0"),
    Variable(
        "X07_VM_NO_HOT_CLONES",
        "flag",
        "Clone saved VMs, but do not restore saved processes of VMs.",
        "0",
        "with the qemu backend, where there is no KVM",
    ),
    Variable(
        "X07_VM_SAVE_FIRST",
        "flag",
        "Let a run that finds no saved VM save one first, and start no background process for it.",
        "0",
        "with the qemu backend",
    ),
    Variable(
        "X07_NO_FRONT", "flag", "Do not let the front of a pool carry out this command.", "0", "while a pool runs"
    ),
    Variable(
        "X07_VM_REQUIRE_NAMESPACES",
        "flag",
        "Refuse to run QEMU in a jail without namespaces.",
        "0",
        "with the qemu backend, if the host forbids namespaces",
    ),
    Variable(
        "X07_VM_MAX_RUNNING",
        "number",
        "How many jobs (VMs, containers or confined processes) may run at the same time.",
        "depends on cores and memory",
        lo=1,
        hi=MOST_RUNNING,
    ),
    Variable(
        "X07_VM_MAX_SANDBOXES",
        "number",
        "How many sandboxes may be open at the same time. Forks do not count.",
        "depends on memory",
        lo=1,
        hi=MOST_RUNNING,
    ),
    Variable(
        "X07_VM_MAX_FORKS",
        "number",
        "How many sandboxes that have started from a snapshot may be open at the same time.",
        "depends on memory",
        lo=1,
        hi=MOST_RUNNING,
    ),
    _text(
        "X07_VM_GUEST_IMAGE",
        "Guest image: its name or digest, or with podman, docker, containerd and firecracker-ctr the name of an image "
        "in the engine. The flag --image overrides it.",
        "`default`, or in an engine `ghcr.io/x07lang/x07-guest-runner:VERSION`",
    ),
    Variable(
        "X07_VM_GUEST_IMAGE_DIGEST", "digest", "Digest of the only guest image that may be used. No flag overrides it."
    ),
    _text("X07_VM_VZ_GUEST_BUNDLE", "Folder with the kernel and the root disk for vz.", effect=_OF_VZ),
    _text(
        "X07_VM_VZ_HELPER_BIN", "Helper program that uses macOS's Virtualization framework.", "`x07-vz-helper`", _OF_VZ
    ),
    _text(
        "X07_VM_APPLE_CONTAINER_BIN",
        "Path of Apple's container.",
        "`container` in a system folder",
        "with the apple-container backend",
    ),
    _text("X07_VM_PODMAN_BIN", "Path of the podman client.", "`podman` in a system folder"),
    _text("X07_VM_RUNSC_BIN", "Path of gVisor's runtime.", "`runsc` in a system folder", "with the gvisor backend"),
    _text("X07_VM_DOCKER_BIN", "Path of the docker client.", "`docker` in a system folder"),
    _text(
        "X07_VM_FIRECRACKER_CTR_BIN", "Path of firecracker-containerd's client.", "`firecracker-ctr`", _OF_FIRECRACKER
    ),
    _text(
        "X07_VM_FIRECRACKER_CONTAINERD_SOCK",
        "Socket of firecracker-containerd.",
        f"`{FIRECRACKER_SOCKET}`",
        _OF_FIRECRACKER,
    ),
    _text("X07_VM_FIRECRACKER_SNAPSHOTTER", "Snapshotter of firecracker-containerd.", "`devmapper`", _OF_FIRECRACKER),
    _text("X07_VM_CTR_BIN", "Path of containerd's client.", "`ctr` in a system folder", _OF_CONTAINERD),
    _text("X07_VM_CONTAINERD_SOCK", "Socket of containerd.", "`/run/containerd/containerd.sock`", _OF_CONTAINERD),
    _text("X07_VM_CONTAINERD_SNAPSHOTTER", "Snapshotter of containerd.", "`overlayfs`", _OF_CONTAINERD),
    _text(
        "X07_VM_CONTAINERD_NAMESPACE",
        "Namespace of containerd or firecracker-containerd for the containers of x07.",
        "`x07`",
        "with the containerd and firecracker-ctr backends",
    ),
    _text(
        "X07_WORKSPACE_ROOT", "Folder of the X07 language's library.", "`/usr/local/lib/x07` in the guest", _NO_EFFECT
    ),
    _text("X07_COMPAT", "X07 version that the X07 compiler is to be compatible with. The flag --compat overrides it."),
    Variable(
        "X07_MAX_C_BYTES",
        "number",
        "Maximum size of the C code that the X07 compiler generates, in bytes. The flag --max-c-bytes overrides it.",
        lo=0,
        hi=2**48,
    ),
    _text("X07_OFFLINE", "Do not download packages of the X07 language.", effect=_NO_EFFECT),
    _text("X07_NATIVE_CACHE_DIR", "Cache of native libraries for X07 programs.", effect=_NO_EFFECT),
)
VARIABLES: Final[dict[str, Variable]] = {variable.name: variable for variable in _ROWS}


def check_environment(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Check all known variables. Return warnings about unknown names with X07's prefixes. Raises UsageError."""
    for name in environ.keys() & VARIABLES.keys():
        _read(VARIABLES[name], environ)
    return tuple(_unknown(name) for name in sorted(environ) if name.startswith(PREFIXES) and name not in VARIABLES)


def inherited_environment() -> dict[str, str]:
    """Return this process's variables without those that make programs load code, and with PATH naming SYSTEM."""
    kept = {name: value for name, value in os.environ.items() if not f"{name}=".startswith(_LOADING)}
    return kept | {"PATH": ":".join(SYSTEM)}


def flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Return the value of the switch *name*, or False while it is unset. Raises UsageError for an invalid value."""
    return _read(_of(name, "flag"), environ) is True


def number(name: str, environ: Mapping[str, str] | None = None) -> int | None:
    """Return the value of the number *name*, or None while it is unset. Raises UsageError for an invalid value."""
    value = _read(_of(name, "number"), environ)
    return value if isinstance(value, int) else None


def text(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the value of *name* (for a choice, its meaning), or None while unset. Raises UsageError if invalid."""
    value = _read(_of(name, "choice", "folder", "digest", "text"), environ)
    return value if isinstance(value, str) else None


def _of(name: str, *kinds: Kind) -> Variable:
    variable = VARIABLES[name]
    if variable.kind not in kinds:
        raise TypeError(f"{name} is a {variable.kind}")
    return variable


def _read(variable: Variable, environ: Mapping[str, str] | None) -> bool | int | str | None:
    """Return a variable's value, or None while it is unset. Raises UsageError if the value is invalid."""
    raw = (os.environ if environ is None else environ).get(variable.name, "")
    value = raw.strip()
    if not value:
        return None
    if variable.kind == "folder":
        value = raw  # a path may end in a blank
    parsed, expected = _parsed(variable, value)
    if parsed is None:
        shown = ascii(raw if len(raw) <= _SHOWN_CHARS else raw[:_SHOWN_CHARS] + "...")
        why = f"its value {shown} is not {expected}"
        raise UsageError(f"cannot use {variable.name}", why, f"Correct the value, or unset {variable.name}")
    return parsed


def _parsed(variable: Variable, value: str) -> tuple[bool | int | str | None, str]:
    """Return the meaning of *value* (None if it is invalid), and a description of valid values."""
    if variable.kind == "flag":
        return (True if value in _YES else False if value in _NO else None), "1 or 0"
    if variable.kind == "choice":
        choices = variable.choices or {}
        return choices.get(value.lower()), f"one of {', '.join(choices)}"
    if variable.kind == "number":
        digits = value.isascii() and value.isdigit() and len(value) <= _DIGITS
        good = digits and variable.lo <= int(value) <= variable.hi
        return int(value) if good else None, f"an integer from {variable.lo} to {variable.hi}"
    if variable.kind == "folder":
        return value if value.startswith("/") else None, "an absolute path"
    good = variable.kind == "text" or _DIGEST.fullmatch(value) is not None
    return value if good else None, "'sha256:' followed by 64 lower-case hex digits"


def _unknown(name: str) -> str:
    import difflib  # slow to import, and needed only after a typo

    shown = ascii(name)[1:-1]
    longer = [known for known in VARIABLES if known.startswith(f"{name}_")]
    close = longer or difflib.get_close_matches(name[:_SHOWN_CHARS], VARIABLES, n=1, cutoff=0.75)
    meant = f"; did you mean {close[0]}?" if close else "; see docs/reference/settings.md"
    return f"{shown[:_SHOWN_CHARS]} is not a variable of x07-sandbox{meant}"
