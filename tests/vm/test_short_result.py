"""The JSON of an ordinary run stays short."""

from __future__ import annotations

import json
import secrets
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from tests.published import document
from x07_sandbox.records.runs import all_runs

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("state")]

MOST_BYTES = 4096


def test_the_json_of_a_trivial_run_is_short(image: Image, tmp_path: Path) -> None:
    """`x07 run --json` prints at most 4 KiB for a trivial program; result.json has every control."""
    assert image.digest
    program = tmp_path / "one.py"
    program.write_text(f"print(1)  # {secrets.token_hex()}\n", encoding="utf-8")  # never built before
    argv = [*X07, "run", "--json", str(program)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert len(done.stdout) <= MOST_BYTES
    short = document(done.stdout)
    assert (short["outcome"], sorted(short["phases"])) == ("ok", ["build", "run"])
    kept = json.loads((all_runs() / short["run"] / "result.json").read_bytes())
    omitted = short["controls_omitted"]
    assert len(kept["controls"]) == len(short["controls"]) + omitted["enforced"] + len(omitted["advisory"])
