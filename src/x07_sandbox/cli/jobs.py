"""`x07 ps`, `x07 inspect` and `x07 kill`: list, show and end jobs."""

import argparse
from typing import Final

from x07_sandbox.backends.registry import find
from x07_sandbox.cli.console import say, show_table
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, nonempty, switch
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records.listing import JobLine, inspect_run, list_jobs
from x07_sandbox.records.runs import known_run
from x07_sandbox.records.stopping import KillReport, kill_run

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
_HEAD: Final = ("RUN", "PHASE", "BACKEND", "STATE", "STARTED", "KILLED IN", "PROGRAM")
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
    show_table(_HEAD, map(_row, report.jobs))
    return 0


def _row(line: JobLine) -> tuple[str, ...]:
    age = f"{span((unix_ms() - line.created_unix_ms) / 1000)} ago"
    left = "-" if line.left_s is None else span(line.left_s)
    what = line.program or "-" if line.sandbox is None else f"sandbox {line.sandbox}".rstrip()
    return line.run, line.phase or "-", line.backend or "-", line.state, age, left, what


def span(seconds: float) -> str:
    """Return a duration in its two largest units, such as "1h5m"."""
    sign, whole = "-" if seconds < 0 else "", int(abs(seconds))
    for unit, smaller, letter, smaller_letter in ((86_400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= unit:
            return f"{sign}{whole // unit}{letter}{whole % unit // smaller}{smaller_letter}"
    return f"{sign}{whole}s"


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
    run = named_run(options.run)
    was_live, ended = kill_run(run, find)
    if not print_document(KillReport(run=run, jobs_ended=ended), options):
        say(f"run {run} ended" if was_live else f"run {run} had already ended")
    return 0
