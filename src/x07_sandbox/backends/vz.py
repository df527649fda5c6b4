"""The `vz` backend: a virtual machine of Apple's Virtualization framework, started by a helper program of ours.

The helper and its protocol: docs/backends/vz.md.

On a Mac, this backend has never run: `probe` says which call x07's runner lacks there. Tests run it on Linux, with a
stand-in for the helper.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec

from x07_sandbox.backends.base import Availability, Job, greet
from x07_sandbox.backends.jailed import Ends, Start, StreamInstance, running
from x07_sandbox.backends.prerequisites import Need, require
from x07_sandbox.errors import BackendError, HostError, ImageError
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import require_linux, require_own_proc
from x07_sandbox.host.paths import find_program, private_dir, raised_as, state_dir
from x07_sandbox.host.processes import COMMAND_ENVIRONMENT, Launch
from x07_sandbox.host.variables import text
from x07_sandbox.host.waiting import Deadline, wait_readable
from x07_sandbox.images.verify import OpenImage, write_disk
from x07_sandbox.images.vz_bundle import OpenBundle, open_bundle
from x07_sandbox.policy.features import Features, vm_features
from x07_sandbox.records.runs import JobRecord, create_record, drop_unstarted, state_home
from x07_sandbox.records.stopping import stop_recorded

BUNDLE: Final = "X07_VM_VZ_GUEST_BUNDLE"
_CANNOT: Final = "cannot use vz"
_PREFLIGHT_S: Final = 10.0
_PREFLIGHT_MAX: Final = 4096
_NO_SPACE: Final = "Free disk space, or set X07_VM_STATE_DIR"
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
    snapshots = None
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
        assert child.stdout is not None
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


def helper_argv(helper: str, opened: OpenBundle, job: Job, disks: tuple[Path, Path], net_fd: int | None) -> list[str]:
    """Return the helper's command line. disks: the empty scratch disk, and the job's, whose path has the job's mark."""
    bundle = opened.bundle
    options = {
        "kernel": opened.path(bundle.kernel),
        "initrd": opened.path(bundle.initrd),
        "command-line": opened.command_line,
        "root": opened.path(bundle.rootfs),
        "scratch-from": str(disks[0]),
        "scratch": str(disks[1]),
        "mem-bytes": str(job.kind.ram_bytes),
        "wall-ms": str(job.claim.deadline_s * 1000),
    }
    if bundle.program is not None and job.kind.has_program_root:
        options["program"] = opened.path(bundle.program)
    if net_fd is not None:
        options["net-fd"] = str(net_fd)
    return [helper, "run", *(word for name, value in options.items() for word in (f"--{name}", value))]


@contextlib.contextmanager
def started(helper: str, opened: OpenBundle, job: Job) -> Iterator[StreamInstance]:
    """Start a VM. When the context ends, it is gone and recorded as gone. Raises BackendError, HostError."""
    if opened.digest != job.kind.image_digest:
        raise BackendError("cannot start the virtual machine", f"{opened.folder} was replaced", "Try again")
    empty = empty_disk(opened)
    record = create_record(job.claim, backend="vz", image_digest=opened.digest)
    with contextlib.ExitStack() as stack:
        stack.callback(drop_unstarted, record)
        require_own_proc()
        ends = Ends(stack, network=job.kind.network)
        passed = () if ends.far_net_fd is None else (ends.far_net_fd,)
        argv = helper_argv(helper, opened, job, (empty, scratch_path(record)), ends.far_net_fd)
        request = Launch(argv=argv, pass_fds=passed, stderr_fd=ends.stderr_fd, stdio_fd=ends.far_fd)
        jail = f"a process of its own ({helper})"
        start = Start(record, jail, ends.given, 0, partial(remove_scratch, record), name="the virtual machine")
        yield stack.enter_context(running(start, request, partial(StreamInstance, start, ends), _ended_at_once))


def _ended_at_once(status: int | None) -> BackendError:
    return BackendError("cannot start the virtual machine", f"the helper exited with status {status}", "Try again")


def scratch_path(record: JobRecord) -> Path:
    """Return the path of a job's scratch disk. It has the job's mark, which identifies the helper's process."""
    return record.folder / f"scratch-{record.mark}"


def remove_scratch(record: JobRecord) -> bool:
    """Remove a job's scratch disk, which a killed helper leaves. Return True. Raises OSError."""
    scratch_path(record).unlink(missing_ok=True)
    return True


def empty_disk(opened: OpenBundle) -> Path:
    """Return the empty scratch disk that the helper clones, made once for all bundles that need the same one.

    It is beside the jobs' folders, since a clone must be on the same volume. Raises HostError, ImageError.
    """
    folder = private_dir(state_home(private_dir(state_dir())) / "vz")
    recipe = msgspec.json.encode((opened.bundle.scratch, opened.bundle.scratch_disk))
    path = folder / f"{hashlib.sha256(recipe).hexdigest()[:32]}.disk"
    if not os.path.lexists(path):
        with raised_as(HostError, f"cannot make {path}", _NO_SPACE), tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place, "disk")
            with made.open("xb") as file:
                write_disk(opened.fds["scratch"], opened.bundle.scratch_disk, file.fileno())
                os.fsync(file.fileno())
            made.rename(path)
    return path
