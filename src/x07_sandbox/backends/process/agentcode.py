"""The zip with the agent's code for the host's own interpreter, cached. Guest images contain the same code."""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from x07_sandbox.backends.process.view import PYTHON, System, this_system, view_args
from x07_sandbox.errors import HostError
from x07_sandbox.host.paths import cache_folder, replace_file
from x07_sandbox.host.verdicts import file_state
from x07_sandbox.images.guestcode import FILTERS, PACK, PLACES, GuestCode, read_guest_code
from x07_sandbox.jail.bwrap import BWRAP

_BUILD_S: Final = 120
_KEEP: Final = 8  # other versions may be in use
# Paths that change when programs are installed or removed.
_CHANGES: Final = ("/var/lib/dpkg/status", "/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/libexec", "/etc/ld.so.cache")


def agent_code(*, confined: bool) -> Path:
    """Return the path of the agent's zip. confined: whether to include its seccomp filters. Raises HostError."""
    code, folder = read_guest_code(), cache_folder("agent")
    key = _key(code, confined=confined)
    for path in folder.glob(f"{key}-*.zip"):
        if path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
            return path
        path.unlink(missing_ok=True)  # damaged
    data = _build(code, this_system(), confined=confined)
    path = folder / f"{key}-{hashlib.sha256(data).hexdigest()}.zip"
    replace_file(path, data)
    for old in sorted(folder.glob("*.zip"), key=lambda one: one.stat().st_mtime)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def _key(code: GuestCode, *, confined: bool) -> str:
    """Return a digest of everything that the zip depends on."""
    parts: list[object] = [code.digest, confined, os.uname().machine]
    for path in (PYTHON, *(_CHANGES if confined else ())):
        try:
            parts.append(file_state(path))
        except OSError:
            parts.append(path)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(code: GuestCode, system: System, *, confined: bool) -> bytes:
    with tempfile.TemporaryDirectory(prefix="agent-", dir=cache_folder("tmp")) as name:
        work = Path(name)
        data, target = work / "data", work / "agent.zip"
        data.mkdir()
        for file, content in (code.tools | {f"agent/x07_sandbox/{at}": it for at, it in code.agent.items()}).items():
            path = work / "source" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if confined:
            _run(_in_view(system, work, [f"/x07/source/{FILTERS}", "/x07/data"]))
            _run(_in_view(system, work, [f"/x07/source/{PLACES}", "/x07/data/places.json"]))
        script = [str(work / "source" / PACK), str(work / "source" / "agent"), str(data), str(target)]
        _run([PYTHON, "-I", "-S", *script])
        return target.read_bytes()


def _in_view(system: System, work: Path, script: list[str]) -> list[str]:
    """Return the command that runs *script* in the file system of a confined program, with *work* at /x07."""
    argv = [BWRAP, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--proc", "/proc"]
    argv += ["--dev", "/dev", *view_args(system), "--bind", str(work), "/x07", "--chdir", "/"]
    return [*argv, "--", PYTHON, "-I", "-S", *script]


def _run(argv: list[str]) -> None:
    env, no_input = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}, subprocess.DEVNULL
    try:
        done = subprocess.run(argv, stdin=no_input, capture_output=True, timeout=_BUILD_S, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HostError("cannot prepare the agent", f"{argv[0]} failed with {exc}", "Run x07 doctor") from exc
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        why = said or f"{argv[0]} exited with status {done.returncode}"
        raise HostError("cannot prepare the agent", why, "Allow user namespaces here, or use another backend")
