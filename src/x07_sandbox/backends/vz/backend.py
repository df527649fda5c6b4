"""The `vz` backend. Its helper program and their protocol: docs/backends/vz.md.

On a Mac, this backend has never run: `probe` says which call x07's runner lacks there. Tests run it on Linux, with a
stand-in for the helper.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from x07_sandbox.backends.base import Availability, Job
from x07_sandbox.backends.handshake import greet
from x07_sandbox.backends.jailed import StreamInstance
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.backends.vz.start import remove_scratch, started
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.linux import require_linux
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import find_program
from x07_sandbox.host.processes import COMMAND_ENVIRONMENT
from x07_sandbox.host.variables import text
from x07_sandbox.host.waiting import Deadline, wait_readable
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.images.vz_bundle import OpenBundle, open_bundle
from x07_sandbox.policy.features import Features, vm_features
from x07_sandbox.records.record import JobRecord
from x07_sandbox.records.stopping import stop_recorded

BUNDLE: Final = "X07_VM_VZ_GUEST_BUNDLE"
_CANNOT: Final = "cannot use vz"
_PREFLIGHT_S: Final = 10.0
_PREFLIGHT_MAX: Final = 4096
_SIGN: Final = "Build the helper again with scripts/build_vz_helper.sh, which signs it with the entitlement"


class Preflight(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `x07-vz-helper preflight` prints."""

    schema_version: Literal["x07.vz.preflight@0.1.0"]
    macos: str
    arch: str
    supported: bool
    entitled: bool
    memory_bytes: tuple[int, int]
    cpus: tuple[int, int]
    ok: bool


class VzBackend:
    """The backend for Apple's Virtualization framework."""

    name = "vz"
    uses_image = True
    cloning = None
    known_gaps: Final[Mapping[str, str]] = {}
    image_variable = BUNDLE
    needs = (Need("program", "x07-vz-helper", "", "X07_VM_VZ_HELPER_BIN"),)

    @property
    def engine_images(self) -> VzBackend:
        """The guest bundle, which is not in x07's store."""
        return self

    def find(self, ref: str | None) -> OpenImage:
        """Return the image of the guest bundle. Raises ImageError, HostError. ref: None, or the bundle's digest."""
        with self._bundle() as opened:
            if ref not in {None, opened.digest}:
                why = f"vz starts only the guest bundle that {BUNDLE} names"
                raise ImageError(f"cannot use the image {ref}", why, f"Set {BUNDLE} instead of naming an image")
            return OpenImage(fds={}, manifest=opened.image)

    @contextlib.contextmanager
    def _bundle(self) -> Iterator[OpenBundle]:
        if (place := text(BUNDLE)) is None:
            why = f"{BUNDLE} is not set"
            fix = f"Run scripts/build_vz_guest_bundle.sh, and set {BUNDLE} to the folder"
            raise ImageError("there is no guest bundle", why, fix)
        with open_bundle(Path(place), host_arch().name) as opened:
            yield opened

    def least_features(self) -> Features:
        """Return the features of a VM with our agent, which has always hardware virtualisation."""
        return vm_features("vm-hardware")

    def probe(self, image: OpenImage | None = None, *, boot: bool = True) -> Availability:  # noqa: ARG002 - nothing boots
        """Return what a VM can limit, if the helper reports that it can start one. Raises HostError."""
        require_linux()  # x07's runner has no module for macOS yet (host/linux)
        found = _preflight(self._helper())
        said = f"the helper runs on macOS {found.macos} ({found.arch})"
        if not found.ok:
            why = "without the entitlement" if found.supported else "which does not support virtual machines"
            raise HostError(_CANNOT, f"{said}, {why}", _SIGN if found.supported else "Use another Mac")
        return Availability(features=self.least_features(), proof=f"{said}, and may start virtual machines")

    @contextlib.contextmanager
    def start(self, job: Job) -> Iterator[StreamInstance]:
        """Start a job and wait until its agent has answered. Raises NoAnswerError, BackendError, HostError."""
        helper = self._helper()
        with self._bundle() as opened, started(helper, opened, job) as instance:
            greet(instance, cancel_fd=job.caller.cancel.fd, meanwhile=job.meanwhile)
            yield instance

    def stop(self, record: JobRecord) -> bool:
        """End a recorded job's helper, and with it the VM, and remove the scratch disk."""
        return stop_recorded(record, lambda _stored: remove_scratch(record))

    def _helper(self) -> str:
        """Return the path of the helper. Raises HostError."""
        require(self.needs, _CANNOT)
        return find_program(self.needs[0].place) or self.needs[0].name


def _preflight(helper: str) -> Preflight:
    """Return what the helper reports about this machine and itself. Raises HostError."""
    said, deadline = b"", Deadline.after(_PREFLIGHT_S)
    with (
        raised_as(HostError, f"cannot start {helper}", "Build it with scripts/build_vz_helper.sh"),
        subprocess.Popen(
            [helper, "preflight"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=COMMAND_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        ) as child,
    ):
        assert child.stdout is not None  # noqa: S101 - for the type checker
        try:
            while len(said) <= _PREFLIGHT_MAX and wait_readable(child.stdout.fileno(), deadline.left_s()):
                if not (data := os.read(child.stdout.fileno(), _PREFLIGHT_MAX)):
                    break
                said += data
        finally:
            child.kill()
    try:
        return msgspec.json.decode(said, type=prepared(Preflight), strict=True)
    except msgspec.MsgspecError as exc:
        why = f"{helper} preflight gave no valid answer within {_PREFLIGHT_S:.0f} s ({exc})"
        raise HostError(_CANNOT, why, "Build the helper of this version with scripts/build_vz_helper.sh") from exc
