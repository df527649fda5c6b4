#!/usr/bin/env python3
"""Write the generated parts of docs/reference/policy.md: commands, fields, rules, templates, default policy.

python -m scripts.make_policy_page        in an environment that has x07-sandbox
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from scripts.pages import filled
from x07_sandbox.cli.policy import EXIT_CODES
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.default import default_policy, render_policy
from x07_sandbox.policy.features import vm_features
from x07_sandbox.policy.model import OPTIONAL_SECTIONS
from x07_sandbox.policy.problems import RULES
from x07_sandbox.policy.schema import fields, host_fields, policy_schema
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from x07_sandbox.policy.model import Policy, Section
    from x07_sandbox.policy.schema import Field

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "policy.md"
_COMMANDS: Final = {
    "new": "`x07 policy new [FLAGS]` | print a complete policy made from flags",
    "init": "`x07 policy init --template T` | write a template to `.x07/policies/base` in the project",
    "check": "`x07 policy check FILE...` | list all errors; with `--host H:P`, show the decision for a connection",
    "explain": "`x07 policy explain [POLICY]` | show who enforces each field, before anything runs",
    "schema": "`x07 policy schema` | print the JSON Schema",
}
_MIB: Final = 1 << 20


def commands() -> str:
    """Return the table of commands with their exit codes."""
    return _table("Command | Purpose | Exit code", (f"{_COMMANDS[name]} | {codes}" for name, codes in EXIT_CODES))


def sections() -> str:
    """Return the values that apply if an optional section is absent."""
    return "".join(f"- `{name}`: {_in_words(section)}\n" for name, section in OPTIONAL_SECTIONS.items())


def all_fields() -> str:
    """Return a table of the fields of each section, and of a host."""
    plan = make_plan(default_policy(), vm_features("vm-emulated"))
    held = {control.field: control.by if control.state == "enforced" else control.state for control in plan.controls}
    head = "Field | Values | Default | Meaning"
    parts = []
    grouped: dict[str, list[Field]] = {}
    for field in fields():
        grouped.setdefault(field.path.rpartition(".")[0] or "Top level", []).append(field)
    for section, inner in grouped.items():
        doc = policy_schema()["$defs"][inner[0].section]["description"]
        holders = {held[field.path] for field in inner}
        if len(holders) == 1:  # once instead of in every row
            holder = holders.pop()
            by = "All fields are advisory." if holder == "advisory" else f"Enforced by {holder}."
            text, rows = f"{doc} {by}", _table(head, map(_row, inner))
        else:
            text, rows = doc, _table(f"{head} | Enforced by", (_row(field, held) for field in inner))
        parts.append(f"### {section}\n\n{text}\n\n{rows}")
    hosts = _table(head, map(_row, host_fields()))
    return "\n".join([*parts, f"### Each host of net.allow_hosts\n\n{hosts}"])


def rules() -> str:
    """Return the rules, numbered."""
    return "".join(f"{number}. {rule.doc}\n" for number, rule in enumerate(RULES, start=1))


def templates() -> str:
    """Return the table of templates."""
    head = "Template | For | CPU s | Wall s | MiB | Tasks | Reads | Writes | Network"
    return _table(head, (_template_row(name, policy) for name, policy in TEMPLATES.items()))


def default() -> str:
    """Return the default policy as JSON."""
    return f"```json\n{render_policy(default_policy()).decode()}```\n"


def _table(head: str, rows: Iterable[str]) -> str:
    lines = [f"| {head} |", "|" + "---|" * len(head.split("|")), *(f"| {row} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _in_words(section: Section) -> str:
    plain = msgspec.to_builtins(section)
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in plain.items() if not isinstance(value, dict))


def _row(field: Field, held: Mapping[str, str] | None = None) -> str:
    values = f"{field.kind}, {field.bounds}" if field.bounds else field.kind
    absent = "" if field.default is None else f"`{json.dumps(field.default)}`"
    if field.required:
        absent = "required"
    cells = [f"`{field.path}`", values.replace("|", "\\|"), absent, field.doc]
    return " | ".join(cells if held is None else [*cells, held[field.path]])


def _template_row(name: str, policy: Policy) -> str:
    limits, roots = policy.limits, (policy.fs.read_roots, policy.fs.write_roots)
    cells = [
        f"`{name}`",
        policy.notes_in_force,
        *(limits.cpu_ms // 1000, limits.wall_ms // 1000, limits.mem_bytes // _MIB, limits.procs),
        *(", ".join(f"`{root}`" for root in found) or "nothing" for found in roots),
        "listed hosts" if policy.net.enabled else "off",
    ]
    return " | ".join(map(str, cells))


PARTS = {
    "commands": commands,
    "sections": sections,
    "fields": all_fields,
    "rules": rules,
    "templates": templates,
    "default": default,
}


def render() -> str:
    """Return the page with current parts."""
    return filled(PAGE, PARTS)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
