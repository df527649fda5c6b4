"""Bundles: what is written, what a start refuses, and what the launcher passes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

import jsonschema
import pytest
from msgspec.structs import replace

from tests.command import x07
from x07_sandbox.cli.bundle import publish
from x07_sandbox.errors import RefusedError
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.programs.toolchains import Source
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.sessions.request import sha256_text
from x07_sandbox.x07.bundle import (
    FACTS,
    FILES,
    START,
    BundleFacts,
    VmManifest,
    folder_of,
    launcher_text,
    read_bundle,
    render_bundle,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("state")
PAYLOAD: Final = b"\x7fELF and the rest of a program"
POLICY: Final = render_policy(default_policy())
DIGEST: Final = re.compile(rb"sha256:[0-9a-f]{64}")
MANIFEST: Final = VmManifest(
    backend="qemu",
    guest_image="default",
    guest_digest=f"sha256:{'5' * 64}",
    payload="payload",
    workdir="/x07/work",
    policy="policy.json",
)
FACTS_OF_A_PROGRAM: Final = BundleFacts(
    pinned=False,
    toolchain="shell",
    source=Source(name="prog.sh", head=b"#!/bin/sh\n\xff"),
    project=False,
    args=("one",),
    env={"LEVEL": "3"},
    denied={"example.org": None, "example.net": {80, 443}},
    cpu_ms=None,
    max_output_bytes=None,
)


def names(folder: Path) -> list[str]:
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name not in {"home", "jobs"})


def made(place: Path) -> tuple[Path, str]:
    """Write a bundle; return its launcher, and the digest that the launcher passes to x07."""
    launcher, files = render_bundle(MANIFEST, FACTS_OF_A_PROGRAM, POLICY, PAYLOAD)
    publish(place / "prog", launcher, files, force=False)
    (digest,) = DIGEST.findall(launcher)
    return place / "prog", digest.decode()


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A start reads the same manifest, facts, policy and payload that were written, and the launcher is executable."""
    launcher, digest = made(tmp_path)
    found = read_bundle(launcher, digest)
    assert (found.manifest, found.policy, found.payload) == (MANIFEST, POLICY, PAYLOAD)
    assert found.facts.denied == FACTS_OF_A_PROGRAM.denied
    assert found.facts.source == FACTS_OF_A_PROGRAM.source
    assert {"prog", "prog.vm"} <= {*names(tmp_path)}
    assert names(folder_of(launcher)) == sorted(FILES)
    assert os.access(launcher, os.X_OK)
    for name, schema in (("manifest.json", "x07-vm.bundle.manifest"), (FACTS, "bundle")):
        document = json.loads((folder_of(launcher) / name).read_bytes())
        jsonschema.validate(document, json.loads(schemas()[f"{schema}.schema.json"]))


@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["prog", *(f"prog.vm/{name}" for name in FILES)])
def test_a_start_refuses_a_bundle_with_one_changed_byte(tmp_path: Path, name: str, at: str) -> None:
    """A change of one byte in any file of a bundle is refused, and the message names the file and both digests."""
    launcher, digest = made(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[at]] ^= 1
    path.write_bytes(data)
    with pytest.raises(RefusedError) as refused:
        read_bundle(launcher, digest)
    assert refused.value.code == "bundle-changed"
    assert str(path) in refused.value.why
    assert len(DIGEST.findall(refused.value.why.encode())) == 2
    assert "x07 bundle" in refused.value.fix


@pytest.mark.parametrize("toolchain", ["shell", "c"])
def test_a_bundle_of_the_last_release_is_refused_only_if_its_form_has_changed(tmp_path: Path, toolchain: str) -> None:
    """A bundled script of the last release is refused with what to do; a bundled executable is the same today."""
    facts = replace(FACTS_OF_A_PROGRAM, toolchain=toolchain, schema_version="x07.sandbox.bundle@0.1.0")
    launcher, files = render_bundle(MANIFEST, facts, POLICY, b"070701 and the rest of an archive")
    publish(tmp_path / "prog", launcher, files, force=False)
    (digest,) = DIGEST.findall(launcher)
    if toolchain == "c":
        assert read_bundle(tmp_path / "prog", digest.decode()).facts == replace(
            facts, launcher=sha256_text(launcher_text()), files=json.loads(files[FACTS])["files"]
        )
        return
    with pytest.raises(RefusedError, match="older version of x07-sandbox made it") as refused:
        read_bundle(tmp_path / "prog", digest.decode())
    assert (refused.value.code, refused.value.fix) == ("bundle-changed", "Make it again with x07 bundle")


@pytest.mark.parametrize("name", FILES)
def test_a_start_refuses_an_incomplete_bundle(tmp_path: Path, name: str) -> None:
    """A missing file, or a folder in its place, is refused."""
    launcher, digest = made(tmp_path)
    path = folder_of(launcher) / name
    path.unlink()
    with pytest.raises(RefusedError, match=name):
        read_bundle(launcher, digest)
    path.mkdir()
    with pytest.raises(RefusedError, match=name):
        read_bundle(launcher, digest)


@pytest.mark.parametrize(
    "env",
    [
        {"X07_I_ACCEPT_WEAKER_ISOLATION": "1", "X07_VM_BACKEND": "podman"},
        {"X07_I_ACCEPT_WEAKER_ISOLATION": "1", "X07_SANDBOX_BACKEND": "none"},
        {"X07_VM_GUEST_IMAGE": "other", "X07_VM_GUEST_IMAGE_DIGEST": f"sha256:{'5' * 64}"},
    ],
)
@pytest.mark.parametrize("name", ["policy.json", "payload"])
def test_no_variable_skips_the_check(tmp_path: Path, name: str, env: dict[str, str]) -> None:
    """No environment variable makes a changed bundle start."""
    launcher, digest = made(tmp_path)
    path = folder_of(launcher) / name
    path.write_bytes(path.read_bytes() + b" ")
    done = x07(tmp_path, START, str(launcher), digest, "--", env=env)
    assert (done.code, done.out) == (125, b"")
    assert f"{path} was changed" in done.err


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"X07_VM_BACKEND": "podman"}, "weaker isolation"),
        ({"X07_SANDBOX_BACKEND": "os"}, "weaker isolation"),
        ({"X07_SANDBOX_BACKEND": "none", "X07_I_ACCEPT_WEAKER_ISOLATION": "1"}, "the backend none uses none"),
        ({"X07_VM_GUEST_IMAGE": "other"}, "names another guest image"),
    ],
)
def test_variables_do_not_weaken_a_bundle(tmp_path: Path, env: dict[str, str], why: str) -> None:
    """A start refuses weaker isolation without consent, a backend without a guest image, and another guest image."""
    launcher, digest = made(tmp_path)
    done = x07(tmp_path, START, str(launcher), digest, "--", env=env)
    assert (done.code, done.out) == (125, b"")
    assert why in done.err


def stand_in(folder: Path) -> Path:
    """Write a stand-in for python3 that prints its arguments, one per line."""
    folder.mkdir()
    path = folder / "python3"
    path.write_text('#!/bin/sh\nfor word; do printf "<%s>\\n" "$word"; done\n')
    path.chmod(0o755)
    return path


def started(launcher: Path, *words: str, path: str = "/usr/bin:/bin") -> list[str]:
    """Start a launcher, and return what the stand-in for python3 printed."""
    env = {"PATH": path, "PYTHONPATH": "hostile", "BASH_FUNC_printf%%": "() { echo hostile; }"}
    done = subprocess.run([launcher, *words], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_launcher_passes_every_argument(tmp_path: Path) -> None:
    """The launcher starts its own x07-sandbox isolated, with its path, the digest and the arguments as they are."""
    launcher = tmp_path / "it's me"
    launcher.write_bytes(launcher_text(MANIFEST.guest_digest, str(stand_in(tmp_path / "a b"))))
    launcher.chmod(0o755)
    words = ["--json", "", "a b", "--", "$(touch hostile)", "\n"]
    lines = started(launcher, *words)
    assert lines[:2] == ["<-I>", "<-c>"]
    assert lines[3:7] == [f"<{START}>", f"<{launcher}>", f"<{MANIFEST.guest_digest}>", "<-->"]
    assert "\n".join(lines[7:]) == "\n".join(f"<{word}>" for word in words)
    (tmp_path / "link").symlink_to(launcher)
    assert started(tmp_path / "link") == lines[:7]


def test_the_launcher_finds_x07_sandbox_on_another_host(tmp_path: Path) -> None:
    """Without the installation that made it, the launcher takes the x07-sandbox in PATH, or says what is missing."""
    launcher = tmp_path / "prog"
    launcher.write_bytes(launcher_text(python=str(tmp_path / "none")))
    launcher.chmod(0o755)
    done = subprocess.run([launcher], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.endswith("Install it, and add its folder to PATH\n")
    tool = stand_in(tmp_path / "tools").with_name("x07-sandbox")
    tool.write_text("")
    tool.chmod(0o755)
    assert started(launcher, path=f"{tool.parent}:/usr/bin:/bin")[0] == "<-I>"


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, *, force: bool) -> None:
    """If PATH cannot be replaced, the old files stay and no temporary file does."""
    launcher, digest = made(tmp_path)
    before = read_bundle(launcher, digest)
    text = launcher.read_bytes()
    launcher.unlink()
    launcher.mkdir()  # so that the last step fails
    (launcher / "file").touch()
    _, files = render_bundle(MANIFEST, FACTS_OF_A_PROGRAM, POLICY, b"another program")
    with pytest.raises(RefusedError, match="cannot write"):
        publish(launcher, b"", files, force=force)
    assert names(tmp_path) == ["prog", "prog.vm"]
    (launcher / "file").unlink()
    launcher.rmdir()
    launcher.write_bytes(text)
    assert read_bundle(launcher, digest) == before


def refused(where: Path, *words: str, code: int = 2) -> str:
    """Call `x07 bundle`, which must write nothing; return its message."""
    before = names(where)
    done = x07(where, "bundle", *words)
    assert (done.code, done.out) == (code, b""), done.err
    assert names(where) == before
    return done.err


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    """Without --force, an existing PATH or PATH.vm stays; with it, only the folder of a bundle is replaced."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "prog.py").write_text("print()")
    (place / "there").touch()
    (place / "beside.vm").mkdir()
    (place / "beside.vm" / "mine").touch()
    assert "there exists. Name another file, or add --force" in refused(place, "--out", "there", "prog.py")
    assert "beside.vm exists" in refused(place, "--out", "beside", "prog.py")
    assert "are not a bundle" in refused(place, "--force", "--out", "beside", "prog.py")
    assert "cannot replace there" in refused(place, "--force", "--out", "there", "prog.py")
    (place / "part.vm").mkdir()
    (place / "part.vm" / "policy.json").write_text("mine")
    assert "are not a bundle" in refused(place, "--force", "--out", "part", "prog.py")
    (place / "report.json").write_text("mine")
    assert "report.json: it exists" in refused(place, "--emit-dir", ".", "--out", "new", "prog.py")
    assert "are not a bundle" in refused(place, "--force", "--out", "prog.py", "prog.py")
    assert "names it for something else" in refused(place, "--out", "one", "--report-out", "one", "prog.py")


def test_what_cannot_be_bundled_is_refused(tmp_path: Path) -> None:
    """Wrong usage, a wrong policy and a backend without a guest image are refused before anything is built."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "prog.py").write_text("print()")
    (place / "policy.json").write_text('{"schema_version": "x07.run-os-policy@0.1.0"}')
    assert "--out is missing" in refused(place, "prog.py")
    assert "PROGRAM must be a file" in refused(place, "--out", "prog")
    assert "policy.json" in refused(place, "--policy", "policy.json", "--out", "prog", "prog.py", code=2)
    weaker = ("--sandbox-backend", "none", "--i-accept-weaker-isolation")
    assert "the backend none uses none" in refused(place, *weaker, "--out", "prog", "prog.py", code=125)
    assert "unrecognized arguments: --workdir" in refused(place, "--workdir", ".", "--out", "prog", "prog.py")


def test_an_image_other_than_the_pinned_one_is_refused() -> None:
    """The check of a pinned guest image names both digests."""
    from x07_sandbox.sessions.prepare import check_own_image

    check_own_image("sha256:1", None)
    check_own_image("sha256:1", "sha256:1")
    with pytest.raises(RefusedError, match=r"only the image sha256:2, but the image's digest is sha256:1"):
        check_own_image("sha256:1", "sha256:2")
