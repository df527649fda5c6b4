"""`x07 policy new` and `x07 policy init`: make a policy from a template and flags, and print it or write it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from x07_sandbox.cli.console import say
from x07_sandbox.cli.json_output import deliver, print_line, shell_path, show_written
from x07_sandbox.cli.parser import add_row, file_path, given_rows, inner_verb, nonempty, option, repeated, switch
from x07_sandbox.errors import UsageError
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.host.paths import is_folder, real_path
from x07_sandbox.library.requests import make_request
from x07_sandbox.options import OF_POLICIES
from x07_sandbox.policy.changes import Overrides
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.problems import is_policy_id
from x07_sandbox.policy.templates import TEMPLATES, make_policy
from x07_sandbox.programs.project import project_root, write_document
from x07_sandbox.reports.verbs import PolicyInitReport
from x07_sandbox.sessions.request import read_spec_file

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


def add_parsers(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs `new` and `init` to the verbs of `x07 policy`."""
    new = inner_verb(verbs, "new", "print a complete policy made from flags")
    new.description = "Print a complete policy, made from a template and the flags that you give."
    new.epilog = _NEW_EPILOG
    doc = "template to start from (default: the one named default)"
    option(new, "--template", "T", doc, choices=tuple(TEMPLATES))
    doc = "policy_id of the policy (default: custom.T, where T is the template)"
    option(new, "--id", "ID", doc, dest="policy_id", type=nonempty)
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
    for parser in (new, init):
        for row in OF_POLICIES:
            add_row(parser, row)
        repeated(parser, "--read", "PATH", "let the program read this file or folder", type=nonempty)
        repeated(parser, "--write", "PATH", "let the program read and modify this file or folder", type=nonempty)


def file_name(template: str) -> str:
    """Return the default name of a policy file that is made from the template."""
    return f"{template}.sandbox.base.policy.json"


def new(options: argparse.Namespace) -> int:
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


def init(options: argparse.Namespace) -> int:
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
