"""Hosts that forbid namespaces: the jail without namespaces is used automatically, reported, and can be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import need
from tests.vm.jail_helpers import (
    HERE,
    Account,
    account_fixture,  # noqa: F401 - pytest finds it here
    accounts_fixture,  # noqa: F401 - pytest finds it here
)
from x07_sandbox.jail.bwrap import SETPRIV
from x07_sandbox.jail.forms import FLAGS_FOR_A_USER, FLAGS_FOR_ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vm

WRAPPER = HERE / "without_namespaces.py"
# Docker's default capabilities of root in a container, by setpriv's names.
IN_A_CONTAINER = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)


# An ordinary user has a cache of their own, in which each kind of VM is saved first.
EITHER = pytest.mark.parametrize(
    "account", ["root", pytest.param("user", marks=pytest.mark.full("saves VMs for one more user"))], indirect=True
)


@pytest.fixture(name="bare")
def bare_fixture(account: Account) -> Account:
    """Root and an ordinary user in turn, on a host without namespaces."""
    return replace(account, namespaces=False)


def _run(account: Account, *words: str, inside: tuple[str, ...] = (), **env: str) -> tuple[int, dict[str, Any]]:
    program = account.folder / "six.py"
    program.write_text("print(6 * int(input()))\n", encoding="ascii")
    program.chmod(0o644)
    caller = replace(account, env=account.env | env)
    done = caller.x07("run", "--json", *words, str(program), stdin=b"7\n", inside=inside)
    return done.returncode, json.loads(done.stdout)


@EITHER
@pytest.mark.parametrize(
    ("words", "start"),
    [
        ((), "clone"),
        pytest.param(("--cold",), "cold", marks=pytest.mark.full("one more cold boot of each phase")),
    ],
    ids=["clone", "cold"],
)
def test_a_run_without_namespaces_uses_landlock(bare: Account, words: tuple[str, ...], start: str) -> None:
    """A run without namespaces is jailed by Landlock and seccomp, and the result says so."""
    code, result = _run(bare, *words)
    assert (code, result["outcome"], result["stdout"]["text"]) == (0, "ok", "42\n"), result["reason"]
    assert result["jail"].startswith(bare.jail)
    assert result["jail"].startswith("Landlock and seccomp, ")
    assert {phase["start"] for phase in result["phases"].values()} == {start}


def test_namespaces_can_be_required(bare: Account) -> None:
    """X07_VM_REQUIRE_NAMESPACES=1 refuses a run without namespaces, and names the container flags it needs."""
    code, result = _run(bare, X07_VM_REQUIRE_NAMESPACES="1")
    assert (code, result["outcome"], result["jail"]) == (125, "refused", None)
    assert "a jail with namespaces was required" in result["reason"]
    assert (FLAGS_FOR_ROOT if bare.form == "root" else FLAGS_FOR_A_USER) in result["reason"]


@EITHER
def test_required_namespaces_that_exist_change_nothing(account: Account) -> None:
    """X07_VM_REQUIRE_NAMESPACES=1 changes nothing if namespaces are allowed."""
    code, result = _run(account, X07_VM_REQUIRE_NAMESPACES="1")
    assert (code, result["outcome"]) == (0, "ok"), result["reason"]
    assert result["jail"].startswith("namespaces, ")


def test_without_landlock_nothing_runs(account: Account) -> None:
    """A kernel with neither namespaces nor Landlock runs nothing, and the reason names both."""
    code, result = _run(account, inside=(sys.executable, str(WRAPPER), "--nor-landlock"))
    assert (code, result["jail"]) == (125, None)
    assert "namespaces are forbidden here" in result["reason"]
    assert "needs Landlock 3 (Linux 6.2), but the kernel has no Landlock" in result["reason"]


def test_doctor_lists_its_findings_where_nothing_runs(account: Account) -> None:
    """`x07 doctor` and a dry run name the jail as the obstacle where there are neither namespaces nor Landlock."""
    inside = (sys.executable, str(WRAPPER), "--nor-landlock")
    done = account.x07("doctor", "--json", inside=inside)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["jail"]["good"], findings["VM start"]["good"]) == (1, False, False)
    assert "the kernel has no Landlock" in findings["VM start"]["text"]
    code, result = _run(account, "--dry-run", inside=inside)
    assert (code, "the kernel has no Landlock" in result["reason"]) == (125, True)


def test_a_container_filter_costs_only_hot_clones(tmp_path: Path) -> None:
    """Where a container's filter forbids setting host names, the jail has namespaces, and no hot clone is tried."""
    code = "from x07_sandbox.backends.qemu.hot import unsupported; from x07_sandbox.jail.forms import jail_form; "
    code += "print(jail_form().name, unsupported(kvm=False), sep='; ')"
    argv = [sys.executable, str(WRAPPER), "--only-host-name", sys.executable, "-c", code]
    env = os.environ | {"X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("namespaces; criu saves no process with a system call filter"), done.stdout


def test_a_hidden_part_of_proc_rules_out_hot_clones(account: Account) -> None:
    """Where parts of /proc are hidden, as in containers, an ordinary user's hot clones are ruled out without a try."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    script = 'mount -t tmpfs tmpfs /proc/fs && exec "$@"'
    inside = ("unshare", "--mount", "/bin/sh", "-ec", script, "hidden")
    code = "from x07_sandbox.backends.qemu.hot import unsupported; print(unsupported(kvm=False))"
    done = subprocess.run(
        [*inside, *account.words, sys.executable, "-B", "-c", code],
        env=account.env,
        cwd=account.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "" if account.form == "root" else "criu needs a /proc of its own, and parts of /proc are hidden here"
    assert done.stdout.startswith(reason), done.stdout
    assert bool(done.stdout.strip()) == bool(reason)


def test_doctor_names_the_form_and_the_flags(bare: Account) -> None:
    """`x07 doctor` names the jail's form and the container flags for the form with namespaces."""
    # Without an image, no VM is started.
    done = replace(bare, env=bare.env | {"X07_VM_CACHE_DIR": str(bare.home / "no-images")}).x07("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    jail = findings["jail"]
    assert (jail["good"], "without namespaces, by Landlock" in jail["text"]) == (None, True)
    assert "X07_VM_REQUIRE_NAMESPACES=1 rejects this" in jail["text"]
    assert (FLAGS_FOR_ROOT if bare.form == "root" else FLAGS_FOR_A_USER) in jail["fix"]
    assert findings["tools to build images"]["good"] is None


def test_the_namespace_verdict_is_cached(tmp_path: Path) -> None:
    """The verdict on namespaces is cached for one boot and set of privileges."""
    env = os.environ | {"X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    code = "from x07_sandbox.jail.forms import forbidden; print(bool(forbidden()))"

    def tried(*before: str) -> tuple[str, int]:
        argv = [*before, sys.executable, "-c", code]
        done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        (record,) = (tmp_path / "cache" / "verdicts").glob("namespaces-*.json")
        return done.stdout.strip(), record.stat().st_mtime_ns

    first, again = tried(), tried()
    assert first == again
    assert first[0] == "False"
    without = tried(sys.executable, str(WRAPPER))
    assert (without[0], without == tried(sys.executable, str(WRAPPER))) == ("True", True)


@pytest.mark.parametrize(
    ("more", "form"),
    [(("sys_admin", "net_admin"), "namespaces"), ((), "Landlock and seccomp")],
    ids=["with the flags", "without"],
)
def test_the_suggested_flags_allow_namespaces(tmp_path: Path, more: tuple[str, ...], form: str) -> None:
    """Root in a container with the flags that doctor suggests gets the jail with namespaces."""
    need(os.geteuid() == 0, "needs root, to take rights away from it", installable=False)
    assert all(f"--cap-add {capability.upper()}" in FLAGS_FOR_ROOT for capability in more)
    kept = "-all," + ",".join(f"+{name}" for name in (*IN_A_CONTAINER, *more))
    code = "from x07_sandbox.jail.forms import jail_form; print(jail_form().name)"
    argv = [SETPRIV, f"--bounding-set={kept}", "--inh-caps=-all", sys.executable, "-c", code]
    env = os.environ | {"X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (form, "")
