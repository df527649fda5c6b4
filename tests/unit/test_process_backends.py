"""Command lines of `os` and `none`, and path adaptation for unconfined programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.backends.process import AGENT, FILES, Sandbox, System, sandbox_argv
from x07_sandbox.channel.messages import CommandLimits, Confine, Exec, Mount, Open, Room
from x07_sandbox.guest.agent import platform_from_args
from x07_sandbox.guest.confine import MACHINE
from x07_sandbox.guest.process import CONFINED, Confined, Unconfined
from x07_sandbox.guest.system import JobError
from x07_sandbox.jail.bwrap import PERL, SETPRIV, SUPERVISOR, supervisor_argv

if TYPE_CHECKING:
    from pathlib import Path

SYSTEM = System(links={"bin": "usr/bin", "lib": "usr/lib"}, folders=("lib64",))
OPENING = Open(
    hostname="x07",
    mem_bytes=1,
    tasks=1,
    tmp_bytes=1,
    files=[],
    mounts=[],
    confine=Confine(threads=False, spawn=False, execute=False, programs=[], prefixes=["/a"], alone=True),
    network=None,
    out_writable=True,
    room=Room(0, 0),
)
ORDER = Exec(
    id=1,
    argv=["/x07/in/a", "/x07/input", "x/x07/in", "/x07/out"],
    env={"HOME": "/opt/x07"},
    cwd="/opt/x07",
    limits=CommandLimits(mem_bytes=1, tasks=1, cpu_ms=1, fds=1, core_bytes=0),
)


def sandbox(**changed: Any) -> list[str]:  # noqa: ANN401 - fields of Sandbox
    """A command line."""
    values: dict[str, Any] = {
        "system": SYSTEM,
        "mark": "0123",
        "agent_fd": 10,
        "file_fds": dict.fromkeys(FILES, 11),
        "channel_fd": 12,
        "scratch_bytes": 4096,
        "groups": {},
        "lock_fd": None,
    }
    return sandbox_argv(Sandbox(**(values | changed)))


def shown(argv: list[str]) -> set[str]:
    """The host paths that bubblewrap mounts."""
    options = ("--ro-bind", "--bind", "--dev-bind", "--ro-bind-try", "--bind-try")
    return {argv[at + 1] for at, word in enumerate(argv) if word in options}


def test_only_the_system_is_shown(tmp_path: Path) -> None:
    """A confined agent sees only system folders, three files of /etc and its cgroups, and shares nothing else."""
    argv = sandbox()
    assert shown(argv) == {"/usr", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"}
    assert {"--unshare-user", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--clearenv"} <= set(argv)
    assert argv[argv.index("--") + 1 :][-4:] == [AGENT, "os", "12", "0123"]  # with the job's mark
    argv = sandbox(groups={"memory": tmp_path})
    assert argv[argv.index(str(tmp_path)) + 1] == "/run/x07/cgroup/memory"


def test_root_runs_all_of_it_as_another_user() -> None:
    """With a uid the supervisor runs as that user too."""
    numbers = {"deadline_s": 5, "runner_pid": 1, "nest": True}
    plain = supervisor_argv(["it"], **numbers)  # type: ignore[arg-type] # the words of a call, together
    assert plain[:2] == [PERL, SUPERVISOR]
    other = supervisor_argv(["it"], uid=60000, **numbers)  # type: ignore[arg-type] # as above
    assert other[:3] == [SETPRIV, "--reuid", "60000"]
    assert "--clear-groups" in other
    assert other[other.index(PERL) + 1] == "-e"
    assert other[-len(plain) + 2 :] == plain[2:]


def test_unconfined_paths_are_mapped() -> None:
    """An unconfined program's paths, also of a project, are mapped to the job's folder, and nothing restricts it."""
    platform = Unconfined(3, "/state/files")
    adapted = platform.adapt_command(ORDER)
    assert adapted.argv == ["/state/files/in/a", "/x07/input", "x/x07/in", "/state/files/out"]
    assert (adapted.env, adapted.cwd) == ({"HOME": "/state/files/work"}, "/state/files/work")
    opening = platform.adapt(OPENING._replace(mounts=[Mount(None, "", "/project", write=True, changes=False)]))
    confine = opening.confine
    assert (confine.threads, confine.spawn, confine.execute, confine.programs) == (True, True, True, None)
    assert opening.mounts == []
    assert platform.adapt_command(ORDER._replace(cwd="/project")).cwd == "/state/files/work"


def test_an_unconfined_program_gets_no_folder_of_the_host() -> None:
    """An unconfined program gets no host folder."""
    with pytest.raises(JobError):
        Unconfined(3, "/state/files").adapt(
            OPENING._replace(mounts=[Mount(0, "", "/data", write=False, changes=False)])
        )


@given(st.text())
def test_other_arguments_are_unchanged(word: str) -> None:
    """Arguments without our paths are passed unchanged."""
    if not word.startswith(("/x07", "/opt/x07")):
        assert Unconfined(3, "/f").adapt_command(ORDER._replace(argv=[word])).argv == [word]


def test_the_agent_refuses_a_platform_that_it_does_not_know() -> None:
    """The agent starts nothing on an unknown platform."""
    assert isinstance(platform_from_args(["os", "3", "mark"]), Confined)
    assert isinstance(platform_from_args(["none", "3", "/f", "mark"]), Unconfined)
    for words in (["os"], ["vm", "3", "mark"], ["none", "3", "mark"]):
        with pytest.raises(JobError):
            platform_from_args(words)


def test_a_confined_process_replaces_vm_steps() -> None:
    """A confined process replaces the steps of a VM that it cannot take, and omits none."""
    machine = {step.name: step for step in (*MACHINE.world, *MACHINE.rights)}
    confined = {step.name: step for step in (*CONFINED.world, *CONFINED.rights)}
    assert machine.keys() - confined.keys() == {"bounding set", "no capabilities"}  # parts of its own user
    other = {name for name, step in confined.items() if step is not machine.get(name)}
    assert other == {"devices", "rules about programs", "own user"}
