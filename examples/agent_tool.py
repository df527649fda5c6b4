"""A model's tools in one sandbox: those of `x07_sandbox.tools`, and `fetch`, which gets a page from a server in it.

    python examples/agent_tool.py < calls          read calls as JSON lines, write answers as JSON lines
    python examples/agent_tool.py --definitions    print the tools' definitions for the model

A call is {"id": ..., "name": ..., "input": {...}}. Its answer is {"id": ..., "content": text for the model}. Calls are
carried out in order, because most depend on earlier ones. Every input line gets exactly one answer, even if it is
malformed. examples/agent_calls.jsonl has recorded calls, so no model is needed to try the tools.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Final

from x07_sandbox import AsyncSandbox, Sandbox, SandboxError, tools

POLICY: Final = Path(__file__).parent / "policies" / "agent.json"
LIFETIME_S: Final = 3600
LINE_MAX: Final = 1 << 20  # bytes of a call
TEXT_MAX: Final = 10_000  # bytes of a page that the model gets
FETCH_S: Final = 20
PORTS: Final = range(8000, 8100)
FETCH: Final = {
    "name": "fetch",
    "description": "Send a GET request to an HTTP server in the sandbox, which must listen on 127.0.0.1.",
    "parameters": {
        "type": "object",
        "properties": {
            "port": {"type": "integer", "minimum": PORTS[0], "maximum": PORTS[-1]},
            "path": {"type": "string", "pattern": "^/", "maxLength": 1000},
        },
        "required": ["port", "path"],
        "additionalProperties": False,
    },
}


def fetch(sandbox: Sandbox, port: int, path: str) -> str:
    """Get a page from a server in the sandbox. The server may take FETCH_S seconds to start and to answer."""
    if not (isinstance(port, int) and port in PORTS and isinstance(path, str) and path.startswith("/")):
        return "error: port is a number from 8000 to 8099, and path starts with /"
    until = time.monotonic() + FETCH_S
    while True:
        try:
            return get(address_of(sandbox, port), path, until)
        except http.client.InvalidURL as exc:
            return f"error: cannot fetch this path: {exc}"
        except (OSError, http.client.HTTPException) as exc:
            if time.monotonic() > until - 0.2:
                return f"error: no answer from port {port} within {FETCH_S} s: {exc}"
        time.sleep(0.2)


@functools.cache
def address_of(sandbox: Sandbox, port: int) -> tuple[str, int]:
    """Return the address of the host that leads to a port of the sandbox."""
    return sandbox.forward(port)


def get(address: tuple[str, int], path: str, until: float) -> str:
    """Return the status and the text of a page."""
    # http.client follows no redirects. A redirect of a hostile server could lead to a server of the host.
    connection = http.client.HTTPConnection(*address)
    connection.connect()
    # The timeout of a socket starts again with every byte.
    timer = threading.Timer(until - time.monotonic(), connection.sock.shutdown, [socket.SHUT_RDWR])
    timer.start()
    try:
        connection.request("GET", path)
        page = connection.getresponse()
        return f"status: {page.status}\n{page.read(TEXT_MAX).decode(errors='replace')}"
    finally:
        timer.cancel()
        connection.close()


def parse(line: bytes) -> dict[str, Any]:
    """Parse a line as a call. Raises ValueError."""
    if len(line) > LINE_MAX:
        raise ValueError(f"it is longer than {LINE_MAX} bytes")
    try:
        call = json.loads(line, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(call, dict) or not isinstance(call.get("id"), str | int):
        raise ValueError("it is no JSON object with an id")  # noqa: TRY004 - one error for all
    if not isinstance(call.get("name"), str) or not isinstance(call.get("input"), dict):
        raise ValueError("name is text, and input is a JSON object")  # noqa: TRY004 - as above
    return call


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Parsers differ in which duplicate they keep, and a filter may have checked the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def read_line(calls: IO[bytes]) -> bytes:
    """Read the next line. Keep only the beginning of a line that is too long, to limit memory use."""
    line = calls.readline(LINE_MAX + 1)
    rest = line
    while len(rest) > LINE_MAX and not rest.endswith(b"\n"):
        rest = calls.readline(LINE_MAX + 1)
    return line


def main() -> int:
    """Print the definitions, or answer the calls on standard input."""
    parser = argparse.ArgumentParser(description="Read tool calls as JSON lines, write answers as JSON lines.")
    parser.add_argument("--definitions", action="store_true", help="print the tools' definitions and exit")
    if parser.parse_args().definitions:
        print(json.dumps([*tools(AsyncSandbox()).definitions, FETCH], indent=2))  # which is not opened
        return 0
    with Sandbox(policy=POLICY, lifetime_s=LIFETIME_S) as sandbox:
        box = tools(sandbox)
        while line := read_line(sys.stdin.buffer):
            try:
                call = parse(line)
            except ValueError as exc:
                answer = {"id": None, "content": f"error: this is not a call: {str(exc)[:200]}"}
            else:
                known = {"port", "path"} == call["input"].keys()
                own = fetch(sandbox, **call["input"]) if call["name"] == "fetch" and known else ""
                answer = {"id": call["id"], "content": own or box.call(call["name"], call["input"])}
            print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SandboxError as exc:  # for example, there is no guest image, or the sandbox has reached its lifetime
        sys.exit(f"agent_tool: {exc}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail, too
        sys.exit("agent_tool: the reader of the answers closed the pipe")
