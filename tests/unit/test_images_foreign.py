"""Images of another architecture: their names, what a build of one needs, and which backends run one."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.unit.test_images_manifest import MANIFEST
from x07_sandbox.backends.base import Availability
from x07_sandbox.backends.registry import BY_NAME, create
from x07_sandbox.cli.main import main
from x07_sandbox.errors import HostError, RefusedError, UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.arch import ARCHES, host_arch
from x07_sandbox.images import build, commands, store
from x07_sandbox.images.verify import OpenImage
from x07_sandbox.policy.features import vm_features
from x07_sandbox.sessions import prepare
from x07_sandbox.sessions.request import RunRequest

HOST = host_arch()
OTHER = next(arch for arch in ARCHES.values() if arch is not HOST)


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are found, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(paths, "PROGRAMS", (str(folder),))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def arch_test(folder: Path, status: int) -> None:
    """Make an arch-test that ends with *status*."""
    program = folder / "arch-test"
    program.write_text(f"#!/bin/sh\nexit {status}\n", encoding="ascii")
    program.chmod(0o755)


def open_image(arch: str) -> OpenImage:
    """An image of an architecture, without files."""
    return OpenImage(fds={}, manifest=replace(MANIFEST, arch=arch))


def test_a_missing_tool_is_named_with_all_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """Without arch-test, `x07 image build --arch` names the packages that a build for another architecture needs."""
    assert main(["image", "build", "--arch", OTHER.deb]) == 125
    said = capsys.readouterr().err
    assert f"cannot build an image for {OTHER.deb}" in said
    assert "apt-get install qemu-user-static arch-test" in said
    assert store.all_names() == {}


def test_programs_that_cannot_be_executed_are_explained(tools: Path) -> None:
    """If the kernel does not know QEMU's user emulation, which only others need, the error says how to register it."""
    arch_test(tools, 1)
    commands.require_execution(HOST)
    assert commands.slower(HOST) == 1 < commands.slower(OTHER)
    with pytest.raises(HostError, match=f"cannot execute {OTHER.deb} programs") as caught:
        build.build_image(name="other", arch=OTHER.name, progress=print)
    assert f"/usr/lib/binfmt.d/qemu-{OTHER.name}.conf" in str(caught.value.fix)
    arch_test(tools, 0)
    commands.require_execution(OTHER)


def test_a_name_keeps_its_architecture() -> None:
    """An image keeps its architecture when it is rebuilt; neither it nor the default image can get another one."""
    assert build._architecture("science", None) is HOST  # noqa: SLF001 - pure, and a build takes minutes
    assert build._architecture(OTHER.deb, None) is OTHER  # noqa: SLF001 - as above
    assert build._architecture("science", None, OTHER) is OTHER  # noqa: SLF001 - as above
    with pytest.raises(UsageError, match="'default'") as caught:
        build.build_image(arch=OTHER.deb, progress=print)
    assert str(caught.value.fix) == f"Use another name, such as --name {OTHER.deb}"
    with pytest.raises(UsageError, match=f"the present image of this name is for {HOST.deb}"):
        build._architecture("science", OTHER, HOST)  # noqa: SLF001 - as above


@pytest.mark.parametrize("name", [*BY_NAME])
def test_only_an_emulated_machine_runs_a_foreign_image(name: str) -> None:
    """Each backend whose programs run on this host's processor refuses an image of another architecture."""
    backend = create(name)
    image, request = open_image(OTHER.name), RunRequest(image="other")
    for features in (backend.least_features(), vm_features("vm-hardware")):
        found = Availability(features=features, proof="")
        if features.emulated:
            prepare._require_own_architecture(request, image, found, backend)  # noqa: SLF001 - no engine is needed
            continue
        with pytest.raises(RefusedError, match="cannot use the image other") as caught:
            prepare._require_own_architecture(request, image, found, backend)  # noqa: SLF001 - as above
        assert f"it is for {OTHER.deb}, and the backend {name} runs only" in caught.value.why
        assert caught.value.code == "foreign-image"
        prepare._require_own_architecture(request, open_image(HOST.name), found, backend)  # noqa: SLF001 - as above
