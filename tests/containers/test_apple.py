"""The apple-container backend, with a stand-in for Apple's `container` that runs the real guest image by podman."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.apple_container import VERSIONS
from tests.conftest import FULL
from tests.engines import apple_container
from x07_sandbox import Sandbox, exec_command
from x07_sandbox.backends.apple import AppleBackend
from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.errors import BackendError, HostError, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.engines import EngineUnderTest

pytestmark = pytest.mark.root


@pytest.fixture(params=VERSIONS if FULL else VERSIONS[-1:])
def apple(
    request: pytest.FixtureRequest,
    podman: EngineUnderTest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: Path,
) -> Iterator[EngineUnderTest]:
    """The stand-in in each version, selectable on Linux."""
    assert not state.exists()
    found = apple_container(podman, tmp_path, request.param)
    for name, value in {**found.env, "X07_VM_BACKEND": "apple-container"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(BY_NAME, "apple-container", replace(BY_NAME["apple-container"], linux=True))
    yield found
    assert found.containers() == []


@pytest.mark.usefixtures("apple")
def test_a_program_runs_and_its_exit_code_comes_from_the_agent() -> None:
    """Input, output, exit code and file changes pass through, and the result names the isolation of a VM."""
    found = exec_command(["sh", "-c", "cat; id -u; exit 3"], input=b"in\n", memory="256M")
    assert (found.outcome, found.exit_code, found.stdout.text) == ("failed", 3, "in\n65532\n"), found.reason
    assert found.isolation == "vm-hardware"


@pytest.mark.usefixtures("apple")
def test_sandboxes_work_and_the_agent_limits_tasks() -> None:
    """Commands, files and a limit on tasks work without any file of the host."""
    with Sandbox(backend="apple-container", procs=5) as sandbox:
        sandbox.files.write("a", b"1")
        assert sandbox.exec(["cat", "a"]).stdout == b"1"
        many = sandbox.exec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait"])
        assert b"fork" in many.stderr


def test_a_foreign_container_is_neither_listed_nor_removed(apple: EngineUnderTest) -> None:
    """Containers without x07's label are not orphans, and one with it is removed by name."""
    apple.call("create", *_OPTIONS, "--name", "mine", apple.env["X07_VM_GUEST_IMAGE"])
    apple.call("create", *_OPTIONS, "--name", "x07-1", "--label", "io.x07.schema=1", apple.env["X07_VM_GUEST_IMAGE"])
    backend = AppleBackend()
    (orphan,) = backend.orphans()
    assert (orphan.id, orphan.labels) == ("x07-1", {"io.x07.schema": "1"})
    assert backend.remove(orphan)
    assert apple.containers() == ["mine"]
    apple.call("delete", "--force", "mine")


_OPTIONS = (
    *("--network", "none", "--no-dns", "--memory", "256M", "--cpus", "1", "--uid", "0", "--gid", "0"),
    *("--workdir", "/"),
)


def test_a_changed_container_is_not_started(apple: EngineUnderTest, tmp_path: Path) -> None:
    """A container that got another image or a network between the order and the check is removed unstarted."""
    with pytest.MonkeyPatch.context() as patch:
        wrapper = tmp_path / "changing"
        words = rf"""{apple.env["X07_VM_APPLE_CONTAINER_BIN"]} "$@" | sed 's/"networks": \[\]/"networks": [1]/'"""
        wrapper.write_text(f"#!/bin/bash\nset -o pipefail\n{words}\n", encoding="utf-8")
        wrapper.chmod(0o755)
        patch.setenv("X07_VM_APPLE_CONTAINER_BIN", str(wrapper))
        with pytest.raises(BackendError, match="changed its network"):
            exec_command(["true"])


def test_a_missing_image_is_not_pulled(apple: EngineUnderTest) -> None:
    """An image that is not there is an error, and nothing is created."""
    with pytest.raises(ImageError, match="apple-container does not have it"):
        exec_command(["true"], image="localhost/absent:1")
    assert json.loads(apple.call("list", "--all", "--format", "json")) == []


@pytest.mark.usefixtures("apple")
def test_a_stopped_service_is_not_started(tmp_path: Path) -> None:
    """Without its service the backend is refused with the command that starts it."""
    (tmp_path / "stopped").touch()
    with pytest.raises(HostError, match="container system start"):
        exec_command(["true"])
