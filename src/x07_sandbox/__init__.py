"""Run a program that nobody trusts inside a throw-away virtual machine.

    from x07_sandbox import run_program
    result = run_program("prog.py", input=b"data")
    print(result.outcome, result.stdout.text)

Everything is imported on first use, from the table below: `import x07_sandbox` alone loads none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from x07_sandbox.errors import SandboxError
    from x07_sandbox.host.version import __version__
    from x07_sandbox.library.pool import Pool
    from x07_sandbox.library.run import exec_command, load_policy, run_program, run_program_async
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.runs.result import Result

__all__ = [
    "Policy",
    "Pool",
    "Result",
    "SandboxError",
    "__version__",
    "exec_command",
    "load_policy",
    "run_program",
    "run_program_async",
]

_EXPORTS = {
    "Policy": "x07_sandbox.policy.model",
    "Pool": "x07_sandbox.library.pool",
    "Result": "x07_sandbox.runs.result",
    "SandboxError": "x07_sandbox.errors",
    "__version__": "x07_sandbox.host.version",
    "exec_command": "x07_sandbox.library.run",
    "load_policy": "x07_sandbox.library.run",
    "run_program": "x07_sandbox.library.run",
    "run_program_async": "x07_sandbox.library.run",
}


def __getattr__(name: str) -> object:
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module), name)
