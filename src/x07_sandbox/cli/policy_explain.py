"""`x07 policy explain`: the plan of a run before there is one, field by field. Nothing is booted or looked for."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.backends.registry import BY_NAME, features_of
from x07_sandbox.backends.selection import asked, backend_named, select, this_platform
from x07_sandbox.network.names import pattern_text
from x07_sandbox.network.rules import make_allowlist, unreachable_entries
from x07_sandbox.plan.confinement import confinement
from x07_sandbox.plan.controls import make_plan
from x07_sandbox.policy.canonical import policy_digest
from x07_sandbox.policy.model import leaf_values
from x07_sandbox.programs.toolchains import TOOLCHAINS
from x07_sandbox.reports.policies import ExplainedControl, ExplainReport, NeverReached
from x07_sandbox.x07.protocol import X07

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

# What needs a reader's eye comes first.
_GROUPS: Final = {
    "refused": "refused: a run with this policy does not start",
    "enforced": "enforced",
    "advisory": "advisory: it binds only programs that ask",
}
_SHOWN_CHARS: Final = 40

_EPILOG: Final = """Nothing is booted and nothing is looked for on this machine: that is why isolation is said as
what it may be. The result of a run has the same lines (controls).

examples:
  x07 policy explain                      the built-in default
  x07 policy explain strict.json --json | jq '.refusals'
  x07 policy explain built-in:cli
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "explain",
        help="say of each field who enforces it, before anything runs",
        description="Say of each field of POLICY whether a run would hold it, by whom, and why.",
        epilog=_EPILOG,
    )
    doc = "a policy (default: built-in:default)"
    parser.add_argument("policy", nargs="?", default="built-in:default", metavar="POLICY", help=doc)
    parser.add_argument("--backend", metavar="B", help=f"one of {', '.join(BY_NAME)} (default: what a run takes)")
    toolchains = tuple(toolchain.name for toolchain in (*TOOLCHAINS, X07))
    doc = f"the program's, one of {', '.join(toolchains)}; only x07 is concerned by language.*"
    parser.add_argument("--toolchain", choices=toolchains, metavar="T", help=doc)


def explanation(
    policy: Policy, source: str, backend_name: str | None = None, toolchain: str | None = None
) -> ExplainReport:
    """What --json prints. source: the policy as the user named it. backend_name: None for what a run takes.

    Raises UsageError, and RefusedError for a backend that no run could take here.
    """
    backend = None if backend_name is None else backend_named(backend_name)
    if backend is None or not (backend.built and backend.runs_on(this_platform())):
        backend = BY_NAME[select(this_platform(), asked(backend=backend_name, flags=("--backend",))).backend]
    features = features_of(backend)
    plan = make_plan(policy, features)
    values = leaf_values(policy)
    return ExplainReport(
        policy=source,
        policy_id=policy.policy_id,
        digest=policy_digest(policy),
        backend=backend.name,
        isolation=backend.isolation,
        toolchain=toolchain,
        carried_out=not plan.refusals,
        filters=confinement(policy, "").filters if "confinement" in features.can_enforce else (),
        controls=tuple(
            ExplainedControl(**msgspec.structs.asdict(control), value=msgspec.to_builtins(values[control.field]))
            for control in plan.controls
        ),
        refusals=plan.refusals,
        unreachable_entries=tuple(
            NeverReached(field=entry.rule, host=pattern_text(entry.what), why=why)
            for entry, why in unreachable_entries(make_allowlist(policy))
        ),
    )


def lines(found: ExplainReport) -> list[str]:
    """An explanation as text."""
    isolation = " or ".join(found.isolation)
    told = [f"policy {found.policy_id} ({found.policy}) on {found.backend} ({isolation})"]
    width = max(len(control.field) for control in found.controls)
    for state, title in _GROUPS.items():
        group = [control for control in found.controls if control.state == state]
        if group:
            told += ["", f"{title}:"]
        for control in group:
            told.append(f"  {control.field:{width}}  {shown(control.value):12}  {control.by}: {control.why}")
    if found.unreachable_entries:
        told += ["", "listed, and never reached unless your own settings open it (docs/explanation/network.md):"]
    told += [f"  {row.field}  {shown(row.host)}: {row.why}" for row in found.unreachable_entries]
    told += ["", f"seccomp filters of the image: {', '.join(found.filters)} (a result has their digests)"]
    if found.refusals:
        told += ["", "what would allow a run:"]
    for refusal in found.refusals:
        how = refusal.how_to_allow
        told += [f"  {refusal.why}", f"    in the policy: {how.json_path} = {shown(how.value)}"]
        if how.flag:
            told.append(f"    or: {how.flag}")
    return told


def shown(value: object) -> str:
    """A value as JSON, in ASCII, cut: a policy's text may come from anybody."""
    text = json.dumps(value, separators=(",", ":"))
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
