"""What a policy forbids the program inside the machine, beyond its limits: what START carries as `confine`."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from x07_sandbox.policy.model import Policy

EVERYTHING: Final = "/"  # of allow_exec_prefixes
BASE_FILTERS: Final = ("base", "quiet")


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """What the program may do.

    programs: paths of programs that it may execute; None where it may execute any, or none at all. prefixes: beginnings
    of further ones. Both are absolute and normal, but for a slash at the end of a beginning. alone: whether nothing but
    the policy lies beside the program in its folder.
    """

    threads: bool
    spawn: bool
    execute: bool
    programs: tuple[str, ...] | None = None
    prefixes: tuple[str, ...] = ()
    alone: bool = False

    @property
    def filters(self) -> tuple[str, ...]:
        """Names of the image's seccomp filters for the program (guest/boot/filters.py makes them).

        The guest takes the one that ends in -once, if there is one, where the program itself has to be executed.
        """
        words = (not self.threads and "no-threads", not self.spawn and "no-spawn", not self.execute and "no-exec")
        name = "-".join(word for word in words if word)
        names = (*BASE_FILTERS, name, "" if self.execute else f"{name}-once")
        return tuple(name for name in names if name)

    def for_guest(self) -> dict[str, Any]:
        """As START carries it."""
        programs = None if self.programs is None else list(self.programs)
        return msgspec.structs.asdict(self) | {"programs": programs, "prefixes": list(self.prefixes)}


UNCONFINED: Final = Confinement(threads=True, spawn=True, execute=True)


def confinement(policy: Policy, cwd: str, *, alone: bool = False) -> Confinement:
    """That of a run with *policy*. cwd: what relative paths are relative to, in the machine. alone: as above."""
    process = policy.process
    listed = process.may_execute and not names_everything(process.allow_exec_prefixes)
    return Confinement(
        threads=policy.threads_in_force.enabled,
        spawn=process.may_spawn,
        execute=process.may_execute,
        programs=tuple(entry_path(path, cwd) for path in process.allow_execs) if listed else None,
        prefixes=tuple(entry_path(path, cwd) for path in process.allow_exec_prefixes) if listed else (),
        alone=alone,
    )


def names_everything(prefixes: Iterable[object]) -> bool:
    """Whether one of allow_exec_prefixes is the root, in any spelling."""
    return any(str(prefix).startswith("/") and entry_path(str(prefix), "/") == EVERYTHING for prefix in prefixes)


def entry_path(entry: str, cwd: str) -> str:
    """Where an entry of a list leads: absolute and normal, with its slash if it ends with one."""
    path = "/" + posixpath.normpath(posixpath.join(cwd, entry)).lstrip("/")
    folder = entry.endswith(("/", "/.", "/..")) or entry in {".", ".."}
    return path if path == EVERYTHING or not folder else f"{path}/"


def leading_into(entries: Iterable[str], folders: Sequence[str], cwd: str) -> list[str]:
    """Those of the entries, beginnings of paths, that something in one of these normal folders may begin with."""
    found = []
    for entry in entries:
        path = entry_path(entry, cwd)
        if any(f"{folder}/".startswith(path) or path.startswith(f"{folder}/") for folder in folders):
            found.append(entry)
    return found
