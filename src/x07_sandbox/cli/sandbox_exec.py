"""`x07 sandbox exec` and `x07 sandbox shell`: a command in an open sandbox, with or without a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import document_wanted, print_document
from x07_sandbox.cli.parser import add_document_flags, nonempty, option, repeated, seconds, switch, variable
from x07_sandbox.errors import Command as CommandText
from x07_sandbox.errors import SandboxError, UsageError
from x07_sandbox.host.settings import LIFETIME_MAX_S, OUTPUT_MAX_BYTES
from x07_sandbox.host.waiting import write_all
from x07_sandbox.policy.outcomes import SIGNAL_BASE, ending_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.library.held import HeldSandbox
    from x07_sandbox.library.processes import Kept
    from x07_sandbox.sessions.command import Command, CommandEnd, StreamName

_READ: Final = 64 * 1024
_KILLED_S: Final = 5.0  # for the end of a killed command to arrive
_SHELL: Final = "command -v bash > /dev/null && exec bash -l; exec sh -l"


def add_exec(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    """Add the arguments of `x07 sandbox exec`."""
    parser.add_argument("sandbox", metavar="SANDBOX", type=nonempty, help="id, start of an id, or name")
    parser.add_argument("command", nargs="*", metavar="COMMAND [ARGS]", help="the command and its arguments, after --")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input to the command")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    switch(parser, "--detach", "start the command without streams, print its number, and do not wait for it")
    _add_common(parser)
    switch(parser, "--raw", "pass the command's control sequences to the terminal unfiltered")
    add_document_flags(parser, "print how the command ended, with its output, as one JSON object")
    parser.set_defaults(carry_out=_exec)


def add_shell(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    """Add the arguments of `x07 sandbox shell`."""
    parser.add_argument("sandbox", metavar="SANDBOX", type=nonempty, help="id, start of an id, or name")
    _add_common(parser)
    shell: dict[str, Any] = {"interactive": True, "tty": True, "detach": False, "raw": True}
    shell |= {"json": False, "report_out": None, "quiet_json": False}
    parser.set_defaults(carry_out=_exec, command=["sh", "-c", _SHELL], **shell)


def _add_common(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    option(parser, "--cwd", "DIR", "folder in the sandbox (default: the one in which commands start)", type=nonempty)
    repeated(parser, "--env", "NAME=VALUE", "set an environment variable; NAME alone copies it from your environment")
    option(parser, "--timeout", "S", "limit of elapsed time in seconds", type=seconds(LIFETIME_MAX_S))


def _exec(options: argparse.Namespace) -> int:
    from x07_sandbox.channel.messages import Terminal
    from x07_sandbox.library.listing import connect_to
    from x07_sandbox.sessions.command import CommandStart

    if not options.command:
        example = ("For example: ", CommandText("x07 sandbox exec SANDBOX -- make test"))
        raise UsageError("wrong usage", "no command given", example)
    if options.detach and (options.interactive or options.tty):
        raise UsageError("wrong usage", "a detached command has no streams", "Omit --detach, or -i and -t")
    if options.tty and (options.json or options.report_out):
        raise UsageError("wrong usage", "a command with a terminal has no JSON object", "Omit -t, or --json")
    terminal = None
    if options.tty:
        if not (os.isatty(0) and os.isatty(1)):
            why, fix = "standard input and output are not a terminal", "Run x07 sandbox exec without -t"
            raise UsageError("cannot give the command a terminal", why, fix)
        terminal = Terminal(*_size())
    opened = connect_to(options.sandbox)
    env = dict(map(variable, options.env))
    command = opened.start(
        CommandStart(options.command, env, options.cwd, options.timeout, terminal=terminal, detached=options.detach)
    )
    if options.detach:
        return _detached(opened, command, options)
    return _attached(opened, command, options)


def _detached(opened: HeldSandbox, command: Command, options: argparse.Namespace) -> int:
    from x07_sandbox.reports.sandboxes import CommandDocument

    if document_wanted(options):
        print_document(CommandDocument(sandbox=opened.run, id=command.id, outcome=None), options)
    else:
        show(str(command.id))
    return 0


def _attached(opened: HeldSandbox, command: Command, options: argparse.Namespace) -> int:
    """Carry the streams of the command until it has ended, and report its end. Ctrl-C kills it."""
    from x07_sandbox.library.processes import Kept

    kept = (Kept(OUTPUT_MAX_BYTES, "head"), Kept(OUTPUT_MAX_BYTES, "head")) if document_wanted(options) else None
    with contextlib.ExitStack() as stack:
        if options.tty:
            stack.enter_context(_raw_terminal(command))
        if options.interactive:
            threading.Thread(target=_send_input, args=(command,), daemon=True).start()
        else:
            command.end_input()
        try:
            _carry(command, kept, raw=options.raw or options.tty)
            end = command.ending()
        except (KeyboardInterrupt, BrokenPipeError) as exc:
            command.stop()
            command.wait(_KILLED_S)
            if isinstance(exc, BrokenPipeError):  # as `| head` does
                return SIGNAL_BASE + signal.SIGPIPE
            raise
    return _report(opened.run, command, end, kept, options)


def _carry(command: Command, kept: tuple[Kept, Kept] | None, *, raw: bool) -> None:
    from x07_sandbox.sessions.transfers import TerminalFilter

    fds: dict[StreamName, int] = {"stdout": 1, "stderr": 2}
    filters = {name: TerminalFilter() for name, fd in fds.items() if not raw and os.isatty(fd)}
    ended = False
    while not ended:
        ended, pieces = command.next_pieces()
        for stream, data in pieces:
            if kept is not None:
                kept[stream == "stderr"].take(data)
            else:
                write_all(fds[stream], filters[stream](data) if stream in filters else data)


def _send_input(command: Command) -> None:
    with contextlib.suppress(OSError, SandboxError):
        while data := os.read(0, _READ):
            command.write(data)
    command.end_input()


def _size() -> tuple[int, int]:
    size = os.get_terminal_size(0)
    return size.lines or 24, size.columns or 80  # a terminal may not know its size


@contextlib.contextmanager
def _raw_terminal(command: Command) -> Iterator[None]:
    """Pass every key to the command in the context, and changes of the terminal's size."""
    before = termios.tcgetattr(0)
    resized = signal.signal(signal.SIGWINCH, lambda *_: command.resize(*_size()))
    try:
        command.resize(*_size())  # it may have changed since the start
        tty.setraw(0, termios.TCSADRAIN)  # keeps what was typed already
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, resized)


def _report(
    run: str, command: Command, end: CommandEnd, kept: tuple[Kept, Kept] | None, options: argparse.Namespace
) -> int:
    found = end.verdict
    if kept is not None:
        from x07_sandbox.reports.sandboxes import CommandDocument
        from x07_sandbox.sessions.result import output_with
        from x07_sandbox.sessions.transfers import TerminalFilter

        stdout, stderr = (output_with(one.data(), one.size, truncated=one.truncated) for one in kept)
        document = CommandDocument(
            sandbox=run,
            id=command.id,
            outcome=found.outcome,
            reason_code=found.code,
            reason=found.reason,
            x07_exit_code=found.x07_exit_code,
            exit_code=found.exit_code,
            signal=found.signal,
            wall_ms=end.report.wall_ms,
            cpu_ms=end.report.cpu_ms,
            memory_peak_bytes=end.memory_peak_bytes,
            denials=end.denials,
            hints=end.hints,
            stdout=stdout,
            stderr=stderr,
        )
        if print_document(document, options):
            return found.x07_exit_code
        for fd, data in ((1, stdout.data), (2, stderr.data)):
            write_all(fd, TerminalFilter()(data) if os.isatty(fd) and not options.raw else data)
    sys.stdout.flush()
    if found.outcome not in {"ok", "failed"} or (found.outcome == "failed" and found.code != "exited"):
        say(ending_line(found.outcome, found.code, found.reason, found.error), bad=f"{found.outcome}:")
    if end.denials or end.hints:
        from msgspec.structs import replace

        from x07_sandbox.cli.denials_text import say_denials
        from x07_sandbox.sessions.result import draft_result

        say_denials(replace(draft_result(run), denials=list(end.denials), hints=list(end.hints)))
    return found.x07_exit_code
