"""Guest paths of host folders, by the X07 language's rules.

An absolute root has the same path in the guest. A relative root is below the folder where the program starts.
"""

import os
from typing import Final

PROGRAM: Final = "/opt/x07"
WORK: Final = f"{PROGRAM}/work"  # the folder of --workdir
OUT: Final = "/x07/out"
WRITABLE: Final = ("/tmp", "/dev/shm", PROGRAM, OUT)  # noqa: S108 - the guest's own
# The guest's own tree: no host folder may be inside, above or on top of it.
_SYSTEM: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/lost+found", "/opt/x07", "/proc"),
    *("/run", "/sbin", "/sys", "/usr", "/var", "/x07"),
)
_NOT_ON_TOP: Final = ("/tmp", "/opt")  # noqa: S108 - host folders may be inside, not on top


def guest_path(given: str, start: str, *, deny_hidden: bool) -> tuple[str | None, str]:
    """Return a root's guest path, or None and why it has none. start: PROGRAM, WORK or a project's start folder."""
    if not given or "\0" in given:
        return None, "it is not a path"
    if deny_hidden and any(part.startswith(".") and part not in {".", ".."} for part in given.split("/")):
        return None, "it is hidden and fs.deny_hidden is true"
    if given.startswith("/"):
        path = "/" + os.path.normpath(given).lstrip("/")
        own = next((own for own in _SYSTEM if path == own or is_below(path, own) or is_below(own, path)), None)
        if own is None and path in _NOT_ON_TOP:
            own = path
        return (path, "") if own is None else (None, f"it overlaps the sandbox's own {own}")
    relative = os.path.normpath(given)
    if relative == ".." or relative.startswith("../"):
        return None, "a relative path must stay below the folder where the program starts; use an absolute path"
    return os.path.normpath(f"{start}/{relative}"), ""


def is_below(path: str, folder: str) -> bool:
    """Return whether *path* is below *folder*. Both are normalized."""
    return path.startswith(folder.rstrip("/") + "/")
