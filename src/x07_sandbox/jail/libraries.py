"""The files that a dynamically linked program needs, which are the only files in its jail."""

import re
import subprocess

from x07_sandbox.errors import HostError
from x07_sandbox.host.verdicts import Verdict, file_state

_LDD = "/usr/bin/ldd"
_LINE = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$")


def needed_files(binary: str) -> tuple[str, ...]:
    """Return the absolute paths of *binary*, its shared libraries and its loader. Raises HostError.

    ldd(1) is slow, so the result is cached for this boot, until the binary or the library cache (ld.so.cache) changes.
    """
    try:
        verdict = Verdict("libraries", binary, key=(file_state(binary), file_state("/etc/ld.so.cache")))
    except OSError as exc:
        fix = "Run x07 doctor to see what is missing"
        raise HostError(f"cannot find {binary}", exc.strerror or str(exc), fix) from exc
    return tuple(verdict.read_or_make(lambda: {"files": _ask(binary)})["files"])


def _ask(binary: str) -> list[str]:
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    done = subprocess.run(
        [_LDD, binary], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False, env=env
    )
    if done.returncode == 1 and "not a dynamic executable" in done.stdout + done.stderr:
        return [binary]  # linked statically
    if done.returncode != 0:
        why = done.stderr.strip()[:200] or "ldd failed"
        raise HostError(f"cannot list the libraries of {binary}", why, "Reinstall its package")
    found = [match.group(1) for line in done.stdout.splitlines() if (match := _LINE.match(line))]
    return [binary, *dict.fromkeys(found)]
