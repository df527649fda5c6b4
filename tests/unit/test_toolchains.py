"""The table of toolchains: selection, build and start commands."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import RefusedError, UsageError
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.hints import ImageInUse
from x07_sandbox.programs.project import FILE, SCHEMA, decode_manifest, sandbox_manifest
from x07_sandbox.programs.toolchains import (
    ARTIFACT,
    BY_NAME,
    MAKEFILES,
    OUTPUT,
    TOOLCHAINS,
    Source,
    Toolchain,
    check_executable,
    describe,
    require_packages,
    toolchain_for,
    toolchain_named,
)
from x07_sandbox.sessions.denials import missing_interpreter
from x07_sandbox.sessions.request import Program, RunCaller, RunRequest, load_program
from x07_sandbox.sessions.transfers import InFile

ROOT = Path(__file__).resolve().parents[2]
EACH = pytest.mark.parametrize("row", TOOLCHAINS, ids=lambda row: row.name)
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62)


@pytest.mark.parametrize(
    ("name", "head", "toolchain"),
    [
        ("dir.py/a.cxx", b"", "cpp"),
        ("a.py", b"#!/bin/sh", "python"),
        ("a.out", ELF, "executable"),
        ("prog", b"#!/usr/bin/perl", "executable"),
    ],
)
def test_a_source_gets_its_toolchain(name: str, head: bytes, toolchain: str) -> None:
    """A source's suffix, then its first bytes, select its toolchain."""
    assert toolchain_for(name, head).name == toolchain


@pytest.mark.parametrize("name", ["a.txt", "a", "a.zig", "Makefile", "a.py.bak"])
def test_an_unknown_source_is_wrong_usage(name: str) -> None:
    """An unknown kind of source is a usage error that lists the suffixes."""
    with pytest.raises(UsageError, match=r"\.py.*--toolchain"):
        toolchain_for(name, b"hello")


def test_an_unknown_toolchain_lists_the_known_ones() -> None:
    """An unknown toolchain is a usage error that lists the known ones."""
    with pytest.raises(UsageError, match=", ".join(row.name for row in TOOLCHAINS)):
        toolchain_named("rust")


# every row


@EACH
def test_every_suffix_names_one_toolchain(row: Toolchain) -> None:
    """Every suffix, in any case, belongs to one toolchain."""
    for suffix in row.suffixes:
        assert toolchain_for(f"a{suffix}", b"#!/bin/sh") is toolchain_for(f"a{suffix.upper()}") is row


@EACH
def test_every_toolchain_runs_a_text_or_needs_a_project(row: Toolchain) -> None:
    """Every toolchain runs a source text, or says that it needs a project."""
    text = b"#!/bin/sh\n" if row.name in {"shell", "executable"} else b"x"
    with contextlib.ExitStack() as stack, contextlib.closing(Cancel()) as cancel:
        request, caller = RunRequest(source=text, toolchain=row.name), RunCaller(cancel=cancel)
        if row.artifact:
            with pytest.raises(UsageError, match=f"the toolchain {row.name} needs a project"):
                load_program(request, caller, stack)
            return
        _, program = load_program(request, caller, stack)
    assert program.source.name == f"main{row.suffixes[0] if row.suffixes else ''}"
    assert row.start(program.source)[-1] == (f"/x07/in/program/{program.source.name}" if row.packs else ARTIFACT)
    assert row.build is None or row.build(program.source)[0].startswith("/")


@EACH
def test_every_toolchain_has_a_manifest(row: Toolchain) -> None:
    """`x07 init` writes a valid manifest for every toolchain."""
    if not row.project_files:
        data = f'schema_version = "{SCHEMA}"\ntoolchain = "{row.name}"\nfiles = ["a"]\nentry = "a"\n'.encode()
    else:
        files = MAKEFILES[:1] if row.artifact else [f"sub/other{row.suffixes[0]}", f"tool{row.suffixes[-1]}"]
        data = sandbox_manifest(row.name, files, artifact="prog")
    manifest, found = decode_manifest(data, source=FILE)
    assert found is row
    assert (manifest.entry is None, manifest.artifact is None) == (row.entries is None, not row.artifact)
    takes_args = not (row.packs or row.build is None)
    with contextlib.nullcontext() if takes_args else pytest.raises(UsageError, match=r"cannot have \[build\] args"):
        decode_manifest(data + b'[build]\nargs = ["-g"]\n', source=FILE)


@EACH
def test_every_toolchain_names_the_packages_that_an_image_lacks(row: Toolchain) -> None:
    """An image without a toolchain's packages is refused with the command that adds them."""
    if row.needs:
        command = f"x07 image build --name small --include htop,{','.join(row.needs)}"
        with pytest.raises(RefusedError) as caught:
            require_packages(row, {"htop"}, lambda: ImageInUse("small", ("htop",)))
        assert f"the image small cannot run {row.name} programs" in str(caught.value)
        assert str(caught.value).endswith(f"Run: {command}")
    require_packages(row, set(row.needs), ImageInUse)


@EACH
def test_every_toolchain_is_documented(row: Toolchain) -> None:
    """Every toolchain and suffix is documented."""
    page = (ROOT / "docs" / "reference" / "programs.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{row.name}` |")]
    assert all(f"`{suffix}`" in line for suffix in row.suffixes)
    assert all(word in describe() for word in (row.name, row.doc, *row.suffixes))
    schema = json.loads((ROOT / "schemas" / "init.report.schema.json").read_bytes())
    known = schema["$defs"]["InitReport"]["properties"]["toolchain"]["enum"]
    assert (row.name in known) == bool(row.project_files)


# each for itself


@pytest.mark.parametrize(
    ("head", "shell", "check"),
    [
        (b"#!/bin/sh\n", ["/bin/sh"], ["/bin/sh", "-n"]),
        (b"#! /bin/sh -e \necho", ["/bin/sh", "-e"], ["/bin/sh", "-n", "-e"]),
        (b"#!/bin/bash -eu -x\n", ["/bin/bash", "-eu -x"], ["/bin/bash", "-n", "-eu -x"]),
        (b"#!/bin/bash --posix\r\n", ["/bin/bash", "--posix"], ["/bin/bash", "--posix", "-n"]),
        (b"#!/usr/bin/env bash\n", ["/bin/bash"], ["/bin/bash", "-n"]),
        (
            b"#!/usr/bin/env -S bash --posix -o pipefail\n",
            ["/bin/bash", "--posix", "-o", "pipefail"],
            ["/bin/bash", "--posix", "-n", "-o", "pipefail"],
        ),
        (b"#!/bin/dash", ["/bin/dash"], ["/bin/dash", "-n"]),
        (b"#!\n", ["/bin/bash"], ["/bin/bash", "-n"]),
        (b"echo\n", ["/bin/bash"], ["/bin/bash", "-n"]),
    ],
)
def test_the_first_line_names_the_shell(head: bytes, shell: list[str], check: list[str]) -> None:
    """A script is checked and started by the shell of its first line, by default bash."""
    row = BY_NAME["shell"]
    source = Source(name="a.sh", head=head)
    assert row.start(source) == [*shell, "/x07/in/program/a.sh"]
    assert row.build is not None
    words = row.build(source)
    assert words[words.index(OUTPUT) + 1 :] == check


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"#!/bin/zsh", "/bin/zsh"),
        (b"#!/bin/shred -u", "/bin/shred -u"),
        (b"#!/usr/bin/env", "/usr/bin/env"),
        (b"#!/usr/bin/env -S", "-S"),
        (b"#!/usr/bin/env bash -e", "bash -e"),
        (b"#!/usr/bin/env -S bash -O 'extglob'", "-S bash"),
        (b"#!/bin/bash -\xff", "/bin/bash"),
    ],
)
def test_another_shell_is_refused_by_name(line: bytes, named: str) -> None:
    """A script for an unsupported shell is refused by name."""
    fix = "Use one of them .*--toolchain executable with"
    with contextlib.ExitStack() as stack, contextlib.closing(Cancel()) as cancel:
        request = RunRequest(source=line + b"\necho\n", toolchain="shell")
        with pytest.raises(
            UsageError, match=f"first line is ['\"]{named}.*; the supported shells are sh, dash, bash.*{fix}"
        ):
            load_program(request, RunCaller(cancel=cancel), stack)


def test_a_tree_gives_the_compiler_every_source_of_its_language() -> None:
    """A project compiles every source of its language."""
    row = BY_NAME["c"]
    assert row.build is not None
    tree = Source(name="", folder="/x07/in/project", files=("a.c", "b.h", "sub/b.c", "x.py"), args=("-Wall",))
    argv = row.build(tree)
    assert [word for word in argv if word.startswith("/x07/in")] == ["/x07/in/project/a.c", "/x07/in/project/sub/b.c"]
    assert "-Wall" in argv
    assert "/x07/in/a.c" in row.build(Source(name="a.c"))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"MZ",
        b"\x7fELF",
        ELF[:18] + struct.pack("<H", 183),
        ELF[:4] + b"\x01" + ELF[5:],
        ELF[:5] + b"\x02" + ELF[6:],
    ],
)
def test_an_executable_of_another_machine_is_refused(head: bytes) -> None:
    """An executable of another format or architecture is refused before a VM boots."""
    with pytest.raises(UsageError, match="cannot run prog"):
        check_executable("prog", head, "x86_64", 62)


def test_an_executable_of_this_machine_passes() -> None:
    """An ELF file of the guest's architecture, and a script with an interpreter, are accepted."""
    check_executable("prog", ELF, "x86_64", ARCHES["x86_64"].elf_machine)
    check_executable("prog", b"#!/usr/bin/perl", "x86_64", 62)


@given(st.binary(max_size=64))
def test_any_first_bytes_are_accepted_or_refused(head: bytes) -> None:
    """Any first bytes are accepted or refused."""
    try:
        check_executable("prog", head, "x86_64", 62)
    except UsageError:
        return
    assert head.startswith((b"#!", b"\x7fELF"))


@pytest.mark.parametrize("path", ["p.rb", "src/p.go", "p.xyz"])
def test_a_source_of_another_language_is_refused(path: str) -> None:
    """A source of an unsupported language is an error that says how to select a toolchain."""
    fix = f"add a #! line, or choose a toolchain: x07 run --toolchain T {path}"
    with pytest.raises(UsageError, match=f"cannot run {path}.*{fix}"):
        toolchain_for(path, b"x = 1\n")
    assert toolchain_for(path, b"#!/usr/bin/ruby\n").name == "executable"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"#!/usr/bin/ruby\n", ("ruby", "ruby")),
        (b"#! /usr/bin/env php\n", ("php", "php-cli")),
        (b"#!/usr/bin/env -S node --x\n", ("node", "nodejs")),
        (b"#!/usr/bin/odd-1.2\n", ("odd-1.2", "PACKAGE")),
        (b"#!/opt/x/ruby\n", None),
        (b"#!/usr/bin/-x\n", None),
        (b"#!/usr/bin/$(touch x)\n", None),
        (b"#!/usr/bin/" + b"a" * 70 + b"\n", None),
        (b"\x7fELF", None),
    ],
)
def test_the_interpreter_of_a_script_is_known(head: bytes, found: tuple[str, str] | None) -> None:
    """The hint for a missing interpreter names a valid program and package only."""
    source = Source(name="it", head=head)
    file = InFile(path="", mode=0, kind="file", fd=-1, size=0)
    program = Program(toolchain=BY_NAME["executable"], source=source, data=b"", file=file, sha256="")
    hints = [(hint.subject, hint.how.flag) for hint in missing_interpreter(program, ImageInUse())]
    build = "x07 image build --name default --include"
    assert hints == ([(f"the program {found[0]}", f"{build} {found[1]}")] if found else [])
