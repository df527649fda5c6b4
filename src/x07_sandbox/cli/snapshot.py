"""`x07 snapshot`, and the actions of `x07 sandbox` that save a moment: snapshot, fork, checkpoint and rollback."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.cli.console import LiveLine, show, show_table, span
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import (
    add_document_flags,
    inner_verb,
    nonempty,
    option,
    repeated,
    seconds,
    tag,
    whole_number,
)
from x07_sandbox.host.settings import LIFETIME_MAX_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.library.held import HeldSandbox

_EPILOG: Final = """A snapshot has the files, programs and memory of a sandbox at one moment. Any number of sandboxes
can start from it. SNAPSHOT stands for its id, the first characters of the id, or its name. Snapshots and saved VMs take
as much disk space as the settings allow ([disk] saved_vms_mib); those not used for longest are removed first.

examples:
  x07 sandbox snapshot build --name prepared      take a snapshot of a sandbox
  x07 sandbox create --snapshot prepared          open a sandbox that starts from it
  x07 snapshot rm prepared
"""
_FORK_EPILOG: Final = """The command prints the ids of the forks, one per line. Each has the files, programs and memory
of the sandbox, which goes on, and changes of its own: apply the best with x07 sandbox close, and discard the others.

examples:
  x07 sandbox fork build --count 4
  x07 sandbox close --changes discard ID
"""
_COLUMNS: Final = ("SNAPSHOT", "NAME", "SANDBOX", "AGE", "SIZE")


def add_snapshot(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 snapshot`."""
    parser.epilog = _EPILOG
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    for name, doc, carry_out in (
        ("list", "list snapshots", _list),
        ("show", "show one snapshot", _show),
        ("rm", "remove snapshots; sandboxes that have started from them go on", _remove),
    ):
        action = inner_verb(inner, name, doc)
        if name != "list":
            many = {"nargs": "+"} if name == "rm" else {}
            action.add_argument(
                "snapshot", metavar="SNAPSHOT", type=nonempty, help="id, start of an id, or name", **many
            )
        add_document_flags(action)
        action.set_defaults(carry_out=carry_out)


def _list(options: argparse.Namespace) -> int:
    from x07_sandbox.library.snapshots import Snapshot

    return _report(Snapshot.list(), options)


def _show(options: argparse.Namespace) -> int:
    from x07_sandbox.library.snapshots import Snapshot

    return _report([Snapshot.find(options.snapshot)], options)


def _remove(options: argparse.Namespace) -> int:
    from x07_sandbox.library.snapshots import Snapshot

    found = [Snapshot.find(word) for word in options.snapshot]
    for one in found:
        one.remove()
    return _report(found, options) if options.json else 0


def _report(found: Any, options: argparse.Namespace) -> int:  # noqa: ANN401 - snapshots
    from x07_sandbox.host.waiting import unix_ms
    from x07_sandbox.reports.sandboxes import SnapshotsReport

    rows = tuple(found)
    if not print_document(SnapshotsReport(snapshots=rows), options):
        now = unix_ms()
        ages = [span((now - one.created_unix_ms) / 1000) for one in rows]
        show_table(
            _COLUMNS,
            [
                (one.id, one.name or "-", one.sandbox, age, f"{one.bytes >> 20} MiB")
                for one, age in zip(rows, ages, strict=True)
            ],
        )
    return 0


# actions of x07 sandbox


def _action(
    carry_out: Callable[[argparse.Namespace], int], more: Callable[[Any], None] | None = None, *, document: bool = False
) -> Callable[[Any], None]:
    """Return what adds the arguments of an action on one sandbox. document: whether it can print a document."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("sandbox", metavar="SANDBOX", type=nonempty, help="id, start of an id, or name")
        if more is not None:
            more(parser)
        if document:
            add_document_flags(parser)
        parser.set_defaults(carry_out=carry_out)

    return add


def _of_take(parser: Any) -> None:  # noqa: ANN401 - as argparse has it
    option(parser, "--name", "NAME", "name of the snapshot; replaces the one of this name", type=nonempty)


def _of_fork(parser: Any) -> None:  # noqa: ANN401 - as above
    parser.epilog = _FORK_EPILOG
    option(parser, "--count", "N", "number of forks (default: 1)", type=whole_number(1, 256, "forks"))
    repeated(parser, "--tag", "NAME=VALUE", "tag of the forks, for x07 sandbox list", type=tag)
    most = seconds(LIFETIME_MAX_S)
    option(parser, "--lifetime", "S", "end each after this many seconds (default: 3600)", type=most)
    option(parser, "--idle", "S", "end each after this many seconds without a command (default: no limit)", type=most)


def _of_rollback(parser: Any) -> None:  # noqa: ANN401 - as above
    doc = "number that x07 sandbox checkpoint printed"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=whole_number(1, 1 << 31, "checkpoints"), help=doc)


def _opened(options: argparse.Namespace, doing: str) -> tuple[HeldSandbox, LiveLine]:
    from x07_sandbox.library.listing import connect_to

    opened, progress = connect_to(options.sandbox, flags=True), LiveLine()
    progress(doing)
    return opened, progress


def _take(options: argparse.Namespace) -> int:
    from x07_sandbox.library.arguments import check_snapshot_name
    from x07_sandbox.library.snapshots import Snapshot

    check_snapshot_name(options.name or "")
    opened, progress = _opened(options, "taking a snapshot")
    found = Snapshot.find(opened.snapshot(options.name or ""))
    progress("")
    if options.json or options.report_out:
        return _report([found], options)
    show(found.id)
    return 0


def _fork(options: argparse.Namespace) -> int:
    from x07_sandbox.library.listing import list_sandboxes
    from x07_sandbox.library.opening import checked_life
    from x07_sandbox.reports.sandboxes import SandboxesReport

    given = {"tags": dict(options.tag), "lifetime_s": options.lifetime, "idle_s": options.idle}
    given = {name: value for name, value in given.items() if value}
    checked_life(given)
    opened, progress = _opened(options, "starting forks")
    runs = [one.run for one in opened.fork(options.count or 1, given)]
    progress("")
    report = SandboxesReport(sandboxes=tuple(one for one in list_sandboxes() if one.id in runs))
    if not print_document(report, options):
        for run in runs:
            show(run)
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    from x07_sandbox.reports.sandboxes import CheckpointReport

    opened, progress = _opened(options, "saving the sandbox")
    number = opened.checkpoint()
    progress("")
    if not print_document(CheckpointReport(sandbox=opened.run, checkpoint=number), options):
        show(str(number))
    return 0


def _rollback(options: argparse.Namespace) -> int:
    opened, progress = _opened(options, "going back")
    opened.rollback(options.checkpoint)
    progress("")
    return 0


def _pause(options: argparse.Namespace) -> int:
    opened, progress = _opened(options, "saving the sandbox")
    opened.pause()
    progress("")
    return 0


def _resume(options: argparse.Namespace) -> int:
    opened, progress = _opened(options, "")
    progress("")
    show(opened.run)
    return 0


ACTIONS: Final[dict[str, Callable[[Any], None]]] = {
    "snapshot": _action(_take, _of_take, document=True),
    "fork": _action(_fork, _of_fork, document=True),
    "checkpoint": _action(_checkpoint, document=True),
    "rollback": _action(_rollback, _of_rollback),
    "pause": _action(_pause),
    "resume": _action(_resume),
}
