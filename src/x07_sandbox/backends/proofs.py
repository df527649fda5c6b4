"""Where it is kept what was proven of this host by starting something."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from x07_sandbox.host.paths import cache_folder
from x07_sandbox.host.processes import boot_id


def proof_file(program: str, *parts: object) -> Path:
    """The file for this boot, kernel and *program* (its path), and for *parts*, which JSON can hold.

    Raises HostError for a folder that cannot be used.
    """
    info, host = Path(program).stat(), os.uname()
    key = [boot_id(), host.release, host.version, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, *parts]
    return cache_folder("proofs") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
