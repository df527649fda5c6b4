"""The command `x07`: one module a verb; this one finds the verb and turns errors into text and exit codes.

Everything else is imported inside `main`: Ctrl-C while modules load is a cancelled command like any other, and a verb
costs only its own imports.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    from x07_sandbox.errors import UsageError

# X07's global flags that our verbs have, and whether they take a value.
_GLOBAL = {"--json": False, "--quiet-json": False, "--report-out": True, "--out": True}
_RUNS = ("run", "exec")  # verbs whose document is the result of a run
_JSON = {"--json=canon": "--json", "--json=pretty": "--json"}  # how a document is laid out, each verb knows


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (docs/reference/outcomes.md)."""
    words = _verb_first(list(sys.argv[1:] if argv is None else argv))
    try:
        _heed_signals()
        from x07_sandbox.cli.std_streams import prepare_streams

        prepare_streams()
        _import_msgspec()
        options = _parsed(words)
        _recover()
        if words[0] in _RUNS or getattr(options, "report_out", None) is None:  # a run writes its report itself
            code: int = options.carry_out(options)
        else:
            from x07_sandbox.cli.json_output import carry_out_with_report

            code = carry_out_with_report(options)
    except KeyboardInterrupt as exc:
        from x07_sandbox.errors import Cancelled

        _say("cancelled")
        cancelled = Cancelled("cancelled before there was a run", "a signal came", "Start it again")
        return _cancelled(cancelled, words, exc.args[0] if exc.args else 2)
    except Exception as exc:  # noqa: BLE001 - the last place that can keep the exit code's promise
        return _failed(exc, words)
    return code


def _verb_first(words: list[str]) -> list[str]:
    """Move the flags that X07's command has before the verb to where our verbs read them."""
    end = words.index("--") if "--" in words else len(words)
    words = [_JSON.get(word, word) for word in words[:end] if word != "--json=off"] + words[end:]
    count = 0
    while count < len(words) and (flag := words[count].partition("=")[0]) in _GLOBAL:
        count += 2 if words[count] == flag and _GLOBAL[flag] else 1
    flags, verb, rest = words[:count], words[count : count + 1], words[count + 1 :]
    if verb[:1] and verb[0] in _RUNS:  # which takes no flag between its program and that one's arguments
        return [*verb, *flags, *rest]
    end = rest.index("--") if "--" in rest else len(rest)  # behind the verb's own verb, if it has one
    return [*verb, *rest[:end], *flags, *rest[end:]]


def _import_msgspec() -> None:
    """Import msgspec without typing_extensions, which costs 12 ms and serves only Pythons older than any here."""
    if "typing_extensions" not in sys.modules:
        sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # the import system's way to say: not here
        try:
            import msgspec  # noqa: F401 - for whoever imports it next
        finally:
            del sys.modules["typing_extensions"]


def _heed_signals() -> None:
    """SIGTERM and SIGHUP end any command as Ctrl-C does, in good order; what is ignored stays so."""
    import signal

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    with contextlib.suppress(ValueError):  # not the main thread: then signals are not ours to take
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored nobody learns how a process ended
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)


def _parsed(words: list[str]) -> argparse.Namespace:
    """What the words mean, in a sound environment. Raises UsageError; --report-out has been told of it."""
    from x07_sandbox.errors import UsageError
    from x07_sandbox.host.variables import check_environment

    try:
        for warning in check_environment(os.environ):
            _say(warning)
        return _namespace(words)
    except UsageError as exc:
        from x07_sandbox.cli import json_output

        path, others = json_output.report_file(words)
        if path is not None:
            json_output.write_early_failure(_failure_document(exc, words), path, others)
        raise


def _failure_document(exc: Exception, words: list[str]) -> bytes:
    """An error as the verb's document."""
    if words[:1] and words[0] in _RUNS:
        from x07_sandbox.cli.run_failure import failure_document as of_run

        return of_run(exc)
    from x07_sandbox.cli.json_output import failure_document

    return failure_document(exc)


def _namespace(words: list[str]) -> argparse.Namespace:
    """What the words mean. Raises UsageError, which names the verb's own help."""
    from x07_sandbox.cli.parser import VERBS, parser_for
    from x07_sandbox.errors import UsageError

    if words and words[0] not in VERBS and not words[0].startswith("-"):
        raise _no_verb(words[0], VERBS)
    options, unknown = parser_for(words).parse_known_args(words)
    if unknown:
        verb = f"x07 {words[0]}" if words[0] in VERBS else "x07"
        fix = f"See {verb} --help" + ("; arguments of the program go after --" if words[0] in _RUNS else "")
        if near := _near_option(unknown[0], words):
            fix = f"Did you mean {near}? {fix}"
        raise UsageError("wrong usage", f"unrecognized arguments: {' '.join(unknown)}", fix)
    return options


def _near_option(word: str, words: list[str]) -> str:
    """The option that a mistyped one is near to; empty for none."""
    import difflib

    from x07_sandbox.cli.parser import actions, parser_for

    known = [name for action in actions(parser_for(words)) for name in action.option_strings if name.startswith("--")]
    name = word.partition("=")[0]
    longer = [option for option in known if len(name) > len("--") and option.startswith(name)]  # no abbreviations
    return next(iter([*longer, *difflib.get_close_matches(name, known, 1, 0.8)]), "") if name.startswith("--") else ""


def _no_verb(word: str, verbs: Iterable[str]) -> UsageError:
    """The error about a first word that is no command: often a program, or a mistyped command."""
    import difflib
    import shlex

    from x07_sandbox.errors import UsageError

    fix = "See x07 --help"
    if os.path.exists(word):  # noqa: PTH110 - a name that cannot be one is no file
        fix = f"To run it: x07 run {shlex.quote(word)}"
    elif near := difflib.get_close_matches(word, verbs, 1):
        fix = f"Did you mean x07 {near[0]}? See x07 --help"
    return UsageError("wrong usage", f"there is no command {word!r}", fix)


def _recover() -> None:
    """Put right what a killed command has left half applied, whatever this command is."""
    from x07_sandbox.errors import SandboxError
    from x07_sandbox.host.paths import state_dir
    from x07_sandbox.runs.folder import APPLYING, runs_dir

    with contextlib.suppress(SandboxError, OSError):  # a place that cannot be used is told by what needs it
        if os.path.isdir(runs_dir(state_dir()) / APPLYING):  # noqa: PTH112 - no module for it on the usual way
            from x07_sandbox.runs.saved_changes import recover_all

            recover_all(_say)


def _failed(exc: Exception, words: list[str]) -> int:
    import traceback

    from x07_sandbox.cli.console import OutputError
    from x07_sandbox.errors import Cancelled, SandboxError, UsageError

    if isinstance(exc, Cancelled):
        _say(str(exc))
        return _cancelled(exc, words, exc.signal)
    if isinstance(exc, SandboxError):
        if not _wants_json(words):
            _say(str(exc), bad=exc.what)
        code = 2 if isinstance(exc, UsageError) else 125
        if words[:1] and words[0] in _RUNS:  # its outcome's, whether or not there was a run
            from x07_sandbox.runs.run import failure

            code = failure(exc).x07_exit_code
        return _json_or(code, exc, words)
    if isinstance(exc, OutputError):
        _say(f"cannot write the output: {exc.strerror}")
        return 125
    if isinstance(exc, OSError | MemoryError):
        from x07_sandbox.host.os_errors import host_error

        if (error := host_error(exc)) is not None:
            return _failed(error, words)
    traceback.print_exception(exc)
    _say("this is a bug in x07-sandbox; please report it with the lines above")
    return _json_or(125, exc, words)


def _cancelled(exc: Exception, words: list[str], signalled: int | None) -> int:
    return _json_or(130 if signalled == 2 else 143, exc, words, signalled)  # noqa: PLR2004 - SIGINT


def _say(text: str, bad: str = "") -> None:
    from x07_sandbox.cli.console import say

    say(text, bad=bad)


def _json_or(code: int, exc: Exception, words: list[str], signalled: int | None = None) -> int:
    """The failure as JSON where that was promised; *code* elsewhere, and where nobody takes the JSON."""
    if not _wants_json(words):
        return code
    with contextlib.suppress(OSError):
        if words[0] in _RUNS:
            from x07_sandbox.cli.run_failure import print_failure as print_run_failure

            return print_run_failure(exc, signalled)
        from x07_sandbox.cli.json_output import print_failure

        print_failure(exc)
    return code


def _wants_json(words: list[str]) -> bool:
    """Whether standard output must be one JSON object; asked of the words, since parsing them may have failed."""
    ours = words[: words.index("--")] if "--" in words else words
    return not {"--json", "--json=full"}.isdisjoint(ours) and "--quiet-json" not in ours


def entry() -> NoReturn:
    """The command itself: run and end with exactly that code."""
    end_with(main)


def end_with(command: Callable[[], int]) -> NoReturn:
    """End with the exit code of *command*, run where names of files are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8":  # start anew, so that names keep their bytes whatever the locale says
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - no shell is needed
    try:
        code = command()
    except SystemExit as exc:  # argparse's, after --help
        code = exc.code if isinstance(exc.code, int) else 0
    from x07_sandbox.cli.std_streams import leave

    leave(code)


if __name__ == "__main__":
    entry()
