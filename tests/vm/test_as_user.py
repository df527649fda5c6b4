"""x07 as an ordinary user, with a separate home and image: nothing needs root."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import sample
from tests.vm.conftest import marked
from tests.vm.jail_helpers import (
    accounts_fixture,  # noqa: F401 - pytest finds it here
    ordinary_fixture,  # noqa: F401 - pytest finds it here
)

if TYPE_CHECKING:
    import subprocess

    from tests.vm.jail_helpers import (
        Account,
    )

pytestmark = [pytest.mark.vm, pytest.mark.user]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def ran(ordinary: Account) -> subprocess.CompletedProcess[bytes]:
    """Return the run of the Python example over its input, started by the user."""
    shutil.copy(EXAMPLES / "jsonl_to_csv.py", ordinary.folder)
    return ordinary.x07(
        "run", "--json", str(ordinary.folder / "jsonl_to_csv.py"), stdin=(EXAMPLES / "orders.jsonl").read_bytes()
    )


def test_an_ordinary_user_runs_the_example(ran: subprocess.CompletedProcess[bytes]) -> None:
    """An ordinary user runs the Python example with their own image and gets the CSV."""
    notices = (b"saving a VM for", b"warming up a VM for")  # as for every new image
    assert all(any(notice in line for notice in notices) for line in ran.stderr.splitlines())
    result = json.loads(ran.stdout)
    assert (ran.returncode, result["outcome"]) == (0, "ok"), result["reason"]
    assert result["stdout"]["text"].startswith("id,customer.name,")


def test_the_result_names_the_jail_of_user_namespaces(ran: subprocess.CompletedProcess[bytes]) -> None:
    """The result of an ordinary user's run names the jail made of user namespaces."""
    assert json.loads(ran.stdout)["jail"].startswith("namespaces, user; ")


def test_stored_files_are_private_to_the_user(ran: subprocess.CompletedProcess[bytes], ordinary: Account) -> None:
    """Folders of state and cache have mode 0700 and files 0600; parts of images and templates have 0444."""
    assert ran.returncode == 0
    roots = [ordinary.home / ".x07", ordinary.cache]
    found = [path for root in roots if root.exists() for path in [root, *root.rglob("*")]]
    assert found
    for path in found:
        info = path.lstat()
        assert info.st_uid == ordinary.uid, path
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            assert mode == 0o700, (path, oct(mode))
        elif {"images", "templates"} & {above.name for above in path.parents[1:3]} and path.parent.name != "names":
            assert mode == 0o444, (path, oct(mode))
        else:
            assert mode == 0o600, (path, oct(mode))


def test_an_ordinary_users_run_leaves_no_remains(ran: subprocess.CompletedProcess[bytes], ordinary: Account) -> None:
    """After an ordinary user's run, both of its jobs are recorded as done and no process is left."""
    run = json.loads(ran.stdout)["run"]
    for phase in ("build", "run"):
        folder = ordinary.state / f"{run}-{phase}"
        assert (folder / "done").is_file()
        owner = json.loads((folder / "owner.json").read_bytes())
        assert marked(owner["instance"]) == []
        assert owner["cgroups"] == [] or not any(Path(group).exists() for group in owner["cgroups"])


def test_a_program_that_the_user_may_not_read_is_refused(ordinary: Account, tmp_path: Path) -> None:
    """A program that the user may not read is refused with the reason, and no job starts."""
    if os.geteuid() != 0:
        program = tmp_path / "secret.py"
        program.write_text("print(1)\n", encoding="ascii")
        program.chmod(0)
    else:
        program = Path("/root/secret.py")  # whether it exists or not: the user cannot look below /root
    before = set(ordinary.state.glob("*"))
    done = ordinary.x07("run", "--json", str(program))
    result = json.loads(done.stdout)
    assert (done.returncode, result["outcome"]) == (2, "usage-error")
    assert "Permission denied" in result["reason"]
    assert set(ordinary.state.glob("*")) == before


@pytest.mark.parametrize(
    ("place", "variable"), sample([("state", "X07_VM_STATE_DIR"), ("cache/slots", "X07_VM_CACHE_DIR")], 1)
)
@pytest.mark.usefixtures("ran")
def test_doctor_finds_a_folder_that_the_user_may_not_write(ordinary: Account, place: str, variable: str) -> None:
    """If a run could not write its queue or its records, the doctor says BAD and names the folder and the fix."""
    folder = ordinary.state if place == "state" else ordinary.cache / "slots"
    kept = [path for path in folder.iterdir() if path.name == "turn"]
    for path in kept:
        path.unlink()
    folder.chmod(0o500)
    try:
        done = ordinary.x07("doctor", "--json")
    finally:
        folder.chmod(0o700)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["VM start"]["good"]) == (1, False)
    assert f"{folder}" in findings["VM start"]["text"]
    assert "Permission denied" in findings["VM start"]["text"]
    assert variable in findings["VM start"]["fix"]


def test_an_ordinary_users_run_has_a_gate(ordinary: Account) -> None:
    """An ordinary user's run has an egress gate, and its result lists failed and denied connections."""
    program = ordinary.folder / "connect.py"
    program.write_text(
        "import socket\n"
        "for host in ('x07-conform.invalid', 'unlisted.example'):\n"
        "    try:\n"
        "        socket.create_connection((host, 80))\n"
        "    except OSError as exc:\n"
        "        print(type(exc).__name__)\n",
        encoding="ascii",
    )
    done = ordinary.x07("run", "--json", "--allow-host", "x07-conform.invalid:80", str(program))
    result = json.loads(done.stdout)
    assert result["outcome"] == "ok", result["reason"]
    assert result["stdout"]["text"].splitlines()[1] == "gaierror"
    rows = [(row["host"], row["count"]) for kind in ("failed", "denied") for row in result["net"][kind]]
    assert rows == [("x07-conform.invalid", 1), ("unlisted.example", 1)]
    assert list(ordinary.state.parent.rglob("net.jsonl"))


@pytest.mark.usefixtures("ran")
def test_an_ordinary_user_forks_and_pauses_a_sandbox(ordinary: Account) -> None:
    """A user can read the memory of their own VMs, so all that is done with snapshots works without root."""

    def x07(*words: str) -> str:
        done = ordinary.x07(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    x07("sandbox", "create", "--name", "first")
    x07("sandbox", "exec", "first", "--", "sh", "-c", "echo one > f")
    (fork,) = x07("sandbox", "fork", "first").split()
    point = x07("sandbox", "checkpoint", "first").strip()
    x07("sandbox", "exec", "first", "--", "rm", "f")
    x07("sandbox", "rollback", "first", point)
    snapshot = x07("sandbox", "snapshot", "first").strip()
    x07("sandbox", "pause", "first")
    made = x07("sandbox", "create", "--snapshot", snapshot).strip()
    for name in ("first", fork, made):
        assert x07("sandbox", "exec", name, "--", "cat", "f") == "one\n"
        x07("sandbox", "close", name)
    x07("snapshot", "rm", snapshot)
