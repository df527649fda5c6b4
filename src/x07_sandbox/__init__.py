"""Run an untrusted program inside a throw-away virtual machine.

    from x07_sandbox import run_program
    result = run_program("prog.py", input=b"data")
    print(result.outcome, result.stdout.text)

Functions, with their most important arguments; `help(x07_sandbox.run_program)` describes all:
    run_program(program, args=(), *, source=None, toolchain=None, input=None, workdir=None, policy=None, timeout_s=None,
                memory=None, image=None, ...)
                        build and run a program; returns a Result
    run_program_async   the same for asyncio
    exec_command(command, workdir=None, *, ...)
                        run a command of the guest image in a copy of a folder; returns a Result
    exec_command_async  the same for asyncio
    load_policy(name)   read a policy from a file or a template
    tools(sandbox)      functions by which a language model uses a sandbox, and their JSON schemas
    diff(run, paths=()), apply(run, *, only=(), ...), undo(run)
                        show, apply and revert the changes of a run

Classes and types:
    Pool                an executor that runs many programs in warm VMs
    Sandbox             a VM that stays open for many commands
    AsyncSandbox        the same for asyncio
    Process, Ended      a command that runs in a sandbox, and how a command ended
    FileInfo            facts about a file of a sandbox
    Result              how a run ended, what it printed and changed
    Output              one output stream of a result
    Diff                what a run changed, or a sandbox so far, with a patch
    SandboxInfo         facts about an open sandbox
    Snapshot            a saved sandbox, from which others start
    Outcome             the words that Result.outcome can be
    Policy, Limits      what a program may touch and use up
    SandboxError        the base of all errors: ArgumentError, BackendError, Cancelled, HostError, ImageError,
                        RefusedError and UsageError

`import x07_sandbox` loads none of these: each is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from x07_sandbox.errors import (
        ArgumentError,
        BackendError,
        Cancelled,
        HostError,
        ImageError,
        RefusedError,
        SandboxError,
        UsageError,
    )
    from x07_sandbox.host.settings import __version__
    from x07_sandbox.library.async_sandbox import AsyncSandbox
    from x07_sandbox.library.changes import apply, diff, undo
    from x07_sandbox.library.pool import Pool
    from x07_sandbox.library.run import (
        exec_command,
        exec_command_async,
        load_policy,
        run_program,
        run_program_async,
    )
    from x07_sandbox.library.sandbox import Sandbox
    from x07_sandbox.library.snapshots import Snapshot
    from x07_sandbox.library.tools import tools
    from x07_sandbox.policy.denials import Outcome
    from x07_sandbox.policy.model import Limits, Policy
    from x07_sandbox.reports.sandboxes import SandboxInfo
    from x07_sandbox.sessions.command import Ended, FileInfo, Process
    from x07_sandbox.sessions.result import Diff, Output, Result

__all__ = [
    "ArgumentError",
    "AsyncSandbox",
    "BackendError",
    "Cancelled",
    "Diff",
    "Ended",
    "FileInfo",
    "HostError",
    "ImageError",
    "Limits",
    "Outcome",
    "Output",
    "Policy",
    "Pool",
    "Process",
    "RefusedError",
    "Result",
    "Sandbox",
    "SandboxError",
    "SandboxInfo",
    "Snapshot",
    "UsageError",
    "__version__",
    "apply",
    "diff",
    "exec_command",
    "exec_command_async",
    "load_policy",
    "run_program",
    "run_program_async",
    "tools",
    "undo",
]

_NAMES_BY_MODULE = {
    "errors": (
        *("ArgumentError", "BackendError", "Cancelled", "HostError", "ImageError", "RefusedError", "SandboxError"),
        "UsageError",
    ),
    "host.settings": ("__version__",),
    "library.changes": ("apply", "diff", "undo"),
    "library.async_sandbox": ("AsyncSandbox",),
    "library.pool": ("Pool",),
    "sessions.command": ("Ended", "FileInfo", "Process"),
    "library.run": ("exec_command", "exec_command_async", "load_policy", "run_program", "run_program_async"),
    "library.sandbox": ("Sandbox",),
    "library.snapshots": ("Snapshot",),
    "library.tools": ("tools",),
    "policy.denials": ("Outcome",),
    "policy.model": ("Limits", "Policy"),
    "reports.sandboxes": ("SandboxInfo",),
    "sessions.result": ("Diff", "Output", "Result"),
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name, so that help() and completion show what is not loaded yet."""
    return sorted({*globals(), *__all__})
