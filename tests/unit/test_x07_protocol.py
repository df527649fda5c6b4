"""The protocol of compiled X07 programs: framed input and output, counters on standard error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.fuzz.fuzz_documents import BUILT, result
from x07_sandbox.host.documents import render_json
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.x07.project import PROTOCOL
from x07_sandbox.x07.runner_report import (
    NO_METRICS,
    NOT_FRAMED,
    CompileRunReport,
    find_metrics,
    framed_output,
    read_protocol,
    runner_report,
)

COUNTED = b'{"fuel_used": 12, "heap_used": 3, "debug_stats": {"borrow_violations": 0}, "later": [1]}'
VALIDATOR = Draft202012Validator(json.loads(schemas()["x07-os-runner.report.schema.json"]))


def report(stdout: bytes, stderr: bytes, code: int = 0) -> CompileRunReport:
    """The report of a program that ended with these streams."""
    return runner_report(result(b"", stdout, stderr, code), BUILT)


def checked(made: CompileRunReport) -> dict[str, Any]:
    """The report as JSON, checked against the schema."""
    document: dict[str, Any] = json.loads(render_json(made))
    VALIDATOR.validate(document)
    return document


@given(st.binary(max_size=300), st.binary(max_size=5))
def test_a_frame_is_exactly_its_length(data: bytes, more: bytes) -> None:
    """A frame of exactly its length is decoded; any other is not."""
    frame = PROTOCOL.frame_input(data)
    assert framed_output(frame) == data
    assert framed_output(frame + more) == (data if not more else None)
    assert framed_output(frame[:-1]) is None
    assert framed_output(b"") is None


@given(st.lists(st.sampled_from([COUNTED, b"talk", b"{", b"[1]", b"{}", b'{"fuel_used": -1}', b"\xff{", b'{"x":1}'])))
def test_the_last_line_with_a_counter_holds_the_metrics(lines: list[bytes]) -> None:
    """The last valid line of counters holds the metrics."""
    found = find_metrics(b"\n".join(lines))
    assert (found is not None) is (COUNTED in lines)
    assert found is None or (found["fuel_used"], found["heap_used"], found["kv_get_calls"]) == (12, 3, None)


@given(st.binary(max_size=400), st.binary(max_size=400), st.sampled_from([0, 3]))
def test_any_program_gets_a_valid_report(stdout: bytes, stderr: bytes, code: int) -> None:
    """Any output gives a valid report, and only a complete protocol is a success."""
    document = checked(read_protocol(report(stdout, stderr, code)))
    good = code == 0 and framed_output(stdout) is not None and find_metrics(stderr) is not None
    assert (document["exit_code"] == 0) is document["solve"]["ok"] is good


@pytest.mark.parametrize(
    ("stdout", "stderr", "trap"),
    [
        (PROTOCOL.frame_input(b"out"), COUNTED, None),
        (PROTOCOL.frame_input(b"out") + b"x", COUNTED, NOT_FRAMED),
        (b"out", COUNTED, NOT_FRAMED),
        (PROTOCOL.frame_input(b"out"), b"no counters\n", NO_METRICS),
    ],
)
def test_a_program_that_breaks_the_protocol_is_trapped(stdout: bytes, stderr: bytes, trap: str | None) -> None:
    """A program that breaks the protocol fails with a trap that says why."""
    document = checked(read_protocol(report(stdout, stderr)))
    assert document["solve"]["trap"] == trap
    assert document["solve"]["fuel_used"] == (12 if stderr == COUNTED else None)


def test_deep_nesting_is_no_metrics() -> None:
    """A deeply nested line is no metrics."""
    assert find_metrics(b'{"fuel_used":' + b"[" * 100_000 + b"\n" + COUNTED) is not None
    assert find_metrics(COUNTED + b"\n" + b'{"fuel_used":' + b"[" * 100_000) is not None
