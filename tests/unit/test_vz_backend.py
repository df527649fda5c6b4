"""The vz backend without a machine: the helper's command line and its preflight."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from tests import vz_helper
from tests.unit.test_images_manifest import MANIFEST
from x07_sandbox.backends.base import Job, MachineKind
from x07_sandbox.backends.vz import VzBackend, helper_argv
from x07_sandbox.channel.messages import PROTOCOL
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.waiting import Caller, Cancel
from x07_sandbox.images import store
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.images.vz_bundle import SCHEMA, Bundle, OpenBundle
from x07_sandbox.records.runs import Claim

HELPER: Final = Path(__file__).resolve().parents[1] / "vz_helper.py"
GOOD: Final = {
    "schema_version": "x07.vz.preflight@0.1.0",
    "macos": "13.6.0",
    "arch": "arm64",
    "supported": True,
    "entitled": True,
    "memory_bytes": [1, 2],
    "cpus": [1, 2],
    "ok": True,
}


def part(name: str) -> store.Part:
    """A file of a bundle."""
    return store.Part(file=name, sha256="0" * 64, bytes=1)


def image_manifest(*, program: bool) -> store.Manifest:
    """The manifest of an image. program: whether it was imported."""
    oci = store.ProgramRoot(oci="", env={}, workdir="", user="", entrypoint=[], cmd=[])
    return replace(MANIFEST, program=oci if program else None)


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("program", [False, True])
def test_the_helper_gets_the_files_and_limits_of_the_job(*, network: bool, program: bool) -> None:
    """The command line has the bundle's files and the job's disk, memory and deadline, and a helper accepts it."""
    image, disk = image_manifest(program=program), store.ScratchDisk(bytes=512, pieces=[])
    names = ("image_manifest", "kernel", "initrd", "rootfs", "cmdline", "scratch")
    bundle = Bundle(
        schema_version=SCHEMA,
        arch="x86_64",
        image="",
        kernel_release="6",
        agent_protocol=PROTOCOL,
        scratch_disk=disk,
        program=part("program") if program else None,
        **{name: part(name) for name in names},
    )
    opened = OpenBundle(folder=Path("/b"), bundle=bundle, digest="", fds={}, image=image, command_line="quiet a=b")
    with contextlib.closing(Cancel()) as cancel:
        job = Job(
            claim=Claim(run_id="1-2-3", phase="run", wall_ms=1500),
            kind=MachineKind(image=OpenImage(fds={}, manifest=image), ram_bytes=1 << 28, network=network),
            caller=Caller(cancel=cancel),
        )
        argv = helper_argv("/h", opened, job, (Path("/s/empty"), Path("/s/own")), 7 if network else None)
    assert argv[:2] == ["/h", "run"]
    assert vz_helper.options_of(argv[2:]) == {
        "kernel": "/b/kernel",
        "initrd": "/b/initrd",
        "command-line": "quiet a=b",
        "root": "/b/rootfs",
        "scratch-from": "/s/empty",
        "scratch": "/s/own",
        "mem-bytes": str(1 << 28),
        "wall-ms": str(job.claim.deadline_s * 1000),
        **({"net-fd": "7"} if network else {}),
        **({"program": "/b/program"} if program else {}),
    }


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a helper, which the variable names."""
    monkeypatch.setenv("X07_VM_VZ_HELPER_BIN", str(tmp_path / "helper"))
    return tmp_path / "helper"


def probe_with(helper: Path, script: str) -> str:
    """Probe with a helper that is a shell script, and return the proof."""
    helper.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    helper.chmod(0o755)
    return VzBackend().probe(None).proof


def test_the_probe_shows_on_what_the_helper_runs(helper: Path) -> None:
    """A good preflight is accepted, and its version of macOS is shown: a stand-in says that it is one."""
    assert "macOS 13.6.0 (arm64)" in probe_with(helper, f"echo '{json.dumps(GOOD)}'")
    helper.unlink()
    helper.symlink_to(HELPER)
    assert "macOS stand-in" in VzBackend().probe(None).proof


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"echo '{json.dumps(GOOD | {'ok': False, 'entitled': False})}'; exit 2", "without the entitlement"),
        (f"echo '{json.dumps(GOOD | {'ok': False, 'supported': False})}'", "does not support virtual machines"),
        (f"echo '{json.dumps(GOOD | {'schema_version': 'x07.vz.preflight@0.2.0'})}'", "no valid answer"),
        (f"echo '{json.dumps(GOOD | {'more': 1})}'", "no valid answer"),
        ("exit 1", "no valid answer"),
        ("yes", "no valid answer"),
    ],
)
def test_a_helper_that_cannot_start_a_vm_is_refused(helper: Path, script: str, why: str) -> None:
    """A helper without the entitlement, on a Mac without support, or with another answer is refused with the reason."""
    with pytest.raises(HostError, match=why) as caught:
        probe_with(helper, script)
    assert caught.value.fix


def test_a_helper_that_hangs_is_killed(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preflight without an answer ends after its timeout."""
    monkeypatch.setattr("x07_sandbox.backends.vz._PREFLIGHT_S", 0.2)
    started = time.monotonic()
    with pytest.raises(HostError, match="no valid answer within"):
        probe_with(helper, "exec sleep 60")
    assert time.monotonic() - started < 30


def test_a_missing_helper_or_bundle_is_named(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a helper or a bundle, the error names the variable to set."""
    with pytest.raises(HostError, match=r"X07_VM_VZ_HELPER_BIN is .*, which is no executable program"):
        VzBackend().probe(None)
    assert not helper.exists()
    monkeypatch.delenv("X07_VM_VZ_GUEST_BUNDLE", raising=False)
    with pytest.raises(ImageError, match="X07_VM_VZ_GUEST_BUNDLE is not set"):
        VzBackend().find(None)
