"""`x07 doctor` about backends: all of them on any host, with three remedies for a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.prerequisites import (
    NEEDS,
    BackendState,
    Facts,
    Proof,
    Seen,
    backend_states,
    gather,
    needs_of,
    place_of,
)
from x07_sandbox.backends.qemu.start import required_tools
from x07_sandbox.backends.registry import BY_NAME, Platform
from x07_sandbox.cli.doctor import START, platform_finding, proof_among
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.host.variables import VARIABLES
from x07_sandbox.reports.doctor import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LINUX = Platform(system="linux")
PLATFORMS = (
    LINUX,
    Platform(system="macos", macos_major=11),
    Platform(system="macos", macos_major=13),
    Platform(system="macos", macos_major=26),
    Platform(system="other"),
)
HERE = Proof(good=True, text="our agent answered")
BROKEN = Proof(good=False, text="it ended", fixes=("Give it rights",))


def facts(
    platform: Platform = LINUX,
    machine: str = "x86_64",
    *,
    without: tuple[str, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> Facts:
    """A host that has everything except *without*."""
    seen: dict[tuple[str, str], Seen] = {}
    for name in BY_NAME:
        for need in needs_of(name, machine):
            place = place_of(need, environ or {})
            seen[need.kind, place] = Seen(good=place not in without, text="missing" if place in without else "here")
    return Facts(platform=platform, machine=machine, environ=environ or {}, seen=seen)


def proofs(proof: Proof | None) -> dict[str, Proof]:
    """The results of starting a VM, by backend."""
    return {} if proof is None else {"qemu": proof}


def state(name: str, found: Facts, proof: Proof | None = HERE) -> BackendState:
    """The state of one backend."""
    return next(state for state in backend_states(found, proofs(proof)) if state.name == name)


@pytest.mark.parametrize("machine", [*ARCHES, "riscv64"])
@pytest.mark.parametrize("platform", PLATFORMS, ids=str)
@pytest.mark.parametrize("proof", [None, HERE, BROKEN])
def test_every_backend_is_listed_on_any_host(platform: Platform, machine: str, proof: Proof | None) -> None:
    """`x07 doctor` lists every backend on any host, with a reason, and remedies unless it is proven."""
    states = backend_states(facts(platform, machine), proofs(proof))
    assert [state.name for state in states] == list(BY_NAME)
    for found in states:
        assert found.text
        remedies = {"proven": 0, "failed": 3, "later": 2, "not-here": 2}
        assert len(set(found.remedies)) == remedies[found.state], found
        assert (found.state == "not-here") == (not BY_NAME[found.name].runs_on(platform))
        assert not found.looks or found.state != "not-here"


def test_only_a_started_vm_proves_a_backend() -> None:
    """A backend is proven only by a VM that answered."""
    assert state("qemu", facts(), None).state == "failed"
    assert state("qemu", facts(), BROKEN).state == "failed"
    assert state("qemu", facts(), HERE).state == "proven"
    assert [found.name for found in backend_states(facts(), proofs(HERE)) if found.state == "proven"] == ["qemu"]


def test_an_untried_weaker_backend_is_no_failure() -> None:
    """An untried weaker backend is neither good nor bad."""
    found = next(
        state for state in backend_states(facts(), {"os": Proof(good=None, text="all is here")}) if state.name == "os"
    )
    assert (found.state, found.text, found.remedies) == ("untried", "all is here", ())


def test_a_missing_program_is_named_with_its_package() -> None:
    """A missing program is reported with the package to install."""
    for path, package in required_tools(ARCHES["x86_64"]).items():
        found = state("qemu", facts(without=(path,)), BROKEN)
        assert path in found.text
        assert found.remedies[0] == f"Run apt-get install --no-install-recommends {package}"


def test_the_fix_of_what_failed_comes_first() -> None:
    """The fix for a failed start comes first."""
    found = state("qemu", facts(), BROKEN)
    assert (found.text, found.remedies[0]) == ("it ended", "Give it rights")


def test_missing_hardware_virtualisation_is_no_fault_of_qemu() -> None:
    """A missing /dev/kvm is no fault for qemu."""
    found = facts(without=("/dev/kvm",))
    assert {look.good for look in state("qemu", found).looks if look.what == "/dev/kvm"} == {None}


def test_variables_override_locations() -> None:
    """Variables override where prerequisites are looked for."""
    assert {need.variable for needs in NEEDS.values() for need in needs if need.variable} <= VARIABLES.keys()
    looks = state("podman", facts(environ={"X07_VM_PODMAN_BIN": "/elsewhere"})).looks
    assert [look.what for look in looks] == ["/elsewhere"]


def test_a_program_must_be_executable(tmp_path: Path) -> None:
    """A program is found only if it can be executed."""
    program = tmp_path / "podman"
    program.write_text("#!/bin/sh\n")
    environ = {"X07_VM_PODMAN_BIN": str(program)}
    for mode, good in ((0o700, True), (0o600, False)):
        program.chmod(mode)
        assert gather(LINUX, environ).seen["program", str(program)].good is good


def test_a_platform_without_a_backend_is_bad() -> None:
    """A platform without any backend is reported as bad."""
    assert [platform_finding(platform).good for platform in PLATFORMS] == [True, False, False, False, False]
    assert all("Linux" in platform_finding(platform).fix for platform in PLATFORMS[1:])


def test_the_first_fault_is_the_backends_state() -> None:
    """The first fault of image or start determines the backend's state."""
    started = Finding(subject=START, good=True, text="answered")
    bad = Finding(subject="no guest image", good=False, text="none was built", fix="Run x07 image build")
    assert proof_among([started]) == Proof(good=True, text="answered")
    assert proof_among([bad, started]) == Proof(
        good=False, text="no guest image: none was built", fixes=("Run x07 image build",)
    )
    assert proof_among([]) is None
