"""The registry of backends: the only module that imports them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.selection import BY_NAME, BackendRow
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.plan.features import vm_features

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.base import Backend
    from x07_sandbox.plan.features import Features

    Factory = Callable[[], Backend]


def _qemu() -> Backend:
    from x07_sandbox.backends.qemu.backend import QemuBackend

    return QemuBackend()


def _os() -> Backend:
    from x07_sandbox.backends.process.backend import OsBackend

    return OsBackend()


def _none() -> Backend:
    from x07_sandbox.backends.process.backend import NoneBackend

    return NoneBackend()


_FACTORIES: Final[dict[str, Factory]] = {"qemu": _qemu, "os": _os, "none": _none}


def create(name: str) -> Backend:
    """The backend of that name, as selection has chosen it. Nothing is looked up or started yet."""
    return _FACTORIES[name]()


def features_of(row: BackendRow) -> Features:
    """What a backend can be relied on to hold, with nothing started: of several classes the weakest. Raises HostError.

    A virtual machine holds the same on every host, so it is told also where it could not run.
    """
    backend = create(row.name)
    return vm_features(row.isolation[-1]) if backend.uses_image else backend.probe(None, boot=False).features


def built() -> tuple[str, ...]:
    """The backends of this version."""
    return tuple(_FACTORIES)


@contextlib.contextmanager
def registered(row: BackendRow, factory: Factory) -> Iterator[None]:
    """Around code that may use one more backend, as tests of the contract do."""
    BY_NAME[row.name], _FACTORIES[row.name] = row, factory
    try:
        yield
    finally:
        del BY_NAME[row.name], _FACTORIES[row.name]


def required_tools(name: str, machine: str) -> Mapping[str, str]:
    """Programs that a backend of this version needs, by path, and Debian's package of each.

    machine: the architecture as uname -m has it.
    """
    if name != "qemu" or machine not in ARCHES:
        return {}
    from x07_sandbox.backends.qemu.start import required_tools as of_qemu

    return of_qemu(ARCHES[machine])
