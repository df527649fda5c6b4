"""List what of the image may be read where only some of its programs may be, run by the image's own interpreter.

    python3 -I -S places.py TARGET

TARGET gets a JSON list of paths: the largest folders without a program in them, and the single files beside programs.
A program is an executable file in a folder of programs, or an executable ELF program anywhere: the loader would run it
without the kernel's check. Scripts elsewhere are data: what may run them is a program.
"""

import json
import os
import stat
import struct
import sys
from pathlib import Path

# Folders of the root that are the machine's own, or hold nothing of the image.
NOT_OURS = frozenset({"dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "x07"})
PROGRAM_FOLDERS = frozenset({"bin", "sbin", "libexec", "games"})
_HEADER = struct.Struct("<16xH14xQ14xHH")  # e_type, e_phoff, e_phentsize, e_phnum of a 64-bit file
_EXEC, _DYN = 2, 3  # elf.h: ET_*
_INTERP = 3  # PT_INTERP


def is_elf_program(path: str) -> bool:
    """Whether it is one of its own: not a library, though some of those can be executed too."""
    if ".so" in os.path.basename(path):
        return False
    with Path(path).open("rb") as file:
        head = file.read(64)
        if len(head) < _HEADER.size or not head.startswith(b"\x7fELF\x02"):
            return False
        kind, offset, size, count = _HEADER.unpack_from(head)
        if kind not in {_EXEC, _DYN} or not size:
            return False
        file.seek(offset)
        table = file.read(size * count)
    return kind == _EXEC or any(
        int.from_bytes(table[at : at + 4], "little") == _INTERP for at in range(0, len(table), size)
    )


def readable(folder: str, *, programs: bool) -> tuple[bool, list[str]]:
    """Whether there is no program in *folder*, and the paths that may be read. programs: it lies in such a folder."""
    found: list[str] = []
    whole = True
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            inner, paths = readable(entry.path, programs=programs or entry.name in PROGRAM_FOLDERS)
            whole &= inner
            found += paths
        elif entry.is_file(follow_symlinks=False):
            executable = entry.stat(follow_symlinks=False).st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
            if executable and (programs or is_elf_program(entry.path)):
                whole = False
            else:
                found.append(entry.path)
    return whole, [folder] if whole else found


def main(target: str) -> None:
    """Write the list."""
    paths: list[str] = []
    for entry in sorted(os.scandir("/"), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and entry.name not in NOT_OURS:
            paths += readable(entry.path, programs=entry.name in PROGRAM_FOLDERS)[1]
    Path(target).write_text(json.dumps(paths), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
