"""`x07 sweep`, `x07 df` and `x07 prune`: remove unneeded jobs and files, and show disk usage."""

import argparse
from collections.abc import Sequence
from typing import Final

from x07_sandbox.cli.console import say, show, size
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, switch
from x07_sandbox.library.cleanup import disk_usage, prune, sweep
from x07_sandbox.records.pruning import PARTS

_SWEEP_EPILOG: Final = """x07 sweep removes:
  processes, containers, control groups and files of runs whose x07 process is dead or whose deadline has passed
  records of runs that ended more than 7 days ago or exceed another limit, unless their changes were not applied
  saved VMs that no image needs, that were not used for 7 days, or that take too much space
If an x07 process was killed while it applied changes, x07 sweep completes or reverts them. x07 sweep removes nothing
that a live x07 process uses, and nothing that belongs to another user or host. It lists damaged records and records of
a newer x07 version, but does not remove them. Every run also cleans up after killed x07 processes before it starts.

examples:
  x07 sweep --dry-run
  x07 sweep
  x07 sweep --json | jq '.kept[] | .why'

exit code: 0 done; 1 something could not be removed
"""
_DF_EPILOG: Final = """parts:
  images     guest images and their packages
  templates  saved VMs, which x07 clones for runs
  cache      built programs, and results of image checks
  runs       output, results and saved changes of runs
  records    records of jobs

x07 removes the least recently used saved VMs when all take more than 5 GiB, and built programs above 1 GiB. After a
run, at most once an hour, it removes records of runs that ended more than 7 days ago, that have 1000 newer ones, or
that take more than 1 GiB with newer ones. Records of the last hour stay. Saved changes and undo data stay for 7 days,
and changes that were not applied until x07 prune. To change the limits, see [disk] in docs/reference/settings.md.

examples:
  x07 df
  x07 df --json | jq .prunable_bytes
  x07 prune                             free the space in the column PRUNABLE
"""
_PRUNE_HELP: Final = {
    "images": "images without a name, with their packages and saved VMs, except the image in X07_VM_GUEST_IMAGE_DIGEST",
    "cache": "built programs and saved VMs that were not used for 7 days, and leftovers of killed processes",
    "runs": "job records, output, saved changes and undo data of runs that ended more than 7 days ago, or that exceed "
    "another limit for records (x07 df --help)",
}
_PRUNE_EPILOG: Final = """x07 prune removes nothing that a run or build in progress uses, and
nothing that belongs to another user. It lists damaged items and items of a newer x07 version, but does not remove them.

examples:
  x07 prune --dry-run
  x07 prune --images
  x07 prune --json | jq .bytes

exit code: 0 done; 1 something could not be removed
"""


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 sweep`."""
    parser.epilog = _SWEEP_EPILOG
    switch(parser, "--dry-run", "show what would be removed, without removing it")
    add_document_flags(parser)
    parser.set_defaults(carry_out=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    report = sweep(dry_run=options.dry_run, progress=say)
    if not print_document(report, options):
        removed = [f"{one.kind} {one.id}: {one.why}" for one in report.removed]
        _show(removed, [f"{one.kind} {one.id}: {one.why}" for one in report.kept], dry_run=report.dry_run)
    return 1 if any(kept.failed for kept in report.kept) else 0


def _show(removed: Sequence[str], kept: Sequence[str], *, dry_run: bool, freed: str = "") -> None:
    word = "would remove" if dry_run else "removed"
    for line in removed:
        show(f"{word} {line}")
    for line in kept:
        show(f"kept {line}")
    show(f"{word} {len(removed)} item{'' if len(removed) == 1 else 's'}{freed}")


def add_df(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 df`."""
    parser.description = "Show disk usage of images, caches and records, and what x07 prune would free."
    parser.epilog = _DF_EPILOG
    add_document_flags(parser)
    parser.set_defaults(carry_out=_df)


def _df(options: argparse.Namespace) -> int:
    report = disk_usage(say)
    if print_document(report, options):
        return 0
    show(f"{'PART':<10} {'FILES':>7} {'SIZE':>11} {'PRUNABLE':>11}  FOLDER")
    for part in report.parts:
        show(f"{part.name:<10} {part.files:>7} {size(part.bytes):>11} {size(part.prunable_bytes):>11}  {part.path}")
    files = sum(part.files for part in report.parts)
    show(f"{'all':<10} {files:>7} {size(report.bytes):>11} {size(report.prunable_bytes):>11}")
    return 0


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 prune`."""
    parser.description = (
        "Remove images, caches and records that are no longer needed. By default, remove all three kinds."
    )
    parser.epilog = _PRUNE_EPILOG
    for part in PARTS:
        parser.add_argument(
            f"--{part}", action="append_const", dest="parts", const=part, help=f"remove only {_PRUNE_HELP[part]}"
        )
    switch(parser, "--dry-run", "show what would be removed, without removing it")
    add_document_flags(parser)
    parser.set_defaults(carry_out=_prune)


def _prune(options: argparse.Namespace) -> int:
    report = prune(options.parts or PARTS, progress=say, dry_run=options.dry_run)
    if not print_document(report, options):
        removed = [f"{one.kind} {one.path} ({size(one.bytes)}): {one.why}" for one in report.removed]
        kept = [f"{one.kind} {one.path}: {one.why}" for one in report.kept]
        _show(removed, kept, dry_run=report.dry_run, freed=f", {size(report.bytes)}")
    return 1 if any(kept.failed for kept in report.kept) else 0
