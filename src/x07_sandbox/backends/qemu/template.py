"""VM templates ("saved VMs" in messages): VMs that were booted, prepared and saved once. Clones resume copy-on-write.

cache/templates/<key>/{template.json,ram,state,scratch.head}
cache/templates/<id>00.../{snapshot.json,ram,state,disk,sandbox}    kept snapshots (qemu/snapshot)

The key is a hash of everything that a template depends on: image, QEMU and firmware as files, the command line, and the
processor's clock. Measured: QEMU resumes without an error on another root image or processor count, and hangs on
another processor model. Only the key prevents that.
"""

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import msgspec

from x07_sandbox.backends.base import NOT_IMPORTED, SLOW_IMPORT, Handshake, Instance, Kept, MachineKind, Note, Prunable
from x07_sandbox.backends.qemu import start as starts
from x07_sandbox.backends.qemu.instance import QemuInstance
from x07_sandbox.backends.qemu.machine import QMP_QUERY_SAVE, Machine, Origin, qemu_argv, qmp_save
from x07_sandbox.backends.qemu.start import Saved, Saving
from x07_sandbox.channel.contents import next_data
from x07_sandbox.channel.link import State
from x07_sandbox.channel.messages import Warm
from x07_sandbox.errors import BackendError, Command, HostError, ImageError
from x07_sandbox.host import settings
from x07_sandbox.host.documents import prepared
from x07_sandbox.host.linux import boot_id, boot_ms, processor
from x07_sandbox.host.locks import file_lock, is_locked, lock_for_removal, lock_shared
from x07_sandbox.host.paths import (
    cache_dir,
    cache_folder,
    least_recently_used,
    open_private_file,
    raised_as,
    unnamed_file,
    why_not_ours,
)
from x07_sandbox.host.processes import close_on_fork
from x07_sandbox.host.verdicts import Verdict, file_state, validity
from x07_sandbox.host.waiting import Deadline, Notice, Remark, input_poll, unix_ms, write_all
from x07_sandbox.images.store import Part, ScratchDisk, list_images
from x07_sandbox.images.verify import (
    CHUNK_BYTES,
    FILE_MODE,
    FOLDER_MODE,
    Subject,
    opened_file,
    opened_folder,
    opened_parts,
    read_disk,
)
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import canonical_json, default_policy
from x07_sandbox.policy.guest import build_limits, command_limits, tmp_bytes

SCHEMA: Final = "x07.sandbox.template@0.3.0"
MANIFEST: Final = "template.json"
SNAPSHOT: Final = "snapshot.json"
_KEY_DIGITS: Final = 64
SUSPENDED: Final = "suspended"  # the kind of verdict on a template that is not used for now
_MANIFEST_MAX: Final = 1 << 20
_ZEROS: Final = bytes(CHUNK_BYTES)

_COMPILE: Final = "echo 'int main(void) { return 0; }' > warm.c && gcc -O2 -o warm warm.c -lm; rm -f warm*"
_COMMANDS: Final = {
    "run": [["/bin/true"], ["/usr/bin/python3", "-c", "pass"]],
    "build": [["/bin/true"], ["/bin/sh", "-c", _COMPILE]],
}
# The imports of programs/data/build_tree.py.
_OF_BUILDS: Final = ["importlib.util", "os", "traceback"]

_UNLOCKED_S: Final = 60.0
_SAVED: Final = '"status": "completed"'
_NOT_SAVED: Final = '"status": "failed"'
_ASK_AGAIN_MS: Final = 5
_WHAT: Final = "cannot save a VM"
# The codes of errors about preloaded modules, by the stage that the guest reports.
_PRELOADING: Final = {"exec": NOT_IMPORTED, "preload": SLOW_IMPORT}
_FIX: Final = ("Jobs boot a new VM instead. To try again: ", Command("x07 image build"))


def warm_message(kind: MachineKind) -> Warm:
    """Return the message WARM. Its commands are run before saving, so that their files are in memory."""
    assert kind.image is not None  # each virtual machine has one
    running = kind.runtime == "run"
    of_run, of_build = run_limits(default_policy()), build_limits()
    limits = of_run.for_guest() if running else command_limits(of_build, settings.BUILD_TASKS)
    return Warm(
        preload=None if kind.has_program_root else kind.image.manifest.preload if running else _OF_BUILDS,
        limits=limits,
        tmp_bytes=tmp_bytes(limits.mem_bytes),
        hostname=settings.GUEST_HOSTNAME,
        out_writable=not running,
        network=kind.network,
        commands=_COMMANDS[kind.runtime],
    )


class TemplateManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of template.json. digest: digest of all other fields. image: digest of the template's image.

    state: QEMU's device state. Of a saved process (qemu/hot), instead: images, the files of criu's dump in the folder
    IMAGES; names, see `Hot`; and period, outside of which it is not used.
    """

    schema_version: str
    digest: str = ""
    key: str
    image: str
    ram: Part
    scratch: Part
    scratch_disk: ScratchDisk
    state: Part | None = None
    images: tuple[Part, ...] = ()
    names: tuple[str, ...] = ()
    period: str = ""


class SnapshotManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of snapshot.json, in the folder of a kept snapshot. image: digest of its image."""

    schema_version: Literal["x07.sandbox.snapshot@0.1.0"] = "x07.sandbox.snapshot@0.1.0"
    image: str
    note: Note
    period: ClassVar = ""


def sealed(made: TemplateManifest) -> TemplateManifest:
    """Return *made* with its digest set."""
    blank = msgspec.structs.replace(made, digest="")
    digest = hashlib.sha256(canonical_json(msgspec.to_builtins(blank))).hexdigest()
    return msgspec.structs.replace(made, digest=f"sha256:{digest}")


class TransientError(BackendError):
    """A VM could not be saved, and the state of the host may be the cause."""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """The key and folder of a template, which may not exist yet.

    title: the jobs that use it. noun: what is saved. instead: what such jobs do without it. All for messages.
    """

    key: str
    folder: Path
    title: str = "runs"
    noun: str = "VM"
    instead: str = "boot a new VM"

    @property
    def subject(self) -> Subject:
        """The description of this template for `images/verify`."""
        return Subject(name=f"saved {self.noun} {self.key[:12]}", record=self.key, sha256=sparse_sha256)

    def suspended(self) -> str:
        """Return why the template is not used now, and until when, or "" if it is usable."""
        note = Verdict(SUSPENDED, self.key).read()
        until = f"Such jobs {self.instead} {validity(note)}, or until you run x07 image build for their image"
        return f"{note['reason']}. {until}" if "reason" in note else ""

    def suspend(self, reason: str, *, transient: bool, keep: bool = False) -> str:
        """Remove the template, and make no other for minutes or until the host reboots. Return why.

        transient: whether the state of the host may be the cause. The suspension then lasts minutes. keep: whether the
        template stays, and is used again afterwards.
        """
        with contextlib.suppress(OSError):
            Verdict(SUSPENDED, self.key).write({"reason": reason[:500]}, transient=transient)
        if not keep:
            remove_template(self.folder)
        return self.suspended() or reason


def templates_dir() -> Path:
    """Return the folder of all templates. Raises HostError."""
    return cache_folder("templates")


def current_period() -> str:
    """Return a text that changes when the host reboots, and every few hours."""
    return f"{boot_id()} {int(boot_ms() / 1000 // settings.HOT_S)}"


def _most_bytes() -> int:
    from x07_sandbox.host.user_settings import disk_limits  # few runs save or remove a VM

    return disk_limits().saved_vms_mib << 20


def lack_of_space(ram_bytes: int) -> str:
    """Return why no template with this much RAM can be saved on this disk, or "" if it can."""
    info = os.statvfs(templates_dir())
    free = info.f_bavail * info.f_frsize
    needed_bytes = settings.TEMPLATE_BYTES + ram_bytes // settings.TEMPLATE_SHARE
    if free >= needed_bytes:
        return ""
    needed = needed_bytes >> 20
    return f"saving one takes {needed} MiB of disk space, but {free >> 20} MiB are free"


def template_for(kind: MachineKind, *, kvm: bool) -> Template:
    """Return the template for jobs of this kind. Raises HostError."""
    arch, ram, kvm_fd = kind.arch, kind.ram_bytes, 0 if kvm else None
    clock = starts.tsc_khz(arch)
    fds: dict[str, Any] = dict.fromkeys(("scratch_fd", "channel_fd", "net_fd", "qmp_fd", "console_fd"), 0)
    machine = Machine(arch=arch, ram_bytes=ram, kvm_fd=kvm_fd, tsc_khz=None, mark="", origin=Origin.SAVING, **fds)
    parts = [
        SCHEMA,
        kind.image_digest,
        qemu_argv(machine),
        [file_state(path) for path in (arch.qemu_binary, *arch.firmware)],
        # The clock in steps of 0.1 %: its last digits in /proc/cpuinfo vary.
        0 if clock is None else round(math.log(clock) * 1000),
        processor("model name", "flags", "microcode") if kvm else "",  # what a guest under KVM sees
        warm_message(kind),
    ]
    key = hashlib.sha256(canonical_json(parts)).hexdigest()
    jobs = "builds" if kind.runtime == "build" else "runs with connections" if kind.network else "runs"
    return Template(key=key, folder=templates_dir() / key, title=f"{jobs} ({ram >> 30} GiB of RAM)")


@contextlib.contextmanager
def opened_template(template: Template) -> Iterator[Saved | None]:
    """Open the template's verified files, or yield None if there are none. Raises ImageError if it is damaged."""
    with contextlib.ExitStack() as stack:
        if (found := opened_manifest(template, stack)) is None:
            yield None
            return
        folder_fd, made = found
        assert made.state is not None  # by the kind of the template
        parts = (made.ram, made.state, made.scratch)
        ram_fd, state_fd, scratch_fd = opened_parts(folder_fd, parts, template.subject, stack)
        yield Saved(ram_fd=ram_fd, state_fd=state_fd, scratch_fd=scratch_fd, scratch_disk=made.scratch_disk)


def opened_manifest(template: Template, stack: contextlib.ExitStack) -> tuple[int, TemplateManifest] | None:
    """Return a template's folder, which *stack* closes, and its manifest, or None. Raises ImageError."""
    try:
        # Until then, `delete_unused` does not remove it.
        stack.callback(close_on_fork.close, lock_shared(template.folder))
    except (FileNotFoundError, BlockingIOError):  # the latter while another process removes it
        return None
    except OSError:
        pass  # it cannot be opened below either, which says why
    if not template.folder.is_dir():
        return None
    folder_fd = stack.enter_context(opened_folder(template.folder, template.subject))
    with opened_file(folder_fd, MANIFEST, template.subject) as fd:
        made = _decode(os.pread(fd, _MANIFEST_MAX, 0), template)
    with contextlib.suppress(OSError):
        os.utime(template.folder)  # the time of last use, by which the oldest are removed
    return folder_fd, made


def _decode(data: bytes, template: Template) -> TemplateManifest:
    what = f"cannot use {template.subject.name}"
    try:
        made = msgspec.json.decode(data, type=prepared(TemplateManifest))
    except msgspec.MsgspecError as exc:
        raise ImageError(what, f"its {MANIFEST} is damaged", "Try again") from exc
    if (made.schema_version, made.key) != (SCHEMA, template.key):
        raise ImageError(what, f"its {MANIFEST} belongs to another saved VM", "Try again")
    if made != sealed(made):
        raise ImageError(what, f"its {MANIFEST} has changed", "Try again")
    return made


def sparse_sha256(fd: int, size: int) -> str:
    """Return the digest of a file's non-zero chunks and their offsets. Most of a VM's memory is a hole."""
    digest = hashlib.sha256(str(size).encode())
    offset = 0
    while offset < size:
        offset = next_data(fd, offset, size)[0] // CHUNK_BYTES * CHUNK_BYTES
        data = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        if not data:
            break
        if data != _ZEROS[: len(data)]:
            digest.update(f" {offset} {len(data)} ".encode())
            digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def ensure_template(
    template: Template, kind: MachineKind, progress: Callable[[str], None], *, kvm: bool, boot_s: float
) -> None:
    """Save a VM unless there is one. boot_s: timeout of its boot. Raises SandboxError."""

    def make(work: Path) -> TemplateManifest:
        if short := lack_of_space(kind.ram_bytes):
            raise HostError(_WHAT, short, "Free disk space")
        return make_template(template, kind, work, kvm=kvm, boot_s=boot_s)

    ensure(template, make, f"saving a VM for {template.title} with this image; later VMs start in 0.1 s", progress)


def ensure(
    template: Template,
    make: Callable[[Path], TemplateManifest],
    notice: str,
    progress: Callable[[str], None],
    *,
    wait: bool = True,
) -> None:
    """Make a template unless it exists. A lock ensures that only one process makes it. Raises SandboxError.

    make: makes its files in a folder. notice: what to tell the user before. wait: whether to wait for another process.
    """
    if template.folder.is_dir():
        return
    with contextlib.ExitStack() as stack:
        try:
            waits = partial(progress, "waiting for another process to save a VM") if wait else lambda: None
            most_s = 2 * settings.TEMPLATE_S + settings.PRELOAD_S if wait else 0.0
            stack.enter_context(file_lock(templates_dir() / ".lock", on_wait=waits, most_s=most_s))
        except TimeoutError as exc:  # the other process may be stopped, and must not block all others
            if not wait:
                raise HostError(_WHAT, "another process is saving one", "Try again later") from exc
            fix = ("Check for a stopped x07: ", Command("ps ax"))
            raise HostError(_WHAT, f"{exc} for the lock of all saved VMs", fix) from exc
        if not template.folder.is_dir():
            remove_template(template.folder)  # in case it is not a folder
            _make_alone(template, make, notice, progress)


def _make_alone(
    template: Template,
    make: Callable[[Path], TemplateManifest],
    notice: str,
    progress: Callable[[str], None],
) -> None:
    import shutil
    import tempfile

    folder = template.folder.parent
    for path in leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)
    most_bytes = _most_bytes()
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        work.chmod(FOLDER_MODE)  # the umask may have removed some of these bits
        progress(Notice(notice))
        made = sealed(make(work))
        path = work / MANIFEST
        path.write_bytes(msgspec.json.format(msgspec.json.encode(made)))
        path.chmod(FILE_MODE)
        work.rename(template.folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for remark in _remove_excess(template.key, made.image, most_bytes):
        progress(Remark(remark))


def _remove_excess(keep: str, image: str, most_bytes: int) -> list[str]:
    """Remove what can be removed after *keep*, a saved VM of an image, was added. Return what was removed."""
    images = {image.digest for image in list_images()} | {image}
    gone: dict[str, list[int]] = {}
    for old, why in expired_templates(keep=keep, images=images, most_bytes=most_bytes):
        size = _size_bytes(old)
        with contextlib.suppress(OSError):
            delete_unused(old)
            gone.setdefault(why, []).append(size)
    return [f"removed saved VMs ({len(sizes)}, with {sum(sizes) >> 20} MiB): {why}" for why, sizes in gone.items()]


def make_template(
    template: Template, kind: MachineKind, work: Path, *, kvm: bool, boot_s: float = settings.BOOT_S
) -> TemplateManifest:
    """Make the template in the folder *work*. Raises SandboxError."""
    with contextlib.ExitStack() as stack:
        files = {name: new_file(work / name, stack) for name in ("ram", "state")}
        scratch_fd = unnamed_file(work, _WHAT)
        stack.callback(os.close, scratch_fd)
        saving = Saving(ram_fd=files["ram"], state_fd=files["state"], scratch_fd=scratch_fd)
        for last in starts.boot_attempts():
            os.ftruncate(saving.ram_fd, 0)
            os.ftruncate(saving.ram_fd, kind.ram_bytes)
            if _booted_and_saved(kind, saving, kvm=kvm, last=last, boot_s=boot_s):
                break
        files["scratch.head"] = new_file(work / "scratch.head", stack)
        disk = keep_disk(scratch_fd, files["scratch.head"])
        ram, state, scratch = (seal(name, fd) for name, fd in files.items())
        key, image = template.key, kind.image_digest
        return TemplateManifest(
            schema_version=SCHEMA, key=key, image=image, ram=ram, state=state, scratch=scratch, scratch_disk=disk
        )


def keep_disk(disk_fd: int, scratch_fd: int) -> ScratchDisk:
    """Keep the content of a scratch disk in the file *scratch_fd*. Raises ImageError, OSError."""
    head, disk = read_disk(disk_fd)
    write_all(scratch_fd, head)
    return disk


def _booted_and_saved(kind: MachineKind, saving: Saving, *, kvm: bool, last: bool, boot_s: float) -> bool:
    """Boot and save one VM. Return False if another attempt may succeed. Raises SandboxError."""
    order, most_s = warm_message(kind), limit_s(kind) + boot_s - settings.BOOT_S
    with starts.own_vm(kind, "template", most_s, kvm=kvm, any_timer=last, memory=saving) as instance:
        say = {State.GREETED: order}
        if failure := Handshake(instance, State.WAITING).until(State.WARM, Deadline.after(most_s), say):
            if starts.miscalibrated(failure) and not last:
                return False
            starts.require_cpu_time(instance, _WHAT)
            error = TransientError if failure.transient else BackendError
            if code := _PRELOADING.get(failure.stage) if order.preload else None:
                raise error(_WHAT, failure.why, _FIX, code=code)
            raise error(_WHAT, failure.text, _FIX)
        _save(instance)
        if not instance.stop():
            raise TransientError(_WHAT, "the VM did not end", _FIX)
    return True


def limit_s(kind: MachineKind) -> float:
    """Return how long a guest may take to prepare itself, in seconds."""
    return settings.TEMPLATE_S + (settings.PRELOAD_S if warm_message(kind).preload else 0)


def renew(instance: Instance, kind: MachineKind) -> None:
    """Prepare an instance for one user program after it has run x07's own programs. Raises BackendError."""
    say = {State.CLOSED: warm_message(kind)._replace(commands=[])}
    if failure := Handshake(instance, State.CLOSED).until(State.WARM, Deadline.after(limit_s(kind)), say):
        raise BackendError("cannot prepare a VM for the pool", failure.text, "Run x07 doctor")
    instance.start_mode = "pool"  # from now on its agent waits in the same state as a clone's


def new_file(path: Path, stack: contextlib.ExitStack) -> int:
    """Create a file and return its descriptor, which *stack* closes."""
    fd = open_private_file(path, os.O_RDWR | os.O_EXCL)
    stack.callback(os.close, fd)
    return fd


def seal(name: str, fd: int) -> Part:
    """Make a file of the template read-only and owned by this user again. While saving, the VM's uid owned it."""
    os.fchown(fd, os.geteuid(), os.getegid())
    os.fchmod(fd, FILE_MODE)
    size = os.fstat(fd).st_size
    return Part(file=name, bytes=size, sha256=sparse_sha256(fd, size))


def _save(instance: QemuInstance) -> None:
    """Make QEMU write the device state. The memory is in its file already. Raises TransientError."""
    instance.send_qmp(qmp_save(instance.paths.state))
    await_qmp(instance, _SAVED, QMP_QUERY_SAVE)


def await_qmp(instance: QemuInstance, wanted: str, ask: bytes = b"") -> None:
    """Wait until QEMU says *wanted*. ask: commands to send again and again. Raises TransientError."""
    deadline = Deadline.after(settings.TEMPLATE_S)
    poll = input_poll(instance.pidfd, *instance.side_fds())
    while wanted not in instance.qmp.text():
        if deadline.passed() or instance.exit_status() is not None or _NOT_SAVED in instance.qmp.text():
            said = instance.qmp.text()[-300:] + instance.console_tail()[-200:]
            raise TransientError(_WHAT, f"QEMU did not save it: {said}", _FIX)
        instance.send_qmp(ask)
        for fd, _ in poll.poll(_ASK_AGAIN_MS):
            if fd != instance.pidfd:
                instance.drain(fd)


def expired_templates(*, keep: str, images: set[str], most_bytes: int) -> list[tuple[Path, str]]:
    """Return the templates that can be removed, each with the reason. None of them is in use.

    These are the templates whose image is gone, those that were not used for long, and the least recently used ones if
    all take more than *most_bytes*. keep: the key of a template that stays in any case. images: digests of the existing
    images.
    """
    found: list[tuple[float, int, Path]] = []
    doomed = []
    unused_since = unix_ms() / 1000 - settings.RETENTION_S
    for folder, made in saved_templates():
        if folder.name == keep or is_locked(folder):
            most_bytes -= _size_bytes(folder)
        elif made is None:
            doomed.append((folder, "the manifest is damaged"))
        elif made.image not in images:
            doomed.append((folder, "the image is gone"))
        elif made.period not in {"", current_period()}:
            doomed.append((folder, "used as long as allowed"))
        elif folder.stat().st_mtime < unused_since:
            doomed.append((folder, "not used for 7 days"))
        elif isinstance(made, SnapshotManifest) and made.note.paused:
            most_bytes -= _size_bytes(folder)  # it has what a sandbox has done
        else:
            found.append((folder.stat().st_mtime, _size_bytes(folder), folder))
    oldest = least_recently_used(found, most_bytes)
    why = "all take more space than [disk] saved_vms_mib allows, and others were used more recently"
    return doomed + [(folder, why) for folder in oldest]


def saved_templates() -> list[tuple[Path, TemplateManifest | SnapshotManifest | None]]:
    """Return all templates and kept snapshots with their manifests; None for a damaged manifest."""
    found: list[tuple[Path, TemplateManifest | SnapshotManifest | None]] = []
    for folder in templates_dir().glob("[0-9a-f]" * 64):
        made: TemplateManifest | SnapshotManifest | None = None
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            if os.path.lexists(folder / SNAPSHOT):
                made = msgspec.json.decode((folder / SNAPSHOT).read_bytes(), type=prepared(SnapshotManifest))
            else:
                made = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=prepared(TemplateManifest))
        found.append((folder, made))
    return found


def kept_snapshots() -> list[Kept]:
    """Return the kept snapshots, oldest first. Raises HostError."""
    saved = saved_templates() if os.path.lexists(cache_dir() / "templates") else []
    found = [
        Kept(made.note, folder, made.image, _size_bytes(folder))
        for folder, made in saved
        if isinstance(made, SnapshotManifest)
    ]
    return sorted(found, key=lambda one: one.note.created_unix_ms)


def keep_snapshot(folder: Path, note: Note, kind: MachineKind) -> list[str]:
    """Keep a snapshot, instead of those with its name. Return remarks about what was removed. Raises SandboxError."""
    with raised_as(HostError, "cannot keep the snapshot", "Free disk space"):
        made = SnapshotManifest(image=kind.image_digest, note=note)
        (folder / SNAPSHOT).write_bytes(msgspec.json.format(msgspec.json.encode(made)))
        (folder / SNAPSHOT).chmod(FILE_MODE)
        key = note.id.ljust(_KEY_DIGITS, "0")
        folder.rename(folder.parent / key)
    for one in kept_snapshots():
        if note.name and one.note.name == note.name and one.note.id != note.id:
            remove_template(one.folder)
    return _remove_excess(key, made.image, _most_bytes())


def _size_bytes(folder: Path) -> int:
    """Return what a template takes on the disk. stat(2) counts blocks of 512 bytes."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # another process is removing it
            total += path.lstat().st_blocks * 512
    return total


def saved_bytes() -> dict[str, int]:
    """Return what templates take on the disk, by the digest of their image. Raises HostError."""
    sizes: dict[str, int] = {}
    for folder, made in saved_templates() if os.path.lexists(cache_dir() / "templates") else ():
        if made is not None:
            sizes[made.image] = sizes.get(made.image, 0) + _size_bytes(folder)
    return sizes


def remove_template(folder: Path) -> None:
    """Remove a template if possible. Running clones keep the files that they have open."""
    with contextlib.suppress(OSError):
        delete_template(folder)


def delete_template(folder: Path) -> None:
    """Remove a template, atomically for processes that use it. Raises OSError."""
    import shutil
    import tempfile

    if not os.path.lexists(folder):
        return
    doomed = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        folder.rename(doomed / "old")
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def delete_unused(folder: Path) -> None:
    """Remove a template unless a VM uses it. Raises OSError."""
    with lock_for_removal(folder) as free:
        if not free:
            raise BlockingIOError(0, "a VM uses it")
        delete_template(folder)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make an empty folder, which is removed at the end of the context. Raises HostError."""
    import shutil
    import tempfile

    with raised_as(HostError, "cannot store a snapshot", "Free disk space"):
        for left in _left_by_snapshots(templates_dir()):
            shutil.rmtree(left, ignore_errors=True)
        place = Path(tempfile.mkdtemp(prefix=".fork-", dir=templates_dir()))
        lock = lock_shared(place)  # else another process takes it for one that a killed process has left
    try:
        yield place
    finally:
        close_on_fork.close(lock)
        shutil.rmtree(place, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Return the folders that killed processes left in *folder*, the templates folder. The caller holds its lock."""
    return [*folder.glob(".new-*"), *folder.glob(".old-*"), *_left_by_snapshots(folder)]


def _left_by_snapshots(folder: Path) -> list[Path]:
    """Return the folders of `temporary_folder` that killed processes left. A new one may not be locked yet."""
    found, since = [], unix_ms() / 1000 - _UNLOCKED_S
    for path in folder.glob(".fork-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_mtime < since and not is_locked(path):
                found.append(path)
    return found


def prunable(images: set[str], on_wait: Callable[[], None]) -> Iterator[Prunable]:
    """Lock the templates, and yield files that can be removed if only *images* (digests) stay. Raises SandboxError."""
    import shutil

    if not os.path.lexists(cache_dir() / "templates"):
        return
    folder = templates_dir()
    with file_lock(folder / ".lock", on_wait=on_wait):
        for left in leftovers(folder):
            if not why_not_ours(left.lstat(), stat.S_ISDIR):
                yield Prunable("leftover", left, "a killed process left it", shutil.rmtree)
        for path, why in expired_templates(keep="", images=images, most_bytes=_most_bytes()):
            yield Prunable("template", path, why, delete_unused)
