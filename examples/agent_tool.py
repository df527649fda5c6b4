"""A tool for an assistant that calls tools: it runs code that the assistant wrote, in throw-away machines.

    python examples/agent_tool.py < calls          calls as JSON lines in, results as JSON lines out
    python examples/agent_tool.py --command < ...  the same by `x07 run --json` instead of the library
    python examples/agent_tool.py --definition     the tool's definition, for the model

A call is {"id": ..., "name": "run_code", "input": {...}}. Its result is {"id": ..., "is_error": ..., "content": {...}};
results come as they are ready, each with the id of its call as it came, a text or a whole number; null where it has
none such. Whatever comes in, one line in gives one line out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
from jsonschema import Draft202012Validator, ValidationError, validators

from x07_sandbox import Pool, Result, SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLICY: Final = Path(__file__).parent / "policies" / "agent.json"
WORKERS: Final = 4  # calls in hand; as many machines run as the host holds, the others wait
LINE_MAX: Final = 1 << 20  # bytes of a call
OUTPUT_MAX: Final = 256 * 1024  # bytes of each stream; a program that writes more is ended
TOLD_MAX: Final = 4000  # characters of each stream that the model is told
MANIFEST: Final = "x07-sandbox.toml"
RESULT: Final = msgspec.json.Decoder(Result)  # made here: threads must not be the first to use a type of msgspec's
NAMES: Final = {"python": "main.py", "c": "main.c", "cpp": "main.cpp", "shell": "main.sh"}

DEFINITION: Final[dict[str, Any]] = {
    "name": "run_code",
    "description": (
        "Run a program in a fresh machine without network and without files of the user; nothing is kept between "
        "calls. Returns how it ended and what it printed."
    ),
    "input_schema": {
        "type": "object",
        "properties": {
            "language": {"enum": list(NAMES), "description": "c is gnu17, cpp is gnu++20."},
            "source": {"type": "string", "maxLength": 100_000, "description": "The whole program."},
            "files": {
                "type": "object",
                "description": (
                    "Headers and modules beside the program, by name. Python and shell find them in the program's own "
                    "folder, which is not the working directory. Data for c and cpp has to come by stdin."
                ),
                "propertyNames": {"pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"},
                "additionalProperties": {"type": "string"},
                "maxProperties": 20,
            },
            "stdin": {"type": "string", "description": "Its standard input; empty if absent."},
            "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 30, "description": "At most 30."},
        },
        "required": ["language", "source"],
        "additionalProperties": False,
    },
}


def _whole(_validator: object, pattern: str, value: object, _schema: object) -> Iterator[ValidationError]:
    """The rule `pattern`, of a whole text: Python's $ matches before a last line end too, that of JSON Schema not."""
    if isinstance(value, str) and not re.fullmatch(pattern, value):
        yield ValidationError("does not match")


ID: Final = Draft202012Validator({"type": ["string", "integer"], "maxLength": 200})
ENVELOPE: Final = validators.extend(Draft202012Validator, {"pattern": _whole})(  # type: ignore[no-untyped-call]
    {
        "type": "object",
        "properties": {
            "id": ID.schema,
            "name": {"const": DEFINITION["name"]},
            "input": DEFINITION["input_schema"],
        },
        "required": ["id", "name", "input"],
    }
)

# What the model is to make of it: whose doing it was decides whether another try makes sense.
ADVICE: Final = {
    "none": "",
    "program": "The program's own doing: correct it.",
    "policy": "A limit or a rule of the sandbox: do it with less, or otherwise. The same again ends the same.",
    "host": "The sandbox failed, not the program: the same call may be tried once more.",
}


class BadCall(Exception):  # noqa: N818 - it is the caller's
    """A call that is not carried out; its text tells the model why."""


# ------------------------------------------------------------------------------------------------- a call, checked


def decode(line: bytes) -> Any:  # noqa: ANN401 - whatever the JSON holds
    """The JSON of a line. Raises BadCall."""
    if len(line) > LINE_MAX:
        raise BadCall(f"the call has more than {LINE_MAX} bytes")
    try:
        return json.loads(line.decode(), parse_constant=_no_number, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as exc:
        raise BadCall(f"the call is no JSON: {exc}"[:200]) from exc


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values no reader can know which one was checked by whoever let the call through.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadCall("a key of the call is given twice")
    return found


def check(call: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """The input of a call that keeps to the definition, as bytes where it is text. Raises BadCall."""
    # Not the messages of the library: they repeat the value, which may be long.
    broken = ((error.json_path, error.validator, error.validator_value) for error in ENVELOPE.iter_errors(call))
    # A name that the call gives to a file is part of the path, and may hold anything: escaped.
    problems = [
        f"{json.dumps(path)[1:-1]} does not keep to {rule} {json.dumps(value)}"[:300] for path, rule, value in broken
    ]
    if problems:
        raise BadCall("; ".join([*dict.fromkeys(problems)][:5]))
    asked = call["input"]
    files = asked.get("files", {})
    for name in files.keys() & {NAMES[asked["language"]], MANIFEST}:
        raise BadCall(f"$.input.files: {name} is taken")
    try:
        return {
            "language": asked["language"],
            "source": asked["source"].encode(),
            "files": {name: text.encode() for name, text in files.items()},
            "stdin": asked.get("stdin", "").encode(),
            "timeout_s": asked.get("timeout_s", 30),
        }
    except UnicodeEncodeError as exc:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        raise BadCall("a text of the call is no Unicode") from exc


# ---------------------------------------------------------------------------------------------- two ways to run it


def run_in_pool(pool: Pool, call: dict[str, Any]) -> Result:
    """By the library, in a warm machine. Raises SandboxError if it could not be run."""
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
    """By `x07 run --json` on a project in a temporary folder: any language can do this. It keeps its own deadlines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = folder / "project"
        project.mkdir()
        main = NAMES[call["language"]]
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
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    return RESULT.decode(done.stdout)


# ------------------------------------------------------------------------------------------- what the model is told


def told(result: Result) -> dict[str, Any]:
    """A result in the words that a model needs, bounded.

    Not how_to_allow of the denials: what is granted is for people to decide, and the model has no say in it.
    """
    content: dict[str, Any] = {
        "outcome": result.outcome,
        "reason": result.reason,
        "stdout": shown(result.stdout.data),
        "stderr": shown(result.stderr.data),
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


def shown(data: bytes) -> str:
    """Output as text; of a long one the beginning and the end, where errors stand."""
    text = data.decode(errors="replace")
    if len(text) <= TOLD_MAX:
        return text
    half = TOLD_MAX // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def answer(line: bytes, run: Callable[[dict[str, Any]], Result]) -> dict[str, Any]:
    """The one result of one call."""
    call_id = None
    try:
        call = decode(line)
        if isinstance(call, dict) and ID.is_valid(call.get("id")):
            call_id = call["id"]
        content = told(run(check(call)))
    except BadCall as exc:
        content = {"outcome": "usage-error", "reason": str(exc), "advice": "Correct the call."}
    except SandboxError as exc:  # it could not be run: the operator wants to know, too
        print(exc, file=sys.stderr)
        content = told(exc.result) if exc.result else {"outcome": "refused", "reason": str(exc)}
    except msgspec.DecodeError as exc:
        print(exc, file=sys.stderr)
        content = {"outcome": "internal-error", "reason": "x07 gave no result", "advice": ADVICE["host"]}
    return {"id": call_id, "is_error": content["outcome"] != "ok", "content": content}


# ----------------------------------------------------------------------------------------------------- the loop


def next_line(calls: IO[bytes]) -> bytes:
    """The next line; of one that is too long only the beginning, so that nobody fills our memory."""
    line = calls.readline(LINE_MAX + 1)
    rest = line
    while len(rest) > LINE_MAX and not rest.endswith(b"\n"):
        rest = calls.readline(LINE_MAX + 1)
    return line


def serve(run: Callable[[dict[str, Any]], Result], calls: IO[bytes], answers: IO[bytes]) -> None:
    """Answer calls until there are no more, WORKERS at a time."""
    reading, writing = threading.Lock(), threading.Lock()

    def work() -> None:
        while True:
            with reading:
                line = next_line(calls)
            if not line:
                return
            text = json.dumps(answer(line, run))
            with writing:
                answers.write(text.encode() + b"\n")
                answers.flush()

    with ThreadPoolExecutor(WORKERS) as threads:
        for worker in [threads.submit(work) for _ in range(WORKERS)]:
            worker.result()


def main() -> int:
    """Print the definition, or answer the calls on standard input."""
    parser = argparse.ArgumentParser(description="A tool run_code: calls as JSON lines in, results as JSON lines out.")
    parser.add_argument("--definition", action="store_true", help="print the tool's definition and end")
    parser.add_argument("--command", action="store_true", help="run x07 run --json instead of the library")
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
    except SandboxError as exc:  # no image, say
        sys.exit(f"agent_tool: {exc}")
    except BrokenPipeError:  # nobody reads the answers any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush does not fail too
        sys.exit("agent_tool: whoever reads the answers has gone")
