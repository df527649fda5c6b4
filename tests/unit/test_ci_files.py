"""The workflow and the composite action: existing references, pinned actions, valid syntax."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

ROOT: Final = Path(__file__).resolve().parents[2]
WORKFLOW: Final = ROOT / ".github" / "workflows" / "ci-vm.yml"
ACTION: Final = ROOT / "action.yml"
FILES: Final = [*sorted(WORKFLOW.parent.glob("*.yml")), ACTION]
EACH: Final = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
TOOLS: Final = Path(sys.executable).parent


def load(path: Path) -> Any:  # noqa: ANN401 - a document of whatever kind
    """The YAML document in a file."""
    return YAML(typ="safe").load(path)


def steps(document: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - as above
    """Every step of a workflow or an action."""
    jobs = document["jobs"].values() if "jobs" in document else [document["runs"]]
    for job in jobs:
        yield from job["steps"]


@EACH
def test_actions_of_others_are_pinned_by_their_commit(path: Path) -> None:
    """Every third-party action is pinned by its commit hash, with its version in a comment."""
    used = [step["uses"] for step in steps(load(path)) if "uses" in step]
    assert used
    text = path.read_text(encoding="utf-8")
    for name in used:
        assert name == "./" or re.search(rf"{re.escape(name)} # v\d+\.\d+\.\d+$", text, re.MULTILINE), name
        assert name == "./" or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name), name


@EACH
def test_scripts_named_by_ci_files_exist(path: Path) -> None:
    """Every script and requirements file named by a workflow or action exists, and scripts are executable."""
    named = set(re.findall(r"(?<![\w.])(?:scripts|requirements)/[\w./-]+", path.read_text(encoding="utf-8")))
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name
        assert (ROOT / name).suffix != ".sh" or (ROOT / name).stat().st_mode & 0o111, name


def test_the_workflow_has_the_self_hosted_runners_of_x07() -> None:
    """The workflow has jobs for both X07 runner labels and for hosted runners with and without KVM."""
    jobs = load(WORKFLOW)["jobs"]
    labels = {tuple(job["runs-on"]) for job in jobs.values() if not isinstance(job["runs-on"], str)}
    assert labels == {("self-hosted", "x07-vm-linux-firecracker"), ("self-hosted", "x07-vm-macos")}
    hosted = [job for job in jobs.values() if isinstance(job["runs-on"], str)]
    assert sorted(job.get("env", {}).get("X07_VM_REQUIRE_HARDWARE", "0") for job in hosted) == ["0", "1"]


@pytest.mark.parametrize(
    ("job", "variables", "commands"),
    [
        (
            "linux-vm",
            {"X07_VM_BACKEND": "firecracker-ctr", "X07_VM_GUEST_IMAGE": "x07-guest-runner:vm-smoke"},
            [
                "scripts/setup.sh",
                "build_guest_runner_image.sh --image x07-guest-runner --tag vm-smoke --archive build/guest.tar",
                "images import --snapshotter",
            ],
        ),
        (
            "macos-vm",
            {
                "X07_VM_BACKEND": "vz",
                "X07_VM_VZ_GUEST_BUNDLE": "${{ github.workspace }}/build/guest.bundle",
                "X07_VM_VZ_HELPER_BIN": "${{ github.workspace }}/build/x07-vz-helper",
            },
            [
                "build_vz_helper.sh build/x07-vz-helper",
                "build_vz_guest_bundle.sh --image default --out /source/build/guest.bundle",
                "pip install",
            ],
        ),
    ],
)
def test_self_hosted_jobs_make_what_their_backend_needs(
    job: str, variables: dict[str, str], commands: list[str]
) -> None:
    """Each self-hosted job installs x07, makes what its backend starts from, and then runs the smoke gate."""
    made = load(WORKFLOW)["jobs"][job]
    assert made["env"] == variables
    lines = [step.get("run", "") for step in made["steps"]]
    places = [next(at for at, line in enumerate(lines) if command in line) for command in commands]
    assert places == sorted(places)
    assert lines[-1] == "scripts/ci/check_vm_sandbox_smoke.sh"


def test_shell_steps_are_valid(tmp_path: Path, need: Need) -> None:
    """Shellcheck finds nothing in the shell steps of the workflow and the action."""
    need(Path("/usr/bin/shellcheck").exists(), "shellcheck", installable=True)
    texts = [step["run"] for path in FILES for step in steps(load(path)) if "run" in step]
    files = [str(tmp_path / f"{number}.sh") for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        Path(file).write_text(text, encoding="utf-8")
    # SC1091: files of the system are not read.
    argv = ["/usr/bin/shellcheck", "--shell=bash", "--exclude=SC1091", *files]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_gate_runs_in_the_bash_of_macos() -> None:
    """The scripts that run on a Mac use nothing newer than bash 3.2."""
    newer = re.compile(r"mapfile|readarray|declare -[An]|local -n|wait -n|\|&|&>>|\$\{\w+(?:\^|,,|@)|[@?+*!]\([a-z]")
    for name in ("ci/check_vm_sandbox_smoke.sh", "build_vz_helper.sh"):
        lines = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if newer.search(line) and not line.lstrip().startswith("#")] == []


def test_the_workflow_has_few_rights_and_ends() -> None:
    """Every workflow job has read-only permissions, a timeout and no persisted token."""
    document = load(WORKFLOW)
    assert document["permissions"] == {}
    assert "pull_request_target" not in document["on"]
    for job in document["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 90
        assert "self-hosted" not in job["runs-on"] or "workflow_dispatch" in job["if"]
    for step in steps(document):
        assert "checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False


def test_inputs_are_not_expanded_in_shell_steps() -> None:
    """Inputs reach shell steps only through environment variables."""
    for path in FILES:
        for step in steps(load(path)):
            assert "${{" not in step.get("run", ""), path


def test_every_input_of_the_action_is_described_and_used() -> None:
    """Every input of the action is described, used, and documented in the how-to."""
    action = load(ACTION)
    page = (ROOT / "docs" / "how-to" / "run-in-ci.md").read_text(encoding="utf-8")
    text = ACTION.read_text(encoding="utf-8")
    assert action["inputs"]
    for name, row in {**action["inputs"], **action["outputs"]}.items():
        assert row["description"]
        assert f"`{name}`" in page, name
    for name, row in action["inputs"].items():
        assert isinstance(row["default"], str)
        assert f"inputs.{name}" in text, name


@pytest.mark.parametrize(
    ("schema", "path"),
    [("vendor.github-workflows", WORKFLOW), ("vendor.github-actions", ACTION)],
    ids=["workflow", "action"],
)
def test_ci_files_match_githubs_schemas(schema: str, path: Path, tmp_path: Path) -> None:
    """The workflow and the action are valid by GitHub's schemas, which reject a misspelt key."""
    argv = [str(TOOLS / "check-jsonschema"), "--builtin-schema", schema]
    good = subprocess.run([*argv, path], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout
    broken = tmp_path / path.name
    broken.write_text(path.read_text(encoding="utf-8").replace("steps:", "step:"), encoding="utf-8")
    assert subprocess.run([*argv, broken], capture_output=True, check=False).returncode == 1


def test_zizmor_finds_nothing_unsafe(tmp_path: Path) -> None:
    """Zizmor finds nothing unsafe in the CI files, and does report an unpinned action."""
    argv = [str(TOOLS / "zizmor"), "--offline", "--no-progress", "--strict-collection"]
    good = subprocess.run([*argv, ".github", "action.yml"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout
    text = re.sub(r"(actions/cache)@.*", r"\1@v5", ACTION.read_text(encoding="utf-8"))
    (tmp_path / "action.yml").write_text(text, encoding="utf-8")
    assert subprocess.run([*argv, "action.yml"], cwd=tmp_path, capture_output=True, check=False).returncode != 0
