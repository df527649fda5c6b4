"""Hints for a failed program, from the program's output, the image and the files beside the program."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from typing import TYPE_CHECKING, Final

from x07_sandbox.policy.hints import LocalModules, hints, program_hint
from x07_sandbox.policy.packages import Adding, ImageInUse
from x07_sandbox.programs.manifest import FILE
from x07_sandbox.sessions.prepare import Prepared, image_in_use

if TYPE_CHECKING:
    from x07_sandbox.policy.denials import Hint
    from x07_sandbox.sessions.phase import PhaseSpec
    from x07_sandbox.sessions.request import Program, RunRequest

_BESIDE_MAX: Final = 10_000  # names in the program's folder that are looked at
_FIRST_LINE: Final = re.compile(rb"#!\s*(?:/usr)?/bin/(?:env\s+(?:-S\s*)?)?([A-Za-z0-9][\w.+-]{0,63})\s")


def hints_for(tail: bytes, prepared: Prepared, spec: PhaseSpec) -> list[Hint]:
    """Return hints about what a program lacks. tail: the end of the program's output."""
    if prepared.image is not None and prepared.image.manifest.program is not None:
        return []  # nothing can be added to an imported image
    beside = _beside(prepared.request, prepared.program)
    image = image_in_use(prepared.image, prepared.image_name)
    return hints(tail, prepared.policy.policy, spec.areas, spec.order.cwd, beside, os.environ, image=image)


def missing_interpreter(program: Program, image: ImageInUse) -> list[Hint]:
    """Return a hint if the guest could not find the interpreter of a script."""
    found = _FIRST_LINE.match(program.source.head) if program.toolchain.build is None else None
    return [] if found is None else [program_hint(found[1].decode(), image)]


def _beside(request: RunRequest, program: Program) -> LocalModules | None:
    if request.program is None or program.project or program.toolchain.name != "python":
        return None
    folder, name = request.program.parent, request.program.name
    where = str(folder) if not str(folder).startswith("-") else f"./{folder}"
    if not (where + name).isprintable():  # it could not be pasted
        return None
    try:
        with os.scandir(folder) as entries:
            found = list(itertools.islice(entries, _BESIDE_MAX))
    except OSError:
        return None
    modules = {entry.name.removesuffix(".py") for entry in found if entry.name.endswith(".py")}
    modules |= {entry.name for entry in found if os.path.exists(f"{entry.path}/__init__.py")}  # noqa: PTH110 - a text
    has_manifest = FILE in {entry.name for entry in found}
    run = f"x07 run {shlex.quote(where)}"
    if has_manifest:
        return LocalModules(modules, Adding(f"{run} with both in its {FILE}"))
    init = f"x07 init --toolchain python --entry {shlex.quote(name)} {shlex.quote(where)}"
    return LocalModules(modules, Adding(init, run))
