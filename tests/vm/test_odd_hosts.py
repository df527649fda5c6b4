"""Hosts and shells in unusual states: a run works, or an error names the cause; it never hangs."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.command import X07
from tests.conftest import need
from tests.vm.conftest import usual_start
from x07_sandbox import run_program
from x07_sandbox.host.paths import cache_dir
from x07_sandbox.policy.decode import default_policy, render_policy

ROOT = Path(__file__).resolve().parents[2]
HELLO = ["-c", "echo hello", "--toolchain", "shell"]

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image")]


def run(*words: str, before: tuple[str, ...] = (), state: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `x07` with *words*, started by the command *before*."""
    env = os.environ | ({} if state is None else {"X07_VM_STATE_DIR": str(state)})
    return subprocess.run(
        [*before, *X07, *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def shell(limit: str) -> tuple[str, ...]:
    """Return a command prefix that sets a limit in a shell and executes the command that follows."""
    return ("/bin/bash", "-c", f'{limit} && exec "$@"', "limited")


@pytest.mark.usefixtures("under_os")
def test_a_foreign_proc_is_refused(state: Path) -> None:
    """A run is refused, with a fix, if /proc belongs to another pid namespace."""
    need(os.geteuid() == 0, "needs root, to make a pid namespace", installable=False)
    done = run("run", *HELLO, before=("unshare", "--pid", "--fork"), state=state)
    assert done.returncode == 125
    assert "/proc belongs to another pid namespace" in done.stderr
    assert "unshare --mount-proc" in done.stderr
    done = run("run", *HELLO, before=("unshare", "--pid", "--fork", "--mount-proc"), state=state)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


@pytest.mark.parametrize("words", [("run", *HELLO), ("run", "--dry-run", *HELLO), ("image", "build"), ("doctor",)])
def test_without_proc_every_command_says_so(state: Path, words: tuple[str, ...]) -> None:
    """Every command reports that /proc is not mounted, without a traceback."""
    need(os.geteuid() == 0, "needs root, to unmount", installable=False)
    before = ("unshare", "--mount", "/bin/sh", "-c", 'umount --recursive /proc && exec "$@"', "without")
    done = run(*words, before=before, state=state)
    assert done.returncode == (1 if words == ("doctor",) else 125)  # doctor goes on, to report all findings
    output = re.sub(r"[.\n ]+", " ", done.stdout + done.stderr)
    assert "cannot inspect processes: /proc cannot be read (No such file or directory) Mount /proc" in output
    assert "Traceback" not in done.stderr


def test_an_ignored_sigchld_changes_no_verdict(state: Path) -> None:
    """A killed machine is reported as `guest-lost`, the host's fault, even if the shell ignored SIGCHLD."""
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    report = state.parent / "report.json"
    words = ["/usr/bin/env", "--ignore-signal=CHLD", *X07, "run", "--report-out", str(report), "--toolchain", "shell"]
    words += ["-c", "echo on; sleep 60"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        os.kill(_machine_of_the_run(state), signal.SIGKILL)
        child.communicate(timeout=60)
    result = json.loads(report.read_bytes())
    assert (result["outcome"], result["fault"]) == ("guest-lost", "host"), result["reason"]
    assert "virtual machine monitor exited" in result["reason"]


def test_stopped_time_does_not_count_as_cpu_time(state: Path, tmp_path: Path) -> None:
    """The time for which the host stops a machine does not count towards limits.cpu_ms."""
    document = msgspec.to_builtins(default_policy())
    document["limits"]["cpu_ms"] = 10_000
    (tmp_path / "policy.json").write_bytes(render_policy(document))
    (tmp_path / "busy.py").write_text(
        "import select\nprint('on', flush=True)\nwhile not select.select([0], [], [], 0)[0]: pass\n"
    )
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    words = [*X07, "run", "--policy", str(tmp_path / "policy.json"), str(tmp_path / "busy.py")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, env=env, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == b"on\n"
        machine = _machine_of_the_run(state)
        os.kill(machine, signal.SIGSTOP)
        time.sleep(11)  # the test needs real stopped time
        os.kill(machine, signal.SIGCONT)
        said = child.communicate(b"go\n", timeout=60)[1]
    assert (child.returncode, b"denied" in said) == (0, False), said  # it may say that it saves a VM


def _machine_of_the_run(state: Path) -> int:
    """Return the pid of the VMM of the run job."""
    (found,) = [
        int(name)
        for path in state.glob("*-run*/owner.json")
        for name in os.listdir("/proc")  # noqa: PTH208 - numbers
        if name.isdigit() and _is_vmm(int(name), json.loads(path.read_bytes()))
    ]
    return found


def _is_vmm(pid: int, owner: dict[str, Any]) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[0].endswith(b"qemu-system-x86_64") and any(owner["instance"].encode() in word for word in words)


IN_THE_BACKGROUND = """
import fcntl, os, pty, signal, subprocess, sys, termios, time
ours, theirs = pty.openpty()
if os.fork() == 0:
    os.setsid()  # the shell, in the terminal's foreground
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    command = subprocess.Popen(sys.argv[1:], stdin=theirs, process_group=0)
    print(os.waitstatus_to_exitcode(os.waitpid(command.pid, os.WUNTRACED)[1]), flush=True)
    command.kill()
    os._exit(0)
typed = 0
while not os.waitpid(-1, os.WNOHANG)[0]:
    if typed < 1000:  # the terminal's buffer may hold no more
        typed += os.write(ours, b"next command\\n")
    time.sleep(0.1)
"""


@pytest.mark.usefixtures("under_os")
def test_a_background_run_does_not_read_the_terminal(state: Path) -> None:
    """Terminal input does not stop a background run; its program reads end of file."""
    source = "import sys, time; time.sleep(1); print('read', sys.stdin.read())"
    command = [sys.executable, "-c", IN_THE_BACKGROUND, *X07, "run", "--toolchain", "python", "-c", source]
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["read", "0"], done.stderr


def test_a_library_call_says_that_sigchld_is_ignored(state: Path) -> None:
    """A library call from a process that ignores SIGCHLD raises an error that says so."""
    code = "import signal, x07_sandbox\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    code += "x07_sandbox.run_program(source='true', toolchain='shell')\n"
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "SIGCHLD is ignored" in done.stderr


def test_a_program_with_many_descriptors_may_call_the_library(state: Path) -> None:
    """Runs and pools work in a process with more than 1024 open descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need(hard == resource.RLIM_INFINITY or hard >= 2048, "needs 2048 descriptors", installable=False)
    code = f"import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (2048, {hard}))\n"
    code += "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(1200)]\n"
    code += "from x07_sandbox import Pool\n"
    code += "with Pool(size=1) as pool:\n"
    code += "    print(pool.submit(source='echo two', toolchain='shell').result().stdout.text, end='')\n"
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "two\n", "")
    # Other processes still restore VMs.
    other = run_program(source="true", toolchain="shell")
    assert other.phases["run"].start == usual_start(), other.warnings


@pytest.mark.parametrize(
    ("limit", "why", "fix"),
    [
        ("ulimit -f 1000", "File too large", "ulimit -f"),
        ("ulimit -n 20", "Too many open files", "ulimit -n"),
        ("ulimit -v 200000", "Cannot allocate memory", "ulimit -v"),
        ("ulimit -v 150000", "", "ulimit -v"),  # too little to read the program
    ],
)
def test_a_limit_of_the_shell_is_named(state: Path, tmp_path: Path, limit: str, why: str, fix: str) -> None:
    """A shell limit that is too low fails the run, and the reason names the limit to raise."""
    program = tmp_path / "hello.sh"
    program.write_text("echo hello\n")
    done = run("run", "--json", str(program), before=shell(limit), state=state)
    result = json.loads(done.stdout)
    assert (done.returncode, result["fault"]) == (125, "host"), result["reason"]
    assert why in result["reason"]
    assert fix in result["reason"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("limit", "fix"),
    [
        ("ulimit -v 3000000", "ulimit -H -v to "),
        ("ulimit -d 400000", "ulimit -H -d to "),
        ("ulimit -i 10", "ulimit -H -i to 64 or more"),
        ("ulimit -u 90 -i 10", "ulimit -H -i to 64 or more, ulimit -H -u to 96 or more"),
    ],
)
def test_hard_limits_below_those_of_the_jail_are_named(state: Path, limit: str, fix: str) -> None:
    """Hard shell limits below the jail's requirements are named, each with its minimum."""
    lowered = shell(limit)
    need(
        "-u" not in limit or os.geteuid() == 0,
        "needs root, whose processes that limit does not count",
        installable=False,
    )
    if os.geteuid() == 0:  # root with CAP_SYS_RESOURCE may raise hard limits
        lowered = ("setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", *lowered)
    result = json.loads(run("run", "--json", *HELLO, before=lowered, state=state).stdout)
    assert (result["outcome"], result["fault"]) == ("backend-error", "host"), result["reason"]
    assert fix in result["reason"]


@pytest.mark.parametrize(
    ("limit", "seconds", "outcome", "why"),
    [("ulimit -S -t 3", 6, "ok", "status 0"), ("ulimit -t 4", 100, "guest-lost", "CPU time limit of this shell")],
)
def test_a_limit_on_cpu_time_of_the_shell_is_named(
    state: Path, tmp_path: Path, limit: str, seconds: int, outcome: str, why: str
) -> None:
    """A soft CPU time limit of the shell does not end a machine; the hard limit does, and the reason names it."""
    program = tmp_path / "spin.py"
    program.write_text(f"import time\nwhile time.process_time() < {seconds}:\n    pass\n")
    result = json.loads(run("run", "--json", str(program), before=shell(limit), state=state).stdout)
    assert (result["outcome"], why in result["reason"]) == (outcome, True), result["reason"]


@pytest.mark.parametrize("words", [("run", *HELLO), ("doctor",), ("pool", "start"), ("image", "build")])
def test_every_command_reports_a_read_only_cache(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Every command reports a read-only cache, without a traceback."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    script = f'mount --bind "{cache}" "{cache}" && mount -o remount,ro,bind "{cache}" && exec "$@"'
    before = ("unshare", "--mount", "/bin/bash", "-c", script, "readonly", "/usr/bin/env", f"X07_VM_CACHE_DIR={cache}")
    done = run(*words, before=before, state=tmp_path / "state")
    assert done.returncode != 0
    assert "Read-only file system" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_folders_are_usable_under_a_strict_umask(tmp_path: Path) -> None:
    """The owner can use the folders that a run creates, whatever the umask."""
    done = run("run", *HELLO, before=shell("umask 777"), state=tmp_path / "state" / "jobs")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


def test_files_are_readable_under_a_strict_umask(state: Path, tmp_path: Path) -> None:
    """The owner can read the files that a library call creates, whatever the caller's umask."""
    cache = tmp_path / "cache"
    for name in ("images", "templates"):
        subprocess.run(["/bin/mkdir", "-p", "-m", "0700", cache, cache / name], check=True)
        subprocess.run(["/bin/cp", "-al", "--", f"{cache_dir() / name}/.", cache / name], check=True)
    code = "import os\nos.umask(0o777)\nfrom x07_sandbox import run_program\n"
    code += "print(run_program(source='echo hello', toolchain='shell').stdout.text, end='')\n"
    env = os.environ | {"X07_VM_STATE_DIR": str(state), "X07_VM_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    locked = [path for place in (cache, state.parent) for path in place.rglob("*") if not path.stat().st_mode & 0o400]
    assert locked == []


def test_a_proc_with_subset_pid_is_refused(state: Path) -> None:
    """A run is refused, with a fix, if /proc is mounted with subset=pid, as in a hardened service."""
    need(os.geteuid() == 0, "needs root, to mount", installable=False)
    script = 'mount -t proc -o subset=pid proc /proc && exec "$@"'
    done = run(
        "run", "--json", *HELLO, before=("unshare", "--mount", "/bin/bash", "-c", script, "hardened"), state=state
    )
    result = json.loads(done.stdout)
    assert (done.returncode, result["fault"]) == (125, "host"), result["reason"]
    assert "ProcSubset=all" in result["reason"]
    assert "Traceback" not in done.stderr


def test_a_missing_tool_leaves_no_record(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run refused because a tool is missing leaves no job record."""
    from x07_sandbox import SandboxError
    from x07_sandbox.backends.prerequisites import Need
    from x07_sandbox.backends.qemu import start

    monkeypatch.setattr(start, "needs_of", lambda _arch: (Need("program", "/usr/bin/no-such-tool", "nothing"),))
    with pytest.raises(SandboxError, match="missing: nothing"):
        run_program(source="true", toolchain="shell")
    assert [path for path in state.iterdir() if (path / "job.json").exists()] == []


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        (
            {"qemu_binary": "/usr/bin/no-such-qemu", "qemu_package": "the-qemu"},
            "apt-get install --no-install-recommends the-qemu",
        ),
        (
            {"firmware": ("/usr/share/no-such-bios",), "firmware_packages": ("the-bios",)},
            "apt-get install --reinstall the-bios",
        ),
    ],
    ids=["QEMU", "firmware"],
)
@pytest.mark.parametrize("words", [("run", *HELLO), ("run", "--dry-run", *HELLO), ("doctor",), ("image", "build")])
@pytest.mark.usefixtures("state")
def test_missing_qemu_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    changes: dict[str, Any],
    fix: str,
) -> None:
    """Each command that needs QEMU or its firmware names the package to install if it is missing."""
    from x07_sandbox.cli.main import main
    from x07_sandbox.host.arch import ARCHES, host_arch

    monkeypatch.setitem(ARCHES, os.uname().machine, replace(host_arch(), **changes))
    main(list(words))
    output = "".join(capfd.readouterr())
    assert fix in output
    assert "Traceback" not in output


def test_file_names_send_no_control_sequences(tmp_path: Path) -> None:
    """Messages escape the control characters of a hostile file name."""
    for name in ("a\x1b]0;x\x07.txt", "b\x1b[31m.p\x1b[5my", "c\x1b[31m/p.py"):
        done = run("run", str(tmp_path / name))
        assert done.returncode == 2
        assert done.stderr.replace("\n", "").isprintable(), done.stderr


def test_quickstart_explains_a_uid_without_a_passwd_entry() -> None:
    """The quickstart script stops with an explanation if the uid has no passwd entry."""
    need(os.geteuid() == 0, "needs root to become such a user", installable=False)
    code = (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8") + "\nensure_subids"
    words = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run([*words, "quickstart.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "quickstart.sh: uid 54321 has no entry in the passwd file" in done.stderr
    assert "run quickstart.sh as a named user or as root" in done.stderr


@pytest.mark.parametrize("name", ["a:b", "a $b", "{a}", "a`b", 'a"b', "a\nb"])
def test_setup_rejects_a_folder_name_that_breaks_venv(tmp_path: Path, name: str) -> None:
    """Setup rejects a folder name in which .venv would not work, before it installs anything."""
    shutil.copytree(ROOT / "scripts", tmp_path / name / "scripts")
    done = subprocess.run([tmp_path / name / "scripts/setup.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Move the project to another folder." in done.stderr


@pytest.mark.parametrize(
    "script", ["quickstart.sh", "setup.sh", "test.sh", "fresh_root_check.sh", "nested_kvm_check.sh"]
)
def test_scripts_ignore_cdpath(script: str) -> None:
    """The scripts find their folder whatever CDPATH is set to."""
    bash = shutil.which("bash")
    assert bash is not None
    lines = (ROOT / "scripts" / script).read_text(encoding="utf-8").splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("source "))
    code = "\n".join([*lines[:head], "pwd"]).replace('"${BASH_SOURCE[0]}"', f"scripts/{script}")
    env = os.environ | {"CDPATH": "."}
    done = subprocess.run([bash, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{ROOT}\n"), done.stderr
