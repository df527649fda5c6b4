"""X07's own programs, on an image with a stand-in for X07's toolchain."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from tests.command import x07
from tests.conftest import need
from x07_sandbox.cli import os_runner
from x07_sandbox.errors import HostError, UsageError
from x07_sandbox.images.build import build_image, pack_toolchain
from x07_sandbox.images.commands import EPOCH
from x07_sandbox.policy.decode import render_policy
from x07_sandbox.policy.templates import TEMPLATES
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.images.store import Image

TOOLCHAIN = Path(__file__).parent / "x07_toolchain"
SCHEMAS = schemas()
UPPER = (
    "out->data = in.data; out->size = in.size;"
    "for (uint32_t i = 0; i < in.size; i++) if (in.data[i] >= 97 && in.data[i] <= 122) in.data[i] -= 32;"
)

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("no_hot_clones")]


@pytest.fixture(scope="session")
def x07_image(image: Image) -> Image:
    """An image with the stand-in for X07's toolchain."""
    del image  # builds must not run in parallel
    return build_image(name="x07-tests", x07=TOOLCHAIN, progress=lambda _text: None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An X07 project with two profiles."""
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "policy.json").write_bytes(render_policy(TEMPLATES["worker"]))
    (folder / "src/main.x07.json").write_text(json.dumps({"c": UPPER}))
    (folder / "x07.lock.json").write_text("{}")
    (folder / "given.txt").write_text("from the profile")
    profiles: dict[str, Any] = {
        "sandbox": {"world": "run-os-sandboxed", "policy": "policy.json", "input": "given.txt", "solve_fuel": 5000},
        "os": {"world": "run-os"},
    }
    document = {
        "schema_version": "x07.project@0.5.0",
        "entry": "src/main.x07.json",
        "profiles": profiles,
        "default_profile": "sandbox",
    }
    (folder / "x07.json").write_text(json.dumps(document))
    return folder


def command(
    *words: str, image: str, stdin: bytes = b"", module: str = "main", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Carry out `x07 run` or `x07-os-runner` with *words* on that image."""
    env = {"X07_VM_GUEST_IMAGE": image}
    if module == "main":
        done = x07(cwd or Path.cwd(), "run", *words, stdin=stdin, env=env)
    else:
        done = x07(cwd or Path.cwd(), *words, stdin=stdin, env=env, command=os_runner.main)
    return subprocess.CompletedProcess(words, done.code, done.out, done.err.encode())


def report_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    """Return the report, validated against X07's schema."""
    report: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(report, json.loads(SCHEMAS["x07-os-runner.report.schema.json"]))
    return report


def output(report: dict[str, Any]) -> bytes:
    """Return the program's output."""
    return base64.b64decode(report["solve"]["solve_output_b64"])


def program(folder: Path, **values: object) -> str:
    """Write a program to a file, and return its path."""
    path = folder / "main.x07.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_an_x07_program_is_compiled_and_run(tmp_path: Path, x07_image: Image, state: Path) -> None:
    """The image's toolchain compiles a *.x07.json in one machine, and the program runs in another."""
    policy = tmp_path / "policy.json"
    policy.write_bytes(render_policy(TEMPLATES["worker"]))
    words = ("--policy", str(policy), program(tmp_path, c=UPPER))
    done = command(*words, image=x07_image.name, stdin=b"hello")
    report = report_of(done)
    assert (done.returncode, report["mode"], report["compile"]["lang_id"]) == (0, "compile-run", "x07-core@0.4.0")
    assert (output(report), report["solve"]["fuel_used"], report["sandbox_backend"]) == (b"HELLO", 5, "vm")
    # If another test's pool does not answer in time, there is one more job, for a clone.
    names = [path.parent.name.removesuffix("-clone").rpartition("-")[2] for path in state.glob("*/job.json")]
    # An earlier run of the tests may have built it.
    assert sorted({*names} - {"template"}) in (["build", "run"], ["run"])
    again = report_of(command(*words, image=x07_image.name, stdin=b"again"))
    assert (output(again), again["compile"]) == (b"AGAIN", report["compile"])


def test_x07_os_runner_takes_x07s_programs_and_projects(project: Path, x07_image: Image) -> None:
    """x07-os-runner runs *.x07.json and x07.json, attests the run, and its saved artifact runs again."""
    attested = project / "attest.json"
    words = ["--world", "run-os-sandboxed", "--policy", str(project / "policy.json")]
    words += ["--input", str(project / "given.txt"), "--attest-runtime", str(attested)]
    single = str(project / "src/main.x07.json")
    report = report_of(command(*words, "--program", single, image=x07_image.name, module="os_runner"))
    assert (report["exit_code"], output(report)) == (0, b"FROM THE PROFILE")
    words += ["--solve-fuel", "9", "--compiled-out", str(project / "out")]
    done = command(*words, "--project", str(project / "x07.json"), image=x07_image.name, module="os_runner")
    report = report_of(done)
    assert (done.returncode, report["mode"], output(report)) == (0, "project-compile-run", b"FROM THE PROFILE")
    assert (project / "out").read_bytes().startswith(b"\x7fELF")
    words = ["--policy", str(project / "policy.json"), "--artifact", str(project / "out"), "--report", "runner"]
    done = command(*words, "--input", str(project / "given.txt"), image=x07_image.name)
    report = report_of(done)
    assert (done.returncode, report["mode"], report["fuel_used"]) == (0, "run-os", 16), report
    assert base64.b64decode(report["solve_output_b64"]) == b"FROM THE PROFILE"
    jsonschema.validate(json.loads(attested.read_bytes()), json.loads(SCHEMAS["x07-runtime.attest.schema.json"]))


def test_a_project_runs_with_its_profile(project: Path, x07_image: Image) -> None:
    """An X07 project takes policy and input from its default profile; --profile and flags override it."""
    done = command(str(project), image=x07_image.name, stdin=b"ours")
    assert (done.returncode, output(report_of(done))) == (0, b"FROM THE PROFILE"), done.stderr
    done = command("--stdin", "--project", str(project / "x07.json"), image=x07_image.name, stdin=b"ours")
    assert output(report_of(done)) == b"OURS"
    done = command("--stdin", "--max-output-bytes", "4", str(project), image=x07_image.name, stdin=b"ours")
    assert output(report_of(done)) == b"OURS"  # the frame's header does not count
    done = command("--stdin", "--max-output-bytes", "3", str(project), image=x07_image.name, stdin=b"ours")
    assert (done.returncode, report_of(done)["solve"]["trap"]) == (1, "stdout exceeded cap")
    done = command(str(project), "--", "a", "bc", image=x07_image.name)
    assert output(report_of(done)) == b"\2\0\0\0\1\0\0\0A\2\0\0\0BC"
    shown = json.loads(command("--dry-run", "--json", str(project), "--", "a", "bc", image=x07_image.name).stdout)
    assert (shown["run"], shown["image"]) == (["/x07/in/artifact"], x07_image.name)  # arguments are its input
    done = command("--profile", "os", str(project), image=x07_image.name)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"only run-os-sandboxed is supported" in done.stderr
    done = command("--profile", "nobody", str(project), image=x07_image.name)
    assert b"there is no profile 'nobody'; it has sandbox, os" in done.stderr


def test_overrides_write_a_derived_policy_into_the_project(project: Path, x07_image: Image) -> None:
    """Override flags write a derived policy into the project, and stderr names the file, as with X07."""
    (project / "policy.json").write_bytes(render_policy(TEMPLATES["default"]))
    done = command("--deny-host", "example.org:*", "x07.json", image=x07_image.name, cwd=project)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.decode().splitlines() if line.startswith("x07 run: using derived policy "))
    made = Path(line.removeprefix("x07 run: using derived policy "))
    assert made.parent.parts[-3:] == (".x07", "policies", "_generated")
    assert made.is_relative_to(project)
    assert json.loads(made.read_bytes())["policy_id"].startswith("sandbox.default.base.g")


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (lambda p: p["limits"].update(wall_mss=1), 3, '"schema_version": "x07.x07diag@0.1.0"'),
        (lambda p: p["process"].update(allow_spawn=True, allow_execs=["x"]), 2, "max_live"),
    ],
)
def test_an_invalid_policy_exits_with_x07s_codes(
    project: Path, x07_image: Image, change: Callable[[dict[str, Any]], None], code: int, why: str
) -> None:
    """An X07 program's policy that breaks the schema exits with 3, and one that breaks a rule exits with 2."""
    document = json.loads((project / "policy.json").read_bytes())
    change(document)
    (project / "policy.json").write_text(json.dumps(document))
    done = command(str(project), image=x07_image.name)
    assert (done.returncode, done.stdout) == (code, b"")
    assert why in done.stderr.decode()


def test_a_missing_policy_or_toolchain_is_reported(tmp_path: Path, x07_image: Image, image: Image) -> None:
    """A missing policy, or an image without the toolchain, is reported with X07's exit codes."""
    source = program(tmp_path, c=UPPER)
    done = command(source, image=x07_image.name)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no policy" in done.stderr
    done = command("--policy", "built-in:worker", source, image=image.name)
    report = report_of(done)
    assert (done.returncode, report["compile"]["ok"], report["solve"]) == (1, False, None)
    assert "--x07-toolchain DIR" in report["compile"]["compile_error"]


def test_compiler_and_protocol_errors_are_reported(tmp_path: Path, x07_image: Image) -> None:
    """A compile error is reported in the compiler's words, and a protocol violation of the program as such."""
    done = command("--policy", "built-in:worker", program(tmp_path, c="", unsafe=True), image=x07_image.name)
    report = report_of(done)
    assert (done.returncode, report["sandbox_backend"], report["solve"]) == (1, "vm", None)
    assert report["compile"]["compile_error"] == "unsafe code is not allowed by the policy"
    broken = program(tmp_path, c='printf("no frame"); exit(0);')
    done = command("--policy", "built-in:worker", broken, image=x07_image.name)
    report = report_of(done)
    assert (report["exit_code"], report["solve"]["ok"]) == (1, False)
    assert "frame" in report["solve"]["trap"]
    assert f"failed: the program exited with status 0, but {report['solve']['trap']}" in done.stderr.decode()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda at: shutil.rmtree(at / "bin"), "bin/x07-os-runner is not an executable"),
        (lambda at: (at / "bin/x07-os-runner").chmod(0o644), "bin/x07-os-runner is not an executable"),
        (lambda at: (at / "link").symlink_to("/etc/passwd"), "link out of the folder"),
        (lambda at: (at / "link").symlink_to("../../x"), "link out of the folder"),
        (lambda at: os.mkfifo(at / "pipe"), "neither a file nor a folder"),
        (lambda at: (at / "a\nb").touch(), "unprintable characters"),
    ],
)
def test_an_invalid_toolchain_folder_is_rejected(tmp_path: Path, spoil: Callable[[Path], object], why: str) -> None:
    """A toolchain folder without the runner, or with outside links, pipes or odd names, is rejected."""
    source = tmp_path / "x07"
    shutil.copytree(TOOLCHAIN, source)
    spoil(source)
    with pytest.raises(UsageError, match=why):
        pack_toolchain(source, tmp_path / "copy")


def test_a_toolchains_digest_depends_on_its_content_only(tmp_path: Path) -> None:
    """A toolchain's digest depends on content, modes and names, not on times."""
    source = tmp_path / "x07"
    shutil.copytree(TOOLCHAIN, source)
    (source / "link").symlink_to("stdlib/README")
    first = pack_toolchain(source, tmp_path / "1")
    os.utime(source / "stdlib/README", (1, 1))
    assert pack_toolchain(source, tmp_path / "2") == first
    (source / "stdlib/README").chmod(0o755)
    second = pack_toolchain(source, tmp_path / "3")
    (source / "stdlib/more").touch()
    assert len({first, second, pack_toolchain(source, tmp_path / "4")}) == 3


def test_a_full_disk_while_copying_a_toolchain_is_reported(tmp_path: Path) -> None:
    """A full disk while copying a toolchain is reported with the place and the fix."""
    need(os.geteuid() == 0, "only root can mount a small file system", installable=False)
    source, disk = tmp_path / "x07", tmp_path / "disk"
    shutil.copytree(TOOLCHAIN, source)
    (source / "large").write_bytes(bytes(4 << 20))
    disk.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        with pytest.raises(HostError, match=rf"No space left on device \({disk}\). Free disk space"):
            pack_toolchain(source, disk / "copy")
    finally:
        subprocess.run(["/usr/bin/umount", disk], check=True)


def listed(image: Image, folder: Path) -> dict[str, tuple[int, int, int, str, bytes]]:
    """Return mode, time, links, target and digest of every entry in an image's root file system."""
    argv = ["fsck.erofs", f"--extract={folder}", "--no-preserve-owner", str(image.folder / "root.erofs")]
    subprocess.run(argv, check=True, capture_output=True)
    found = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        target = str(path.readlink()) if path.is_symlink() else ""
        digest = hashlib.sha256(path.read_bytes()).digest() if stat.S_ISREG(info.st_mode) else b""
        links = 0 if path.is_dir() else info.st_nlink
        found[str(path.relative_to(folder))] = (info.st_mode, int(info.st_mtime), links, target, digest)
    return found


def test_the_toolchain_is_the_only_addition(image: Image, x07_image: Image, tmp_path: Path) -> None:
    """An image with X07's toolchain adds only the toolchain, with fixed times, to the same image without it."""
    assert x07_image.manifest.packages == image.manifest.packages
    before, after = listed(image, tmp_path / "plain"), listed(x07_image, tmp_path / "x07")
    new = {name: after.pop(name) for name in [*after] if name not in before}
    assert after == before
    assert {time for _, time, *_ in new.values()} == {EPOCH}
    added = {name: mode for name, (mode, *_) in new.items()}
    assert added == {
        "usr/local/bin/x07-os-runner": stat.S_IFLNK | 0o777,
        "usr/local/lib/x07": stat.S_IFDIR | 0o755,
        "usr/local/lib/x07/bin": stat.S_IFDIR | 0o755,
        "usr/local/lib/x07/bin/x07-os-runner": stat.S_IFREG | 0o755,
        "usr/local/lib/x07/stdlib": stat.S_IFDIR | 0o755,
        "usr/local/lib/x07/stdlib/README": stat.S_IFREG | 0o644,
    }
