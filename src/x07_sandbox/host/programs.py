"""Where this host's programs are, and the environment of programs that inherit the caller's variables."""

import os
from pathlib import Path
from typing import Final

from x07_sandbox.host.paths import is_file

SYSTEM: Final = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
FOLDERS: Final = (*SYSTEM, "/usr/local/bin", "/opt/homebrew/bin")
# Variables that make programs load code: those of the dynamic loader, of shells and of interpreters.
_LOADING: Final = ("BASH_", "DYLD_", "ENV=", "LD_", "PERL", "PYTHON")


def find_program(name: str) -> str | None:
    """Return the absolute path of the program *name*, itself an absolute path or a name in FOLDERS; None if missing.

    PATH is never searched, because it may name the current folder, or a folder that a sandboxed program can change.
    """
    places = [name] if name.startswith("/") else [f"{folder}/{name}" for folder in FOLDERS if "/" not in name]
    return next((place for place in places if is_file(Path(place)) and os.access(place, os.X_OK)), None)


def inherited_environment() -> dict[str, str]:
    """Return this process's variables without those that make programs load code, and with PATH naming SYSTEM."""
    kept = {name: value for name, value in os.environ.items() if not f"{name}=".startswith(_LOADING)}
    return kept | {"PATH": ":".join(SYSTEM)}
