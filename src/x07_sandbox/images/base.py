"""The first stage of an image, its base: root file system, kernel and modules, from the host's package sources.

Making a base takes half a minute and needs the network. So images with the same recipe, architecture, suite and
packages share a cached base. The X07 toolchain and Python packages are appended to a copy of a base. The second stage
(boot.py) adds x07's own code.
"""

import contextlib
import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.arch import Arch
from x07_sandbox.host.decoding import prepared
from x07_sandbox.host.linux import mounts
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import cache_dir
from x07_sandbox.images import commands, foreign, kernel, manifest, recipe, scratch, sources, verify
from x07_sandbox.policy.default import canonical_json

BASE_SCHEMA = "x07.sandbox.image-base@0.1.0"
NEEDED_BYTES = 2 * 1024**3  # the tree, its tar file and the packages
TREE = "tree"
TAR_FILE = "root.tar"


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The content of base.json, which describes a base."""

    schema_version: str
    kernel_release: str
    kernel: manifest.Part
    root: manifest.Part
    scratch: manifest.Part
    scratch_disk: manifest.ScratchDisk
    boot: list[manifest.Part]  # files of kernel modules in loading order
    net: list[manifest.Part]  # likewise, for jobs with a network policy
    packages: list[manifest.Package]
    x07: str = ""  # digest of the X07 toolchain; empty without it

    def parts(self) -> list[manifest.Part]:
        """Return all files of the base."""
        return [self.kernel, self.root, self.scratch, *self.boot, *self.net]

    @property
    def digest(self) -> str:
        """The digest of the base, which image manifests contain."""
        return hashlib.sha256(canonical_json(msgspec.to_builtins(self))).hexdigest()


class BaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs that determine the content of a base."""

    arch: Arch
    suite: str
    include: tuple[str, ...]
    x07: str = ""  # digest of the X07 toolchain; empty without it
    pip: tuple[str, ...] = ()  # digests of wheels

    @property
    def key(self) -> str:
        """A hash of the inputs, for the name of the base's folder."""
        words = [recipe.RECIPE, self.arch.deb, self.suite, list(self.include)]
        words += [self.x07] if self.x07 else []
        words += [{"pip": sorted(self.pip), "layout": recipe.PIP_LAYOUT}] if self.pip else []
        return hashlib.sha256(canonical_json(words)).hexdigest()[:32]


def read_base(folder: Path) -> Base | None:
    """Return the base in *folder*, or None if base.json or a file of the base is missing, truncated or invalid."""
    try:
        with (folder / "base.json").open("rb") as file:
            base = msgspec.json.decode(file.read(manifest.MAX_BYTES), type=prepared(Base))
        whole = all((folder / part.file).lstat().st_size == part.bytes for part in base.parts())
    except (OSError, msgspec.MsgspecError):
        return None
    return base if whole and base.schema_version == BASE_SCHEMA else None


def check_base(folder: Path, base: Base) -> None:
    """Verify all files of *base*. Hash only files that changed since the last verification. Raises ImageError."""
    fix = "Run x07 image build, which downloads it again"
    subject = verify.Subject("the cached base of guest images", folder.name, verify.sha256_of, fix)
    with contextlib.ExitStack() as stack:
        folder_fd = stack.enter_context(verify.opened_folder(folder, subject))
        verify.opened_parts(folder_fd, base.parts(), subject, stack)


def make_base(work: Path, spec: BaseSpec, progress: Callable[[str], None]) -> Path:
    """Make a base from Debian packages in a folder below *work*, and return that folder. Raises SandboxError."""
    for name in ("mmdebstrap", "mkfs.erofs", "mke2fs", "dpkg-deb", "zstd", "apt-config", "bwrap"):
        commands.tool(name)
    file = sources.write_sources(work, spec.suite, spec.arch.deb, progress)
    sources.check_known(file, spec.include, spec.suite)
    progress(f"fetching and unpacking {spec.suite} packages")
    _mmdebstrap(work, spec, progress)
    progress("extracting the kernel")
    argv = [commands.tool("dpkg-deb"), "--extract", str(work / "kernel.deb"), str(work / "kernel")]
    commands.run(argv, cwd=work, timeout_s=120)
    parts = kernel.read_package(work / "kernel", _unzstd)
    progress("making the root file system")
    folder = work / "base"
    folder.mkdir(mode=0o700)
    _mkfs(work, folder / "root.erofs", work / TAR_FILE)
    (work / TAR_FILE).unlink()
    head, disk = scratch.make_head(work)
    base = Base(
        schema_version=BASE_SCHEMA,
        kernel_release=parts.release,
        kernel=put(folder, "vmlinux", parts.vmlinux),
        root=part_of(folder, "root.erofs"),
        scratch=put(folder, "scratch.head", head),
        scratch_disk=disk,
        boot=[put(folder, f"{number:02}-{name}.ko".lower(), data) for number, (name, data) in enumerate(parts.boot)],
        net=[put(folder, f"net-{number:02}-{name}.ko".lower(), data) for number, (name, data) in enumerate(parts.net)],
        packages=_packages(work),
    )
    _put_record(folder, base)
    return folder


def add_layer(work: Path, folder: Path, base: Base, tar: Path, *, x07: str = "") -> Path:
    """Append the files of *tar* to the root of a copy of *base*, and return the copy's folder. Raises SandboxError.

    *tar* is removed. folder: the folder of *base*. x07: digest of the X07 toolchain if *tar* contains it.
    """
    made = Path(tempfile.mkdtemp(prefix="base-", dir=work))
    for part in base.parts():
        if part != base.root:
            os.link(folder / part.file, made / part.file)
    root = made / base.root.file
    shutil.copyfile(folder / base.root.file, root)
    _mkfs(work, root, tar, "--incremental=data")
    tar.unlink()
    _put_record(made, msgspec.structs.replace(base, root=part_of(made, base.root.file), x07=x07 or base.x07))
    return made


def unpack_root(work: Path, image: Path) -> Path:
    """Unpack a root file system, the file *image*, to a folder in *work*; return that folder. Raises SandboxError."""
    root = work / "unpacked"
    argv = [commands.tool("fsck.erofs"), f"--extract={root}", "--no-preserve", str(image)]
    commands.run(argv, cwd=work, timeout_s=300)
    return root


def make_root(work: Path, target: Path, tar: Path) -> None:
    """Make a root file system, the file *target*, of an archive. Raises SandboxError."""
    _mkfs(work, target, tar)


def _mkfs(work: Path, target: Path, tar: Path, *options: str) -> None:
    argv = [commands.tool("mkfs.erofs"), "--quiet", *recipe.EROFS_OPTIONS, f"-T{commands.EPOCH}", *options]
    commands.run([*argv, "-U", recipe.EROFS_UUID, "--tar=f", str(target), str(tar)], cwd=work, timeout_s=600)


def _put_record(folder: Path, base: Base) -> None:
    put(folder, "base.json", msgspec.json.format(msgspec.json.encode(base), indent=2))


def _mmdebstrap(work: Path, spec: BaseSpec, progress: Callable[[str], None]) -> None:
    settings = sources.fetch_settings(commands.capture([commands.tool("apt-config"), "dump"]).decode(errors="replace"))
    # Credentials of private mirrors: apt reads them on the host, and they never enter the tree.
    for option, path in (("netrc", "/etc/apt/auth.conf"), ("netrcparts", "/etc/apt/auth.conf.d")):
        if os.access(path, os.R_OK):
            settings.append(f'Dir::Etc::{option} "{path}";')
    tree = work / TREE
    tree.mkdir(mode=0o700)
    check_space(work, NEEDED_BYTES)
    require_namespaces()
    argv = [*own_namespaces(), commands.tool("mmdebstrap"), "--mode=root", "--format=tar"]
    argv += recipe.mmdebstrap_options(
        spec.arch, spec.suite, spec.include, str(work / "kernel.deb"), str(work / "dpkg-status")
    )
    argv += [f"--aptopt={setting}" for setting in settings]
    with (work / TAR_FILE).open("wb") as tar:
        # mmdebstrap's processes inherit the lock; `remove_work` waits for it.
        fcntl.flock(tar, fcntl.LOCK_EX)
        commands.run(
            [*argv, spec.suite, "-", str(work / "build.sources")],
            cwd=tree,
            timeout_s=1800 * foreign.slower(spec.arch),
            extra_env={"TMPDIR": str(tree)},
            stdout_fd=tar.fileno(),
            on_line=lambda line: progress(line[3:]) if line.startswith("I: ") else None,
        )


def own_namespaces() -> list[str]:
    """Return a command prefix that runs a command as root in namespaces of its own.

    All processes of the command end with the command. mmdebstrap's own isolation leaves things behind: in mode "root",
    mounts that the whole host sees; in mode "unshare", workers that outlive mmdebstrap and wait forever. So every user
    runs mmdebstrap in mode "root" behind this prefix.
    """
    argv = [commands.tool("unshare"), "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        commands.tool("newuidmap")
        _check_sub_uids()
        argv += ["--user", "--map-root-user", "--map-auto"]
    return [*argv, "--"]


def require_namespaces() -> None:
    """Raise HostError unless this user may create the namespaces in which an image is built."""
    try:
        commands.capture([*own_namespaces(), "/bin/true"])
    except ImageError as exc:
        why = f"namespaces are forbidden here ({' '.join(exc.why.split())})"
        fix = "In a container, start it with --privileged. Or run x07 image build on a host that allows namespaces, and"
        fix += f" copy ~/.cache/x07-sandbox/images from there to {cache_dir() / 'images'}"
        raise HostError("cannot build the guest image", why, fix) from exc


def _check_sub_uids() -> None:
    """Raise HostError unless this user has subordinate uids and gids (subuid(5))."""
    uid, what = os.geteuid(), "cannot build the guest image"
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        why = f"uid {uid} has no passwd entry, and so no subordinate uids"
        raise HostError(what, why, "Build it as a user with a passwd entry, or as root") from None
    for path in ("/etc/subuid", "/etc/subgid"):
        try:
            owners = {line.partition(":")[0] for line in Path(path).read_text(encoding="utf-8").splitlines()}
        except OSError:
            owners = set()
        if not owners & {name, str(uid)}:
            fix = f"As root, run usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
            raise HostError(what, f"{path} has no range for {name}", fix)


def remove_work(work: Path, progress: Callable[[str], None]) -> None:
    """Remove the folder of a finished or killed build, once all processes of that build have ended."""
    with file_lock(work / TAR_FILE, on_wait=lambda: progress("waiting for the processes of a killed build")):
        tree = work / TREE
        if tree.exists() and os.geteuid() != 0:
            # It belongs to subordinate uids.
            argv = [*own_namespaces(), commands.tool("rm"), "-rf", "--one-file-system", str(tree)]
            commands.run(argv, cwd=work, timeout_s=120)
        remove_tree(work)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything below it. Raises ImageError if anything is mounted there."""
    below = os.fsencode(f"{folder}/")
    if any(mounted.place.startswith(below) for mounted in mounts()):
        why, fix = "a file system is mounted below it", "Unmount it (see findmnt), then try again"
        raise ImageError(f"cannot remove {folder}", why, fix)
    shutil.rmtree(folder)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise HostError if *folder* has too little free space."""
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    if free < needed_bytes:
        why = f"{folder.parent} has {free // 1024**2} MiB free, but a build needs {needed_bytes // 1024**2}"
        fix = "Free some space, or set X07_VM_CACHE_DIR to a folder on a larger disk"
        raise HostError("cannot build the guest image", why, fix)


def _unzstd(data: bytes) -> bytes:
    return commands.capture([commands.tool("zstd"), "-dcq"], data=data, max_bytes=kernel.MAX_KERNEL_BYTES)


def _packages(work: Path) -> list[manifest.Package]:
    packages = [
        manifest.Package(name=stanza["Package"], version=stanza["Version"], arch=stanza["Architecture"])
        for stanza in sources.parse_deb822((work / "dpkg-status").read_text(errors="replace"))
        if stanza.get("Status", "").endswith(" installed")
    ]
    fields = "--showformat=${Package} ${Version} ${Architecture}"
    shown = commands.capture([commands.tool("dpkg-deb"), "--show", fields, str(work / "kernel.deb")])
    name, version, arch = shown.decode().split()
    packages.append(manifest.Package(name=name, version=version, arch=arch))
    return sorted(packages, key=lambda package: (package.name, package.arch))


def put(folder: Path, name: str, data: bytes) -> manifest.Part:
    """Write a new read-only file of an image, sync it, and return its name, digest and size."""
    with (folder / name).open("xb") as file:
        file.write(data)
    return part_of(folder, name)


def part_of(folder: Path, name: str) -> manifest.Part:
    """Make a finished file of an image read-only, sync it, and return its name, digest and size."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fchmod(file.fileno(), stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return manifest.Part(file=name, sha256=digest, bytes=size)
