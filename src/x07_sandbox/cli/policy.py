"""`x07 policy`: write, check, explain and compare policies."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.cli import policy_init
from x07_sandbox.cli.console import say
from x07_sandbox.errors import SandboxError, UsageError
from x07_sandbox.host.paths import read_bounded
from x07_sandbox.policy.canonical import policy_digest
from x07_sandbox.policy.decode import MAX_BYTES, decode_policy
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.problems import PolicyError
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.policy.model import Policy

BUILT_IN: Final = "built-in:"
UNREADABLE: Final = 2
INVALID: Final = 3
REFUSED: Final = 125
# Of every action but init; docs/policy.md shows the same lines.
EXIT_CODES: Final = (
    ("check", "0 all are valid; 3 one is not; 2 one cannot be read"),
    ("digest", "0; 3 not valid; 2 cannot be read"),
    ("schema", "0"),
)
_EPILOG: Final = """A policy is named by its file, or as built-in:NAME, by the name of a template.
exit code: 0; 2 wrong usage, or a file that cannot be read; 3 a policy that is not valid; see also each action's help.

examples:
  x07 policy init --template default        write the built-in policy, to change it
  x07 policy check strict.json              all that is wrong with it, at once
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], *, help: str) -> None:  # noqa: A002
    """Add the verb and its own verbs."""
    parser = verbs.add_parser("policy", help=help, description="What a program may touch and use.", epilog=_EPILOG)
    inner = parser.add_subparsers(metavar="ACTION", required=True)
    policy_init.add_parser(inner)
    check = inner.add_parser("check", help="say all that is wrong with policies")
    check.add_argument("files", nargs="+", metavar="FILE", help="a policy")
    check.set_defaults(carry_out=_check)
    digest = inner.add_parser("digest", help="one digest for all documents that say the same")
    digest.add_argument("file", metavar="FILE", help="a policy")
    digest.set_defaults(carry_out=_digest)
    schema = inner.add_parser("schema", help="the JSON Schema of a policy")
    schema.set_defaults(carry_out=_schema)
    for action in inner.choices.values():
        action.add_argument("--json", action="store_true", help="one JSON object on standard output, errors too")
        action.set_defaults(carry_out=partial(_guarded, action.get_default("carry_out")))
    for name, codes in EXIT_CODES:
        inner.choices[name].epilog = "\n\n".join(filter(None, (f"exit code: {codes}.", inner.choices[name].epilog)))


def print_failure(exc: Exception, signalled: int | None = None) -> int:
    """An error as the one JSON object that --json promises; the exit code."""
    told: dict[str, Any] = {"what": "a bug in x07-sandbox", "why": f"{type(exc).__name__}: {exc}", "fix": "Report it"}
    if isinstance(exc, SandboxError):
        told = {"what": exc.what, "why": exc.why, "fix": exc.fix}
    _print_json("failure", {"ok": False, "error": told, "problems": _problems(exc)})
    if signalled is not None:
        return 128 + (signalled if signalled == signal.SIGINT else signal.SIGTERM)
    return (INVALID if isinstance(exc, PolicyError) else UNREADABLE) if isinstance(exc, UsageError) else REFUSED


def load(name: str) -> tuple[Policy, bytes]:
    """A policy by the name that the user gave, and its bytes. Raises UsageError, PolicyError."""
    if name.startswith(BUILT_IN):
        policy = TEMPLATES.get(name.removeprefix(BUILT_IN))
        if policy is None:
            raise UsageError(f"there is no policy {name}", "no template has that name", f"Name one of {_templates()}")
        return policy, render_policy(policy)
    data = read_bounded(Path(name), "policy", MAX_BYTES)
    return decode_policy(data, source=name), data


def _templates() -> str:
    return ", ".join(f"{BUILT_IN}{name}" for name in TEMPLATES)


def _guarded(act: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """An invalid policy has an exit code of its own here; every other error is told as everywhere."""
    try:
        return act(options)
    except PolicyError as exc:
        if options.json:
            return print_failure(exc)
        say(str(exc))
        return INVALID


def _print_json(kind: str, told: dict[str, Any]) -> None:
    whole = {"schema_version": f"x07.sandbox.policy.{kind}@0.1.0", **told}
    sys.stdout.write(json.dumps(whole, indent=2) + "\n")
    sys.stdout.flush()


def _problems(exc: Exception) -> list[dict[str, str | None]]:
    found = exc.problems if isinstance(exc, PolicyError) else ()
    return [
        {"json_path": problem.json_path, "message": problem.message, "suggestion": problem.suggestion}
        for problem in found
    ]


def _check(options: argparse.Namespace) -> int:
    rows = [_checked(name) for name in options.files]
    worst = max((_CHECK_CODES[row["status"]] for row in rows), key=_SEVERITY.index)
    if options.json:
        _print_json("check", {"ok": worst == 0, "files": rows})
        return worst
    for row in rows:
        if row["status"] == "valid":
            # A name need not be UTF-8.
            sys.stdout.buffer.write(os.fsencode(f"{row['file']}: valid ({row['policy_id']})\n"))
            sys.stdout.buffer.flush()
        else:
            say(row["text"])
    return worst


_CHECK_CODES: Final = {"valid": 0, "invalid": INVALID, "unreadable": UNREADABLE}
_SEVERITY: Final = (0, INVALID, UNREADABLE)  # what could not even be looked at counts most


def _checked(name: str) -> dict[str, Any]:
    try:
        policy, _ = load(name)
    except UsageError as exc:
        status = "invalid" if isinstance(exc, PolicyError) else "unreadable"
        return {"file": name, "status": status, "problems": _problems(exc), "text": str(exc)}
    return {"file": name, "status": "valid", "policy_id": policy.policy_id, "digest": policy_digest(policy)}


def _digest(options: argparse.Namespace) -> int:
    from hashlib import sha256

    policy, data = load(options.file)
    digest = policy_digest(policy)
    if options.json:
        of_file = f"sha256:{sha256(data).hexdigest()}"
        _print_json("digest", {"policy_id": policy.policy_id, "digest": digest, "file_digest": of_file})
    else:
        sys.stdout.write(f"{digest}\n")
    return 0


def _schema(_options: argparse.Namespace) -> int:
    from x07_sandbox.policy.schema import render_schema

    sys.stdout.write(render_schema().decode())
    return 0
