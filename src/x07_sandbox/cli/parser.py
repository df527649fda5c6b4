"""The verbs (subcommands) of `x07`, the parser class of both commands, and the types of options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from x07_sandbox.cli.console import write_stdout
from x07_sandbox.errors import UsageError
from x07_sandbox.options import BY_FLAG, DOCUMENT, GROUPS, INPUTS, Option, read_seconds

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


VERBS: Final = {
    "run": "run a program in a throw-away virtual machine (VM)",
    "exec": "run a command from the guest image in a throw-away VM, in a copy of a folder",
    "bundle": "make an executable that runs a program in a throw-away VM under one policy",
    "diff": "show what a run changed",
    "apply": "apply a run's saved changes",
    "undo": "revert a run's applied changes",
    "ps": "list runs in progress",
    "inspect": "print everything about one run as JSON",
    "logs": "print a run's output, or the log of its connections",
    "report": "write a page about a run, to be read in a browser",
    "kill": "end a run",
    "init": "create a project file (x07-sandbox.toml or x07.json)",
    "policy": "write, check and explain policies",
    "image": "build, list, load, remove and verify guest images",
    "sandbox": "open a VM that stays, and run commands in it",
    "snapshot": "list, show and remove snapshots of sandboxes",
    "mcp": "serve sandboxes to an AI assistant, by the Model Context Protocol (MCP)",
    "pool": "keep VMs ready, so that runs start immediately",
    "sweep": "clean up after x07 processes that were killed",
    "df": "show disk usage of images, caches and records",
    "prune": "remove images, caches and records that are no longer needed",
    "completion": "print a completion script for a shell",
    "doctor": "check this host and say what to fix",
    "conform": "check that a backend behaves as documented",
}
_MODULES: Final = {  # modules that have several verbs
    "exec": "run",
    **dict.fromkeys(("diff", "apply", "undo"), "changes"),
    **dict.fromkeys(("ps", "inspect", "kill", "logs", "report"), "runs"),
    "completion": "help",
    "conform": "doctor",
    **dict.fromkeys(("sweep", "df", "prune"), "cleanup"),
}
_EXAMPLES: Final = """examples:
  x07 image build                         build the guest image (once)
  x07 run prog.py -- --verbose            run a Python program in a throw-away VM
  x07 run --input data.txt prog.c         compile in one VM, run in another
  x07 exec --workdir . -- make test       run an installed command in a copy of this folder
  x07 run --json prog.py | jq .outcome    print everything about the run as one JSON object
  x07 help run                            show the options of a command
"""
_WIDTH: Final = 110  # columns of help

# Each parser asks gettext for two titles of groups, which imports locale and looks for catalogues. None has our texts.
argparse._ = str  # type: ignore[attr-defined]


def type_of(row: Option) -> Callable[[str], Any]:
    """Return the option type (see add_argument) for the values of *row*."""

    def read(text: str) -> Any:  # noqa: ANN401 - of the row's kind
        try:
            return row.read(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None

    return read


def whole_number(lo: int, hi: int, what: str) -> Callable[[str], int]:
    """Return an option type: a whole number of *what* from *lo* to *hi*."""
    return type_of(Option("", "", "", "number", least=lo, most=hi, unit=what))


def seconds(most: int) -> Callable[[str], float]:
    """Return an option type: a time in seconds above 0, such as 2 or 0.5."""

    def read(text: str) -> float:
        try:
            return read_seconds(text, most)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None

    return read


folder_path: Final = type_of(Option("", "", "", "folder"))
nonempty: Final = type_of(Option("", "", "", "name"))
file_path: Final = type_of(Option("", "", "", "file"))


def variable(text: str) -> tuple[str, str]:
    """Parse a value of --env: NAME=VALUE, or NAME to take the value from our environment. Raises UsageError."""
    name, equals, value = text.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise UsageError(f"cannot use --env {name}", "the variable is not set here", f"Use --env {name}=VALUE")
    return name, os.environ[name]


def _choices(row: Option) -> tuple[str, ...] | None:
    if row.kind == "toolchain":
        from x07_sandbox.programs.toolchains import BY_NAME

        return tuple(BY_NAME)
    return row.choices or None


class Once(argparse.Action):
    """An argparse action: the option may be given only once, so that no value is silently ignored. Default: None."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - as argparse calls it
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - as above
    ) -> None:
        """Store the value. Raises argparse.ArgumentError if the option was already given."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given more than once")
        setattr(namespace, self.dest, values)


def option(to: argparse._ActionsContainer, flag: str, metavar: str | None, help: str, **words: Any) -> None:  # noqa: A002, ANN401 - as argparse has them
    """Add an option with a value. It may be given only once, unless *words* (see add_argument) set another action."""
    to.add_argument(flag, **({"action": Once, "metavar": metavar, "help": help} | words))


def repeated(to: argparse._ActionsContainer, flag: str, metavar: str, help: str, **words: Any) -> None:  # noqa: A002, ANN401 - as above
    """Add an option that may be given any number of times."""
    option(to, flag, metavar, help, action="append", default=[], **words)


def tag(text: str) -> tuple[str, str]:
    """Option type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not a tag; write NAME=VALUE")
    return name, value


def switch(to: argparse._ActionsContainer, flag: str, help: str) -> None:  # noqa: A002 - as above
    """Add an option without a value."""
    to.add_argument(flag, action="store_true", help=help)


def add_row(to: argparse._ActionsContainer, row: Option) -> None:
    """Add the flag of a row of the table of options."""
    words: dict[str, Any] = {"dest": row.name, "help": row.help}
    if row.kind == "switch":
        words |= {"action": "store_const", "const": row.flag.partition("=")[2] or True, "default": False}
    elif row.kind == "maybe":
        words |= {"action": argparse.BooleanOptionalAction}
    else:
        words |= {"metavar": row.metavar or None, "type": type_of(row), "choices": _choices(row)}
        if row.repeats:
            words |= {"action": "append", "default": []}
        else:
            words |= {"action": Once} if row.default is None else {"default": row.default}
    to.add_argument(row.flag, **words)


def add_groups(parser: argparse.ArgumentParser, command: Literal["run", "exec"]) -> None:
    """Add the options of a command that runs programs. An option that it lacks has the value of a flag not given."""
    for title, rows in GROUPS.items():
        mine = [row for row in rows if row.only in {"", command}]
        parser.set_defaults(**{row.name: row.default for row in rows if row not in mine})
        if not mine:
            continue
        group = parser.add_argument_group(title)
        alone = group.add_mutually_exclusive_group() if INPUTS[0] in mine else group
        for row in mine:
            add_row(alone if row in INPUTS else group, row)


def given_rows(options: argparse.Namespace, rows: Iterable[Option]) -> Iterator[tuple[Option, Any]]:
    """Yield the options of a request that were given, with their values. Raises UsageError."""
    for row in rows:
        value = getattr(options, row.name) if row.flag and row.sets else None
        if row.repeats and value:
            value = dict(map(variable, value)) if row.kind == "variables" else tuple(value)
        if value is not None and value is not False and value != []:
            yield row, value


def help_level(action: argparse.Action) -> str:
    """Return the level of help that shows *action*: "" for `--help`, "x07" for `--help-x07`, "all" for `--help-all`."""
    return next((BY_FLAG[name].level for name in action.option_strings if name in BY_FLAG), "")


class _HelpLevel(argparse.Action):
    """The argparse action of `--help-NAME`: print the help of the level NAME and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - as argparse calls it
        values: str | Sequence[Any] | None,  # noqa: ARG002 - as above
        option_string: str | None = None,  # noqa: ARG002 - as above
    ) -> NoReturn:
        write_stdout(parser.format_help(self.const).encode())  # type: ignore[call-arg]  # only a Parser has such options
        parser.exit()


def add_help_levels(parser: argparse._ActionsContainer, rest: str, *names: str) -> None:
    """Add `--help-NAME` for each level of help. rest: the level that shows every option. names: the other levels."""
    for name in (rest, *names):
        doc = "show every option" if name == rest else f"show the options for programs in the {name.upper()} language"
        words: dict[str, Any] = {"action": _HelpLevel, "nargs": 0, "const": name, "default": argparse.SUPPRESS}
        parser.add_argument(f"--help-{name}", help=doc, dest=argparse.SUPPRESS, **words)


def inner_verb(
    inner: argparse._SubParsersAction[Any], name: str, doc: str, fill: Callable[[Any], None] | None = None
) -> Any:  # noqa: ANN401 - as argparse has it
    """Add the parser of a verb such as `check` of `x07 policy`. doc: its help and description. fill: see `Parser`."""
    parser = inner.add_parser(name, help=doc, description=f"{doc[0].upper()}{doc[1:]}.")
    parser.fill = fill
    return parser


def add_document_flags(parser: argparse._ActionsContainer, json_help: str = "print one JSON object") -> None:
    """Add --json, --report-out and --quiet-json to a verb that can print a JSON document (cli/json_output)."""
    switch(parser, "--json", json_help)
    for row in DOCUMENT:
        add_row(parser, row)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter of help as wide as the terminal, up to 110 columns. Avoids the imports that the base class makes."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 36) -> None:
        try:
            columns = os.get_terminal_size(1).columns - 2
        except OSError:
            columns = _WIDTH
        super().__init__(prog, indent_increment, max_help_position, width=min(_WIDTH, max(40, columns)))


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError and accepts no abbreviated options.

    fill: adds the arguments. It is called only when they are needed: of a verb's actions, a command uses one.
    late_epilog: returns the text below the options for a level of help. It is called only when help is printed.
    level_of: returns the level of help that shows an option: "" for `--help`, NAME for `--help-NAME`.
    """

    fill: Callable[[Any], None] | None = None
    late_epilog: Callable[[str], str] | None = None
    level_of: Callable[[argparse.Action], str] | None = None

    def __init__(self, *args: Any, **words: Any) -> None:  # noqa: ANN401 - as argparse has them
        super().__init__(*args, **({"formatter_class": Formatter} | words | {"allow_abbrev": False}))

    def filled(self) -> None:
        """Add the arguments, if that is still to be done."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401 - as argparse has it
        """Parse the arguments that the parser knows."""
        self.filled()
        return super().parse_known_args(args, namespace)

    def format_help(self, level: str = "") -> str:
        """Return the help of one level; "all" has every option."""
        self.filled()
        if self.late_epilog is not None:
            self.epilog = self.late_epilog(level)
        if self.level_of is None or level == "all":
            return super().format_help()
        texts = {action: action.help for action in self._actions if self.level_of(action) != level}
        for action in texts:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in texts.items():
                action.help = text

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print help or version. Raises OSError; the method of the base class would ignore it."""
        if file is sys.stdout:
            write_stdout(message.encode("utf-8", "surrogateescape"))
        else:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        named, _, why = message.partition(": ")
        what, (word, _, name) = "wrong usage", named.partition(" ")
        if word == "argument" and why:  # argparse's form, "argument --memory: why"
            what, message = f"wrong usage of {name}", why.replace("invalid choice: ", "invalid choice ", 1)
        raise UsageError(what, message, f"See {self.prog} --help")


def parser_for(words: list[str]) -> Parser:
    """Return the parser of `x07`, with only the verb that *words* start with, or with all verbs if that is unknown."""
    from importlib import import_module

    known = words[:1] if words and words[0] in VERBS else []
    version = "" if known else import_module("x07_sandbox.host.settings").__version__  # it precedes the verb
    parser = Parser(
        prog="x07", description="Run an untrusted program in a throw-away virtual machine (VM).", epilog=_EXAMPLES
    )
    parser.add_argument("-v", "-V", "--version", action="version", version=f"x07-sandbox {version}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, prog="x07")  # else argparse lays out a usage line
    for verb in known or VERBS:
        doc = VERBS[verb]
        added = verbs.add_parser(verb, help=doc, description=f"{doc[0].upper()}{doc[1:]}.")
        getattr(import_module(f"x07_sandbox.cli.{_MODULES.get(verb, verb)}"), f"add_{verb}")(added)
    return parser


def actions(parser: Parser) -> Iterator[argparse.Action]:
    """Yield every option and argument of the parser and of its verbs."""
    parser.filled()
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way, and shtab takes this one
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for inner in action.choices.values():
                yield from actions(inner)
