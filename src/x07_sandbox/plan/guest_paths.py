"""Where folders of the host lie in the guest: pure, and the same for the plan and for whoever puts them there.

Places are those of X07: an absolute root has the same path in the guest, a relative one lies
below the folder where the program starts.
"""

from __future__ import annotations

import os
from typing import Final

PROGRAM: Final = "/opt/x07"
WORK: Final = f"{PROGRAM}/work"  # the folder of --workdir
OUT: Final = "/x07/out"
WRITABLE: Final = ("/tmp", "/dev/shm", PROGRAM, OUT)  # noqa: S108 - the guest's own
# The guest's own tree: nothing of the host's may lie in it, above it or over it.
_SYSTEM: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/lost+found", "/opt/x07", "/proc"),
    *("/run", "/sbin", "/sys", "/usr", "/var", "/x07"),
)
_OVER: Final = ("/tmp", "/opt")  # noqa: S108 - the guest's own; something in them may be of the host, not all of them


def guest_path(given: str, start: str, *, deny_hidden: bool) -> tuple[str | None, str]:
    """Where a root of that name lies in the guest, a normal path, or None and why there is no place for it.

    start: PROGRAM, WORK, or the folder where a project starts. Pure.
    """
    if not given or "\0" in given:
        return None, "it names nothing"
    if deny_hidden and any(part.startswith(".") and part not in {".", ".."} for part in given.split("/")):
        return None, "it is hidden, and fs.deny_hidden is true"
    if given.startswith("/"):
        path = "/" + os.path.normpath(given).lstrip("/")
        own = next((own for own in _SYSTEM if path == own or is_below(path, own) or is_below(own, path)), None)
        if own is None and path in _OVER:
            own = path
        return (path, "") if own is None else (None, f"it would lie over {own}, which is the machine's own")
    relative = os.path.normpath(given)
    if relative == ".." or relative.startswith("../"):
        return None, "it leads out of the folder that it is relative to: name it by its absolute path"
    return os.path.normpath(f"{start}/{relative}"), ""


def is_below(path: str, folder: str) -> bool:
    """Whether a normal path lies below another."""
    return path.startswith(folder.rstrip("/") + "/")
