"""`x07 exec`: run a command of the guest image in a copy of a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from x07_sandbox.cli.run import run_command
from x07_sandbox.cli.run_options import add_command_options, help_level
from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from x07_sandbox.cli.parser import Parser

_EXAMPLES = """examples:
  x07 exec --workdir . -- make test              run the project's tests; changes are copied back
  x07 exec --workdir proj --read -- grep -rn main src
  x07 exec --workdir . --changes keep -- sh -c './configure && make'
  x07 diff                                       show what it changed; x07 apply applies it
  x07 exec --workdir . --timeout 600 --memory 1G -- make -j2
  x07 exec -- python3 --version                  without --workdir: start in an empty folder

A command without a slash is looked up in the image (x07 image build --include adds Debian packages),
one with a slash, such as ./configure, in DIR. Relative paths of --allow-read-root and --allow-write-root
start in DIR. The exit code is the command's own, or 127 if there is no such command. See docs/how-to/run-a-command.md.
"""


def add_exec(parser: Parser) -> None:
    """Add the arguments of `x07 exec`."""
    parser.description = "Run a command of the guest image in a throw-away VM, in a copy of DIR."
    parser.usage = "x07 exec [--workdir DIR [--read]] [OPTIONS] -- COMMAND [ARGS]"
    parser.late_epilog = lambda _level: _EXAMPLES
    parser.level_of = help_level
    add_command_options(parser)
    parser.set_defaults(carry_out=_exec)


def _exec(options: argparse.Namespace) -> int:
    if not options.command:
        raise UsageError("wrong usage", "no command given", "For example: x07 exec --workdir . -- make test")
    if options.read and options.workdir is None:
        raise UsageError("wrong usage", "--read requires --workdir", "Add --workdir DIR, or omit --read")
    return run_command(options)
