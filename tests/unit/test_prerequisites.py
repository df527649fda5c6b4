"""`x07 doctor` about backends: all of them on any host, with three remedies for a failure."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.podman import EngineBackend
from x07_sandbox.backends.prerequisites import Found, Looks, Need, check, require, unmet
from x07_sandbox.backends.qemu.start import needs_of
from x07_sandbox.backends.registry import BY_NAME, Platform, create
from x07_sandbox.cli.doctor import START, backend_state, platform_finding, proof_among
from x07_sandbox.errors import HostError
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.host.variables import VARIABLES
from x07_sandbox.reports.commands import BackendState, Finding

if TYPE_CHECKING:
    from pathlib import Path

LINUX = Platform(system="linux")
PLATFORMS = (
    LINUX,
    Platform(system="macos", macos_major=11),
    Platform(system="macos", macos_major=13),
    Platform(system="macos", macos_major=26),
    Platform(system="other"),
)
HERE = Finding(code="vm-started", subject=START, good=True, text="our agent answered")
BROKEN = Finding(code="backend", subject=START, good=False, text="it ended", fix="Give it rights")


def looks(name: str, *, without: tuple[str, ...] = ()) -> Looks:
    """The prerequisites of a backend on an x86_64 host that has everything except *without*."""
    needs = needs_of(ARCHES["x86_64"]) if name == "qemu" else create(name).needs if name in BY_NAME else ()
    return [
        (need, Found("missing" if need.name in without else "here", good=need.name not in without)) for need in needs
    ]


def state(
    name: str, proof: Finding | None, *, without: tuple[str, ...] = (), platform: Platform = LINUX
) -> BackendState:
    """The state of one backend on a host that has everything except *without*."""
    return backend_state(BY_NAME[name], platform, looks(name, without=without), proof)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("platform", PLATFORMS, ids=str)
def test_every_backend_has_a_state_on_any_host(monkeypatch: pytest.MonkeyPatch, name: str, platform: Platform) -> None:
    """`x07 doctor` gives the state of every backend on any host, with a reason, and remedies unless it is proven."""
    for machine, proof in itertools.product([*ARCHES, "riscv64"], [None, HERE, BROKEN]):
        monkeypatch.setattr("os.uname", lambda machine=machine: SimpleNamespace(machine=machine))
        found = backend_state(BY_NAME[name], platform, (), proof)
        assert found.text
        own = proof is BROKEN and machine in ARCHES and BY_NAME[name].isolation == ("container",)  # the engine's advice
        remedies = {"proven": 0, "failed": 1 if own else 3, "not-here": 2}
        assert len(set(found.remedies)) == remedies[found.state], found
        assert (found.state == "not-here") == (not BY_NAME[name].runs_on(platform))


def test_only_a_started_vm_proves_a_backend() -> None:
    """Only a VM that answered proves a backend, without /dev/kvm too; the fix for a failed start comes first."""
    assert state("qemu", None).state == "failed"
    failed, proven = state("qemu", BROKEN), state("qemu", HERE, without=("/dev/kvm",))
    assert (failed.state, failed.text, failed.remedies[0]) == ("failed", "it ended", "Give it rights")
    assert proven.state == "proven"
    assert {look.good for look in proven.looks if look.what == "/dev/kvm"} == {None}


def test_an_untried_weaker_backend_is_no_failure() -> None:
    """An untried weaker backend is neither good nor bad."""
    found = state("os", Finding(code="untried", subject="os", good=None, text="all is here"))
    assert (found.state, found.text, found.remedies) == ("untried", "all is here", ())


def test_a_missing_program_is_named_with_its_package() -> None:
    """A missing program is reported with the package to install."""
    programs = [need for need in needs_of(ARCHES["x86_64"]) if need.code == "program"]
    assert programs
    for need in programs:
        found = state("qemu", BROKEN, without=(need.name,))
        assert found.text == f"missing: {need.package}"
        assert found.remedies[0] == f"Run: apt-get install --no-install-recommends {need.package}"


@pytest.mark.parametrize("name", BY_NAME)
def test_each_prerequisite_can_be_checked_and_installed(name: str) -> None:
    """Each backend lists its prerequisites once, and names a package for each program, library and file."""
    needs = create(name).needs
    assert len({(need.code, need.name) for need in needs}) == len(needs) > 0
    assert {found.text != "" for _, found in check(needs)} == {True}
    for need in needs:
        assert not need.variable or need.variable in VARIABLES
        packaged = need.name not in {"firecracker-ctr", "x07-vz-helper", "container"}  # Debian has no package
        assert need.package or not packaged or need.code not in {"program", "library", "firmware", "version"}


def test_a_variable_overrides_where_a_program_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable overrides where a program is looked for, and the program must be executable."""
    program = tmp_path / "podman"
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("X07_VM_PODMAN_BIN", str(program))
    (need,) = EngineBackend("podman").needs
    assert need.place == str(program)
    program.chmod(0o700)
    assert [found.text for _, found in check([need])] == ["found"]
    program.chmod(0o600)
    with pytest.raises(HostError, match="which is no executable program") as caught:
        require([need], "cannot use podman")
    assert caught.value.fix == "Set X07_VM_PODMAN_BIN to an absolute path"


def test_each_kind_of_prerequisite_says_what_is_wrong(tmp_path: Path) -> None:
    """Missing packages are named together, and other faults with their own advice."""
    shared = tmp_path / "shared"
    shared.write_text("#!/bin/sh\necho tool 1.2.3\n")
    shared.chmod(0o4755)
    missing = (Need("program", "/nowhere/a", "one"), Need("library", "libnowhere.so.9", "two"))
    for needs, why, fix in (
        (missing, "missing: one two", "Run: apt-get install --no-install-recommends one two"),
        ((Need("firmware", "/nowhere/b", "three"),), "missing: /nowhere/b", "Run: apt-get install --reinstall three"),
        ((Need("not-setuid", str(shared)),), "is set-user-ID", f"Run: chmod u-s {shared}"),
        ((Need("version", str(shared), "tool", least=(1, 3)),), "is too old", "Install tool 1.3 or newer"),
    ):
        with pytest.raises(HostError) as caught:
            require(needs, "cannot start")
        assert (why in caught.value.why, fix in caught.value.fix) == (True, True), caught.value
    assert not unmet(
        check([Need("version", str(shared), "tool", least=(1, 2)), Need("device", "/nowhere", optional=True)])
    )


def test_a_platform_without_a_backend_is_bad() -> None:
    """A platform without any backend is reported as bad, and one on which x07 has never run is not good."""
    assert [platform_finding(platform).good for platform in PLATFORMS] == [True, False, None, None, False]
    assert all("Linux" in platform_finding(platform).fix for platform in PLATFORMS[1:])


def test_the_first_fault_is_the_backends_state() -> None:
    """The first fault of image or start determines the backend's state."""
    good = Finding(code="image", subject="guest image", good=True, text="here")
    bad = Finding(code="image", subject="no guest image", good=False, text="none was built", fix="Run x07 image build")
    assert proof_among([good]).good is True
    found = proof_among([good, bad])
    assert (found.good, found.text, found.fix) == (False, "no guest image: none was built", "Run x07 image build")
