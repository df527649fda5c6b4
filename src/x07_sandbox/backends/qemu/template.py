"""VM templates: a machine that was booted, prepared and saved once, and from which jobs go on copy-on-write.

cache/templates/<key>/{template.json,ram,state,scratch.head}
cache/templates/<key>.bad       why this one is not used in this boot of the host

The key is a hash of all that a saved machine depends on: image, QEMU and firmware as files, the whole command line,
the processor's clock. Measured: QEMU resumes on another root image or another count of processors without a word, and
hangs on another processor model, so nothing but the key stands between a template and the wrong machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.backends.qemu.machine import Machine, Origin, Paths, qemu_argv
from x07_sandbox.backends.qemu.start import Saved, image_of, tsc_khz
from x07_sandbox.errors import BackendError, HostError, ImageError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.cancel import Notice
from x07_sandbox.host.clocks import boot_ms
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import (
    cache_dir,
    cache_folder,
    least_recently_used,
    read_bounded,
    replace_file,
    why_not_ours,
)
from x07_sandbox.host.processes import boot_id
from x07_sandbox.images.manifest import Part, ScratchDisk, canonical
from x07_sandbox.images.store import list_images
from x07_sandbox.images.verify import CHUNK_BYTES, Subject, opened_file, opened_folder, opened_parts
from x07_sandbox.plan.controls import run_limits
from x07_sandbox.plan.sizes import build_limits, guest_limits
from x07_sandbox.policy import default_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.backends.base import MachineKind, Pruner
    from x07_sandbox.backends.qemu.start import Accelerator

    Maker = Callable[[Path], "TemplateManifest"]

SCHEMA: Final = "x07.sandbox.template@0.2.0"
MANIFEST: Final = "template.json"
_MANIFEST_MAX: Final = 1 << 20
_BAD_MAX: Final = 64 * 1024
_FULL_BYTES: Final = 32 << 20  # less is left on a full disk, though the machine's scratch disk gave some back
_ZEROS: Final = bytes(CHUNK_BYTES)

_COMPILE: Final = "echo 'int main(void) { return 0; }' > warm.c && gcc -O2 -o warm warm.c -lm; rm -f warm*"
_COMMANDS: Final = {
    "run": [["/bin/true"], ["/usr/bin/python3", "-c", "pass"]],
    "build": [["/bin/true"], ["/bin/sh", "-c", _COMPILE]],
}
_OF_BUILDS: Final = ["importlib.util", "io", "os", "traceback"]  # what programs/data/build_archive.py imports


def warm_up(kind: MachineKind) -> dict[str, object]:
    """The body of WARM: what jobs of this kind need. commands: run before saving, so that the kernel has read them."""
    running = kind.runtime == "run"
    limits = run_limits(default_policy()).for_guest() if running else guest_limits(build_limits(), settings.BUILD_TASKS)
    return {
        "preload": image_of(kind).manifest.preload if running else _OF_BUILDS,
        "hostname": settings.GUEST_HOSTNAME,
        "output": not running,
        "network": kind.network,
        "limits": limits,
        "commands": _COMMANDS[kind.runtime],
    }


class TemplateManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """template.json. digest: of all the rest. image: digest of the image that it was made from."""

    schema_version: str
    digest: str = ""
    key: str
    image: str
    ram: Part
    state: Part
    scratch: Part
    scratch_disk: ScratchDisk


def sealed(made: TemplateManifest) -> TemplateManifest:
    """*made* with its true digest."""
    blank = msgspec.structs.replace(made, digest="")
    digest = hashlib.sha256(canonical(msgspec.to_builtins(blank))).hexdigest()
    return msgspec.structs.replace(made, digest=f"sha256:{digest}")


class LateError(BackendError):
    """A machine that would be saved was not ready in time: the host may have been busy."""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """Where a template is, or would be. title: what goes on from it, for people."""

    key: str
    folder: Path
    title: str = "runs"

    @property
    def subject(self) -> Subject:
        """For verification."""
        return Subject(name=f"VM template {self.key[:12]}", record=self.key, sha256=sparse_sha256)

    def bad(self) -> str:
        """Why it is not used now, and until when; empty if nothing speaks against it."""
        try:
            told = json.loads(read_bounded(self.folder.with_suffix(".bad"), "note", _BAD_MAX))
            if told["boot_id"] != boot_id() or boot_ms() >= float(told.get("retry_at_ms", math.inf)):
                return ""
            return f"{told['reason']}. {_until(late='retry_at_ms' in told)}"
        except (UsageError, ValueError, RecursionError, KeyError, TypeError):
            return ""

    def distrust(self, reason: str, *, late: bool) -> str:
        """Remove it, and make no other until the host reboots; what `bad` says from then on.

        late: a machine was too slow, as any is on a busy host; then for some minutes only.
        """
        record: dict[str, object] = {"boot_id": boot_id(), "reason": reason[:500]}
        if late:
            record["retry_at_ms"] = boot_ms() + int(settings.TEMPLATE_RETRY_S * 1000)
        with contextlib.suppress(OSError):
            replace_file(self.folder.with_suffix(".bad"), json.dumps(record).encode())
        remove_template(self.folder)
        return f"{reason}. {_until(late=late)}"


def _until(*, late: bool) -> str:
    """How long jobs do without a template."""
    until = f"for {settings.TEMPLATE_RETRY_S / 60:.0f} minutes" if late else "until this host reboots"
    return f"Jobs like it start cold {until}, or until you run x07 image build for their image"


def trust_all() -> None:
    """Forget what spoke against any template. Raises HostError."""
    for path in templates_dir().glob("*.bad"):
        path.unlink(missing_ok=True)


def templates_dir() -> Path:
    """The folder of all templates. Raises HostError."""
    return cache_folder("templates")


def lack_of_space(ram_bytes: int) -> str:
    """Why no template of a machine with that RAM can be saved now, if the disk is too full; else empty."""
    info = os.statvfs(templates_dir())
    free = info.f_bavail * info.f_frsize
    needed_bytes = settings.TEMPLATE_BYTES + ram_bytes // settings.TEMPLATE_SHARE
    if free >= needed_bytes:
        return ""
    needed = needed_bytes >> 20
    return f"there is no saved machine, and {free >> 20} MiB are too little space for one: {needed} are needed"


def template_for(kind: MachineKind, accelerator: Accelerator) -> Template:
    """The template that jobs of this kind go on from. Raises HostError."""
    arch, ram, kvm_fd = host_arch(), kind.ram_bytes, 0 if accelerator.kvm else None
    clock = tsc_khz(arch)
    fds = dict.fromkeys(("scratch_fd", "channel_fd", "net_fd", "qmp_fd", "console_fd"), 0)
    machine = Machine(
        arch=arch,
        ram_bytes=ram,
        kvm_fd=kvm_fd,
        tsc_khz=None,
        mark="",
        origin=Origin.SAVING,
        reserve=False,
        any_timer=False,
        paths=Paths(),
        **fds,
    )
    files = [(path, Path(path).stat()) for path in (arch.qemu_binary, *arch.firmware)]
    parts = [
        SCHEMA,
        kind.image_digest,
        qemu_argv(machine),
        [[path, i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns] for path, i in files],
        # The clock as steps of 0.1 %: what /proc/cpuinfo says of it moves in the last digits.
        0 if clock is None else round(math.log(clock) * 1000),
        _processor() if accelerator.kvm else "",
        warm_up(kind),
    ]
    key = hashlib.sha256(canonical(parts)).hexdigest()
    jobs = "builds" if kind.runtime == "build" else "runs with connections" if kind.network else "runs"
    return Template(key=key, folder=templates_dir() / key, title=f"{jobs} ({ram >> 30} GiB of RAM)")


def _processor() -> list[str]:
    """What of the processor a guest under KVM gets to see."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return sorted({line for line in lines if line.partition("\t")[0] in wanted})


@contextlib.contextmanager
def opened_template(template: Template) -> Iterator[Saved | None]:
    """Its files, verified; None where there is none. Raises ImageError if it is damaged."""
    if not template.folder.is_dir():
        yield None
        return
    subject = template.subject
    with contextlib.ExitStack() as stack:
        folder_fd = stack.enter_context(opened_folder(template.folder, subject))
        with opened_file(folder_fd, MANIFEST, subject) as fd:
            made = _decode(os.pread(fd, _MANIFEST_MAX, 0), template)
        parts = (made.ram, made.state, made.scratch)
        ram_fd, state_fd, scratch_fd = opened_parts(folder_fd, parts, subject, stack)
        with contextlib.suppress(OSError):
            os.utime(template.folder)  # when it was last used: the oldest go first when space runs short
        yield Saved(ram_fd=ram_fd, state_fd=state_fd, scratch_fd=scratch_fd, scratch_disk=made.scratch_disk)


def _decode(data: bytes, template: Template) -> TemplateManifest:
    what = f"cannot use {template.subject.name}"
    try:
        made = msgspec.json.decode(data, type=prepared(TemplateManifest))
    except msgspec.MsgspecError as exc:
        raise ImageError(what, f"its {MANIFEST} is damaged", "Try again") from exc
    if (made.schema_version, made.key) != (SCHEMA, template.key):
        raise ImageError(what, f"its {MANIFEST} belongs to another", "Try again")
    if made != sealed(made):
        raise ImageError(what, f"its {MANIFEST} has changed", "Try again")
    return made


def sparse_sha256(fd: int, size: int) -> str:
    """Digest of the parts of a file that are not zero, and where they lie: most of a machine's memory is a hole."""
    digest = hashlib.sha256(str(size).encode())
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA) // CHUNK_BYTES * CHUNK_BYTES
        except OSError:  # ENXIO: no data behind here
            break
        data = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        if not data:
            break
        if data != _ZEROS[: len(data)]:
            digest.update(f" {offset} {len(data)} ".encode())
            digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def ensure_template(template: Template, image: str, make: Maker, progress: Callable[[str], None]) -> None:
    """Make the template if it is not there, under a lock, so that several who want it wait for one.

    image: digest of its image. make: fills a folder. Raises SandboxError; then nothing is there, or another process is
    still making one: one that is stopped, by Ctrl-Z say, must not block all others.
    """
    folder = templates_dir()
    with contextlib.ExitStack() as stack:
        try:
            waits = partial(progress, "waiting for another process that saves a machine")
            most_s = 2 * settings.TEMPLATE_S + settings.PRELOAD_S
            stack.enter_context(file_lock(folder / ".lock", on_wait=waits, most_s=most_s))
        except TimeoutError as exc:
            fix = "Look whether one is stopped, by Ctrl-Z say"
            raise HostError(f"cannot make {template.subject.name}", f"{exc}: the lock of all templates", fix) from exc
        _make_alone(template, folder, image, make, progress)


def _make_alone(template: Template, folder: Path, image: str, make: Maker, progress: Callable[[str], None]) -> None:
    import shutil
    import tempfile

    if template.folder.is_dir():
        return
    remove_template(template.folder)  # something that is no folder
    for path in leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        work.chmod(0o700)  # whatever the umask took away
        progress(Notice(f"saving a machine for {template.title} of this image; later ones start in 0.1 s"))
        made = sealed(make(work))
        path = work / MANIFEST
        path.write_bytes(msgspec.json.format(msgspec.json.encode(made)))
        path.chmod(0o444)
        work.rename(template.folder)
    except BackendError as exc:  # a machine whose memory is a file ends without a word where that cannot grow
        info = os.statvfs(work)
        if info.f_bavail * info.f_frsize >= _FULL_BYTES:
            raise
        raise HostError(exc.what, f"{folder}: {os.strerror(errno.ENOSPC)}", "Free space there") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)
    images = {image.digest for image in list_images()} | {image}
    for old, _ in expired_templates(keep=template.key, images=images):
        remove_template(old)


def expired_templates(*, keep: str, images: set[str]) -> list[tuple[Path, str]]:
    """Which templates go, and why: those of images that are gone, and the least recently used above the size limit.

    keep: the key of one that never goes. images: digests of those that are there.
    """
    found: list[tuple[float, int, Path]] = []
    doomed = []
    most_bytes = settings.TEMPLATES_MAX_BYTES
    for folder in templates_dir().glob("[0-9a-f]" * 64):
        if folder.name == keep:
            most_bytes -= _size_bytes(folder)
            continue
        try:
            made = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=prepared(TemplateManifest))
        except (OSError, msgspec.MsgspecError):
            doomed.append((folder, "its manifest is damaged"))
            continue
        if made.image not in images:
            doomed.append((folder, "its image is gone"))
        else:
            found.append((folder.stat().st_mtime, _size_bytes(folder), folder))
    oldest = least_recently_used(found, most_bytes)
    return doomed + [(folder, "there are too many, and it was not used for longest") for folder in oldest]


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())  # stat(2): of 512 bytes each


def remove_template(folder: Path) -> None:
    """Remove a template if that is possible; machines that go on from it keep what they have opened."""
    with contextlib.suppress(OSError):
        take_template_away(folder)


def take_template_away(folder: Path) -> None:
    """Remove a template, which nobody finds any more from then on. Raises OSError."""
    import shutil
    import tempfile

    if not os.path.lexists(folder):
        return
    doomed = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        folder.rename(doomed / "old")  # whatever it is
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left; the caller holds the lock, so nobody is making one."""
    return [*folder.glob(".new-*"), *folder.glob(".old-*")]


def prune_templates(pruner: Pruner, images: set[str]) -> None:
    """Remove templates as making another does. images: digests of those that stay. Raises SandboxError."""
    import shutil

    if not os.path.lexists(cache_dir() / "templates"):
        return
    folder = templates_dir()
    with file_lock(folder / ".lock", on_wait=lambda: pruner.progress("waiting for a VM template to be made")):
        for left in leftovers(folder):
            if not why_not_ours(left.lstat(), stat.S_ISDIR):
                pruner.remove("leftover", left, "a killed process left it", shutil.rmtree)
        for path, why in expired_templates(keep="", images=images):
            pruner.remove_own("template", path, why, take_template_away)
        for path in folder.glob("*.bad"):
            heeded = Template(key=path.stem, folder=path.with_suffix("")).bad()
            if not why_not_ours(path.lstat(), stat.S_ISREG) and not heeded:
                pruner.remove("leftover", path, "it does not hold any more", Path.unlink)
