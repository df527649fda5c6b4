"""Execution lists of the policy, enforced by Landlock and noexec mounts. Init applies the lists."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from x07_sandbox import kernel
from x07_sandbox.guest import system, waiting


class ExecutionRules(NamedTuple):
    """The programs that the job may execute.

    programs: allowed paths; None if the policy has no list. With a list, other programs in the image are unreadable.
    prefixes: prefixes of further allowed paths. program: the program executed first; None if it is the waiting Python.
    alone: whether the inputs contain nothing else that could be executed. mounts: mount points of host folders.
    """

    programs: list[str] | None
    prefixes: list[str]
    program: str | None
    alone: bool
    mounts: list[str]


def allow(rules: ExecutionRules) -> None:
    """Add listed files, as they are now, and listed folders to the Landlock ruleset. Prefixes count as folders."""
    if rules.programs is None:
        return
    for at in rules.mounts:
        kernel.landlock_allow(waiting.RULES_FD, at, kernel.READ_FILE)
    if rules.program:
        allow_program(rules.program)
    for path in _listed(rules):
        allow_program(path)


def allow_program(path: str) -> None:
    """Allow executing a file, or all files in a folder. Raises OSError."""
    kernel.landlock_allow(waiting.RULES_FD, path, kernel.EXECUTE | kernel.READ_FILE)


def _listed(rules: ExecutionRules) -> list[str]:
    listed = [path for path in rules.programs or () if os.path.isfile(path)]
    for prefix in rules.prefixes:
        listed += [path for path in _with_prefix(prefix) if os.path.exists(path)]
    return list(dict.fromkeys(listed))


def _with_prefix(prefix: str) -> list[str]:
    folder, _, start = prefix.rpartition("/")
    folder = folder or "/"
    if not start:
        return [folder, *link_targets(folder)]
    try:
        return [entry.path for entry in os.scandir(folder) if entry.name.startswith(start)]
    except OSError:
        return []


@functools.cache
def link_targets(folder: str) -> tuple[str, ...]:
    """Return the targets outside a folder of the links in it. A Landlock rule for the folder does not cover them."""
    try:
        found = [os.path.realpath(entry.path) for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return ()
    own = os.path.realpath(folder) + "/"
    return tuple(path for path in dict.fromkeys(found) if not path.startswith(own) and os.path.isfile(path))


def forbid_elsewhere(rules: ExecutionRules, writable: list[str], inputs: str) -> None:
    """Mount every folder noexec that is neither part of the image nor listed.

    Otherwise the dynamic loader could run any file there. writable: the writable folders. inputs: the input folder.
    """
    closed = [*writable, *rules.mounts]
    if not rules.alone:
        closed.append(inputs)
    if rules.programs is not None:
        closed = _keep_listed(_listed(rules), closed)
    program = rules.program
    if program and inputs in closed and program.startswith(f"{inputs}/"):
        # Its own mount stays executable when the rest of the folder becomes noexec.
        system.mount(program, program, "", system.MS_BIND)
    for place in closed:
        system.change_mount(place, system.MS_NOEXEC)


def _keep_listed(listed: list[str], places: list[str]) -> list[str]:
    """Make each listed path below the mounts *places* a mount of its own. Return the mounts that must become noexec."""
    listed = sorted(os.path.realpath(path) for path in listed)
    places = list(places)
    closed = [place for place in places if not any(_within(place, path) for path in listed)]
    for path in listed:
        holding = max((place for place in places if _within(path, place)), key=len, default=None)
        if holding in closed:
            folder = os.path.isdir(path)
            for one in (path, *([] if folder else _aliases(path, holding, places))):
                system.mount(one, one, "", system.MS_BIND | system.MS_REC)
                if not folder:  # the program must not change a listed file, by any of its paths
                    system.change_mount(one, system.MS_RDONLY)
            places.append(path)
    return closed


def _aliases(path: str, holding: str, places: list[str]) -> list[str]:
    """Return the other paths of a file in the mount *holding*. A file has several if one folder is mounted twice."""
    sources = _sources()
    disk, top = sources[holding]
    source = top.rstrip("/") + path[len(holding) :]
    found = set()
    for place in set(places) - {holding}:
        other_disk, other_top = sources.get(place, ("", ""))
        if other_disk == disk and _within(source, other_top):
            found.add(place + source[len(other_top.rstrip("/")) :])
    return sorted(other for other in found - {path} if os.path.exists(other) and os.path.samefile(other, path))


def _sources() -> dict[str, tuple[str, str]]:
    """Return the mounted device and the mounted folder on that device, by mount point (proc(5): mountinfo)."""
    found = {}
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            disk, top, place = (_plain(word) for word in line.split(b" ")[2:5])
            found[place] = disk, top  # a later mount covers an earlier one
    return found


def _plain(word: bytes) -> str:
    """Decode the octal escapes of a mountinfo field."""
    first, *rest = word.split(b"\\")
    return os.fsdecode(first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
