"""Calls from Python before any machine: what is wrong with one is told, and what is not said comes from the project."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from x07_sandbox import Policy, Pool, SandboxError, load_policy, run_program, run_program_async
from x07_sandbox.backends.lease import PoolClient
from x07_sandbox.backends.selection import choice_from_environment
from x07_sandbox.errors import UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.cancel import Cancel
from x07_sandbox.library.arguments import make_request
from x07_sandbox.library.keyword_names import in_python
from x07_sandbox.library.options import RunOptions
from x07_sandbox.library.run import OPTIONS
from x07_sandbox.policy import PolicyError, default_policy, render_policy
from x07_sandbox.runs.program import load_program

if TYPE_CHECKING:
    from x07_sandbox.runs.request import RunRequest

HALF = "\ud800"


class Bytes(os.PathLike[bytes]):
    """A path that is no text."""

    def __fspath__(self) -> bytes:
        """The path."""
        return b"x"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place without guest images: a call that is not refused by itself ends there."""
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"program": "a\0b"}, "program contains a zero byte"),
        ({"program": Bytes()}, "program is Bytes, not a path"),
        ({"files": {"a": 5}}, "files['a'] is int, not bytes"),
        ({"files": {5: b""}}, "files has the name 5"),
        ({"out": "a\0"}, "out contains a zero byte"),
        ({"out": Bytes()}, "out is Bytes, not a path"),
        ({"out": ""}, "out is empty"),
        ({"program": ""}, "program is empty"),
        ({"policy": 5}, "policy is int, not a path or a Policy"),
        ({"memory": "lots"}, "memory is 'lots', which is not a size"),
        ({"memory": 5}, "memory is 5, and must be at least 1M and at most 16G"),
        ({"memory": True}, "memory is bool, not a size"),
        ({"cpu_s": 0}, "cpu_s is 0, and must be above 0"),
        ({"timeout_s": 601}, "timeout_s is 601, and must be at least 0.001 and at most 600 seconds"),
        ({"procs": -1}, "procs is -1, and must be at least 0"),
        ({"fds": 1.5}, "fds is float, not int"),
        ({"build_timeout_s": 5000}, "build_timeout_s is 5000"),
    ],
)
def test_what_no_program_could_be_given_is_named(words: dict[str, Any], why: str) -> None:
    """A value that cannot be used is an error that names its argument, and has no result, since nothing began."""
    given = words if "program" in words else {"source": "true", "toolchain": "shell"} | words
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        run_program(**given)
    assert caught.value.result is None


@pytest.mark.parametrize("named", [False, True])
def test_no_file_takes_the_place_of_another(tmp_path: Path, *, named: bool) -> None:
    """A file beside the program that has the program's own name is wrong usage, and neither of them is lost."""
    (tmp_path / "main.py").touch()
    given: dict[str, Any] = {"program": tmp_path / "main.py"} if named else {"source": "", "toolchain": "python"}
    with pytest.raises(SandboxError, match=r"cannot run main\.py: `files` has a file of the same name"):
        run_program(**given, files={"main.py": b"1"})


@pytest.mark.parametrize("manifest", ["x07.json", "x07-sandbox.toml"])
@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({"files": {"a": b""}}, "Leave `files` out"),
        ({"toolchain": "c"}, "Leave toolchain out"),
        ({"toolchain": "c", "files": {"a": b""}}, "Leave toolchain and `files` out"),
    ],
)
def test_what_a_project_says_itself_is_left_out(tmp_path: Path, manifest: str, given: dict[str, Any], fix: str) -> None:
    """A project takes neither files nor a toolchain, and the error names the one that was given."""
    (tmp_path / manifest).touch()
    with pytest.raises(SandboxError, match=re.escape(fix)):
        run_program(tmp_path, **given)


@pytest.mark.parametrize("change", [{"notes": object()}, {"notes": HALF}, {"policy_id": object()}, {"limits": 5}])
def test_a_policy_that_was_made_wrong_is_refused(change: dict[str, Any]) -> None:
    """A Policy that no document could hold, or that breaks the schema, is refused by the run and by load_policy."""
    policy = replace(default_policy(), **change)
    with pytest.raises(SandboxError, match="policy"):
        run_program(source="true", toolchain="shell", policy=policy)
    with pytest.raises(UsageError, match="policy"):
        load_policy(policy)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (5, "name is int, not a path or a Policy"),
        (b"x", "name is bytes"),
        ("\0", "zero byte"),
    ],
)
def test_load_policy_names_what_it_cannot_take(name: Any, why: str) -> None:  # noqa: ANN401 - that is the point
    """load_policy refuses what is neither a path nor a Policy, in the library's own words."""
    with pytest.raises(UsageError, match=f"cannot load a policy: .*{why}"):
        load_policy(name)


@pytest.mark.parametrize(("words", "why"), [({"image": 5}, "image is int, not str"), ({"size": "2"}, "size is '2'")])
def test_a_pool_names_what_it_cannot_take(words: dict[str, Any], why: str) -> None:
    """A pool of another kind of image, or of no number of machines, is refused in the library's own words."""
    with pytest.raises(UsageError, match=f"cannot start a pool: .*{why}"):
        Pool(**words)


def test_load_policy_takes_what_a_run_takes() -> None:
    """A Policy, a template and nothing are taken; a template that is not there is named."""
    assert isinstance(load_policy(), Policy)
    assert load_policy(default_policy()) == load_policy() == load_policy("built-in:default")
    with pytest.raises(UsageError, match="built-in:none") as caught:
        load_policy("built-in:none")
    assert not isinstance(caught.value, PolicyError)


def test_a_limit_above_that_of_a_policy_file_names_the_keyword(tmp_path: Path) -> None:
    """`timeout_s=200` with a policy of 60 s is an error in Python's words, never a shorter run."""
    (tmp_path / "strict.json").write_bytes(render_policy(default_policy()))
    with pytest.raises(UsageError, match=r"cannot use timeout_s=200: .* allows at most 60 s \(limits\.wall_ms\)"):
        run_program(source="true", toolchain="shell", policy=tmp_path / "strict.json", timeout_s=200)


def test_every_way_of_running_takes_the_same_keywords() -> None:
    """What a type checker allows for `submit`, `map` and the coroutine is what `run_program` takes."""
    assert set(RunOptions.__annotations__) == OPTIONS - {"input", "check"}
    assert {"memory", "cpu_s", "timeout_s", "procs", "fds", "policy"} <= set(RunOptions.__annotations__)


def test_an_option_that_is_not_known_is_named_with_the_function() -> None:
    """An option that run_program_async does not know is Python's own error for it, not for a function behind it."""
    with pytest.raises(TypeError, match=re.escape("run_program_async() got an unexpected keyword argument 'stdin'")):
        asyncio.run(run_program_async("prog.py", stdin=b""))  # type: ignore[call-arg]  # the point


def asked(stack: contextlib.ExitStack, folder: Path, **words: Any) -> RunRequest:  # noqa: ANN401 - any option
    """The request of a call for the project in *folder*, when its manifest has been read."""
    cancel = stack.enter_context(contextlib.closing(Cancel()))
    fields: dict[str, Any] = {"machines": PoolClient(), "choice": choice_from_environment(), "cancel": cancel}
    fields |= {name: words.pop(name, value) for name, value in (("stdin_fd", 0), ("stdin_default", True))}
    args = words.pop("args", ())
    given = {**(run_program.__kwdefaults__ or {}), **words}
    return load_program(make_request(folder, args, given, **fields), stack)[0]


def test_what_a_call_leaves_open_is_what_the_manifest_says(tmp_path: Path) -> None:
    """Input, arguments, policy, image and variables of a project's manifest hold where the call gives none."""
    text = (
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nfiles = ["main.py"]\nentry = "main.py"\n'
    )
    text += 'policy = "p.json"\nimage = "own"\n[run]\nargs = ["Ulm"]\ninput = "roads.txt"\nenv = { A = "1" }\n'
    (tmp_path / "x07-sandbox.toml").write_text(text)
    (tmp_path / "main.py").write_text("pass\n")
    (tmp_path / "roads.txt").write_text("a road")
    (tmp_path / "p.json").write_text("{}")
    with contextlib.ExitStack() as stack:
        open_ = asked(stack, tmp_path)
        assert os.pread(open_.stdin_fd or 0, 100, 0) == b"a road"
        assert str(open_.policy) == str(tmp_path / "p.json")
        assert (open_.args, open_.image, open_.env) == (("Ulm",), "own", {"A": "1"})
        given = asked(
            stack,
            tmp_path,
            stdin_default=False,
            policy="built-in:default",
            args=["Bonn"],
            image="x",
            env={"A": "2"},
        )
        assert (given.stdin_fd, given.policy, given.args) == (0, "built-in:default", ("Bonn",))
        assert (given.image, given.env) == ("x", {"A": "2"})


# Each module costs every caller's start: the rest is loaded by the first call.
IMPORTED = """
errors host host.decoding host.settings host.threads host.version library library.arguments library.pool library.run
network network.summary
plan plan.denials plan.features
policy policy.decode policy.default policy.environment policy.model policy.problems policy.rules
runs runs.result
"""
COSTLY = "argparse ast asyncio dataclasses email http inspect random shutil socket ssl subprocess tempfile urllib"
IMPORT = """
import sys
before = set(sys.modules)
sys.path[:0] = sys.argv[1:3]
import x07_sandbox
alone = set(sys.modules) - before
for name in x07_sandbox.__all__:
    getattr(x07_sandbox, name)
every = set(sys.modules) - before
import json
print(json.dumps([sorted(alone), sorted(every)]))
"""


def test_importing_the_library_costs_only_what_is_on_the_list(tmp_path: Path) -> None:
    """All public names together load exactly these modules of ours and none that is costly; the package alone, none."""
    # msgspec alone: beside it in a developer's environment lies what it imports where it is there.
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
        (
            "X07_VM_BACKEND",
            "firecracker-ctr",
            "not supported.* Use X07_VM_BACKEND=qemu, or unset it[.]$",
        ),
        ("X07_VM_BACKEND", "podman", "weaker isolation.* unset it, or set X07_I_ACCEPT_WEAKER_ISOLATION=1[.]$"),
        ("X07_VM_BACKEND", "xen", "X07_VM_BACKEND"),
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
    """What a variable asks for and cannot be had is refused by run_program and Pool, with what to do about it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SandboxError, match=why):
        run_program(source="1", toolchain="python")
    with pytest.raises(SandboxError, match=why):
        Pool(size=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "the program reached its time limit of 4 s (--timeout)",
            "the program reached its time limit of 4 s (timeout_s)",
        ),
        ("Name a file with --input", "Name a file with input"),
        ("Give it more with --timeout 4.5", "Give it more with timeout_s=4.5"),
        ("Leave it out, or use --sandbox-backend vm", "Leave it out, or use X07_SANDBOX_BACKEND=vm"),
        ("Write one (x07 init --toolchain T)", "Write one (x07 init --toolchain T)"),
        ("Use --timeout-like and --outer", "Use --timeout-like and --outer"),
    ],
)
def test_errors_name_keywords_in_place_of_flags(text: str, said: str) -> None:
    """What a command would be told about a flag, a caller from Python is told about the keyword."""
    assert in_python(text) == said


def test_an_error_of_a_run_names_the_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in an unknown language is told with `toolchain`, in the error and in its result."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    with pytest.raises(SandboxError, match=r"Name its toolchain[.]$") as caught:
        run_program(source="print(1)")
    assert "--toolchain" not in caught.value.result.reason


def test_names_to_let_in_are_switches_of_a_call() -> None:
    """allow_hidden and allow_symlinks are true or false; with a policy that is given the error names its field."""
    with pytest.raises(SandboxError, match="allow_hidden is str, not a bool"):
        run_program(source="pass", toolchain="python", allow_hidden="yes")  # type: ignore[arg-type]
    with pytest.raises(SandboxError, match=r"Set fs\.allow_symlinks to true"):
        run_program(source="pass", toolchain="python", policy=load_policy(), allow_symlinks=True)
