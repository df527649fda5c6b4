"""`x07 doctor` about backends: all of them on any host, with three remedies for a failure."""

from __future__ import annotations

import os
import socket
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
    for name in NEEDS:
        for need in needs_of(name, platform.system, machine):
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
    """`x07 doctor` lists every backend on any host, with a reason, and three remedies unless it is proven."""
    states = backend_states(facts(platform, machine), proofs(proof))
    assert [state.name for state in states] == list(BY_NAME)
    for found in states:
        assert found.text
        assert len(set(found.remedies)) == (0 if found.state == "proven" else 3), found
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
    """A missing /dev/kvm is no fault for qemu, but one for firecracker."""
    found = facts(without=("/dev/kvm",))
    assert {look.good for look in state("qemu", found).looks if look.what == "/dev/kvm"} == {None}
    assert {look.good for look in state("firecracker-ctr", found).looks if look.what == "/dev/kvm"} == {False}


def test_variables_override_locations() -> None:
    """Variables override where prerequisites are looked for."""
    assert {need.variable for needs in NEEDS.values() for need in needs if need.variable} <= VARIABLES.keys()
    environ = {"X07_VM_FIRECRACKER_CONTAINERD_SOCK": "/elsewhere.sock"}
    looks = state("firecracker-ctr", facts(environ=environ)).looks
    assert "/elsewhere.sock" in [look.what for look in looks]
    assert "/run/firecracker-containerd/containerd.sock" not in [look.what for look in looks]
    macos = facts(Platform(system="macos", macos_major=13))
    assert "X07_VM_VZ_GUEST_BUNDLE" in [look.what for look in state("vz", macos).looks]


def test_programs_and_sockets_are_probed(tmp_path: Path) -> None:
    """Programs, served sockets, dead sockets and plain files are distinguished."""
    program = tmp_path / "ctr"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    place = os.path.relpath(tmp_path / "s")  # an address has 107 bytes at most
    environ = {"X07_VM_FIRECRACKER_CTR_BIN": str(program), "X07_VM_FIRECRACKER_CONTAINERD_SOCK": place}

    def looked() -> tuple[Seen, Seen]:
        seen = gather(LINUX, environ).seen
        return seen["program", str(program)], seen["socket", place]

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        assert [found.good for found in looked()] == [True, True]
    program.chmod(0o600)
    assert [found.good for found in looked()] == [False, False]
    assert "nobody answers" in looked()[1].text
    (tmp_path / "s").unlink()
    assert looked()[1].text == "not here"
    (tmp_path / "s").write_bytes(b"")
    assert looked()[1].text == "no socket"


@pytest.mark.timeout(60)
def test_an_unresponsive_socket_times_out(tmp_path: Path) -> None:
    """An unresponsive socket times out after half a second."""
    place = os.path.relpath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(place)
        server.listen(0)
        waiting.connect(place)
        seen = gather(LINUX, {"X07_VM_FIRECRACKER_CONTAINERD_SOCK": place}).seen["socket", place]
    assert not seen.good
    assert "nobody answers" in seen.text


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
