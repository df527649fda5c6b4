"""examples/agent_tool.py: every call, good, hostile or malformed, has one answer, and the next one works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import FULL, sample
from tests.vm.conftest import left_behind

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
TOOL: Final = EXAMPLES / "agent_tool.py"
WAYS: Final = ("library", "command")
LINE_MAX: Final = 1 << 20

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

FORKS: Final = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
FLOODS: Final = "while True: print('x' * 4096)"


def call(number: object, language: object = "python", source: object = "print('well')", **more: object) -> bytes:
    """Return one call as a line."""
    asked = {"id": number, "name": "run_code", "input": {"language": language, "source": source, **more}}
    return json.dumps(asked).encode() + b"\n"


def answers(way: str, lines: bytes) -> list[dict[str, Any]]:
    """Return the tool's answers to *lines*: one JSON object each."""
    argv = [sys.executable, str(TOOL), *(["--command"] if way == "command" else [])]
    done = subprocess.run(argv, input=lines, capture_output=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_id(found: list[dict[str, Any]]) -> dict[str | int, dict[str, Any]]:
    """Return the contents by the id of their call, in order; each call has one."""
    contents = {one["id"]: one["content"] for one in found}
    assert len(contents) == len(found)
    assert all(one["is_error"] == (one["content"]["outcome"] != "ok") for one in found)
    return contents


@pytest.mark.full("tests of the pages make the same calls")
@pytest.mark.parametrize("way", WAYS)
def test_good_calls_of_an_assistant_are_carried_out(way: str, image: Image, state: Path) -> None:
    """The agent's tool runs every language with input and extra files, and reports output, status and signal."""
    assert image.digest
    text = "import sys, words\nprint(words.HELLO, sys.stdin.read())\n"
    contents = by_id(
        answers(
            way,
            call("python", source=text, files={"words.py": "HELLO = 'grüezi'"}, stdin="Zoë", timeout_s=29.5)
            + call("c", "c", '#include "n.h"\nint main(void) { return N; }', files={"n.h": "#define N 7\n"})
            + call("cpp", "cpp", '#include <cstdio>\nint main() { std::printf("%d", 6 * 7); }')
            + call(
                "shell",
                "shell",
                '. "$(dirname "$0")/it.sh"; kill -TERM $$',
                stdin="loud",
                files={"it.sh": "tr a-z A-Z\n"},
            )
            + call("unbuilt", "c", "int main(void) { return nothing; }")
            + call(8, source="import os; os.write(1, bytes(range(128, 256)))"),
        )
    )
    assert contents["python"] == {
        "outcome": "ok",
        "reason": "the program exited with status 0",
        "stdout": "grüezi Zoë\n",
        "stderr": "",
        "exit_code": 0,
    }
    assert (contents["c"]["outcome"], contents["c"]["exit_code"]) == ("failed", 7)
    assert contents["cpp"]["stdout"] == "42"
    assert (contents["shell"]["outcome"], contents["shell"]["signal"], contents["shell"]["stdout"]) == (
        "signalled",
        15,
        "LOUD",
    )
    assert contents["unbuilt"]["outcome"] == "build-failed"
    assert "nothing" in contents["unbuilt"]["stderr"]
    assert "Correct the program" in contents["unbuilt"]["advice"]
    assert contents[8]["stdout"] == "\N{REPLACEMENT CHARACTER}" * 128
    assert left_behind(state) == []


@pytest.mark.parametrize("way", sample(WAYS, 1))
def test_hostile_calls_of_an_assistant_end_at_their_limits(way: str, image: Image, state: Path) -> None:
    """Programs that flood, hang, connect or crash each get a verdict, and the next call runs."""
    assert image.digest
    lines = (
        call("floods", source=FLOODS)
        + call("never ends", source="import time\ntime.sleep(600)", timeout_s=1)
        + call("crashes", "c", "int main(void) { return *(volatile int *)0; }")
        + call("connects", source="import socket\nsocket.create_connection(('example.org', 80), 5)")
    )
    expected = {"floods": "output-limit", "never ends": "timeout", "crashes": "signalled", "connects": "failed"}
    if FULL:  # tests/vm/test_hostile_programs.py runs such programs too
        lines += call("forks", source=FORKS, timeout_s=3)
        lines += call("fills", source="kept = []\nwhile True: kept.append(b'x' * (1 << 20))")
        lines += call("looks", "shell", "cat /etc/shadow /root/.ssh/id_rsa /x07/in/policy.json > /etc/passwd")
        expected |= {"fills": "oom", "looks": "failed"}
    contents = by_id(answers(way, lines + call("next")))
    outcomes = {name: content["outcome"] for name, content in contents.items()}
    assert outcomes.pop("forks", "timeout") in {"cpu-limit", "timeout"}  # either may come first
    assert outcomes == expected | {"next": "ok"}
    assert 4000 < len(contents["floods"]["stdout"]) < 4100
    assert "omitted" in contents["floods"]["stdout"]
    assert "sandbox" in contents["never ends"]["advice"]
    assert contents["crashes"]["signal"] == 11
    assert "gaierror" in contents["connects"]["stderr"]
    assert contents["next"]["stdout"] == "well\n"
    assert left_behind(state) == []


MALFORMED: Final = {
    "no language": (b'{"id": "1", "name": "run_code", "input": {"source": "1"}}\n', "language"),
    "no source": (b'{"id": "1", "name": "run_code", "input": {"language": "c"}}\n', "source"),
    "nothing but an id": (b'{"id": "1"}\n', "required"),
    "no input": (b'{"id": "1", "name": "run_code"}\n', "input"),
    "another tool": (b'{"id": "1", "name": "rm", "input": {}}\n', "$.name"),
    "unknown language": (call("1", "cobol"), 'enum ["python"'),
    "language is a number": (call("1", 3), "$.input.language"),
    "source is a list": (call("1", source=["1"]), "$.input.source"),
    "huge source": (call("1", source="#" * 200_000), "maxLength 100000"),
    "unknown field": (call("1", policy="/etc/passwd"), "additionalProperties false"),
    "a file leads out": (call("1", files={"../x": ""}), "pattern"),
    "a file's name has a line end": (call("1", files={"x\n": ""}), "ends with a newline"),
    "a file's name is odd": (call("1", files={"x\0\x1b": 1}), r"$.input.files['x\u0000\u001b']"),
    "a file is hidden": (call("1", files={".bashrc": ""}), "pattern"),
    "a file is the program": (call("1", files={"main.py": "print(1)"}), "main.py is reserved"),
    "a file is the manifest": (call("1", files={"x07-sandbox.toml": ""}), "x07-sandbox.toml is reserved"),
    "a file is a number": (call("1", files={"x": 1}), "$.input.files.x"),
    "too many files": (call("1", files={f"f{n}": "" for n in range(21)}), "maxProperties 20"),
    "input is a number": (call("1", stdin=5), "$.input.stdin"),
    "no time": (call("1", timeout_s=0), "exclusiveMinimum 0"),
    "too much time": (call("1", timeout_s=1e9), "maximum 30"),
    "time is true": (call("1", timeout_s=True), "type"),
    "half a character": (call("1", source="print('\ud800')"), "surrogate"),
}
NO_ID: Final = {
    "time is no number": (call("1", timeout_s=float("nan")), "NaN is not allowed"),
    "no JSON": (b"run this please\n", "not valid JSON"),
    "an empty line": (b"\n", "not valid JSON"),
    "no UTF-8": (b'{"id": "\xff"}\n', "not valid JSON"),
    "no object": (b"[1]\n", "type"),
    "no id": (b'{"name": "run_code", "input": {"language": "c", "source": ""}}\n', "id"),
    "deep": (b"[" * 100_000 + b"\n", "not valid JSON"),
    "an id is a fraction": (call(1.5), "$.id"),
    "an id is too long": (call("1" * 201), "$.id"),
    "an id is true": (call(number=True), "$.id"),
    "a key twice": (
        b'{"id": "1", "id": "2", "name": "run_code", "input": {"language": "c", "source": ""}}\n',
        "duplicate key",
    ),
    "a huge number": (b'{"id": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "a huge line": (call("1", source="#" * (LINE_MAX * 3)), "longer than"),
}


def test_malformed_calls_of_an_assistant_get_an_error(image: Image, state: Path) -> None:
    """Missing fields, wrong types, unknown names and huge texts each get a short error, and nothing runs."""
    assert image.digest
    for number, (line, _) in enumerate(MALFORMED.values()):
        assert line.startswith(b'{"id": "1"'), number
    lines = [line.replace(b'"1"', f'"{number}"'.encode(), 1) for number, (line, _) in enumerate(MALFORMED.values())]
    lines += [line for line, _ in NO_ID.values()]
    found = answers("command", b"".join(lines) + call("next"))
    contents = by_id([one for one in found if one["id"] is not None])
    assert contents["next"].get("stdout") == "well\n", contents["next"]
    del contents["next"]
    for number, (name, (_, part)) in enumerate(MALFORMED.items()):
        content = contents.pop(str(number))
        assert content["outcome"] == "usage-error", name
        assert len(content["reason"]) < 1600, name
        rules = content["reason"].split("; ")
        assert sorted({*rules}) == sorted(rules), name  # no message is repeated
        assert part in content["reason"], name
    assert contents == {}
    reasons = [one["content"]["reason"] for one in found if one["id"] is None]
    assert len(reasons) == len(NO_ID)
    assert all(any(part in reason for reason in reasons) for _, part in NO_ID.values())
    assert len(list(state.glob("*/job.json"))) <= 2  # of the next one: its build, its run


def test_the_example_calls_match_the_definition() -> None:
    """`--definition` prints the tool's name, a description and a JSON Schema that the example's calls match."""
    done = subprocess.run([sys.executable, str(TOOL), "--definition"], capture_output=True, check=True, timeout=60)
    definition = json.loads(done.stdout)
    assert definition["name"] == "run_code"
    schema = definition["input_schema"]
    Draft202012Validator.check_schema(schema)
    calls = [json.loads(line) for line in (EXAMPLES / "agent_calls.jsonl").read_bytes().splitlines()]
    keeping = [Draft202012Validator(schema).is_valid(one["input"]) for one in calls]
    assert keeping == [True, True, True, False, True]


def test_the_tool_ends_when_its_reader_goes_away() -> None:
    """If its reader goes away, the tool reports that and ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, str(TOOL), "--command"]
    try:
        done = subprocess.run(argv, input=b"{}\n" * 9, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"agent_tool: the reader of the results closed the pipe\n")
