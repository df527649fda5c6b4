"""Every environment variable of X07's VM sandbox and of ours, in one table: what it may hold, and how it is read.

A value that a variable may not hold is an error that names it, also where a flag wins: a typing error must never weaken
a promise. Blank means unset. Names that look like ours and are none are told, with the one that was probably meant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from x07_sandbox.errors import UsageError

PREFIXES: Final = ("X07_VM_", "X07_SANDBOX_", "X07_I_")
MOST_RUNNING: Final = 4096
_YES: Final = frozenset({"1", "true", "TRUE", "yes", "YES"})
_NO: Final = frozenset({"0", "false", "FALSE", "no", "NO"})
_SHOWN_CHARS: Final = 80
_DIGITS: Final = 18  # more are outside every range
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

# What is written, and what it means. Flags take the same words.
SANDBOX_BACKENDS: Final[dict[str, str]] = {"auto": "auto", "vm": "vm", "os": "os", "native": "os", "none": "none"}
BACKENDS: Final[dict[str, str]] = {
    "firecracker-ctr": "firecracker-ctr",
    "firecracker": "firecracker-ctr",
    "qemu": "qemu",
    "apple-container": "apple-container",
    "container": "apple-container",
    "vz": "vz",
    "podman": "podman",
    "docker": "docker",
    "os": "os",
    "none": "none",
}

Kind = Literal["flag", "choice", "number", "folder", "digest", "text"]


class Variable(msgspec.Struct, frozen=True):
    """One variable.

    choices: of a choice: what may be written, in any case, and what it means. lo, hi: of a number.
    default: what holds while it is unset, in words. effect: since when it has one here: "now", or what it waits for.
    """

    name: str
    kind: Kind
    doc: str
    default: str = "unset"
    effect: str = "now"
    choices: Mapping[str, str] | None = None
    lo: int = 0
    hi: int = 0


_FIRECRACKER: Final = "with the firecracker-ctr backend"
_GUEST: Final = "none: the host's variables do not reach a guest, and builds have no network"

VARIABLES: Final[dict[str, Variable]] = {
    variable.name: variable
    for variable in (
        Variable(
            "X07_SANDBOX_BACKEND",
            "choice",
            "The class of wall around the program; --sandbox-backend wins.",
            "auto",
            choices=SANDBOX_BACKENDS,
        ),
        Variable(
            "X07_I_ACCEPT_WEAKER_ISOLATION",
            "flag",
            "Accept a wall that is no virtual machine, where one is asked for by name.",
            "0",
        ),
        Variable(
            "X07_VM_BACKEND", "choice", "The backend by name; --backend wins.", "the platform's first", choices=BACKENDS
        ),
        Variable("X07_VM_STATE_DIR", "folder", "Where records of jobs lie.", "`$HOME/.x07/vm/jobs`"),
        Variable(
            "X07_VM_CACHE_DIR",
            "folder",
            "Where images, VM templates and built programs lie.",
            "`$XDG_CACHE_HOME/x07-sandbox`, else `~/.cache/x07-sandbox`",
        ),
        Variable("X07_VM_REQUIRE_HARDWARE", "flag", "Refuse a machine whose processor is emulated.", "0"),
        Variable(
            "X07_VM_REQUIRE_NAMESPACES",
            "flag",
            "Refuse a jail around QEMU that stands without namespaces.",
            "0",
            effect="with the qemu backend, where the host forbids namespaces",
        ),
        Variable(
            "X07_VM_MAX_RUNNING",
            "number",
            "How many machines of yours run at once.",
            "what cores and memory hold",
            lo=1,
            hi=MOST_RUNNING,
        ),
        Variable(
            "X07_VM_GUEST_IMAGE",
            "text",
            "The guest image: with qemu the name or digest of one of ours (--image wins).",
            "`default`",
        ),
        Variable(
            "X07_VM_GUEST_IMAGE_DIGEST",
            "digest",
            "The only guest image that may run, by its digest; no flag weakens that.",
        ),
        Variable(
            "X07_VM_VZ_GUEST_BUNDLE", "text", "The folder with vz's kernel and root disk.", effect="with the vz backend"
        ),
        Variable(
            "X07_VM_VZ_HELPER_BIN",
            "text",
            "The helper that talks to macOS's Virtualization framework.",
            "`x07-vz-helper`",
            effect="with the vz backend",
        ),
        Variable("X07_VM_PODMAN_BIN", "text", "podman's client: a program.", "`podman` of this system"),
        Variable("X07_VM_DOCKER_BIN", "text", "docker's client: a program.", "`docker` of this system"),
        Variable(
            "X07_VM_FIRECRACKER_CTR_BIN",
            "text",
            "The ctr of firecracker-containerd.",
            "`firecracker-ctr`",
            effect=_FIRECRACKER,
        ),
        Variable(
            "X07_VM_FIRECRACKER_CONTAINERD_SOCK",
            "text",
            "Its socket.",
            "`/run/firecracker-containerd/containerd.sock`",
            effect=_FIRECRACKER,
        ),
        Variable("X07_VM_FIRECRACKER_SNAPSHOTTER", "text", "Its snapshotter.", "`devmapper`", effect=_FIRECRACKER),
        Variable(
            "X07_VM_CONTAINERD_NAMESPACE",
            "text",
            "The containerd namespace of our containers.",
            "`x07`",
            effect=_FIRECRACKER,
        ),
        Variable(
            "X07_WORKSPACE_ROOT",
            "text",
            "Where X07's library lies.",
            "`/usr/local/lib/x07` in the guest",
            effect=_GUEST,
        ),
        Variable("X07_COMPAT", "text", "The X07 version to compile like; --compat wins."),
        Variable(
            "X07_MAX_C_BYTES",
            "number",
            "How much C the X07 compiler may make, in bytes; --max-c-bytes wins.",
            lo=0,
            hi=2**48,
        ),
        Variable("X07_OFFLINE", "text", "Fetch no X07 packages.", effect=_GUEST),
        Variable("X07_NATIVE_CACHE_DIR", "text", "X07's cache of native libraries.", effect=_GUEST),
    )
}


def check_environment(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Check every variable that is ours; warnings about names that only look so. Raises UsageError."""
    for name in environ.keys() & VARIABLES.keys():
        _read(VARIABLES[name], environ)
    return tuple(_unknown(name) for name in sorted(environ) if name.startswith(PREFIXES) and name not in VARIABLES)


def flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """A switch, off while unset. Raises UsageError."""
    return _read(_of(name, "flag"), environ) is True


def number(name: str, environ: Mapping[str, str] | None = None) -> int | None:
    """A whole number; None while unset. Raises UsageError."""
    value = _read(_of(name, "number"), environ)
    return value if isinstance(value, int) else None


def text(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Anything else: a choice as what it means, a folder, a digest, a text; None while unset. Raises UsageError."""
    value = _read(_of(name, "choice", "folder", "digest", "text"), environ)
    return value if isinstance(value, str) else None


def _of(name: str, *kinds: Kind) -> Variable:
    variable = VARIABLES[name]
    if variable.kind not in kinds:
        raise TypeError(f"{name} is a {variable.kind}")
    return variable


def _read(variable: Variable, environ: Mapping[str, str] | None) -> bool | int | str | None:
    """What a variable holds; None while unset. Raises UsageError."""
    raw = (os.environ if environ is None else environ).get(variable.name, "")
    value = raw.strip()
    if not value:
        return None
    if variable.kind == "folder":
        value = raw  # a path may end in a blank
    taken, instead = _taken(variable, value)
    if taken is None:
        shown = ascii(raw if len(raw) <= _SHOWN_CHARS else raw[:_SHOWN_CHARS] + "...")
        name = variable.name
        raise UsageError(
            f"cannot use {name}", f"it holds {shown}, which is not {instead}", f"Set it so, or unset {name}"
        )
    return taken


def _taken(variable: Variable, value: str) -> tuple[bool | int | str | None, str]:
    """(what *value* means, None if it may not be held; what may be)."""
    if variable.kind == "flag":
        return (True if value in _YES else False if value in _NO else None), "1 or 0"
    if variable.kind == "choice":
        choices = variable.choices or {}
        return choices.get(value.lower()), f"one of {', '.join(choices)}"
    if variable.kind == "number":
        digits = value.isascii() and value.isdigit() and len(value) <= _DIGITS
        good = digits and variable.lo <= int(value) <= variable.hi
        return int(value) if good else None, f"a whole number from {variable.lo} to {variable.hi}"
    if variable.kind == "folder":
        return value if value.startswith("/") else None, "an absolute path"
    good = variable.kind == "text" or _DIGEST.fullmatch(value) is not None
    return value if good else None, "sha256: and 64 hex digits in lower case"


def _unknown(name: str) -> str:
    import difflib  # costs more than all else here, and is needed only after a slip

    shown = ascii(name)[1:-1]
    longer = [known for known in VARIABLES if known.startswith(f"{name}_")]  # the rest of a name is soon forgotten
    close = longer or difflib.get_close_matches(name[:_SHOWN_CHARS], VARIABLES, n=1, cutoff=0.75)
    meant = f"; did you mean {close[0]}?" if close else "; docs/reference/x07.md lists them"
    return f"{shown[:_SHOWN_CHARS]} is no variable of x07-sandbox{meant}"


def describe() -> str:
    """The table as docs/reference/x07.md shows it."""
    rows = ["| variable | holds | while unset | has an effect | |", "|---|---|---|---|---|"]
    rows += [
        f"| `{variable.name}` | {_holds(variable)} | {variable.default} | {variable.effect} | {variable.doc} |"
        for variable in VARIABLES.values()
    ]
    return "\n".join(rows) + "\n"


def _holds(variable: Variable) -> str:
    if variable.kind == "choice":
        return ", ".join(
            f"`{word}`" if word == means else f"`{word}` (= `{means}`)"
            for word, means in (variable.choices or {}).items()
        )
    return {
        "flag": "`1 true TRUE yes YES`, `0 false FALSE no NO`",
        "number": f"{variable.lo} to {variable.hi}",
        "folder": "an absolute path",
        "digest": "`sha256:` and 64 hex digits",
    }.get(variable.kind, "text")
