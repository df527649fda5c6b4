"""The jail's command line in both forms."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.jail.bwrap import BWRAP, INNER_UID, PERL, SETPRIV, SUPERVISOR, Jail, jail_argv

COMMAND = ["/usr/bin/qemu", "--bind", "/", "/", "--uid", "0", "--"]
UID = 0x70000123
WITH_ONE = {"--uid", "--gid", "--cap-drop", "--cap-add", "--perms", "--dir", "--sync-fd"}
WITH_ONE |= {"--remount-ro", "--seccomp", "--add-seccomp-fd"}
WITH_TWO = {"--setenv", "--ro-bind", "--ro-bind-fd", "--dev-bind", "--file"}


def jail(uid: int | None) -> Jail:
    """A jail as for a VM."""
    return Jail(
        files=("/usr/bin/qemu", "/lib64/ld.so", "/usr/share/seabios/bios.bin"),
        fd_files=((11, "/img/vmlinux"), (12, "/img/initrd.cpio")),
        devices=("/dev/urandom",),
        uid=uid,
        mark="m" * 32,
        deadline_s=815,
        runner_pid=4242,
        nest=True,
        filter_fd=24,
        lock_fd=None if uid is None else 23,
    )


def options(made: Jail) -> list[tuple[str, ...]]:
    """Bubblewrap's own options, each with its values, up to the command."""
    argv = jail_argv(made, COMMAND)
    words = argv[argv.index(BWRAP) + 1 :]
    found = []
    while words[0] != "--":
        size = 2 if words[0] in WITH_ONE else 3 if words[0] in WITH_TWO else 1
        found.append(tuple(words[:size]))
        words = words[size:]
    return found


def inside(made: Jail) -> list[str]:
    """The command that bubblewrap executes."""
    argv = jail_argv(made, COMMAND)
    return argv[argv.index("--", argv.index(BWRAP)) + 1 :]


BOTH = pytest.mark.parametrize("uid", [None, UID], ids=["user", "root"])


@BOTH
def test_a_supervisor_comes_first(uid: int | None) -> None:
    """The supervisor is started first, with deadline, runner and the uid's lock."""
    argv = jail_argv(jail(uid), COMMAND)
    assert argv[:6] == [PERL, SUPERVISOR, "815", "4242", "-1" if uid is None else "23", "1"]
    assert argv[6:8] == ["-1", ""]
    assert argv.index(BWRAP) == 16


def starter(made: Jail, command: list[str]) -> list[str]:
    """The command line up to bubblewrap, followed by another command."""
    argv = jail_argv(made, COMMAND)
    return argv[: argv.index(BWRAP)] + command


def test_the_timer_ends_what_follows_it() -> None:
    """At the deadline the command is killed, and the supervisor ends by SIGALRM."""
    made = msgspec.structs.replace(jail(None), deadline_s=1, runner_pid=os.getpid())
    child = subprocess.Popen(starter(made, ["/bin/sleep", "60"]))
    try:
        assert child.wait(60) == -signal.SIGALRM
    finally:
        child.kill()
        child.wait()


def test_no_jail_starts_without_its_runner() -> None:
    """The jail executes nothing if its runner is gone."""
    made = msgspec.structs.replace(jail(None), runner_pid=os.getppid())
    done = subprocess.run(starter(made, ["/bin/echo", "started"]), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert (done.stdout, "the runner is gone" in done.stderr) == ("", True)


def test_the_jail_dies_with_a_runner_that_is_killed() -> None:
    """A killed runner takes the jail and everything in it along."""
    words = starter(jail(None), ["/bin/sleep", "60"])
    words[words.index("4242")] = "RUNNER"
    read_end, write_end = os.pipe()
    code = "import os, subprocess, sys; words = [str(os.getpid()) if w == 'RUNNER' else w for w in sys.argv[2:]]; "
    code += "subprocess.Popen(words, pass_fds=[int(sys.argv[1])]); print('started', flush=True); input()"
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(write_end), *words],
        pass_fds=[write_end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(write_end)
    with runner, open(read_end, "rb") as pipe:  # noqa: PTH123 - a descriptor, no path
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"started\n"
        runner.kill()
        # The pipe ends when its last holder has exited.
        assert select.select([pipe], [], [], 30)[0]
        assert pipe.read() == b""


@BOTH
def test_the_jail_dies_with_its_starter_and_inherits_nothing(uid: int | None) -> None:
    """The jail has no inherited environment and no terminal, waits for its filter, and dies with its parent."""
    found = options(jail(uid))
    assert ("--seccomp", "24") in found
    assert not {"--block-fd", "--info-fd"} & {option[0] for option in found}
    # The lock on the job's uid is held as long as the jail lives.
    assert [option for option in found if option[0] == "--sync-fd"] == ([] if uid is None else [("--sync-fd", "23")])
    assert {("--die-with-parent",), ("--new-session",), ("--clearenv",)} <= set(found)
    given = {option[1]: option[2] for option in found if option[0] == "--setenv"}
    assert given == {"X07_INSTANCE": "m" * 32, "MALLOC_ARENA_MAX": "1"}
    assert found.index(("--clearenv",)) < found.index(("--setenv", "X07_INSTANCE", "m" * 32))
    assert not any(option[0].startswith("--share") for option in found)


def test_the_user_form_has_all_namespaces_and_a_uid_that_is_not_0() -> None:
    """An ordinary user's jail has every namespace, a non-root uid and no capability."""
    found = options(jail(None))
    assert ("--unshare-all",) in found
    assert int(str(INNER_UID)) > 0
    assert {("--uid", str(INNER_UID)), ("--gid", str(INNER_UID)), ("--cap-drop", "ALL")} <= set(found)
    assert not any(option[0] == "--cap-add" for option in found)
    assert inside(jail(None)) == COMMAND


def test_the_root_form_has_no_user_namespace_and_keeps_what_changing_uid_needs() -> None:
    """Root's jail has all other namespaces and only the capabilities to change its uid, which setpriv then drops."""
    found = options(jail(UID))
    unshared = {option[0] for option in found if option[0].startswith("--unshare")}
    assert unshared == {f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")}
    assert not {"--uid", "--gid"} & {option[0] for option in found}
    kept = [option[1] for option in found if option[0] == "--cap-add"]
    assert sorted(kept) == ["CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
    assert found.index(("--cap-drop", "ALL")) < found.index(("--cap-add", kept[0]))
    words = inside(jail(UID))
    assert words[0] == SETPRIV
    assert words[words.index("--") + 1 :] == COMMAND
    rights = words[1 : words.index("--")]
    assert rights[rights.index("--reuid") + 1] == rights[rights.index("--regid") + 1] == str(UID)
    cleared = {"--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"}
    assert cleared <= set(rights)


@BOTH
def test_files_are_bound_read_only_and_nothing_else_is(uid: int | None) -> None:
    """The jail contains exactly the named files, read-only, and no argument of the command is read as an option."""
    made = jail(uid)
    assert jail_argv(made, COMMAND)[-len(COMMAND) :] == COMMAND
    binds = [option for option in options(made) if "bind" in option[0]]
    assert [option for option in binds if option[0] == "--ro-bind"] == [
        ("--ro-bind", path, path) for path in made.files
    ]
    assert [option for option in binds if option[0] == "--ro-bind-fd"] == [
        ("--ro-bind-fd", str(fd), path) for fd, path in made.fd_files
    ]
    assert [option for option in binds if option[0] == "--dev-bind"] == [("--dev-bind", "/dev/urandom", "/dev/urandom")]
    assert {option[0] for option in binds} == {"--ro-bind", "--ro-bind-fd", "--dev-bind"}


@BOTH
def test_copied_files_are_read_only(uid: int | None) -> None:
    """Files copied into the jail are readable and cannot be written."""
    words = options(msgspec.structs.replace(jail(uid), fd_copies=((13, "/proc/sys/vm/overcommit_memory"),)))
    at = words.index(("--file", "13", "/proc/sys/vm/overcommit_memory"))
    assert words[at - 1] == ("--perms", "0444")
    assert ("--dir", "/proc/sys/vm") in words[:at]
    assert ("--remount-ro", "/") in words[at:]


@BOTH
def test_there_is_no_proc_and_nothing_to_write(uid: int | None) -> None:
    """The jail has no /proc, /dev or tmpfs, and its root is read-only."""
    found = options(jail(uid))
    names = {option[0] for option in found}
    assert not {"--proc", "--dev", "--tmpfs", "--mqueue", "--bind", "--bind-fd", "--overlay", "--file"} & names
    sealed = found.index(("--remount-ro", "/"))
    last = max(at for at, option in enumerate(found) if option[0] in WITH_TWO | {"--dir"} - {"--setenv"})
    assert sealed > last


PATHS = st.lists(st.text("ab.-", min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)


@given(st.lists(PATHS, max_size=4, unique=True), st.sampled_from([None, UID]))
def test_every_folder_is_made_once_parents_first(paths: list[str], uid: int | None) -> None:
    """Each parent folder is created once, before its contents, and readable."""
    made = msgspec.structs.replace(jail(uid), files=tuple(paths))
    found = options(made)
    folders = [found[at + 1][1] for at, option in enumerate(found) if option == ("--perms", "0755")]
    assert len(set(folders)) == len(folders)
    for at, folder in enumerate(folders):
        parent = folder.rpartition("/")[0]
        assert parent == "" or parent in folders[:at]
    for path in [*paths, "/img/vmlinux", "/dev/urandom"]:
        parent = path.rpartition("/")[0]
        assert parent == "" or parent in folders
