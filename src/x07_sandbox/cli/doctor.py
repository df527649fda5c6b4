"""`x07 doctor` and `x07 conform`: check this machine, say what to fix, and test a backend."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from x07_sandbox.backends.base import EMULATED
from x07_sandbox.backends.prerequisites import Looks, advice, check, unmet
from x07_sandbox.backends.registry import (
    ACCEPT_FLAG,
    BY_NAME,
    BackendRequest,
    BackendRow,
    Platform,
    backend_request,
    choice_from_environment,
    create,
    instead,
    select,
    this_platform,
    usable_flags,
)
from x07_sandbox.cli.console import LiveLine, show, size
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, add_row, option
from x07_sandbox.conformance.behaviours import ConformReport, Verdict, conform
from x07_sandbox.errors import SandboxError, worded
from x07_sandbox.host.arch import ARCHES, host_arch
from x07_sandbox.host.linux import require_linux
from x07_sandbox.host.paths import cache_dir, cache_folder, private_dir, state_dir
from x07_sandbox.host.variables import PREFIXES, SANDBOX_BACKENDS, VARIABLES
from x07_sandbox.options import BY_FLAG
from x07_sandbox.reports.commands import BackendState, DoctorReport, Finding, Look, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from x07_sandbox.backends.registry import Choice
    from x07_sandbox.images.store import Image
    from x07_sandbox.sessions.result import Result

START: Final = "VM start"
_ANSWERED: Final = "the guest agent answered and ran a program"
_NO_START: Final = "Runs will fail the same way"
_NO_UIDS: Final = f"{_NO_START}: allow changing uids (in a container: --privileged)"
_TOO_SLOW: Final = "This host is slow or busy: run x07 doctor again when it is less busy"
_HEAD_BYTES: Final = 4096
_PROGRAM: Final = b"#!/bin/sh\n"
_MARKS: Final = {"proven": "good", "untried": "note", "failed": "BAD", "not-here": "note"}
_EXAMPLES: Final = """examples:
  x07 doctor                                     print all findings
  x07 doctor --json | jq '.backends[] | {name, state}'

exit code: 0 no finding is BAD; 1 at least one is BAD
"""


_NO_ARCHITECTURE: Final = (
    f"Run x07 on one of: {', '.join(sorted(ARCHES))}",
    "Run x07 in an emulated x86_64 Debian 13 VM here (slow, but complete)",
    "Add a row for this architecture to host/arch.py, and report whether it works",
)
_MISSING: Final = (
    "Run scripts/setup.sh in a checkout of x07-sandbox, which installs what is missing",
    "Run x07 in a Debian 13 VM or container that has them",
)
_ON_MACOS: Final = (
    "See docs/backends/vz.md for what x07 lacks on macOS",
    "Run x07 in a Linux virtual machine here",
    "Run x07 on a Linux host with --sandbox-backend vm --backend qemu",
)
_NO_NAMESPACES: Final = (
    "Allow user and mount namespaces: sysctl kernel.unprivileged_userns_clone=1, or run x07 as root",
    "If x07 itself runs in a container, start that container with --privileged",
    "Run x07 on another Linux host with --sandbox-backend vm --backend qemu",
)
_WORDS: Final = {"passed": "ok", "failed": "FAILED", "gap": "gap", "skipped": "skipped"}
_EPILOG: Final = """Each line shows one behaviour and its verdict: ok, FAILED, gap (the backend is known to lack the
behaviour) or skipped (this host cannot test it). docs/backends/README.md lists all behaviours.

examples:
  x07 conform
  x07 conform --backend os --i-accept-weaker-isolation
  x07 conform --json | jq '.backends[].verdicts[] | select(.verdict == "failed")'

exit code: 0 nothing failed; 1 something failed
"""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 doctor`."""
    parser.description = "Check this host, start a VM to prove that VMs work, and say what to fix."
    parser.epilog = _EXAMPLES
    add_document_flags(parser)
    parser.set_defaults(carry_out=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    report = _examine()
    if not print_document(report, options):
        for finding in report.findings:
            mark = {True: "good", False: "BAD", None: "note"}[finding.good]
            show(f"{finding.subject}: {finding.text}", mark)
            if finding.fix:
                show(f"      {finding.fix}")
        show("")
        show("backends, preferred first:")
        for state in report.backends:
            _print_backend(state)
    return 0 if report.good else 1


def _print_backend(state: BackendState) -> None:
    isolation = " or ".join(state.isolation) + (", only if accepted" if state.needs_acceptance else "")
    # It is no error if a backend that is used only on request is missing.
    on_request = state.needs_acceptance or BY_NAME[state.name].if_installed
    mark = "note" if state.state == "failed" and on_request else _MARKS[state.state]
    show(f"{state.name} ({isolation}): {state.text}", mark)
    for look in state.looks:
        show(f"      {look.what}: {look.text}")
    # If this version or platform lacks the backend, only the last remedy is about this backend.
    for remedy in state.remedies if state.state == "failed" else state.remedies[-1:]:
        show(f"      - {remedy}")


def _examine() -> DoctorReport:
    platform = this_platform()
    findings = [platform_finding(platform), _architecture(), _first_on_path(os.environ), _variables(os.environ)]
    findings += [*_checked("system calls", require_linux), *_checked("requested backend", _requested_backend)]
    findings += _checked("folders", _folders)
    proofs: dict[str, Finding] = {}
    looks = gather(platform)
    if platform.system == "linux" and os.uname().machine in ARCHES:
        choice = select(platform, BackendRequest())
        name, machine = choice.backend, _image_and_machine(choice)
        findings += [*_checked("tools to build images", _image_tools), *_checked("control groups", _cgroups)]
        findings += [*_checked("runs at once", _capacity), *_checked("jail", partial(_jail, name)), *machine]
        proofs[name] = proof_among(machine)
        proofs |= {row.name: _unstarted(row.name) for row in BY_NAME.values() if row.weaker or row.if_installed}
    elif platform.system == "macos":
        proofs |= {name: _unstarted(name) for name in looks}
    return DoctorReport(
        good=all(finding.good is not False for finding in findings),
        findings=tuple(findings),
        backends=tuple(
            backend_state(row, platform, looks.get(row.name, ()), proofs.get(row.name)) for row in BY_NAME.values()
        ),
    )


def gather(platform: Platform) -> dict[str, Looks]:
    """Check the prerequisites of all backends for this platform, without starting a backend."""
    return {row.name: check(create(row.name).needs) for row in BY_NAME.values() if not row.unsupported(platform)}


def backend_state(row: BackendRow, platform: Platform, looks: Looks, proof: Finding | None) -> BackendState:
    """Return the state of a backend. proof: the result of a test start; neither good nor bad if nothing was started."""
    state: State
    remedies: tuple[str, ...] = ()
    if text := row.unsupported(platform):
        state, remedies = "not-here", alternatives(platform)
    elif proof is not None and proof.good is not False:
        state, text = "proven" if proof.good else "untried", proof.text
    else:
        state, (text, remedies) = "failed", _failure(row, looks, proof)
    rows = (Look(need.place, found.good or (None if need.optional else False), found.text) for need, found in looks)
    kind = row.sandbox_class
    return BackendState(row.name, kind, row.isolation, row.weaker, state, text, tuple(rows), remedies)


def _failure(row: BackendRow, looks: Looks, proof: Finding | None) -> tuple[str, tuple[str, ...]]:
    """Return why a backend cannot be used, and three remedies."""
    if (machine := os.uname().machine) not in ARCHES:
        return f"no virtual machine for architecture {machine}", _NO_ARCHITECTURE
    if failed := unmet(looks):
        why, fix = advice(failed)
        return why, (worded(fix), *_MISSING)
    advised = _NO_NAMESPACES if row.linux else _ON_MACOS
    if proof is None:
        return "nothing was started", advised
    more = () if row.isolation == ("container",) else advised  # an engine's own error says what it needs
    return proof.text, (*filter(None, [proof.fix]), *more)[:3]


def alternatives(platform: Platform) -> tuple[str, str]:
    """Return two alternatives to a backend that is not available."""
    if usable_flags(platform):
        other = "Leave out --backend and X07_VM_BACKEND; x07 then selects a backend that works"
    else:
        other = "Run x07 in a Linux virtual machine here"
    return instead(platform, BackendRequest()), other


def _unstarted(name: str) -> Finding:
    """Return whether the prerequisites of a backend are met. Starts no instance."""
    try:
        availability = create(name).probe(None, boot=False)
    except (SandboxError, OSError) as exc:
        return _bad(name, exc)
    by = "--sandbox-backend" if name in SANDBOX_BACKENDS else "--backend"  # os and none need to be named as a class
    text = f"{availability.proof}; to test it: x07 conform {by} {name} {ACCEPT_FLAG}"
    return Finding(code="untried", subject=name, good=None, text=text)


def platform_finding(platform: Platform) -> Finding:
    """Return whether this version has a backend for the platform."""
    if words := " ".join(usable_flags(platform)):
        good = platform.system == "linux" or None
        text = f"{platform}, supported by {words}{'' if good else ', but x07 has never run there'}"
        fix = "" if good else _ON_MACOS[1]
        return Finding(code="platform", subject="platform", good=good, text=text, fix=fix)
    text, fix = f"this version has no backend for {platform}", ". ".join(alternatives(platform))
    return Finding(code="no-backend", subject="platform", good=False, text=text, fix=fix)


def proof_among(findings: list[Finding]) -> Finding:
    """Return the proof that a VM started, or the first bad finding as the reason why there is none."""
    bad = next((finding for finding in findings if finding.good is False), None)
    if bad is None:
        return Finding(code="vm-started", subject=START, good=True, text=_ANSWERED)
    return Finding(code=bad.code, subject=START, good=False, text=f"{bad.subject}: {bad.text}", fix=bad.fix)


def _first_on_path(environ: Mapping[str, str]) -> Finding:
    """Return which program the command `x07` starts, since X07's own tool has the same name. Starts no program."""
    import shutil

    subject = "x07 on PATH"
    path = shutil.which("x07", path=environ.get("PATH", ""))
    text = "not found"
    if path is not None:
        try:
            with Path(path).open("rb") as file:
                if b"x07_sandbox" in file.read(_HEAD_BYTES):
                    return Finding(code="on-path", subject=subject, good=True, text=f"{path} is x07-sandbox")
            text = f"{path} is another program, perhaps X07's own"
        except OSError as exc:
            text = f"{path} cannot be read: {exc.strerror}"
    ours = Path(sys.executable).with_name("x07-sandbox")
    fix = f"Call this one x07-sandbox ({ours}), or put its folder first on PATH"
    return Finding(code="not-on-path", subject=subject, good=None, text=text, fix=fix)


def _variables(environ: Mapping[str, str]) -> Finding:
    """Return this tool's variables that are set, and the names of unknown variables with this tool's prefixes."""
    known = [f"{name}={ascii(environ[name])[1:-1]}" for name in VARIABLES if environ.get(name, "").strip()]
    others = [name for name in sorted(environ) if name.startswith(PREFIXES) and name not in VARIABLES]
    text = f"set: {', '.join(known)}" if known else "none is set"
    if others:
        text += f"; unknown: {', '.join(others)}"
    return Finding(
        code="variables",
        subject="variables",
        good=None,
        text=text,
        fix="See docs/reference/settings.md" if others else "",
    )


def _checked(subject: str, check_it: Callable[[], Finding | None]) -> list[Finding]:
    """Return the finding of one check, if it has one, or the finding for its error."""
    try:
        found = check_it()
    except (SandboxError, OSError) as exc:
        return [_bad(subject, exc)]
    return [] if found is None else [found]


def _requested_backend() -> None:
    """Raise if variables request a backend that is unavailable. Runs without a backend flag then fail."""
    choice_from_environment()


def _bad(subject: str, exc: SandboxError | OSError) -> Finding:
    """Return the finding for an error. Raises *exc* if it is a bug."""
    from x07_sandbox.host.paths import host_error

    error = host_error(exc) if isinstance(exc, OSError) else exc
    if error is None:
        raise exc
    return Finding(code=error.code, subject=subject, good=False, text=f"{error.what}: {error.why}", fix=error.fix)


def _architecture() -> Finding:
    try:
        arch = host_arch()
    except SandboxError as exc:
        return Finding(code="architecture-unknown", subject="architecture", good=False, text=exc.why, fix=exc.fix)
    tested = "" if arch.tested else ", untested: please report how it works"
    return Finding(code="architecture", subject="architecture", good=arch.tested or None, text=arch.name + tested)


def _image_tools() -> Finding:
    from x07_sandbox.images.commands import missing_tools, require_namespaces

    subject, missing = "tools to build images", missing_tools()
    if not missing:
        try:
            require_namespaces()
        except SandboxError as exc:
            return Finding(code="tools-blocked", subject=subject, good=None, text=f"found, but {exc.why}", fix=exc.fix)
        return Finding(code="tools", subject=subject, good=True, text="found")
    fix = "apt-get install --no-install-recommends " + " ".join(sorted(set(missing.values())))
    text = f"missing (only needed to build): {', '.join(missing)}"
    return Finding(code="tools-missing", subject=subject, good=None, text=text, fix=fix)


def _folders() -> Finding:
    state, cache = private_dir(state_dir()), private_dir(cache_dir())
    return Finding(code="folders", subject="folders", good=True, text=f"records in {state}, images in {cache}")


def _cgroups() -> Finding:
    """Return whether x07 can create control groups around a VM monitor. It creates and removes some, as a run does."""
    from x07_sandbox.host.waiting import unix_ms
    from x07_sandbox.jail.resources import make_groups

    version = "2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "1"
    groups = make_groups(f"{unix_ms()}-{os.getpid()}-0-doctor", memory_bytes=1 << 30, tasks=64)
    groups.remove()
    text = f"version {version}; {groups.describe()}; rlimits and the limits in the guest always apply"
    return Finding(code="control-groups", subject="control groups", good=None, text=text)


def _capacity() -> Finding:
    """Return how many runs this user may have at the same time on this host."""
    from x07_sandbox.host.linux import cores, memory_bytes
    from x07_sandbox.records.admission import MEMORY_PER_MACHINE, max_running

    memory, each = memory_bytes(), MEMORY_PER_MACHINE >> 30
    text = f"{max_running()}; this host has {cores()} cores and {size(memory)} of memory; each run counts as {each} GiB"
    if memory * 3 // 4 < MEMORY_PER_MACHINE:
        text += ", which is more than three quarters of this memory: large programs may not fit"
    return Finding(code="runs-at-once", subject="runs at once", good=None, text=text)


def _jail(name: str) -> Finding | None:
    """Return which form of the jail around QEMU this host allows: with or without namespaces."""
    from x07_sandbox.jail.bwrap import BWRAP
    from x07_sandbox.jail.forms import jail_form, namespace_flags

    if name != "qemu" or not os.access(BWRAP, os.X_OK):
        return None
    form = jail_form()
    if form.namespaces:
        return Finding(code="jail", subject="jail", good=True, text="namespaces, seccomp and a private root")
    text = f"without namespaces, by Landlock {form.landlock} and seccomp: {form.why}"
    text += "; X07_VM_REQUIRE_NAMESPACES=1 rejects this"
    fix = f"To get namespaces, allow them: {namespace_flags()}"
    return Finding(code="jail-without-namespaces", subject="jail", good=None, text=text, fix=fix)


def _image_and_machine(choice: Choice) -> list[Finding]:
    # Imported here, so that other findings are reported where these modules cannot be loaded.
    from x07_sandbox.images.store import find_image
    from x07_sandbox.images.verify import open_image
    from x07_sandbox.sessions.prepare import check_pinned

    findings: list[Finding] = []
    probing = False
    try:
        image = find_image(None)
        with open_image(image) as opened:
            findings.append(_image(image))
            check_pinned(image.digest)
            backend, probing = create(choice.backend), True
            availability = backend.probe(opened)
            isolation = f"{availability.features.isolation} ({availability.proof})"
            # Emulation although there is /dev/kvm is neither good nor an error: runs work.
            fallback = availability.features.emulated and Path("/dev/kvm").exists()
            fix = availability.fix if fallback else ""
            good = None if fallback else True
            findings.append(Finding(code="isolation", subject="isolation", good=good, text=isolation, fix=fix))
    except (SandboxError, OSError) as exc:
        if probing or isinstance(exc, OSError):  # the probe starts a VM as a run does
            return [*findings, _bad(START, exc)]
        return [*findings, Finding(code=exc.code, subject=exc.what, good=False, text=exc.why, fix=exc.fix)]
    findings.append(_start(choice))
    if availability.features.emulated:
        text = f"{EMULATED}; X07_VM_REQUIRE_HARDWARE=1 rejects it"
        findings.append(Finding(code="emulation", subject="emulation", good=None, text=text))
        if backend.cloning is not None:
            findings.append(_hot_clones(backend.cloning.why_not_hot()))
        if all(finding.good is not False for finding in findings):
            findings.append(_slowness(choice))
    return findings


def _hot_clones(why_not: str) -> Finding:
    """Return whether VMs are restored from saved processes."""
    if not why_not:
        text = "VMs are restored from saved processes of VMs, in less than half the time"
        return Finding(code="hot-clones", subject="hot clones", good=True, text=text)
    text = f"VMs start as clones of saved VMs, which takes longer: {why_not}"
    return Finding(code="no-hot-clones", subject="hot clones", good=None, text=text)


def _attempt(choice: Choice, doing: str, *, scale: bool) -> tuple[Result, SandboxError | None]:
    """Run a program that does nothing. It needs everything that any run needs, so doctor has no list of its own."""
    import shutil

    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.records.runs import all_runs
    from x07_sandbox.sessions.request import RunCaller, RunRequest
    from x07_sandbox.sessions.run import attempt

    progress = LiveLine()
    progress(doing)
    with contextlib.closing(Cancel()) as cancel:
        request = RunRequest(source=_PROGRAM, toolchain="executable", cold=True, scale_limits=scale)
        result, error = attempt(request, RunCaller(cancel=cancel, progress=progress, choice=choice))
    with contextlib.suppress(SandboxError, OSError):  # it must not be the latest run of `x07 logs`
        shutil.rmtree(all_runs() / result.run)
    progress("")
    return result, error


def _start(choice: Choice) -> Finding:
    """Start a VM as a run does, and run a program in it."""
    from x07_sandbox.host import settings

    result, error = _attempt(choice, "starting a VM as a run does", scale=False)
    if error is not None:
        return _bad(START, error)
    if result.ok:
        return Finding(code="vm-started", subject=START, good=True, text=_ANSWERED)
    late = any(phase.times_ms.get("end", 0) >= settings.BOOT_S * 1000 for phase in result.phases.values())
    fix = _TOO_SLOW if late else _NO_UIDS if result.reason_code == "supervisor-uid" else _NO_START
    return Finding(code=result.reason_code, subject=START, good=False, text=result.reason, fix=fix)


def _slowness(choice: Choice) -> Finding:
    """Return the slowdown of emulation, which `--scale-limits` uses. Measures the slowdown if it is not known yet."""
    from x07_sandbox.sessions.scaling import known_factor

    factor = known_factor()
    if factor is None:
        result, _ = _attempt(choice, "measuring the slowdown of emulation", scale=True)
        if result.scaling is None:
            text = "; ".join(result.warnings) if result.ok else result.reason
            return Finding(code="not-measured", subject="limits under emulation", good=None, text=text)
        factor = result.scaling.factor
    text = f"x07 run --scale-limits multiplies time limits by {factor}, as measured now by a CPU benchmark"
    return Finding(code="slowdown", subject="limits under emulation", good=None, text=text)


def _image(image: Image) -> Finding:
    from x07_sandbox.images.store import image_is_current

    if image_is_current(image):
        text = f"{image.digest} (x07 image build --list-presets shows images for agents and for data)"
        return Finding(code="image", subject="guest image", good=True, text=text)
    text, fix = "built by another version of x07-sandbox", "To update it: x07 image build"
    return Finding(code="image-outdated", subject="guest image", good=None, text=text, fix=fix)


def add_conform(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 conform`."""
    parser.description = "Run small test programs on a backend. The test takes a few minutes and changes nothing."
    parser.epilog = _EPILOG
    option(parser, "--backend", "B", "test one backend, such as qemu (default: every VM backend that can run here)")
    for flag in ("--sandbox-backend", "--i-accept-weaker-isolation"):
        add_row(parser, BY_FLAG[flag])
    add_document_flags(parser)
    parser.set_defaults(carry_out=_conform)


def _conform(options: argparse.Namespace) -> int:
    reports, live = [], LiveLine()

    def tell(verdict: Verdict) -> None:
        live("")
        if not options.json:
            what = f"{verdict.group} {verdict.name}: {verdict.reason or verdict.promise}"
            show(f"{_WORDS[verdict.verdict]:8}{name} {what}")
        live(f"conform: {name}: after {verdict.name}")

    with tempfile.TemporaryDirectory(prefix="conform-", dir=cache_folder("tmp")) as folder:
        # A separate state folder, so that no test becomes the latest run for `x07 diff` and `x07 undo`.
        os.environ["X07_VM_STATE_DIR"] = f"{folder}/jobs"
        for name in backends_to_test(options, this_platform()):
            live(f"conform: {name}: preparing")
            try:
                reports.append(conform(name, on_verdict=tell))
            finally:
                live("")
    failed = any(verdict.verdict == "failed" for report in reports for verdict in report.verdicts)
    print_document(ConformReport(good=not failed, backends=tuple(reports)), options)
    return 1 if failed else 0


def backends_to_test(options: argparse.Namespace, platform: Platform) -> list[str]:
    """Return the backends to test. Raises UsageError, RefusedError."""
    wanted = backend_request(
        sandbox=options.sandbox_backend,
        backend=options.backend,
        accepted=options.i_accept_weaker_isolation,
    )
    chosen = select(platform, wanted).backend
    words = (wanted.sandbox_flag, wanted.sandbox_variable)
    if wanted.backend_flag or wanted.backend_variable or any(word not in {None, "auto"} for word in words):
        return [chosen]
    return [row.name for row in BY_NAME.values() if row.may_run(platform) and not row.weaker]
