"""An image for arm64 on another host: it is built through binfmt_misc, and its virtual machines are emulated."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import VZ_HELPER, vz_on_linux
from x07_sandbox.backends import vz as vz_backend
from x07_sandbox.cli.main import main
from x07_sandbox.conformance import commands
from x07_sandbox.conformance.behaviours import BEHAVIOURS, Behaviour, check_behaviour
from x07_sandbox.conformance.harness import open_bench
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host.arch import arch_named, is_foreign
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.images import boot, vz_bundle
from x07_sandbox.images.build import build_image
from x07_sandbox.images.commands import require_execution
from x07_sandbox.sessions import prepare
from x07_sandbox.sessions.request import RunCaller, RunRequest
from x07_sandbox.sessions.run import attempt
from x07_sandbox.sessions.saving import prepare_clones

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need
    from x07_sandbox.conformance.harness import Bench
    from x07_sandbox.images.store import Image
    from x07_sandbox.sessions.result import Result

# Building the image takes up to ten minutes, since QEMU emulates the programs of its packages.
pytestmark = [
    pytest.mark.vm,
    pytest.mark.full("builds an image for arm64 and emulates its processor"),
    pytest.mark.timeout(3600),
]

NAME = "arm64"
REFUSED = b"""
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

int main(void)
{
	struct utsname name;

	uname(&name);
	puts(name.machine);
	printf("mount %d\\n", mount("none", "/tmp", "tmpfs", 0, NULL) ? errno : 0);
	printf("ptrace %d\\n", ptrace(PTRACE_TRACEME, 0, NULL, NULL) ? errno : 0);
	printf("clone3 %d\\n", syscall(SYS_clone3, NULL, 0L) < 0 ? errno : 0);
	printf("bpf %d\\n", syscall(SYS_bpf, 0L, NULL, 0L) < 0 ? errno : 0);
	printf("open %d\\n", fopen("/etc/passwd-", "w") == NULL ? errno : 0);
	return 3;
}
"""
# Runs a program as on a Mac with a processor of this architecture.
RUNNER_ON_A_MAC = f"""
import sys
from x07_sandbox.backends import vz as backend
from x07_sandbox.conformance.harness import main
from x07_sandbox.host.arch import arch_named
from x07_sandbox.sessions import prepare
backend.host_arch = lambda: arch_named({NAME!r})
prepare.is_foreign = lambda _arch: False
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def arm64(need: Need) -> Image:
    """The image named arm64, with its saved VMs."""
    arch = arch_named(NAME)
    need(is_foreign(arch), "a host of another architecture than arm64", installable=False)
    binary = Path(arch.qemu_binary)
    need(binary.exists(), f"the command {binary} (Debian: apt-get install {arch.qemu_package})", installable=False)
    try:
        require_execution(arch)
    except HostError as exc:
        need(condition=False, reason=f"{exc.what}: {exc.why}. {exc.fix}", installable=False)
    made = build_image(name=NAME, arch=NAME, progress=print)
    with contextlib.suppress(SandboxError):  # without saved VMs, each run boots
        prepare_clones(made, print)
    return made


@pytest.fixture(scope="module")
def bench(arm64: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The QEMU backend with that image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("arm64") / "jobs"))
        patch.setenv("X07_VM_GUEST_IMAGE", arm64.name)
        patch.setattr(commands, "IN_A_ROW", 100)
        with open_bench("qemu") as opened:
            yield opened


def test_the_image_has_a_raw_kernel_for_arm64(arm64: Image) -> None:
    """The manifest names the architecture, the packages are arm64's, and the kernel is a raw Image."""
    made = arm64.manifest
    assert made.arch == "aarch64"
    assert {package.arch for package in made.packages} == {"all", "arm64"}
    data = (arm64.folder / made.parts.kernel.file).read_bytes()
    assert data[56:60] == b"ARM\x64"
    assert boot.bootable_release(data, "aarch64") == made.kernel_release
    assert build_image(name=NAME, progress=print) == arm64  # it keeps its architecture


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda each: each.name)
def test_the_emulated_machine_has_the_behaviour(bench: Bench, behaviour: Behaviour) -> None:
    """A machine of another architecture has all behaviours of the contract."""
    verdict = check_behaviour(behaviour, bench)
    assert verdict.verdict == "passed", verdict.reason


def carried_out(**fields: Any) -> Result:  # noqa: ANN401 - fields of a request
    """Run a program with the image, and return the result."""
    with contextlib.closing(Cancel()) as cancel:
        return attempt(RunRequest(image=NAME, **fields), RunCaller(cancel=cancel))[0]


@pytest.fixture(scope="module")
def vz_bench(arm64: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The vz backend with a bundle of that image, and a STAND-IN for its helper (tests/vz_helper.py)."""
    bundle = tmp_path_factory.mktemp("vz") / "guest.bundle"
    vz_bundle.make_bundle(arm64, bundle)
    variables = {
        "X07_VM_VZ_HELPER_BIN": VZ_HELPER,
        "X07_VM_VZ_GUEST_BUNDLE": str(bundle),
        "X07_VM_STATE_DIR": str(tmp_path_factory.mktemp("arm64-vz") / "jobs"),
    }
    with pytest.MonkeyPatch.context() as patch, vz_on_linux(variables):
        patch.setattr(vz_backend, "host_arch", lambda: arch_named(NAME))
        patch.setattr(prepare, "is_foreign", lambda _arch: False)
        patch.setattr(commands, "IN_A_ROW", 100)
        with open_bench("vz", (sys.executable, "-I", "-c", RUNNER_ON_A_MAC)) as opened:
            yield opened


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda each: each.name)
def test_a_machine_of_vz_has_the_behaviour(vz_bench: Bench, behaviour: Behaviour) -> None:
    """With a stand-in for its helper, the vz backend has all behaviours of the contract on this architecture too."""
    verdict = check_behaviour(behaviour, vz_bench)
    assert verdict.verdict == "passed", verdict.reason


@pytest.mark.usefixtures("arm64", "state")
def test_a_machine_can_boot() -> None:
    """A machine that boots, instead of being cloned, answers in time, and its processor is emulated."""
    result = carried_out(source=b"import os; print(os.uname().machine)", toolchain="python", cold=True)
    assert (result.outcome, result.stdout.data, result.isolation) == ("ok", b"aarch64\n", "vm-emulated")
    assert result.phases["run"].start == "cold"


@pytest.mark.usefixtures("arm64", "state")
def test_system_calls_are_refused_by_their_own_numbers() -> None:
    """A C program is built for arm64, and the calls that the filters refuse fail with the documented errors."""
    result = carried_out(source=REFUSED, toolchain="c")
    expected = b"aarch64\nmount 1\nptrace 1\nclone3 38\nbpf 1\nopen 30\n"
    assert (result.outcome, result.x07_exit_code, result.stdout.data) == ("failed", 3, expected), result.reason
    assert {denial.subject for denial in result.denials if denial.field == "system-calls"} == {"mount", "ptrace", "bpf"}
    assert {denial.subject for denial in result.denials if denial.field == "permissions"} == {"/etc/"}


@pytest.mark.usefixtures("arm64", "state")
def test_an_executable_must_be_for_the_image() -> None:
    """An executable of this host is refused with an image of another architecture."""
    result = carried_out(program=Path("/bin/true"), toolchain="executable")
    assert "it is not an executable for aarch64" in result.reason


def test_the_image_is_listed_with_its_architecture(arm64: Image, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 image list` shows the architecture of an image that is not for this host."""
    assert main(["image", "list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{NAME} ")]
    assert arm64.digest in line
    assert "aarch64" in line
    assert os.uname().machine not in line
