"""The verdict on a command, with what it was denied and what it seems to lack."""

from __future__ import annotations

import errno
import itertools
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from x07_sandbox.errors import Flag
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.denials import CONNECTS, Denial, Hint
from x07_sandbox.policy.outcomes import limit_set_by, with_denied_tasks
from x07_sandbox.sessions.prepare import image_in_use
from x07_sandbox.sessions.request import reach_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from x07_sandbox.channel.messages import Exec
    from x07_sandbox.policy.denials import NetworkUse
    from x07_sandbox.policy.hints import ImageInUse, LocalModules
    from x07_sandbox.policy.outcomes import Verdict
    from x07_sandbox.sessions.execution import Facts
    from x07_sandbox.sessions.prepare import Prepared
    from x07_sandbox.sessions.request import Program
    from x07_sandbox.sessions.specs import SessionSpec

_BESIDE_MAX: Final = 10_000  # names in the program's folder that are looked at
_FIRST_LINE: Final = re.compile(rb"#!\s*(?:/usr)?/bin/(?:env\s+(?:-S\s*)?)?([A-Za-z0-9][\w.+-]{0,63})\s")


class Ending(NamedTuple):
    """How a command ended. lost: the number of denials that the list does not contain."""

    verdict: Verdict
    denials: list[Denial]
    hints: list[Hint]
    lost: int


class Observed(NamedTuple):
    """What was observed of a command. net: what the gate reported, if there is one. tail: the end of its output."""

    order: Exec
    facts: Facts
    net: NetworkUse | None
    tail: bytes


def ending_of(
    found: Verdict, seen: Observed, prepared: Prepared, spec: SessionSpec, known: Sequence[Denial] = ()
) -> Ending:
    """Return how a command ended. found: the verdict by the evidence alone. known: denials that come before it."""
    exec_errno = seen.facts.evidence.exec_errno
    verdict = _without_command(_with_setter(found, prepared), exec_errno, prepared, seen.order)
    denials, lost = _observed(seen, prepared, spec)
    denials += known
    tasks = 0 if seen.facts.exited is None else seen.facts.exited.tasks_refused
    if tasks:
        from x07_sandbox.policy import observed

        policy = prepared.policy
        denials.append(observed.more_tasks(policy.policy, run_limits(policy.policy).max_live, tasks, reach_of(policy)))
    hints = [] if found.outcome == "ok" else _hints(seen, prepared, spec)
    if any(one.action in CONNECTS for one in denials):  # they say more
        hints = [hint for hint in hints if hint.kind != "network"]
    return Ending(with_denied_tasks(verdict, denials), denials, hints, lost)


def _observed(seen: Observed, prepared: Prepared, spec: SessionSpec) -> tuple[list[Denial], int]:
    """Return what a command was denied, and the number of denials that the list does not contain."""
    refused, net = seen.facts.denied, seen.net
    if not refused and not (net is not None and net.denied):
        return [], 0
    from x07_sandbox.policy import observed  # imported only for programs that were denied something

    policy, text = prepared.policy, seen.tail.decode("utf-8", "replace")
    found, lost = observed.denials(refused, policy.policy, spec.areas, seen.order.cwd, reach_of(policy)), 0
    connections: list[Denial] = []
    if net is not None and prepared.egress is not None:
        from x07_sandbox.sessions.egress import denials as denied_connections

        connections, lost = denied_connections(net, prepared.egress.allowlist, text)
    elif any(one.by == observed.NETWORK for one in refused):
        from x07_sandbox.sessions.egress import denials_without_gate

        connections = denials_without_gate(refused, policy, prepared.availability.features.words.boundary, text)
    return [*found, *connections], lost


def _with_setter(ending: Verdict, prepared: Prepared) -> Verdict:
    """Return the verdict with the flag that set a reached limit, if the limit is not the policy's."""
    field, cpu_ms, changes = ending.limited_by, prepared.cpu_ms, prepared.request.limits
    if field == "limits.cpu_ms" and cpu_ms is not None and cpu_ms < prepared.policy.policy.limits.cpu_ms:
        return limit_set_by(ending, option=Flag("--cpu-time-limit-seconds"))
    for name in () if changes is None else changes.given():
        if field == f"limits.{name}":
            from x07_sandbox.policy.changes import NAMES

            return limit_set_by(ending, option=Flag(NAMES[name].flag))
    return ending


def _without_command(ending: Verdict, exec_errno: int, prepared: Prepared, order: Exec) -> Verdict:
    """Return the verdict on a command of the image, with advice if there is no such command."""
    if prepared.program is not None or exec_errno != errno.ENOENT:
        return ending
    word = "".join(prepared.request.command[:1] or order.argv[:1])  # as the user wrote it, if it is known
    name, image = ascii(word)[1:-1], prepared.image_name
    if prepared.image is None:
        return replace(ending, code="command-not-on-host", params={"name": name})
    if "/" in name or prepared.image.manifest.program is not None:
        return replace(ending, code="command-not-in-vm", params={"name": name})
    from x07_sandbox.policy.hints import package_of_program

    flag, package = package_of_program(name)
    add = "To add a Python package" if flag == "--pip" else "To add the Debian package that has it"
    add = add if package == "PACKAGE" else "To add it"
    command = image_in_use(prepared.image, image).adding(flag, [package]).text
    params = {"name": name, "image": image, "advice": add, "command": command}
    return replace(ending, code="command-not-in-image", params=params)


def _hints(seen: Observed, prepared: Prepared, spec: SessionSpec) -> list[Hint]:
    """Return hints about what a command seems to lack."""
    program = prepared.program
    if seen.tail.strip():
        if prepared.image is not None and prepared.image.manifest.program is not None:
            return []  # nothing can be added to an imported image
        from x07_sandbox.policy.hints import hints  # most programs need none

        image, policy = image_in_use(prepared.image, prepared.image_name), prepared.policy.policy
        text, cwd = seen.tail, seen.order.cwd
        return hints(text, policy, spec.areas, cwd, _beside(prepared), os.environ, image=image)
    if program is not None and seen.facts.evidence.exec_errno == errno.ENOENT:
        return missing_interpreter(program, image_in_use(prepared.image, prepared.image_name))
    return []


def missing_interpreter(program: Program, image: ImageInUse) -> list[Hint]:
    """Return a hint if the guest could not find the interpreter of a script."""
    from x07_sandbox.policy.hints import program_hint

    found = _FIRST_LINE.match(program.source.head) if program.toolchain.build is None else None
    return [] if found is None else [program_hint(found[1].decode(), image)]


def _beside(prepared: Prepared) -> LocalModules | None:
    """Return the modules beside a Python program, which `x07 run` does not copy into the VM."""
    path, program = prepared.request.program, prepared.program
    if path is None or program is None or program.project or program.toolchain.name != "python":
        return None
    import shlex

    from x07_sandbox.policy.hints import Adding, LocalModules
    from x07_sandbox.programs.project import FILE

    folder, name = path.parent, path.name
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
