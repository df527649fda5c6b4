"""`x07 doctor`: what is here, what was proven, what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox.backends.qemu.backend import SLOWDOWN, QemuBackend
from x07_sandbox.backends.qemu.proof import prove
from x07_sandbox.backends.qemu.start import Accelerator, required_tools
from x07_sandbox.cli.console import Progress
from x07_sandbox.errors import SandboxError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.paths import cache_dir, private_dir, state_dir
from x07_sandbox.images.commands import missing_tools
from x07_sandbox.images.store import find_image, image_is_current
from x07_sandbox.images.verify import open_image

if TYPE_CHECKING:
    from x07_sandbox.images.verify import OpenImage


_NO_START = (
    "A run would end the same way: allow it to change uids (in a container: --privileged), or see x07 run --cold"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. good: None where it is neither good nor bad but worth knowing."""

    subject: str
    good: bool | None
    text: str
    fix: str = ""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb."""
    parser = verbs.add_parser("doctor", help=help)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(carry_out=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    findings = [_architecture(), *_tools(), _image_tools(), _folders(), _groups(), *_image_and_machine()]
    good = all(finding.good is not False for finding in findings)
    if options.json:
        rows = [
            {"subject": finding.subject, "good": finding.good, "text": finding.text, "fix": finding.fix}
            for finding in findings
        ]
        sys.stdout.write(json.dumps({"good": good, "findings": rows}, indent=2) + "\n")
        return 0 if good else 1
    for finding in findings:
        mark = {True: "good", False: "BAD ", None: "note"}[finding.good]
        sys.stdout.write(f"{mark}  {finding.subject}: {finding.text}\n")
        if finding.fix:
            sys.stdout.write(f"      {finding.fix}\n")
    return 0 if good else 1


def _architecture() -> Finding:
    try:
        arch = host_arch()
    except SandboxError as exc:
        return Finding(subject="architecture", good=False, text=exc.why, fix=exc.fix)
    tested = "" if arch.tested else ", which has never been tried: please tell us how it goes"
    return Finding(subject="architecture", good=True if arch.tested else None, text=arch.name + tested)


def _tools() -> list[Finding]:
    return [
        Finding(subject=path, good=True, text="here")
        if os.access(path, os.X_OK)
        else Finding(subject=path, good=False, text="missing", fix=f"apt-get install --no-install-recommends {package}")
        for path, package in required_tools(host_arch()).items()
    ]


def _image_tools() -> Finding:
    missing = missing_tools()
    if not missing:
        return Finding(subject="tools that build an image", good=True, text="here")
    return Finding(
        subject="tools that build an image",
        good=None,
        text="missing (needed only to build): " + ", ".join(missing),
        fix="apt-get install --no-install-recommends " + " ".join(sorted(set(missing.values()))),
    )


def _folders() -> Finding:
    try:
        state, cache = private_dir(state_dir()), private_dir(cache_dir())
    except SandboxError as exc:
        return Finding(subject="folders", good=False, text=f"{exc.what}: {exc.why}", fix=exc.fix)
    return Finding(subject="folders", good=True, text=f"records in {state}, images in {cache}")


def _groups() -> Finding:
    root = Path("/sys/fs/cgroup")
    version = "2" if (root / "cgroup.controllers").exists() else "1"
    if os.geteuid() == 0:
        limits = "hold the virtual machine monitor's memory and tasks"
    else:
        limits = "are used if delegated to you" if version == "2" else "are for root only: none around the machine"
    text = f"version {version}, {limits}; rlimits and the guest's own limits hold everywhere"
    return Finding(subject="control groups", good=None, text=text)


def _image_and_machine() -> list[Finding]:
    findings: list[Finding] = []
    try:
        image = find_image(None)
        with open_image(image) as opened:
            findings.append(_image(image_is_current(image), image.digest))
            backend = QemuBackend()
            availability = backend.probe(opened)
            emulated = availability.features.emulated
            isolation = f"{availability.features.isolation} ({availability.proof})"
            findings.append(Finding(subject="isolation", good=True, text=isolation))
            findings.append(_start(opened, Accelerator(kvm=not emulated)))
    except SandboxError as exc:
        return [*findings, Finding(subject=exc.what, good=False, text=exc.why, fix=exc.fix)]
    if emulated:
        text = f"CPU work in the guest takes {SLOWDOWN} as long as on this host; X07_VM_REQUIRE_HARDWARE=1 refuses it"
        findings.append(Finding(subject="emulation", good=None, text=text))
    return findings


def _start(image: OpenImage, accelerator: Accelerator) -> Finding:
    """Whether a run could start: a machine in the jail of a run, by the same launcher, until our agent answers."""
    subject = "start of a machine"
    progress = Progress("doctor") if sys.stderr.isatty() else None
    if progress:
        progress("starting a machine in its jail, as a run does")
    try:
        works, reason = prove(image, accelerator, settings.BOOT_S)
    except SandboxError as exc:
        works, found = False, Finding(subject=subject, good=False, text=f"{exc.what}: {exc.why}", fix=exc.fix)
    else:
        found = Finding(subject=subject, good=works, text=reason, fix="" if works else _NO_START)
    if progress:
        progress.done("started" if works else "it did not start")
    return found


def _image(current: bool, digest: str) -> Finding:  # noqa: FBT001 - one caller, one meaning
    if current:
        return Finding(subject="guest image", good=True, text=digest)
    return Finding(
        subject="guest image",
        good=None,
        text="made by another version of x07-sandbox",
        fix="x07 image build renews it in a second",
    )
