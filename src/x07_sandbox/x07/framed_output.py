"""Decode the output of a program that X07 compiled. No I/O.

The output is a frame: four bytes of length, little-endian, then the data. The counters of the program's runtime are in
the last line of standard error that is a JSON object with a counter. All of it is hostile data.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.host.decoding import known
from x07_sandbox.x07.protocol import HEAD_BYTES
from x07_sandbox.x07.runner_report import COUNTERS, FAILED_EXIT, CompileRunReport, SolveReport

NOT_FRAMED: Final = "stdout is not one complete frame"
NO_METRICS: Final = "stderr has no line of metrics"


# The counters of X07's runtime; None if missing. Other keys are ignored.
Metrics: Final = msgspec.defstruct(
    "Metrics",
    [(field.name, field.type, None) for field in msgspec.structs.fields(SolveReport) if field.name in COUNTERS],
    frozen=True,
)


def framed_output(stdout: bytes) -> bytes | None:
    """Return the program's output; None if standard output is not exactly one frame."""
    if len(stdout) < HEAD_BYTES or struct.unpack_from("<I", stdout)[0] != len(stdout) - HEAD_BYTES:
        return None
    return stdout[HEAD_BYTES:]


def find_metrics(stderr: bytes) -> dict[str, Any] | None:
    """Return all counters from the last line that has one."""
    for line in reversed(stderr.splitlines()):
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            found = msgspec.json.decode(line, type=known(Metrics))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if found != Metrics():
            return msgspec.structs.asdict(found)
    return None


def read_protocol(report: CompileRunReport) -> CompileRunReport:
    """Return the report with the output unpacked and the counters filled in.

    A program that exited with 0 but broke the protocol has failed.
    """
    if report.solve is None:
        return report
    solve = _read(report.solve)
    good = report.compile.ok and solve.ok and solve.exit_status == 0
    return replace(report, solve=solve, exit_code=0 if good else FAILED_EXIT)


def _read(solve: SolveReport) -> SolveReport:
    output = framed_output(solve.stdout_b64)
    metrics = find_metrics(solve.stderr_b64)
    trap = solve.trap
    if trap is None and solve.ok:
        trap = NOT_FRAMED if output is None else NO_METRICS if metrics is None else None
    return replace(solve, ok=solve.ok and trap is None, solve_output_b64=output or b"", trap=trap, **(metrics or {}))
