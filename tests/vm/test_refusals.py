"""Runs refused before any machine starts, and their messages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import x07
from tests.published import document
from x07_sandbox import Pool, SandboxError, run_program
from x07_sandbox.errors import RefusedError
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.records.runs import runs_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.images.store import Image

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 4096
DRIVERS = {"sqlite": True, "postgres": False, "mysql": False, "redis": True}

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]


def _run(tmp_path: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run `x07 run --json` with its own state folder, and return exit code and result."""
    done = x07(Path.cwd(), "run", "--json", *words, env={"X07_VM_STATE_DIR": str(tmp_path / "jobs")} | environment)
    return done.code, json.loads(done.out)


def _policy(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(render_policy(default_policy()))
    change(document)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def _no_machine(tmp_path: Path) -> bool:
    """Return whether no job was created, except to test KVM: some failures are tried again after minutes."""
    return {record.parent.name.rpartition("-")[2] for record in tmp_path.glob("jobs/*/job.json")} <= {"probe"}


PROGRAM = str(ROOT / "examples/jsonl_to_csv.py")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("fs.read_roots", lambda p: p["fs"].update(read_roots=["/usr"])),
        ("fs.write_roots", lambda p: p["fs"].update(write_roots=[".."])),
        ("db.enabled", lambda p: p.update(db={"enabled": True, "drivers": DRIVERS})),
    ],
)
def test_an_unsatisfiable_policy_is_refused(
    tmp_path: Path, field: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """A policy with a root or database access that cannot be provided is refused, and the result names the field."""
    code, result = _run(tmp_path, "--policy", _policy(tmp_path, change), PROGRAM)
    assert (code, result["outcome"]) == (125, "refused")
    assert field in result["reason"]
    assert [denial for denial in result["denials"] if denial["field"] == field and denial["how_to_allow"]]
    assert _no_machine(tmp_path)


def test_the_derived_policy_is_saved_with_the_run(tmp_path: Path) -> None:
    """A run saves the policy derived from its flags as policy.json, and the result has its digest."""
    accepted = {"X07_SANDBOX_BACKEND": "os", "X07_I_ACCEPT_WEAKER_ISOLATION": "1"}
    _, result = _run(tmp_path, "--allow-host", "example.org:443", PROGRAM, **accepted)
    kept = (runs_dir(tmp_path / "jobs") / result["run"] / "policy.json").read_bytes()
    assert result["digests"]["policy"] == f"sha256:{hashlib.sha256(kept).hexdigest()}"
    assert decode_policy(kept, source="kept").policy_id.startswith("sandbox.default.base.g")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["x" * 131_072], "one is over 131072 bytes"),
        (["x" * 100_000] * 16, "all together are over 1572864"),
        (["a\0b"], "argument 1 contains a NUL byte"),
        (["a", 3], "argument 2 is not a string"),
    ],
)
def test_arguments_that_execve_rejects_are_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], why: str
) -> None:
    """Arguments that execve(2) does not accept are a usage error, before any machine starts."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with pytest.raises(SandboxError, match=why) as caught:
        run_program(PROGRAM, args)
    assert (caught.value.result.outcome, caught.value.result.x07_exit_code) == ("usage-error", 2)
    assert _no_machine(tmp_path)


def test_an_unknown_option_names_the_commands_help() -> None:
    """An unknown option of `x07 run` is a usage error that names `x07 run --help`."""
    done = x07(Path.cwd(), "run", "--json", PROGRAM, "--bogus")
    assert (done.code, json.loads(done.out)["outcome"]) == (2, "usage-error")
    assert b"See x07 run --help" in done.out


def test_without_an_image_the_command_to_build_one_is_named(tmp_path: Path) -> None:
    """A run without an image and a terminal is refused, and names the command that builds one."""
    code, result = _run(tmp_path, PROGRAM, X07_VM_CACHE_DIR=str(tmp_path / "cache"))
    assert (code, result["outcome"]) == (125, "refused")
    assert "x07 image build" in result["reason"]


def test_an_image_is_found_by_its_digest(tmp_path: Path, image: Image) -> None:
    """`--image` accepts a digest, and the result of at most 4 KiB names the digest of the image that ran."""
    variables = {"X07_VM_STATE_DIR": str(tmp_path / "jobs")}
    done = x07(tmp_path, "run", "--json", "--image", image.digest, PROGRAM, env=variables)
    assert len(done.out) <= MOST_BYTES
    short = document(done.out)
    assert (done.code, short["outcome"], short["digests"]["image"]) == (0, "ok", image.digest)
    kept = json.loads((runs_dir(tmp_path / "jobs") / short["run"] / "result.json").read_bytes())
    omitted = short["controls_omitted"]
    assert len(kept["controls"]) == len(short["controls"]) + omitted["enforced"] + len(omitted["advisory"])


def test_a_pool_refuses_an_image_that_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image
) -> None:
    """A pool refuses an image other than X07_VM_GUEST_IMAGE_DIGEST, and boots nothing."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.setenv("X07_VM_GUEST_IMAGE_DIGEST", pinned := "sha256:" + "a" * 64)
    with pytest.raises(RefusedError, match=f"is {pinned}, but the image's digest is {image.digest}"):
        Pool(size=1)
    assert _no_machine(tmp_path)
