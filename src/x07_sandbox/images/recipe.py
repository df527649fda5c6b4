"""The contents of the root file system: packages, and the hooks that mmdebstrap runs on the tree.

Bump RECIPE when a change here, in base.py, scratch.py or kernel.py changes the contents of an image.
"""

import re
import shlex
from collections.abc import Sequence

from x07_sandbox.errors import UsageError
from x07_sandbox.host.arch import Arch

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
