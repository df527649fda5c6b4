"""Starting the helper, whose process is the virtual machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from x07_sandbox.backends.base import Job
from x07_sandbox.backends.jailed import Ends, Start, StreamInstance, running
from x07_sandbox.errors import BackendError, HostError
from x07_sandbox.host.linux import require_own_proc
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import private_dir, state_dir
from x07_sandbox.host.processes import Launch
from x07_sandbox.images.scratch import write_disk
from x07_sandbox.images.vz_bundle import OpenBundle
from x07_sandbox.records.record import JobRecord, create_record, drop_unstarted, state_home

_NO_SPACE: Final = "Free disk space, or set X07_VM_STATE_DIR"


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
