"""Every backend has all behaviours of the contract, except for its declared gaps."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from tests.apple_container import VERSIONS
from tests.conftest import FULL, vz_on_linux
from tests.engines import apple_container
from x07_sandbox.backends.engines import CLIENTS
from x07_sandbox.backends.registry import BY_NAME
from x07_sandbox.conformance import commands
from x07_sandbox.conformance.behaviours import BEHAVIOURS, Behaviour, check_behaviour
from x07_sandbox.conformance.harness import open_bench
from x07_sandbox.errors import SandboxError
from x07_sandbox.images.build import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.conftest import Need
    from tests.engines import EngineUnderTest
    from x07_sandbox.conformance.harness import Bench

pytestmark = [pytest.mark.vm, pytest.mark.user]

STAND_INS = {f"apple-container {version}": "apple-container" for version in VERSIONS}
"""Stand-ins for programs that run only on a Mac, and their backends."""
BENCHES = [*(name for name in BY_NAME if name not in STAND_INS.values()), *STAND_INS]


REASONS = {
    "firecracker-ctr": "no package brings firecracker-containerd; tests/containers/test_firecracker.py uses a stand-in"
}
REASONS_OF_CI = {
    "docker": "full sizes only: podman runs the same code",
    "gvisor": "full sizes only: gVisor is slow beside other tests",
    "vz": "full sizes only: each VM boots, in emulation; the rest is the code of other backends (tests/vm/test_vz.py)",
    **dict.fromkeys(STAND_INS, "full sizes only: podman runs the same code; tests/containers/test_apple.py is shorter"),
}


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, need: Need) -> Iterator[Bench]:
    """Each backend that can run here, with its own state folder."""
    if reason := (REASONS if FULL else REASONS | REASONS_OF_CI).get(request.param):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("contract") / "jobs"))
        if not FULL:
            patch.setattr(commands, "IN_A_ROW", 40)  # a thousand take minutes in an emulated VM
        for name, value in variables(request, tmp_path_factory).items():
            patch.setenv(name, value)
        if request.param == "vz":  # QEMU stands in for Apple's framework: this proves nothing about a Mac
            stack.enter_context(vz_on_linux(request.getfixturevalue("vz_stand_in")))
        try:
            found = stack.enter_context(open_bench(STAND_INS.get(request.param, request.param)))
            if request.param in STAND_INS:  # they have no kernel of their own to count in
                found.features = replace(found.features, own_kernel=False)
            yield found
        except SandboxError as exc:
            need(condition=False, reason=f"{exc.what}: {exc.why}", installable="missing" in exc.why)


def variables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Make what the backend needs, and return the variables by which it finds that."""
    name, _, version = request.param.partition(" ")
    if name == "qemu":
        build_image(progress=lambda _text: None)
    engine: EngineUnderTest | None = None
    if name in {*CLIENTS, "containerd"}:
        engine = request.getfixturevalue(name)
    elif version:
        engine = apple_container(request.getfixturevalue("podman"), tmp_path_factory.mktemp("apple"), version)
    return {} if engine is None else engine.env


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_the_backend_has_the_behaviour(bench: Bench, behaviour: Behaviour) -> None:
    """A backend has every behaviour of the contract that it does not declare as a known gap."""
    verdict = check_behaviour(behaviour, bench)
    if verdict.verdict in {"gap", "skipped"}:
        pytest.skip(f"{bench.backend.name}: {verdict.reason}")
    assert verdict.verdict == "passed", verdict.reason
