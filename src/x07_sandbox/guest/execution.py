"""What programs may call and execute: seccomp filters, and execution lists of the policy.

The filters are files of the image (`guest/boot/filters`), as are the paths that are always readable. Init applies the
lists with Landlock and noexec mounts.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import struct
import sys
from typing import Any, Final, NamedTuple

from x07_sandbox import kernel
from x07_sandbox.guest import system, waiting

BASE: Final = "base"
QUIET: Final = "quiet"  # its refusals are not audited
ONCE: Final = "-once"  # suffix of a filter that allows one execve
_LINE: Final = struct.Struct("=HBBI")
_WORD: Final = 4
_MARKERS: Final = (0x5AFE7012, 0x5AFE7011, 0x5AFE7014, 0x5AFE7013, 0x5AFE7016, 0x5AFE7015)  # in the token's byte order


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


def filter_name(*, threads: bool, spawn: bool, execute: bool) -> str:
    """Return the name of the filter that forbids every argument that is False, or "" if all are True."""
    words = (not threads and "no-threads", not spawn and "no-spawn", not execute and "no-exec")
    return "-".join(word for word in words if word)


def all_filters() -> dict[str, bytes]:
    """Return every filter's BPF code by name. Raises OSError."""
    names = [BASE, QUIET]
    for threads, spawn, execute in itertools.product((False, True), repeat=3):
        if name := filter_name(threads=threads, spawn=spawn, execute=execute):
            names += [name] if execute else [name, f"{name}{ONCE}"]
    return {name: _data(f"{name}.bpf") for name in names}


def readable_places() -> list[str]:
    """Return the folders and files in the image that contain no program."""
    places: list[str] = json.loads(_data("places.json"))
    return places


def call_numbers() -> tuple[dict[str, int], dict[str, int]]:
    """Return system call numbers by name: first those of audited calls, then those of calls that filters refuse."""
    numbers = json.loads(_data("calls.json"))
    return numbers["audited"], numbers["refused"]


def split_at_token(code: bytes) -> tuple[list[bytes], list[int]]:
    """Split a filter at its markers. Return the pieces, and each marker's index in them. Raises ValueError."""
    values = [value for *_, value in _LINE.iter_unpack(code)]
    found = sorted((values.index(marker), number) for number, marker in enumerate(_MARKERS) if marker in values)
    if len(found) != len(_MARKERS) or sum(value in _MARKERS for value in values) != len(_MARKERS):
        raise ValueError("the filter does not contain each marker exactly once")
    pieces: list[bytes] = []
    done = 0
    places = [0] * len(_MARKERS)
    for line, number in found:
        end = (line + 1) * _LINE.size
        places[number] = len(pieces) + 1
        pieces += [code[done : end - _WORD], code[end - _WORD : end]]
        done = end
    return [*pieces, code[done:]], places


def with_token(pieces: list[bytes], places: list[int], token: bytes) -> bytes:
    """Join the pieces of a filter, with the words of *token* in place of its markers."""
    made = list(pieces)
    for number, place in enumerate(places):
        made[place] = token[number * _WORD : (number + 1) * _WORD]
    return b"".join(made)


def restrict_self(filter_code: bytes, rules_fd: int) -> None:
    """Apply a seccomp filter, empty for none, and a Landlock ruleset, -1 for none. Raises OSError."""
    if rules_fd >= 0:
        kernel.landlock_restrict(rules_fd)
    if filter_code:
        kernel.load_filter(filter_code, audited=True)


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


def _data(name: str) -> bytes:
    loader: Any = sys.modules["x07_sandbox"].__spec__.loader  # type: ignore[union-attr] # the agent's zip
    data: bytes = loader.get_data(f"{loader.archive}/data/{name}")
    return data
