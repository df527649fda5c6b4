"""`x07 policy`: write, check and explain policies."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from x07_sandbox.backends.registry import BY_NAME, backend_named, backend_request, create, select, this_platform
from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import deliver, print_document, print_failure, print_line, shell_path, show_written
from x07_sandbox.cli.parser import (
    add_document_flags,
    add_row,
    file_path,
    given_rows,
    inner_verb,
    nonempty,
    option,
    repeated,
    switch,
)
from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import is_folder, raised_as, real_path, settings_file
from x07_sandbox.network import rules
from x07_sandbox.network.hosts import pattern_text
from x07_sandbox.network.settings import read_settings
from x07_sandbox.options import OF_POLICIES
from x07_sandbox.policy.changes import Overrides
from x07_sandbox.policy.controls import make_plan
from x07_sandbox.policy.decode import is_policy_id, policy_digest, render_policy
from x07_sandbox.policy.guest import confinement, filters_of
from x07_sandbox.policy.model import Policy, PolicyError, leaf_values
from x07_sandbox.policy.schema import render_schema
from x07_sandbox.policy.templates import BUILT_IN, TEMPLATES, make_policy
from x07_sandbox.programs.project import project_root, write_document
from x07_sandbox.programs.toolchains import TOOLCHAINS
from x07_sandbox.reports.commands import (
    IN_SANDBOX,
    CheckedFile,
    CheckReport,
    ExplainedControl,
    ExplainReport,
    HostReport,
    NeverReached,
    PolicyInitReport,
)
from x07_sandbox.sessions.request import make_request, read_policy, read_spec_file
from x07_sandbox.x07.project import X07

DENIED: Final = 1
UNREADABLE: Final = 2
INVALID: Final = 3
REFUSED: Final = 125
# Shown by each action's help and by docs/reference/policy.md.
EXIT_CODES: Final = (
    ("new", "0 printed; 2 a value is out of range"),
    (
        "init",
        "0 the file was written or is up to date; 2 the file exists with other content (it is kept), or another error",
    ),
    (
        "check",
        "0 all are valid; 3 at least one is invalid; 2 at least one cannot be read; with --host: 0 allowed, 1 denied",
    ),
    (
        "explain",
        "0 a run could start (folders are not checked); 125 a run would be refused; 3 invalid; 2 cannot be read",
    ),
    ("schema", "0 printed"),
)
_EPILOG: Final = """Each POLICY or FILE is the path of a policy file, or built-in:NAME for a template.
exit code: 0 success; 2 wrong usage, or a file that cannot be read; 3 an invalid policy; see also each action's help.

examples:
  x07 policy new --memory 1G > policy.json  make a policy from flags
  x07 policy init --template default        write the built-in policy to a file, to edit it
  x07 policy check strict.json              report all errors in a policy
  x07 policy check --host example.org:443 strict.json
  x07 policy explain strict.json            show what enforces each field
"""
_CHECK_EPILOG: Final = """examples:
  x07 policy check strict.json
  x07 policy check --host example.org:443 strict.json
  x07 policy check --host example.org:443 --deny-host 'example.org:*' strict.json
  x07 policy check --host '[2001:db8::1]:53' --udp --json strict.json | jq .rule
"""
BASE_FOLDER: Final = (".x07", "policies", "base")
DIFFERENT: Final = 2

_NEW_EPILOG: Final = f"""templates: {", ".join(TEMPLATES)}

examples:
  x07 policy new --memory 1G --cpu-time 20 --timeout 30 > policy.json
  x07 policy new --allow-host example.org:443 --read . --write build > policy.json
  x07 policy new --template worker --procs 64 --id my.worker | x07 policy check /dev/stdin
"""
_INIT_EPILOG: Final = f"""templates: {", ".join(TEMPLATES)}

examples:
  x07 policy init --template default
  x07 policy init --template cli --memory 1G --allow-host example.org:443
  x07 policy init --template cli --out policies/cli.json --mkdir-out
  x07 policy init --template worker --emit policy | jq .limits
"""


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 policy`."""
    parser.epilog = _EPILOG
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    _add_new(inner)
    _add_init(inner)
    check = inner_verb(inner, "check", "report all errors in policies")
    doc = "policies to check; with --host, give only one policy (default: built-in:default)"
    check.add_argument("files", nargs="*", metavar="FILE", help=doc)
    option(check, "--host", "HOST:PORT", "show whether the policy allows this connection, and by which rule")
    repeated(check, "--deny-host", "HOST:PORT|HOST:*", "with --host: decide as if x07 run had this flag")
    switch(check, "--udp", "with --host: use UDP instead of TCP")
    check.epilog = _CHECK_EPILOG
    _add_explain(inner)
    inner_verb(inner, "schema", "print the JSON Schema of a policy")
    acts = (_new, _init, _check, _explain, _schema)
    for (name, codes), act in zip(EXIT_CODES, acts, strict=True):
        action = inner.choices[name]
        add_document_flags(action, "print one JSON object, also for errors")
        action.set_defaults(carry_out=partial(_guarded, act))
        action.epilog = "\n\n".join(filter(None, (f"exit code: {codes}", action.epilog)))


def _guarded(act: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Call *act* and return its exit code, or INVALID for an invalid policy. Raises SandboxError for other errors."""
    try:
        return act(options)
    except PolicyError as exc:
        print_failure(exc, options)
        if not options.json or options.quiet_json:
            say(str(exc))
        return INVALID


def _check(options: argparse.Namespace) -> int:
    if options.host is not None:
        return _check_host(options)
    if options.udp or options.deny_host or not options.files:
        why = "FILE or --host is required"
        if options.udp or options.deny_host:
            why = f"{'--udp' if options.udp else '--deny-host'} requires --host"
        raise UsageError("wrong usage", why, "See x07 policy check --help")
    rows = tuple(_checked(name) for name in options.files)
    worst = max((_CHECK_CODES[row.status] for row in rows), key=_SEVERITY.index)
    if print_document(CheckReport(ok=worst == 0, files=rows), options):
        return worst
    for row in rows:
        if row.text:
            say(row.text)
        else:
            show(f"{row.file}: valid ({row.policy_id})")
    return worst


def _check_host(options: argparse.Namespace) -> int:
    if len(options.files) > 1:
        raise UsageError("wrong usage", "--host accepts one policy", "See x07 policy check --help")
    (name,) = options.files or (f"{BUILT_IN}default",)
    policy, _ = read_policy(name)
    transport: Literal["udp", "tcp"] = "udp" if options.udp else "tcp"
    report = host_report(policy, name, options.host, transport, options.deny_host)
    if not print_document(report, options):
        for line in _host_lines(report):
            show(line)
    return 0 if report.allowed else DENIED


def host_report(
    policy: Policy, source: str, endpoint: str, transport: rules.Transport, denied: Sequence[str] = ()
) -> HostReport:
    """Decide about a connection as the egress gate does. source: path or name of the policy. Raises SandboxError."""
    from x07_sandbox.network.settings import read_settings
    from x07_sandbox.policy.changes import denied_hosts

    request = rules.parse_request(endpoint, transport)
    # Connections to a loopback address stay in the guest, so the user's settings do not apply.
    own = not isinstance(request.host, str) and request.host.is_loopback
    settings = rules.NetSettings() if own else read_settings()
    decision = rules.decide(rules.make_allowlist(policy, denied_hosts(denied), settings), request)
    by_proxy = decision.allowed and settings.resolves(request.host)
    return HostReport(
        policy=source,
        policy_id=policy.policy_id,
        host=str(request.host),
        port=request.port,
        transport=transport,
        allowed=decision.allowed,
        rule=decision.rule,
        reason=decision.reason + ("; your proxy resolves it, so its addresses are not checked" if by_proxy else ""),
        how_to_allow=decision.how_to_allow,
        resolved_later=decision.allowed and isinstance(request.host, str) and not by_proxy,
    )


def _host_lines(report: HostReport) -> list[str]:
    """Return the report as text."""
    connection = f"{rules.endpoint_text(report.host, report.port)} ({report.transport})"
    text = [f"{connection}: {'allowed' if report.allowed else 'denied'}", f"  rule {report.rule}: {report.reason}"]
    if report.allowed:
        if report.resolved_later:
            text.append("  its addresses are checked at run time; special ones, such as private ones, are denied")
    elif (how := report.how_to_allow) is None:
        text.append("  no change to the policy or the settings allows it")
    else:
        first = "to allow it:"
        if how.setting:
            text.append(f"  {first} set {how.setting} under [net] in {settings_file()}")
            first = "and:"
        if how.json_path == "$.net.allow_hosts":  # the value is the whole list
            text.append(f"  {first} add {json.dumps(how.value[-1])} to net.allow_hosts in the policy")
            if how.flag:
                text.append(f"  or, for one run: {how.flag}")
        elif how.json_path:
            text.append(f"  {first} set {how.json_path[2:]} to {json.dumps(how.value)} in the policy")
    return text


_CHECK_CODES: Final = {"valid": 0, "invalid": INVALID, "unreadable": UNREADABLE}
_SEVERITY: Final = (0, INVALID, UNREADABLE)  # the last is the worst


def _checked(name: str) -> CheckedFile:
    try:
        policy, _ = read_policy(name)
        rules.make_allowlist(policy)
    except PolicyError as exc:
        return CheckedFile(file=name, status="invalid", problems=exc.problems, text=str(exc))
    except UsageError as exc:
        return CheckedFile(file=name, status="unreadable", problems=(), text=str(exc))
    return CheckedFile(file=name, status="valid", policy_id=policy.policy_id, digest=policy_digest(policy))


def _explain(options: argparse.Namespace) -> int:
    policy, _ = read_policy(options.policy)
    backend = None if options.backend is None else backend_named(options.backend)
    if backend is None or not backend.runs_on(this_platform()):
        request = backend_request(backend=options.backend, flags=("--backend",))
        backend = BY_NAME[select(this_platform(), request).backend]
    features = create(backend.name).least_features()
    plan = make_plan(policy, features, proxy_resolves=policy.may_connect and read_settings().proxy_resolves)
    values = leaf_values(policy)
    found = ExplainReport(
        policy=options.policy,
        policy_id=policy.policy_id,
        digest=policy_digest(policy),
        backend=backend.name,
        isolation=backend.isolation,
        toolchain=options.toolchain,
        carried_out=not plan.refusals,
        filters=filters_of(confinement(policy, "")) if "confinement" in features.can_enforce else (),
        controls=tuple(
            ExplainedControl(
                **msgspec.structs.asdict(control),
                value=msgspec.to_builtins(values[control.field]),
                in_sandbox=IN_SANDBOX.get(control.field, "") if options.sandbox else "",
            )
            for control in plan.controls
        ),
        refusals=plan.refusals,
        never_reached=tuple(
            NeverReached(field=entry.rule, host=pattern_text(entry.what), why=why)
            for entry, why in rules.unreachable_entries(rules.make_allowlist(policy, settings=read_settings()))
        ),
    )
    if not print_document(found, options):
        for line in _explanation_lines(found):
            show(line)
    return 0 if found.carried_out else REFUSED


def _schema(options: argparse.Namespace) -> int:
    deliver(render_schema(), options, always=True)
    return 0


# The state that needs attention comes first.
_GROUPS: Final = {
    "refused": "refused: a run with this policy does not start",
    "enforced": "enforced",
    "advisory": "advisory: not enforced; only programs that check these fields obey them",
}
_SHOWN_CHARS: Final = 40

_EXPLAIN: Final = """x07 policy explain does not start or test the backend. It shows the best isolation that the backend
can provide; a run may get less. The result of a run contains the same list of fields.

examples:
  x07 policy explain                      explain the built-in default policy
  x07 policy explain strict.json --json | jq '.refusals'
  x07 policy explain built-in:cli
  x07 policy explain --sandbox strict.json
"""


def _add_explain(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `explain` to the verbs of `x07 policy`."""
    parser = inner_verb(verbs, "explain", "show what enforces each field")
    parser.description = "Show for each field of POLICY whether a run would enforce it, what would enforce it, and why."
    parser.epilog = _EXPLAIN
    doc = "a policy (default: built-in:default)"
    parser.add_argument("policy", nargs="?", default="built-in:default", metavar="POLICY", help=doc)
    parser.add_argument(
        "--backend", metavar="B", help=f"backend: one of {', '.join(BY_NAME)} (default: the one that x07 run would use)"
    )
    toolchains = tuple(toolchain.name for toolchain in (*TOOLCHAINS, X07))
    doc = f"toolchain of the program: one of {', '.join(toolchains)}; the policy fields language.* apply to x07 only"
    parser.add_argument("--toolchain", choices=toolchains, metavar="T", help=doc)
    switch(parser, "--sandbox", "also say which fields mean something else in a sandbox")


def _explanation_lines(found: ExplainReport) -> list[str]:
    """Return an explanation as text."""
    isolation = " or ".join(found.isolation)
    text = [f"policy {found.policy_id} ({found.policy}) on {found.backend} ({isolation})"]
    width = max(len(control.field) for control in found.controls)
    for state, title in _GROUPS.items():
        group = [control for control in found.controls if control.state == state]
        if group:
            text += ["", f"{title}:"]
        for control in group:
            where = f" ({control.in_sandbox})" if control.in_sandbox else ""
            text.append(
                f"  {control.field:{width}}  {_json_text(control.value):12}  {control.by}: {control.why}{where}"
            )
    if found.never_reached:
        text += ["", "allowed by the policy but blocked unless your settings allow it (docs/explanation/network.md):"]
    text += [f"  {row.field}  {_json_text(row.host)}: {row.why}" for row in found.never_reached]
    text += ["", f"seccomp filters of the image: {', '.join(found.filters)} (digests are in a run's result)"]
    if found.refusals:
        text += ["", "to allow a run:"]
    for refusal in found.refusals:
        how = refusal.how_to_allow
        text += [f"  {refusal.why}", f"    in the policy: {how.json_path} = {_json_text(how.value)}"]
        if how.flag:
            text.append(f"    or: {how.flag}")
    return text


def _json_text(value: object) -> str:
    """Return a value as ASCII JSON, shortened if long. Text from a policy is not trusted."""
    dumped = json.dumps(value, separators=(",", ":"))
    return dumped if len(dumped) <= _SHOWN_CHARS else dumped[: _SHOWN_CHARS - 3] + "..."


def _add_new(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `new` to the verbs of `x07 policy`."""
    new = inner_verb(verbs, "new", "print a complete policy made from flags")
    new.description = "Print a complete policy, made from a template and the flags that you give."
    new.epilog = _NEW_EPILOG
    doc = "template to start from (default: the one named default)"
    option(new, "--template", "T", doc, choices=tuple(TEMPLATES))
    doc = "policy_id of the policy (default: custom.T, where T is the template)"
    option(new, "--id", "ID", doc, dest="policy_id", type=nonempty)
    _add_changes(new)


def _add_init(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `init` to the verbs of `x07 policy`."""
    init = inner_verb(verbs, "init", "write a policy from a template")
    init.description = "Write a policy, made from a template and the flags that you give, to a file of the project."
    init.epilog = _INIT_EPILOG
    option(init, "--template", "T", "the template to write (see below)", choices=tuple(TEMPLATES), required=True)
    doc = "the project file (default: x07.json in this folder or the nearest folder above)"
    option(init, "--project", "FILE", doc, type=file_path)
    option(init, "--policy-id", "ID", "policy_id of the policy (default: sandbox.T.base, where T is the template)")
    switch(init, "--force", "overwrite an existing file that has different content")
    doc = "also print a report about the file (one line of JSON), or the policy"
    option(init, "--emit", "report|policy", doc, choices=("report", "policy"))
    doc = "file to write, relative to the project (default: in .x07/policies/base)"
    option(init, "--out", "PATH", doc, type=file_path)
    switch(init, "--mkdir-out", "create the folder of the file of --out")
    _add_changes(init)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    for row in OF_POLICIES:
        add_row(parser, row)
    repeated(parser, "--read", "PATH", "let the program read this file or folder", type=nonempty)
    repeated(parser, "--write", "PATH", "let the program read and modify this file or folder", type=nonempty)


def file_name(template: str) -> str:
    """Return the default name of a policy file that is made from the template."""
    return f"{template}.sandbox.base.policy.json"


def _new(options: argparse.Namespace) -> int:
    """Print the policy that the flags describe, and return the exit code. Raises UsageError."""
    template = options.template or "default"
    made, _ = _made(options, template, "--id")
    policy_id = options.policy_id or f"custom.{template}"
    policy = replace(made, policy_id=policy_id, notes=f"Made by x07 policy new from the template {template}.")
    deliver(render_policy(policy), options, always=True)
    return 0


def _made(options: argparse.Namespace, template: str, id_flag: str) -> tuple[Policy, bool]:
    """Return a template with the changes of the flags, and whether there are any. Raises UsageError."""
    name = options.policy_id
    if name is not None and not is_policy_id(name):
        why = "an id has 1 to 64 letters, digits, '_', '.' or '-'"
        raise UsageError(f"cannot use {id_flag} {name!r}", why, "Use another id")
    asked = make_request(given_rows(options, OF_POLICIES))
    overrides = asked.overrides
    if options.read or options.write:
        overrides = overrides or Overrides()
        overrides = replace(
            overrides,
            allow_read_root=(*overrides.allow_read_root, *options.read),
            allow_write_root=(*overrides.allow_write_root, *options.write),
        )
    policy = make_policy(template, asked.limits, overrides, read_spec_file)
    return policy, asked.limits is not None or overrides is not None


def _init(options: argparse.Namespace) -> int:
    """Write the policy file, print what was done, and return the exit code. Raises SandboxError."""
    policy, changed = _made(options, options.template, "--policy-id")
    if changed:
        policy = replace(policy, notes=f"Made by x07 policy init from the template {options.template}.")
    policy = replace(policy, policy_id=options.policy_id or policy.policy_id)
    data = render_policy(policy)
    root = project_root(options.project)
    folder, parts = root, Path(*BASE_FOLDER, file_name(options.template)).parts
    if options.out is not None:
        folder, parts = _chosen(root, options.out, make=options.mkdir_out)
    path = folder.joinpath(*parts)
    status = write_document(folder, parts, data, overwrite=options.force)
    if options.emit == "policy":
        deliver(data, options, always=True)
    else:
        out = str(path.relative_to(root) if path.is_relative_to(root) else path)
        report = PolicyInitReport(
            template=options.template, project_root=str(root), out=out, status=status, policy_id=policy.policy_id
        )
        if not (print_line(report, options, always=options.emit == "report") or options.quiet_json):
            show_written(path, status, f"x07 run --policy {shell_path(path)} PROGRAM")
    if status != "exists_different":
        return 0
    say(f"{path} has different content and was not changed; --force overwrites it")
    return DIFFERENT


def _chosen(root: Path, out: Path, *, make: bool) -> tuple[Path, tuple[str, ...]]:
    """Split the path *out* of --out into an existing folder and the parts below it. Raises UsageError.

    Other people may have made the folders of the project, so a path inside the project is returned as parts, in which
    `write_document` follows no symbolic links. Links in an absolute path, or in a path with `..`, are followed.
    """
    if out.name in {"", ".."}:
        raise UsageError(f"cannot write {out}", "it is not the name of a file", "Name a file")
    folder = root / out.parent
    inside = not out.is_absolute() and ".." not in out.parts
    if inside and (make or is_folder(folder)):
        return root, out.parts
    if make:
        with raised_as(UsageError, f"cannot create the folder {folder}", "Use another --out"):
            folder.mkdir(parents=True, exist_ok=True)
    if not is_folder(folder):
        raise UsageError(f"cannot write {out}", f"there is no folder {folder}", "Create it, or add --mkdir-out")
    return real_path(folder), (out.name,)
