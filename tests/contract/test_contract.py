"""Every backend has all behaviours of the contract, except for its declared gaps."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.conftest import FULL, vz_on_linux
from x07_sandbox.backends.engines import CLIENTS
from x07_sandbox.backends.registry import built
from x07_sandbox.conformance import commands
from x07_sandbox.conformance.behaviours import BEHAVIOURS, Behaviour
from x07_sandbox.conformance.harness import open_bench
from x07_sandbox.conformance.run import check_behaviour
from x07_sandbox.errors import SandboxError
from x07_sandbox.images.build import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need
    from x07_sandbox.conformance.harness import Bench

pytestmark = [pytest.mark.vm, pytest.mark.user]

ONLY_FULL = {
    "docker": "podman runs the same code; tests/containers runs both",
    "gvisor": "gVisor is slow beside other tests",
    "vz": "each VM boots, in emulation; the rest is the code of other backends (tests/vm/test_vz.py)",
}


@pytest.fixture(scope="module", params=built())
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, need: Need) -> Iterator[Bench]:
    """Each backend that can run here, with its own state folder."""
    if request.param in ONLY_FULL and not FULL:
        pytest.skip(f"full sizes only: {ONLY_FULL[request.param]}")
    if request.param == "firecracker-ctr":
        pytest.skip("no package brings firecracker-containerd; tests/containers/test_firecracker.py uses a stand-in")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("contract") / "jobs"))
        if not FULL:
            patch.setattr(commands, "IN_A_ROW", 100)  # a thousand take minutes in an emulated VM
        if request.param == "qemu":
            build_image(progress=lambda _text: None)
        if request.param in {*CLIENTS, "containerd"}:
            for name, value in request.getfixturevalue(request.param).env.items():
                patch.setenv(name, value)
        if request.param == "vz":  # QEMU stands in for Apple's framework: this proves nothing about a Mac
            stack.enter_context(vz_on_linux(request.getfixturevalue("vz_stand_in")))
        try:
            yield stack.enter_context(open_bench(request.param))
        except SandboxError as exc:
            need(condition=False, reason=f"{exc.what}: {exc.why}", installable="missing" in exc.why)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_the_backend_has_the_behaviour(bench: Bench, behaviour: Behaviour) -> None:
    """A backend has every behaviour of the contract that it does not declare as a known gap."""
    verdict = check_behaviour(behaviour, bench)
    if verdict.verdict in {"gap", "skipped"}:
        pytest.skip(f"{bench.backend.name}: {verdict.reason}")
    assert verdict.verdict == "passed", verdict.reason
