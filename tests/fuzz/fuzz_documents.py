"""Fuzz target: documents that come with a program, or from it, and that the host reads.

An input is a byte that chooses the document, and its text. The text is rejected by a reported error, or it is valid:
a manifest and an X07 project name nothing outside their folder; a policy is the same after writing and reading it;
the report of an X07 program can be written whatever its compiler and counters print, and its counters are counts.
"""

from __future__ import annotations

import base64
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host.documents import render_json
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.programs.project import decode_manifest
from x07_sandbox.sessions.result import EMPTY_OUTPUT, BuildOutput, Changes, Digests, Output, Result
from x07_sandbox.x07.project import decode_project
from x07_sandbox.x07.runner_report import Built, runner_report, x07_report

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT: Final = Built(mode="compile-run", lang_id="x07", size=1)
COUNT_MAX: Final = (1 << 64) - 1
BETWEEN: Final = b"\xff\xff"


def _manifest(data: bytes) -> None:
    try:
        manifest, toolchain = decode_manifest(data, source="m")
    except UsageError:
        return
    assert toolchain.name == manifest.toolchain
    paths = (manifest.entry, manifest.artifact, manifest.policy, manifest.run.input, *manifest.files)
    assert all(_inside(path) for path in paths if path is not None)


def _project(data: bytes) -> None:
    try:
        project = decode_project(data, source="p")
    except UsageError:
        return
    paths = [project.lockfile or None]
    for profile in project.profiles.values():
        paths += [profile.policy, profile.input]
    assert all(_inside(path) for path in paths if path is not None)


def _inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in PurePosixPath(path).parts and "\0" not in path


def _policy(data: bytes) -> None:
    try:
        policy = decode_policy(data, source="p")
    except UsageError:
        return
    assert decode_policy(render_policy(policy), source="p") == policy


def _report(data: bytes) -> None:
    """Check three texts: the compiler's report, the program's output, its error output."""
    said, stdout, stderr = [*data.split(BETWEEN, 2), b"", b""][:3]
    for code in (0, 1):
        report = x07_report(result(said, stdout, stderr, code), BUILT)
        written = json.loads(render_json(report))
        for counters in (written["compile"], written["solve"] or {}):
            assert all(0 <= value <= COUNT_MAX for key, value in counters.items() if key.endswith("_calls") and value)
        assert code == 0 or report.exit_code != 0


def result(said: bytes, stdout: bytes, stderr: bytes, code: int = 0) -> Result:
    """Return the result of an X07 program that was compiled and exited by itself, with these streams."""
    return Result(
        run="1-2-3",
        outcome="failed" if code else "ok",
        fault="none",
        reason_code="exited",
        reason="",
        x07_exit_code=code,
        exit_code=code,
        stdout=_output(stdout),
        stderr=_output(stderr),
        phases={},
        digests=Digests(artifact="sha256:" + "0" * 64),
        controls=[],
        denials=[],
        changes=Changes(),
        warnings=[],
        build=BuildOutput(stdout=_output(said), stderr=EMPTY_OUTPUT),
    )


def _output(data: bytes) -> Output:
    return Output(bytes=len(data), truncated=False, base64=base64.b64encode(data).decode())


READERS: Final[tuple[Callable[[bytes], None], ...]] = (_manifest, _project, _policy, _report)


def seeds() -> dict[str, bytes]:
    """Return one of each document, which the first byte selects, and program output that is no report."""
    manifest = b'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["*.py"]\nentry = "a.py"\n'
    tables = b'policy = "p.json"\n[run]\nargs = ["--top", "10"]\ninput = "in.txt"\nenv = {A = "1"}\n'
    project = b'{"schema_version":"x07.project@0.5.0","default_profile":"os","lockfile":"x07.lock.json","profiles":'
    profiles = b'{"os":{"world":"run-os-sandboxed","policy":"p.json","input":"in.bin","solve_fuel":1}}}'
    said = render_json(runner_report(result(b"", b"", b""), BUILT))
    counted = b'talk\n{"fuel_used": 12, "heap_used": 3, "debug_stats": {"borrow_violations": 0}, "later": [1]}\n'
    return {
        "manifest": b"\x00" + manifest + tables,
        "project": b"\x01" + project + profiles,
        "policy": b"\x02" + render_policy(default_policy()),
        "report": b"\x03" + BETWEEN.join((said, b"\x02\0\0\0ok", counted)),
        "no-report": b"\x03" + BETWEEN.join((b"{}", b"ok", b"{[\n{}")),
    }


def one_input(data: bytes) -> None:
    """Check one input. Raises AssertionError, or any exception that the code under test must not raise."""
    if data:
        READERS[data[0] % len(READERS)](data[1:])
