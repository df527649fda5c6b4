"""`x07 policy init`: write a template to a file of the project."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, print_line, shell_path, show_written
from x07_sandbox.cli.parser import file_path, switch
from x07_sandbox.errors import UsageError
from x07_sandbox.host.documents import project_root, write_document
from x07_sandbox.host.paths import is_folder, real_path
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.reports.verbs import PolicyInitReport

BASE_FOLDER: Final = (".x07", "policies", "base")
DIFFERENT: Final = 2

_EPILOG = f"""templates: {", ".join(TEMPLATES)}

examples:
  x07 policy init --template default
  x07 policy init --template cli --out policies/cli.json --mkdir-out
  x07 policy init --template worker --emit policy | jq .limits
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `init` to the verbs of `x07 policy`."""
    parser = verbs.add_parser(
        "init",
        help="write a policy from a template",
        description="Write a template to a policy file, by default in the folder .x07/policies/base of the project.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--template", required=True, choices=tuple(TEMPLATES), metavar="T", help="the template to write (see below)"
    )
    doc = "the project file (default: x07.json in this folder or the nearest folder above)"
    parser.add_argument("--project", type=file_path, metavar="FILE", help=doc)
    parser.add_argument(
        "--policy-id", metavar="ID", help="policy_id of the policy (default: sandbox.T.base, where T is the template)"
    )
    switch(parser, "--force", "overwrite an existing file that has different content")
    doc = "also print a report about the file (one line of JSON), or the policy"
    emitted = ("report", "policy")
    parser.add_argument("--emit", choices=emitted, metavar="|".join(emitted), help=doc)
    parser.add_argument("--out", type=file_path, metavar="PATH", help="file to write, relative to the project")
    switch(parser, "--mkdir-out", "create the folder of the file of --out")


def file_name(template: str) -> str:
    """Return the default name of a policy file that is made from the template."""
    return f"{template}.sandbox.base.policy.json"


def init(options: argparse.Namespace) -> int:
    """Write the policy file, print what was done, and return the exit code. Raises SandboxError."""
    policy = TEMPLATES[options.template]
    if options.policy_id is not None:
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", options.policy_id):
            why = "an id has 1 to 64 letters, digits, '_', '.' or '-'"
            raise UsageError(f"cannot use --policy-id {options.policy_id!r}", why, "Use another id")
        policy = replace(policy, policy_id=options.policy_id)
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
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"cannot create the folder {folder}", exc.strerror or str(exc), "Use another --out") from exc
    if not is_folder(folder):
        raise UsageError(f"cannot write {out}", f"there is no folder {folder}", "Create it, or add --mkdir-out")
    return real_path(folder), (out.name,)
