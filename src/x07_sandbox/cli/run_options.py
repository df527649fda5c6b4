"""The flags of `x07 run`."""

from __future__ import annotations

import argparse

from x07_sandbox.cli.usage import (
    Once,
    add_document_flags,
    name_pattern,
    named,
    named_file,
    named_folder,
    seconds,
    whole_number,
)
from x07_sandbox.host import settings
from x07_sandbox.host.variables import SANDBOX_BACKENDS
from x07_sandbox.programs.toolchains import BY_NAME, describe

_EXAMPLES = """examples:
  x07 run prog.py
  x07 run --input data.txt prog.c -- --top 10
  x07 run -c 'print(6 * 7)' --toolchain python
  generate | x07 run --toolchain shell -           the source comes from standard input
  x07 run --policy strict.json --json prog.py
  x07 run --env LEVEL=3 ./a.out
  while read -r name; do x07 run --input /dev/null "$name"; done < list
  x07 run --dry-run project/                       what would be done, and what the policy would hold
"""
OVERRIDES = (
    ("--allow-host", "HOST:PORT[,PORT...]", "a host that it may connect to"),
    ("--allow-host-file", "FILE", "a file of such, one a line"),
    ("--deny-host", "HOST:PORT[,...]|HOST:*", "one that it may not, whatever allows it"),
    ("--deny-host-file", "FILE", "a file of such"),
    ("--allow-read-root", "PATH", "a folder that it may read"),
    ("--allow-write-root", "PATH", "one that it may change"),
)
X07_LIMITS = ("--solve-fuel", "--max-memory-bytes", "--cpu-time-limit-seconds")


def epilog() -> str:
    """What help says below the options; made only when it is asked for, since a run has no use for it."""
    from x07_sandbox.plan.outcomes import describe_exits

    return f"""languages, by the name of the file or by --toolchain:
{describe()}
A folder with an x07-sandbox.toml is a project of more files: docs/programs.md.

exit codes, and the outcomes that have them (docs/outcomes.md):
{describe_exits()}A program may use the same numbers: scripts read `outcome`. Output that could not
be written makes 125 too.

{_EXAMPLES}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them all."""
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        nargs="?",
        help="a source file, an executable, a project's folder; - for stdin (default: the x07.json of this folder or "
        "of the nearest above it)",
    )
    parser.add_argument("args", nargs="*", metavar="ARGS", help="arguments of the program, behind --")
    _add_program(parser)
    _add_overrides(parser)
    _add_files(parser)
    _add_input(parser)
    _add_machine(parser)
    _add_output(parser)
    _add_x07(parser)


def _add_program(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the program")
    group.add_argument("-c", dest="code", action=Once, metavar="CODE", help="a source text; needs --toolchain")
    group.add_argument(
        "--toolchain", action=Once, choices=tuple(BY_NAME), metavar="T", help="how it is built and started"
    )
    group.add_argument(
        "--policy",
        action=Once,
        metavar="FILE",
        help="what it may touch: a document, or built-in:TEMPLATE (default: no files, no network, 60 s, 512 MiB)",
    )
    group.add_argument(
        "--timeout", action=Once, type=seconds(600), metavar="S", help="seconds that it may take, at most the policy's"
    )
    group.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the program; NAME alone: ours"
    )


def _add_x07(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for X07's own programs, and scripts that call X07's command")
    for name, kind in (("--program", "program"), ("--project", "project"), ("--artifact", "artifact")):
        dest = "program_flag" if kind == "program" else kind
        group.add_argument(name, dest=dest, action=Once, metavar="F", help=f"the {kind}, in place of PROGRAM")
    group.add_argument("--world", metavar="W", default="run-os-sandboxed", help="run-os-sandboxed, the only one here")
    group.add_argument("--profile", action=Once, metavar="N", help="of an x07.json")
    group.add_argument("--auto-ffi", action=argparse.BooleanOptionalAction, help="compile the foreign code of packages")
    for name in X07_LIMITS:
        group.add_argument(
            name, action=Once, type=whole_number(0, 1 << 48, "units"), metavar="N", help="binds X07 programs only"
        )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("changes to the policy, each any number of times")
    for name, form, meaning in OVERRIDES:
        group.add_argument(name, action="append", default=[], metavar=form, help=meaning)


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("its files")
    group.add_argument(
        "--changes",
        choices=("apply", "keep", "discard"),
        default="apply",
        help="what becomes of its changes to the folders that it may change, when it has ended by itself; kept ones "
        "wait for x07 diff, x07 apply (default: apply)",
    )
    group.add_argument(
        "--diff", action=Once, type=named_file, metavar="FILE", help="write its changes there too, as a patch to read"
    )
    group.add_argument(
        "--out",
        action=Once,
        type=named_folder,
        metavar="DIR",
        help="a folder of ours that it finds as /x07/out, to write to",
    )
    group.add_argument(
        "--allow-protected",
        action="append",
        type=named,
        default=[],
        metavar="PATTERN",
        help="let it change names that other tools run or obey (.git, Jenkinsfile): docs/policy.md",
    )
    group.add_argument(
        "--hide",
        action="append",
        type=name_pattern,
        default=[],
        metavar="PATTERN",
        help="names that do not go in, wherever they lie",
    )
    group.add_argument(
        "--reveal",
        action="append",
        type=name_pattern,
        default=[],
        metavar="PATTERN",
        help="names of secrets that do go in: '*.pem'",
    )


def _add_input(parser: argparse.ArgumentParser) -> None:
    title = "its standard input (default: the project's, else ours, which is taken whether the program reads it or not)"
    group = parser.add_argument_group(title).add_mutually_exclusive_group()
    group.add_argument("--input", action=Once, type=named_file, metavar="FILE", help="a file")
    group.add_argument("--stdin", action="store_true", help="ours, whatever the project says")
    group.add_argument("--input-b64", action=Once, metavar="TEXT", help="bytes, as base64")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machines")
    group.add_argument("--image", action=Once, metavar="NAME|DIGEST", help="the guest image (default: default)")
    group.add_argument("--require-hardware", action="store_true", help="refuse emulation")
    group.add_argument(
        "--backend", action=Once, metavar="B", help="how they are started (default: X07_VM_BACKEND, else qemu)"
    )
    group.add_argument(
        "--sandbox-backend",
        action=Once,
        choices=tuple(SANDBOX_BACKENDS),
        help="the wall (default: X07_SANDBOX_BACKEND, else auto)",
    )
    group.add_argument(
        "--i-accept-weaker-isolation", action="store_true", help="accept a wall that is no virtual machine, if named"
    )
    group.add_argument(
        "--queue-timeout",
        type=whole_number(0, int(settings.QUEUE_S), "seconds"),
        default=settings.QUEUE_S,
        metavar="S",
        help="how long to wait while as many machines run as may (default: 600)",
    )
    group.add_argument("--no-pool", action="store_true", help="take no warm machine, also where x07 pool keeps some")
    group.add_argument("--no-cache", action="store_true", help="build also what was built before from the same source")
    group.add_argument("--cold", action="store_true", help="boot the machines anew instead of cloning saved ones")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add_document_flags(group, "print the result as one JSON object instead of the program's output")
    group.add_argument("--raw", action="store_true", help="let a terminal have control sequences of the program's")
    group.add_argument(
        "--max-output-bytes",
        action=Once,
        type=whole_number(0, 1 << 40, "bytes"),
        metavar="N",
        help="per stream (default: 64 MiB); of an X07 program its output (default: its profile's, else 1 MiB)",
    )
    group.add_argument("--compiled-out", action=Once, type=named_file, metavar="FILE", help="keep what was built there")
    group.add_argument(
        "--report",
        action=Once,
        choices=("runner", "wrapped"),
        help="print X07's report instead, and end with its exit code",
    )
    group.add_argument(
        "--attest-runtime",
        action=Once,
        type=named_file,
        metavar="FILE",
        help="X07's attestation of the run, with --report runner if none is named",
    )
    group.add_argument("--dry-run", action="store_true", help="boot nothing: say what would be done")
