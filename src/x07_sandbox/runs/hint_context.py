"""What a program that failed seems to have missed of the host: its own words, and what lies where it came from."""

from __future__ import annotations

import itertools
import os
import shlex
from typing import TYPE_CHECKING, Final

from x07_sandbox.plan.hints import LocalModules, hints
from x07_sandbox.programs.manifest import FILE

if TYPE_CHECKING:
    from x07_sandbox.plan.denials import Hint
    from x07_sandbox.policy import Policy
    from x07_sandbox.runs.phase import PhaseSpec
    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import RunRequest

_BESIDE_MAX: Final = 10_000  # names of the folder that a program lies in


def missed(tail: bytes, policy: Policy, spec: PhaseSpec, request: RunRequest, program: Program) -> list[Hint]:
    """Hints to what it missed. tail: the end of its error output. spec: how it was run."""
    return hints(tail, policy, spec.areas, spec.cwd, _beside(request, program), os.environ)


def missing_interpreter(program: Program) -> list[Hint]:
    """A hint to the interpreter of a script that the guest could not find."""
    from x07_sandbox.plan.denials import Hint, HowToAllow
    from x07_sandbox.programs.other_languages import interpreter_of

    found = interpreter_of(program.source.head) if program.toolchain.build is None else None
    if found is None:
        return []
    name, package = found
    flag = f"--image NAME, after x07 image build --name NAME --include {package},"
    return [Hint(subject=f"the program {name}", how=HowToAllow(json_path=None, value=None, flag=flag))]


def _beside(request: RunRequest, program: Program) -> LocalModules | None:
    """The modules that lie beside a program of one file, for a hint to one that it missed."""
    if request.program is None or program.project or program.toolchain.name != "python":
        return None
    folder, name = request.program.parent, request.program.name
    where = str(folder) if not str(folder).startswith("-") else f"./{folder}"
    if not (where + name).isprintable():  # not to be pasted, and a name that is no UTF-8 not to be written
        return None
    try:
        with os.scandir(folder) as entries:
            found = list(itertools.islice(entries, _BESIDE_MAX))
    except OSError:
        return None
    modules = {entry.name.removesuffix(".py") for entry in found if entry.name.endswith(".py")}
    modules |= {entry.name for entry in found if os.path.exists(f"{entry.path}/__init__.py")}  # noqa: PTH110 - a text
    has_manifest = FILE in {entry.name for entry in found}
    init = f", after x07 init --toolchain python --entry {shlex.quote(name)} {shlex.quote(where)}"
    return LocalModules(modules, f"x07 run {shlex.quote(where)}{f' with both in its {FILE}' if has_manifest else init}")
