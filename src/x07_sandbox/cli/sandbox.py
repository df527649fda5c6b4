"""`x07 sandbox`: open a sandbox that stays, run commands in it, copy files, reach its ports and close it."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import posixpath
import signal
import stat
import sys
import termios
import threading
import tty
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import asdict, replace

from x07_sandbox.cli.console import LiveLine, say, show, show_table, span
from x07_sandbox.cli.json_output import document_wanted, print_document
from x07_sandbox.cli.parser import (
    add_document_flags,
    add_help_levels,
    add_row,
    given_rows,
    help_level,
    inner_verb,
    nonempty,
    option,
    repeated,
    seconds,
    switch,
    tag,
    variable,
    whole_number,
)
from x07_sandbox.errors import BackendError, Cancelled, RefusedError, SandboxError, UsageError
from x07_sandbox.errors import Command as CommandText
from x07_sandbox.host.settings import FILES_S, LIFETIME_MAX_S, OUTPUT_MAX_BYTES
from x07_sandbox.host.waiting import write_all
from x07_sandbox.options import CHANGES, GROUPS, OF_SANDBOXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.library.held import HeldSandbox
    from x07_sandbox.sessions.command import Ended, FileInfo, Kept, Process, StreamName
    from x07_sandbox.sessions.result import Result

_EPILOG: Final = """A sandbox is a VM that stays open for many commands. It outlives the command that opened it. It ends
when it is closed, at the end of its lifetime, or when it was idle for too long. SANDBOX stands for its id, the first
characters of the id, or its name. Only the user who opened a sandbox can use it.

examples:
  x07 sandbox create --name build --workdir .     open a sandbox in a copy of this folder
  x07 sandbox exec build -- make test             run a command in it
  x07 sandbox shell build                         work in it
  x07 sandbox cp build:report.html .              copy a file out of it
  x07 sandbox close build                         close it, and apply the changes to this folder
"""
_CREATE_EPILOG: Final = """The command prints the id of the sandbox. A policy's limits of time hold for each command.
If the sandbox ends in another way than by x07 sandbox close, changes to folders are kept for x07 apply.

examples:
  x07 sandbox create --name build --workdir . --allow-host example.org:443
  id=$(x07 sandbox create --idle 600 --tag job=17)
  x07 sandbox create --snapshot prepared
"""
_EXEC_EPILOG: Final = """The exit code is that of the command. Ctrl-C kills the command, and the sandbox stays open.
Without -i, the standard input of the command is empty. With -t, the command gets a terminal and its control sequences
reach yours unfiltered.

examples:
  x07 sandbox exec build -- make test
  x07 sandbox exec -i build -- tar xf - < files.tar
  x07 sandbox exec -it build -- python3
  x07 sandbox exec --detach build -- python3 -m http.server 8000
"""
_CP_EPILOG: Final = """A path in a sandbox is written SANDBOX:PATH; a relative one is below the folder in which commands
start. An existing folder as the target gets the copy inside.

examples:
  x07 sandbox cp data.csv build:data.csv
  x07 sandbox cp build:out results
"""
_FORWARD_EPILOG: Final = """The command prints an address of this host, and forwards connections to it until Ctrl-C, or
until the sandbox ends. Every user of this host can connect to a port; a Unix socket (--unix) is only for you.

examples:
  x07 sandbox forward build 8000
  x07 sandbox forward --unix server.sock build 8000
"""
_OF_BACKENDS: Final = ("--sandbox-backend", "--backend", "--i-accept-weaker-isolation")
_COLUMNS: Final = ("SANDBOX", "NAME", "BACKEND", "AGE", "LEFT", "COMMANDS", "TAGS")
_READ: Final = 64 * 1024
_KILLED_S: Final = 5.0  # for the end of a killed command to arrive
_OUTPUT: Final = {"stdout", "stderr", "truncated"}  # fields of `Ended`
_SHELL: Final = "command -v bash > /dev/null && exec bash -l; exec sh -l"


def add_sandbox(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 sandbox`."""
    parser.epilog = _EPILOG
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    for name, (doc, fill) in _ACTIONS.items():
        inner_verb(inner, name, doc, fill)


def _add_copy(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    parser.epilog = _CP_EPILOG
    parser.add_argument("source", metavar="SOURCE", type=nonempty, help="path of this host, or SANDBOX:PATH")
    parser.add_argument("target", metavar="TARGET", type=nonempty, help="path of this host, or SANDBOX:PATH")
    _add_progress_timeout(parser)
    parser.set_defaults(carry_out=_copy)


def _add_files(parser: Any) -> None:  # noqa: ANN401 - as above
    _with_sandbox(parser)
    parser.add_argument("path", metavar="PATH", nargs="?", default=".", type=nonempty, help="a folder or a file")
    _add_progress_timeout(parser)
    _ends_with_document(parser, _files)


def _add_progress_timeout(parser: Any) -> None:  # noqa: ANN401 - as above
    doc = "end after this many seconds without progress (default: 60)"
    option(parser, "--timeout", "S", doc, type=seconds(LIFETIME_MAX_S))


def _add_forward(parser: Any) -> None:  # noqa: ANN401 - as above
    _with_sandbox(parser)
    parser.epilog = _FORWARD_EPILOG
    parser.add_argument("port", metavar="PORT", type=whole_number(1, 65_535, "ports"), help="port of the sandbox")
    option(parser, "--unix", "PATH", "make a Unix socket that only you can use, instead of a port", type=nonempty)
    _ends_with_document(parser, _forward)


def _add_close(parser: Any) -> None:  # noqa: ANN401 - as above
    _with_sandbox(parser)
    doc = "apply (default), all-or-nothing, keep or discard the changes to files"
    parser.add_argument("--changes", choices=CHANGES, default="apply", help=doc)
    _ends_with_document(parser, _close)


def _add_list(parser: Any) -> None:  # noqa: ANN401 - as above
    repeated(parser, "--tag", "NAME=VALUE", "list only sandboxes with this tag", type=tag)
    _ends_with_document(parser, _list)


def _ends_with_document(parser: Any, carry_out: Callable[[argparse.Namespace], int]) -> None:  # noqa: ANN401 - as above
    add_document_flags(parser)
    parser.set_defaults(carry_out=carry_out)


def _with_sandbox(parser: Any) -> None:  # noqa: ANN401 - as above
    parser.add_argument("sandbox", metavar="SANDBOX", type=nonempty, help="id, start of an id, or name")


def _add_create(parser: Any) -> None:  # noqa: ANN401 - as above
    parser.epilog, parser.level_of = _CREATE_EPILOG, help_level
    add_help_levels(parser, "all")
    life = parser.add_argument_group("sandbox")
    option(life, "--name", "NAME", "name of the sandbox", type=_name)
    repeated(life, "--tag", "NAME=VALUE", "tag of the sandbox, for x07 sandbox list", type=tag)
    doc = "start from this snapshot, instead of an image; only the options of this group can be given then"
    option(life, "--snapshot", "SNAPSHOT", doc, type=nonempty)
    most = seconds(LIFETIME_MAX_S)
    option(life, "--lifetime", "S", "end the sandbox after this many seconds (default: 3600)", type=most)
    option(life, "--idle", "S", "end it after this many seconds without a command (default: no limit)", type=most)
    doc = "wait this many seconds if too many sandboxes are open, or 0 not to wait (default: 600)"
    option(life, "--queue-timeout", "S", doc, type=whole_number(0, LIFETIME_MAX_S, "seconds"))
    add_shared_options(parser)
    _ends_with_document(parser, _create)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a sandbox shares with runs, and those that select the backend."""
    for title, rows in GROUPS.items():
        mine = [row for row in rows if row in OF_SANDBOXES or row.flag in _OF_BACKENDS]
        if mine:
            group = parser.add_argument_group(title)
            for row in mine:
                add_row(group, row)


def given_keywords(options: argparse.Namespace) -> dict[str, Any]:
    """Return the given options that a sandbox shares with runs, by keyword. Raises UsageError."""
    return {row.keyword: row.argument(value) for row, value in given_rows(options, OF_SANDBOXES)}


def _name(text: str) -> str:
    """Option type: a name for a sandbox."""
    from x07_sandbox.sessions.sandbox import NAME, NAME_RULE

    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a sandbox: {NAME_RULE}")
    return text


def _create(options: argparse.Namespace) -> int:
    from x07_sandbox.cli.run import choose_backend, need_image
    from x07_sandbox.host.variables import text
    from x07_sandbox.host.waiting import cancelled_by_signals
    from x07_sandbox.library.held import create
    from x07_sandbox.library.held_messages import Create
    from x07_sandbox.library.listing import list_sandboxes, require_new_name
    from x07_sandbox.library.opening import checked_life
    from x07_sandbox.reports.sandboxes import SandboxesReport

    given = given_keywords(options)
    life = {"name": options.name, "tags": dict(options.tag), "lifetime_s": options.lifetime, "idle_s": options.idle}
    given |= {name: value for name, value in life.items() if value}
    given |= {} if options.queue_timeout is None else {"wait_s": options.queue_timeout}
    given |= {} if options.snapshot is None else {"snapshot": options.snapshot}
    checked_life(given)
    require_new_name(options.name or "")
    choice = {
        "sandbox": options.sandbox_backend,
        "backend": options.backend,
        "accepted": options.i_accept_weaker_isolation,
    }
    if options.snapshot is None:
        need_image(choose_backend(options), options.image or text("X07_VM_GUEST_IMAGE"))
    progress = LiveLine()
    with cancelled_by_signals() as cancel:
        try:
            run = create(Create(given, choice, flags=True), cancel.fd, progress)
        except Cancelled as exc:
            exc.signal = cancel.signal
            raise
        finally:
            progress("")
    if document_wanted(options):
        print_document(SandboxesReport(sandboxes=tuple(one for one in list_sandboxes() if one.id == run)), options)
    else:
        show(run)
        _say_left_out(run)
    return 0


def _say_left_out(run: str) -> None:
    from x07_sandbox.records.runs import record_of

    if (record := record_of(run)) is not None and record.left_out:
        from x07_sandbox.cli.messages import say_denials
        from x07_sandbox.sessions.result import draft_result

        say_denials(replace(draft_result(run), outcome="ok", denials=list(record.left_out)))


def _list(options: argparse.Namespace) -> int:
    from x07_sandbox.library.listing import list_sandboxes
    from x07_sandbox.reports.sandboxes import SandboxesReport

    found = list_sandboxes(dict(options.tag))
    if print_document(SandboxesReport(sandboxes=tuple(found)), options):
        return 0
    rows = [
        (
            one.id,
            one.name or "-",
            one.backend,
            span(one.age_s),
            "paused" if one.paused else "-" if one.left_s is None else span(one.left_s),
            "-" if one.commands is None else str(one.commands),
            ",".join(f"{name}={value}" for name, value in one.tags.items()) or "-",
        )
        for one in found
    ]
    show_table(_COLUMNS, rows)
    return 0


def _close(options: argparse.Namespace) -> int:
    from x07_sandbox.cli.messages import say_changes
    from x07_sandbox.cli.outputs import print_result

    result = _closed(options)
    if options.json and not options.quiet_json:
        return print_result(result)
    if result.changes.state != "none":
        say_changes(result)
    if denials := [one for one in result.denials if one.action != "copy"]:  # `create` has printed those
        from x07_sandbox.cli.messages import say_denials

        say_denials(replace(result, denials=denials))
    return result.x07_exit_code


def _closed(options: argparse.Namespace) -> Result:
    from x07_sandbox.library.listing import connect_to, find_sandbox

    progress = LiveLine()
    progress("closing the sandbox")
    try:
        return connect_to(options.sandbox, flags=True).finish(options.changes)
    except RefusedError as exc:
        from x07_sandbox.library.snapshots import close_lost  # most sandboxes can go on
        from x07_sandbox.sessions.snapshots import OUTDATED

        if exc.code != OUTDATED:
            raise
        say(f"{exc.what}: {exc.why}")
        return close_lost(find_sandbox(options.sandbox), options.changes, exc)
    finally:
        progress("")


def _parts(path: str) -> tuple[str, str]:
    """Return the sandbox, or "", and the path. A path with a slash before its first colon belongs to this host."""
    word, colon, rest = path.partition(":")
    return (word, rest or ".") if colon and word and "/" not in word else ("", path)


def _copy(options: argparse.Namespace) -> int:
    from x07_sandbox.library.files import Files
    from x07_sandbox.library.listing import connect_to

    (source_in, source), (target_in, target) = _parts(options.source), _parts(options.target)
    if bool(source_in) == bool(target_in):
        why = "exactly one of SOURCE and TARGET must be in a sandbox"
        raise UsageError("wrong usage", why, "Write it as SANDBOX:PATH; a file of this host as ./FILE")
    opened = connect_to(source_in or target_in)
    files = Files(opened, options.timeout or FILES_S)
    try:
        if target_in:
            if files.exists(target) and files.stat(target).kind == "folder":
                target = posixpath.join(target, Path(source).resolve().name)
            files.upload(source, target)
        else:
            local = Path(target)
            if local.is_dir():
                local /= posixpath.basename(posixpath.normpath(source)) or "root"
            files.download(source, local)
    except OSError as exc:
        raise _file_error(f"cannot copy {options.source} to {options.target}", exc) from exc
    return 0


def _file_error(what: str, exc: OSError) -> SandboxError:
    named = "" if exc.filename is None else f"{os.fspath(exc.filename)}: "
    why = f"{named}{exc.strerror or exc}"
    if isinstance(exc, TimeoutError):
        return BackendError(what, why, "Try again, with a larger --timeout if needed")
    return UsageError(what, why, "Check the paths")


def _files(options: argparse.Namespace) -> int:
    from x07_sandbox.library.files import Files
    from x07_sandbox.library.listing import connect_to
    from x07_sandbox.reports.sandboxes import FileRow, FilesReport

    files = Files(connect_to(options.sandbox, flags=True), options.timeout or FILES_S)
    try:
        about = files.stat(options.path)
        found = files.list(options.path) if about.kind == "folder" else [about]
    except OSError as exc:
        raise _file_error(f"cannot list {options.path}", exc) from exc
    report = FilesReport(files=tuple(FileRow(**_fields(one)) for one in found))
    if not print_document(report, options):
        for one in found:
            show(_line(one))
    return 0


def _fields(info: FileInfo) -> dict[str, Any]:
    from x07_sandbox.files.changes import in_json

    (name, name_raw), (target, target_raw) = in_json(info.name), in_json(info.target)
    exact = {"name": name, "name_base64": name_raw, "target": target, "target_base64": target_raw}
    return exact | {key: getattr(info, key) for key in ("kind", "mode", "size", "mtime_s")}


def _line(info: FileInfo) -> str:
    """Return a line as of `ls -l`."""
    kinds = {"file": stat.S_IFREG, "folder": stat.S_IFDIR, "link": stat.S_IFLNK, "other": 0}
    try:
        when = dt.datetime.fromtimestamp(info.mtime_s).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # the guest chooses it
        when = "-"
    target = f" -> {info.target}" if info.kind == "link" else ""
    return f"{stat.filemode(kinds[info.kind] | info.mode)} {info.size:>12} {when:<16} {info.name}{target}"


def _forward(options: argparse.Namespace) -> int:
    from x07_sandbox.library.forwarding import Forwarder
    from x07_sandbox.library.listing import connect_to
    from x07_sandbox.reports.sandboxes import ForwardReport

    opened = connect_to(options.sandbox, flags=True)
    ended = threading.Event()
    opened.at_end(ended.set)
    try:
        address, port = Forwarder(opened, options.port, options.unix).address
    except OSError as exc:
        raise _file_error(f"cannot forward port {options.port}", exc) from exc
    if not print_document(ForwardReport(address=address, port=port), options):
        show(address if options.unix else f"{address}:{port}")
    try:
        ended.wait()
    finally:
        opened.disconnect()
    return 0


def _add_exec(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    """Add the arguments of `x07 sandbox exec`."""
    parser.usage = "x07 sandbox exec [OPTIONS] SANDBOX -- COMMAND [ARGS]"
    parser.epilog = _EXEC_EPILOG
    _with_sandbox(parser)
    parser.add_argument("command", nargs="*", metavar="COMMAND [ARGS]", help="the command and its arguments, after --")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input to the command")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    switch(parser, "--detach", "start the command without input, print its number, and do not wait for it; see attach")
    _add_common(parser)
    switch(parser, "--raw", "pass the command's control sequences to the terminal unfiltered")
    add_document_flags(parser, "print how the command ended, with its output, as one JSON object")
    parser.set_defaults(carry_out=_exec)


def _add_attach(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    """Add the arguments of `x07 sandbox attach`."""
    _with_sandbox(parser)
    doc = "number that x07 sandbox exec --detach printed"
    parser.add_argument("number", metavar="NUMBER", help=doc, type=_command_number)
    switch(parser, "--raw", "pass the command's control sequences to the terminal unfiltered")
    add_document_flags(parser, "print how the command ended, with its output, as one JSON object")
    parser.set_defaults(carry_out=_attach, tty=False, interactive=False)


def _command_number(text: str) -> int:
    from x07_sandbox.channel.messages import ID_MAX

    if not (text.isascii() and text.isdigit() and 0 < int(text) <= ID_MAX):
        raise argparse.ArgumentTypeError(f"give the number that x07 sandbox exec --detach printed, not {text!r}")
    return int(text)


def _attach(options: argparse.Namespace) -> int:
    """Print the output of a detached command, also what was kept of it, until it ends. Ctrl-C leaves it running."""
    from x07_sandbox.library.listing import connect_to

    opened = connect_to(options.sandbox, flags=True)
    command = opened.command(options.number)
    assert command is not None  # the holder has answered
    return _attached(opened, command, options, kills=False)


def _add_shell(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    """Add the arguments of `x07 sandbox shell`."""
    _with_sandbox(parser)
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
    from x07_sandbox.sessions.execution import order

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
    opened = connect_to(options.sandbox, flags=True)
    env = dict(map(variable, options.env))
    asked = order(options.command, env, options.cwd or "", terminal=terminal, detached=options.detach)
    command = opened.start(asked, options.timeout)
    if options.detach:
        return _detached(opened, command, options)
    return _attached(opened, command, options)


def _detached(opened: HeldSandbox, command: Process, options: argparse.Namespace) -> int:
    from x07_sandbox.reports.sandboxes import CommandDocument

    if document_wanted(options):
        print_document(CommandDocument(sandbox=opened.run, id=command.id, outcome=None), options)
    else:
        show(str(command.id))
    return 0


def _attached(opened: HeldSandbox, command: Process, options: argparse.Namespace, *, kills: bool = True) -> int:
    """Carry the streams of the command until it has ended, and report its end. kills: whether Ctrl-C kills it."""
    from x07_sandbox.policy.outcomes import SIGNAL_BASE
    from x07_sandbox.sessions.command import Kept

    kept = (Kept(OUTPUT_MAX_BYTES, "head"), Kept(OUTPUT_MAX_BYTES, "head")) if document_wanted(options) else None
    with contextlib.ExitStack() as stack:
        if options.tty:
            stack.enter_context(_raw_terminal(command))
        if options.interactive:
            threading.Thread(target=command.send_all, args=(partial(os.read, 0, _READ),), daemon=True).start()
        else:
            command.close_stdin()
        try:
            _carry(command, kept, raw=options.raw or options.tty)
            end = command.ending()
        except (KeyboardInterrupt, BrokenPipeError) as exc:
            if kills:
                command.kill()
                command.until(_KILLED_S)
            if isinstance(exc, BrokenPipeError):  # as `| head` does
                return SIGNAL_BASE + signal.SIGPIPE
            raise
    return _report(opened.run, end, kept, options)


def _carry(command: Process, kept: tuple[Kept, Kept] | None, *, raw: bool) -> None:
    from x07_sandbox.sessions.transfers import TerminalFilter

    fds: dict[StreamName, int] = {"stdout": 1, "stderr": 2}
    filters = {name: TerminalFilter() for name, fd in fds.items() if not raw and os.isatty(fd)}
    for stream, data in command:
        if kept is not None:
            kept[stream == "stderr"].take(data)
        else:
            write_all(fds[stream], filters[stream](data) if stream in filters else data)


def _size() -> tuple[int, int]:
    size = os.get_terminal_size(0)
    return size.lines or 24, size.columns or 80  # a terminal may not know its size


@contextlib.contextmanager
def _raw_terminal(command: Process) -> Iterator[None]:
    """Pass every key to the command in the context, and changes of the terminal's size."""
    import queue  # few commands have a terminal

    before = termios.tcgetattr(0)
    changes = queue.SimpleQueue[str]()  # a signal handler may call its put()

    def follow() -> None:
        # In a thread: a handler that interrupts another one would send sizes in the wrong order.
        with contextlib.suppress(OSError, SandboxError):
            while changes.get():
                command.resize(*_size())

    threading.Thread(target=follow, name="x07-resize", daemon=True).start()
    resized = signal.signal(signal.SIGWINCH, lambda *_: changes.put("resize"))
    try:
        changes.put("resize")  # it may have changed since the start
        tty.setraw(0, termios.TCSADRAIN)  # keeps what was typed already
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, resized)
        changes.put("")


def _report(run: str, end: Ended, kept: tuple[Kept, Kept] | None, options: argparse.Namespace) -> int:
    if kept is not None:
        from x07_sandbox.reports.sandboxes import CommandDocument
        from x07_sandbox.sessions.result import output_with
        from x07_sandbox.sessions.transfers import TerminalFilter

        stdout, stderr = (output_with(one.data(), one.size, truncated=one.truncated) for one in kept)
        document = CommandDocument(
            sandbox=run,
            **{name: value for name, value in asdict(end).items() if name not in _OUTPUT},
            stdout=stdout,
            stderr=stderr,
        )
        if print_document(document, options):
            return end.x07_exit_code
        for fd, data in ((1, stdout.data), (2, stderr.data)):
            write_all(fd, TerminalFilter()(data) if os.isatty(fd) and not options.raw else data)
    sys.stdout.flush()
    if end.outcome not in {"ok", "failed"} or (end.outcome == "failed" and end.reason_code != "exited"):
        from x07_sandbox.policy.outcomes import ending_line

        say(ending_line(end.outcome, end.reason_code, end.reason, None), bad=f"{end.outcome}:")
    if end.denials or end.hints:
        from msgspec.structs import replace

        from x07_sandbox.cli.messages import say_denials
        from x07_sandbox.sessions.result import draft_result

        say_denials(replace(draft_result(run), denials=list(end.denials), hints=list(end.hints)))
    return end.x07_exit_code


def _saving(name: str) -> Callable[[Any], None]:
    """Return what adds the arguments of an action that saves a moment of a sandbox, or uses one."""

    def add(parser: argparse.ArgumentParser) -> None:
        from x07_sandbox.cli.snapshot import ACTIONS  # few callers save one

        ACTIONS[name](parser)

    return add


_ACTIONS: Final[dict[str, tuple[str, Callable[[Any], None]]]] = {
    "create": ("open a sandbox, and print its id", _add_create),
    "exec": ("run a command in a sandbox", _add_exec),
    "attach": ("print the output of a detached command, and wait for its end", _add_attach),
    "shell": ("open a shell in a sandbox, with a terminal", _add_shell),
    "cp": ("copy a file or folder into or out of a sandbox", _add_copy),
    "ls": ("list files of a sandbox", _add_files),
    "forward": ("let programs of this host connect to a port of a sandbox", _add_forward),
    "snapshot": ("keep a snapshot of a sandbox, from which others can start", _saving("snapshot")),
    "fork": ("start sandboxes that go on from this moment of a sandbox", _saving("fork")),
    "checkpoint": ("keep this moment for rollback, and print its number", _saving("checkpoint")),
    "rollback": ("go back to a checkpoint: with all files, programs and memory", _saving("rollback")),
    "pause": ("save a sandbox and free its memory, until somebody uses it again", _saving("pause")),
    "resume": ("let a paused sandbox go on, as any use of it does, and print its id", _saving("resume")),
    "close": ("end all commands of a sandbox, close it, and apply its changes", _add_close),
    "list": ("list open sandboxes", _add_list),
}
