"""`x07 policy new`: a complete policy from flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.cli.json_output import deliver
from x07_sandbox.cli.parser import named, option, repeated
from x07_sandbox.cli.run_options import add_limits, limits_of
from x07_sandbox.errors import UsageError
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.from_flags import NewPolicy, is_policy_id, make_policy
from x07_sandbox.policy.limits import LimitChanges
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
    """Add the verb."""
    parser = verbs.add_parser(
        "new",
        help="print a complete policy made from flags",
        description="Print a complete policy: a template with what the flags change.",
        epilog=_EPILOG,
    )
    option(parser, "--template", "T", "what the rest is taken from (default: default)", choices=tuple(TEMPLATES))
    option(parser, "--id", "ID", "the policy's name (default: custom.T)", type=named)
    add_limits(parser, of_policy=True)
    repeated(parser, "--allow-host", "HOST:PORT[,PORT...]", "a host that the program may connect to")
    repeated(parser, "--read", "PATH", "a file or folder that it may read", type=named)
    repeated(parser, "--write", "PATH", "a file or folder that it may read and change", type=named)


def new(options: argparse.Namespace) -> int:
    """Print it; the exit code. Raises UsageError."""
    if options.id is not None and not is_policy_id(options.id):
        why = "a name has 1 to 64 letters, digits, '_', '.' or '-'"
        raise UsageError(f"cannot name a policy {options.id!r}", why, "Give another --id")
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
