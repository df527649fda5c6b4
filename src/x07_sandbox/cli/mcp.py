"""`x07 mcp`: an MCP server on standard input and output, whose tools run code in sandboxes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from msgspec.structs import replace

from x07_sandbox.cli.parser import add_help_levels, help_level, option, seconds, switch, whole_number
from x07_sandbox.cli.sandbox import add_shared_options, given_keywords
from x07_sandbox.errors import Command, UsageError
from x07_sandbox.host.settings import LIFETIME_MAX_S
from x07_sandbox.policy.outcomes import SIGNAL_BASE

if TYPE_CHECKING:
    from x07_sandbox.backends.registry import Choice
    from x07_sandbox.images.store import Manifest
    from x07_sandbox.sessions.preview import Preview

_EPILOG: Final = """An assistant starts this command and talks to it on standard input and output. Its tools are
run_code, sandbox_open, sandbox_exec, sandbox_kill, sandbox_read, sandbox_write, sandbox_edit, sandbox_list,
sandbox_search and sandbox_close; with --checkpoints, also sandbox_checkpoint and sandbox_rollback. The options of this
command apply to all of them, and the assistant cannot change them. Changes to folders are kept for x07 apply, unless
--apply is given. The guest image must exist (x07 image build).

examples:
  claude mcp add x07 -- x07 mcp                                      add it to Claude Code
  claude mcp add x07 -- x07 mcp --image agent                        with git, node, ... (built with --preset agent)
  claude mcp add x07 -- x07 mcp --allow-read-root . --memory 1G      let programs read this folder
"""
# The Debian packages of programs that have another name.
_PACKAGES: Final = {
    "pip": "python3-pip",
    "node": "nodejs",
    "perl": "perl-base",
    "rg": "ripgrep",
    "ps": "procps",
    "xz": "xz-utils",
    "vi": "vim-tiny",
}
_OPEN_MAX: Final = 8
_OPEN_MOST: Final = 256
_ANSWER_MOST: Final = 3600


def add_mcp(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 mcp`."""
    parser.epilog, parser.level_of = _EPILOG, help_level  # type: ignore[attr-defined]  # of our Parser
    add_help_levels(parser, "all")
    group = parser.add_argument_group("server")
    most = seconds(LIFETIME_MAX_S)
    switch(group, "--apply", "apply changes to folders of this host, instead of keeping them for x07 apply")
    switch(group, "--checkpoints", "add the tools sandbox_checkpoint and sandbox_rollback")
    count = whole_number(1, _OPEN_MOST, "VMs")
    option(group, "--max-open", "N", "limit of VMs at once (default: 8, or what this host has room for)", type=count)
    option(group, "--idle", "S", "end a sandbox after this many seconds without a command (default: 600)", type=most)
    option(group, "--lifetime", "S", "end a sandbox after this many seconds (default: 3600)", type=most)
    option(group, "--timeout", "S", "limit of elapsed time of each command or program (default: 300)", type=most)
    doc = "answer after this many seconds, even if a command still runs (default: 45)"
    option(group, "--answer-after", "S", doc, type=seconds(_ANSWER_MOST))
    add_shared_options(parser)
    parser.set_defaults(carry_out=_serve)


def _serve(options: argparse.Namespace) -> int:
    try:
        from x07_sandbox.integrations.mcp import serve
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in {"anyio", "mcp", "mcp_types"}:
            raise
        fix = ("Run ", Command(f"{shlex.quote(sys.executable)} -m pip install 'mcp>=2.3,<3'"))
        raise UsageError("cannot start the MCP server", "the package mcp is not installed", fix) from exc
    from x07_sandbox.cli.main import exit_with
    from x07_sandbox.cli.run import choose_backend
    from x07_sandbox.integrations.mcp_tools import LANGUAGES, Settings
    from x07_sandbox.programs.toolchains import BY_NAME
    from x07_sandbox.records.admission import SANDBOXES

    given = given_keywords(options)
    choice = choose_backend(options)
    preview, image = _checked(given, choice)
    _select(choice, accepted=options.i_accept_weaker_isolation)
    asked = {
        "open_max": min(options.max_open or _OPEN_MAX, SANDBOXES.count()),
        "idle_s": options.idle,
        "lifetime_s": options.lifetime,
        "timeout_s": options.timeout,
        "answer_s": options.answer_after,
    }

    def ended_by(number: int) -> NoReturn:
        exit_with(SIGNAL_BASE + number)

    life: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    network = bool(preview.hosts)
    if image is not None:
        life["languages"] = tuple(one for one in LANGUAGES if image.holds().issuperset(BY_NAME[one].needs))
    settings = Settings(options=given, apply=options.apply, network=network, checkpoints=options.checkpoints, **life)
    serve(replace(settings, about=_about(preview, image, settings.timeout_s)), ended_by)
    return 0


def _checked(given: dict[str, Any], choice: Choice) -> tuple[Preview, Manifest | None]:
    """Check now what would make each call fail, and update the image if necessary. Raises SandboxError.

    Return what a sandbox is granted, and the manifest of the image whose files its programs see, if it is known.
    """
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.images.store import find_image
    from x07_sandbox.library.arguments import SANDBOX, checked_options
    from x07_sandbox.sessions.prepare import current_image
    from x07_sandbox.sessions.preview import preview
    from x07_sandbox.sessions.request import RunCaller, make_request

    backend, manifest = choice.made, None
    if backend.uses_image and backend.engine_images is None:
        manifest = current_image(find_image(given.get("image"))).manifest
    request = make_request(checked_options(given, SANDBOX), command=("true",))
    found = preview(request, RunCaller(cancel=Cancel(), choice=choice))
    found.plan.require(() if request.overrides is None else request.overrides.given)
    return found, None if manifest is None or manifest.program is not None else manifest


def _select(choice: Choice, *, accepted: bool) -> None:
    """Have all runs and sandboxes of this process use the backend."""
    os.environ |= {"X07_SANDBOX_BACKEND": choice.sandbox_backend, "X07_VM_BACKEND": choice.backend}
    if accepted:
        os.environ["X07_I_ACCEPT_WEAKER_ISOLATION"] = "1"


def _about(found: Preview, image: Manifest | None, timeout_s: float) -> str:
    """Return sentences for the model: where it is, and what was granted."""
    from x07_sandbox.library.tools import PROGRAMS

    folders = "; ".join(f"{root.guest} ({'writable' if root.write else 'read-only'})" for root in found.roots)
    user = "root" if found.guest_root else "an ordinary user"
    where = f"Commands run in Linux as {user}."
    if image is not None:
        names = {package.name for package in image.packages}
        there = [program for program in PROGRAMS if _PACKAGES.get(program, program) in names]
        missing = [program for program in PROGRAMS if program not in there]
        where = (
            f"Commands run in Linux as {user}, in Debian {image.suite} ({image.arch}). "
            f"Programs: {', '.join(there) or 'none'}. Missing: {', '.join(missing) or 'none'}."
        )
    return (
        f"{where} Network: {', '.join(found.hosts) or 'none'}. Folders of the host, as copies: {folders or 'none'}. "
        f"Memory: {found.plan.limits.mem_bytes >> 20} MiB. Time limit of a command: {timeout_s:g} s. "
        "Only the person who started this server can change that."
    )
