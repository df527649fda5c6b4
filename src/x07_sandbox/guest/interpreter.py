"""A Python interpreter that is started before the job, and becomes the program when the job arrives.

The interpreter is started with a placeholder as script name, and stops in its start-up, where Python imports
`sitecustomize`. That module comes from `hook` and contains the code of `waiting`. It imports the preloaded modules and
waits for the start message. Then it removes itself, writes the real script name where the interpreter will read it, and
returns, so that the script runs with none of x07's code on the stack. If the program is not a suitable Python script,
the module executes the program instead.

The script's name is in private memory. Once `sitecustomize` has returned, CPython reads it there, and no public call
changes it: for PyConfig_Set of Python 3.14 the name is read-only. A program would notice each public alternative. runpy
and exec leave their frames on its stack. With -c or -m it has another sys.orig_argv, and with -c no __file__. Byte code
in the place of the script needs one more file in its folder, or another sys.path[0]. With a fresh interpreter there is
nothing to notice, but a cached run takes 2.3 times as long (4.2 instead of 1.8 s on a busy host, medians of 8 pairs).

Differences from a fresh start: docs/explanation/design.md, "Saved VMs".
"""

from __future__ import annotations

import marshal
import os
from typing import Any, Final

from x07_sandbox import kernel
from x07_sandbox.channel.messages import CWD, ENVIRONMENT
from x07_sandbox.guest import waiting
from x07_sandbox.guest.waiting import CODE_MAX, FOLDER, PLACEHOLDER, SCRIPTS

PYTHON: Final = "/usr/bin/python3"
ARGV: Final = [PYTHON, PLACEHOLDER]
# Variables that the interpreter reads before our hook runs: if the job's differ, a fresh interpreter is started.
_EARLY: Final = (
    *("LANG", "LC_ALL", "LC_CTYPE", "LANGUAGE", "TZ", "LOCPATH", "HOME"),
    *("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
)
_EARLY_PREFIXES: Final = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")
ENV: Final = ENVIRONMENT | {"PYTHONPATH": FOLDER}
OWN_MODULES: Final = f"{CWD}/.local"  # the user site-packages


def hook(preload: list[str]) -> str:
    """Return the source of a `sitecustomize` module that imports the modules *preload*.

    That module cannot import x07's modules, so it contains the code of `waiting` and `kernel`.
    """
    wait, calls = (marshal.dumps(_code_of(module)) for module in (waiting, kernel))
    return f"""import marshal
names = {{}}
exec(marshal.loads({wait!r}), names)
names["stop"]({preload!r}, {calls!r})
names.clear()
"""


def _code_of(module: Any) -> Any:  # noqa: ANN401 - a module, and its code
    return module.__loader__.get_code(module.__name__)


def can_become(argv: list[str], env: dict[str, str], *, preload: bool, alone: bool, own_modules: bool) -> bool:
    """Return whether the waiting interpreter is equivalent to a fresh start of this command.

    preload: whether modules were imported, which may have read variables and started threads. alone: whether the
    policy allows no threads. own_modules: whether the program has user site-packages.
    """
    return (
        len(argv) > 1
        and argv[0] == PYTHON
        and argv[1].startswith(SCRIPTS)
        and len(argv[1]) <= len(PLACEHOLDER)
        and _fits(env, preload=preload, alone=alone, own_modules=own_modules)
    )


def can_fork(argv: list[str], env: dict[str, str], *, own_modules: bool) -> bool:
    """Return whether a copy of the waiting interpreter with its preloaded modules is equivalent to this command.

    It may be a script, or code or a module with -c or -m, and other options of Python are not.
    """
    if len(argv) < 2 or argv[0] != PYTHON:  # noqa: PLR2004 - an argument
        return False
    script = not argv[1].startswith("-") and len(argv[1]) <= len(PLACEHOLDER)
    given = argv[1] in {"-c", "-m"} and len(argv) > 2 and len(os.fsencode(argv[2])) <= CODE_MAX  # noqa: PLR2004 - a value
    return (script or given) and _fits(env, preload=True, alone=False, own_modules=own_modules)


def _fits(env: dict[str, str], *, preload: bool, alone: bool, own_modules: bool) -> bool:
    return (
        not any(name.startswith(_EARLY_PREFIXES) and name not in _EARLY for name in env)
        and not own_modules
        and not (preload and alone)
        and (not preload or all(name in ENVIRONMENT or name.startswith("X07_") for name in env))
        and all(env.get(name) == ENVIRONMENT.get(name) for name in _EARLY)
    )
