"""The order of a start: the VM first, then what its session needs. What is refused then has not reached the VM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from x07_sandbox import Sandbox, SandboxError, run_program
from x07_sandbox.channel.link import Link
from x07_sandbox.channel.messages import Open, Seed
from x07_sandbox.sessions import job as jobs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]

Sent = list[type[Any]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The types of the messages that the host sends to guests, in order."""
    types: Sent = []
    send = Link.send

    def noted(link: Link, message: Any) -> None:  # noqa: ANN401 - any message
        types.append(type(message))
        send(link, message)

    monkeypatch.setattr(Link, "send", noted)
    return types


def no_folder(folder: Path) -> dict[str, Any]:
    """A working folder that does not exist."""
    return {"workdir": folder / "missing"}


def no_repository(folder: Path) -> dict[str, Any]:
    """A working folder that is no repository."""
    return {"workdir": folder, "git": True}


def named_pipe(folder: Path) -> dict[str, Any]:
    """A root that is no file or folder."""
    os.mkfifo(folder / "pipe")
    return {"read_roots": [str(folder / "pipe")]}


def missing_root(folder: Path) -> dict[str, Any]:
    """A root that does not exist."""
    return {"read_roots": [str(folder / "missing")]}


CASES: list[Callable[[Path], dict[str, Any]]] = [no_folder, no_repository, named_pipe, missing_root]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["run", "sandbox"])
def test_what_is_refused_while_the_vm_wakes_has_sent_it_nothing(
    case: Callable[[Path], dict[str, Any]], kind: str, tmp_path: Path, state: Path, sent: Sent
) -> None:
    """A refusal ends a VM that has got at most clock and entropy, and leaves no record of a job."""
    options = case(tmp_path)
    if kind == "run":
        with pytest.raises(SandboxError) as raised:
            run_program(source="print(1)", toolchain="python", check=True, **options)
        result = raised.value.result
        assert result is not None
        assert (result.phases, result.outcome in {"refused", "usage-error"}) == ({}, True)
    else:
        with pytest.raises(SandboxError):
            Sandbox(**options)
    assert set(sent) <= {Seed}
    assert [path.name for path in state.iterdir() if path.name[0].isdigit()] == []


def test_a_vm_starts_before_its_session_is_described(
    tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are copied while the VM wakes, and the session is opened once both are done."""
    (tmp_path / "file").write_text("content")
    order: list[str] = []
    describe = jobs.SessionJob._describe  # noqa: SLF001

    def noted(job: jobs.SessionJob) -> None:
        order.append(f"after {len(sent)} messages")
        describe(job)

    monkeypatch.setattr(jobs.SessionJob, "_describe", noted)
    with Sandbox(workdir=tmp_path) as sandbox:
        assert sandbox.files.read("file") == b"content"
    assert (sent[:2], order[0]) == ([Seed, Open], "after 1 messages")
