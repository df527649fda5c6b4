"""The backends by name, those that come later too: a name is known or it is an error, and never stands for another."""

from __future__ import annotations

from typing import Final

import msgspec

from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.plan.features import Isolation


class KnownBackend(msgspec.Struct, frozen=True, kw_only=True):
    """One backend. isolation: the classes that it may turn out to have, strongest first. built: whether it is here."""

    name: str
    aliases: tuple[str, ...] = ()
    isolation: tuple[Isolation, ...]
    built: bool = False


BACKENDS: Final = (
    KnownBackend(name="qemu", isolation=("vm-hardware", "vm-emulated"), built=True),
    KnownBackend(name="firecracker-ctr", aliases=("firecracker",), isolation=("vm-hardware",)),
    KnownBackend(name="apple-container", aliases=("container",), isolation=("vm-hardware",)),
    KnownBackend(name="vz", isolation=("vm-hardware",)),
    KnownBackend(name="podman", isolation=("container",)),
    KnownBackend(name="docker", isolation=("container",)),
    KnownBackend(name="os", aliases=("native",), isolation=("process",)),
    KnownBackend(name="none", isolation=("none",)),
)


def backend_named(name: str) -> KnownBackend:
    """The backend that *name* or its alias means. Raises UsageError for any other name."""
    wanted = name.strip().lower()
    for backend in BACKENDS:
        if wanted == backend.name or wanted in backend.aliases:
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise UsageError(f"cannot use backend {name!r}", "there is no such backend", f"Name one of: {known}")


def need_built(backend: KnownBackend) -> None:
    """Raises RefusedError for a backend that comes later: no other one is taken in its place."""
    if not backend.built:
        built = ", ".join(known.name for known in BACKENDS if known.built)
        raise RefusedError(
            f"cannot use backend {backend.name}", "this version does not have it yet", f"Name {built}, or none at all"
        )
