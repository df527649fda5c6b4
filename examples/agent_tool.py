"""Tools for an AI agent: run commands, write and read files, and fetch pages, all in one sandbox.

    python examples/agent_tool.py < calls          read calls as JSON lines, write results as JSON lines
    python examples/agent_tool.py --definitions    print the tools' definitions for the model

A call is {"id": ..., "name": ..., "input": {...}}. Its result is {"id": ..., "is_error": ..., "content": {...}}.
Calls are carried out in order, because most depend on earlier ones. Every input line gets exactly one result line, even
if it is malformed. examples/agent_calls.jsonl has recorded calls, so no model is needed to try the tools.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from x07_sandbox import Sandbox, SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLICY: Final = Path(__file__).parent / "policies" / "agent.json"
LIFETIME_S: Final = 3600
LINE_MAX: Final = 1 << 20  # bytes of a call
TEXT_MAX: Final = 10_000  # bytes of a stream, file or page that the model gets
FETCH_S: Final = 20


class CallError(Exception):
    """The call is invalid, or cannot be carried out. The text tells the model why."""


# ------------------------------------------------------------------------------------------------------- the tools


def run_command(sandbox: Sandbox, command: str, timeout_s: float = 60) -> dict[str, Any]:
    """Run shell commands. A failure or a timeout is part of the result."""
    done = sandbox.shell(command, timeout_s=timeout_s, max_output_bytes=TEXT_MAX, keep="both")
    content: dict[str, Any] = {"outcome": done.outcome, "reason": done.reason}
    content |= {"stdout": text(done.stdout), "stderr": text(done.stderr)}
    if done.denials:  # people decide what to allow, so how_to_allow is left out
        content["denied"] = [f"{d.field}: {d.action} {d.subject[:200]}" for d in done.denials[:10]]
    return content


def write_file(sandbox: Sandbox, path: str, content: str) -> dict[str, Any]:
    """Create or replace a file."""
    data = content.encode()
    sandbox.files.write(path, data)
    return {"bytes": len(data)}


def read_file(sandbox: Sandbox, path: str, offset: int = 0) -> dict[str, Any]:
    """Return a part of a file."""
    size = sandbox.files.stat(path).size
    return {"text": text(sandbox.files.read(path, offset=offset, max_bytes=TEXT_MAX)), "bytes_of_file": size}


def fetch(sandbox: Sandbox, port: int, path: str) -> dict[str, Any]:
    """Get a page from a server in the sandbox. The server may take FETCH_S seconds to start and to answer."""
    address = address_of(sandbox, port)
    until = time.monotonic() + FETCH_S
    while True:
        try:
            return _get(address, path, until)
        except http.client.InvalidURL as exc:
            raise CallError(f"cannot fetch this path: {exc}") from exc
        except (OSError, http.client.HTTPException) as exc:
            if time.monotonic() > until - 0.2:
                raise CallError(f"no answer from port {port} within {FETCH_S} s: {exc}") from exc
        time.sleep(0.2)


@functools.cache
def address_of(sandbox: Sandbox, port: int) -> tuple[str, int]:
    """Return the address of the host that leads to a port of the sandbox."""
    return sandbox.forward(port)


def _get(address: tuple[str, int], path: str, until: float) -> dict[str, Any]:
    # http.client follows no redirects. A redirect of a hostile server could lead to a server of the host.
    connection = http.client.HTTPConnection(*address)
    connection.connect()
    # The timeout of a socket starts again with every byte.
    timer = threading.Timer(until - time.monotonic(), connection.sock.shutdown, [socket.SHUT_RDWR])
    timer.start()
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return {"status": answer.status, "text": text(answer.read(TEXT_MAX))}
    finally:
        timer.cancel()
        connection.close()


def text(data: bytes) -> str:
    """Return bytes of the sandbox as text."""
    return data.decode(errors="replace")


# ------------------------------------------------------------------------------------------- definitions and checks

PATH: Final = {"type": "string", "minLength": 1, "maxLength": 1000, "description": "Relative to the working folder."}
TOOLS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "run_command": run_command,
    "write_file": write_file,
    "read_file": read_file,
    "fetch": fetch,
}


def definition(name: str, about: str, required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's definition."""
    schema = {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"name": name, "description": about, "input_schema": schema}


DEFINITIONS: Final = (
    definition(
        "run_command",
        "Run shell commands in the sandbox, a Linux machine without network. Files and background processes stay "
        "until the sandbox is closed; variables and the current folder do not.",
        {"command": {"type": "string", "minLength": 1, "maxLength": 100_000}},
        {"timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 60, "description": "Default: 60."}},
    ),
    definition(
        "write_file",
        "Create or replace a file in the sandbox.",
        {"path": PATH, "content": {"type": "string", "maxLength": 500_000}},
        {},
    ),
    definition(
        "read_file",
        f"Read up to {TEXT_MAX} bytes of a file in the sandbox.",
        {"path": PATH},
        {"offset": {"type": "integer", "minimum": 0, "maximum": 1 << 40, "description": "In bytes. Default: 0."}},
    ),
    definition(
        "fetch",
        "Send a GET request to an HTTP server in the sandbox, which must listen on 127.0.0.1.",
        {
            "port": {"type": "integer", "minimum": 8000, "maximum": 8099},
            "path": {"type": "string", "pattern": "^/[!-~]*$", "maxLength": 1000},
        },
        {},
    ),
)
ID: Final = {"type": ["string", "integer"], "maxLength": 200}
ENVELOPE: Final = {
    "type": "object",
    "properties": {"id": ID, "name": {"enum": list(TOOLS)}},
    "required": ["id", "name", "input"],
}
INPUTS: Final = {one["name"]: one["input_schema"] for one in DEFINITIONS}
TYPES: Final = {"object": (dict,), "string": (str,), "integer": (int,), "number": (int, float)}
# The keywords that these schemas use: whether a value, whose type has been checked, conforms.
KEYWORDS: Final[dict[str, Callable[[Any, Any, dict[str, Any]], bool]]] = {
    "type": lambda value, names, _: any(
        type(value) in TYPES[name] for name in (names if isinstance(names, list) else [names])
    ),
    "enum": lambda value, words, _: value in words,
    "required": lambda value, names, _: value.keys() >= {*names},
    "additionalProperties": lambda value, _, schema: value.keys() <= schema["properties"].keys(),
    "minLength": lambda value, size, _: len(value) >= size,
    "maxLength": lambda value, size, _: type(value) is int or len(value) <= size,
    "pattern": lambda value, pattern, _: re.search(pattern, value) is not None,
    "minimum": lambda value, least, _: value >= least,
    "exclusiveMinimum": lambda value, least, _: value > least,
    "maximum": lambda value, most, _: value <= most,
}


def parse_line(line: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a line as JSON. Raises CallError."""
    if len(line) > LINE_MAX:
        raise CallError(f"the call is longer than {LINE_MAX} bytes")
    try:
        call = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        json.dumps(call, ensure_ascii=False).encode()  # JSON can contain half of a surrogate pair, UTF-8 cannot
    except (ValueError, RecursionError) as exc:
        raise CallError(f"the call is not valid JSON: {exc}"[:200]) from exc
    return call


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not allowed")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON parsers differ in which duplicate they keep. A filter in front of this tool may have checked the other one.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def violations(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Yield how the value violates the schema, without the value, which can be long."""
    for keyword, wanted in schema.items():
        if keyword == "properties":
            for name in wanted.keys() & value.keys():
                yield from violations(wanted[name], value[name], f"{where}.{name}")
        elif keyword != "description" and not KEYWORDS[keyword](value, wanted, schema):
            yield f"{where} violates {keyword} {json.dumps(wanted)}"
            if keyword == "type":  # the others presuppose it
                return


def check(schema: dict[str, Any], value: Any, where: str) -> None:  # noqa: ANN401 - any JSON value
    """Raise CallError if the value violates the schema."""
    if errors := [*violations(schema, value, where)]:
        raise CallError("; ".join(error[:300] for error in errors[:5]))


# ------------------------------------------------------------------------------------------------------- main loop


def answer(sandbox: Sandbox, line: bytes) -> dict[str, Any]:
    """Carry out one call, and return its result. Raises SandboxError if the sandbox has ended."""
    result: dict[str, Any] = {"id": None, "is_error": True}
    try:
        call = parse_line(line)
        if isinstance(call, dict) and not [*violations(ID, call.get("id"), "")]:
            result["id"] = call["id"]
        check(ENVELOPE, call, "$")
        check(INPUTS[call["name"]], call["input"], "$.input")
        content = TOOLS[call["name"]](sandbox, **call["input"])
        return result | {"is_error": content.get("outcome", "ok") != "ok", "content": content}
    except CallError as exc:
        error = str(exc)
    except OSError as exc:  # for example, the file does not exist
        error = exc.strerror or str(exc)
    except SandboxError as exc:
        if not sandbox.alive:
            raise
        error = str(exc)
    return result | {"content": {"error": error}}


def read_line(calls: IO[bytes]) -> bytes:
    """Read the next line. Keep only the beginning of a line that is too long, to limit memory use."""
    line = calls.readline(LINE_MAX + 1)
    rest = line
    while len(rest) > LINE_MAX and not rest.endswith(b"\n"):
        rest = calls.readline(LINE_MAX + 1)
    return line


def main() -> int:
    """Print the definitions, or answer the calls on standard input."""
    parser = argparse.ArgumentParser(description="Read tool calls as JSON lines, write results as JSON lines.")
    parser.add_argument("--definitions", action="store_true", help="print the tools' definitions and exit")
    if parser.parse_args().definitions:
        print(json.dumps(DEFINITIONS, indent=2))
        return 0
    with Sandbox(policy=POLICY, lifetime_s=LIFETIME_S) as sandbox:
        while line := read_line(sys.stdin.buffer):
            print(json.dumps(answer(sandbox, line)), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SandboxError as exc:  # for example, there is no guest image, or the sandbox has reached its lifetime
        sys.exit(f"agent_tool: {exc}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail, too
        sys.exit("agent_tool: the reader of the results closed the pipe")
