"""The command `x07`: parse the command line, carry out one verb (subcommand), turn errors into text and exit codes.

All other modules are imported inside `main`. So Ctrl-C during an import cancels the command as usual, and each verb
loads only the modules that it needs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    from x07_sandbox.errors import UsageError

# X07's global flags that our verbs have, and whether they take a value.
_GLOBAL = {"--json": False, "--quiet-json": False, "--report-out": True, "--out": True}
_OBJECTS = 50_000  # a run makes about half as many, nearly all of them in modules, which stay
_BUNDLED = "start-bundle"  # the command of a bundle's launcher; not a verb for users
_RUNS = ("run", "exec", _BUNDLED)  # verbs that end as a run does, and whose JSON document is the result of a run
_HELP = {"help": "--help", "version": "--version"}  # verbs that stand for an option
_VERSION = (["--version"], ["-V"], ["-v"], ["version"])
on_exit: Callable[[int], object] | None = None
"""What gets the exit code before the process ends, besides the parent."""
_JSON = {"--json=canon": "--json", "--json=pretty": "--json"}  # each of our documents has only one layout


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (docs/reference/outcomes.md)."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given in _VERSION and _wrote_version():
        return 0
    words = _verb_first(given)
    options: argparse.Namespace | None = None  # until parsed
    try:
        _install_signal_handlers()
        collect_rarely()
        _import_msgspec()
        from x07_sandbox.cli.console import prepare_streams

        prepare_streams()
        options = _parse(words)
        from x07_sandbox.host.variables import check_environment

        for warning in check_environment(os.environ):
            _say(warning)
        _recover()
        if words[0] in _RUNS or getattr(options, "report_out", None) is None:  # a run writes its report itself
            code: int = options.carry_out(options)
        else:
            from x07_sandbox.cli.json_output import carry_out_with_report

            code = carry_out_with_report(options)
        _retain(words[0])
    except KeyboardInterrupt as exc:
        from x07_sandbox.errors import Cancelled

        _say("cancelled")
        cancelled = Cancelled("cancelled before the run started", "a signal was received", "Start it again")
        cancelled.signal = exc.args[0] if exc.args else 2
        return _cancelled(cancelled, words, options)
    except Exception as exc:  # noqa: BLE001 - every error must end in a documented exit code
        return _failed(exc, words, options)
    return code


def _wrote_version() -> bool:
    """Write the version to standard output, and return whether that went well. It needs no parser."""
    from x07_sandbox.host.settings import __version__

    line = f"x07-sandbox {__version__}\n".encode()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # as for a closed descriptor; see `write_stdout`
        sys.stdout.flush()
        return os.write(sys.stdout.fileno(), line) == len(line)
    return False


def _verb_first(words: list[str]) -> list[str]:
    """Move X07's global flags, such as --json, from before the verb to a place where the verb's parser accepts them."""
    end = words.index("--") if "--" in words else len(words)
    words = [_JSON.get(word, word) for word in words[:end] if word != "--json=off"] + words[end:]
    if words and words[0] in _HELP:
        return [*words[1:], _HELP[words[0]]]
    count = 0
    while count < len(words) and (flag := words[count].partition("=")[0]) in _GLOBAL:
        count += 2 if words[count] == flag and _GLOBAL[flag] else 1
    flags, verb, rest = words[:count], words[count : count + 1], words[count + 1 :]
    if verb[:1] and verb[0] in _RUNS:  # no flag may stand between the program and its arguments
        return [*verb, *flags, *rest]
    end = rest.index("--") if "--" in rest else len(rest)  # after the action, if the verb has actions
    return [*verb, *rest[:end], *flags, *rest[end:]]


def collect_rarely() -> None:
    """Have Python search for garbage only after many new objects. A run makes no cycles, and a search takes 4 ms."""
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])


def _import_msgspec() -> None:
    """Import msgspec without typing_extensions. Only older Pythons need that module, and importing it takes 12 ms."""
    if "typing_extensions" not in sys.modules:
        sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # makes its import fail
        try:
            import msgspec  # noqa: F401 - for the modules imported next
        finally:
            del sys.modules["typing_extensions"]


def _install_signal_handlers() -> None:
    """Make SIGTERM and SIGHUP end a command as Ctrl-C does; an ignored signal stays ignored."""
    import signal

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # while it is ignored, exit statuses are lost
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises UsageError."""
    from x07_sandbox.cli.parser import VERBS, parser_for
    from x07_sandbox.errors import UsageError

    if words[:1] == [_BUNDLED]:
        from x07_sandbox.cli.bundle import start_options

        return start_options(words[1:])
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        raise _unknown_verb(words[0], VERBS)
    options: argparse.Namespace
    options, unknown = parser_for(words).parse_known_args(words)
    if unknown:
        verb = f"x07 {words[0]}" if words[0] in VERBS else "x07"
        fix = f"See {verb} --help" + ("; put the program's own arguments after --" if words[0] in _RUNS else "")
        if near := _similar_option(unknown[0], words):
            fix = f"Did you mean {near}? {fix}"
        raise UsageError("wrong usage", f"unrecognized arguments: {' '.join(unknown)}", fix)
    return options


def _similar_option(word: str, words: list[str]) -> str:
    """Return the known option that the shortened or mistyped option *word* resembles, or an empty string."""
    import difflib

    from x07_sandbox.cli.parser import actions, parser_for

    known = [name for action in actions(parser_for(words)) for name in action.option_strings if name.startswith("--")]
    name = word.partition("=")[0]
    longer = [option for option in known if len(name) > len("--") and option.startswith(name)]  # no abbreviations
    return next(iter([*longer, *difflib.get_close_matches(name, known, 1, 0.8)]), "") if name.startswith("--") else ""


def _unknown_verb(word: str, verbs: Iterable[str]) -> UsageError:
    """Return the error for an unknown verb. It suggests how to run *word* if that is a file, or a similar verb."""
    import difflib
    import shlex

    from x07_sandbox.errors import Command, Text, UsageError

    fix: Text = "See x07 --help"
    if os.path.exists(word):  # noqa: PTH110 - False for text that cannot be a file name
        fix = ("To run it: ", Command(f"x07 run {shlex.quote(word)}"))
    elif near := difflib.get_close_matches(word, verbs, 1):
        fix = f"Did you mean x07 {near[0]}? See x07 --help"
    return UsageError("wrong usage", f"there is no command {word!r}", fix)


def _recover() -> None:
    """Finish or roll back changes to files that a killed command left partly applied."""
    from x07_sandbox.errors import SandboxError
    from x07_sandbox.host.paths import state_dir
    from x07_sandbox.records.runs import APPLYING, runs_dir

    with contextlib.suppress(SandboxError, OSError):  # the verb itself reports an unusable state folder
        if os.listdir(runs_dir(state_dir()) / APPLYING):  # noqa: PTH208 - usually empty: spare the import
            from x07_sandbox.sessions.saved_changes import recover_all

            recover_all(_say)


def _retain(verb: str) -> None:
    """After a run, remove old records of runs."""
    if verb in _RUNS:
        from x07_sandbox.sessions.run import retain_records

        with contextlib.suppress(KeyboardInterrupt):  # the run has ended, and the next one continues
            retain_records(_say)


def _failed(exc: Exception, words: list[str], options: argparse.Namespace | None) -> int:
    import traceback

    from x07_sandbox.cli.console import OutputError
    from x07_sandbox.errors import Cancelled, SandboxError, UsageError

    if isinstance(exc, Cancelled):
        _say(str(exc))
        return _cancelled(exc, words, options)
    if isinstance(exc, SandboxError):
        if not _prints_json(words, options):
            _say(str(exc), bad=exc.what)
        code = 2 if isinstance(exc, UsageError) else 125
        if words[:1] and words[0] in _RUNS:
            from x07_sandbox.sessions.run import failure

            code = failure(exc).x07_exit_code
        return _with_json(code, exc, words, options)
    if isinstance(exc, OutputError):
        _say(f"cannot write the output: {exc.strerror}")
        return 125
    if isinstance(exc, OSError | MemoryError):
        from x07_sandbox.host.paths import host_error

        if (error := host_error(exc)) is not None:
            return _failed(error, words, options)
    traceback.print_exception(exc)
    _say("internal error: please report the lines above as a bug in x07-sandbox")
    return _with_json(125, exc, words, options)


def _cancelled(exc: Exception, words: list[str], options: argparse.Namespace | None) -> int:
    return _with_json(130 if getattr(exc, "signal", None) == 2 else 143, exc, words, options)  # noqa: PLR2004 - SIGINT


def _say(text: str, bad: str = "") -> None:
    from x07_sandbox.cli.console import say

    say(text, bad=bad)


def _with_json(code: int, exc: Exception, words: list[str], options: argparse.Namespace | None) -> int:
    """Print the error as JSON if --json was given; return the exit code."""
    if not _prints_json(words, options):
        return code
    with contextlib.suppress(OSError):
        if words[0] in _RUNS:
            from x07_sandbox.cli.outputs import print_failure as print_run_failure

            return print_run_failure(exc)
        from x07_sandbox.cli.json_output import print_failure

        print_failure(exc)
    return code


def _prints_json(words: list[str], options: argparse.Namespace | None) -> bool:
    """Whether to print JSON to standard output. options: None if the command line could not be parsed."""
    if options is None:
        given = words[: words.index("--")] if "--" in words else words
        return not {"--json", "--json=full"}.isdisjoint(given) and "--quiet-json" not in given
    return bool(getattr(options, "json", False)) and not getattr(options, "quiet_json", False)


def entry() -> NoReturn:
    """Run the command and exit with its code."""
    end_with(main, "x07")


def end_with(command: Callable[[], int], name: str) -> NoReturn:
    """Call *command*, with UTF-8 as the encoding of file names, and exit with the code that it returns.

    name: of this process, instead of python3, for tools such as pkill.
    """
    if sys.getfilesystemencoding() != "utf-8":  # restart, so that names keep their bytes in any locale
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - no shell is needed
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:  # noqa: PTH123 - fast
        file.write(name)
    try:
        code = command()
    except SystemExit as exc:  # argparse's, after --help
        code = exc.code if isinstance(exc.code, int) else 0
    exit_with(code)


def exit_with(code: int) -> NoReturn:
    """Flush the output and end the process with *code*. Python's own exit would turn a full disk into exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if on_exit is not None:
        on_exit(code)
    os._exit(code)


if __name__ == "__main__":
    entry()
