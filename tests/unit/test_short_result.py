"""`x07 run --json` prints a short result, `--json=full` every control."""

from __future__ import annotations

import hashlib
import json

import pytest
from msgspec.structs import replace

from tests.published import document
from x07_sandbox.backends.podman import EngineBackend
from x07_sandbox.cli import main
from x07_sandbox.cli.parser import parser_for
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.features import Isolation, vm_features
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.result import Result, draft_result

CHANGED = "limits.cpu_ms"


def _with_controls(*, isolation: Isolation = "vm-emulated", spawn: bool = True) -> Result:
    """A result with the controls of the built-in policy, or of one without child processes."""
    policy = default_policy()
    policy = replace(policy, process=replace(policy.process, allow_spawn=spawn))
    plan = make_plan(
        policy, EngineBackend("podman").least_features() if isolation == "container" else vm_features(isolation)
    )
    return replace(draft_result("1-1-0"), outcome="ok", controls=list(plan.controls))


@pytest.mark.parametrize("isolation", ["vm-emulated", "vm-hardware", "container"])
def test_the_short_result_accounts_for_every_control(isolation: Isolation) -> None:
    """The short result lists, names or counts every control."""
    result = _with_controls(isolation=isolation)
    short, full = (document(render_result(result, full=full)) for full in (False, True))
    omitted = short["controls_omitted"]
    listed = {control["field"] for control in short["controls"]}
    assert omitted["enforced"] + len(omitted["advisory"]) + len(listed) == len(full["controls"]) > 80
    advisory = {control["field"] for control in full["controls"] if control["state"] == "advisory"}
    assert advisory <= {*omitted["advisory"], *listed}
    gone = [control for control in full["controls"] if control["field"] not in listed]
    assert omitted["digest"] == f"sha256:{hashlib.sha256(json.dumps(gone, separators=(',', ':')).encode()).hexdigest()}"


def test_a_control_that_differs_from_the_built_in_policy_is_listed() -> None:
    """The short result lists every control that differs from the built-in policy."""
    result = _with_controls(spawn=False)
    usual = {control.field: control for control in _with_controls().controls}
    changed = {control.field for control in result.controls if control != usual[control.field]}
    refused = replace(usual[CHANGED], state="refused", why="not held here")
    controls = [refused if control.field == CHANGED else control for control in result.controls]
    short = document(render_result(replace(result, controls=controls), full=False))
    assert {control["field"] for control in short["controls"]} == {*changed, CHANGED}
    assert {"field": CHANGED, "state": "refused", "by": refused.by, "why": "not held here"} in short["controls"]
    assert changed


def test_the_full_result_is_the_library_s() -> None:
    """`--json=full` lists every control."""
    result = _with_controls()
    full = document(render_result(result, full=True))
    assert [control["field"] for control in full["controls"]] == [control.field for control in result.controls]
    assert "controls_omitted" not in full


@pytest.mark.parametrize(
    ("words", "json_value", "program"),
    [
        (["run", "--json", "prog.py"], True, "prog.py"),
        (["run", "--json=full", "prog.py"], "full", "prog.py"),
        (["--json=full", "run", "prog.py"], "full", "prog.py"),
        (["--json=pretty", "run", "prog.py"], True, "prog.py"),
        (["run", "prog.py", "--", "--json=full"], False, "prog.py"),
    ],
)
def test_json_consumes_no_further_word(words: list[str], json_value: object, program: str) -> None:
    """`--json` never consumes the next word."""
    words = main._verb_first(words)  # noqa: SLF001 - what main does with them first
    options = parser_for(words).parse_args(words)
    assert (options.json, options.program) == (json_value, program)


def test_an_error_with_json_full_is_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    """A usage error under `--json=full` is one JSON object."""
    assert main.main(["run", "--json=full", "no-such-file.py"]) == 2
    assert document(capfd.readouterr().out)["outcome"] == "usage-error"
