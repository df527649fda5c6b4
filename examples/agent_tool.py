"""A code execution tool for AI agents: it runs each program that the model writes in a VM of its own.

    python examples/agent_tool.py < calls          read calls as JSON lines, write results as JSON lines
    python examples/agent_tool.py --command < ...  the same, but run programs with `x07 run --json`, not the library
    python examples/agent_tool.py --definition     print the tool's definition for the model

A call is {"id": ..., "name": "run_code", "input": {...}}. Its result is {"id": ..., "is_error": ..., "content": {...}}.
The id is a string or an integer; the result repeats it, or has null if the call has no valid id. Every input line gets
exactly one result line, even if it is malformed. Results are written as they become ready.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
from jsonschema import Draft202012Validator

from x07_sandbox import Pool, Result, SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable

POLICY: Final = Path(__file__).parent / "policies" / "agent.json"
WORKERS: Final = 4  # calls in progress; x07 queues those that exceed the host's number of VMs
LINE_MAX: Final = 1 << 20  # bytes of a call
OUTPUT_MAX: Final = 256 * 1024  # bytes of each stream; a program that writes more is stopped
EXCERPT_MAX: Final = 4000  # characters of each stream that the model gets
MANIFEST: Final = "x07-sandbox.toml"
MAIN_FILES: Final = {"python": "main.py", "c": "main.c", "cpp": "main.cpp", "shell": "main.sh"}

DEFINITION: Final[dict[str, Any]] = {
    "name": "run_code",
    "description": (
        "Run a program in a new VM without network access and without the user's files. Nothing is kept between "
        "calls. Returns how the program ended and what it printed."
    ),
    "input_schema": {
        "type": "object",
        "properties": {
            "language": {"enum": list(MAIN_FILES), "description": "c is gnu17, cpp is gnu++20."},
            "source": {"type": "string", "maxLength": 100_000, "description": "The complete program."},
            "files": {
                "type": "object",
                "description": (
                    "Additional headers and modules, by file name. Python and shell programs find them in the "
                    "program's own folder, which is not the working directory. C and C++ programs get data from stdin."
                ),
                "propertyNames": {"pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"},
                "additionalProperties": {"type": "string"},
                "maxProperties": 20,
            },
            "stdin": {"type": "string", "description": "The program's standard input. Default: empty."},
            "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 30, "description": "Default: 30."},
        },
        "required": ["language", "source"],
        "additionalProperties": False,
    },
}

ID_VALIDATOR: Final = Draft202012Validator({"type": ["string", "integer"], "maxLength": 200})
CALL_VALIDATOR: Final = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "id": ID_VALIDATOR.schema,
            "name": {"const": DEFINITION["name"]},
            "input": DEFINITION["input_schema"],
        },
        "required": ["id", "name", "input"],
    }
)
# Created at import, because msgspec 0.22 can crash if several threads are the first to use a type.
RESULT_DECODER: Final = msgspec.json.Decoder(Result)

# By result.fault: whether the model should correct the program, change its approach or retry.
ADVICE: Final = {
    "none": "",
    "program": "The program caused this. Correct the program.",
    "policy": "A limit or rule of the sandbox caused this. Change the program: the same one would end the same way.",
    "host": "The sandbox failed, not the program. Make the same call once more.",
}


class CallError(Exception):
    """The call is invalid. The text tells the model why."""


# ---------------------------------------------------------------------------------------------------- check a call


def parse_line(line: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a line as JSON. Raises CallError."""
    if len(line) > LINE_MAX:
        raise CallError(f"the call is longer than {LINE_MAX} bytes")
    try:
        return json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as exc:
        raise CallError(f"the call is not valid JSON: {exc}"[:200]) from exc


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not allowed")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON parsers differ in which duplicate they keep. A filter in front of this tool may have checked the other one.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise CallError("the call has a duplicate key")
    return found


def check_call(call: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the call's input, with texts as bytes and defaults filled in. Raises CallError."""
    # error.message would repeat the value, which can be long. json.dumps escapes the file names in a path.
    errors = [
        f"{json.dumps(error.json_path)[1:-1]} violates {error.validator} {json.dumps(error.validator_value)}"[:300]
        for error in CALL_VALIDATOR.iter_errors(call)
    ]
    if errors:
        raise CallError("; ".join([*dict.fromkeys(errors)][:5]))
    given = call["input"]
    files = given.get("files", {})
    for name in files:
        if name in {MAIN_FILES[given["language"]], MANIFEST}:
            raise CallError(f"$.input.files: the name {name} is reserved")
        if name.endswith("\n"):  # the $ of Python's regular expressions also matches before a final newline
            raise CallError("$.input.files: a name ends with a newline")
    try:
        return {
            "language": given["language"],
            "source": given["source"].encode(),
            "files": {name: text.encode() for name, text in files.items()},
            "stdin": given.get("stdin", "").encode(),
            "timeout_s": given.get("timeout_s", 30),
        }
    except UnicodeEncodeError as exc:  # JSON can contain half of a surrogate pair, UTF-8 cannot
        raise CallError("a text of the call contains half of a surrogate pair") from exc


# ------------------------------------------------------------------------------------------------------ run a call


def run_in_pool(pool: Pool, call: dict[str, Any]) -> Result:
    """Run the call with the library, in a VM of the pool. Raises SandboxError if the program could not be run."""
    return pool.submit(
        None,
        call["stdin"],
        source=call["source"],
        toolchain=call["language"],
        files=call["files"],
        policy=POLICY,
        timeout_s=call["timeout_s"],
        max_output_bytes=OUTPUT_MAX,
    ).result()


def run_by_command(call: dict[str, Any]) -> Result:
    """Run the call with `x07 run --json`, on a project in a temporary folder. A tool in any language can do this."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = folder / "project"
        project.mkdir()
        main = MAIN_FILES[call["language"]]
        files = {**call["files"], main: call["source"]}
        for file, data in files.items():
            (project / file).write_bytes(data)
        entry = f'entry = "{main}"\n' if call["language"] in {"python", "shell"} else ""
        (project / MANIFEST).write_text(
            'schema_version = "x07.sandbox.project@0.1.0"\n'
            f'toolchain = "{call["language"]}"\nfiles = {json.dumps(list(files))}\n{entry}',
            encoding="utf-8",
        )
        (folder / "stdin").write_bytes(call["stdin"])
        argv = [str(Path(sys.executable).with_name("x07")), "run", "--json=full", "--max-output-bytes", str(OUTPUT_MAX)]
        argv += ["--policy", str(POLICY), "--timeout", str(call["timeout_s"])]
        argv += ["--input", f"{name}/stdin", f"{name}/project"]
        # x07 enforces the timeout.
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    return RESULT_DECODER.decode(done.stdout)


# ----------------------------------------------------------------------------------------- the result for the model


def content_for_model(result: Result) -> dict[str, Any]:
    """Return the parts of a result that help the model, limited in size.

    The how_to_allow texts of the denials are omitted: people decide what to allow, not the model.
    """
    content: dict[str, Any] = {
        "outcome": result.outcome,
        "reason": result.reason,
        "stdout": excerpt(result.stdout.data),
        "stderr": excerpt(result.stderr.data),
    }
    if result.exit_code is not None:
        content["exit_code"] = result.exit_code
    if result.signal is not None:
        content["signal"] = result.signal
    if result.denials:
        content["denied"] = [f"{d.field}: {d.action} {d.subject[:200]} ({d.count})" for d in result.denials[:10]]
    if ADVICE[result.fault]:
        content["advice"] = ADVICE[result.fault]
    return content


def excerpt(data: bytes) -> str:
    """Return output as text. Keep only the beginning and the end of long output, where errors usually are."""
    text = data.decode(errors="replace")
    if len(text) <= EXCERPT_MAX:
        return text
    half = EXCERPT_MAX // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters omitted ...]\n{text[-half:]}"


def answer(line: bytes, run: Callable[[dict[str, Any]], Result]) -> dict[str, Any]:
    """Return the result of one call."""
    call_id = None
    try:
        call = parse_line(line)
        if isinstance(call, dict) and ID_VALIDATOR.is_valid(call.get("id")):
            call_id = call["id"]
        content = content_for_model(run(check_call(call)))
    except CallError as exc:
        content = {"outcome": "usage-error", "reason": str(exc), "advice": "Correct the call."}
    except SandboxError as exc:  # the program could not be run: report it to the operator, too
        print(exc, file=sys.stderr)
        content = content_for_model(exc.result) if exc.result else {"outcome": "refused", "reason": str(exc)}
    except msgspec.DecodeError as exc:
        print(exc, file=sys.stderr)
        content = {"outcome": "internal-error", "reason": "x07 printed no valid result", "advice": ADVICE["host"]}
    return {"id": call_id, "is_error": content["outcome"] != "ok", "content": content}


# ------------------------------------------------------------------------------------------------------- main loop


def read_line(calls: IO[bytes]) -> bytes:
    """Read the next line. Keep only the beginning of a line that is too long, to limit memory use."""
    line = calls.readline(LINE_MAX + 1)
    rest = line
    while len(rest) > LINE_MAX and not rest.endswith(b"\n"):
        rest = calls.readline(LINE_MAX + 1)
    return line


def serve(run: Callable[[dict[str, Any]], Result], calls: IO[bytes], results: IO[bytes]) -> None:
    """Answer calls until the input ends, WORKERS at a time."""
    reading, writing = threading.Lock(), threading.Lock()

    def work() -> None:
        while True:
            with reading:
                line = read_line(calls)
            if not line:
                return
            text = json.dumps(answer(line, run))
            with writing:
                results.write(text.encode() + b"\n")
                results.flush()

    with ThreadPoolExecutor(WORKERS) as threads:
        for worker in [threads.submit(work) for _ in range(WORKERS)]:
            worker.result()


def main() -> int:
    """Print the definition, or answer the calls on standard input."""
    parser = argparse.ArgumentParser(description="Read calls of run_code as JSON lines, write results as JSON lines.")
    parser.add_argument("--definition", action="store_true", help="print the tool's definition and exit")
    parser.add_argument("--command", action="store_true", help="run programs with x07 run --json, not with the library")
    options = parser.parse_args()
    if options.definition:
        print(json.dumps(DEFINITION, indent=2))
        return 0
    if options.command:
        serve(run_by_command, sys.stdin.buffer, sys.stdout.buffer)
        return 0
    with Pool(size=1) as pool:
        serve(partial(run_in_pool, pool), sys.stdin.buffer, sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SandboxError as exc:  # for example, there is no guest image
        sys.exit(f"agent_tool: {exc}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail, too
        sys.exit("agent_tool: the reader of the results closed the pipe")
