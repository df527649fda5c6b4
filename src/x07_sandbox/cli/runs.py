"""What was run: `x07 ps`, `x07 inspect` and `x07 kill` for jobs, `x07 logs` and `x07 report` for runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import print_bytes, say, show, show_table, span, write_stdout
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, file_path, nonempty, switch
from x07_sandbox.errors import Command, HostError, SandboxError, UsageError
from x07_sandbox.host.locks import is_locked
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records.listing import inspect_run, list_jobs, program_of, recent_runs
from x07_sandbox.records.runs import NET_LOG, find_run, known_run, run_folder, started_ms

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from x07_sandbox.records.listing import JobLine, RecentRun
    from x07_sandbox.sessions.result import Result

_PS_EPILOG: Final = """A run is one call of x07 run or x07 exec. Each VM or container that a run starts is a job.

states:
  waiting                     the run has no job yet, for example because too many VMs are running
  starting, running, ending   the x07 process that started the job is alive
  orphaned                    the x07 process that started the job is dead; the next run or x07 sweep removes the job
  expired                     the job's deadline has passed; the next run or x07 sweep removes the job
  done                        the x07 process that started the job has ended it (with --all)
  reaped                      another x07 process has ended the job (with --all)
  unowned                     the job's record belongs to another user (with --all)
  foreign                     the job's record belongs to another host (with --all)
  newer                       a newer version of x07 wrote the job's record (with --all)
  damaged                     the job's record cannot be read (with --all)

KILLED IN is the time after which the job is killed even if the x07 process that started it is dead. It is longer than
the program's own time limit, because it includes the time to queue, start the VM and copy files. For a sandbox, it is
the rest of its lifetime.

examples:
  x07 ps
  x07 ps --json | jq -r '.jobs[].labels["io.x07.run_id"]'
  x07 ps --all
"""
_RUN: Final = "the run's id, its first characters, or the name of its sandbox"
_PS_HEAD: Final = ("RUN", "PHASE", "BACKEND", "STATE", "STARTED", "KILLED IN", "PROGRAM")
_INSPECT_EPILOG: Final = """The JSON object contains the run's jobs (record, labels, owner and state), its result,
and the paths of its files.

examples:
  x07 inspect 1764273600000
  x07 inspect 1764273600000-4711-0 | jq .result.outcome
  x07 inspect 1764273600000-4711-0 | jq -r .paths.folder
"""
_KILL_EPILOG: Final = """x07 kill ends and removes the VM of a run. The command that started the run then exits
with code 143 and the outcome cancelled. If that command is no longer running, x07 kill cleans up as x07 sweep does.

examples:
  x07 ps
  x07 kill 1764273600000-4711-0
  x07 kill --json 1764273600000-4711-0 | jq .jobs_ended

exit code: 0 the run has ended; 125 it could not be ended
"""
_LOGS_EPILOG: Final = """x07 logs prints the program's standard output to standard output, and its standard error to
standard error. On a terminal, x07 logs replaces control characters, except line ends and tabs.

With --net, x07 logs prints one JSON object per line. Its keys include event (open, closed, denied or failed), host,
port, rule, and ms (milliseconds since the start).

examples:
  x07 logs
  x07 logs --follow 1764273600000-4711-0
  x07 logs --build
  x07 logs --net | jq -c 'select(.event == "denied")'
"""
_CHUNK: Final = 1 << 16
_LOOK_AGAIN_S: Final = 0.05
_REPORT_EPILOG: Final = """The page shows how the run ended, its times, limits, denials, connections, output and
changes to files. It is one file without scripts, and loads nothing. Names and
output of the program are escaped, and long texts are shortened. Without --html,
the page is report.html in the folder of the run, and is removed with the run.

examples:
  x07 report --open
  x07 report --html run.html 1764273600000-4711-0
  x07 report --list
"""
_REPORT_HEAD: Final = ("RUN", "OUTCOME", "STARTED", "TOOK", "PROGRAM")
_LISTED: Final = 20
_PAGE: Final = "report.html"


def add_ps(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 ps`."""
    parser.epilog = _PS_EPILOG
    switch(parser, "--all", 'also show jobs in the states that are marked "with --all" below')
    add_document_flags(parser, "print one JSON object, with each job's labels and the reason for its state")
    parser.set_defaults(carry_out=_ps)


def _ps(options: argparse.Namespace) -> int:
    report = list_jobs(everything=options.all)
    if print_document(report, options):
        return 0
    show_table(_PS_HEAD, map(_job_row, report.jobs))
    return 0


def _job_row(line: JobLine) -> tuple[str, ...]:
    age = f"{span((unix_ms() - line.created_unix_ms) / 1000)} ago"
    left = "-" if line.left_s is None else span(line.left_s)
    what = line.program or "-" if line.sandbox is None else f"sandbox {line.sandbox}".rstrip()
    return line.run, line.phase or "-", line.backend or "-", line.state, age, left, what


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 inspect`."""
    parser.epilog = _INSPECT_EPILOG
    parser.add_argument(
        "run", type=nonempty, metavar="RUN", help="the run's id, its first characters, or a sandbox's name"
    )
    add_document_flags(parser, "no effect: the output is always JSON")
    parser.set_defaults(carry_out=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    print_document(inspect_run(named_run(options.run)), options, always=True)
    return 0


def named_run(word: str) -> str:
    """Return the id of the run with this id, start of an id, or name of its sandbox. Raises UsageError."""
    from x07_sandbox.library.listing import run_of

    return known_run(run_of(word))


def add_kill(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 kill`."""
    parser.epilog = _KILL_EPILOG
    parser.add_argument(
        "run", type=nonempty, metavar="RUN", help="the run's id, its first characters, or a sandbox's name"
    )
    add_document_flags(parser)
    parser.set_defaults(carry_out=_kill)


def _kill(options: argparse.Namespace) -> int:
    from x07_sandbox.backends.registry import find
    from x07_sandbox.records.stopping import KillReport, kill_run

    run = named_run(options.run)
    was_live, ended = kill_run(run, find)
    if not print_document(KillReport(run=run, jobs_ended=ended), options):
        say(f"run {run} ended" if was_live else f"run {run} had already ended")
    return 0


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 logs`."""
    parser.epilog = _LOGS_EPILOG
    doc = "the run's id, or its first characters (default: the latest run that has the requested log)"
    parser.add_argument("run", nargs="?", type=nonempty, metavar="RUN", help=doc)
    which = parser.add_mutually_exclusive_group()
    switch(which, "--build", "print the output of the build instead")
    switch(which, "--net", "print the log of connections instead")
    switch(parser, "--follow", "keep printing until the run ends")
    parser.set_defaults(carry_out=_logs)


def _logs(options: argparse.Namespace) -> int:
    if options.net:
        if options.follow:
            raise UsageError("wrong usage", "--net and --follow cannot be combined", "Omit --follow")
        return _net(options)
    prefix = "build-" if options.build else ""
    folder = _folder(options, f"{prefix}stdout")
    streams = [_Stream(folder / f"{prefix}stdout", 1, write_stdout), _Stream(folder / f"{prefix}stderr", 2, _put_error)]
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.callback(stream.close)
        live = True
        while live:
            live = options.follow and is_locked(folder)  # checked first, so that the last output is read below
            for stream in streams:
                stream.pass_on()
            if live:
                time.sleep(_LOOK_AGAIN_S)
    return 0


def _folder(options: argparse.Namespace, holds: str) -> Path:
    """Return the folder of the run RUN, or of the latest run that has the file *holds*. Raises UsageError."""
    if options.run is None:
        return find_run(None, holds, "output to print", "First run a program", action="any output")
    folder = run_folder(named_run(options.run))
    if not folder.is_dir() or not (options.follow or (folder / holds).is_file()):
        why = f"run {folder.name} has no such output"
        raise UsageError("cannot print the output", why, ("See what it has: ", Command(f"x07 inspect {folder.name}")))
    return folder


class _Stream:
    """A growing file of a run's output, which may not exist yet."""

    def __init__(self, path: Path, target: int, write: Callable[[bytes], None]) -> None:
        self._path, self._write = path, write
        self._filter: Callable[[bytes], bytes] = bytes
        if os.isatty(target):
            from x07_sandbox.sessions.transfers import TerminalFilter

            self._filter = TerminalFilter()
        self._fd: int | None = None

    def pass_on(self) -> None:
        """Write the bytes that were added to the file since the last call. Raises OSError."""
        if self._fd is None:
            with contextlib.suppress(FileNotFoundError):
                self._fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        while self._fd is not None and (chunk := os.read(self._fd, _CHUNK)):
            self._write(self._filter(chunk))

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)


def _put_error(data: bytes) -> None:
    with contextlib.suppress(OSError):  # as for every message
        sys.stderr.flush()
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


def _net(options: argparse.Namespace) -> int:
    folder = find_run(options.run, NET_LOG, "a log of connections", "Run a program with --allow-host", action="one")
    say(f"connections of run {folder.name}")
    with (folder / NET_LOG).open("rb") as file:
        while chunk := file.read(_CHUNK):
            print_bytes(chunk)
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 report`."""
    parser.epilog = _REPORT_EPILOG
    doc = "the run's id, its first characters, or a sandbox's name (default: the latest run that has ended)"
    parser.add_argument("run", nargs="?", type=nonempty, metavar="RUN", help=doc)
    parser.add_argument("--html", type=file_path, metavar="FILE", help="write the page to FILE")
    switch(parser, "--open", "open the page in your browser")
    switch(parser, "--list", f"list the last {_LISTED} runs and sandboxes instead")
    parser.set_defaults(carry_out=_report)


def _report(options: argparse.Namespace) -> int:
    from x07_sandbox.cli.outputs import check_outputs, write_bytes

    if options.list:
        if options.run or options.html or options.open:
            raise UsageError("wrong usage", "--list takes no run, --html or --open", "Omit them")
        show_table(_REPORT_HEAD, map(_run_row, recent_runs(_LISTED)))
        return 0
    if options.run is None:
        fix = ("First run a program: ", Command("x07 run PROGRAM"))
        run = find_run(None, "result.json", "a run to show", fix, action="ended").name
    else:
        run = named_run(options.run)
    if options.html is not None:
        check_outputs({"--html": options.html}, [])
    path = options.html or run_folder(run) / _PAGE
    write_bytes(path, _page(_result(run)).encode())
    show(str(path))
    if options.open:
        _open(path)
    return 0


def _run_row(one: RecentRun) -> tuple[str, ...]:
    outcome = one.outcome or ("in progress" if one.live else "no result")
    took = "-" if one.took_ms is None else f"{one.took_ms / 1000:.1f}s"
    return one.run, outcome, f"{span((unix_ms() - started_ms(one.run)) / 1000)} ago", took, one.program or "-"


def _result(run: str) -> Result:
    """Return the result of a run. Raises UsageError."""
    from x07_sandbox.sessions.result import stored_result

    if (result := stored_result(run)) is not None:
        return result
    why = "it is in progress, was killed, or ended before it started a program"
    if (run_folder(run) / "result.json").exists():
        why = "its result is damaged, or another version of x07 wrote it"
    raise UsageError(f"cannot show run {run}", why, ("To see what is known: ", Command(f"x07 inspect {run}")))


def _page(result: Result) -> str:
    from x07_sandbox.sessions.html import PATCH_MAX, page

    patch, more = b"", ""
    if result.changes.state not in {"none", "discarded"}:
        with contextlib.suppress(SandboxError):  # damaged: the names are in the result
            patch = _patch(result.run, PATCH_MAX)
        more = f"x07 diff {result.run}" if len(patch) > PATCH_MAX else ""
    return page(result.document(), program=program_of(result.run), patch=patch, more_patch=more)


def _patch(run: str, most: int) -> bytes:
    """Return the changes of a run in git's format, but not much more than *most* bytes. Raises SandboxError."""
    from x07_sandbox.sessions.patches import include_applied, patch_chunks
    from x07_sandbox.sessions.saved_changes import find_saved

    patch = bytearray()
    for chunk in patch_chunks(include_applied(find_saved(run))):
        patch += chunk
        if len(patch) > most:
            break
    return bytes(patch)


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.absolute().as_uri()):
        raise HostError(f"cannot open {path}", "no browser was found", "Open the file in a browser")
