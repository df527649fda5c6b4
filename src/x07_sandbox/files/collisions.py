"""Names that are two in the machine and would be one on the host, in a folder that takes no notice of case.

Such a folder (casefold of ext4, vfat, a share) gives what lies under one spelling for every other: of two files that
differ in case only the second would take the place of the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import posixpath
import struct
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from x07_sandbox.files.changes import Refused, shown
from x07_sandbox.files.protected import folded
from x07_sandbox.files.things import ident_of
from x07_sandbox.host import beneath

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from x07_sandbox.files.changes import Change

_GET_FLAGS: Final = 0x80086601  # FS_IOC_GETFLAGS of a 64-bit kernel (linux/fs.h)
_CASEFOLD: Final = 0x40000000


def knows_no_case(root: str) -> bool:
    """Whether that folder, or the one in which it is to be made, takes names for one that differ in case only.

    As far as can be told without making anything: by its flag, or by what lies in it. Of an empty folder of a file
    system that has no such flag it cannot be told, and a folder below may have a flag of its own: there applying finds
    a conflict, and undoes what it has done.
    """
    for path in (root, posixpath.dirname(root)):
        try:
            fd = beneath.open_root(path)
        except FileNotFoundError:
            continue
        except OSError:  # a single file: nothing can collide
            break
        try:
            return _is_casefold(fd) or folds(_listed(fd), functools.partial(ident_of, fd))
        except OSError:
            break
        finally:
            os.close(fd)
    return False


def _is_casefold(fd: int) -> bool:
    with contextlib.suppress(OSError):  # most file systems have other flags or none
        (flags,) = struct.unpack("=I", fcntl.ioctl(fd, _GET_FLAGS, bytes(4)))
        return bool(flags & _CASEFOLD)
    return False


def _listed(fd: int) -> list[str]:
    return os.listdir(fd)


def folds(names: Collection[str], ident: Callable[[str], object]) -> bool:
    """Whether one of *names*, all that lie in a folder, is found under a spelling that is none of them.

    ident: what lies under a name, None for nothing. One of them is asked about: the others would say the same.
    """
    known = set(names)
    for name in names:
        other = name.swapcase()
        if other not in known and name.isascii():
            return ident(other) is not None and ident(other) == ident(name)
    return False


def collisions(changes: Iterable[Change], there: Iterable[str]) -> Iterator[Refused]:
    """What is new of *changes* and would be one with another name of the same folder, in order.

    there: all other names, of what lies there now and of what is to be.
    """
    new = [change.name for change in changes if change.before is None]
    spelled: dict[str, set[str]] = defaultdict(set)
    for name in {*there, *new}:
        folder, _, part = name.rpartition("/")
        spelled[posixpath.join(folder, folded(part))].add(name)
    for name in new:
        folder, _, part = name.rpartition("/")
        if others := spelled[posixpath.join(folder, folded(part))] - {name}:
            why = f"its folder would take it for {shown(min(others))}: names that differ in case only are one there"
            yield Refused(name=name, rule="kind", why=why)
