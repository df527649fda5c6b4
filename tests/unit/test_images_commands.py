"""External commands of image builds: bounded, explained and never left running."""

from __future__ import annotations

from pathlib import Path

import pytest

from x07_sandbox.errors import HostError, ImageError, UsageError
from x07_sandbox.host import paths
from x07_sandbox.host.arch import ARCHES
from x07_sandbox.host.processes import identify, wait_gone
from x07_sandbox.host.verdicts import SETTLED_NS
from x07_sandbox.images import base, commands, store


def _sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_an_error_shows_its_cause_and_the_last_lines(tmp_path: Path) -> None:
    """The error of a failed command shows its last lines of output, and the line with the cause, however early."""
    with pytest.raises(ImageError, match=r"sh exited with status 3: \n  first\n  second"):
        commands.run(_sh("echo first; echo second >&2; exit 3"), cwd=tmp_path, timeout_s=10)
    script = "echo 'update-alternatives: error: no such folder'; seq 100; exit 1"
    with pytest.raises(ImageError, match=r"update-alternatives: error: no such folder\n  89\n  90"):
        commands.run(_sh(script), cwd=tmp_path, timeout_s=10)


def test_lines_come_whole_and_endless_output_is_bounded(tmp_path: Path) -> None:
    """Progress is reported in whole lines, and endless output uses bounded memory."""
    lines: list[str] = []
    commands.run(
        _sh("printf 'a b\\nc'; sleep 0.1; printf 'd\\nrest'"), cwd=tmp_path, timeout_s=10, on_line=lines.append
    )
    assert lines == ["a b", "cd"]
    with pytest.raises(ImageError) as caught:
        commands.run(_sh("head -c 30000000 /dev/zero | tr '\\0' x; exit 1"), cwd=tmp_path, timeout_s=60)
    assert len(str(caught.value)) < 2 * commands.LOG_BYTES


def test_command_past_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    """A command that times out is killed with its children."""
    for timeout_s in (0.5, 5, 30):  # a busy host may take long to start it
        with pytest.raises(ImageError, match="timed out after"):
            commands.run(_sh("sleep 1000 & echo $! > new; mv new child; wait"), cwd=tmp_path, timeout_s=timeout_s)
        if (tmp_path / "child").exists():
            break
    assert _ends(int((tmp_path / "child").read_text()))


def test_a_short_command_leaves_no_process(tmp_path: Path) -> None:
    """A short command is over when its first process ends; its other processes are killed and delay nothing."""
    child = tmp_path / "child"
    for status, data in ((0, b"in"), (3, b"")):
        script = f"cat; sleep 1000 & echo $! >{child}; echo why >&2; exit {status}"
        if status:
            with pytest.raises(ImageError, match="why"):
                commands.capture(_sh(script))
        else:
            assert commands.capture(_sh(script), data=data) == data
        assert _ends(int(child.read_text()))
    with pytest.raises(ImageError, match="it printed nothing"):
        commands.capture(_sh("echo 12345"), max_bytes=5)


def _ends(pid: int) -> bool:
    found = identify(pid)
    return found is None or wait_gone(found, 30)


def test_environment_is_explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands see only proxy settings of the user's environment."""
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    commands.run(_sh("env > out"), cwd=tmp_path, timeout_s=10, extra_env={"TMPDIR": "/x"})
    names = {line.partition("=")[0] for line in (tmp_path / "out").read_text().splitlines()}
    assert {"PATH", "LC_ALL", "SOURCE_DATE_EPOCH", "http_proxy", "TMPDIR"} <= names
    assert "SECRET_TOKEN" not in names


def test_missing_command_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing tool is an error that names the package to install."""
    monkeypatch.setattr(paths, "PROGRAMS", (str(tmp_path),))
    with pytest.raises(HostError, match="apt install erofs-utils"):
        commands.tool("mkfs.erofs")


@pytest.mark.parametrize("name", ["", "Gcc", "-o", "gcc=1", "a b", "gcc,make", "../x", "$(id)"])
def test_odd_package_names_are_refused(name: str) -> None:
    """Only valid package names reach apt, and their order does not change the image."""
    with pytest.raises(UsageError, match="not a valid Debian package name"):
        base.check_packages([name])
    assert base.check_packages(["zip", "jq", "gcc", "zip"]) == ("jq", "zip")


def test_command_line_names_no_architecture_but_the_tables() -> None:
    """Build commands name only the chosen architecture."""
    options = "\n".join(base.mmdebstrap_options(ARCHES["aarch64"], "trixie", (), "/k d.deb", "/s"))
    assert "arm64" in options
    assert "aarch64-linux-gnu" in options
    assert "x86" not in options
    assert "amd64" not in options
    assert "'/k d.deb'" in options


def test_guest_code_is_the_guests_rooms_and_no_more() -> None:
    """The agent archive contains only guest, channel, errors, kernel and libseccomp."""
    code = store.read_guest_code()
    assert code.agent["__init__.py"] == b""
    modules = {"__init__.py", "errors.py", "kernel.py", "libseccomp.py"}
    assert {name.partition("/")[0] for name in code.agent} == {*modules, "channel", "guest"}
    assert not any(name.startswith("guest/boot/") for name in code.agent)
    assert set(code.tools) == {store.INIT, store.PACK, store.FILTERS, store.PLACES}


def test_every_guest_file_counts_for_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in any guest file changes the guest code digest, which is recorded; other changes do not."""
    cache, root = tmp_path / "cache", tmp_path / "package"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(cache))
    monkeypatch.setattr(store, "SETTLED_NS", -(10**9))  # recorded at once
    boot = [f"guest/boot/{name}" for name in ("init.c", "pack.py", "filters.py", "places.py")]
    names = [*boot, "guest/agent.py", "channel/frames.py", "errors.py", "kernel.py", "libseccomp.py"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    digests = [store.installed_code(root)]
    for name in [*names, "guest/new.py"]:
        (root / name).write_text("changed")
        digests.append(store.installed_code(root))
        assert digests[-1] == store.read_guest_code(root).digest
    assert len({*digests}) == len(names) + 2
    (root / "cli").mkdir()
    (root / "cli" / "main.py").write_text("x")
    monkeypatch.setattr(store, "read_guest_code", None)  # not read again
    assert store.installed_code(root) == digests[-1]


def test_guest_code_that_changed_just_now_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guest code modified within the clock's resolution is read again next time."""
    assert SETTLED_NS >= 100_000_000  # ten ticks of the slowest clock
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "SETTLED_NS", 10**18 * 9)
    read: list[Path] = []
    code = store.read_guest_code()

    def noted(root: Path) -> store.GuestCode:
        read.append(root)
        return code

    monkeypatch.setattr(store, "read_guest_code", noted)
    assert [store.installed_code() for _ in range(2)] == [code.digest] * 2
    assert len(read) == 2


@pytest.mark.parametrize("name", ["", "a-b", "1a", "a..b", "os;x", "a b", "é", "x" * 201, ".a"])
def test_only_names_of_modules_are_preloaded(name: str) -> None:
    """Only valid module names can be preloaded."""
    with pytest.raises(UsageError, match="not a valid Python module name"):
        base.check_modules([name])
    assert base.check_modules(["numpy", "a.b", "numpy"]) == ("a.b", "numpy")
