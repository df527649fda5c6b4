"""`x07 policy new`: print a complete policy made from flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.json_output import deliver
from x07_sandbox.cli.parser import nonempty, option, repeated
from x07_sandbox.cli.run_options import add_limits, limits_of
from x07_sandbox.errors import UsageError
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.from_flags import NewPolicy, make_policy
from x07_sandbox.policy.limits import LimitChanges
from x07_sandbox.policy.rules import is_policy_id
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    import argparse

_EPILOG: Final = f"""templates: {", ".join(TEMPLATES)}

examples:
  x07 policy new --memory 1G --cpu-time 20 --timeout 30 > policy.json
  x07 policy new --allow-host example.org:443 --read . --write build > policy.json
  x07 policy new --template worker --procs 64 --id my.worker | x07 policy check /dev/stdin
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `new` to the verbs of `x07 policy`."""
    parser = verbs.add_parser(
        "new",
        help="print a complete policy made from flags",
        description="Print a complete policy, made from a template and the flags that you give.",
        epilog=_EPILOG,
    )
    option(
        parser, "--template", "T", "template to start from (default: the one named default)", choices=tuple(TEMPLATES)
    )
    option(parser, "--id", "ID", "policy_id of the policy (default: custom.T, where T is the template)", type=nonempty)
    add_limits(parser, of_policy=True)
    repeated(parser, "--allow-host", "HOST:PORT[,PORT...]", "let the program connect to HOST")
    repeated(parser, "--read", "PATH", "let the program read this file or folder", type=nonempty)
    repeated(parser, "--write", "PATH", "let the program read and modify this file or folder", type=nonempty)


def new(options: argparse.Namespace) -> int:
    """Print the policy that the flags describe, and return the exit code. Raises UsageError."""
    if options.id is not None and not is_policy_id(options.id):
        why = "an id has 1 to 64 letters, digits, '_', '.' or '-'"
        raise UsageError(f"cannot use --id {options.id!r}", why, "Use another id")
    wanted = NewPolicy(
        template=options.template or "default",
        policy_id=options.id,
        limits=limits_of(options).get("limits", LimitChanges()),
        hosts=tuple(options.allow_host),
        read_roots=tuple(options.read),
        write_roots=tuple(options.write),
    )
    deliver(render_policy(make_policy(wanted)), options, always=True)
    return 0
