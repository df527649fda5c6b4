"""Promises of the command lines of `os` and `none`, and of how an unconfined program finds its files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.backends.process.view import AGENT, FILES, Sandbox, System, sandbox_argv
from x07_sandbox.guest.agent import platform_from_args
from x07_sandbox.guest.confine import MACHINE
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.process import CONFINED, Confined, Unconfined
from x07_sandbox.host.arch import host_arch
from x07_sandbox.jail.bwrap import PERL, SETPRIV, SUPERVISOR, supervisor_argv

SYSTEM = System(links={"bin": "usr/bin", "lib": "usr/lib"}, folders=("lib64",))
BODY: dict[str, Any] = {
    "argv": ["/x07/in/a", "/x07/input", "x/x07/in", "/x07/out"],
    "env": {"HOME": "/opt/x07"},
    "cwd": "/opt/x07",
    "mounts": [],
    "confine": {"threads": False},
}


def sandbox(**changed: Any) -> list[str]:  # noqa: ANN401 - fields of Sandbox
    """A command line."""
    values: dict[str, Any] = {
        "system": SYSTEM,
        "mark": "0123",
        "agent_fd": 10,
        "file_fds": dict.fromkeys(FILES, 11),
        "channel_fd": 12,
        "net_fd": 13,
        "scratch_bytes": 4096,
        "groups": {},
        "lock_fd": None,
    }
    return sandbox_argv(Sandbox(**(values | changed)))


def shown(argv: list[str]) -> set[str]:
    """Paths of the host that bubblewrap is told to show."""
    options = ("--ro-bind", "--bind", "--dev-bind", "--ro-bind-try", "--bind-try")
    return {argv[at + 1] for at, word in enumerate(argv) if word in options}


def test_only_the_system_is_shown() -> None:
    """A confined agent sees the system's programs and three files of /etc: no home folder, no /run, no socket."""
    assert shown(sandbox()) == {"/usr", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"}


def test_control_groups_are_shown_where_there_are_any(tmp_path: Any) -> None:  # noqa: ANN401 - only passed on
    """The program's groups lie where the agent looks for them."""
    argv = sandbox(groups={"memory": tmp_path})
    assert argv[argv.index(str(tmp_path)) + 1] == "/run/x07/cgroup/memory"


@pytest.mark.parametrize("word", ["--unshare-user", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--clearenv"])
def test_nothing_is_shared(word: str) -> None:
    """The network, processes, and environment of the caller are not the agent's."""
    assert word in sandbox()


def test_the_agent_carries_the_mark() -> None:
    """The agent's own arguments have the mark, by which it is known as ours."""
    argv = sandbox()
    assert argv[argv.index("--") + 1 :][-5:] == [AGENT, "os", "12", "13", "0123"]


def test_root_runs_all_of_it_as_another_user() -> None:
    """With a uid the supervisor itself runs as that, from its text: that user may not reach our files."""
    numbers = {"deadline_s": 5, "runner_pid": 1, "syscalls": host_arch().syscalls, "nest": True}
    plain = supervisor_argv(["it"], **numbers)  # type: ignore[arg-type] # the words of a call, together
    assert plain[:2] == [PERL, SUPERVISOR]
    other = supervisor_argv(["it"], uid=60000, **numbers)  # type: ignore[arg-type] # as above
    assert other[:3] == [SETPRIV, "--reuid", "60000"]
    assert "--clear-groups" in other
    assert other[other.index(PERL) + 1] == "-e"
    assert other[-len(plain) + 2 :] == plain[2:]


def test_an_unconfined_program_finds_its_files() -> None:
    """Words that are one of our paths, or lie below one, lead to the job's own folder; no other word changes."""
    adapted = Unconfined(3, "/state/files").adapt(BODY)
    assert adapted["argv"] == ["/state/files/in/a", "/x07/input", "x/x07/in", "/state/files/out"]
    assert (adapted["env"], adapted["cwd"]) == ({"HOME": "/state/files/work"}, "/state/files/work")
    assert adapted["confine"]["threads"]


def test_an_unconfined_program_gets_no_folder_of_the_host() -> None:
    """Folders of the host cannot be brought in without confinement: the job fails."""
    with pytest.raises(JobError):
        Unconfined(3, "/state/files").adapt(BODY | {"mounts": [{"tree": 128, "at": "/data"}]})


def test_a_project_of_an_unconfined_program_lies_in_the_work_folder() -> None:
    """A mount without a folder of the host becomes the job's own folder, and nothing is mounted."""
    mounts = [{"tree": None, "at": "/project"}]
    adapted = Unconfined(3, "/state/files").adapt(BODY | {"mounts": mounts, "cwd": "/project"})
    assert (adapted["mounts"], adapted["cwd"]) == ([], "/state/files/work")


@given(st.text())
def test_words_without_our_paths_stay(word: str) -> None:
    """Any other word is passed on as it is."""
    if not word.startswith(("/x07", "/opt/x07")):
        assert Unconfined(3, "/f").adapt(BODY | {"argv": [word]})["argv"] == [word]


def test_the_agent_refuses_a_platform_that_it_does_not_know() -> None:
    """A command line that says nothing known starts nothing."""
    assert isinstance(platform_from_args(["os", "3", "4", "mark"]), Confined)
    assert isinstance(platform_from_args(["none", "3", "/f", "mark"]), Unconfined)
    for words in (["os"], ["vm", "3", "mark"], ["none", "3", "mark"]):
        with pytest.raises(JobError):
            platform_from_args(words)


def test_a_confined_process_takes_its_own_steps() -> None:
    """Where a process of the host cannot take a step of a virtual machine, it takes another, and leaves none out."""
    machine = {step.name: step for step in (*MACHINE.world, *MACHINE.rights)}
    confined = {step.name: step for step in (*CONFINED.world, *CONFINED.rights)}
    assert machine.keys() - confined.keys() == {"no capabilities"}  # a part of its own user
    other = {name for name, step in confined.items() if step is not machine.get(name)}
    assert other == {"devices", "rules about programs", "own user", "scopes"}
