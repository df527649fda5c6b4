"""Imported container images: what their programs see, with and without root, and that the agent stays apart."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import x07
from tests.oci_images import Entry, layer, layout
from tests.vm.conftest import left_behind
from x07_sandbox import Sandbox, SandboxError, exec_command, run_program
from x07_sandbox.cli import image as cli_image
from x07_sandbox.guest.confine import UID
from x07_sandbox.images.build import build_image, import_image
from x07_sandbox.images.verify import verify_image
from x07_sandbox.jail.forms import needed_files

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("no_hot_clones", "image", "state")]

BUSYBOX = "/usr/bin/busybox"
HELLO = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(void) { char here[99]; printf("%d %s %s\\n", getuid(), getenv("GREETING"), getcwd(here, 99)); return 3; }
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image without a shell or Python: a loader, the C library, and one program of the host, in two layers."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "hello.c").write_text(HELLO)
    subprocess.run(["/usr/bin/gcc", "-o", folder / "hello", folder / "hello.c"], check=True)
    needed = [path for path in needed_files(str(folder / "hello")) if path != str(folder / "hello")]
    entries = [Entry(path.lstrip("/"), Path(path).read_bytes()) for path in needed]
    low = layer(*entries, Entry("opt/tool", b"#!/none\n"), Entry("gone", b"1"), Entry("set-id", b"", mode=0o4755))
    high = layer(
        Entry("bin/hello", (folder / "hello").read_bytes()), Entry(".wh.gone"), Entry("home/a", b"1", uid=1000)
    )
    source = layout(
        folder / "image", low, high, Env=["PATH=/bin", "GREETING=hi"], WorkingDir="/app", User="root", Cmd=["hello"]
    )
    image = import_image(str(source), "small-import", lambda _text: None)[0]
    shutil.copytree(source, folder.parent / "small-layout", dirs_exist_ok=True)
    return image


def test_a_program_sees_only_the_imported_root(small: Image, state: Path) -> None:
    """Commands run in the image's root with its variables and folder, as our user, and cannot write to it."""
    assert verify_image(small) == []
    result = exec_command(["hello"], image="small-import")
    assert (result.exit_code, result.stdout.text) == (3, f"{UID} hi /app\n")
    missing = exec_command(["sh"], image="small-import")
    assert (missing.exit_code, "does not exist in the VM" in missing.reason, missing.hints) == (127, True, [])
    with Sandbox(image="small-import") as sandbox:
        names = {info.name for info in sandbox.files.list("/")}
        assert {"bin", "opt", "home", "app", "x07"} <= names
        assert "gone" not in names
        assert "usr" not in names or not sandbox.files.exists("/usr/bin/python3")
        assert sandbox.files.stat("/home/a").kind == "file"
        for path in ("/new", "/app/new", "/etc/new"):
            with pytest.raises(OSError, match=r"Read-only|Permission"):
                sandbox.files.write(path, b"1")
        sandbox.files.write("/opt/x07/new", b"1")
        assert sandbox.exec(["hello"], cwd="/opt/x07").stdout == f"{UID} hi /opt/x07\n".encode()
    assert left_behind(state) == []


def test_the_commands_for_imported_images(
    small: Image, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import, list and exec by the command line: the image's own command runs if none is named."""
    prepared: list[Image] = []  # saving the VMs of three kinds takes long
    monkeypatch.setattr(cli_image, "prepare_clones", lambda image, _progress: prepared.append(image))
    source = tmp_path_factory.getbasetemp() / "small-layout"
    done = x07(source, "image", "import", str(source), "--name", "small-import")
    assert (done.code, "root only with --guest-root" in done.err) == (0, True), done.err
    assert small.digest in done.err
    assert [image.digest for image in prepared] == [small.digest]
    assert b"imported: sha256:" in x07(source, "image", "list").out
    assert x07(source, "exec", "--image", "small-import").out == f"{UID} hi /app\n".encode()
    assert x07(source, "image", "load", "--image", "small-import").code == 2
    assert x07(source, "image", "import", "none").code == 2


def test_root_inside_may_change_an_imported_root(small: Image) -> None:
    """With root inside, the image's files belong to root, changes are possible and do not stay."""
    assert small.manifest.program is not None
    for _ in range(2):
        with Sandbox(image="small-import", guest_root=True) as sandbox:
            assert not sandbox.files.exists("/new")
            sandbox.files.write("/new", b"1")
            sandbox.files.write("/etc/new", b"1")
            assert sandbox.exec(["hello"]).stdout == b"0 hi /app\n"


def test_a_policy_about_programs_is_refused_for_an_imported_root(small: Image) -> None:
    """A list of programs cannot be enforced for an imported image, so such a run is refused."""
    from msgspec.structs import replace

    from x07_sandbox import load_policy

    assert small.manifest.program is not None
    policy = load_policy("built-in:default")
    listed = replace(
        policy, process=replace(policy.process, allow_exec=True, allow_execs=("/bin/hello",), allow_exec_prefixes=())
    )
    with pytest.raises(SandboxError, match="imported image"):
        exec_command(["hello"], image="small-import", policy=listed)


def test_an_imported_image_survives_an_update(small: Image) -> None:
    """`x07 image build` of its name renews the agent and keeps the imported root."""
    again = build_image(name="small-import", progress=lambda _text: None)
    assert again.digest == small.digest
    assert again.manifest.program == small.manifest.program


def test_sources_are_built_in_our_own_image(small: Image, tmp_path: Path) -> None:
    """A C program is compiled in x07's image, and executed in the imported one, whose C library it finds."""
    assert small.manifest.program is not None
    source = tmp_path / "a.c"
    source.write_text(HELLO)
    result = run_program(source, image="small-import")
    assert (result.exit_code, result.stdout.text) == (3, f"{UID} hi /app\n")


@pytest.mark.full("saves VMs of one more image")
@pytest.mark.skipif(not shutil.which("busybox"), reason="needs busybox")
def test_a_root_with_a_shell_has_commands_network_and_files(tmp_path: Path) -> None:
    """A root with busybox, as Alpine has it, runs shell commands, with a workdir whose changes come back."""
    entries = [Entry(path.lstrip("/"), Path(path).read_bytes()) for path in needed_files(BUSYBOX)]
    links = [Entry(f"bin/{name}", kind=b"2", link=BUSYBOX) for name in ("sh", "ls", "cat", "id", "sort", "touch")]
    source = layout(tmp_path / "image", layer(*entries, *links))
    import_image(str(source), "busybox-import", lambda _text: None)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/numbers").write_text("3\n1\n")
    with Sandbox(image="busybox-import", workdir=tmp_path / "work", allow_hosts=["example.org:80"]) as sandbox:
        assert sandbox.shell("id -u; sort numbers > sorted; cat /etc/resolv.conf | sort | ls -d /proc/self").ok
    assert (tmp_path / "work/sorted").read_text() == "1\n3\n"
