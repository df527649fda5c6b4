"""The verbs of `x07`, the parser of all commands, and the types of their options."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from x07_sandbox.cli.console import put
from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _typeshed import SupportsWrite

VERBS: Final = {
    "run": "run a program in a throw-away virtual machine",
    "exec": "run a command of the image in a copy of a folder",
    "diff": "show what a run changed",
    "apply": "apply a run's saved changes",
    "undo": "revert a run's applied changes",
    "ps": "list running jobs",
    "inspect": "print everything about one run as JSON",
    "logs": "print a run's output, or its connections",
    "kill": "end a running job",
    "init": "start a project: write its first file",
    "policy": "write, check, explain and compare policies",
    "image": "build, list, inspect and verify guest images",
    "pool": "keep VMs warm, so that runs start at once",
    "sweep": "remove what dead runners left behind",
    "df": "show disk usage of images, caches and records",
    "prune": "remove images, caches and records that are no longer needed",
    "completion": "print shell completion",
    "doctor": "check this machine and say what to fix",
    "conform": "run the conformance tests of a backend",
}
_EXAMPLES: Final = """examples:
  x07 image build                         make the guest image (once)
  x07 run prog.py -- --verbose            run a Python program in a throw-away machine
  x07 run --input data.txt prog.c         compile in one machine, run in another, with input
  x07 exec --workdir . -- make test       run a command of the image in a copy of this folder
  x07 run --json prog.py | jq .outcome    everything about the run as one JSON object
"""
_NUMBER_CHARS = 32
_WIDTH: Final = 110  # columns of help


def whole_number(lo: int, hi: int, what: str) -> Callable[[str], int]:
    """A type of options: a whole number of *what* within bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(hi)) and lo <= int(text) <= hi):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {what} from {lo} to {hi}")
        return int(text)

    return read


def seconds(most: int) -> Callable[[str], float]:
    """A type of options: a time in seconds above 0, as 2 or 0.5."""

    def read(text: str) -> float:
        try:
            value = float(text) if text.isascii() and len(text) < _NUMBER_CHARS else 0.0
        except ValueError:
            value = 0.0
        if not 0 < value <= most:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text!r} is no time above 0 and at most {most} seconds")
        return value

    return read


def named_folder(text: str) -> Path:
    """A type of options: a folder, which has a name; none is what an unset variable of a shell makes, and not `.`."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


def named(text: str) -> str:
    """A type of options: the name of a file, as it is given; an empty one is refused like that of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def named_file(text: str) -> Path:
    """As `named`, as a path."""
    return Path(named(text))


def name_pattern(text: str) -> str:
    """A type of options: a pattern for one name. With a slash none would match it, and nobody would be told."""
    if text in {"", ".", ".."} or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no pattern for a name: it has no slash, and is not empty")
    return text


class Once(argparse.Action):
    """An option that is given once at most, so that of two values none is passed over. Its default is None."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - as argparse calls it
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - as above
    ) -> None:
        """Keep the value. Raises argparse.ArgumentError where there is one already."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "it is given more than once")
        setattr(namespace, self.dest, values)


def option(to: argparse._ActionsContainer, flag: str, metavar: str | None, help: str, **words: Any) -> None:  # noqa: A002, ANN401 - as argparse has them
    """Add an option that takes a value, once at most unless *words* say otherwise."""
    to.add_argument(flag, **({"action": Once, "metavar": metavar, "help": help} | words))


def repeated(to: argparse._ActionsContainer, flag: str, metavar: str, help: str, **words: Any) -> None:  # noqa: A002, ANN401 - as above
    """Add an option that may be given any number of times."""
    option(to, flag, metavar, help, action="append", default=[], **words)


def switch(to: argparse._ActionsContainer, flag: str, help: str) -> None:  # noqa: A002 - as above
    """Add an option without a value."""
    to.add_argument(flag, action="store_true", help=help)


class _HelpLevel(argparse.Action):
    """Print the help of the level that is its constant, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - as argparse calls it
        values: str | Sequence[Any] | None,  # noqa: ARG002 - as above
        option_string: str | None = None,  # noqa: ARG002 - as above
    ) -> NoReturn:
        put(parser.format_help(self.const).encode())  # type: ignore[call-arg]  # only a Parser has such options
        parser.exit()


def add_help_levels(parser: argparse._ActionsContainer, rest: str, *names: str) -> None:
    """Add `--help-NAME` for each level of help beside `--help`. rest: the level that shows every option."""
    for name in (rest, *names):
        doc = "show every option" if name == rest else f"show the options for {name.upper()}'s own programs"
        words: dict[str, Any] = {"action": _HelpLevel, "nargs": 0, "const": name, "default": argparse.SUPPRESS}
        parser.add_argument(f"--help-{name}", help=doc, dest=argparse.SUPPRESS, **words)


def add_document_flags(parser: argparse._ActionsContainer, json_help: str) -> None:
    """The flags of a verb that has a JSON document to print (cli/json_output): whether, and where it goes too."""
    switch(parser, "--json", json_help)
    option(parser, "--report-out", "FILE", "write that JSON there too, --json or not", type=named_file)
    switch(parser, "--quiet-json", "print no JSON, since --report-out has it")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, up to 110 columns; measured without the modules that the base class imports."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 36) -> None:
        try:
            columns = os.get_terminal_size(1).columns - 2
        except OSError:
            columns = _WIDTH
        super().__init__(prog, indent_increment, max_help_position, width=min(_WIDTH, max(40, columns)))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that --json holds for them too; options are written out in full.

    late_epilog: makes the epilog when help is asked for, from the level of help.
    level_of: the level of help that shows an option, where a parser has several: "" is `--help`, NAME `--help-NAME`.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - as argparse has them
        late_epilog: Callable[[str], str] | None = None,
        level_of: Callable[[argparse.Action], str] | None = None,
        **words: Any,  # noqa: ANN401 - as above
    ) -> None:
        super().__init__(*args, **({"formatter_class": Formatter} | words | {"allow_abbrev": False}))
        self._late_epilog = late_epilog
        self._level_of = level_of

    def text_below(self, level: str = "") -> str | None:
        """Return the text below the options, at one level of help."""
        return self.epilog if self._late_epilog is None else self._late_epilog(level)

    def format_help(self, level: str = "") -> str:
        """The help of one level; "all" has every option."""
        self.epilog = self.text_below(level)
        if self._level_of is None or level == "all":
            return super().format_help()
        texts = {action: action.help for action in self._actions if self._level_of(action) != level}
        for action in texts:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in texts.items():
                action.help = text

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print help or version; unlike the base class, not past an error. Raises OSError."""
        if file is sys.stdout:
            put(message.encode("utf-8", "surrogateescape"))
        else:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError("wrong usage", message, f"See {self.prog} --help")


def parser_for(words: list[str]) -> argparse.ArgumentParser:
    """The parser for these words: with the verb that they name, or with all of them."""
    from importlib import import_module

    from x07_sandbox import __version__

    parser = Parser(
        prog="x07", description="Run an untrusted program in a throw-away virtual machine.", epilog=_EXAMPLES
    )
    parser.add_argument("--version", action="version", version=f"x07-sandbox {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, prog="x07")  # else argparse lays out a usage line
    for verb in words[:1] if words and words[0] in VERBS else VERBS:
        import_module(f"x07_sandbox.cli.{verb}").add_parser(verbs, help=VERBS[verb])
    return parser


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument, of the verbs too."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way, and shtab takes this one
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for inner in action.choices.values():
                yield from actions(inner)
