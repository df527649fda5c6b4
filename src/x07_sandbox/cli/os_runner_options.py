"""The flags of `x07-os-runner` in one table, the source of its parser, its JSON description and its documentation."""

import argparse
import json
from typing import Any, Final

from msgspec.structs import replace

from x07_sandbox import __version__
from x07_sandbox.cli.parser import Parser, add_row
from x07_sandbox.host.settings import MIB
from x07_sandbox.host.variables import SANDBOX_BACKENDS
from x07_sandbox.options import Option

COMMAND: Final = "x07-os-runner"
_SPECROWS: Final = "x07cli.specrows@0.1.0"
_MOST: Final = 1 << 48


class Flag(Option, frozen=True):
    """One flag of this command.

    usual: the default, for texts; the parser stores None for a flag that was not given.
    x07_only: whether the flag affects only X07 programs. hidden: whether help and documentation omit the flag.
    """

    usual: str | int | None = None
    x07_only: bool = False
    hidden: bool = False


_BACKEND: Final = (
    "kind of isolation; auto means vm in run-os-sandboxed and none in run-os (default: X07_SANDBOX_BACKEND, else auto)"
)
_WEAKER: Final = "allow a backend that is not a virtual machine; same as X07_I_ACCEPT_WEAKER_ISOLATION=1"
_ATTEST: Final = "write the attestation of the run to this file; only in run-os-sandboxed"
_MEMORY: Final = "memory limit of an X07 program in bytes; for other programs, the policy's limits.mem_bytes applies"
_CPU: Final = "CPU time limit of an X07 program; for other programs, the policy's limits.cpu_ms applies"
_C_BYTES: Final = "size limit of the C code that the X07 compiler generates, in bytes"
_COMPAT: Final = "the X07 version that the X07 compiler is to be compatible with"
_CC: Final = "how to compile the C code that the X07 compiler generates"
_INNER: Final = "for X07's own runner inside a guest"
_FUEL: Final = "execution budget (fuel) of an X07 program"
_OUTPUT: Final = "limit of each output stream in bytes"
_OURS: Final = (
    Flag("--program", "F", "a source file that x07 run accepts, or *.x07.json", "name"),
    Flag("--project", "F", "the project file: x07.json or x07-sandbox.toml", "name"),
    Flag("--artifact", "F", "an executable that X07 compiled before", "name"),
    Flag("--world", "W", "the X07 world; only run-os-sandboxed is supported", usual="run-os"),
    Flag("--policy", "F", "the policy: required in run-os-sandboxed, rejected in run-os", "name"),
    Flag("--input", "F", "the program's input (default: empty)", "file"),
    Flag("--sandbox-backend", "B", _BACKEND, "choice", choices=tuple(SANDBOX_BACKENDS)),
    Flag("--i-accept-weaker-isolation", "", _WEAKER, "switch"),
    Flag("--max-output-bytes", "N", _OUTPUT, "number", most=_MOST, unit="bytes", usual=MIB),
    Flag("--compiled-out", "F", "write a copy of the built Linux executable to this file", "file"),
    Flag("--attest-runtime", "F", _ATTEST, "file"),
)
_X07S: Final = (
    Flag("--solve-fuel", "N", _FUEL, "number", most=_MOST, unit="units", usual=50_000_000),
    Flag("--max-memory-bytes", "N", _MEMORY, "number", most=_MOST, unit="bytes", usual=64 * MIB),
    Flag("--cpu-time-limit-seconds", "N", _CPU, "number", most=_MOST, unit="seconds", usual=30),
    Flag("--cc-profile", "P", _CC, "choice", choices=("default", "size"), usual="default"),
    Flag("--max-c-bytes", "N", _C_BYTES, "number", most=_MOST, unit="bytes"),
    Flag("--compat", "S", _COMPAT),
    Flag("--debug-borrow-checks", "", "count violations of X07's borrow rules at run time", "switch"),
    Flag("--auto-ffi", "", "compile the native code of packages", "switch"),
    Flag("--module-root", "D", "a folder of X07 modules, for --program (repeatable)", "names"),
)
OPTIONS: Final = (
    *_OURS,
    *(replace(row, x07_only=True) for row in _X07S),
    Flag("--cli-specrows", "", "print a description of all options as JSON and exit", "switch"),
    Flag("--compile-only", "", _INNER, "switch", hidden=True),
    Flag("--i-accept-precompiled-artifact", "", _INNER, "switch", hidden=True),
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
    for row in OPTIONS:
        default = "" if row.usual is None else f" (default: {row.usual})"
        text = argparse.SUPPRESS if row.hidden else row.help + default
        add_row(made, replace(row, help=text, metavar="" if row.choices else row.metavar))
    return made


def specrows() -> str:
    """Describe the command line in the format of X07's tools: one line of JSON with a row for each option."""
    rows: list[list[Any]] = [
        ["root", "help", "-h", "--help", "show this help message and exit"],
        ["root", "version", "", "--version", "show the version and exit"],
    ]
    for row in OPTIONS:
        if row.hidden:
            continue
        if row.kind == "switch":
            rows.append(["root", "flag", "", row.flag, row.name, row.help])
            continue
        meta = [] if row.usual is None else [{"default": str(row.usual)}]
        rows.append(["root", "opt", "", row.flag, row.name, row.metavar, row.help, *meta])
    document = {"schema_version": _SPECROWS, "app": {"name": COMMAND, "version": __version__}, "rows": rows}
    return json.dumps(document, separators=(",", ":")) + "\n"


def describe() -> str:
    """Return the table of flags for docs/reference/x07.md."""
    lines = ["| flag | meaning | default | applies to |", "|---|---|---|---|"]
    for row in OPTIONS:
        if not row.hidden:
            value = "\\|".join(row.choices) or row.metavar
            flag = f"{row.flag} {value}".strip()
            default = "" if row.usual is None else f"`{row.usual}`"
            lines.append(f"| `{flag}` | {row.help} | {default} | {'X07' if row.x07_only else 'all'} programs |")
    return "\n".join(lines) + "\n"
