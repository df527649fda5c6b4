"""Restrictions of the program inside the machine that are not limits."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from x07_sandbox.channel.messages import Confine

if TYPE_CHECKING:
    from x07_sandbox.policy.model import Policy

EVERYTHING: Final = "/"
BASE_FILTERS: Final = ("base", "quiet")


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """Restrictions of the program. It may execute only `programs` and files that match `prefixes` (absolute paths)."""

    threads: bool
    spawn: bool
    execute: bool
    programs: tuple[str, ...] | None = None  # None: there is no list; `execute` decides for every program
    prefixes: tuple[str, ...] = ()
    alone: bool = False  # whether the program's folder contains only the program and the policy

    @property
    def filters(self) -> tuple[str, ...]:
        """Names of the image's seccomp filters for the program (guest/boot/filters.py).

        A filter whose name ends in -once still allows the guest to execute the program itself.
        """
        words = (not self.threads and "no-threads", not self.spawn and "no-spawn", not self.execute and "no-exec")
        name = "-".join(word for word in words if word)
        names = (*BASE_FILTERS, name, "" if self.execute else f"{name}-once")
        return tuple(name for name in names if name)

    def for_guest(self) -> Confine:
        """Return the restrictions as the guest agent gets them."""
        programs = None if self.programs is None else list(self.programs)
        return Confine(self.threads, self.spawn, self.execute, programs, list(self.prefixes), self.alone)


UNCONFINED: Final = Confinement(threads=True, spawn=True, execute=True)


def confinement(policy: Policy, cwd: str, *, alone: bool = False) -> Confinement:
    """Return the confinement of a run with *policy*. cwd: the guest folder that relative paths start from."""
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
    """Return whether one of allow_exec_prefixes is the root folder, in any spelling."""
    return any(str(prefix).startswith("/") and entry_path(str(prefix), "/") == EVERYTHING for prefix in prefixes)


def entry_path(entry: str, cwd: str) -> str:
    """Return an entry of a list of programs as a normalized absolute path. A path of a folder ends with a slash."""
    path = "/" + posixpath.normpath(posixpath.join(cwd, entry)).lstrip("/")
    folder = entry.endswith(("/", "/.", "/..")) or entry in {".", ".."}
    return path if path == EVERYTHING or not folder else f"{path}/"


def prefixes_into(entries: Iterable[str], folders: Sequence[str], cwd: str) -> list[str]:
    """Return those prefixes in *entries* that match paths in one of the normalized *folders*."""
    found = []
    for entry in entries:
        path = entry_path(entry, cwd)
        if any(f"{folder}/".startswith(path) or path.startswith(f"{folder}/") for folder in folders):
            found.append(entry)
    return found
