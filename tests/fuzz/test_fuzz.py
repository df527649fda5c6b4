"""Fuzz targets for everything that reads hostile bytes, with kept inputs and a coverage-guided fuzzer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import FULL, need
from tests.fuzz import (
    fuzz_changes,
    fuzz_channel,
    fuzz_client_hello,
    fuzz_dns,
    fuzz_documents,
    fuzz_egress,
    fuzz_hints,
    fuzz_http_requests,
    fuzz_images,
    fuzz_names,
    fuzz_observed,
    fuzz_patch,
    fuzz_ttrpc,
    fuzz_unpack,
)
from tests.fuzz.make_seeds import SEEDS, channel_seeds, seeds
from x07_sandbox.channel import streams
from x07_sandbox.channel.messages import FORMS

ROOT: Final = Path(__file__).resolve().parents[2]
TARGETS: Final = {
    "changes": fuzz_changes.one_input,
    "channel": fuzz_channel.one_input,
    "client_hello": fuzz_client_hello.one_input,
    "dns": fuzz_dns.one_input,
    "documents": fuzz_documents.one_input,
    "egress": fuzz_egress.one_input,
    "hints": fuzz_hints.one_input,
    "http_requests": fuzz_http_requests.one_input,
    "images": fuzz_images.one_input,
    "names": fuzz_names.one_input,
    "observed": fuzz_observed.one_input,
    "patch": fuzz_patch.one_input,
    "ttrpc": fuzz_ttrpc.one_input,
    "unpack": fuzz_unpack.one_input,
}
RUNS: Final = 200_000 if FULL else 2_000
# Each input makes and reads several policies: this many take as long as the inputs of the others.
RUNS_OBSERVED: Final = RUNS // 8


def test_seeds_match_their_script() -> None:
    """The seeds on disk are exactly those of tests/fuzz/make_seeds.py."""
    found = {path.relative_to(SEEDS).as_posix(): path.read_bytes() for path in SEEDS.rglob("*") if path.is_file()}
    assert found == seeds(), "run: python -m tests.fuzz.make_seeds"


def test_every_message_and_type_of_frame_has_a_seed() -> None:
    """Every message and every type of frame has a seed for the fuzzer."""
    names = {name for name, value in vars(streams).items() if name[0].isupper() and type(value) is int and value < 256}
    assert len(names) == streams.DATAGRAM
    wanted = {*(names - {"MESSAGE"}), *(kind.__name__.upper() for kind in FORMS)}
    assert wanted <= channel_seeds().keys()


@pytest.mark.parametrize("name", seeds())
def test_seeds_and_former_failures_pass(name: str) -> None:
    """Every seed, and every input that once broke an invariant, passes its target's checks."""
    TARGETS[name.partition("/")[0]]((SEEDS / name).read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_nothing(target: str, tmp_path: Path) -> None:
    """The coverage-guided fuzzer finds no violation in thousands of inputs."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = importlib.util.find_spec("atheris") is not None
    # requirements/dev.in omits it where it has no wheel, so that no package can install it there.
    need(found, f"atheris has no wheel for this machine or Python {version}", installable=False)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    runs = RUNS_OBSERVED if target == "observed" else RUNS
    command = [sys.executable, "-m", "tests.fuzz.run", target, f"-runs={runs}", "-max_len=4096", "-rss_limit_mb=2048"]
    command += [f"-artifact_prefix={tmp_path}/", str(corpus)]
    command += [str(folder) for folder in (SEEDS / target, SEEDS / target / "found") if folder.is_dir()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    inputs = {path.name: path.read_bytes()[:200] for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{inputs}\n{done.stderr[-3000:]}"
    counted = re.search(r"Done (\d+) runs", done.stderr)
    assert counted is not None, done.stderr[-3000:]
    assert int(counted[1]) >= runs  # libFuzzer may carry out a few more
