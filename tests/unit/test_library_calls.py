"""Library calls before any VM starts: argument checks and defaults from the project."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from x07_sandbox import (
    Policy,
    Pool,
    Sandbox,
    SandboxError,
    exec_command,
    exec_command_async,
    load_policy,
    run_program,
)
from x07_sandbox.cli.parser import add_groups, given_rows
from x07_sandbox.errors import ArgumentError, Command, Flag, ImageError, UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.images.store import set_name
from x07_sandbox.library.arguments import checked_options
from x07_sandbox.library.run import OPTIONS, CommandOptions, RunOptions
from x07_sandbox.library.sandbox import SandboxOptions
from x07_sandbox.options import BY_FLAG, BY_KEYWORD, LIMITS, OF_SANDBOXES, keyword
from x07_sandbox.options import OPTIONS as OPTIONS_TABLE
from x07_sandbox.policy.changes import LimitChanges, Overrides
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.model import PolicyError
from x07_sandbox.policy.schema import fields as schema_fields
from x07_sandbox.policy.schema import range_of
from x07_sandbox.programs.project import Manifest, RunTable
from x07_sandbox.sessions.request import RunCaller, RunRequest, load_program, make_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.sessions.request import Program

HALF = "\ud800"


class Bytes(os.PathLike[bytes]):
    """A path that is bytes."""

    def __fspath__(self) -> bytes:
        """Return the path."""
        return b"x"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders without guest images, where a valid call ends."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))


def test_errors_of_calls_are_told_apart_by_class_and_code() -> None:
    """A wrong argument, an unknown sandbox and a missing image end in errors of different classes and codes."""
    with pytest.raises(ArgumentError) as wrong:
        Sandbox(memory="zzz")
    with pytest.raises(UsageError) as unknown:
        Sandbox.connect("zzz")
    with pytest.raises(ImageError) as missing:
        run_program(source="1", toolchain="python")
    found = [one.value.code for one in (wrong, unknown, missing)]
    assert found == ["bad-argument", "no-such-sandbox", "image"]


def test_a_path_may_be_a_path_wherever_a_file_is_named(tmp_path: Path) -> None:
    """Folders, names of files and arguments may be `Path` objects, which mean the same as their text."""
    roots, files = [tmp_path, "b"], {Path("a/b"): "text"}
    given = checked_options({"read_roots": roots, "write_roots": roots, "files": files, "args": [Path("x"), "y"]})
    request = make_request(given)
    assert request.overrides is not None
    wanted = (str(tmp_path), "b")
    assert (request.overrides.allow_read_root, request.overrides.allow_write_root) == (wanted, wanted)
    assert (request.files, request.args) == ({"a/b": b"text"}, ("x", "y"))
    with pytest.raises(ArgumentError, match="read_roots is not a list of str"):
        list(checked_options({"read_roots": [Bytes()]}))


def test_files_over_the_limit_name_it_and_the_ways_around_it() -> None:
    """The error for too large *files* names the limit, and the keywords that pass a folder instead."""
    with pytest.raises(SandboxError, match="the limit is 10000 files of 64 MiB together") as raised:
        run_program(source="int x;", toolchain="c", files={"big.csv": bytes((64 << 20) + 1)})
    assert raised.value.code == "files-too-large"
    raised.value.word_for(keyword)
    assert "pass it as workdir or read_roots" in str(raised.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"program": "a\0b"}, "program contains a zero byte"),
        ({"program": Bytes()}, "program is Bytes, not a path"),
        ({"files": {"a": 5}}, "files['a'] is int, not str or bytes"),
        ({"files": {5: b""}}, "files has the name 5"),
        ({"out": "a\0"}, "out contains a zero byte"),
        ({"program": ""}, "program is empty"),
        ({"policy": 5}, "policy is int, not a path or a Policy"),
        ({"memory": "lots"}, "memory is 'lots', which is not a size"),
        ({"memory": 5}, "memory is 5, but must be at least 1M and at most 16G"),
        ({"timeout_s": 601}, "timeout_s is 601, but must be at least 0.001 and at most 600 seconds"),
        ({"fds": 1.5}, "fds is float, not int"),
        ({"allow_hosts": "a.org:443"}, "allow_hosts is str, not a list of str"),
        ({"changes": "maybe"}, "changes is 'maybe'"),
        ({"max_files_bytes": -1}, "max_files_bytes is -1, but must be at least 0"),
        ({"read_only": True}, "read_only requires workdir"),
    ],
)
def test_an_invalid_argument_is_named(words: dict[str, Any], why: str) -> None:
    """An invalid argument is a usage error that names it and carries no result."""
    given = words if "program" in words else {"source": "true", "toolchain": "shell"} | words
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        run_program(**given)
    assert caught.value.result is None


NO_LIST = "command is not a list with at least one word"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(exec_command, "ls"), NO_LIST),
        (partial(exec_command, []), NO_LIST),
        (lambda: asyncio.run(exec_command_async(b"ls")), NO_LIST),  # type: ignore[arg-type]
        (partial(load_policy, 5), "cannot load a policy: name is int, not a path or a Policy"),  # type: ignore[arg-type]
        (partial(load_policy, "\0"), "cannot load a policy: .*zero byte"),
        (partial(Pool, image=5), "a pool: .*image is int, not str"),  # type: ignore[arg-type]
        (partial(Pool, size="2"), "a pool: .*size is '2'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_call_of_another_function_is_an_error(call: Callable[[], object], why: str) -> None:
    """An invalid argument of exec_command, load_policy or Pool is a usage error that names it."""
    with pytest.raises(UsageError, match=why):
        call()


@pytest.mark.parametrize("named", [False, True])
def test_an_input_file_may_not_replace_the_program(tmp_path: Path, *, named: bool) -> None:
    """An input file with the program's own name is a usage error."""
    (tmp_path / "main.py").touch()
    given: dict[str, Any] = {"program": tmp_path / "main.py"} if named else {"source": "", "toolchain": "python"}
    with pytest.raises(SandboxError, match=r"cannot run main\.py: `files` contains a file of the same name"):
        run_program(**given, files={"main.py": b"1"})


@pytest.mark.parametrize("manifest", ["x07.json", "x07-sandbox.toml"])
@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({"files": {"a": b""}}, "Remove `files`"),
        ({"toolchain": "c"}, "Remove toolchain"),
        ({"toolchain": "c", "files": {"a": b""}}, "Remove toolchain and `files`"),
    ],
)
def test_projects_accept_no_files_or_toolchain(tmp_path: Path, manifest: str, given: dict[str, Any], fix: str) -> None:
    """A project accepts neither files nor a toolchain, and the error names the argument to remove."""
    (tmp_path / manifest).touch()
    with pytest.raises(SandboxError, match=re.escape(fix)):
        run_program(tmp_path, **given)


@pytest.mark.parametrize("change", [{"notes": object()}, {"notes": HALF}, {"policy_id": object()}, {"limits": 5}])
def test_an_invalid_policy_object_is_refused(change: dict[str, Any]) -> None:
    """An invalid Policy object is refused by run_program and load_policy."""
    policy = replace(default_policy(), **change)
    with pytest.raises(SandboxError, match="policy"):
        run_program(source="true", toolchain="shell", policy=policy)
    with pytest.raises(UsageError, match="policy"):
        load_policy(policy)


def test_load_policy_accepts_what_a_run_accepts() -> None:
    """load_policy accepts a Policy, a template name or nothing, and names an unknown template."""
    assert isinstance(load_policy(), Policy)
    assert load_policy(default_policy()) == load_policy() == load_policy("built-in:default")
    with pytest.raises(UsageError, match="built-in:none") as caught:
        load_policy("built-in:none")
    assert not isinstance(caught.value, PolicyError)


def test_a_limit_above_that_of_a_policy_file_names_the_keyword(tmp_path: Path) -> None:
    """A timeout_s above the policy's limit is an error, never a shorter run."""
    (tmp_path / "strict.json").write_bytes(render_policy(default_policy()))
    with pytest.raises(UsageError, match=r"cannot use timeout_s=200: .* allows at most 60 s \(limits\.wall_ms\)"):
        run_program(source="true", toolchain="shell", policy=tmp_path / "strict.json", timeout_s=200)


def test_every_way_of_running_has_the_same_keywords() -> None:
    """`submit`, `map` and the coroutine accept the same keywords as `run_program`."""
    assert set(RunOptions.__annotations__) == OPTIONS - {"input", "check"}
    only_of_programs = {"command", "source", "toolchain", "workdir", "read_only"}
    assert set(CommandOptions.__annotations__) == OPTIONS - {"input", "check", *only_of_programs}


TYPES = {
    "text": "str | None",
    "toolchain": "str | None",
    "source": "str | bytes | None",
    "file": "str | os.PathLike[str] | None",
    "folder": "str | os.PathLike[str] | None",
    "policy": "str | os.PathLike[str] | Policy | None",
    "words": "Sequence[str | os.PathLike[str]]",
    "list": "Sequence[str]",
    "patterns": "Sequence[str]",
    "number": "int | None",
    "size": "str | int | None",
    "seconds": "float | None",
    "switch": "bool",
    "choice": "Literal[{}]",
    "variables": "Mapping[str, str] | None",
    "contents": "Mapping[str, str | bytes] | Mapping[Path, str | bytes] | None",
    "function": "OnOutput | None",
}
OTHER_TYPES = {"input": "bytes | None", "max_files_bytes": "int", "scale_limits": "bool | None"}
OTHER_TYPES |= dict.fromkeys(("command", "read_roots", "write_roots"), TYPES["words"])


def test_the_typed_signatures_are_those_of_the_table_of_options() -> None:
    """`run_program` and the options of the other functions have the keywords, types and choices of the table."""
    rows = BY_KEYWORD.items()
    choices = {name: ", ".join(map(repr, row.choices)) for name, row in rows}
    expected = {name: OTHER_TYPES.get(name, TYPES[row.kind]).format(choices[name]) for name, row in rows}
    found = {name: str(type_) for name, type_ in run_program.__annotations__.items()}
    assert found == expected | {"check": "bool", "return": "Result"}
    defaults = run_program.__kwdefaults__ or {}
    assert [name for name, row in rows if row.choices and row.default != defaults[name]] == []
    function = "Callable[[Literal['stdout', 'stderr'], bytes], object] | None"
    passed = {name: type_.__forward_arg__ for name, type_ in RunOptions.__annotations__.items()}
    assert passed == {name: expected[name] for name in passed} | {"on_output": function}
    shared = {row.keyword for row in BY_FLAG.values()} & SandboxOptions.__annotations__.keys()
    assert {row.keyword for row in OF_SANDBOXES} == shared


def test_every_row_of_the_table_leads_somewhere() -> None:
    """Each row of the table of options names fields and keys that exist, and has the range of the policy."""
    fields = set(RunRequest.__struct_fields__)
    fields |= {f"limits.{name}" for name in LimitChanges.__struct_fields__}
    fields |= {f"overrides.{name}" for name in Overrides.__struct_fields__}
    assert [row for row in OPTIONS_TABLE if row.sets and row.sets not in fields] == []
    keys = {*Manifest.__struct_fields__, *(f"run.{name}" for name in RunTable.__struct_fields__)}
    assert [row for row in OPTIONS_TABLE if row.manifest and row.manifest not in keys] == []
    policy = {field.path for field in schema_fields()}
    assert [row for row in OPTIONS_TABLE if row.field and row.field not in policy] == []
    limits = {row.sets: row for row in LIMITS}
    scales = {path: 1000 if row.kind == "seconds" else 1 for path, row in limits.items()}
    assert {path: (row.least * scales[path], row.most * scales[path]) for path, row in limits.items()} == {
        path: range_of(path) for path in limits
    }


def test_a_keyword_means_the_same_as_its_flag() -> None:
    """Keywords of `run_program` make the same request as the flags of `x07 run`."""
    parser = argparse.ArgumentParser()
    add_groups(parser, "run")
    words = "--allow-host a.org:443,80 --deny-host b.org:* --allow-read-root r --allow-write-root w --hide *.csv"
    words += " --allow-hidden --memory 1G --timeout 2.5 --build-timeout 9 --procs 0 --changes keep --out o --image i"
    by_flags = make_request(given_rows(parser.parse_args(words.split()), BY_FLAG.values()), program=Path("p"))
    options: dict[str, Any] = {"allow_hosts": ["a.org:443,80"], "deny_hosts": ("b.org:*",), "read_roots": ["r"]}
    options |= {
        "write_roots": ["w"],
        "hide": ["*.csv"],
        "allow_hidden": True,
        "memory": "1G",
        "timeout_s": 2.5,
        "build_timeout_s": 9,
    }
    options |= {"procs": 0, "changes": "keep", "out": "o", "image": "i", "program": "p"}
    assert make_request(checked_options(options)) == by_flags
    assert by_flags.limits == LimitChanges(mem_bytes=1 << 30, wall_ms=2500, procs=0)


def asked(stack: contextlib.ExitStack, folder: Path, **words: Any) -> tuple[RunRequest, Program]:  # noqa: ANN401 - any option
    """The request of a call for the project in *folder*, after its manifest has been read."""
    cancel = stack.enter_context(contextlib.closing(Cancel()))
    request = make_request(checked_options({"program": folder, **words}))
    return load_program(request, RunCaller(cancel=cancel), stack)


def test_the_manifest_provides_defaults(tmp_path: Path) -> None:
    """Arguments missing from a call are taken from the project's manifest."""
    text = (
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["main.py"]\nentry = "main.py"\n'
    )
    text += 'policy = "p.json"\nimage = "own"\n[run]\nargs = ["Ulm"]\ninput = "roads.txt"\nenv = { A = "1" }\n'
    (tmp_path / "x07-sandbox.toml").write_text(text)
    (tmp_path / "main.py").write_text("pass\n")
    (tmp_path / "roads.txt").write_text("a road")
    (tmp_path / "p.json").write_text("{}")
    with contextlib.ExitStack() as stack:
        open_, program = asked(stack, tmp_path)
        assert os.pread(program.input_fd or 0, 100, 0) == b"a road"
        assert str(open_.policy) == str(tmp_path / "p.json")
        assert (open_.args, open_.image, open_.env) == (("Ulm",), "own", {"A": "1"})
        given, _ = asked(stack, tmp_path, policy="built-in:default", args=["Bonn"], image="x", env={"A": "2"})
        assert (given.policy, given.args) == ("built-in:default", ("Bonn",))
        assert (given.image, given.env) == ("x", {"A": "2"})


# Each module costs every caller's start: the rest is loaded by the first call.
IMPORTED = """
errors host host.settings
library library.arguments library.async_sandbox library.awaited library.pool library.run
library.sandbox library.snapshots
policy policy.denials policy.features policy.model
reports reports.sandboxes
sessions sessions.command sessions.result
"""
COSTLY = "argparse ast asyncio dataclasses email http inspect random shutil socket ssl subprocess tempfile urllib"
IMPORT = """
import sys
before = set(sys.modules)
sys.path[:0] = sys.argv[1:3]
import x07_sandbox
alone = set(sys.modules) - before
for name in set(x07_sandbox.__all__) - {"Diff", "apply", "diff", "undo", "tools"}:  # for saved changes and models
    getattr(x07_sandbox, name)
every = set(sys.modules) - before
import json
print(json.dumps([sorted(alone), sorted(every)]))
"""


def test_importing_the_library_costs_only_what_is_on_the_list(tmp_path: Path) -> None:
    """Importing the library loads only the listed modules, none of them expensive."""
    # msgspec alone, because it imports optional packages of a developer's environment.
    (tmp_path / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    argv = [sys.executable, "-I", "-S", "-c", IMPORT, str(Path(paths.__file__).parents[2]), str(tmp_path)]
    alone, every = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert [name for name in alone if name.startswith("x07_sandbox")] == ["x07_sandbox"]
    ours = [name.removeprefix("x07_sandbox.") for name in every if name.startswith("x07_sandbox.")]
    assert ours == sorted(IMPORTED.split())
    assert set(COSTLY.split()) & set(every) == set()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("X07_VM_BACKEND", "vz", "not supported.* Use X07_VM_BACKEND=qemu, or unset it[.]$"),
        ("X07_VM_BACKEND", "podman", "weaker isolation.* unset it, or set X07_I_ACCEPT_WEAKER_ISOLATION=1[.]$"),
        (
            "X07_SANDBOX_BACKEND",
            "none",
            "Use X07_SANDBOX_BACKEND=vm, or unset it, or set X07_I_ACCEPT_WEAKER_ISOLATION=1[.]$",
        ),
        ("X07_I_ACCEPT_WEAKER_ISOLATION", "True", "X07_I_ACCEPT_WEAKER_ISOLATION"),
    ],
)
def test_the_variables_of_the_command_count_for_the_library_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    """The X07 environment variables apply to run_program and Pool."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SandboxError, match=why):
        run_program(source="1", toolchain="python")
    with pytest.raises(SandboxError, match=why):
        Pool(size=1)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--timeout", "timeout_s"),
        ("--timeout 4.5", "timeout_s=4.5"),
        ("--memory 1G", 'memory="1G"'),
        ("--allow-host a.org:443", 'allow_hosts=["a.org:443"]'),
        ("--workdir .", 'workdir="."'),
        ("--skip 'a b'", 'skip=["a b"]'),
        ("--sandbox-backend vm", "X07_SANDBOX_BACKEND=vm"),
        ("--queue-timeout 9", "--queue-timeout 9"),
    ],
)
def test_errors_name_keywords_in_place_of_flags(flag: str, expected: str) -> None:
    """Errors of the library name keywords instead of flags, and leave words and commands as they are."""
    error = UsageError(("cannot use ", Flag(flag)), "it is --timeout", ("To run it: ", Command(f"x07 run {flag}")))
    assert error.what == f"cannot use {flag}"
    error.word_for(keyword)
    assert str(error) == f"cannot use {expected}: it is --timeout. To run it: x07 run {flag}"


def test_callers_can_ask_how_many_sandboxes_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Sandbox.max_open` is the number in X07_VM_MAX_SANDBOXES, else one that memory allows."""
    assert Sandbox.max_open() >= 2
    monkeypatch.setenv("X07_VM_MAX_SANDBOXES", "7")
    assert Sandbox.max_open() == 7
    monkeypatch.setenv("X07_VM_MAX_SANDBOXES", "many")
    with pytest.raises(SandboxError, match="X07_VM_MAX_SANDBOXES"):
        Sandbox.max_open()


def test_callers_can_ask_for_the_names_of_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`Sandbox.images` lists the names that `image` may be, and none before the first image is built."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path))
    assert Sandbox.images() == []
    for name in ("tools", "default"):
        set_name(name, "0" * 64)
    assert Sandbox.images() == ["default", "tools"]


def test_allow_hidden_and_allow_symlinks_are_booleans() -> None:
    """allow_hidden and allow_symlinks are booleans, and with an explicit policy the error names its field."""
    with pytest.raises(SandboxError, match="allow_hidden is str, not a bool"):
        run_program(source="pass", toolchain="python", allow_hidden="yes")  # type: ignore[arg-type]
    with pytest.raises(SandboxError, match=r"Set fs\.allow_symlinks to true"):
        run_program(source="pass", toolchain="python", policy=load_policy(), allow_symlinks=True)
