"""What a policy forbids the program inside the machine, beyond its limits: what START carries as `confine`."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

EVERYTHING: Final = "/"  # of allow_exec_prefixes
BASE_FILTERS: Final = ("base", "quiet")


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """What the program may do.

    programs: paths of programs that it may execute; None where it may execute any, or none at all.
    prefixes: beginnings of further ones.
    """

    threads: bool
    spawn: bool
    execute: bool
    programs: tuple[str, ...] | None = None
    prefixes: tuple[str, ...] = ()

    @property
    def filters(self) -> tuple[str, ...]:
        """Names of the image's seccomp filters that the program is under (guest/boot/filters.py makes them).

        Of the last two, where one ends in -once, the guest takes that one if the program itself has to be executed.
        """
        words = (not self.threads and "no-threads", not self.spawn and "no-spawn", not self.execute and "no-exec")
        name = "-".join(word for word in words if word)
        names = (*BASE_FILTERS, name, "" if self.execute else f"{name}-once")
        return tuple(name for name in names if name)

    def for_guest(self) -> dict[str, Any]:
        """As START carries it."""
        return {
            "threads": self.threads,
            "spawn": self.spawn,
            "execute": self.execute,
            "programs": None if self.programs is None else list(self.programs),
            "prefixes": list(self.prefixes),
        }


UNCONFINED: Final = Confinement(threads=True, spawn=True, execute=True)


def confinement(policy: Policy, cwd: str) -> Confinement:
    """That of a run with *policy*. cwd: what relative paths are relative to, in the machine."""
    process = policy.process
    execute = process.enabled and process.allow_exec
    listed = execute and EVERYTHING not in process.allow_exec_prefixes
    programs = tuple(posixpath.join(cwd, path) for path in process.allow_execs)
    prefixes = tuple(posixpath.join(cwd, path) for path in process.allow_exec_prefixes)
    return Confinement(
        threads=policy.threads_in_force.enabled,
        spawn=process.enabled and process.allow_spawn and process.max_live > 0,
        execute=execute,
        programs=programs if listed else None,
        prefixes=prefixes if listed else (),
    )
