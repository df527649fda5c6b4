#!/usr/bin/env python3
"""Write docs/specification.md, the promises of the project, and a page for each with the tests that prove it.

What a test proves is its docstring. The script parses the tests and does not import them, so any Python can run it:

    python3 scripts/make_specification.py           write the files
    python3 scripts/make_specification.py --check   exit with 1 if one is stale
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "specification.md"

HEAD = """\
# Specification

x07-sandbox makes eight promises. Each has a page with the tests that prove it. Tests of everything else are not listed.
`scripts/make_specification.py` generates these pages from the tests' docstrings: to change a line, change its test.
"""


@dataclass(frozen=True, slots=True)
class Page:
    """One promise. tests: names of the files that prove it, without `tests/`, `test_` and `.py`; `*` for any text."""

    name: str
    title: str
    text: str
    tests: str


PAGES = (
    Page(
        "fail-closed",
        "Fail closed",
        "Without a VM runtime, without proof that it works, with an unknown field or after a failed check, nothing "
        "runs. Weaker isolation is used only if the user asks for it by name, and the result names the boundary "
        "that was used.",
        """
        contract/* containers/containers process/command unit/backend_selection unit/images_manifest unit/images_verify
        unit/isolated_start unit/manifest unit/policy_decode unit/policy_rules unit/prerequisites unit/project_files
        unit/qemu_proof vm/image_swap vm/odd_hosts vm/proof vm/refusals vm/without_namespaces unit/bundle vm/bundle
        """,
    ),
    Page(
        "policy",
        "The policy is enforced out of the program's reach",
        "For every field of the policy, x07 says in advance who enforces the field, or that it is only advisory.",
        """
        process/confined process/commands unit/channel_* unit/container_commands unit/session* unit/shared_session
        vm/sandbox unit/guest_filters unit/jail_bwrap unit/jail_landlock unit/jail_libraries
        unit/jail_resources unit/policy_controls unit/policy_grants unit/policy_outcomes unit/policy_environment
        unit/policy_explain unit/policy_limits unit/policy_overrides unit/process_backends unit/qemu_machine
        unit/scaling vm/confinement vm/hostile_* vm/jail_filter vm/jail_reach vm/limits vm/outcomes vm/policy_explain
        vm/signals
        """,
    ),
    Page(
        "host-files",
        "The host changes only after the run",
        "A change set is checked, readable, applied atomically and undoable. Entries that are not allowed are left "
        "out, named and kept. If a file was changed on the host meanwhile, nothing is applied.",
        """
        unit/change_rules unit/changes_left_out unit/commands_and_working_folders unit/files_apply unit/files_patch
        unit/files_there_and_back unit/run_host_files unit/run_outputs unit/saved_changes unit/unpack vm/exec
        vm/host_files
        """,
    ),
    Page(
        "network",
        "The egress gate is the only way out",
        "The guest has no network card. Every connection is requested by name, and the host decides about it.",
        """
        fuzz/differential lab/* process/gate_process process/own_limits unit/egress_streams unit/guest_dns
        unit/jail_own_limits unit/network_*
        """,
    ),
    Page(
        "builds",
        "Building is running too",
        "Compilers read hostile input, so they run in a VM of their own without network. One file with a recorded "
        "digest goes on to the VM of the run.",
        """
        unit/artifacts unit/files_pack unit/guest_trees unit/toolchains vm/python_program vm/script_languages
        vm/toolchains vm/x07_programs
        """,
    ),
    Page(
        "nothing-left",
        "Nothing is left behind",
        "Whatever is killed, the next start or `x07 sweep` removes what remains, and never touches anything else.",
        """
        chaos/chaos process/both_backends process/job_commands process/reaper process/sweep_after_kill unit/admission
        unit/host_locks unit/host_processes unit/job_record unit/prune unit/stop_rules unit/sweep vm/forked_children
        vm/full_disk vm/interrupted_calls vm/jail_end vm/many_runs vm/prune vm/sweep
        """,
    ),
    Page(
        "refusals",
        "Every refusal is visible",
        "A denial has a type and a count, and names the line of the policy and the flag that would allow it.",
        """
        unit/codes unit/failure_reports unit/guest_audit unit/policy_hints unit/policy_observed unit/refused_lines
        vm/denials
        """,
    ),
    Page(
        "fast",
        "A job starts fast",
        "A job starts in a clone of a prepared VM: about as quickly as a container without hardware "
        "virtualisation, and in less time with it.",
        """
        unit/bench unit/qemu_template vm/bench vm/boot_timer unit/criu_images vm/clones vm/hot vm/saving vm/imports
        vm/pool vm/python_start
        """,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What one test proves: its file (relative to the project, with slashes), its name, its docstring on one line."""

    file: str
    test: str
    text: str


def promises(root: Path = ROOT) -> Iterator[Promise]:
    """Yield all tests in *root*/tests, by file and position. The text of a test without a docstring is empty."""
    for path in sorted((root / "tests").rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        for test, function in _tests(ast.parse(path.read_bytes(), filename=file)):
            yield Promise(file=file, test=test, text=" ".join((ast.get_docstring(function) or "").split()))


def _tests(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the tests of one module, including those in classes, with pytest's names."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inside = [(f"{node.name}::", child) for child in node.body]
        else:
            inside = [("", node)]
        for prefix, child in inside:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name.startswith("test_"):
                yield prefix + child.name, child


def render(root: Path = ROOT) -> dict[Path, str]:
    """Return the text of docs/specification.md and of each promise's page, by path."""
    every = list(promises(root))
    lines, pages = [HEAD], {}
    for number, page in enumerate(PAGES, start=1):
        patterns = [f"tests/{'/test_'.join(name.rsplit('/', 1))}.py" for name in page.tests.split()]
        proved = [one for one in every if any(fnmatch.fnmatch(one.file, pattern) for pattern in patterns)]
        found = TARGET.with_suffix("") / f"{page.name}.md"
        pages[found] = _page(root, f"# {number}. {page.title}\n\n{page.text}\n", proved)
        lines.append(f"{number}. **{page.title}.** {page.text} [{len(proved)} tests](specification/{page.name}.md)")
    lines += ["", "```{toctree}", ":hidden:", "", *(f"specification/{page.name}" for page in PAGES), "```"]
    return {TARGET: "\n".join(lines) + "\n", **pages}


def _page(root: Path, head: str, proved: list[Promise]) -> str:
    lines = [head]
    for file, tests in itertools.groupby(proved, lambda one: one.file):
        title = ast.get_docstring(ast.parse((root / file).read_bytes())) or ""
        summary = title.partition("\n\n")[0].replace("\n", " ")
        lines.append(f"## {file}\n\n{summary}\n" if summary else f"## {file}\n")
        lines += [f"- {one.text} (`{one.test}`)" for one in tests]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Write the files or compare them; return the exit code."""
    wanted = render()
    if argv == ["--check"]:
        stale = [
            path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        print("The specification is stale: run this script." if stale else "The specification is up to date.")
        return 1 if stale else 0
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
