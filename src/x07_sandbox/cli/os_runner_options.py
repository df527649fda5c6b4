"""The flags of `x07-os-runner` in one table, the source of its parser, its JSON description and its documentation."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox import __version__
from x07_sandbox.cli.parser import Once, Parser, nonempty, whole_number
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.variables import SANDBOX_BACKENDS

COMMAND: Final = "x07-os-runner"
_SPECROWS: Final = "x07cli.specrows@0.1.0"
_MOST: Final = 1 << 48
_PATHS: Final = frozenset({"F", "D"})  # metavars of files and folders


class Option(msgspec.Struct, frozen=True):
    """One flag. metavar: empty for a flag without a value. number: the unit of the value if that is a whole number.

    x07_only: whether the flag affects only X07 programs. hidden: whether help and documentation omit the flag.
    """

    flag: str
    doc: str
    metavar: str = ""
    default: str | int | None = None
    number: str = ""
    choices: tuple[str, ...] = ()
    repeat: bool = False
    x07_only: bool = False
    hidden: bool = False

    @property
    def key(self) -> str:
        """The name of the flag's attribute in the parsed options."""
        return self.flag.removeprefix("--").replace("-", "_")


_BACKEND: Final = (
    "kind of isolation; auto means vm in run-os-sandboxed and none in run-os (default: X07_SANDBOX_BACKEND, else auto)"
)
_WEAKER: Final = "allow a backend that is not a virtual machine; same as X07_I_ACCEPT_WEAKER_ISOLATION=1"
_ATTEST: Final = "write the attestation of the run to this file; only in run-os-sandboxed"
_MEMORY: Final = "memory limit of an X07 program in bytes; for other programs, the policy's limits.mem_bytes applies"
_CPU: Final = "CPU time limit of an X07 program; for other programs, the policy's limits.cpu_ms applies"
_ROOT: Final = "a folder of X07 modules, for --program (repeatable)"
_INNER: Final = "for X07's own runner inside a guest"
_OURS: Final = (
    Option("--program", "a source file that x07 run accepts, or *.x07.json", "F"),
    Option("--project", "the project file: x07.json or x07-sandbox.toml", "F"),
    Option("--artifact", "an executable that X07 compiled before", "F"),
    Option("--world", "the X07 world; only run-os-sandboxed is supported", "W", default="run-os"),
    Option("--policy", "the policy: required in run-os-sandboxed, rejected in run-os", "F"),
    Option("--input", "the program's input (default: empty)", "F"),
    Option("--sandbox-backend", _BACKEND, "B", choices=tuple(SANDBOX_BACKENDS)),
    Option("--i-accept-weaker-isolation", _WEAKER),
    Option("--max-output-bytes", "limit of each output stream in bytes", "N", default=MIB, number="bytes"),
    Option("--compiled-out", "write a copy of the built Linux executable to this file", "F"),
    Option("--attest-runtime", _ATTEST, "F"),
)
_X07S: Final = (
    Option("--solve-fuel", "execution budget (fuel) of an X07 program", "N", default=50_000_000, number="units"),
    Option("--max-memory-bytes", _MEMORY, "N", default=64 * MIB, number="bytes"),
    Option("--cpu-time-limit-seconds", _CPU, "N", default=30, number="seconds"),
    Option(
        "--cc-profile",
        "how to compile the C code that the X07 compiler generates",
        "P",
        default="default",
        choices=("default", "size"),
    ),
    Option("--max-c-bytes", "size limit of the C code that the X07 compiler generates, in bytes", "N", number="bytes"),
    Option("--compat", "the X07 version that the X07 compiler is to be compatible with", "S"),
    Option("--debug-borrow-checks", "count violations of X07's borrow rules at run time"),
    Option("--auto-ffi", "compile the native code of packages"),
    Option("--module-root", _ROOT, "D", repeat=True),
)
OPTIONS: Final = (
    *_OURS,
    *(replace(option, x07_only=True) for option in _X07S),
    Option("--cli-specrows", "print a description of all options as JSON and exit"),
    Option("--compile-only", _INNER, hidden=True),
    Option("--i-accept-precompiled-artifact", _INNER, hidden=True),
)

_EPILOG: Final = """standard output: one JSON object, X07's report x07-os-runner.report@0.5.0
exit code: 0 the run succeeded; 1 the report says what failed; 2 wrong usage, policy or setup, and no report

examples:
  x07-os-runner --world run-os-sandboxed --policy policy.json --program prog.c --input data.txt
  x07-os-runner --world run-os-sandboxed --policy policy.json --program prog.py --attest-runtime attest.json
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser. It stores None for a value that was not given, not the default named in the help."""
    made = Parser(
        prog=COMMAND,
        description="Build a program in one throw-away VM, run it in another, and print X07's report.",
        epilog=_EPILOG,
    )
    made.add_argument("--version", action="version", version=f"x07-sandbox {__version__}")
    for option in OPTIONS:
        made.add_argument(option.flag, **_words(option))
    return made


def _words(option: Option) -> dict[str, Any]:
    text = argparse.SUPPRESS if option.hidden else option.doc
    if option.default is not None and not option.hidden:
        text += f" (default: {option.default})"
    if not option.metavar:
        return {"action": "store_true", "help": text}
    words: dict[str, Any] = {"metavar": option.metavar, "help": text, "action": "append" if option.repeat else Once}
    if option.choices:
        words |= {"choices": option.choices, "metavar": None}
    if option.metavar in _PATHS:
        words["type"] = nonempty
    if option.number:
        words["type"] = whole_number(0, _MOST, option.number)
    return words


def specrows() -> str:
    """Describe the command line in the format of X07's tools: one line of JSON with a row for each option."""
    rows: list[list[Any]] = [
        ["root", "help", "-h", "--help", "show this help message and exit"],
        ["root", "version", "", "--version", "show the version and exit"],
    ]
    for option in OPTIONS:
        if option.hidden:
            continue
        if not option.metavar:
            rows.append(["root", "flag", "", option.flag, option.key, option.doc])
            continue
        row: list[Any] = ["root", "opt", "", option.flag, option.key, option.metavar, option.doc]
        meta = {"default": str(option.default)} if option.default is not None else {}
        rows.append([*row, meta] if meta else row)
    document = {"schema_version": _SPECROWS, "app": {"name": COMMAND, "version": __version__}, "rows": rows}
    return json.dumps(document, separators=(",", ":")) + "\n"


def describe() -> str:
    """Return the table of flags for docs/reference/x07.md."""
    lines = ["| flag | meaning | default | applies to |", "|---|---|---|---|"]
    for option in OPTIONS:
        if not option.hidden:
            value = "\\|".join(option.choices) if option.choices else option.metavar
            flag = f"{option.flag} {value}".strip()
            default = "" if option.default is None else f"`{option.default}`"
            binds = "X07 programs" if option.x07_only else "all programs"
            lines.append(f"| `{flag}` | {option.doc} | {default} | {binds} |")
    return "\n".join(lines) + "\n"
