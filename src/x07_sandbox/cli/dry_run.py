"""`x07 run --dry-run`: what a run would do, and what its policy would hold; nothing is booted."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.run_failure import print_failure
from x07_sandbox.errors import RefusedError
from x07_sandbox.plan.outcomes import REFUSED_EXIT
from x07_sandbox.runs.preview import Preview, preview

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from x07_sandbox.runs.request import RunRequest


_LISTED: Final = 8
_DEEDS = {False: "read", True: "change"}


def show_plan(request: RunRequest, options: argparse.Namespace) -> int:
    """Print it; 0 if the run would be carried out, 125 if it would be refused. Raises SandboxError but RefusedError."""
    try:
        found = preview(request)
    except RefusedError as exc:  # of a run it is the result, not an error before it, for which X07's exit code is 2
        if options.json and not options.quiet_json:
            return print_failure(exc)
        say(str(exc))
        return REFUSED_EXIT
    if not print_document(found, options):
        for line in _lines(found):
            show(line)
    return REFUSED_EXIT if found.plan.refusals else 0


def _lines(found: Preview) -> list[str]:
    limits = found.plan.limits
    states: dict[str, int] = {}
    for control in found.plan.controls:
        states[control.state] = states.get(control.state, 0) + 1
    built = "nothing is built" if found.build is None else f"built in a machine without network: {_short(found.build)}"
    held = (
        f"{limits.wall_ms} ms",
        f"{limits.cpu_ms} ms of CPU",
        f"{limits.mem_bytes >> 20} MiB",
        f"{limits.procs} tasks beside the first",
        f"{limits.fds} descriptors",
    )
    return [
        *(
            [f"toolchain {found.toolchain}: {built}", f"files that go in: {_listed(found.files)}"]
            if found.files
            else []
        ),
        *(f"folder {root.host}: a copy at {root.guest}, to {_DEEDS[root.write]}" for root in found.roots),
        f"run in another machine: {_short(found.run)}",
        f"limits: {', '.join(held)}",
        *([] if found.scaling is None else [f"scaled for emulation: time and CPU time {found.scaling.factor} times"]),
        f"network: {_listed(found.hosts) or 'no connections'}{_denied(found)}",
        *([f"image {found.image}: {found.digests['image']}"] if "image" in found.digests else []),
        f"policy: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))} (x07 policy explain)",
        *(f"refused: {refusal.why}" for refusal in found.plan.refusals),
    ]


def _denied(found: Preview) -> str:
    return f" (but not {_listed(found.denied_hosts)})" if found.denied_hosts else ""


def _listed(names: Sequence[str]) -> str:
    """The first few, as many as fit a line."""
    return ", ".join(names if len(names) <= _LISTED else [*names[:_LISTED], f"and {len(names) - _LISTED} more"])


def _short(argv: list[str]) -> str:
    shown = " ".join("..." if "\n" in word else shlex.quote(word) for word in argv)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."  # noqa: PLR2004 - a line
