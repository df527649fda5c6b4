"""`x07 policy`: write, check, explain and compare policies."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from x07_sandbox.cli import policy_explain, policy_init, policy_new
from x07_sandbox.cli.console import say, show
from x07_sandbox.cli.json_output import deliver, print_document, print_failure
from x07_sandbox.cli.parser import add_document_flags, option, repeated, switch
from x07_sandbox.errors import UsageError
from x07_sandbox.network.rules import make_allowlist
from x07_sandbox.policy.canonical import policy_digest
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.policy.schema import fields, render_schema
from x07_sandbox.policy.templates import BUILT_IN
from x07_sandbox.reports.policies import CheckedFile, CheckReport, DiffReport, DigestReport
from x07_sandbox.runs.request import read_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.policy.differences import Change

DIFFERENT: Final = 1
DENIED: Final = 1
UNREADABLE: Final = 2
INVALID: Final = 3
REFUSED: Final = 125
# Shown by each action's help and by docs/reference/policy.md.
EXIT_CODES: Final = (
    ("new", "0 it is printed; 2 a value that no policy can say"),
    ("init", "0 the file is there as wanted; 2 another file is there and was left alone, or any error"),
    (
        "check",
        "0 all are valid; 3 one is not; 2 one cannot be read; with --host 0 allowed, 1 denied",
    ),
    ("digest", "0 it is printed; 3 not valid; 2 cannot be read"),
    ("explain", "0 nothing in it is refused (its roots must exist); 125 something is; 3 not valid; 2 cannot be read"),
    ("diff", "0 no difference; 1 they differ; 3 one is not valid; 2 one cannot be read"),
    ("schema", "0 it is printed"),
)
_EPILOG: Final = """A policy is named by its file, or as built-in:NAME, by the name of a template.
exit code: 0; 2 wrong usage, or a file that cannot be read; 3 a policy that is not valid; see also each action's help.

examples:
  x07 policy new --memory 1G > policy.json  a policy from flags
  x07 policy init --template default        write the built-in policy, to change it
  x07 policy check strict.json              all that is wrong with it, at once
  x07 policy check --host example.org:443 strict.json
  x07 policy explain strict.json            who enforces each field, before anything runs
  x07 policy diff built-in:default strict.json
"""
_CHECK_EPILOG: Final = """examples:
  x07 policy check strict.json
  x07 policy check --host example.org:443 strict.json
  x07 policy check --host example.org:443 --deny-host 'example.org:*' strict.json
  x07 policy check --host '[2001:db8::1]:53' --udp --json strict.json | jq .rule
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb and its own verbs."""
    parser = verbs.add_parser("policy", help=help, description="What a program may touch and use.", epilog=_EPILOG)
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    policy_new.add_parser(inner)
    policy_init.add_parser(inner)
    check = inner.add_parser("check", help="say all that is wrong with policies")
    check.add_argument(
        "files", nargs="*", metavar="FILE", help="a policy (with --host: one, default: built-in:default)"
    )
    option(check, "--host", "HOST:PORT", "say instead whether the policy allows this connection, by which rule")
    repeated(
        check, "--deny-host", "HOST:PORT|HOST:*", "with --host: as if this flag of x07 run were given (repeatable)"
    )
    switch(check, "--udp", "with --host: by UDP instead of TCP")
    check.epilog = _CHECK_EPILOG
    digest = inner.add_parser("digest", help="one digest for all documents that say the same")
    digest.add_argument("file", metavar="FILE", help="a policy")
    policy_explain.add_parser(inner)
    diff = inner.add_parser("diff", help="what the second policy grants or withdraws")
    diff.add_argument("first", metavar="A", help="a policy")
    diff.add_argument("second", metavar="B", help="another")
    inner.add_parser("schema", help="the JSON Schema of a policy")
    acts = (policy_new.new, policy_init.init, _check, _digest, _explain, _diff, _schema)
    for (name, codes), act in zip(EXIT_CODES, acts, strict=True):
        action = inner.choices[name]
        add_document_flags(action, "one JSON object on standard output, errors too")
        action.set_defaults(carry_out=partial(_guarded, act))
        action.epilog = "\n\n".join(filter(None, (f"exit code: {codes}", action.epilog)))


def _guarded(act: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """An invalid policy has an exit code of its own here; every other error is told as everywhere."""
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
        why = "a FILE is required, or --host"
        if options.udp or options.deny_host:
            why = f"{'--udp' if options.udp else '--deny-host'} needs --host"
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
    from x07_sandbox.cli import policy_host

    if len(options.files) > 1:
        raise UsageError("wrong usage", "--host takes one policy", "See x07 policy check --help")
    (name,) = options.files or (f"{BUILT_IN}default",)
    policy, _ = read_policy(name)
    transport: Literal["udp", "tcp"] = "udp" if options.udp else "tcp"
    report = policy_host.host_report(policy, name, options.host, transport, options.deny_host)
    if not print_document(report, options):
        for line in policy_host.lines(report):
            show(line)
    return 0 if report.allowed else DENIED


_CHECK_CODES: Final = {"valid": 0, "invalid": INVALID, "unreadable": UNREADABLE}
_SEVERITY: Final = (0, INVALID, UNREADABLE)  # what could not even be looked at counts most


def _checked(name: str) -> CheckedFile:
    try:
        policy, _ = read_policy(name)
        make_allowlist(policy)
    except PolicyError as exc:
        return CheckedFile(file=name, status="invalid", problems=exc.problems, text=str(exc))
    except UsageError as exc:
        return CheckedFile(file=name, status="unreadable", problems=(), text=str(exc))
    return CheckedFile(file=name, status="valid", policy_id=policy.policy_id, digest=policy_digest(policy))


def _digest(options: argparse.Namespace) -> int:
    from hashlib import sha256

    policy, data = read_policy(options.file)
    digest = policy_digest(policy)
    of_file = f"sha256:{sha256(data).hexdigest()}"
    report = DigestReport(policy_id=policy.policy_id, digest=digest, file_digest=of_file)
    if not print_document(report, options):
        show(digest)
    return 0


def _explain(options: argparse.Namespace) -> int:
    policy, _ = read_policy(options.policy)
    found = policy_explain.explanation(policy, options.policy, options.backend, options.toolchain)
    if not print_document(found, options):
        for line in policy_explain.lines(found):
            show(line)
    return 0 if found.carried_out else REFUSED


def _diff(options: argparse.Namespace) -> int:
    from x07_sandbox.policy.differences import differences

    (first, _), (second, _) = read_policy(options.first), read_policy(options.second)
    changes = tuple(differences(first, second))
    if print_document(DiffReport(same=not changes, changes=changes), options):
        return DIFFERENT if changes else 0
    docs = {field.path: field.doc for field in fields()}
    for effect, verb in (("granted", "grants"), ("withdrawn", "withdraws"), ("changed", "changes")):
        found = [change for change in changes if change.effect == effect]
        if found:
            show(f"the second policy {verb}:")
        for change in found:
            show(f"  {change.field}: {_in_words(change)}. {docs[change.field]}")
    return DIFFERENT if changes else 0


def _in_words(change: Change) -> str:
    """What changes; values as JSON, in ASCII, since a policy's text may come from anybody."""
    before, after = policy_explain.shown(change.before), policy_explain.shown(change.after)
    if change.before is None:
        return f"{after} added"
    return f"{before} removed" if change.after is None else f"{after} instead of {before}"


def _schema(options: argparse.Namespace) -> int:
    deliver(render_schema(), options, always=True)
    return 0
