"""`x07 policy init`: a template as a file of the project."""

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
from x07_sandbox.reports.policy_init import PolicyInitReport

BASE_FOLDER: Final = (".x07", "policies", "base")
DIFFERENT: Final = 2

_EPILOG = f"""templates: {", ".join(TEMPLATES)}

examples:
  x07 policy init --template default
  x07 policy init --template cli --out policies/cli.json --mkdir-out
  x07 policy init --template worker --emit policy | jq .limits
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "init",
        help="write a policy from a template",
        description="Write a policy from a template; without --out below .x07/policies/base of the project.",
        epilog=_EPILOG,
    )
    parser.add_argument("--template", required=True, choices=tuple(TEMPLATES), metavar="T", help="which one, see below")
    doc = "the project's file (default: x07.json above here)"
    parser.add_argument("--project", type=file_path, metavar="FILE", help=doc)
    parser.add_argument("--policy-id", metavar="ID", help="the policy's name (default: sandbox.T.base)")
    switch(parser, "--force", "overwrite a file with another content")
    doc = "print one line of JSON about the file, or the policy itself (default: text for people)"
    emitted = ("report", "policy")
    parser.add_argument("--emit", choices=emitted, metavar="|".join(emitted), help=doc)
    parser.add_argument("--out", type=file_path, metavar="PATH", help="where to, from the project's folder")
    switch(parser, "--mkdir-out", "make the folder that --out names")
    parser.set_defaults(writes=_writes)


def file_name(template: str) -> str:
    """What the file of a template is called."""
    return f"{template}.sandbox.base.policy.json"


def _writes(options: argparse.Namespace) -> list[Path]:
    """The policy's place, and what the project consists of, from whose file that begins."""
    from x07_sandbox.cli.project_files import own_files

    try:
        root = project_root(options.project)
    except UsageError:
        return []  # the verb says so itself, and writes nothing
    place = root / (options.out or Path(*BASE_FOLDER, file_name(options.template)))
    return [place, *own_files(root, options.report_out)]


def init(options: argparse.Namespace) -> int:
    """Write the file, and print what was done; the exit code. Raises SandboxError."""
    policy = TEMPLATES[options.template]
    if options.policy_id is not None:
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", options.policy_id):
            why = "a name has 1 to 64 letters, digits, '_', '.' or '-'"
            raise UsageError(f"cannot name a policy {options.policy_id!r}", why, "Give another --policy-id")
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
    say(f"{path} holds something else and was left alone; --force overwrites it")
    return DIFFERENT


def _chosen(root: Path, out: Path, *, make: bool) -> tuple[Path, tuple[str, ...]]:
    """The place that the user named: a folder that is there, and the way from it. Raises UsageError.

    Somebody else may have made the project's folders, so the way through them is walked without links; a way that
    leads out of the project by its own name is the user's.
    """
    if out.name in {"", ".."}:
        raise UsageError(f"cannot write {out}", "it names no file", "Give the name of a file")
    folder = root / out.parent
    inside = not out.is_absolute() and ".." not in out.parts
    if inside and (make or is_folder(folder)):
        return root, out.parts
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"cannot make the folder {folder}", exc.strerror or str(exc), "Choose another --out") from exc
    if not is_folder(folder):
        why = f"there is no folder {folder} that you can use"
        raise UsageError(f"cannot write {out}", why, "Make it, or add --mkdir-out")
    return real_path(folder), (out.name,)
