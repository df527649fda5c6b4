"""The composite action's shell steps, run in order on this machine as a CI runner does."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from ruamel.yaml import YAML

from x07_sandbox.host.paths import cache_dir

if TYPE_CHECKING:
    from tests.conftest import Need
    from x07_sandbox.images.store import Image

ROOT: Final = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.vm


class Runner:
    """Runs the action as GitHub's runner does: expressions, step outputs, one bash per step."""

    def __init__(self, work: Path, **inputs: str) -> None:
        self.action: dict[str, Any] = YAML(typ="safe").load(ROOT / "action.yml")
        self.values = {f"inputs.{name}": row["default"] for name, row in self.action["inputs"].items()}
        self.values |= {f"inputs.{name}": text for name, text in inputs.items()}
        self.work = work
        self.output = ""

    def run(self) -> int:
        """Run every shell step, up to the first that fails; return its exit code."""
        for step in self.action["runs"]["steps"]:
            if "run" in step and (code := self.step(step)):
                return code
        return 0

    def named(self, name: str) -> int:
        """Run the step with this id; return its exit code."""
        return self.step(next(step for step in self.action["runs"]["steps"] if step.get("id") == name))

    def step(self, step: dict[str, Any]) -> int:
        """Run one step; return its exit code."""
        outputs = self.work / "outputs"
        outputs.write_text("")
        variables = {"GITHUB_ACTION_PATH": str(ROOT), "GITHUB_OUTPUT": str(outputs), "RUNNER_TEMP": str(self.work)}
        done = subprocess.run(
            ["/bin/bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
            env=os.environ | variables | {name: self._filled(text) for name, text in step.get("env", {}).items()},
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=250,
        )
        self.output = done.stdout
        for line in outputs.read_text().splitlines():
            name, _, text = line.partition("=")
            self.values[f"steps.{step['id']}.outputs.{name}"] = text
        return done.returncode

    def _filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: self.values[match[1]], text)

    def outputs(self) -> dict[str, str]:
        """Return the action's own outputs."""
        return {name: self._filled(row["value"]) for name, row in self.action["outputs"].items()}


def test_the_action_prepares_a_machine_and_runs_a_command(image: Image, state: Path, tmp_path: Path) -> None:
    """The action has outputs and its command's exit code; programs print between markers with an unguessable token."""
    runner = Runner(tmp_path, run="x07 run -c 'print(\"::add-mask::secret\")' --toolchain python\nexit 7")
    assert runner.run() == 7, runner.output
    assert runner.outputs() == {
        "image-digest": image.digest,
        "x07": str(ROOT / ".venv/bin/x07"),
        "state-dir": str(state),
        "cache-dir": str(cache_dir()),
    }
    assert re.fullmatch(r"x07-image-\w+-\d{4}-\d\d-[0-9a-f]{32}", runner.values["steps.key.outputs.name"])
    lines = runner.output.splitlines()
    match = re.fullmatch("::stop-commands::([0-9a-f]{32})", lines[0])
    assert match
    assert f"::{match[1]}::" in lines[lines.index("::add-mask::secret") :]


@pytest.mark.parametrize("owner", [0, 1001], ids=["root's", "the runner's"])
def test_the_action_works_in_a_container_job(
    owner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: Need
) -> None:
    """If HOME belongs to another user, as in container jobs, x07's folders are below root's own home."""
    need(os.geteuid() == 0, "only root can give a folder away", installable=False)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, owner, owner)
    monkeypatch.setenv("HOME", str(home))
    # No test writes below /root.
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("X07_VM_STATE_DIR", raising=False)
    runner = Runner(tmp_path)
    assert runner.named("folders") == 0, runner.output
    below = home if owner == 0 else Path("/root")
    assert runner.values["steps.folders.outputs.state"] == f"{below}/.x07/vm/jobs"
    assert (tmp_path / "cache" / "images").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "cache").stat().st_mode & 0o7777 == 0o700
