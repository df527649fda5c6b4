"""The first stage of an image, its base: root file system, kernel and modules, from the host's package sources.

Making a base takes half a minute and needs the network. So images with the same recipe, architecture, suite and
packages share a cached base. The X07 toolchain and Python packages are appended to a copy of a base. The second stage
(boot.py) adds x07's own code.

The root file system consists of Debian packages. mmdebstrap runs our hooks on the tree. Bump RECIPE when a change here
or in boot.py changes the contents of a base.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from x07_sandbox.errors import UsageError
from x07_sandbox.host.arch import Arch
from x07_sandbox.host.documents import prepared
from x07_sandbox.images import boot, commands, sources, store, verify
from x07_sandbox.policy.decode import canonical_json

BASE_SCHEMA = "x07.sandbox.image-base@0.1.0"
NEEDED_BYTES = 2 * 1024**3  # the tree, its tar file and the packages
TREE = "tree"
TAR_FILE = "root.tar"
RECIPE = 5
PIP_LAYOUT = 2  # bump when a change in pip.py changes the contents of an image with Python packages
PACKAGES = ("ca-certificates", "g++", "gcc", "iproute2", "libc6-dev", "libseccomp2", "make", "nftables", "python3")
JOB_ID = 65532  # uid and gid of the program; guest/confine uses the same
EROFS_UUID = "00000000-0000-4000-8000-000000000006"
# Compared to lz4, lz4hc takes 3 s more and saves 20 of 149 MB; level 9 takes another 4 s for 2 MB.
EROFS_OPTIONS = ("-zlz4hc,level=4", "-C65536")
UNWANTED = ("man", "doc", "locale", "info", "lintian", "bug", "doc-base", "pixmaps")

# UNWANTED excludes the folders of manual pages too, without which update-alternatives fails.
MAN_FOLDERS = """
for number in 1 2 3 4 5 6 7 8 9; do mkdir -p "$1/usr/share/man/man$number"; done
"""
# Hooks get the tree as $1 and run with `set -eu`.
ACCOUNTS = f"""
printf 'x07:x:{JOB_ID}:{JOB_ID}:x07:/opt/x07:/bin/sh\\n' >> "$1/etc/passwd"
printf 'x07:x:{JOB_ID}:\\n' >> "$1/etc/group"
mkdir -p "$1/x07" "$1/opt/x07"
chmod 0755 "$1/x07" "$1/opt/x07"
"""
# Debian's byte code is checked against source times, which are all one date in an image: Python would compile it again
# at every start.
BYTE_CODE = """
chroot "$1" sh -c 'cd /usr/lib; exec python3 -m compileall -q -f -j2 --invalidation-mode unchecked-hash $PWD/python3*'
find "$1/usr/lib" -name '*.opt-*.pyc' -delete
"""
KERNEL = """
mkdir "$1/x07-kernel"
cd "$1/x07-kernel"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
package=$(apt-cache depends --important {meta} | sed -n 's/^ *Depends: \\(linux-image-[0-9][^ ]*\\)$/\\1/p' | head -n 1)
test -n "$package" || {{ echo 'no kernel package found below {meta}' >&2; exit 1; }}
apt-get -q -o APT::Sandbox::User=root download "$package"
mv -- *.deb kernel.deb
"""
# For programs that are root in the VM (--guest-root). Debian's own servers, whatever the host uses.
APT = """
if [ -x "$1/usr/bin/apt-get" ]; then
mkdir -p "$1/etc/apt/apt.conf.d" "$1/etc/apt/preferences.d" "$1/etc/apt/sources.list.d" "$1/etc/apt/trusted.gpg.d"
mkdir -p "$1/var/lib/apt/lists/partial" "$1/var/cache/apt/archives/partial"
cat > "$1/etc/apt/sources.list.d/debian.sources" <<END
Types: deb
URIs: http://deb.debian.org/debian
Suites: {suite} {suite}-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: {suite}-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
fi
"""
# Remove traces of the host and the build: names of mirrors, resolvers and this machine; times; logs. The root is
# read-only, so /var/tmp leads to the program's own /tmp.
CLEAN = """
rm -rf "$1/var/tmp"
ln -s ../tmp "$1/var/tmp"
rm -rf "$1/x07-kernel" "$1/etc/apt" "$1/var/log" "$1/var/cache" "$1/var/lib/apt"
rm -f "$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$1/usr/bin/"*lto-dump* "$1/usr/libexec/gcc/"*/*/lto1
rm -f "$1/usr/lib/{multiarch}/"lib?san.so* "$1/usr/lib/{multiarch}/"libhwasan.so*
rm -f "$1/var/lib/dpkg/"*-old "$1/etc/"*- "$1/etc/resolv.conf" "$1/var/lib/dbus/machine-id" "$1/etc/.pwd.lock"
rm -rf "$1/usr/share/man/"*
mkdir -m 0755 "$1/var/log" "$1/var/cache"
: > "$1/etc/resolv.conf"
: > "$1/etc/machine-id"
echo x07 > "$1/etc/hostname"
printf '127.0.0.1 localhost\\n::1 localhost\\n' > "$1/etc/hosts"
"""
MODULE_NAME_MAX = 200
SCRATCH_UUID = "00000000-0000-4000-8000-000000000007"
HASH_SEED = "00000000-0000-4000-8000-000000000008"
# Listed explicitly, so that defaults do not matter. Without flex_bg, an unused block group has no non-zero block.
FEATURES = (
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,huge_file,large_file,metadata_csum,"
    "sparse_super2,64bit"
)
EXTENDED = (
    f"num_backup_sb=0,lazy_itable_init=1,assume_storage_prezeroed=1,nodiscard,hash_seed={HASH_SEED},root_owner=0:0"
)


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The content of base.json, which describes a base."""

    schema_version: str
    kernel_release: str
    kernel: store.Part
    root: store.Part
    scratch: store.Part
    scratch_disk: store.ScratchDisk
    boot: list[store.Part]  # files of kernel modules in loading order
    net: list[store.Part]  # likewise, for jobs with a network policy
    packages: list[store.Package]
    x07: str = ""  # digest of the X07 toolchain; empty without it

    def parts(self) -> list[store.Part]:
        """Return all files of the base."""
        return [self.kernel, self.root, self.scratch, *self.boot, *self.net]

    def modules(self, folder: Path) -> dict[str, Path]:
        """Return the kernel modules in *folder*, by name in the initramfs."""
        boot_files = {part.file: folder / part.file for part in self.boot}
        return boot_files | {f"net/{part.file.removeprefix('net-')}": folder / part.file for part in self.net}

    @property
    def digest(self) -> str:
        """The digest of the base, which image manifests contain."""
        return hashlib.sha256(canonical_json(msgspec.to_builtins(self))).hexdigest()


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The architecture of an image, and what it contains beside x07's own code."""

    arch: Arch
    include: tuple[str, ...] = ()  # Debian packages
    preload: tuple[str, ...] = ()  # Python modules
    x07: str = ""  # digest of the X07 toolchain
    pip: tuple[store.Wheel, ...] = ()  # Python packages from wheels
    program: store.ProgramRoot | None = None  # of an imported image
    program_file: Path | None = None  # its root file system

    @property
    def suite(self) -> str:
        """The Debian release of the host, whose packages are used."""
        return sources.release_codename()

    @property
    def base_key(self) -> str:
        """A hash of what determines the content of the base, for the name of its folder."""
        words = [RECIPE, self.arch.deb, self.suite, list(self.include)]
        words += [self.x07] if self.x07 else []
        words += [{"pip": sorted(wheel.sha256 for wheel in self.pip), "layout": PIP_LAYOUT}] if self.pip else []
        return hashlib.sha256(canonical_json(words)).hexdigest()[:32]


def read_base(folder: Path) -> Base | None:
    """Return the base in *folder*, or None if base.json or a file of the base is missing, truncated or invalid."""
    try:
        with (folder / "base.json").open("rb") as file:
            base = msgspec.json.decode(file.read(store.MAX_BYTES), type=prepared(Base))
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


def make_base(work: Path, contents: Contents, progress: Callable[[str], None]) -> Path:
    """Make a base from Debian packages in a folder below *work*, and return that folder. Raises SandboxError."""
    for name in ("mmdebstrap", "mkfs.erofs", "mke2fs", "dpkg-deb", "zstd", "apt-config", "bwrap"):
        commands.tool(name)
    file = sources.write_sources(work, contents.suite, contents.arch.deb, progress)
    sources.check_known(file, contents.include, contents.suite)
    progress(f"fetching and unpacking {contents.suite} packages")
    _mmdebstrap(work, contents, progress)
    progress("extracting the kernel")
    argv = [commands.tool("dpkg-deb"), "--extract", str(work / "kernel.deb"), str(work / "kernel")]
    commands.run(argv, cwd=work, timeout_s=120)
    parts = boot.read_package(work / "kernel", _unzstd)
    progress("making the root file system")
    folder = work / "base"
    folder.mkdir(mode=0o700)
    make_root(work, folder / "root.erofs", work / TAR_FILE)
    (work / TAR_FILE).unlink()
    head, disk = make_scratch(work)
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
    make_root(work, root, tar, "--incremental=data")
    tar.unlink()
    _put_record(made, msgspec.structs.replace(base, root=part_of(made, base.root.file), x07=x07 or base.x07))
    return made


def make_root(work: Path, target: Path, tar: Path, *options: str) -> None:
    """Make a root file system, the file *target*, of an archive. options: of mkfs.erofs. Raises SandboxError."""
    argv = [commands.tool("mkfs.erofs"), "--quiet", *EROFS_OPTIONS, f"-T{commands.EPOCH}", *options]
    commands.run([*argv, "-U", EROFS_UUID, "--tar=f", str(target), str(tar)], cwd=work, timeout_s=600)


def _put_record(folder: Path, base: Base) -> None:
    put(folder, "base.json", msgspec.json.format(msgspec.json.encode(base), indent=2))


def _mmdebstrap(work: Path, contents: Contents, progress: Callable[[str], None]) -> None:
    settings = sources.fetch_settings(commands.capture([commands.tool("apt-config"), "dump"]).decode(errors="replace"))
    # Credentials of private mirrors: apt reads them on the host, and they never enter the tree.
    for option, path in (("netrc", "/etc/apt/auth.conf"), ("netrcparts", "/etc/apt/auth.conf.d")):
        if os.access(path, os.R_OK):
            settings.append(f'Dir::Etc::{option} "{path}";')
    tree = work / TREE
    tree.mkdir(mode=0o700)
    commands.check_space(work, NEEDED_BYTES)
    commands.require_namespaces()
    argv = [*commands.own_namespaces(), commands.tool("mmdebstrap"), "--mode=root", "--format=tar"]
    argv += mmdebstrap_options(
        contents.arch, contents.suite, contents.include, str(work / "kernel.deb"), str(work / "dpkg-status")
    )
    argv += [f"--aptopt={setting}" for setting in settings]
    with (work / TAR_FILE).open("wb") as tar:
        # mmdebstrap's processes inherit the lock; `remove_work` waits for it.
        fcntl.flock(tar, fcntl.LOCK_EX)
        commands.run(
            [*argv, contents.suite, "-", str(work / "build.sources")],
            cwd=tree,
            timeout_s=1800 * commands.slower(contents.arch),
            extra_env={"TMPDIR": str(tree)},
            stdout_fd=tar.fileno(),
            on_line=lambda line: progress(line[3:]) if line.startswith("I: ") else None,
        )


def _unzstd(data: bytes) -> bytes:
    return commands.capture([commands.tool("zstd"), "-dcq"], data=data, max_bytes=boot.MAX_KERNEL_BYTES)


def _packages(work: Path) -> list[store.Package]:
    packages = [
        store.Package(name=stanza["Package"], version=stanza["Version"], arch=stanza["Architecture"])
        for stanza in sources.parse_deb822((work / "dpkg-status").read_text(errors="replace"))
        if stanza.get("Status", "").endswith(" installed")
    ]
    fields = "--showformat=${Package} ${Version} ${Architecture}"
    shown = commands.capture([commands.tool("dpkg-deb"), "--show", fields, str(work / "kernel.deb")])
    name, version, arch = shown.decode().split()
    packages.append(store.Package(name=name, version=version, arch=arch))
    return sorted(packages, key=lambda package: (package.name, package.arch))


def make_scratch(folder: Path) -> tuple[bytes, store.ScratchDisk]:
    """Make an empty scratch disk in *folder*. Return its non-zero blocks and their offsets. Raises ImageError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="scratch-") as disk:
        disk.truncate(verify.DISK_BYTES)
        argv = [commands.tool("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(verify.BLOCK), "-I", "256", "-i", "16384"]
        argv += ["-m", "0", "-U", SCRATCH_UUID, "-O", FEATURES, "-E", EXTENDED, disk.name]
        env = {"E2FSPROGS_FAKE_TIME": str(commands.EPOCH), "MKE2FS_CONFIG": os.devnull}
        commands.run(argv, cwd=folder, timeout_s=60, extra_env=env)
        return verify.read_disk(disk.fileno())


def put(folder: Path, name: str, data: bytes) -> store.Part:
    """Write a new read-only file of an image, sync it, and return its name, digest and size."""
    with (folder / name).open("xb") as file:
        file.write(data)
    return part_of(folder, name)


def part_of(folder: Path, name: str) -> store.Part:
    """Make a finished file of an image read-only, sync it, and return its name, digest and size."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fchmod(file.fileno(), stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return store.Part(file=name, sha256=digest, bytes=size)


def check_packages(include: Sequence[str]) -> tuple[str, ...]:
    """Return *include* sorted, without duplicates and default packages. Raises UsageError for an invalid name."""
    for name in include:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]{1,127}", name):
            why, fix = "it is not a valid Debian package name", "Separate package names with commas"
            raise UsageError(f"cannot add {name!r} to an image", why, fix)
    return tuple(sorted(set(include) - set(PACKAGES)))


def check_modules(preload: Sequence[str]) -> tuple[str, ...]:
    """Return *preload* sorted, without duplicates. Raises UsageError for an invalid name."""
    for name in preload:
        if len(name) > MODULE_NAME_MAX or not all(part.isidentifier() and part.isascii() for part in name.split(".")):
            why, fix = "it is not a valid Python module name", "Use module names that Python's import statement accepts"
            raise UsageError(f"cannot preload {name!r}", why, fix)
    return tuple(sorted(set(preload)))


def mmdebstrap_options(arch: Arch, suite: str, include: Sequence[str], kernel_deb: str, dpkg_status: str) -> list[str]:
    """Return mmdebstrap's options. kernel_deb, dpkg_status: paths on the host for the kernel package and dpkg's status.

    The hook CLEAN removes apt's folders. mmdebstrap's own clean-up would create them again. /sys is skipped, since an
    ordinary user cannot mount it.
    """
    options = ["--variant=essential", "--skip=cleanup/apt,chroot/mount/sys", f"--architectures={arch.deb}"]
    options += [f"--include={','.join([*PACKAGES, *include])}"]
    options += ['--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"']
    options.append("--dpkgopt=force-unsafe-io")  # after a crash, the tree is discarded
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED]
    hooks = [
        _script(KERNEL.format(meta=arch.kernel_package)),
        f"download /x07-kernel/kernel.deb {shlex.quote(kernel_deb)}",
        f"download /var/lib/dpkg/status {shlex.quote(dpkg_status)}",
        _script(ACCOUNTS),
        _script(BYTE_CODE),
        _script(CLEAN.format(multiarch=arch.multiarch)),
        _script(APT.format(suite=suite)),
    ]
    options.append(f"--setup-hook={_script(MAN_FOLDERS)}")
    return options + [f"--customize-hook={hook}" for hook in hooks]


def _script(text: str) -> str:
    return "set -eu\n" + text.strip()
