"""`x07 policy explain`: show the plan of a run, field by field, without starting or probing anything."""

from __future__ import annotations

import argparse
import json
from typing import Final

import msgspec

from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.backends.selection import backend_named, backend_request, select, this_platform
from x07_sandbox.network.names import pattern_text
from x07_sandbox.network.rules import make_allowlist, unreachable_entries
from x07_sandbox.network.settings import read_settings
from x07_sandbox.plan.confinement import confinement
from x07_sandbox.plan.controls import make_plan
from x07_sandbox.policy.canonical import policy_digest
from x07_sandbox.policy.model import Policy, leaf_values
from x07_sandbox.programs.toolchains import TOOLCHAINS
from x07_sandbox.reports.policies import ExplainedControl, ExplainReport, NeverReached
from x07_sandbox.x07.protocol import X07

# The state that needs attention comes first.
_GROUPS: Final = {
    "refused": "refused: a run with this policy does not start",
    "enforced": "enforced",
    "advisory": "advisory: not enforced; only programs that check these fields obey them",
}
_SHOWN_CHARS: Final = 40

_EPILOG: Final = """x07 policy explain does not start or test the backend. It shows the best isolation that the backend
can provide; a run may get less. The result of a run contains the same list of fields.

examples:
  x07 policy explain                      explain the built-in default policy
  x07 policy explain strict.json --json | jq '.refusals'
  x07 policy explain built-in:cli
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `explain` to the verbs of `x07 policy`."""
    parser = verbs.add_parser(
        "explain",
        help="show what enforces each field",
        description="Show for each field of POLICY whether a run would enforce it, what would enforce it, and why.",
        epilog=_EPILOG,
    )
    doc = "a policy (default: built-in:default)"
    parser.add_argument("policy", nargs="?", default="built-in:default", metavar="POLICY", help=doc)
    parser.add_argument(
        "--backend", metavar="B", help=f"backend: one of {', '.join(BY_NAME)} (default: the one that x07 run would use)"
    )
    toolchains = tuple(toolchain.name for toolchain in (*TOOLCHAINS, X07))
    doc = f"toolchain of the program: one of {', '.join(toolchains)}; the policy fields language.* apply to x07 only"
    parser.add_argument("--toolchain", choices=toolchains, metavar="T", help=doc)


def explanation(policy: Policy, source: str, backend_name: str | None, toolchain: str | None) -> ExplainReport:
    """Return the plan of a run. source: path or name of the policy. Raises UsageError or RefusedError."""
    backend = None if backend_name is None else backend_named(backend_name)
    if backend is None or not (backend.built and backend.runs_on(this_platform())):
        backend = BY_NAME[select(this_platform(), backend_request(backend=backend_name, flags=("--backend",))).backend]
    features = create(backend.name).least_features()
    plan = make_plan(policy, features, proxy_resolves=policy.may_connect and read_settings().proxy_resolves)
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
        never_reached=tuple(
            NeverReached(field=entry.rule, host=pattern_text(entry.what), why=why)
            for entry, why in unreachable_entries(make_allowlist(policy, settings=read_settings()))
        ),
    )


def lines(found: ExplainReport) -> list[str]:
    """Return an explanation as text."""
    isolation = " or ".join(found.isolation)
    text = [f"policy {found.policy_id} ({found.policy}) on {found.backend} ({isolation})"]
    width = max(len(control.field) for control in found.controls)
    for state, title in _GROUPS.items():
        group = [control for control in found.controls if control.state == state]
        if group:
            text += ["", f"{title}:"]
        for control in group:
            text.append(f"  {control.field:{width}}  {json_text(control.value):12}  {control.by}: {control.why}")
    if found.never_reached:
        text += ["", "allowed by the policy but blocked unless your settings allow it (docs/explanation/network.md):"]
    text += [f"  {row.field}  {json_text(row.host)}: {row.why}" for row in found.never_reached]
    text += ["", f"seccomp filters of the image: {', '.join(found.filters)} (digests are in a run's result)"]
    if found.refusals:
        text += ["", "to allow a run:"]
    for refusal in found.refusals:
        how = refusal.how_to_allow
        text += [f"  {refusal.why}", f"    in the policy: {how.json_path} = {json_text(how.value)}"]
        if how.flag:
            text.append(f"    or: {how.flag}")
    return text


def json_text(value: object) -> str:
    """Return a value as ASCII JSON, shortened if long. Text from a policy is not trusted."""
    dumped = json.dumps(value, separators=(",", ":"))
    return dumped if len(dumped) <= _SHOWN_CHARS else dumped[: _SHOWN_CHARS - 3] + "..."
