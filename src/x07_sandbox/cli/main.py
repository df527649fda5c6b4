"""The command `x07`: one module a verb; this one finds the verb and turns errors into text and exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from x07_sandbox import __version__
from x07_sandbox.cli import doctor, image, run
from x07_sandbox.cli.console import say
from x07_sandbox.errors import SandboxError, UsageError

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
    try:
        options = _parser().parse_args(words)
        code: int = options.carry_out(options)
    except SandboxError as exc:
        if _wants_json(words):
            return run.print_failure(exc)
        say(str(exc))
        return 2 if isinstance(exc, UsageError) else 125
    except KeyboardInterrupt:
        say("cancelled")
        return 130
    except BrokenPipeError:
        return 141  # whoever read our output has gone; nothing can be said to them any more
    except Exception as exc:  # noqa: BLE001 - the last place that can keep the exit code's promise
        traceback.print_exc()
        say("this is a bug in x07-sandbox; please report it with the lines above")
        return run.print_failure(exc) if _wants_json(words) else 125
    return code


def _wants_json(words: list[str]) -> bool:
    """Whether standard output must be one JSON object; asked of the words, since parsing them may have failed."""
    ours = words[: words.index("--")] if "--" in words else words
    return ours[:1] == ["run"] and "--json" in ours


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that --json holds for them too."""

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
