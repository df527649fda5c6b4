"""Print the size of the sources, of what commands load of them, of the tests and of the docs. It checks nothing.

python -m scripts.house [--json]        in an environment that has x07-sandbox; VMs need an image
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ROOT: Final = Path(__file__).resolve().parent.parent
_SMALL: Final = 80  # lines
_TIMEOUT_S: Final = 300

_MAIN: Final = "from x07_sandbox.cli.main import main\ncode = main(sys.argv[1:])"
_SANDBOX: Final = (
    "from x07_sandbox import Sandbox\nwith Sandbox() as sandbox:\n    code = sandbox.exec(['true']).exit_code"
)
_LOADED: Final = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "src")!r})
{{action}}
names = [name for name in sys.modules if name.partition(".")[0] == "x07_sandbox"]
print(json.dumps([sys.modules[name].__file__ for name in names]))
sys.exit(code)
"""


def by_room(lines: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the lines and the modules of each room. *lines*: of each module, by its path in the package."""
    rooms: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"lines": 0, "modules": 0})
    for path, count in lines.items():
        room = rooms[path.partition("/")[0]]
        room["lines"] += count
        room["modules"] += 1
    return dict(sorted(rooms.items()))


def small_modules(lines: Mapping[str, int]) -> list[str]:
    """Return the modules below 80 lines; `__init__.py` is not one."""
    return sorted(path for path, count in lines.items() if count < _SMALL and Path(path).name != "__init__.py")


def by_folder(numbers: Mapping[str, int], depth: int) -> dict[str, int]:
    """Return the sum of each folder. *numbers*: by path. Folders below *depth* parts are part of the one above."""
    sums: defaultdict[str, int] = defaultdict(int)
    for path, number in numbers.items():
        sums["/".join(path.split("/")[:-1][:depth]) or "."] += number
    return dict(sorted(sums.items()))


def _counted(folder: Path, paths: Iterable[Path], count: Callable[[str], int]) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): count(path.read_text(encoding="utf-8")) for path in paths}


def _lines(text: str) -> int:
    return text.count("\n")


def _words(text: str) -> int:
    return len(text.split())


def sources() -> dict[str, Any]:
    """Measure src/x07_sandbox."""
    package = ROOT / "src" / "x07_sandbox"
    lines = _counted(package, package.rglob("*.py"), _lines)
    longest = max(lines, key=lambda path: lines[path])
    return {
        "rooms": by_room(lines),
        "lines": sum(lines.values()),
        "modules": len(lines),
        "small_modules": len(small_modules(lines)),
        "longest_module": {"path": longest, "lines": lines[longest]},
    }


def tests() -> dict[str, dict[str, int]]:
    """Measure each folder of tests; seconds: as recorded by `pytest --record-durations`."""
    lines = by_folder(_counted(ROOT, (ROOT / "tests").rglob("*.py"), _lines), 2)
    record = ROOT / "tests" / "durations.json"
    times: dict[str, int] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    seconds = by_folder(times, 2)
    return {
        folder: {"lines": count} | ({"seconds": seconds[folder]} if folder in seconds else {})
        for folder, count in lines.items()
    }


def docs() -> dict[str, int]:
    """Return the words in the pages of each folder, generated pages included."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return by_folder(_counted(ROOT, pages, _words), 2)


def _python(code: str, words: Iterable[str], env: Mapping[str, str]) -> str:
    """Return the output of *code*. Raises RuntimeError with the last line of its errors."""
    argv = [sys.executable, "-I", "-c", code, *words]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def _loaded(action: str, words: Iterable[str], env: Mapping[str, str]) -> dict[str, int]:
    files = json.loads(_python(_LOADED.format(action=action), words, env).splitlines()[-1])
    return {"modules": len(files), "bytes": sum(Path(file).stat().st_size for file in files)}


def loads() -> dict[str, dict[str, int] | str]:
    """Measure our modules in the process of a run, of an exec in an open sandbox, and of a sandbox; else the reason."""
    found: dict[str, dict[str, int] | str] = {}

    def measure(name: str, take: Callable[[], dict[str, int]]) -> None:
        try:
            found[name] = take()
        except (RuntimeError, subprocess.TimeoutExpired, ValueError, IndexError) as exc:
            found[name] = str(exc)

    def a_run() -> dict[str, int]:
        _loaded(_MAIN, ["run", str(program)], env)  # whatever is made once is made here
        return _loaded(_MAIN, ["run", str(program)], env)

    def an_exec() -> dict[str, int]:
        name = _python(_LOADED.format(action=_MAIN), ["sandbox", "create"], env).splitlines()[0]
        try:
            return _loaded(_MAIN, ["sandbox", "exec", name, "true"], env)
        finally:
            _loaded(_MAIN, ["sandbox", "close", name], env)

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "quiet.py")
        program.write_text("pass\n", encoding="utf-8")
        env = {**os.environ, "X07_VM_STATE_DIR": str(Path(folder, "jobs"))}
        measure("x07 run", a_run)
        measure("x07 sandbox exec", an_exec)
        measure("Sandbox()", lambda: _loaded(_SANDBOX, [], env))
    return found


def render(measured: Mapping[str, Any]) -> str:
    """Return the measurements as tables."""
    code = measured["sources"]
    longest = code["longest_module"]
    text = [f"{'room of src/x07_sandbox':30}{'lines':>8}{'modules':>9}"]
    text += [f"{room:30}{row['lines']:8}{row['modules']:9}" for room, row in code["rooms"].items()]
    text += [f"{'all':30}{code['lines']:8}{code['modules']:9}", ""]
    text += [f"modules below {_SMALL} lines, without __init__.py: {code['small_modules']}"]
    text += [f"longest module: {longest['path']}, {longest['lines']} lines", ""]
    text += [f"{'our modules loaded by':30}{'modules':>8}{'bytes':>9}"]
    for name, row in measured["loads"].items():
        text += [f"{name:30}{row['modules']:8}{row['bytes']:9}" if isinstance(row, dict) else f"{name:30}{row}"]
    text += ["", f"{'tests':30}{'lines':>8}{'seconds':>9}"]
    for folder, row in measured["tests"].items():
        text += [f"{folder:30}{row['lines']:8}{row.get('seconds', '-'):>9}"]
    rows = measured["tests"].values()
    seconds = sum(row.get("seconds", 0) for row in rows)
    text += [f"{'all':30}{sum(row['lines'] for row in rows):8}{seconds:9}", ""]
    text += [f"{'pages in':30}{'words':>8}"]
    text += [f"{folder:30}{count:8}" for folder, count in measured["docs"].items()]
    text += [f"{'all':30}{sum(measured['docs'].values()):8}"]
    return "\n".join(text)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m scripts.house", description="Print the size of the project.")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    as_json = parser.parse_args().json
    measured = {"sources": sources(), "loads": loads(), "tests": tests(), "docs": docs()}
    print(json.dumps(measured, indent=1) if as_json else render(measured))


if __name__ == "__main__":
    main()
