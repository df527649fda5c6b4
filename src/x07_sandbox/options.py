"""The table of a run's options: one row for each flag of `x07 run` and each keyword of `run_program`.

Parsers, argument checks, error messages, help and reference pages are made from these rows. `FORMS` says once how a
value of each kind is read from text, written as text, and passed from Python. The typed signatures in `library` are
written out for type checkers, and a test compares them with this table.
"""

from __future__ import annotations

import collections.abc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from x07_sandbox.host.settings import BUILD_S_MAX, GIB, MIB, QUEUE_S
from x07_sandbox.host.variables import SANDBOX_BACKENDS

if TYPE_CHECKING:
    from x07_sandbox.errors import Flag

# fmt: off
Kind = Literal[
    "text", "name", "file", "folder", "size", "seconds", "number", "choice", "toolchain", "switch", "maybe",
    "list", "names", "patterns", "words", "variables", "contents", "policy", "source", "function",
]
# fmt: on
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE: Final = re.compile(r"([0-9]{1,12})(?:(\.[0-9]{1,6})?([KMG])(?:i?B)?)?", re.IGNORECASE | re.ASCII)
_NUMBER_CHARS: Final = 32


class Option(msgspec.Struct, frozen=True):
    """One option.

    flag: the flag of the command line; "" if only Python has the option.
    metavar: the word for the value in help texts; "" stands for the choices.
    sets: the field of RunRequest, such as "limits.mem_bytes"; "" if the command itself uses the value.
    keyword: the keyword of `run_program`; "" if Python does not have the option.
    least, most: the range of a number, in bytes, in seconds or in *unit*.
    choices: the accepted words.
    default: the value if the flag is not given. A flag with a default may be repeated, and the last value counts.
    field: the policy field that the option adds to or relaxes; "" for a limit, which *sets* names.
    manifest: the key of x07-sandbox.toml that the option replaces.
    only: the command that has the flag; "" if both `x07 run` and `x07 exec` have it.
    level: the level of help that shows the flag: "" for `--help`, or NAME for `--help-NAME`.
    dest: the name of the value in a parsed command line; "" if it is the name of the flag.
    """

    flag: str
    metavar: str
    help: str
    kind: Kind = "text"
    sets: str = ""
    keyword: str = ""
    least: float = 0
    most: float = 0
    unit: str = ""
    choices: tuple[str, ...] = ()
    default: str | float | None = None
    field: str = ""
    manifest: str = ""
    only: Literal["", "run", "exec"] = ""
    level: Literal["", "all", "x07"] = ""
    dest: str = ""

    @property
    def name(self) -> str:
        """The name of the value in a parsed command line."""
        return self.dest or self.flag.removeprefix("--").replace("-", "_")

    @property
    def repeats(self) -> bool:
        """Whether the value is a list, to which each flag adds one item."""
        return self.kind in {"list", "names", "patterns", "variables"}

    def read(self, text: str) -> Any:  # noqa: ANN401 - of the kind's type
        """Return the value that *text* stands for. Raises ValueError, whose text is the reason."""
        return FORMS[self.kind].read(self, text)

    def flag_text(self, value: float) -> str:
        """Return the flag with a value, such as `--cpu-time 2.5`."""
        return f"{self.flag} {FORMS[self.kind].write(value)}"

    def argument(self, value: Any) -> Any:  # noqa: ANN401 - as above
        """Return a value in the form of the keyword's argument, whose limits of time are in seconds."""
        return value / 1000 if self.kind == "seconds" else value

    def range_fault(self, number: float) -> str:
        """Return the problem with a number that is out of range, or "" for a valid one. It has the unit of *most*."""
        if self.least <= number <= self.most:
            return ""
        least, most = (size_text(int(end)) if self.kind == "size" else str(end) for end in (self.least, self.most))
        return f"must be at least {least} and at most {most}{' seconds' if self.kind == 'seconds' else ''}"


def parse_size(text: str) -> int | None:
    """Return the number of bytes of a size such as 512M, 1.5G or a plain number, or None for any other text."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    number, fraction, unit = found[1], found[2] or "", (found[3] or "").upper()
    return int(float(number + fraction) * _UNITS[unit]) if fraction else int(number) * _UNITS[unit]


def size_text(size: int) -> str:
    """Return a size in the form that flags accept: 1536M for 1.5 GiB."""
    unit = next(unit for unit in ("G", "M", "K", "") if size % _UNITS[unit] == 0)
    return f"{size // _UNITS[unit]}{unit}"


def milliseconds(seconds: float) -> int:
    """Return a limit of time in milliseconds, at least 1."""
    return max(1, round(seconds * 1000))


def read_seconds(text: str, most: float) -> float:
    """Return a time in seconds above 0, such as 2 or 0.5. Raises ValueError."""
    try:
        value = float(text) if text.isascii() and len(text) < _NUMBER_CHARS else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value <= most:  # NaN is not
        raise ValueError(f"give a time above 0 and up to {most:g} seconds, not {text!r}")
    return value


def _read_size(row: Option, text: str) -> int:
    fault = "is not a size; write a number of bytes, or a number with K, M or G, such as 512M"
    if (size := parse_size(text)) is None or (fault := row.range_fault(size)):
        raise ValueError(f"{text!r} {fault}")
    return size


def _read_number(row: Option, text: str) -> int:
    low, high = int(row.least), int(row.most)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(high)) and low <= int(text) <= high):
        raise ValueError(f"give a whole number of {row.unit} from {low} to {high}, not {text!r}")
    return int(text)


def _read_name(_row: Option, text: str) -> str:
    if not text:
        raise ValueError("the name is empty")
    return text


def _read_folder(_row: Option, text: str) -> Path:
    if not text:  # as from an unset shell variable; it does not mean `.`
        raise ValueError("the name of the folder is empty")
    return Path(text)


def _read_pattern(_row: Option, text: str) -> str:
    if text in {"", ".", ".."} or "/" in text:  # one with a slash would match nothing
        raise ValueError(f"{text!r} is not a pattern for a name; it must not be empty or contain a slash")
    return text


class Form(NamedTuple):
    """How values of one kind are read, written and passed.

    read: returns the value for the text of a flag. Raises ValueError, whose text is the reason.
    write: returns the text for a value, as the flag takes it.
    types, expected: the types of an argument from Python, and their words in messages; None if others check it.
    """

    read: Callable[[Option, str], Any] = lambda _row, text: text
    write: Callable[[Any], str] = str
    types: Any = None
    expected: str = ""


FORMS: Final[dict[Kind, Form]] = {
    "text": Form(types=str, expected="str"),
    "toolchain": Form(types=str, expected="str"),
    "choice": Form(types=str, expected="str"),
    "name": Form(_read_name),
    "names": Form(_read_name),
    "file": Form(lambda row, text: Path(_read_name(row, text))),
    "folder": Form(_read_folder),
    "policy": Form(),
    "source": Form(types=str | bytes, expected="str or bytes"),
    "words": Form(types=collections.abc.Sequence, expected="a list of str"),
    "list": Form(types=collections.abc.Sequence, expected="a list of str"),
    "patterns": Form(_read_pattern, types=collections.abc.Sequence, expected="a list of str"),
    "size": Form(_read_size, size_text, str | int, "a size such as '1G' or a number of bytes"),
    "seconds": Form(
        lambda row, text: milliseconds(read_seconds(text, row.most)),
        lambda ms: f"{ms / 1000:.3f}".rstrip("0").rstrip("."),
        float | int,
        "a number",
    ),
    "number": Form(_read_number, str, int, "int"),
    "switch": Form(types=bool, expected="a bool"),
    "variables": Form(types=collections.abc.Mapping, expected="a mapping of str to str"),
    "contents": Form(types=collections.abc.Mapping, expected="a mapping of str to str or bytes"),
}
"""The form of each kind of value. A limit of time is in milliseconds, and a size in bytes."""

CHANGES: Final = ("apply", "all-or-nothing", "keep", "discard")

# fmt: off
LIMITS: Final = (
    Option("--memory", "SIZE", "memory limit, such as 512M or 1G", "size", "limits.mem_bytes", "memory", MIB, 16 * GIB),
    Option("--cpu-time", "S", "CPU time limit in seconds", "seconds", "limits.cpu_ms", "cpu_s", 0.001, 600),
    Option("--timeout", "S", "limit of elapsed time in seconds", "seconds", "limits.wall_ms", "timeout_s", 0.001, 600),
    Option("--procs", "N", "limit of processes and threads that the program may start",
           "number", "limits.procs", "procs", 0, 1024, "processes"),
    Option("--fds", "N", "limit of open files per process", "number", "limits.fds", "fds", 0, 1024, "open files"),
)
FILE_SIZE: Final = Option(
    "--max-file-size", "SIZE", "copy no larger file, into the VM or back (default: 256M; at most 4095M)",
    "size", "limits.file_bytes", "max_file_size", 1, 4 * GIB - 1, field="fs.max_read_bytes", level="all",
)
GRANTS: Final = (
    Option("--allow-host", "HOST:PORT[,PORT...]", "let the program connect to HOST",
           "list", "overrides.allow_host", "allow_hosts", field="net.allow_hosts"),
    Option("--allow-host-file", "FILE", "apply --allow-host to each line of FILE",
           "list", "overrides.allow_host_file", level="all"),
    Option("--deny-host", "HOST:PORT|HOST:*", "deny connections to HOST, even if the policy or a flag allows them",
           "list", "overrides.deny_host", "deny_hosts"),
    Option("--deny-host-file", "FILE", "apply --deny-host to each line of FILE",
           "list", "overrides.deny_host_file", level="all"),
    Option("--allow-read-root", "PATH", "let the program read this folder",
           "list", "overrides.allow_read_root", "read_roots", field="fs.read_roots"),
    Option("--allow-write-root", "PATH", "let the program modify this folder; changes are copied back",
           "list", "overrides.allow_write_root", "write_roots", field="fs.write_roots"),
)
COPIED: Final = (
    Option("--allow-hidden", "", "copy dotfiles too, into the VM and back",
           "switch", "overrides.allow_hidden", "allow_hidden", field="fs.deny_hidden"),
    Option("--allow-symlinks", "", "copy symbolic links too, into the VM and back",
           "switch", "overrides.allow_symlinks", "allow_symlinks", field="fs.allow_symlinks"),
)
OF_POLICIES: Final = (*LIMITS, FILE_SIZE, *GRANTS, *COPIED)
"""The options that change the policy. `x07 policy new` and `x07 policy init` have them too."""

OF_APPLY: Final = (
    Option("--only", "PATH", "apply only changes to PATH (absolute, or relative to a folder granted to the run), "
           "or to names like '*.py'", "names", keyword="only"),
    Option("--skip", "PATH", "skip changes to PATH, which may be a pattern too", "list", keyword="skip"),
    Option("--allow-protected", "PATTERN", "also apply changes to protected names such as .git or Jenkinsfile",
           "names", keyword="allow_protected"),
    Option("--allow-hidden", "", "also apply changes to dotfiles", "switch"),
    Option("--allow-symlinks", "", "also apply symbolic links", "switch"),
)
"""The options of `x07 apply`. In messages, the values of one flag are quoted for a shell."""

INPUTS: Final = (
    Option("--input", "FILE", "standard input of the program (default: the standard input of x07)",
           "file", "input", "input", manifest="run.input"),
    Option("--stdin", "", "use the standard input of x07 even if the project names an input file",
           "switch", "stdin", level="all"),
    Option("--input-b64", "TEXT", "standard input of the program, encoded in base64", level="all"),
)
"""The options of which only one may be given."""

DOCUMENT: Final = (
    Option("--report-out", "FILE", "write the JSON object to FILE, with or without --json", "file", level="all"),
    Option("--quiet-json", "", "do not print the JSON object; only write it to the file of --report-out",
           "switch", level="all"),
)
"""The flags, besides --json, of each command that can print a JSON document."""

OF_X07: Final = (
    Option("--solve-fuel", "N", "execution budget (fuel), for X07 programs only",
           "number", most=1 << 48, unit="units", only="run", level="x07"),
    Option("--max-memory-bytes", "N", "memory limit in bytes, for X07 programs only",
           "number", most=1 << 48, unit="units", only="run", level="x07"),
    Option("--cpu-time-limit-seconds", "N", "CPU time limit in seconds, for X07 programs only",
           "number", most=1 << 48, unit="units", only="run", level="x07"),
    Option("--auto-ffi", "", "whether to compile the native code of packages", "maybe", only="run", level="x07"),
)
"""The options for X07's compiler."""


def flag_for_file(size: int) -> str:
    """Return the flag that allows a file of *size* bytes to be copied, rounded up to MiB."""
    return FILE_SIZE.flag_text(min(-(-size >> 20) << 20, int(FILE_SIZE.most)))


# The options of a run, by their groups in help texts.
GROUPS: Final[dict[str, tuple[Option, ...]]] = {
    "program and policy": (
        Option("--workdir", "DIR", "start in a copy of this folder; changes are copied back",
               "folder", "workdir", "workdir"),
        Option("-c", "CODE", "run this source text; requires --toolchain",
               "source", "source", "source", only="run", dest="code"),
        Option("--toolchain", "T", "how to build and start the program (default: from the file name)",
               "toolchain", "toolchain", "toolchain", only="run"),
        Option("--read", "", "make the folder of --workdir read-only for the command",
               "switch", "read_only", "read_only", only="exec"),
        Option("--policy", "FILE", "policy file or built-in:NAME (default: no network or files, 60 s, 512 MiB)",
               "policy", "policy", "policy", manifest="policy"),
        *LIMITS,
        FILE_SIZE,
        Option("--build-timeout", "S", "limit of elapsed time of the build in seconds (default: 300)",
               "seconds", "build_wall_ms", "build_timeout_s", 0, BUILD_S_MAX, only="run", level="all"),
        Option("--scale-limits", "", "in an emulated VM, multiply time limits by the measured slowdown",
               "switch", "scale_limits", "scale_limits"),
        Option("--env", "NAME=VALUE", "set an environment variable; NAME alone copies it from your environment",
               "variables", "env", "env", manifest="run.env"),
        *GRANTS,
    ),
    "files": (
        *INPUTS,
        Option("--changes", "HOW", "apply (default), all-or-nothing, keep or discard the changes to files",
               "choice", "changes", "changes", choices=CHANGES, default="apply"),
        Option("--net-log", "FILE", "write the log of connections to FILE, as one JSON object per line",
               "file", level="all"),
        Option("--ca", "FILE", "let the program also trust the certificates in this PEM file",
               "file", "ca", "ca", level="all"),
        Option("--diff", "FILE", "also write the changes to FILE as a patch", "file"),
        Option("--out", "DIR", "after the run, copy the contents of /x07/out in the VM to DIR", "folder", "out", "out"),
        *COPIED,
        Option("--git", "", "copy the git history of --workdir into the VM, and new commits back",
               "switch", "git", "git"),
        Option("--allow-protected", "PATTERN", "let the program change protected names such as .git or Jenkinsfile",
               "names", "allow_protected"),
        Option("--hide", "PATTERN", "do not copy matching files into the VM, e.g. '*.csv'", "patterns", "hide", "hide"),
        Option("--reveal", "PATTERN", "copy matching files into the VM even if they look like secrets, e.g. '*.pem'",
               "patterns", "reveal", "reveal", level="all"),
    ),
    "virtual machine": (
        Option("--image", "NAME|DIGEST", "guest image (default: the one named default)",
               "text", "image", "image", manifest="image"),
        Option("--guest-root", "", "let the program be root in the VM, over a writable copy of the system",
               "switch", "guest_root", "guest_root", level="all"),
        Option("--require-hardware", "", "refuse an emulated VM; run only with hardware virtualisation",
               "switch", "require_hardware"),
        Option("--backend", "B", "backend that runs the program, such as podman (default: X07_VM_BACKEND, else qemu)",
               level="all"),
        Option("--sandbox-backend", "", "kind of isolation (default: X07_SANDBOX_BACKEND, else auto)",
               "choice", choices=tuple(SANDBOX_BACKENDS), level="all"),
        Option("--i-accept-weaker-isolation", "", "allow a backend that is not a virtual machine",
               "switch", level="all"),
        Option("--queue-timeout", "S", "how many seconds to wait if too many VMs are running (default: 600)",
               "number", "queue_s", "", 0, QUEUE_S, "seconds", default=QUEUE_S, level="all"),
        Option("--no-pool", "", "do not use a waiting VM of x07 pool", "switch", level="all"),
        Option("--no-cache", "", "build again, even if the same source was built before",
               "switch", only="run", level="all"),
        Option("--cold", "", "boot the VMs instead of cloning saved VMs", "switch", "cold", level="all"),
    ),
    "output": (
        Option("--json", "", "print the result as one JSON object instead of the program's output", "switch"),
        *DOCUMENT,
        Option("--json=full", "", "like --json, but list what enforces every field of the policy",
               "switch", level="all", dest="json"),
        Option("--raw", "", "pass the program's control sequences to the terminal unfiltered",
               "switch", "raw", level="all"),
        Option("--max-output-bytes", "N", "limit of each output stream in bytes (default: 64 MiB)",
               "number", "max_output_bytes", "max_output_bytes", 0, 1 << 40, "bytes"),
        Option("--compiled-out", "FILE", "save the built executable to FILE", "file", only="run", level="all"),
        Option("--dry-run", "", "show what would be done, without running anything", "switch"),
    ),
    "for programs in the X07 language, and scripts that call its command": (
        Option("--program", "F", "the program, if PROGRAM is not given", only="run", level="x07", dest="program_flag"),
        Option("--project", "F", "the project, if PROGRAM is not given", only="run", level="x07"),
        Option("--artifact", "F", "the artifact, if PROGRAM is not given", only="run", level="x07"),
        Option("--world", "W", "only run-os-sandboxed is allowed", default="run-os-sandboxed", only="run", level="x07"),
        Option("--profile", "N", "use this profile of the x07.json", "text", "profile", only="run", level="x07"),
        *OF_X07,
        Option("--report", "", "print X07's report instead of the program's output, and exit with its exit code",
               "choice", choices=("runner", "wrapped"), only="run", level="x07"),
        Option("--attest-runtime", "FILE", "write X07's attestation of the run to FILE; implies --report runner",
               "file", only="run", level="x07"),
    ),
}
# The arguments of the command line, and the keywords without a flag.
_OTHERS: Final = (
    Option("", "PROGRAM", "source file, executable or project folder", "file", "program", "program"),
    Option("", "ARGS", "arguments of the program", "words", "args", "args", manifest="run.args"),
    Option("", "", "a command of the image, with its arguments, instead of a program", "list", "command", "command"),
    Option("", "", "more files, by relative name, beside the program", "contents", "files", "files"),
    Option("", "", "limit of the files in the result", "number", "max_files_bytes", "max_files_bytes", 0, GIB, "bytes"),
    Option("", "", "a function that is called with output as it arrives", "function", "", "on_output"),
)
# fmt: on
OPTIONS: Final = (*(row for rows in GROUPS.values() for row in rows), *_OTHERS)
BY_FLAG: Final = {row.flag: row for row in OPTIONS if row.flag}
BY_KEYWORD: Final = {row.keyword: row for row in OPTIONS if row.keyword}
# fmt: off
_OF_ONE_RUN: Final = {
    "source", "toolchain", "timeout_s", "build_timeout_s", "input", "changes", "out", "max_output_bytes",
}
# fmt: on
OF_SANDBOXES: Final = tuple(row for row in BY_FLAG.values() if row.keyword and row.keyword not in _OF_ONE_RUN)
"""The options that a sandbox shares with runs."""
_KEYWORDS: Final = {row.flag: row for row in (*OPTIONS, *OF_APPLY) if row.keyword}


def keyword(flag: Flag) -> str:
    """Return the keyword for a flag, for callers from Python: `--memory 1G` becomes `memory="1G"`.

    A flag without a keyword stays.
    """
    name, _, value = flag.partition(" ")
    if name == "--sandbox-backend":  # Python callers select the backend by a variable
        return f"X07_SANDBOX_BACKEND={value}"
    row = _KEYWORDS.get(name)
    if row is None or not value:
        return flag if row is None else row.keyword
    if row in OF_APPLY:
        from shlex import split  # few messages need it

        return f"{row.keyword}={json.dumps(split(value))}"
    shown = value if row.kind in {"seconds", "number"} else json.dumps([value] if row.repeats else value)
    return f"{row.keyword}={shown}"
