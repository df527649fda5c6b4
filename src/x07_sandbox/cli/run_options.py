"""The flags of `x07 run`."""

from __future__ import annotations

import argparse
from typing import Any

from x07_sandbox.cli.parser import (
    add_document_flags,
    add_help_levels,
    file_path,
    folder_path,
    name_pattern,
    nonempty,
    option,
    repeated,
    seconds,
    switch,
    whole_number,
)
from x07_sandbox.host import settings
from x07_sandbox.host.variables import SANDBOX_BACKENDS
from x07_sandbox.programs.toolchains import BY_NAME, TOOLCHAINS, describe

_EXAMPLES = """examples:
  x07 run prog.py                                    no files, no network, 60 s
  x07 run --input data.txt prog.c -- --top 10        compile, then run with input and arguments
  x07 run -c 'print(6 * 7)' --toolchain python
  x07 run --allow-write-root build --allow-host example.org:443 prog.py
"""
_MORE_EXAMPLES = """  generate | x07 run --toolchain shell -           the source comes from standard input
  x07 run --policy strict.json --json prog.py
  x07 run --memory 1G --timeout 300 prog.py
  x07 run --env LEVEL=3 ./a.out
  while read -r name; do x07 run --input /dev/null "$name"; done < list
  x07 run --dry-run project/                       show what would be done, without running anything
"""
_EXITS = """exit code: the program's own; 2 wrong usage, 124 time limit, 125 not run or VM lost, 126 build failed,
128+N killed by signal N, 137 out of memory, 153 output limit. Scripts should read `outcome` in --json.
"""
OVERRIDES = (
    ("--allow-host", "HOST:PORT[,PORT...]", "let the program connect to HOST"),
    ("--allow-host-file", "FILE", "apply --allow-host to each line of FILE"),
    ("--deny-host", "HOST:PORT|HOST:*", "deny connections to HOST, even if the policy or a flag allows them"),
    ("--deny-host-file", "FILE", "apply --deny-host to each line of FILE"),
    ("--allow-read-root", "PATH", "let the program read this folder"),
    ("--allow-write-root", "PATH", "let the program modify this folder; changes are copied back"),
)
# Options that only --help-all shows.
RARE = frozenset(
    {
        *("--allow-host-file", "--deny-host-file", "--net-log", "--ca", "--max-file-size"),
        *("--reveal", "--stdin", "--input-b64", "--backend"),
        *("--sandbox-backend", "--i-accept-weaker-isolation", "--queue-timeout", "--no-pool", "--no-cache", "--cold"),
        *("--report-out", "--quiet-json", "--json=full", "--raw", "--compiled-out"),
    }
)
X07_LIMITS = ("--solve-fuel", "--max-memory-bytes", "--cpu-time-limit-seconds")
X07_OPTIONS = frozenset(
    {
        *("--program", "--project", "--artifact", "--world", "--profile", "--auto-ffi", "--report", "--attest-runtime"),
        *X07_LIMITS,
    }
)


def epilog(level: str) -> str:
    """Return the text that the help of this level shows below the options."""
    if level == "all":
        return _full_epilog()
    if level == "x07":
        return (
            "Without PROGRAM, x07 run uses the x07.json of this folder or of the nearest folder above it.\n"
            "docs/reference/x07.md describes the reports and the command x07-os-runner.\n"
        )
    languages = ", ".join(row.name for row in TOOLCHAINS)
    return f"toolchains: {languages}.\nA project folder contains x07-sandbox.toml.\n{_EXITS}\n{_EXAMPLES}"


def _full_epilog() -> str:
    from x07_sandbox.plan.outcomes import describe_exits

    return f"""toolchains, selected by --toolchain or by the suffix of the file:
{describe()}
A folder with an x07-sandbox.toml is a project of several files. See docs/reference/programs.md.

exit codes and outcomes (docs/reference/outcomes.md):
{describe_exits()}A program can exit with the same numbers, so scripts should read `outcome`. The exit code is also 125
if x07 could not write the output.

{_EXAMPLES}{_MORE_EXAMPLES}"""


def help_level(action: argparse.Action) -> str:
    """Return the level of help that shows *action*: "" for `--help`, "x07" for `--help-x07`, "all" for `--help-all`."""
    names = action.option_strings
    if any(name in RARE for name in names):
        return "all"
    return "x07" if any(name in X07_OPTIONS for name in names) else ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `x07 run`."""
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        nargs="?",
        help="source file, executable or project folder, or - for standard input",
    )
    parser.add_argument("args", nargs="*", metavar="ARGS", help="arguments of the program, after --")
    add_help_levels(parser, "all", "x07")
    add_program(parser)
    add_files(parser)
    add_machine(parser)
    add_output(parser)
    add_x07(parser)
    parser.set_defaults(command=[], read=False)


def add_command_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `x07 exec`, which builds nothing."""
    parser.add_argument("command", nargs="*", metavar="COMMAND [ARGS]", help="the command and its arguments, after --")
    add_help_levels(parser, "all")
    add_program(parser, built=False)
    add_files(parser)
    add_machine(parser, built=False)
    add_output(parser, built=False)
    names = ["program", "code", "toolchain", "artifact", "program_flag", "project", "compiled_out", "report"]
    names += ["attest_runtime", "profile", "auto_ffi", "build_timeout"]
    parser.set_defaults(**dict.fromkeys(names), args=[], no_cache=False)
    parser.set_defaults(world="run-os-sandboxed", **{name[2:].replace("-", "_"): None for name in X07_LIMITS})


def add_program(parser: argparse.ArgumentParser, *, built: bool = True) -> None:
    """Add the options that select the program and its policy. built: False for `x07 exec`, which builds nothing."""
    group = parser.add_argument_group("program and policy")
    option(group, "--workdir", "DIR", "start in a copy of this folder; changes are copied back", type=folder_path)
    if built:
        option(group, "-c", "CODE", "run this source text; requires --toolchain", dest="code")
        how = "how to build and start the program (default: from the file name)"
        option(group, "--toolchain", "T", how, choices=tuple(BY_NAME))
    else:
        switch(group, "--read", "make the folder of --workdir read-only for the command")
    what = "policy file or built-in:NAME (default: no network or files, 60 s, 512 MiB)"
    option(group, "--policy", "FILE", what)
    add_limits(group, built=built)
    repeated(group, "--env", "NAME=VALUE", "set an environment variable; NAME alone copies it from your environment")
    for name, form, meaning in OVERRIDES:
        repeated(group, name, form, meaning)


def add_limits(to: argparse._ActionsContainer, *, of_policy: bool = False, built: bool = True) -> None:
    """Add the flags that `limits_of` reads. of_policy: whether to add only flags for which a policy has a field."""
    option(to, "--memory", "SIZE", "memory limit, such as 512M or 1G", type=memory_size)
    option(to, "--cpu-time", "S", "CPU time limit in seconds", type=seconds(600))
    option(to, "--timeout", "S", "limit of elapsed time in seconds", type=seconds(600))
    procs = "limit of processes and threads that the program may start"
    option(to, "--procs", "N", procs, type=whole_number(0, 1024, "processes"))
    option(to, "--fds", "N", "limit of open files per process", type=whole_number(0, 1024, "open files"))
    if of_policy:
        to.set_defaults(build_timeout=None, scale_limits=False, max_file_size=None)
        return
    doc = "copy no larger file, into the VM or back (default: 256M; at most 4095M)"
    option(to, "--max-file-size", "SIZE", doc, type=file_size)
    if built:
        build = "limit of elapsed time of the build in seconds (default: 300)"
        option(to, "--build-timeout", "S", build, type=seconds(settings.BUILD_S_MAX))
    switch(to, "--scale-limits", "in an emulated VM, multiply time limits by the measured slowdown")


def limits_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of RunRequest that the flags of `add_limits` set."""
    given: dict[str, Any] = {}
    limits = {
        "mem_bytes": options.memory,
        "cpu_ms": _milliseconds(options.cpu_time),
        "wall_ms": _milliseconds(options.timeout),
        "procs": options.procs,
        "fds": options.fds,
        "file_bytes": options.max_file_size,
    }
    if any(value is not None for value in limits.values()):
        from x07_sandbox.policy.limits import LimitChanges

        given["limits"] = LimitChanges(**limits)
    if options.build_timeout is not None:
        given["build_wall_ms"] = _milliseconds(options.build_timeout)
    if options.scale_limits:
        given["scale_limits"] = True
    return given


def memory_size(text: str, field: str = "mem_bytes") -> int:
    """Option type: a size in bytes, such as 512M or 1G. field: the limit that it sets."""
    from x07_sandbox.policy.limits import parse_size, range_fault

    fault = "is not a size; write a number of bytes, or a number with K, M or G, such as 512M"
    if (size := parse_size(text)) is None or (fault := range_fault(field, size)):
        raise argparse.ArgumentTypeError(f"{text!r} {fault}")
    return size


def file_size(text: str) -> int:
    """Option type: the size of a file in bytes, such as 1G."""
    return memory_size(text, "file_bytes")


def _milliseconds(value_s: float | None) -> int | None:
    return None if value_s is None else max(1, round(value_s * 1000))


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the options for input, for files to copy into the sandbox, and for changed files."""
    group = parser.add_argument_group("files")
    given = group.add_mutually_exclusive_group()
    option(
        given, "--input", "FILE", "standard input of the program (default: the standard input of x07)", type=file_path
    )
    switch(given, "--stdin", "use the standard input of x07 even if the project names an input file")
    option(given, "--input-b64", "TEXT", "standard input of the program, encoded in base64")
    group.add_argument(
        "--changes",
        choices=("apply", "all-or-nothing", "keep", "discard"),
        default="apply",
        metavar="HOW",
        help="apply (default), all-or-nothing, keep or discard the changes to files",
    )
    option(
        group, "--net-log", "FILE", "write the log of connections to FILE, as one JSON object per line", type=file_path
    )
    option(group, "--ca", "FILE", "let the program also trust the certificates in this PEM file", type=file_path)
    option(group, "--diff", "FILE", "also write the changes to FILE as a patch", type=file_path)
    option(group, "--out", "DIR", "after the run, copy the contents of /x07/out in the VM to DIR", type=folder_path)
    switch(group, "--allow-hidden", "copy dotfiles too, into the VM and back")
    switch(group, "--allow-symlinks", "copy symbolic links too, into the VM and back")
    doc = "let the program change protected names such as .git or Jenkinsfile"
    repeated(group, "--allow-protected", "PATTERN", doc, type=nonempty)
    repeated(group, "--hide", "PATTERN", "do not copy matching files into the VM, e.g. '*.csv'", type=name_pattern)
    repeated(
        group,
        "--reveal",
        "PATTERN",
        "copy matching files into the VM even if they look like secrets, e.g. '*.pem'",
        type=name_pattern,
    )


def add_machine(parser: argparse.ArgumentParser, *, built: bool = True) -> None:
    """Add the options for the guest image and the backend."""
    group = parser.add_argument_group("virtual machine")
    option(group, "--image", "NAME|DIGEST", "guest image (default: the one named default)")
    switch(group, "--require-hardware", "refuse an emulated VM; run only with hardware virtualisation")
    option(
        group, "--backend", "B", "backend that runs the program, such as podman (default: X07_VM_BACKEND, else qemu)"
    )
    isolation = "kind of isolation (default: X07_SANDBOX_BACKEND, else auto)"
    option(group, "--sandbox-backend", None, isolation, choices=tuple(SANDBOX_BACKENDS))
    switch(group, "--i-accept-weaker-isolation", "allow a backend that is not a virtual machine")
    queue = whole_number(0, int(settings.QUEUE_S), "seconds")
    doc = "how many seconds to wait if too many VMs are running (default: 600)"
    group.add_argument("--queue-timeout", type=queue, default=settings.QUEUE_S, metavar="S", help=doc)
    switch(group, "--no-pool", "do not use a waiting VM of x07 pool")
    if built:
        switch(group, "--no-cache", "build again, even if the same source was built before")
    switch(group, "--cold", "boot the VMs instead of cloning saved VMs")


def add_output(parser: argparse.ArgumentParser, *, built: bool = True) -> None:
    """Add the options for output."""
    group = parser.add_argument_group("output")
    add_document_flags(group, "print the result as one JSON object instead of the program's output")
    doc = "like --json, but list what enforces every field of the policy"
    group.add_argument("--json=full", dest="json", action="store_const", const="full", help=doc)
    switch(group, "--raw", "pass the program's control sequences to the terminal unfiltered")
    most = "limit of each output stream in bytes (default: 64 MiB)"
    option(group, "--max-output-bytes", "N", most, type=whole_number(0, 1 << 40, "bytes"))
    if built:
        option(group, "--compiled-out", "FILE", "save the built executable to FILE", type=file_path)
    switch(group, "--dry-run", "show what would be done, without running anything")


def add_x07(parser: argparse.ArgumentParser) -> None:
    """Add the options for programs in the X07 language, and for scripts that call X07's own command."""
    group = parser.add_argument_group("for programs in the X07 language, and scripts that call its command")
    for kind, dest in (("program", "program_flag"), ("project", "project"), ("artifact", "artifact")):
        option(group, f"--{kind}", "F", f"the {kind}, if PROGRAM is not given", dest=dest)
    group.add_argument("--world", metavar="W", default="run-os-sandboxed", help="only run-os-sandboxed is allowed")
    option(group, "--profile", "N", "use this profile of the x07.json")
    group.add_argument(
        "--auto-ffi", action=argparse.BooleanOptionalAction, help="whether to compile the native code of packages"
    )
    limits = ("execution budget (fuel)", "memory limit in bytes", "CPU time limit in seconds")
    for name, limit in zip(X07_LIMITS, limits, strict=True):
        doc = f"{limit}, for X07 programs only"
        option(group, name, "N", doc, type=whole_number(0, 1 << 48, "units"))
    report = "print X07's report instead of the program's output, and exit with its exit code"
    option(group, "--report", None, report, choices=("runner", "wrapped"))
    attest = "write X07's attestation of the run to FILE; implies --report runner"
    option(group, "--attest-runtime", "FILE", attest, type=file_path)
