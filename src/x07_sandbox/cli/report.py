"""`x07 report`: write a page about a run, or list the last runs."""

import argparse
import contextlib
from pathlib import Path
from typing import Final

from x07_sandbox.cli.atomic_output import check_outputs, write_bytes
from x07_sandbox.cli.console import show, show_table
from x07_sandbox.cli.jobs import named_run, span
from x07_sandbox.cli.parser import file_path, nonempty, switch
from x07_sandbox.errors import Command, HostError, SandboxError, UsageError
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.library.held import stored_result
from x07_sandbox.records.listing import RecentRun, program_of, recent_runs
from x07_sandbox.records.runs import find_run, run_folder, started_ms
from x07_sandbox.sessions.result import Result

_EPILOG: Final = """The page shows how the run ended, its times, limits, denials, connections, output and
changes to files. It is one file without scripts, and loads nothing. Names and
output of the program are escaped, and long texts are shortened. Without --html,
the page is report.html in the folder of the run, and is removed with the run.

examples:
  x07 report --open
  x07 report --html run.html 1764273600000-4711-0
  x07 report --list
"""
_HEAD: Final = ("RUN", "OUTCOME", "STARTED", "TOOK", "PROGRAM")
_LISTED: Final = 20
_PAGE: Final = "report.html"


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 report`."""
    parser.epilog = _EPILOG
    doc = "the run's id, its first characters, or a sandbox's name (default: the latest run that has ended)"
    parser.add_argument("run", nargs="?", type=nonempty, metavar="RUN", help=doc)
    parser.add_argument("--html", type=file_path, metavar="FILE", help="write the page to FILE")
    switch(parser, "--open", "open the page in your browser")
    switch(parser, "--list", f"list the last {_LISTED} runs and sandboxes instead")
    parser.set_defaults(carry_out=_report)


def _report(options: argparse.Namespace) -> int:
    if options.list:
        if options.run or options.html or options.open:
            raise UsageError("wrong usage", "--list takes no run, --html or --open", "Omit them")
        show_table(_HEAD, map(_row, recent_runs(_LISTED)))
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


def _row(one: RecentRun) -> tuple[str, ...]:
    outcome = one.outcome or ("in progress" if one.live else "no result")
    took = "-" if one.took_ms is None else f"{one.took_ms / 1000:.1f}s"
    return one.run, outcome, f"{span((unix_ms() - started_ms(one.run)) / 1000)} ago", took, one.program or "-"


def _result(run: str) -> Result:
    """Return the result of a run. Raises UsageError."""
    if (result := stored_result(run)) is not None:
        return result
    why = "it is in progress, was killed, or ended before it started a program"
    if (run_folder(run) / "result.json").exists():
        why = "its result is damaged, or another version of x07 wrote it"
    raise UsageError(f"cannot show run {run}", why, ("To see what is known: ", Command(f"x07 inspect {run}")))


def _page(result: Result) -> str:
    from x07_sandbox.reports.html import PATCH_MAX, page

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
