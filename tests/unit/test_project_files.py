"""Files named by a project: read once, and only from inside the project."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from x07_sandbox.errors import Cancelled, RefusedError, UsageError
from x07_sandbox.host.settings import OUTPUT_MAX_BYTES
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.changes import LimitChanges, Overrides
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.model import HostPorts
from x07_sandbox.sessions.request import (
    Program,
    ProjectPolicy,
    RunCaller,
    RunRequest,
    effective_policy_of,
    load_program,
    open_input,
    read_policy,
    read_whole,
)
from x07_sandbox.x07.programs import load_x07

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POLICY = render_policy(default_policy())
TOML = """schema_version = "x07.sandbox.project@0.1.0"
toolchain = "python"
files = ["*.py"]
entry = "main.py"
policy = "own/policy.json"
[run]
input = "own/input.txt"
"""


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """The resources of a run."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture(params=["toml", "x07"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project of either kind with its own policy and input, next to a foreign file."""
    project = tmp_path / "project"
    (project / "own").mkdir(parents=True)
    (project / "main.py").write_text("pass")
    (project / "own/policy.json").write_bytes(POLICY)
    (project / "own/input.txt").write_bytes(b"the project's")
    (tmp_path / "other.txt").write_bytes(POLICY)
    if request.param == "toml":
        (project / "x07-sandbox.toml").write_text(TOML)
    else:
        profile = {"world": "run-os-sandboxed", "policy": "own/policy.json", "input": "own/input.txt"}
        document = {"schema_version": "x07.project@0.5.0", "profiles": {"os": profile}, "lockfile": "own/x07.lock.json"}
        (project / "x07.json").write_text(json.dumps(document))
        (project / "own/x07.lock.json").write_text("{}")
    return project


def load(stack: contextlib.ExitStack, program: Path, **words: Any) -> tuple[RunRequest, Program]:  # noqa: ANN401 - as RunRequest has them
    """Load a program as the command line does."""
    cancel = stack.enter_context(contextlib.closing(Cancel()))
    caller = RunCaller(cancel=cancel, loaders=(load_x07,))
    return load_program(RunRequest(program=program, **words), caller, stack)


def replaced(place: Path, make: Callable[[Path], object]) -> None:
    """Replace a file."""
    place.unlink()
    make(place)


def test_a_dash_as_input_suggests_dev_stdin(stack: contextlib.ExitStack) -> None:
    """An input named `-` is an error that suggests /dev/stdin."""
    with pytest.raises(UsageError, match="or use /dev/stdin"):
        open_input(RunRequest(input=Path("-")), None, stack)


def test_a_projects_policy_and_input_are_read(folder: Path, stack: contextlib.ExitStack) -> None:
    """A project's policy and input are read when the project is loaded."""
    (folder / "own/real").write_bytes(b"the project's")
    replaced(folder / "own/input.txt", lambda place: place.symlink_to("real"))
    request, program = load(stack, folder)
    for name in ("policy.json", "input.txt"):
        replaced(folder / "own" / name, lambda place: place.symlink_to("/proc/self/environ"))
    assert read_policy(request.policy)[1] == POLICY
    assert str(request.policy) == str(folder / "own/policy.json")
    assert read_whole(open_input(request, program.input_fd, stack), 1000) == b"the project's"


@pytest.mark.parametrize("name", ["policy.json", "input.txt"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda place: place.symlink_to("/proc/self/environ"), "leads out of the project, to /proc/"),
        (lambda place: place.symlink_to("../../other.txt"), "leads out of the project, to .*/other.txt"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda place: place.symlink_to("/dev/zero"), "leads out of the project, to /dev/zero"),
        (lambda place: place.symlink_to(place.name), "symbolic links"),
        (lambda _: None, "No such file"),
    ],
)
def test_files_outside_the_project_are_refused(
    folder: Path, stack: contextlib.ExitStack, name: str, make: Callable[[Path], object], why: str
) -> None:
    """A policy or input outside the project, or no regular file, is refused without blocking."""
    replaced(folder / "own" / name, make)
    with pytest.raises(UsageError, match=f"its {name.partition('.')[0]} own/{name}.*{why}"):
        load(stack, folder)


@pytest.mark.parametrize("name", ["x07-sandbox.toml", "x07.json"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda at: at.symlink_to("no"), "No such"),
    ],
)
def test_a_manifest_must_be_a_regular_file(
    tmp_path: Path, stack: contextlib.ExitStack, name: str, make: Callable[[Path], object], why: str
) -> None:
    """A manifest that is no regular file is refused by name."""
    make(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}.*{why}"):
        load(stack, tmp_path)


def test_an_escaping_folder_is_refused(folder: Path, stack: contextlib.ExitStack) -> None:
    """A folder that links out of the project is refused."""
    (folder / "own").rename(folder.parent / "elsewhere")
    (folder / "own").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UsageError, match=r"leads out of the project|lock file own/x07\.lock\.json is missing"):
        load(stack, folder)


def test_flags_override_a_projects_files(folder: Path, stack: contextlib.ExitStack) -> None:
    """Flags override a project's files and may name links."""
    (folder.parent / "link").symlink_to("other.txt")
    for name in ("policy.json", "input.txt"):
        (folder / "own" / name).unlink()
    request, program = load(stack, folder, policy=folder.parent / "link", input=folder.parent / "link")
    assert read_policy(request.policy)[1] == POLICY
    assert read_whole(open_input(request, program.input_fd, stack), 10_000) == POLICY


def test_a_manifest_may_be_a_link_only_where_it_is_named(folder: Path, stack: contextlib.ExitStack) -> None:
    """A manifest that links out of its folder is refused unless named explicitly."""
    manifest = next(path for path in folder.iterdir() if path.suffix in {".toml", ".json"})
    manifest.rename(folder.parent / manifest.name)
    manifest.symlink_to(folder.parent / manifest.name)
    with pytest.raises(UsageError, match=f"{manifest.name} leads out of the project"):
        load(stack, folder)
    if manifest.suffix == ".toml":  # of X07's projects everything travels, and so no link out
        assert load(stack, manifest)[1].project


def test_a_profile_only_lowers_the_output_limit(folder: Path, stack: contextlib.ExitStack) -> None:
    """A profile can only lower the output limit, and the user's flag overrides it."""
    place = folder / "x07.json"
    if not place.exists():
        return
    for asked, found in ((1 << 40, OUTPUT_MAX_BYTES), (10, 10), (0, 0)):
        document = json.loads(place.read_bytes())
        document["profiles"]["os"]["max_output_bytes"] = asked
        place.write_text(json.dumps(document))
        assert load(stack, folder)[0].max_output_bytes == found
        assert load(stack, folder, max_output_bytes=1000)[0].max_output_bytes == 1000


def test_reading_a_project_ends_when_it_is_cancelled(folder: Path, stack: contextlib.ExitStack) -> None:
    """Reading a project can be cancelled."""
    cancel = stack.enter_context(contextlib.closing(Cancel()))
    cancel(15)
    with pytest.raises(Cancelled):
        load_program(RunRequest(program=folder), RunCaller(cancel=cancel, loaders=(load_x07,)), stack)


@pytest.mark.parametrize("field", ["read_roots", "write_roots"])
@pytest.mark.parametrize(
    ("root", "granted"),
    [(".", True), ("out", True), ("{}/own", True), ("/home", False), ("{}/../other", False), ("{}-more", False)],
)
def test_a_projects_policy_grants_no_outside_files(
    folder: Path, stack: contextlib.ExitStack, field: str, root: str, *, granted: bool
) -> None:
    """A project's own policy cannot grant files outside the project."""
    place = folder / "own/policy.json"
    policy = default_policy()
    fs = replace(policy.fs, **{"enabled": True, field: (root.format(folder),)})
    place.write_bytes(render_policy(replace(policy, fs=fs)))
    request, _ = load(stack, folder)
    assert isinstance(request.policy, ProjectPolicy)
    if granted:
        assert effective_policy_of(request)[0].fs == fs
    else:
        with pytest.raises(RefusedError, match=f"outside the project. .*--policy {place}"):
            effective_policy_of(request)
    assert effective_policy_of(load(stack, folder, policy=place)[0])[0].fs == fs


def test_a_projects_policy_grants_no_hosts(folder: Path, stack: contextlib.ExitStack) -> None:
    """A project's own policy cannot grant hosts."""
    place = folder / "own/policy.json"
    policy = default_policy()
    net = replace(policy.net, enabled=True, allow_hosts=(HostPorts(host="example.org", ports=(443,)),))
    place.write_bytes(render_policy(replace(policy, net=net)))
    with pytest.raises(RefusedError, match=f"asks for network access. .*--policy {place}"):
        effective_policy_of(load(stack, folder)[0])
    assert effective_policy_of(load(stack, folder, policy=place)[0])[0].net == net


@pytest.mark.parametrize(("wall_ms", "own"), [(None, None), (4000, 5000), (5000, None)])
def test_the_lower_time_limit_applies(tmp_path: Path, wall_ms: int | None, own: int | None) -> None:
    """The lower one of a call's and the policy's time limit applies and is known as such."""
    limits = replace(default_policy().limits, wall_ms=5000)
    place = tmp_path / "p.json"
    place.write_bytes(render_policy(replace(default_policy(), limits=limits)))
    changes = None if wall_ms is None else LimitChanges(wall_ms=wall_ms)
    effective_policy = effective_policy_of(RunRequest(source=b"", policy=str(place), limits=changes))
    assert effective_policy.policy.limits.wall_ms == (wall_ms if own else 5000)
    assert (effective_policy.own and effective_policy.own.wall_ms) == own


def test_with_flags_alone_the_policy_is_still_the_built_in_one() -> None:
    """With flags alone the policy still counts as built-in."""
    overrides = Overrides(allow_read_root=("/data",))
    effective_policy = effective_policy_of(RunRequest(overrides=overrides, limits=LimitChanges(wall_ms=20000)))
    assert effective_policy.policy.fs.read_roots == ("/data",)
    assert (effective_policy.base, effective_policy.policy.limits.wall_ms) == ("built-in:default", 20000)


@pytest.mark.parametrize(("timeout_ms", "shorter"), [(60_000, False), (3000, True)])
def test_a_changed_limit_changes_the_digest(tmp_path: Path, timeout_ms: int, *, shorter: bool) -> None:
    """The policy digest is that of the file, or of the changed policy."""
    place = tmp_path / "policy.json"
    place.write_bytes(POLICY.replace(b"\n", b"\n\n"))
    request = RunRequest(source=b"", policy=str(place), limits=LimitChanges(wall_ms=timeout_ms))
    effective_policy = effective_policy_of(request)
    assert effective_policy.data == (render_policy(effective_policy.policy) if shorter else place.read_bytes())
    assert effective_policy.policy.limits.wall_ms == timeout_ms
    assert effective_policy.base == str(place)
