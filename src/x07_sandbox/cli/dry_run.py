"""`x07 run --dry-run`: show what a run would do and what its policy would enforce, without starting a VM."""

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Final

from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.run_failure import print_failure
from x07_sandbox.errors import RefusedError
from x07_sandbox.policy.outcomes import REFUSED_EXIT
from x07_sandbox.sessions.preview import Preview, preview
from x07_sandbox.sessions.request import RunCaller, RunRequest

_LISTED: Final = 8
_STATES: Final = {"advisory": "advisory (not enforced; some libraries check them)"}
_ACCESS: Final = {False: "read-only", True: "writable"}


def show_plan(request: RunRequest, caller: RunCaller, options: argparse.Namespace) -> int:
    """Print the plan of a run. Return 0 if the run could start, or 125 if it would be refused. Raises SandboxError."""
    try:
        found = preview(request, caller)
    except RefusedError as exc:  # the result of a run; not an error before it, which would have X07's exit code 2
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
    states = Counter(control.state for control in found.plan.controls)
    denied = f" (denied: {_listed(found.denied_hosts)})" if found.denied_hosts else ""
    built = "nothing to build" if found.build is None else f"build in a VM without network: {_short(found.build)}"
    counts = [f"{count} {_STATES.get(state, state)}" for state, count in sorted(states.items(), reverse=True)]
    values = (
        f"time {limits.wall_ms / 1000:g} s",
        f"CPU time {limits.cpu_ms / 1000:g} s",
        f"memory {limits.mem_bytes >> 20} MiB",
        f"{limits.procs} processes besides the first",
        f"{limits.fds} open files",
    )
    files = [f"toolchain: {found.toolchain}", built, f"files copied into the VM: {_listed(found.files)}"]
    return [
        *(files if found.files else []),
        *(f"folder {root.host}: copied to {root.guest}, {_ACCESS[root.write]}" for root in found.roots),
        f"run in another VM: {_short(found.run)}",
        *(["user: root in the VM, over a writable layer of its system"] if found.guest_root else []),
        f"limits: {', '.join(values)}",
        *([] if found.scaling is None else [f"scaled for emulation: time limits times {found.scaling.factor}"]),
        f"network: {_listed(found.hosts) or 'none'}{denied}",
        *(f"blocked: {blocked}" for blocked in found.blocked_hosts[:_LISTED]),
        *(["addresses of names: chosen by your proxy, and not checked"] if found.proxy_resolves else []),
        *([f"image {found.image}: {found.digests['image']}"] if "image" in found.digests else []),
        f"policy fields: {', '.join(counts)}; to list them: x07 policy explain",
        *(f"refused: {refusal.why}" for refusal in found.plan.refusals),
    ]


def _listed(names: Sequence[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    return ", ".join(names if len(names) <= _LISTED else [*names[:_LISTED], f"and {len(names) - _LISTED} more"])


def _short(argv: list[str]) -> str:
    shown = " ".join("..." if "\n" in word else shlex.quote(word) for word in argv)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."  # noqa: PLR2004 - a line
