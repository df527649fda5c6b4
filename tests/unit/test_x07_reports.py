"""X07's documents made from our results: closed schemas, and each outcome in them."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import msgspec
import pytest

from x07_sandbox.errors import RefusedError
from x07_sandbox.host.documents import render_json
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.policy.outcomes import OUTCOMES, ExitRule
from x07_sandbox.reports.commands import PolicyInitReport
from x07_sandbox.reports.schemas import schemas
from x07_sandbox.sessions.result import EMPTY_OUTPUT, BuildOutput, Changes, Digests, Output, PhaseReport, draft_result
from x07_sandbox.x07.runner_report import (
    Attestation,
    Attested,
    Built,
    CompileRunReport,
    SolveReport,
    Target,
    World,
    attest,
    failure_report,
    flat_report,
    network_mode,
    reference,
    runner_report,
    wrap,
)

if TYPE_CHECKING:
    from x07_sandbox.policy.denials import Outcome
    from x07_sandbox.sessions.result import Result

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {name: json.loads(text) for name, text in schemas().items()}
RUNNER = jsonschema.Draft202012Validator(PUBLISHED["x07-os-runner.report.schema.json"])
WRAPPED = jsonschema.Draft202012Validator(PUBLISHED["x07-run.report.schema.json"])
ATTEST = jsonschema.Draft202012Validator(PUBLISHED["x07-runtime.attest.schema.json"])
INIT = jsonschema.Draft202012Validator(PUBLISHED["x07-policy-init.report.schema.json"])

SANDBOXED: World = "run-os-sandboxed"
BUILT = Built(mode="compile-run", lang_id="c", size=17000)
POLICY_BYTES = render_policy(default_policy())
SHA = "sha256:" + "ab" * 32

# Written out as X07 has them, so that neither the types nor the schemas can forget one.
COMPILE_TEXT = """
ok exit_status lang_id native_requires c_source_size compiled_exe compiled_exe_size compile_error stdout_b64
stderr_b64 fuel_used trap
"""
SOLVE_TEXT = """
ok exit_status solve_output_b64 stdout_b64 stderr_b64 fuel_used heap_used fs_read_file_calls fs_list_dir_calls
rr_open_calls rr_close_calls rr_stats_calls rr_next_calls rr_next_miss_calls rr_append_calls kv_get_calls
kv_set_calls sched_stats mem_stats debug_stats trap
"""
ATTEST_TEXT = """
schema_version world sandbox_backend weaker_isolation artifact_path input_len_bytes guest_image_digest
effective_policy_digest network_mode network_enforcement allow_dns allow_tcp allow_udp effective_allow_hosts
effective_deny_hosts bundled_binary_digest compile_attestation_digest capsule_attestation_digests effect_log_digests
outcome
"""

COMPILE_KEYS, SOLVE_KEYS, ATTEST_KEYS = (set(text.split()) for text in (COMPILE_TEXT, SOLVE_TEXT, ATTEST_TEXT))


def output(data: bytes = b"", *, truncated: bool = False) -> Output:
    """A stream of a result."""
    return Output(bytes=len(data), truncated=truncated, base64=base64.b64encode(data).decode())


def ran(*marks: str) -> dict[str, PhaseReport]:
    """The phases of a run with these marks."""
    times = dict.fromkeys(marks, 1.0)
    report: dict[str, Any] = {"job_id": "1-2-3-run", "start": "clone", "outcome": "", "reason": "", "times_ms": times}
    report |= {"reason_code": "exited"}
    report |= {"stdout": EMPTY_OUTPUT, "stderr": EMPTY_OUTPUT, "cpu_ms": 0, "memory_peak_bytes": 0, "tasks_peak": 0}
    return {"run": PhaseReport(**report)}


def ended(outcome: Outcome, *, built: bool = True, **more: Any) -> Result:  # noqa: ANN401 - any field of a result
    """A result of this outcome. built: whether there is an artifact."""
    rule = OUTCOMES[outcome].exit
    code = rule if isinstance(rule, int) else {ExitRule.PROGRAM: 0, ExitRule.SIGNAL: 139}.get(rule, 130)
    policy = f"sha256:{hashlib.sha256(POLICY_BYTES).hexdigest()}"
    fields: dict[str, Any] = {
        "outcome": outcome,
        "reason": f"because of {outcome}",
        "x07_exit_code": code,
        "phases": ran("hello", "seeded", "started"),
        "digests": Digests(image=SHA, policy=policy, artifact=SHA if built else None),
    }
    return msgspec.structs.replace(draft_result("1-2-3"), **(fields | more))


def document(report: CompileRunReport) -> dict[str, Any]:
    """The report as JSON, checked to be complete and valid."""
    text = render_json(report)
    assert text.endswith(b"}\n")
    assert text.startswith(b'{\n  "')
    made: dict[str, Any] = json.loads(text)
    RUNNER.validate(made)
    assert set(made) - {"runtime_attestation"} == {
        "schema_version",
        "mode",
        "world",
        "sandbox_backend",
        "exit_code",
        "compile",
        "solve",
    }
    assert set(made["compile"]) == COMPILE_KEYS
    assert made["solve"] is None or set(made["solve"]) == SOLVE_KEYS
    assert made["sandbox_backend"] == "vm"
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schemas_are_those_of_the_types(name: str) -> None:
    """Every file in schemas/ is generated from its type and valid."""
    renew = "run: python -m x07_sandbox.reports.schemas schemas"
    assert {path.name for path in (ROOT / "schemas").iterdir()} == set(PUBLISHED), renew
    assert (ROOT / "schemas" / name).read_text(encoding="utf-8") == schemas()[name], renew
    jsonschema.Draft202012Validator.check_schema(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schemas_are_closed(name: str) -> None:
    """Published schemas allow no unknown keys and require the version."""
    for title, schema in PUBLISHED[name]["$defs"].items():
        assert schema["additionalProperties"] is False, title
        assert "schema_version" not in schema["properties"] or "schema_version" in schema["required"], title


def test_a_program_that_ended_well() -> None:
    """A successful program gives X07's success report with its output."""
    data = b"\x00\xff three\n"
    result = ended("ok", exit_code=0, stdout=output(data), stderr=output(b"talk"))
    made = document(runner_report(result, BUILT))
    assert made["exit_code"] == 0
    assert made["mode"] == "compile-run"
    assert made["world"] == SANDBOXED
    solve, compiled = made["solve"], made["compile"]
    assert base64.b64decode(solve["solve_output_b64"], validate=True) == data
    assert base64.b64decode(solve["stdout_b64"], validate=True) == data
    assert base64.b64decode(solve["stderr_b64"], validate=True) == b"talk"
    assert (solve["ok"], solve["exit_status"], solve["trap"]) == (True, 0, None)
    assert all(solve[key] is None for key in SOLVE_KEYS if key.endswith(("_calls", "_stats", "_used")))
    assert (compiled["ok"], compiled["lang_id"], compiled["exit_status"]) == (True, "c", 0)
    assert (compiled["compiled_exe"], compiled["compiled_exe_size"]) == ("/x07/out/compiled-out", 17000)
    assert compiled["native_requires"] == {"schema_version": "x07.native-requires@0.1.0", "requires": []}


def test_a_cached_build_reports_its_output() -> None:
    """A cached build reports the compiler's original output."""
    printed = BuildOutput(stdout=output(), stderr=output(b"prog.c:1: warning: unused\n"))
    now = ended("ok", exit_code=0, artifact_from="build", build=printed)
    kept = ended("ok", exit_code=0, artifact_from="cache", build=printed)
    assert document(runner_report(now, BUILT))["compile"] == document(runner_report(kept, BUILT))["compile"]
    encoded = document(runner_report(kept, BUILT))["compile"]["stderr_b64"]
    assert base64.b64decode(encoded) == b"prog.c:1: warning: unused\n"


def test_a_failed_build_is_reported() -> None:
    """A compile error is reported with the compiler's output and status."""
    result = ended("build-failed", built=False, exit_code=1, stderr=output(b"prog.c:3: error: expected ';'\n"))
    made = document(runner_report(result, BUILT))
    assert made["exit_code"] == 1
    assert made["solve"] is None
    compiled = made["compile"]
    assert (compiled["ok"], compiled["exit_status"], compiled["trap"]) == (False, 1, None)
    assert compiled["compile_error"] == "because of build-failed"
    assert b"expected ';'" in base64.b64decode(compiled["stderr_b64"])
    assert compiled["compiled_exe"] is None
    assert compiled["compiled_exe_size"] is None


def test_a_compiler_that_was_ended_has_a_trap() -> None:
    """A compiler that was killed is reported with a trap."""
    made = document(runner_report(ended("build-failed", built=False), BUILT))
    assert made["compile"]["trap"] == "because of build-failed"
    assert made["compile"]["exit_status"] != 0


@pytest.mark.parametrize(
    ("outcome", "more", "status", "trap"),
    [
        ("failed", {"exit_code": 3, "stderr": output(b'first\nthe end\n{"fuel": 1}\n\n')}, 3, "the end"),
        ("failed", {"exit_code": 3}, 3, None),
        ("failed", {"exit_code": 127, "phases": ran("hello", "seeded")}, 127, "because of failed"),
        ("failed", {"exit_code": 3, "stderr": output(b"[" * 100_000 + b"\n")}, 3, "[" * 1000),
        ("signalled", {"signal": 11}, 139, "terminated by signal 11"),
        ("timeout", {}, 124, "timed out"),
        ("cpu-limit", {"signal": 9}, 124, "because of cpu-limit"),
        ("oom", {"signal": 9}, 137, "because of oom"),
        ("output-limit", {"stdout": output(b"x", truncated=True)}, 153, "stdout exceeded cap"),
        ("output-limit", {"stderr": output(b"x", truncated=True)}, 153, "stderr exceeded cap"),
        ("guest-lost", {}, 125, "vm backend failure: because of guest-lost"),
        ("backend-error", {}, 125, "vm backend failure: because of backend-error"),
        ("cancelled", {"signal": 2}, 130, "because of cancelled"),
    ],
)
def test_every_outcome_has_a_status_and_trap(
    outcome: Outcome, more: dict[str, Any], status: int, trap: str | None
) -> None:
    """Every outcome of a built program has X07's status and trap."""
    made = document(runner_report(ended(outcome, **more), BUILT))
    assert made["exit_code"] == 1
    assert made["compile"]["ok"] is True
    assert (made["solve"]["ok"], made["solve"]["exit_status"], made["solve"]["trap"]) == (False, status, trap)


@pytest.mark.parametrize("outcome", ["refused", "backend-error", "guest-lost", "internal-error", "cancelled"])
def test_a_missing_vm_is_a_setup_failure(outcome: Outcome) -> None:
    """A VM that could not start is reported as a set-up failure."""
    result = ended(outcome, built=False, reason="no machine \udc80 for you")
    made = document(runner_report(result, BUILT))
    compiled = made["compile"]
    assert made["solve"] is None
    assert (made["exit_code"], compiled["ok"], compiled["exit_status"]) == (1, False, 1)
    message = r"no machine \x80 for you"  # spelt out: half of a pair is no text
    assert compiled["compile_error"] == message
    assert base64.b64decode(compiled["stderr_b64"]) == message.encode()
    assert compiled["trap"] == f"vm backend failure: {message}"


def test_no_outcome_but_ok_is_a_success() -> None:
    """Only `ok` is reported as a success."""
    for outcome in OUTCOMES:
        made = document(runner_report(ended(outcome, exit_code=0 if outcome == "ok" else None), BUILT))
        assert (made["exit_code"] == 0) is (outcome == "ok"), outcome
        assert (made["solve"] is not None and made["solve"]["ok"]) is (outcome == "ok"), outcome


def test_unapplied_changes_are_no_success() -> None:
    """A run whose changes were not applied is reported as a failure with the reason."""
    changes = Changes(state="conflict", reason="data/in.txt is another", added=1)
    result = ended("ok", exit_code=0, x07_exit_code=125, changes=changes)
    made = document(runner_report(result, BUILT))
    assert (made["exit_code"], made["solve"]["ok"], made["solve"]["exit_status"]) == (1, False, 0)
    assert made["solve"]["trap"] == "its changes to files were not applied: data/in.txt is another"


def test_a_report_of_an_artifact_is_flat() -> None:
    """The report of an artifact has the fields of `solve` at the top level."""
    endings: tuple[tuple[Outcome, bool], ...] = (("refused", False), ("timeout", True), ("ok", True))
    for outcome, built in endings:
        report = runner_report(ended(outcome, built=built, exit_code=0 if outcome == "ok" else None), BUILT)
        flat: dict[str, Any] = json.loads(render_json(flat_report(report)))
        RUNNER.validate(flat)
        assert set(flat) == {"schema_version", "mode", "world", "sandbox_backend", "exit_code", *SOLVE_KEYS}
        assert (flat["mode"], flat["exit_code"], flat["ok"]) == ("run-os", report.exit_code, outcome == "ok")
        assert bool(flat["trap"]) is (outcome != "ok")
        assert report.solve is None or flat.items() > json.loads(render_json(report.solve)).items()


def test_wrapped_holds_the_report_unchanged() -> None:
    """The wrapped report contains the runner's report unchanged."""
    report = runner_report(ended("failed", exit_code=3), BUILT)
    target = Target(kind="program", path="prog.c", project_root=None, lockfile=None, resolved_module_roots=[])
    made = json.loads(render_json(wrap(report, target)))
    WRAPPED.validate(made)
    assert made["schema_version"] == "x07.run.report@0.3.0"
    assert (made["runner"], made["world"]) == ("os", SANDBOXED)
    assert made["report"] == json.loads(render_json(report))


def solved(result: Result) -> SolveReport:
    """The `solve` part of a result."""
    solve = runner_report(result, BUILT).solve
    assert solve is not None
    return solve


def given(**changes: Any) -> Attested:  # noqa: ANN401 - any field
    """The inputs of a run under the default policy."""
    fields: dict[str, Any] = {
        "policy": default_policy(),
        "policy_bytes": POLICY_BYTES,
        "policy_path": "policy.json",
        "artifact_path": "/x07/in/artifact",
        "input_len_bytes": 5,
        "weaker_isolation": False,
    }
    return Attested(**(fields | changes))


def test_an_attestation_names_denied_hosts() -> None:
    """An attestation lists hosts denied by --deny-host."""
    result = ended("ok")
    attested = attest(result, solved(result), given(denied={"b.example": {443, 80}, "a.example": None}))
    made = json.loads(render_json(attested))
    ATTEST.validate(made)
    assert made["effective_deny_hosts"] == [
        {"host": "b.example", "ports": [80, 443]},
        {"host": "a.example", "ports": []},
    ]


@pytest.mark.parametrize(("outcome", "code"), [("ok", 0), ("failed", 3)])
def test_an_attestation_names_what_ran(outcome: Outcome, code: int) -> None:
    """An attestation has the digests of image, policy and executable."""
    result = ended(outcome, exit_code=code, stderr=output(b"sorry\n"))
    attested = attest(result, solved(result), given())
    made = json.loads(render_json(attested))
    ATTEST.validate(made)
    assert set(made) == ATTEST_KEYS | {"policy_path"}
    assert made["effective_policy_digest"] == f"sha256:{hashlib.sha256(POLICY_BYTES).hexdigest()}"
    assert made["guest_image_digest"] == made["bundled_binary_digest"] == SHA
    assert (made["network_mode"], made["network_enforcement"]) == ("disabled", "none")
    assert (
        made["outcome"] == {"ok": True, "exit_status": 0}
        if code == 0
        else {"ok": False, "exit_status": 3, "trap": "sorry"}
    )
    report = msgspec.structs.replace(
        runner_report(result, BUILT), runtime_attestation=reference("attest.json", attested)
    )
    assert document(report)["runtime_attestation"] == {
        "path": "attest.json",
        "sandbox_backend": "vm",
        "weaker_isolation": False,
        "network_mode": "disabled",
        "network_enforcement": "none",
    }


def test_a_policy_that_changed_is_not_attested() -> None:
    """A changed policy is not attested, with X07's error code."""
    result = ended("ok", exit_code=0)
    with pytest.raises(RefusedError, match="X07RA_EPOLICY_DIGEST"):
        attest(result, solved(result), given(policy_bytes=POLICY_BYTES + b"\n"))


def test_an_unknown_image_is_not_attested() -> None:
    """An unknown image is not attested, with X07's error code."""
    result = ended("ok", exit_code=0)
    nameless = msgspec.structs.replace(result, digests=msgspec.structs.replace(result.digests, image=None))
    with pytest.raises(RefusedError, match="X07RA_EGUEST_DIGEST"):
        attest(nameless, solved(result), given())


@pytest.mark.parametrize(
    ("enabled", "hosts", "mode"),
    [
        (False, [], "none"),
        (True, [], "disabled"),
        (True, [{"host": "example.org", "ports": [443]}], "allowlist"),
    ],
)
def test_the_network_mode_is_x07s(enabled: bool, hosts: list[object], mode: str) -> None:  # noqa: FBT001 - a row
    """The network mode is X07's: `none`, `disabled` or `allowlist`."""
    document = msgspec.to_builtins(default_policy())
    document["net"] |= {"enabled": enabled, "allow_hosts": hosts}
    policy = decode_policy(render_policy(document), source="test")
    assert network_mode(policy) == mode
    result = ended("ok", exit_code=0)
    made: Attestation = attest(result, solved(result), given(policy=policy))
    ATTEST.validate(json.loads(render_json(made)))
    assert made.network_enforcement == ("vm_boundary_allowlist" if mode == "allowlist" else "none")


def test_the_report_of_policy_init_has_x07s_keys_in_x07s_order() -> None:
    """The report of `x07 policy init` has X07's keys in X07's order."""
    report = PolicyInitReport(
        template="worker-parallel", project_root="/p", out="policy.json", status="created", policy_id="a.b"
    )
    made = msgspec.to_builtins(report)
    assert list(made) == ["schema_version", "template", "project_root", "out", "status", "policy_id"]
    INIT.validate(made)


def test_a_failure_without_a_result_has_the_same_shape() -> None:
    """A failure before any run gives a valid report."""
    made = document(failure_report("no", mode="project-compile-run", world="run-os", lang_id="x07"))
    assert (made["mode"], made["world"], made["exit_code"]) == ("project-compile-run", "run-os", 1)
