"""The command `x07`: one module a verb; this one finds the verb and turns errors into text and exit codes."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from x07_sandbox import __version__
from x07_sandbox.cli import doctor, image, run
from x07_sandbox.cli.console import say
from x07_sandbox.cli.streams import fill_closed_streams
from x07_sandbox.errors import Cancelled, SandboxError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """examples:
  x07 image build                         make the guest image (once)
  x07 run prog.py -- --verbose            run a Python program in a throw-away machine
  x07 run --input data.txt prog.c         compile in one machine, run in another, with input
  x07 run --json prog.py | jq .outcome    everything about the run as one JSON object
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (DESIGN 8)."""
    words = list(sys.argv[1:] if argv is None else argv)
    fill_closed_streams()
    try:
        options = _parser().parse_args(words)
        code: int = options.carry_out(options)
    except SandboxError as exc:
        if not _wants_json(words):
            say(str(exc))
        return _json_or(2 if isinstance(exc, UsageError) else 125, exc, words)
    except KeyboardInterrupt:
        say("cancelled")
        return _json_or(130, Cancelled("cancelled before there was a run", "SIGINT", "Start it again"), words)
    except OSError as exc:
        if exc.errno not in {errno.EPIPE, errno.ENOSPC, errno.EIO}:
            return _bug(exc, words)
        say(f"cannot write the output: {exc.strerror}")
        return 125
    except Exception as exc:  # noqa: BLE001 - the last place that can keep the exit code's promise
        return _bug(exc, words)
    return code


def _bug(exc: Exception, words: list[str]) -> int:
    traceback.print_exception(exc)
    say("this is a bug in x07-sandbox; please report it with the lines above")
    return _json_or(125, exc, words)


def _json_or(code: int, exc: Exception, words: list[str]) -> int:
    """The failure as JSON where that was promised; *code* elsewhere, and where nobody takes the JSON."""
    if not _wants_json(words):
        return code
    try:
        return run.print_failure(exc)
    except OSError:
        return code


def _wants_json(words: list[str]) -> bool:
    """Whether standard output must be one JSON object; asked of the words, since parsing them may have failed."""
    ours = words[: words.index("--")] if "--" in words else words
    return ours[:1] == ["run"] and "--json" in ours


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that --json holds for them too; options are written out in full."""

    def __init__(self, *args: Any, **words: Any) -> None:  # noqa: ANN401 - as argparse has them
        super().__init__(*args, **(words | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError("wrong usage", message, f"See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="x07",
        description="Run a program that nobody trusts in a throw-away virtual machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"x07-sandbox {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    run.add_parser(verbs)
    image.add_parser(verbs)
    doctor.add_parser(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
