"""What may be executed in the guest, where not everything may: by Landlock, and by mounts without execution.

Done by init, still root, in the program's own view.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from x07_sandbox.guest import interpreter, system


class Execution(NamedTuple):
    """What may be executed, where not everything may.

    programs: paths of programs that may be executed, None where none may; no other of the image can be read then.
    prefixes: beginnings of further ones. program: what is executed first, if anything is. alone: whether nothing that
    could be executed lies beside it. mounts: where folders of the host are by now.
    """

    programs: list[str] | None
    prefixes: list[str]
    program: str | None
    alone: bool
    mounts: list[str]


def allow(execution: Execution) -> None:
    """Allow by Landlock what the list names: files as they are now, and whole folders that a prefix names."""
    if execution.programs is None:
        return
    for at in execution.mounts:
        system.landlock_allow(interpreter.RULES_FD, at, system.FS_READ_FILE)
    if execution.program:
        allow_program(execution.program)
    for path in _listed(execution):
        allow_program(path)


def allow_program(path: str) -> None:
    """Allow one file to be executed, or all in a folder. Raises OSError."""
    system.landlock_allow(interpreter.RULES_FD, path, system.FS_EXECUTE | system.FS_READ_FILE)


def _listed(execution: Execution) -> list[str]:
    """What there is of what the lists name, each once."""
    listed = [path for path in execution.programs or () if os.path.isfile(path)]
    for prefix in execution.prefixes:
        listed += [path for path in _named_by(prefix) if os.path.exists(path)]
    return list(dict.fromkeys(listed))


def _named_by(prefix: str) -> list[str]:
    """What there is of paths that begin so."""
    folder, _, start = prefix.rpartition("/")
    folder = folder or "/"
    if not start:
        return [folder, *links(folder)]
    try:
        return [entry.path for entry in os.scandir(folder) if entry.name.startswith(start)]
    except OSError:
        return []


@functools.cache
def links(folder: str) -> tuple[str, ...]:
    """Files outside a folder to which links in it lead: a rule for the folder covers what lies in it, and not these."""
    try:
        found = [os.path.realpath(entry.path) for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return ()
    own = os.path.realpath(folder) + "/"
    return tuple(path for path in dict.fromkeys(found) if not path.startswith(own) and os.path.isfile(path))


def close(execution: Execution, writable: list[str], inputs: str) -> None:
    """Let nothing be executed that is neither of the image nor named, by noexec: the loader runs any file it can map.

    writable: what of the guest's own the program can write to. inputs: where its files lie.
    """
    closed = [*writable, *execution.mounts]
    if not execution.alone:
        closed.append(inputs)
    if execution.programs is not None:
        closed = _open_listed(_listed(execution), closed)
    program = execution.program
    if program and inputs in closed and program.startswith(f"{inputs}/"):
        # A mount of its own leaves the rest of the folder closed.
        system.mount(program, program, "", system.MS_BIND)
    for place in closed:
        system.change_mount(place, system.MS_NOEXEC)


def _open_listed(listed: list[str], places: list[str]) -> list[str]:
    """Make what is listed in those places mounts of their own, before these are closed; which of them to close."""
    listed = sorted(os.path.realpath(path) for path in listed)
    places = list(places)
    closed = [place for place in places if not any(_within(place, path) for path in listed)]
    for path in listed:
        holding = max((place for place in places if _within(path, place)), key=len, default=None)
        if holding in closed:
            folder = os.path.isdir(path)
            for one in (path, *([] if folder else _elsewhere(path, holding, places))):
                system.mount(one, one, "", system.MS_BIND | system.MS_REC)
                if not folder:  # it is what it was at the start, wherever it could be changed
                    system.change_mount(one, system.MS_RDONLY)
            places.append(path)
    return closed


def _elsewhere(path: str, holding: str, places: list[str]) -> list[str]:
    """Where else among these mounts the file at *path*, in the mount *holding*, is: one folder may be mounted twice."""
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
    """Of every mount, by its place: the disk, and the folder of it that is mounted there."""
    found = {}
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            disk, top, place = (_plain(word) for word in line.split(b" ")[2:5])
            found[place] = disk, top  # of two at one place the later covers the other
    return found


def _plain(word: bytes) -> str:
    """A word of mountinfo, in which blanks and the like are octal."""
    first, *rest = word.split(b"\\")
    return os.fsdecode(first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest))


def _within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
