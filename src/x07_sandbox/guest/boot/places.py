"""List the paths in the image that stay readable under an execution list; run by the image's own interpreter.

    python3 -I -S places.py TARGET

The program writes a JSON list of the topmost folders without programs, and of single files beside programs. A program
is an executable file in a program folder, or an executable ELF program anywhere: the loader could run the latter
without the kernel's check. Scripts elsewhere are data, since running them takes an interpreter, which is a program.
"""

import json
import os
import stat
import struct
import sys
from pathlib import Path

# Top-level folders that are not taken from the image.
NOT_OURS = frozenset({"dev", "home", "media", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "x07"})
PROGRAM_FOLDERS = frozenset({"bin", "sbin", "libexec", "games"})
_HEADER = struct.Struct("<16xH14xQ14xHH")  # e_type, e_phoff, e_phentsize, e_phnum of a 64-bit file
_EXEC, _DYN = 2, 3  # elf.h: ET_*
_INTERP = 3  # PT_INTERP


def is_elf_program(path: str) -> bool:
    """Return whether a file is an ELF program, and not a library."""
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
    """Return whether *folder* has no programs, and its readable paths. programs: whether it is a program folder."""
    found: list[str] = []
    whole = True
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_symlink() and not os.access(entry.path, os.R_OK):  # on a host, as an ordinary user
            whole = False
            continue
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
    """Write the list of folders without programs, and of files beside programs, to the file *target*."""
    paths: list[str] = []
    for entry in sorted(os.scandir("/"), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and entry.name not in NOT_OURS:
            paths += readable(entry.path, programs=entry.name in PROGRAM_FOLDERS)[1]
    Path(target).write_text(json.dumps(paths), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
