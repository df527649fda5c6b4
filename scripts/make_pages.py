#!/usr/bin/env python3
"""Write the generated parts of the pages in docs/: between a comment with the name of a part, and the comment `end`.

python -m scripts.make_pages        in an environment that has x07-sandbox
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, get_args, get_type_hints

import msgspec

from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.cli import os_runner
from x07_sandbox.cli.parser import Parser, parser_for
from x07_sandbox.cli.policy import EXIT_CODES
from x07_sandbox.conformance.behaviours import BEHAVIOURS
from x07_sandbox.host import user_settings
from x07_sandbox.host.variables import VARIABLES, Variable
from x07_sandbox.options import BY_KEYWORD
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.decode import RULES, default_policy, render_policy
from x07_sandbox.policy.denials import Hint
from x07_sandbox.policy.features import vm_features
from x07_sandbox.policy.model import OPTIONAL_SECTIONS
from x07_sandbox.policy.outcomes import OUTCOMES, REASONS, outcomes_by_exit
from x07_sandbox.policy.schema import fields as policy_model_fields
from x07_sandbox.policy.schema import policy_schema
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from x07_sandbox.policy.model import Policy, Section
    from x07_sandbox.policy.schema import Field

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
_DESCRIBED_ONCE: Final = frozenset({"-h", "--version", "--report-out", "--quiet-json"})  # above the commands
_COLUMNS: Final = 80
_MEANING_AT: Final = 48  # the last column at which a meaning begins beside its name
_ITEM: Final = re.compile(r"( +)(.*?)(?:(  +)(\S.*))?")
_BREAK: Final = re.compile(r" (?=--|[|>] )")
_PAGE: Final = re.compile(r"\(docs/([\w/-]+\.md)\)")
_FIELD: Final = re.compile(r"(\w+(?:, \w+)*): (.*)")
_KINDS: Final = {"boolean": "true or false", "integer": "integer", "string": "string", "array": "list"}
_POLICY_COMMANDS: Final = {
    "new": "`x07 policy new [FLAGS]` | print a complete policy made from flags",
    "init": "`x07 policy init --template T` | write a template to `.x07/policies/base` in the project",
    "check": "`x07 policy check FILE...` | list all errors; with `--host H:P`, show the decision for a connection",
    "explain": "`x07 policy explain [POLICY]` | show who enforces each field, before anything runs",
    "schema": "`x07 policy schema` | print the JSON Schema",
}
# Where the contract was checked, for each backend.
_CHECKED: Final = {
    "firecracker-ctr": "containerd with runc, and a stand-in for the VMs",
    "apple-container": "a stand-in for `container` over podman, in three versions",
    "qemu": "emulated VMs, x86_64 and arm64; [KVM in an emulated computer](../../CONTRIBUTING.md#kvm-without-kvm)",
    "vz": "a stand-in for the helper over QEMU, x86_64 and arm64",
    "gvisor": "runsc",
    "podman": "the engine",
    "docker": "the engine",
    "containerd": "the engine",
    "os": "this system",
    "none": "this system",
}


def commands() -> str:
    """Return a section for each command."""
    inner = _inner(parser_for([]))
    return "".join(text for name, parser in inner.items() for text in _sections(parser, f"x07 {name}"))


def _inner(parser: Parser) -> dict[str, Parser]:
    """Return the parsers of a command's actions, by name."""
    parser.filled()
    found = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001 - argparse has no other way
    return {name: inner for action in found for name, inner in cast("dict[str, Parser]", action.choices).items()}


def _sections(parser: Parser, command: str) -> Iterator[str]:
    """Yield the section of a command, and those of its actions."""
    inner = _inner(parser)
    yield f"{'#' * (command.count(' ') + 1)} {command}\n\n"
    if parser.description:
        yield f"{parser.description.strip()}\n\n"
    for title, rows in [] if inner else _groups(parser).items():
        yield f"{title}{_table('argument | meaning', rows)}\n"
    below = parser.epilog if parser.late_epilog is None else parser.late_epilog("")
    if below:
        yield f"```text\n{_narrow(below.strip())}\n```\n\n"
    for name, one in inner.items():
        yield from _sections(one, f"{command} {name}")


def _narrow(text: str) -> str:
    """Return help in lines of at most 80 columns, so that the page does not scroll. A terminal shows up to 110."""
    found: list[str] = []
    for kind, lines in itertools.groupby(text.splitlines(), lambda line: line[:1].isspace() if line else None):
        for part in lines if kind is not False else re.split(r"\n(?=exit code:)", "\n".join(lines)):
            if max(map(len, part.split("\n"))) <= _COLUMNS:
                found.append(part)
            else:
                found += _narrow_line(part) if kind else _wrapped(part)
    return "\n".join(found)


def _narrow_line(line: str) -> list[str]:
    """Return an indented line, which is words, a name with its meaning, or a command with or without its meaning."""
    lead, name, gap, meaning = cast("re.Match[str]", _ITEM.fullmatch(line)).groups()
    if meaning:
        column = len(lead + name + gap)
        if column <= _MEANING_AT:
            return _wrapped(meaning, f"{lead}{name}{gap}", " " * column)
        return [lead + name, *_wrapped(meaning, f"{lead}    ", f"{lead}    ")]
    if not name.startswith("x07 "):
        return _wrapped(name, lead, lead)
    ends = [match.start() for match in _BREAK.finditer(name) if name.count("'", 0, match.start()) % 2 == 0]
    end = max(end for end in ends if end < _COLUMNS - len(lead) - 1)
    return [f"{lead}{name[:end]} \\", f"{lead}    {name[end + 1 :]}"]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _groups(parser: Parser) -> dict[str, list[str]]:
    """Return the rows of each group of arguments, by title. Arguments and general options have an empty title."""
    found: dict[str, list[str]] = {}
    for group in parser._action_groups:  # noqa: SLF001 - as above
        name = group.title or ""
        title = "" if name in {"positional arguments", "options"} else f"{name[:1].upper()}{name[1:]}:\n\n"
        for action in group._group_actions:  # noqa: SLF001 - as above
            if _DESCRIBED_ONCE.isdisjoint(action.option_strings):
                found.setdefault(title, []).append(_row(action))
    return found


def _row(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if action.choices else action.dest.upper())
    words = [", ".join(action.option_strings), str(value) if action.nargs != 0 else ""]
    again = " (repeatable)" if isinstance(action, argparse._AppendAction) else ""  # noqa: SLF001 - as above
    return f"`{_cell(' '.join(filter(None, words)))}` | {_cell(action.help or '')}{again}"


def keywords() -> str:
    """Return the table of the keywords of `run_program`."""
    rows = []
    for keyword, row in BY_KEYWORD.items():
        field = row.sets if row.sets.startswith("limits.") and not row.field else row.field
        names = (f"`{name}`" if name else "" for name in (keyword, row.flag, row.manifest, field))
        rows.append(" | ".join([*names, _cell(row.help)]))
    return _table("keyword | flag of `x07 run` | key of a manifest | field of the policy | meaning", rows)


def variables() -> str:
    """Return the table of environment variables."""
    rows = (
        f"`{variable.name}` | {variable.doc} | {_values(variable)} | {variable.default} | {variable.effect}"
        for variable in VARIABLES.values()
    )
    return _table("variable | meaning | value | default | has an effect", rows)


def _values(variable: Variable) -> str:
    """Return the valid values of a variable."""
    if variable.kind == "choice":
        return ", ".join(
            f"`{word}`" if word == means else f"`{word}` (= `{means}`)"
            for word, means in (variable.choices or {}).items()
        )
    return {
        "flag": "`1`, `true` or `yes`; `0`, `false` or `no` (all in lower or all in upper case)",
        "number": f"{variable.lo} to {variable.hi}",
        "folder": "an absolute path",
        "digest": "`sha256:` and 64 hex digits",
    }.get(variable.kind, "text")


def user_setting_rows() -> str:
    """Return the keys of the settings file."""
    rows = (f"`[{row[0]}]` | `{row[1]}` | {' | '.join(row[2:])}" for row in user_settings.SETTINGS)
    return _table("table | key | values | default | meaning", rows)


def result_fields() -> str:
    """Return a section for each object of the result."""
    objects = json.loads(schemas()["result.schema.json"])["$defs"]
    return "\n".join(_object(name, schema) for name, schema in objects.items())


def _object(name: str, schema: dict[str, Any]) -> str:
    meaning = field_meanings(schema)
    rows = (f"`{field}` | {_type(inner)} | {_cell(meaning[field])}" for field, inner in schema["properties"].items())
    return f"## {name}\n\n{schema['description'].splitlines()[0]}\n\n{_table('field | type | meaning', rows)}"


def field_meanings(schema: dict[str, Any]) -> dict[str, str]:
    """Return the meaning of each field, from its own description or a line `name, name: meaning` of the object's."""
    found = {name: inner["description"] for name, inner in schema["properties"].items() if "description" in inner}
    names: list[str] = []
    for line in schema["description"].splitlines()[1:]:
        if (match := _FIELD.match(line)) is not None:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if words := schema.get("enum"):
        return "[outcome](outcomes.md)" if {*words} == {*OUTCOMES} else ", ".join(f"`{word}`" for word in words)
    kind: str = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        return f"object of {_type(schema['additionalProperties'])}"
    return {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(kind, kind)


def _cell(text: str) -> str:
    return _PAGE.sub(_link, text.replace("|", "\\|"))


def _link(found: re.Match[str]) -> str:
    """Return the link to a page that a docstring names by its path in the repository."""
    page = DOCS / found[1]
    title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"([{title}]({os.path.relpath(page, DOCS / 'reference')}))"


def _table(head: str, rows: Iterable[str]) -> str:
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | ")), *(f"| {row} |" for row in rows)]
    return "\n".join(lines) + "\n"


def backends() -> str:
    """Return the table of the backends with the behaviours that each lacks."""
    rows = []
    for name, row in BY_NAME.items():
        missing = ", ".join(f"`{gap}`" for gap in (one.name for one in BEHAVIOURS) if gap in create(name).known_gaps)
        rows.append(f"`{name}` | {' or '.join(row.isolation)} | {_CHECKED[name]} | {missing or 'none'}")
    return _table("backend | isolation | checked with | known gaps", rows)


def gaps() -> str:
    """Return the table of the behaviours that a backend lacks, with the reasons."""
    known = {name: create(name).known_gaps for name in BY_NAME}
    rows = []
    for one in BEHAVIOURS:
        by_reason: dict[str, list[str]] = {}
        for name, reasons in known.items():
            if one.name in reasons:
                by_reason.setdefault(reasons[one.name], []).append(f"`{name}`")
        if by_reason:
            why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
            rows.append(f"`{one.name}` | {one.promise} | {why}")
    return _table("behaviour | promise | backends without it", rows)


def without_gaps() -> str:
    """Return the behaviours that every backend has, by group."""
    missing = {gap for name in BY_NAME for gap in create(name).known_gaps}
    shared = [one for one in BEHAVIOURS if one.name not in missing]
    return "".join(
        f"- **{group}**: {' '.join(one.promise for one in shared if one.group == group)}\n"
        for group in dict.fromkeys(one.group for one in shared)
    )


def x07_backends() -> str:
    """Return the table of the backends for X07's own callers."""
    rows = (
        f"`{row.name}` | {row.sandbox_class} | {' or '.join(f'`{one}`' for one in row.isolation)} | "
        f"{'yes' * row.linux} | {f'{row.macos_from}+' if row.macos_from else ''} | {'yes' * row.weaker}"
        for row in BY_NAME.values()
    )
    return _table("backend | `--sandbox-backend` | isolation | Linux | macOS | needs acceptance", rows)


def reasons() -> str:
    """Return the table of reasons."""
    return _table("code | sentence", (f"`{code}` | {text}" for code, text in REASONS.items()))


def hints() -> str:
    """Return the kinds of hints, as one line."""
    return ", ".join(f"`{kind}`" for kind in get_args(get_type_hints(Hint)["kind"])) + "\n"


def outcomes() -> str:
    """Return the table of outcomes."""
    rows = (f"`{outcome}` | {row.exit} | `{row.fault}` | {row.doc}" for outcome, row in OUTCOMES.items())
    return _table("outcome | exit code of `x07 run` | default `fault` | what happened", rows)


def exits() -> str:
    """Return the table of exit codes."""
    found = outcomes_by_exit().items()
    return _table(
        "exit code | outcomes", (f"{code} | {', '.join(f'`{name}`' for name in names)}" for code, names in found)
    )


def policy_commands() -> str:
    """Return the table of commands with their exit codes."""
    return _table(
        "Command | Purpose | Exit code", (f"{_POLICY_COMMANDS[name]} | {codes}" for name, codes in EXIT_CODES)
    )


def policy_sections() -> str:
    """Return the values that apply if an optional section is absent."""
    return "".join(f"- `{name}`: {_in_words(section)}\n" for name, section in OPTIONAL_SECTIONS.items())


def policy_fields() -> str:
    """Return a table of the fields of each section, and of a host."""
    plan = make_plan(default_policy(), vm_features("vm-emulated"))
    held = {control.field: control.by if control.state == "enforced" else control.state for control in plan.controls}
    head = "Field | Values | Default | Meaning"
    parts = []
    grouped: dict[str, list[Field]] = {}
    for field in policy_model_fields():
        grouped.setdefault(field.path.rpartition(".")[0] or "Top level", []).append(field)
    for section, inner in grouped.items():
        doc = policy_schema()["$defs"][inner[0].section]["description"]
        holders = {held[field.path] for field in inner}
        if len(holders) == 1:  # once instead of in every row
            holder = holders.pop()
            by = "All fields are advisory." if holder == "advisory" else f"Enforced by {holder}."
            text, rows = f"{doc} {by}", _table(head, map(_field_row, inner))
        else:
            text, rows = doc, _table(f"{head} | Enforced by", (_field_row(field, held) for field in inner))
        parts.append(f"### {section}\n\n{text}\n\n{rows}")
    hosts = _table(head, map(_field_row, policy_model_fields("HostPorts")))
    return "\n".join([*parts, f"### Each host of net.allow_hosts\n\n{hosts}"])


def policy_rules() -> str:
    """Return the rules, numbered."""
    return "".join(f"{number}. {rule.doc}\n" for number, rule in enumerate(RULES, start=1))


def policy_templates() -> str:
    """Return the table of templates."""
    head = "Template | For | CPU s | Wall s | MiB | Tasks | Reads | Writes | Network"
    return _table(head, (_template_row(name, policy) for name, policy in TEMPLATES.items()))


def default_policy_text() -> str:
    """Return the default policy as JSON."""
    return f"```json\n{render_policy(default_policy()).decode()}```\n"


def _in_words(section: Section) -> str:
    plain = msgspec.to_builtins(section)
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in plain.items() if not isinstance(value, dict))


def _field_row(field: Field, held: Mapping[str, str] | None = None) -> str:
    kind, bounds, default = (
        _KINDS[field.schema.get("type", "string")],
        _bounds(field.schema),
        field.schema.get("default"),
    )
    values = f"{kind}, {bounds}" if bounds else kind
    absent = "" if default is None else f"`{json.dumps(default)}`"
    if field.required:
        absent = "required"
    cells = [f"`{field.path}`", values.replace("|", "\\|"), absent, field.schema["description"]]
    return " | ".join(cells if held is None else [*cells, held[field.path]])


def _bounds(schema: Mapping[str, Any]) -> str:
    """Return the range of a value in words, or "" if it has no range."""
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "maximum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    if "maxItems" in schema:
        items = schema["items"]
        inner = f" of {_bounds(items)}" if "$ref" not in items else ""
        return f"at most {schema['maxItems']}{inner}"
    if "maxLength" in schema:
        return f"{schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return f"`{schema['pattern']}`" if "pattern" in schema else ""


def _template_row(name: str, policy: Policy) -> str:
    limits, roots = policy.limits, (policy.fs.read_roots, policy.fs.write_roots)
    cells = [
        f"`{name}`",
        policy.notes_in_force,
        *(limits.cpu_ms // 1000, limits.wall_ms // 1000, limits.mem_bytes >> 20, limits.procs),
        *(", ".join(f"`{root}`" for root in found) or "nothing" for found in roots),
        "listed hosts" if policy.net.enabled else "off",
    ]
    return " | ".join(map(str, cells))


def x07_flags() -> str:
    """Return the table of flags of x07-os-runner."""
    lines = ["| flag | meaning | default | applies to |", "|---|---|---|---|"]
    for row in os_runner.OPTIONS:
        if not row.hidden:
            value = "\\|".join(row.choices) or row.metavar
            flag = f"{row.flag} {value}".strip()
            default = "" if row.usual is None else f"`{row.usual}`"
            lines.append(f"| `{flag}` | {row.help} | {default} | {'X07' if row.x07_only else 'all'} programs |")
    return "\n".join(lines) + "\n"


PAGES: Final[Mapping[str, Mapping[str, Callable[[], str]]]] = {
    "backends/README.md": {"backends": backends, "gaps": gaps, "without gaps": without_gaps},
    "reference/codes.md": {"reasons": reasons, "hints": hints},
    "reference/command-line.md": {"commands": commands},
    "reference/library.md": {"keywords": keywords},
    "reference/outcomes.md": {"outcomes": outcomes, "exits": exits},
    "reference/policy.md": {
        "commands": policy_commands,
        "sections": policy_sections,
        "fields": policy_fields,
        "rules": policy_rules,
        "templates": policy_templates,
        "default": default_policy_text,
    },
    "reference/result.md": {"fields": result_fields},
    "reference/settings.md": {"variables": variables, "settings": user_setting_rows},
    "reference/x07.md": {"flags": x07_flags, "backends": x07_backends},
}


def render(page: str) -> str:
    """Return the page with current parts. Raises SystemExit if the page lacks the markers of a part."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, made in PAGES[page].items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise SystemExit(f"{page} has no markers for {name}")
        text = f"{before}{start}{made()}{rest[rest.index(end) :]}"
    return text


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(render(name), encoding="utf-8")
