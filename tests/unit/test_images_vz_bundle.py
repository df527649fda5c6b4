"""Guest bundles of the vz backend, and the scripts that make them and the helper."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

from tests.conftest import overwrite
from tests.unit.test_images_verify import store_image
from x07_sandbox.channel.messages import PROTOCOL
from x07_sandbox.errors import ImageError
from x07_sandbox.images import store, vz_bundle
from x07_sandbox.images.store import read_guest_code

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., store.Image]

SCRIPTS: Final = Path(__file__).resolve().parents[2] / "scripts"
RELEASE: Final = "6.12.1-cloud"


def bzimage(release: str = RELEASE) -> bytes:
    """The head of a bzImage of this release."""
    text = release.encode() + b" (builder) #1\0"
    return bytes(0x202) + b"HdrS" + bytes(8) + (0x100).to_bytes(2, "little") + bytes(0xF0) + text


def raw_image(release: str = RELEASE) -> bytes:
    """An arm64 Image of this release."""
    return b"MZ" + bytes(54) + b"ARMd" + bytes(500) + f"Linux version {release} (builder) #1".encode()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Puts an image named default into a store of its own."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))

    def made(arch: str, kernel_bytes: bytes, root: bytes = b"r" * 4096, guest_code: str = "0" * 64) -> store.Image:
        files = {"vmlinux": kernel_bytes, "initrd.cpio": b"initrd", "root.erofs": root, "scratch.head": b"s" * 4096}
        digest = store_image(files, arch=arch, guest_code=guest_code, kernel_release=RELEASE)
        store.set_name("default", digest)
        return store.find_image(None)

    return made


def script(name: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project."""
    path = {"PATH": "/usr/bin:/bin"} | env
    argv = (str(SCRIPTS / name), *argv)
    return subprocess.run(argv, env=path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_a_bundle_of_an_arm64_image_needs_no_other_kernel(make: Make, tmp_path: Path) -> None:
    """An arm64 bundle has the image's files; its manifest has their digests, sizes and the agent's protocol."""
    image = make("aarch64", raw_image())
    out = tmp_path / "guest.bundle"
    made = vz_bundle.make_bundle(image, out)
    assert msgspec.json.decode((out / "manifest.json").read_bytes(), type=vz_bundle.Bundle) == made
    assert (made.arch, made.image, made.agent_protocol) == ("aarch64", image.digest, PROTOCOL)
    parts = {part.file: part for part in made.parts().values()}
    assert {path.name for path in out.iterdir()} == {*parts, "manifest.json"}
    for name, part in parts.items():
        data = (out / name).read_bytes()
        assert (part.sha256, part.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert (out / name).stat().st_mode & 0o777 == 0o444
    assert (out / "rootfs").read_bytes() == b"r" * 4096
    assert out.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["guest.bundle"]


def test_a_bundle_of_an_x86_image_gets_the_kernel_that_is_named(make: Make, tmp_path: Path) -> None:
    """The script makes a bundle with the bzImage of --kernel, and its last line names the bundle."""
    make("x86_64", b"\x7fELF")
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    out, kernel_file = str(tmp_path / "new" / "bundle"), str(tmp_path / "vmlinuz")
    argv = ("--image", "default", "--out", out)
    cache = str(tmp_path / "cache")
    refused = script("build_vz_guest_bundle.sh", *argv, X07_VM_CACHE_DIR=cache)
    assert refused.returncode == 1
    assert f"it is not a bzImage. Add --kernel FILE, with boot/vmlinuz-{RELEASE} of" in refused.stderr
    done = script("build_vz_guest_bundle.sh", *argv, "--kernel", kernel_file, X07_VM_CACHE_DIR=cache)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"ok: built {out}"), done.stderr
    assert (tmp_path / "new" / "bundle" / "kernel").read_bytes() == bzimage()
    again = script("build_vz_guest_bundle.sh", *argv, "--kernel", kernel_file, X07_VM_CACHE_DIR=cache)
    assert again.returncode == 1
    assert "it exists. Remove it" in again.stderr


@pytest.mark.parametrize(
    ("arch", "data", "root", "why"),
    [
        ("aarch64", raw_image("6.12.2-cloud"), b"r" * 4096, "its release is 6.12.2-cloud"),
        ("aarch64", b"MZ\0\0zimg" + bytes(4096), b"r" * 4096, "not a raw Image"),
        ("x86_64", bzimage("6.1"), b"r" * 4096, "its release is 6.1"),
        ("x86_64", raw_image(), b"r" * 4096, "not a bzImage"),
        ("aarch64", raw_image(), b"r" * 4097, "no multiple of 512"),
    ],
)
def test_what_the_framework_cannot_start_is_refused(
    make: Make, tmp_path: Path, arch: str, data: bytes, root: bytes, why: str
) -> None:
    """A kernel of another form or release than the image's modules, or a disk of an odd size, gives no bundle."""
    with pytest.raises(ImageError, match=why):
        vz_bundle.make_bundle(make(arch, data, root), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.fixture
def bundle(make: Make, tmp_path: Path) -> Path:
    """A bundle of this version for an arm64 machine."""
    image = make("aarch64", raw_image(), guest_code=read_guest_code().digest)
    vz_bundle.make_bundle(image, tmp_path / "guest.bundle")
    return tmp_path / "guest.bundle"


def rewritten(bundle: Path, **fields: object) -> None:
    """Change fields of a bundle's manifest."""
    path = bundle / "manifest.json"
    document = {**json.loads(path.read_bytes()), **fields}
    path.chmod(0o644)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}), encoding="utf-8")
    path.chmod(0o444)


def why_refused(bundle: Path, arch: str = "aarch64") -> str:
    """Return why a bundle is refused."""
    with pytest.raises(ImageError) as caught, vz_bundle.open_bundle(bundle, arch):
        pass
    assert caught.value.fix
    return caught.value.why


def test_a_bundle_is_opened_as_it_was_made(bundle: Path) -> None:
    """An opened bundle has the digest of its manifest, which covers all files, and the manifest of its image."""
    hexes = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    with vz_bundle.open_bundle(bundle, "aarch64") as opened:
        assert opened.digest == opened.image.digest == f"sha256:{hexes}"
        assert (opened.command_line, opened.image.kernel_release) == (vz_bundle.COMMAND_LINE, RELEASE)
        assert opened.fds.keys() == opened.bundle.parts().keys()
        assert opened.path(opened.bundle.rootfs) == str(bundle / "rootfs")


@pytest.mark.parametrize("name", ["kernel", "rootfs", "cmdline", "image.json", "scratch.head"])
def test_a_changed_file_is_refused(bundle: Path, name: str) -> None:
    """A bundle with one changed bit in any file is refused."""
    overwrite(bundle / name)
    assert f"the content of {name} has changed" in why_refused(bundle)


def test_a_link_in_place_of_a_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    """A link is never followed: neither to a file, nor to the bundle or a folder above it."""
    (tmp_path / "link").symlink_to(tmp_path)
    assert "is a link" in why_refused(tmp_path / "link" / "guest.bundle")
    (tmp_path / "other").symlink_to(bundle)
    assert "is a link" in why_refused(tmp_path / "other")
    (bundle / "rootfs").rename(tmp_path / "rootfs")
    (bundle / "rootfs").symlink_to(tmp_path / "rootfs")
    assert "rootfs cannot be opened, or is a link" in why_refused(bundle)


def test_a_bundle_that_others_can_change_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle, its files and the folders above it must be this user's, and closed to changes by others."""
    (bundle / "initrd").chmod(0o644)
    assert "initrd has mode 0644" in why_refused(bundle)
    (bundle / "initrd").chmod(0o444)
    bundle.chmod(0o755)
    assert "mode 0755" in why_refused(bundle)
    bundle.chmod(0o700)
    tmp_path.chmod(0o777)
    assert "other users can change it" in why_refused(bundle)
    tmp_path.chmod(0o700)
    uid = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert f"uid {uid - 1}" in why_refused(bundle)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"schema_version": "x07.vz.guest.bundle@0.1.0"}, "its format is 'x07.vz.guest.bundle@0.1.0'"),
        ({"arch": "x86_64"}, "it is for 'x86_64', but this machine is aarch64"),
        ({"agent_protocol": PROTOCOL - 1}, f"its agent uses protocol {PROTOCOL - 1}"),
        ({"agent_protocol": str(PROTOCOL)}, "damaged"),
        ({"more": 1}, "damaged"),
        ({"kernel": None}, "damaged"),
        ({"rootfs": {"file": "../rootfs", "sha256": "0" * 64, "bytes": 1}}, "damaged"),
        ({"kernel_release": "6.1"}, "its files belong to several images"),
        ({"scratch_disk": {"bytes": 512, "pieces": []}}, "its files belong to several images"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(bundle: Path, fields: dict[str, object], why: str) -> None:
    """A bundle of another format, architecture or protocol is refused, and so is a damaged manifest."""
    rewritten(bundle, **fields)
    assert why in why_refused(bundle)


def test_a_truncated_or_missing_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    """A truncated manifest and a missing folder are errors with a reason; nothing is created."""
    data = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").chmod(0o600)
    (bundle / "manifest.json").write_bytes(data[: len(data) // 2])
    (bundle / "manifest.json").chmod(0o444)
    assert "damaged" in why_refused(bundle)
    assert "does not exist" in why_refused(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_bundle_has_verified_files_of_this_version(make: Make, tmp_path: Path) -> None:
    """A bundle is made only of verified files, and one whose agent comes from another version is refused."""
    image = make("aarch64", raw_image())
    vz_bundle.make_bundle(image, tmp_path / "old")
    assert "another version of x07-sandbox" in why_refused(tmp_path / "old")
    overwrite(image.folder / "initrd.cpio")
    with pytest.raises(ImageError, match=r"initrd\.cpio has changed"):
        vz_bundle.make_bundle(image, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "argv", "code", "said"),
    [
        ("build_vz_helper.sh", ["/tmp/helper"], 1, "not a Mac"),  # noqa: S108 - never written
        ("build_vz_helper.sh", [], 2, "usage: build_vz_helper.sh FILE"),
        ("build_vz_helper.sh", ["--help"], 2, "usage: "),
        ("build_vz_guest_bundle.sh", ["--image", "default"], 2, "usage: "),
        ("build_vz_guest_bundle.sh", ["--image", "a/b:c", "--out", "x"], 1, "name of a container image"),
        ("check_vz_helper.sh", ["--sources"], 2, "usage: "),
    ],
)
def test_scripts_refuse_what_they_cannot_do(tmp_path: Path, name: str, argv: list[str], code: int, said: str) -> None:
    """Each script says what it needs: exit code 2 for its usage, 1 for the rest."""
    done = script(name, *argv, X07_VM_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ""


def test_an_image_of_an_engine_names_the_guest_image_that_is_in_it(make: Make, tmp_path: Path) -> None:
    """NAME:TAG of an image that an engine has selects the guest image from which it was made."""
    image = make("aarch64", raw_image())
    label = msgspec.json.encode(msgspec.to_builtins(image.manifest)).decode()
    answer = msgspec.json.encode([{"Config": {"Labels": {"io.x07.guest.0": label}}}])
    (tmp_path / "answer.json").write_bytes(answer)
    client = tmp_path / "podman"
    client.write_text(f'#!/bin/sh\n[ "$*" = "image inspect -- x07-guest-runner:dev" ] && cat {tmp_path}/answer.json\n')
    client.chmod(0o755)
    out = tmp_path / "guest.bundle"
    argv = ["--image", "x07-guest-runner:dev", "--out", str(out)]
    env = {"X07_VM_CACHE_DIR": str(tmp_path / "cache"), "X07_VM_PODMAN_BIN": str(client)}
    done = script("build_vz_guest_bundle.sh", *argv, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ok: built {out}"
    made = msgspec.json.decode((out / "manifest.json").read_bytes(), type=vz_bundle.Bundle)
    assert made.image == image.digest


STAND_IN_MAC: Final = {
    "uname": '[ "$1" = -s ] && echo Darwin || echo arm64',
    "swiftc": 'echo "swiftc $*" >> "$LOG"; while [ "$1" != -o ]; do shift; done; echo new > "$2"',
    "codesign": 'echo "codesign $*" >> "$LOG"; [ "$1" = -d ] || exit 0; echo "$ENTITLEMENT"',
}


@pytest.mark.parametrize("entitlement", ["com.apple.security.virtualization", "none"])
def test_the_helper_is_signed_before_it_is_put_in_place(tmp_path: Path, entitlement: str) -> None:
    """With stand-ins for a Mac's tools: the new helper replaces the old one only if its signature is as needed."""
    tools = tmp_path / "stand-ins"
    tools.mkdir()
    for name, text in STAND_IN_MAC.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    out = tmp_path / "x07-vz-helper"
    out.write_text("old\n", encoding="utf-8")
    before = out.stat().st_ino
    env = {"PATH": f"{tools}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "ENTITLEMENT": entitlement}
    done = script("build_vz_helper.sh", str(out), **env)
    signed = entitlement != "none"
    assert done.returncode == (0 if signed else 1), done.stderr
    in_new_folder = script("build_vz_helper.sh", str(tools / "target" / "debug" / "x07-vz-helper"), **env)
    assert in_new_folder.returncode == done.returncode
    assert out.read_text(encoding="utf-8") == ("new\n" if signed else "old\n")
    assert (out.stat().st_ino != before) == signed
    assert {path.name for path in tmp_path.iterdir()} == {"stand-ins", "log", "x07-vz-helper"}
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "-target arm64-apple-macosx13.0" in log
    assert "--force --sign - --timestamp=none --entitlements" in log
