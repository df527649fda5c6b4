"""Structure of the sources: imports, the guest's modules, sizes, and forbidden text."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import grimp
import pytest

from x07_sandbox.host.arch import ARCHES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "x07_sandbox"
MODULES = sorted(SOURCE.rglob("*.py"))
# See CONTRIBUTING.md.
MOST_LINES = 700

# Made, fetched or private: nothing here is the project's own text.
NOT_OURS = {".git", "__pycache__", "build", "dist", "node_modules"}


def our_files() -> list[Path]:
    """Every text file of the project; works without git, as in an unpacked archive."""
    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in NOT_OURS
            and not name.endswith((".egg-info", "_cache"))
            and (not name.startswith(".") or name == ".ci")
        ]
        found += [Path(folder, name) for name in names if not name.endswith(".pyc")]
    return sorted(path for path in found if path.is_file() and b"\0" not in path.read_bytes()[:8192])


def project() -> dict[str, object]:
    """The parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shown(paths: list[str]) -> str:
    """A list for a failure message, one item a line."""
    return "\n" + "\n".join(paths)


def name_of(path: Path) -> str:
    """The path relative to the project."""
    return path.relative_to(ROOT).as_posix()


def test_imports_point_down() -> None:
    """No room imports one above it, and the guest stands apart."""
    # A process of its own, and no cache: import-linter keeps its settings in the process, and writes into the folder.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    """No import cycles exist, even through imports inside functions and imports for types."""
    graph = grimp.build_graph("x07_sandbox", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as exc:
        pytest.fail(" imports ".join(reversed(exc.args[1])))


def test_every_backend_is_behind_the_registry() -> None:
    """Only the registry may import a backend, whether that is a module or a package."""
    match project():
        case {
            "tool": {"importlinter": {"contracts": [_, _, {"protected_modules": list(protected), **rest}, shared, *_]}}
        }:
            registry, room = "x07_sandbox.backends.registry", "x07_sandbox.backends."
            graph = grimp.build_graph("x07_sandbox", cache_dir=None)
            imported = {name for name in graph.find_modules_directly_imported_by(registry) if name.startswith(room)}
            # A backend is a module, or a package with a module `backend`.
            backends = {name.removesuffix(".backend") for name in imported} - {f"{room}base"}
            packages = {f"{room}{path.parent.name}" for path in SOURCE.glob("backends/*/__init__.py")}
            assert {*protected, *shared["protected_modules"]} == backends | packages
            assert rest["allowed_importers"] == [registry]
            assert set(shared["allowed_importers"]) <= {*backends, *packages, registry}
        case _:
            pytest.fail("pyproject.toml: the third contract lists the backends")


def test_every_room_is_forbidden_to_the_guest_but_channel() -> None:
    """The guest may import only channel, errors, kernel and libseccomp."""
    match project():
        case {"tool": {"importlinter": {"contracts": [_, {"forbidden_modules": list(forbidden)}, *_]}}}:
            rooms = {f"x07_sandbox.{path.parent.name}" for path in SOURCE.glob("*/__init__.py")}
            assert set(forbidden) == rooms - {"x07_sandbox.guest", "x07_sandbox.channel"} | {"x07_sandbox.options"}
        case _:
            pytest.fail("pyproject.toml: the second contract lists what the guest may not import")


@pytest.mark.parametrize("room", ["guest", "channel", "errors", "kernel", "libseccomp"])
def test_the_guest_side_uses_only_the_standard_library(room: str) -> None:
    """What runs in the guest uses only the standard library."""
    paths = sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]
    names = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "known = sys.stdlib_module_names | {'x07_sandbox', '__main__'}\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - known))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_no_module_is_too_long() -> None:
    """Every module is at most 700 lines long."""
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_there_are_no_notes_to_self() -> None:
    """No comment marks unfinished work."""
    # Put together here, so that this file does not find itself.
    notes = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in our_files()
        if path.suffix in {".py", ".sh", ".c", ".toml"} or path.parent.name == ".ci"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if notes.search(line)
    ]
    assert not found, shown(found)


def test_no_file_names_a_place_on_a_developers_machine() -> None:
    """No file contains an absolute path of the development machine."""
    place = b"/wo" + b"rk/"
    found = [name_of(path) for path in our_files() if place in path.read_bytes()]
    assert not found, shown(found)


def tests_of(path: Path) -> Iterator[tuple[str, str]]:
    """The tests of a file, also in classes, with pytest's names; and the docstring of each on one line."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inside = [(f"{node.name}::", child) for child in node.body]
        else:
            inside = [("", node)]
        for prefix, child in inside:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name.startswith("test_"):
                yield prefix + child.name, " ".join((ast.get_docstring(child) or "").split())


def test_every_test_states_its_promise_in_one_sentence() -> None:
    """Every test's docstring is one sentence."""
    wrong = [
        f"{name_of(path)}::{test}: {text!r}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for test, text in tests_of(path)
        if not text.endswith(".") or re.search(r"[.!?] [A-Z]", text)
    ]
    assert not wrong, shown(wrong)


@pytest.mark.parametrize("name", ["runtime", "dev"])
def test_requirements_are_pinned_by_hash_and_name_no_index(name: str) -> None:
    """Every Python dependency is pinned by version and hash, without an index URL."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert not re.search(r"(?m)://|^\s*-", re.sub(r"(?m)^ +--hash=sha256:[0-9a-f]{64}", "", text))
    entries = [entry for entry in re.split(r"\n(?=[a-zA-Z])", re.sub(r"(?m)^ *#.*\n", "", text)) if entry.strip()]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^\s;]+( ; [^\\]+)? \\\n", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry


def test_the_lock_covers_what_the_package_declares() -> None:
    """The lock files are made from the ranges of pyproject.toml."""
    lines = (ROOT / "requirements" / "runtime.in").read_text(encoding="utf-8").splitlines()
    ranges = {line for line in lines if line and not line.startswith("#")}
    match project():
        case {"project": {"dependencies": list(declared)}, "build-system": {"requires": list(builds)}}:
            assert ranges == {*declared, *builds}
        case _:
            pytest.fail("pyproject.toml declares no dependencies")
    pins = {
        name: set(re.findall(r"(?m)^[a-z][^\\]*", (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")))
        for name in ("runtime", "dev")
    }
    assert pins["runtime"] <= pins["dev"]


def test_the_scripts_install_the_qemu_of_the_one_table_of_architectures() -> None:
    """The set-up scripts install the QEMU package of the architecture table."""
    script = (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8")
    installed = dict(re.findall(r"(?m)^ +([a-z0-9_]+)\) echo (qemu-[a-z0-9-]+) ;;$", script))
    assert installed == {name: arch.qemu_package for name, arch in ARCHES.items()}
