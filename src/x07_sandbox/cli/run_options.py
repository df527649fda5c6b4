"""The flags of `x07 run`."""

from __future__ import annotations

import argparse

from x07_sandbox.cli.usage import (
    add_document_flags,
    name_pattern,
    named,
    named_file,
    named_folder,
    option,
    repeated,
    seconds,
    switch,
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
    _add_files(parser)
    _add_input(parser)
    _add_machine(parser)
    _add_output(parser)
    _add_x07(parser)


def _add_program(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the program")
    option(group, "-c", "CODE", "a source text; needs --toolchain", dest="code")
    option(group, "--toolchain", "T", "how it is built and started", choices=tuple(BY_NAME))
    what = "what it may touch: a document, or built-in:TEMPLATE (default: no files, no network, 60 s, 512 MiB)"
    option(group, "--policy", "FILE", what)
    option(group, "--timeout", "S", "seconds that it may take, at most the policy's", type=seconds(600))
    repeated(group, "--env", "NAME=VALUE", "a variable of the program; NAME alone: ours")
    group = parser.add_argument_group("changes to the policy, each any number of times")
    for name, form, meaning in OVERRIDES:
        repeated(group, name, form, meaning)


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("its files")
    group.add_argument(
        "--changes",
        choices=("apply", "all-or-nothing", "keep", "discard"),
        default="apply",
        help="what becomes of its changes to the folders that it may change, when it has ended by itself; apply leaves "
        "out and keeps what may not be changed; kept ones wait for x07 diff, x07 apply (default: apply)",
    )
    option(group, "--net-log", "FILE", "write a line of JSON there for each connection it asks for", type=named_file)
    option(group, "--diff", "FILE", "write its changes there too, as a patch to read", type=named_file)
    option(group, "--out", "DIR", "a folder of ours that it finds as /x07/out, to write to", type=named_folder)
    switch(group, "--allow-hidden", "let names that begin with a dot in and out (built-in policies only)")
    switch(group, "--allow-symlinks", "let symbolic links in and out (built-in policies only)")
    obeyed = "let it change names that other tools run or obey (.git, Jenkinsfile): docs/policy.md"
    repeated(group, "--allow-protected", "PATTERN", obeyed, type=named)
    repeated(group, "--hide", "PATTERN", "names that do not go in, wherever they lie", type=name_pattern)
    repeated(group, "--reveal", "PATTERN", "names of secrets that do go in: '*.pem'", type=name_pattern)


def _add_input(parser: argparse.ArgumentParser) -> None:
    title = "its standard input (default: the project's, else ours, which is taken whether the program reads it or not)"
    group = parser.add_argument_group(title).add_mutually_exclusive_group()
    option(group, "--input", "FILE", "a file", type=named_file)
    switch(group, "--stdin", "ours, whatever the project says")
    option(group, "--input-b64", "TEXT", "bytes, as base64")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machines")
    option(group, "--image", "NAME|DIGEST", "the guest image (default: default)")
    switch(group, "--require-hardware", "refuse emulation")
    option(group, "--backend", "B", "how they are started (default: X07_VM_BACKEND, else qemu)")
    wall = "the wall (default: X07_SANDBOX_BACKEND, else auto)"
    option(group, "--sandbox-backend", None, wall, choices=tuple(SANDBOX_BACKENDS))
    switch(group, "--i-accept-weaker-isolation", "accept a wall that is no virtual machine, if named")
    queue = whole_number(0, int(settings.QUEUE_S), "seconds")
    doc = "how long to wait while as many machines run as may (default: 600)"
    group.add_argument("--queue-timeout", type=queue, default=settings.QUEUE_S, metavar="S", help=doc)
    switch(group, "--no-pool", "take no warm machine, also where x07 pool keeps some")
    switch(group, "--no-cache", "build also what was built before from the same source")
    switch(group, "--cold", "boot the machines anew instead of cloning saved ones")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add_document_flags(group, "print the result as one JSON object instead of the program's output")
    switch(group, "--raw", "let a terminal have control sequences of the program's")
    most = "per stream (default: 64 MiB); of an X07 program its output (default: its profile's, else 1 MiB)"
    option(group, "--max-output-bytes", "N", most, type=whole_number(0, 1 << 40, "bytes"))
    option(group, "--compiled-out", "FILE", "keep what was built there", type=named_file)
    report = "print X07's report instead, and end with its exit code"
    option(group, "--report", None, report, choices=("runner", "wrapped"))
    attest = "X07's attestation of the run, with --report runner if none is named"
    option(group, "--attest-runtime", "FILE", attest, type=named_file)
    switch(group, "--dry-run", "boot nothing: say what would be done")


def _add_x07(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for X07's own programs, and scripts that call X07's command")
    for kind, dest in (("program", "program_flag"), ("project", "project"), ("artifact", "artifact")):
        option(group, f"--{kind}", "F", f"the {kind}, in place of PROGRAM", dest=dest)
    group.add_argument("--world", metavar="W", default="run-os-sandboxed", help="run-os-sandboxed, the only one here")
    option(group, "--profile", "N", "of an x07.json")
    group.add_argument("--auto-ffi", action=argparse.BooleanOptionalAction, help="compile the foreign code of packages")
    for name in X07_LIMITS:
        option(group, name, "N", "binds X07 programs only", type=whole_number(0, 1 << 48, "units"))
