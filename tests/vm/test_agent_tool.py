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

from tests.vm.conftest import left_behind

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
TOOL: Final = EXAMPLES / "agent_tool.py"
LINE_MAX: Final = 1 << 20

pytestmark = pytest.mark.vm

# A server that sends a byte from time to time, so that no timeout of a socket ends the request.
SLOW_SERVER: Final = """
import socket, time
with socket.create_server(("127.0.0.1", 8001)) as server:
    connection, _ = server.accept()
    while True:
        connection.send(b"H")
        time.sleep(0.5)
"""
# A redirect to a server of the host, which the tool must not follow.
REDIRECT: Final = """
import socket
with socket.create_server(("127.0.0.1", 8000)) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.send(b"HTTP/1.0 302 Found\\r\\nLocation: http://127.0.0.1:1/\\r\\n\\r\\n")
"""


def call(number: object, name: object, **given: object) -> bytes:
    """Return one call as a line."""
    return json.dumps({"id": number, "name": name, "input": given}).encode() + b"\n"


def run(number: object, command: object, **more: object) -> bytes:
    """Return a call of shell as a line."""
    return call(number, "shell", command=command, **more)


def answers(lines: bytes) -> list[dict[str, Any]]:
    """Return the tool's answers to *lines*: one JSON object each."""
    done = subprocess.run([sys.executable, str(TOOL)], input=lines, capture_output=True, check=False, timeout=250)
    assert (done.returncode, done.stderr) == (0, b"")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hostile_calls_of_an_agent_end_at_their_limits(image: Image, state: Path) -> None:
    """Commands that flood, hang, crash or use up memory, and servers that never answer, each get an answer."""
    assert image.digest
    lines = (
        run("floods", "yes | head -c 10000000")
        + run("hangs", "sleep 600", timeout_s=1)
        + run("fills", "python3 -c 'x = bytearray(300 << 20)'")
        + run("crashes", "kill -SEGV $$")
        + run("kills all", "kill -9 -1")
        + call("writes", "write", path="slow.py", content=SLOW_SERVER)
        + call("writes too", "write", path="redirect.py", content=REDIRECT)
        + run("serves", "python3 slow.py > log 2>&1 & python3 redirect.py > log2 2>&1 &")
        + call("fetches", "fetch", port=8000, path="/")
        + call("waits", "fetch", port=8001, path="/")
        + call("leads out", "read", path="../../etc/shadow")
        + call("is a folder", "read", path=".")
        + run("next", "echo well")
    )
    found = answers(lines)
    contents = {one["id"]: one["content"] for one in found}
    assert [one["id"] for one in found] == [json.loads(line)["id"] for line in lines.splitlines()]
    outcomes = {name: text.split("; ")[0] for name, text in contents.items()}
    assert outcomes | {"kills all": ""} == {
        "floods": "outcome: ok",
        "hangs": "outcome: timeout",
        "fills": "outcome: oom",
        "crashes": "outcome: signalled",
        "kills all": "",
        "writes": f"bytes: {len(SLOW_SERVER)}",
        "writes too": f"bytes: {len(REDIRECT)}",
        "serves": "outcome: ok",
        "fetches": "status: 302\n",
        "waits": outcomes["waits"],
        "leads out": "error: cannot read ../../etc/shadow: No such file or directory. "  # as the image has none
        "Paths are those of the sandbox, not of the host.",
        "is a folder": "error: cannot read .: Is a directory. Use the tool that lists a folder.",
        "next": "outcome: ok",
    }
    assert len(contents["floods"]) < 21_000
    assert "left out" in contents["floods"]
    assert "within 20 s" in contents["waits"]
    assert contents["next"].endswith("output:\nwell\n")
    assert left_behind(state) == []


MALFORMED: Final = {
    "no command": (call("1", "shell"), "missing required field `command`"),
    "unknown tool": (call("1", "rm"), "there is no tool rm"),
    "command is a number": (run("1", 3), "Expected `str`, got `int`"),
    "a NUL byte": (run("1", "a\0b"), "NUL byte"),
    "huge command": (run("1", "#" * 200_000), "length <= 100000"),
    "half a character": (run("1", "\ud800"), "half of a surrogate pair"),
    "time is no number": (run("1", "true", timeout_s=float("nan")), "timeout_s"),
    "a path with a line end": (call("1", "fetch", port=8000, path="/x\n"), "control characters"),
    "a wrong port": (call("1", "fetch", port=22, path="/"), "from 8000 to 8099"),
}
NO_ID: Final = {
    "no JSON": (b"run this please\n", "Expecting value"),
    "no UTF-8": (b'{"id": "\xff"}\n', "codec can't decode"),
    "no id": (b'{"name": "fetch", "input": {}}\n', "with an id"),
    "no input": (b'{"id": "1", "name": "fetch"}\n', "input is a JSON object"),
    "deep": (b"[" * 100_000 + b"\n", "nested too deeply"),
    "a key twice": (b'{"id": "1", "id": "2", "name": "fetch", "input": {}}\n', "a key occurs twice"),
    "a huge line": (run("1", "#" * (LINE_MAX * 3)), "longer than"),
}


@pytest.mark.usefixtures("under_os")
def test_malformed_calls_of_an_agent_get_an_error(state: Path) -> None:
    """Missing fields, wrong types, unknown names and huge texts each get a short error, and nothing runs."""
    cases = MALFORMED | NO_ID
    found = answers(b"".join(line for line, _ in cases.values()) + run("next", "echo well"))
    assert found.pop()["content"].endswith("output:\nwell\n")
    assert len(found) == len(cases)
    for one, (name, (_, part)) in zip(found, cases.items(), strict=True):
        assert one["id"] == (None if name in NO_ID else "1"), name
        assert one["content"].startswith("error: "), name
        assert part in one["content"], name
        assert len(one["content"]) < 1600, name
    assert left_behind(state) == []


def test_the_recorded_calls_match_the_definitions() -> None:
    """`--definitions` prints names, descriptions and JSON Schemas, and all recorded calls but the last two match."""
    done = subprocess.run([sys.executable, str(TOOL), "--definitions"], capture_output=True, check=True, timeout=60)
    schemas = {one["name"]: one["parameters"] for one in json.loads(done.stdout)}
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    calls = [json.loads(line) for line in (EXAMPLES / "agent_calls.jsonl").read_bytes().splitlines()]
    matching = [Draft202012Validator(schemas.get(one["name"], False)).is_valid(one["input"]) for one in calls]
    assert matching == [True] * 18 + [False, False]


@pytest.mark.usefixtures("under_os")
def test_the_tool_ends_when_its_reader_goes_away(state: Path) -> None:
    """If its reader goes away, the tool reports that, closes its sandbox and ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, str(TOOL)]
    try:
        done = subprocess.run(argv, input=b"{}\n" * 9, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"agent_tool: the reader of the answers closed the pipe\n")
    assert left_behind(state) == []
