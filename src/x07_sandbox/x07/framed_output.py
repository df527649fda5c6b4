"""What a program compiled by X07 and its runner say to each other over standard streams. Pure.

Input and output are framed: four bytes of length, little-endian, then exactly so many. What the program's runtime
counted is the last line of standard error that is a JSON object with a counter. All of it is hostile.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.host.decoding import prepared
from x07_sandbox.x07.protocol import HEAD_BYTES
from x07_sandbox.x07.runner_report import COUNTERS, FAILED_EXIT, CompileRunReport, SolveReport

NOT_FRAMED: Final = "stdout is not a length and exactly so many bytes"
NO_METRICS: Final = "stderr has no line of metrics"


# What X07's runtime counted; None for what it did not tell. Other keys of the line are nobody's business.
Metrics: Final = msgspec.defstruct(
    "Metrics",
    [(field.name, field.type, None) for field in msgspec.structs.fields(SolveReport) if field.name in COUNTERS],
    frozen=True,
)


def framed_output(stdout: bytes) -> bytes | None:
    """The program's output; None if standard output is anything else than one whole frame."""
    if len(stdout) < HEAD_BYTES or struct.unpack_from("<I", stdout)[0] != len(stdout) - HEAD_BYTES:
        return None
    return stdout[HEAD_BYTES:]


def find_metrics(stderr: bytes) -> dict[str, Any] | None:
    """All counters, as the last line that tells one has them."""
    for line in reversed(stderr.splitlines()):
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            found = msgspec.json.decode(line, type=prepared(Metrics))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if found != Metrics():
            return msgspec.structs.asdict(found)
    return None


def read_protocol(report: CompileRunReport) -> CompileRunReport:
    """The report of a program that speaks so: its output unpacked, its counters in their places.

    A program that ended well and did not keep to the protocol did not end well.
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
