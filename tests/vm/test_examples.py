"""The examples on real input: by library and by command, their output is what Python computes."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import X07
from tests.vm.conftest import Sandbox, left_behind

pytestmark = pytest.mark.vm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = EXAMPLES / "word_frequency.c"
CSV = EXAMPLES / "jsonl_to_csv.py"
ORDERS = EXAMPLES / "orders.jsonl"

SYLLABLES = ("ba", "ko", "lir", "sta", "nor", "mi", "tu", "vel", "gra", "po")


def word_list() -> list[str]:
    """Return 3,000 different words of one to four syllables, always the same."""
    dice = random.Random(12)  # noqa: S311 - test data
    words: dict[str, None] = {}
    while len(words) < 3000:
        words["".join(dice.choices(SYLLABLES, k=dice.randint(1, 4)))] = None
    return list(words)


def long_text(size: int) -> str:
    """Return prose of about *size* bytes: some frequent words, capitals, punctuation, short lines."""
    dice = random.Random(13)  # noqa: S311 - as above
    words = word_list()
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines = []
    length = 0
    while length < size:
        line = dice.choices(words, weights, k=12)
        line[0] = line[0].capitalize()
        text = " ".join(line[:6]) + ", " + " ".join(line[6:]) + ".\n"
        lines.append(text)
        length += len(text)
    return "".join(lines)


def expected_frequencies(text: str, most: int) -> str:
    """Return the expected output of word_frequency.c."""
    counted = collections.Counter("".join(char.lower() if char.isalpha() else " " for char in text).split())
    ordered = sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
    return "".join(f"{count:7d} {word}\n" for word, count in ordered[:most])


@pytest.mark.parametrize("name", ["grader", "agent_tool"])
def test_an_example_without_an_image_fails_with_one_line(name: str, tmp_path: Path) -> None:
    """Without an image an example exits with 1 and one line that says what is missing and what to do."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=os.environ | {"X07_VM_CACHE_DIR": str(tmp_path / "cache")},
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{name}: there is no guest image: no guest image has been built yet. Run x07 image build.\n"


def test_word_frequencies_of_a_megabyte(sandbox: Sandbox) -> None:
    """The C example counts the words of a long text as Python does."""
    text = long_text(1_500_000)
    ran = sandbox.run(WORDS, stdin=text.encode(), policy={"limits.wall_ms": 60_000, "limits.cpu_ms": 60_000})
    assert ran.outcome == "ok", ran.reason
    assert ran.stdout.decode() == expected_frequencies(text, 20)
    assert ran.stderr == b""


def expected_csv() -> bytes:
    """Return the CSV that jsonl_to_csv.py should print for the example's orders, written independently."""
    return (
        "id,customer.name,customer.city,total,items,note\n"
        '1,Ada,London,12.5,"[""tea"", ""cup""]",\n'
        "2,Grace,New York,99.0,,\n"
        '3,Zoë,Zürich,7,,"says ""hello"", twice"\n'
    ).encode()


def test_the_command_runs_the_python_example(state: Path) -> None:
    """`x07 run --input orders.jsonl jsonl_to_csv.py` prints only the CSV, and leaves no remains."""
    argv = [*X07, "run", "--input", str(ORDERS), str(CSV)]
    done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == expected_csv()
    assert left_behind(state) == []
