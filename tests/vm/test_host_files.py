"""Host folders that a policy opens: what a program sees of them, and which changes come back."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.command import X07, x07
from tests.conftest import sample
from tests.published import document
from tests.vm.conftest import left_behind
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.templates import TEMPLATES

pytestmark = pytest.mark.vm


class Project:
    """A user's folder, and commands started in it."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder = folder
        self.state = state
        folder.mkdir()
        (folder / "data").mkdir()
        (folder / "out").mkdir()
        (folder / "data/in.txt").write_text("one\ntwo\nthree\n")
        (folder / "data/gone.txt").write_text("short-lived\n")
        (folder / "run.sh").write_text("#!/bin/sh\necho hi\n")
        (folder / "run.sh").chmod(0o755)
        (folder / ".secret").write_text("hidden\n")
        (folder / "key.pem").write_text("a key\n")

    def x07(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command as a user types it."""
        done = x07(self.folder, *words)
        assert done.code == code, done.err + done.out.decode()
        return subprocess.CompletedProcess(words, done.code, done.out.decode(), done.err)

    def run(self, source: str, *words: str, code: int = 0) -> dict[str, Any]:
        """Return the result of a Python source."""
        words = ("run", "--json", "-c", source, "--toolchain", "python", *words)
        found: dict[str, Any] = json.loads(self.x07(*words, code=code).stdout)
        assert left_behind(self.state) == []
        return found

    def policy(self, **fs: object) -> str:
        """Write the built-in policy with other file rules, beside the project."""
        document = msgspec.to_builtins(default_policy())
        document["fs"] |= fs
        path = self.folder.parent / f"policy-{os.urandom(4).hex()}.json"
        path.write_bytes(render_policy(document))
        return str(path)

    def seen(self) -> dict[str, str]:
        """Return all files with their content."""
        return {
            str(path.relative_to(self.folder)): path.read_text()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def project(under_os: None, state: Path, tmp_path: Path) -> Project:
    """A user's folder."""
    del under_os
    return Project(tmp_path / "project", state)


CHANGE = """
import os
open("data/in.txt", "a").write("four\\n")
os.remove("data/gone.txt")
os.makedirs("new/deep")
open("new/deep/file", "w").write("made\\n")
os.rename("run.sh", "go.sh")
"""


@pytest.mark.usefixtures("in_vms")
def test_a_policy_template_of_x07_opens_its_folders(project: Project) -> None:
    """Under X07's template `cli` the folder can be read and `out` changed; hidden names and keys are missing."""
    path = project.folder.parent / "cli.json"
    path.write_bytes(render_policy(TEMPLATES["cli"]))
    source = """
import os
print(os.getcwd(), sorted(os.listdir(".")), open("data/in.txt").read().split())
for name in ("data/in.txt", "data/other", "here"):
    try:
        open(name, "w")
    except OSError as exc:
        print(name, exc.errno)
open("out/made.txt", "w").write("made")
"""
    result = project.run(source, "--policy", str(path))
    assert result["stdout"]["text"].splitlines() == [
        "/opt/x07 ['data', 'out', 'run.sh'] ['one', 'two', 'three']",
        "data/in.txt 30",
        "data/other 30",
        "here 30",
    ]
    assert result["changes"]["state"] == "applied"
    assert (project.folder / "out/made.txt").read_text() == "made"
    left = {denial["field"]: denial["subject"] for denial in result["denials"]}
    assert ".secret" in left["fs.deny_hidden"]
    assert "key.pem" in left["secrets"]


@pytest.mark.usefixtures("in_vms")
def test_changes_can_be_applied_and_undone(project: Project) -> None:
    """A program's changes are applied when it ends; `x07 undo` reverts and `x07 apply` reapplies them."""
    before = project.seen()
    done = project.x07("run", "--allow-write-root", ".", "-c", CHANGE, "--toolchain", "python")
    assert done.stderr == (
        "x07: denied: copying .secret into the VM (hidden name, fs.deny_hidden). To allow it, use --allow-hidden\n"
        "x07: denied: copying key.pem into the VM (looks like a secret). To allow it, use --reveal key.pem\n"
        "x07: deleted: data/gone.txt\nx07: deleted: run.sh\n"
        "x07: 4 added, 1 changed, 2 deleted: applied; see x07 diff, revert with x07 undo\n"
    )
    after = project.seen()
    assert after == {
        ".secret": "hidden\n",
        "data/in.txt": "one\ntwo\nthree\nfour\n",
        "go.sh": "#!/bin/sh\necho hi\n",
        "key.pem": "a key\n",
        "new/deep/file": "made\n",
    }
    assert (project.folder / "go.sh").stat().st_mode & 0o777 == 0o755
    shown = project.x07("diff").stdout
    assert "--- a/data/gone.txt\n+++ /dev/null\n@@ -1 +0,0 @@\n-short-lived\n" in shown
    assert "@@ -1,3 +1,4 @@\n one\n two\n three\n+four\n" in shown
    assert "new file mode 100755" in shown
    machine = document(project.x07("diff", "--json").stdout)
    assert [change["name"] for change in machine["roots"][0]["changes"]] == sorted(
        ["data/gone.txt", "data/in.txt", "go.sh", "new", "new/deep", "new/deep/file", "run.sh"]
    )
    assert "reverted; apply again with x07 apply" in project.x07("undo").stderr
    assert project.seen() == before
    assert "they are not applied" in project.x07("undo", code=2).stderr
    assert "applied; revert with x07 undo" in project.x07("apply").stderr
    assert project.seen() == after
    assert "already applied" in project.x07("apply").stderr


def test_diff_writes_a_patch(project: Project) -> None:
    """--diff writes the patch that `x07 diff` shows, and all changes with digests; git accepts the patch."""
    project.x07("run", "--allow-write-root", ".", "--diff", "../p", "-c", CHANGE, "--toolchain", "python")
    patch = project.folder.parent / "p"
    assert patch.read_text() == project.x07("diff").stdout
    assert json.loads((project.folder.parent / "p.json").read_text()) == json.loads(
        project.x07("diff", "--json").stdout
    )
    project.x07("undo")
    argv = ["/usr/bin/env", "git", "apply", "--check", str(patch)]
    subprocess.run(argv, cwd=project.folder, check=True, capture_output=True)


def test_a_run_whose_attestation_fails_is_reported(project: Project) -> None:
    """If a run's own changes remove the attestation's folder, --json and --report-out still report the run."""
    (project.folder / "gone").mkdir()
    words = ("--report", "runner", "--attest-runtime", "gone/a", "--report-out", "../r", "--allow-write-root", ".")
    result = project.run('import os; os.rmdir("gone"); open("new", "w")', *words, code=125)
    assert result == document((project.folder.parent / "r").read_bytes())
    assert (result["outcome"], result["changes"]["state"], result["x07_exit_code"]) == ("ok", "applied", 125)
    assert "X07RA_EWRITE: cannot write gone/a: No such file" in result["warnings"][-1]


@pytest.mark.parametrize(("how", "ends"), [("keep", "kept"), ("discard", "discarded")])
def test_changes_can_be_saved_or_discarded(project: Project, how: str, ends: str) -> None:
    """Changes can be saved until `x07 apply`, or discarded; the exit code stays the program's."""
    before = project.seen()
    result = project.run(CHANGE, "--allow-write-root", ".", "--changes", how)
    assert result["changes"]["state"] == ends
    assert project.seen() == before
    project.x07("apply", code=0 if ends == "kept" else 2)
    assert (project.seen() == before) is (ends == "discarded")


@pytest.mark.parametrize(
    ("source", "words", "outcome", "code"),
    [
        (CHANGE + "\nimport sys; sys.exit(3)", [], "failed", 3),
        (CHANGE + "\nimport time; time.sleep(60)", ["--timeout", "4"], "timeout", 124),
        (CHANGE + "\nimport os; os.abort()", [], "signalled", 134),
        (CHANGE + "\nwhile True: print('x' * 4000)", ["--max-output-bytes", "1000"], "output-limit", 153),
    ],
)
def test_only_changes_of_a_program_that_ended_by_itself_are_applied(
    project: Project, source: str, words: list[str], outcome: str, code: int
) -> None:
    """Changes of a program that ended by itself are applied; those of a killed one are saved."""
    before = project.seen()
    result = project.run(source, "--allow-write-root", ".", *words, code=code)
    assert (result["outcome"], result["changes"]["deleted"]) == (outcome, 2)
    assert result["changes"]["state"] == ("applied" if outcome == "failed" else "kept")
    assert (project.seen() == before) is (outcome != "failed")


def test_a_host_file_that_changed_meanwhile_is_a_conflict(project: Project) -> None:
    """If a host file changed since it was copied in, no change is applied: exit code 125, and the file is named."""
    words = ["run", "--allow-write-root", ".", "-c", "print(1, flush=True)\ninput()\n" + CHANGE]
    argv = [*X07, *words, "--toolchain", "python"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, cwd=project.folder, text=True, **pipes) as running:  # type: ignore[call-overload]
        assert running.stdout.readline() == "1\n"
        (project.folder / "data/in.txt").write_text("mine\n")
        before = project.seen()
        _, said = running.communicate("go\n")
    assert running.returncode == 125
    assert "conflict" in said
    assert "data/in.txt" in said
    assert project.seen() == before
    project.x07("apply", code=125)
    project.x07("apply", "--skip", "data/in.txt")
    assert project.seen()["data/in.txt"] == "mine\n"
    assert "go.sh" in project.seen()


def test_a_protected_name_is_left_out(project: Project) -> None:
    """A change to a protected name is left out and the rest applied, with the program's exit code."""
    source = 'open("Jenkinsfile", "w").write("x"); open("fine.txt", "w").write("y")'
    result = project.run(source, "--allow-write-root", ".")
    changes = result["changes"]
    assert (result["outcome"], changes["state"], changes["added"], changes["left_out"]) == ("ok", "applied", 1, 1)
    (denial,) = [denial for denial in result["denials"] if denial["action"] == "change"]
    assert denial["field"] == "protected"
    assert denial["how_to_allow"]["flag"] == "--allow-protected Jenkinsfile"
    assert (project.seen().get("fine.txt"), project.seen().get("Jenkinsfile")) == ("y", None)
    _, *words = shlex.split(changes["apply_left_out"])
    project.x07(*words)
    assert (project.seen().get("fine.txt"), project.seen().get("Jenkinsfile")) == ("y", "x")
    project.x07("undo")
    assert (project.seen().get("fine.txt"), project.seen().get("Jenkinsfile")) == ("y", None)
    flag = shlex.split(denial["how_to_allow"]["flag"])
    result = project.run('open("Jenkinsfile", "w").write("x")', "--allow-write-root", ".", *flag)
    assert result["changes"]["state"] == "applied"
    assert project.seen()["Jenkinsfile"] == "x"


def test_all_or_nothing_rejects_the_whole_set(project: Project) -> None:
    """With --changes all-or-nothing a protected name rejects the whole set; `x07 apply --skip` applies the rest."""
    source = 'open("Jenkinsfile", "w").write("x"); open("fine.txt", "w").write("y")'
    result = project.run(source, "--allow-write-root", ".", "--changes", "all-or-nothing", code=125)
    assert (result["outcome"], result["changes"]["state"]) == ("ok", "kept")
    assert "fine.txt" not in project.seen()
    assert "Jenkinsfile" in project.x07("apply", code=125).stderr
    project.x07("apply", "--skip", "Jenkinsfile")
    assert (project.seen().get("fine.txt"), project.seen().get("Jenkinsfile")) == ("y", None)


def test_a_hidden_folder_of_links_names_both_flags(project: Project) -> None:
    """A hidden folder with links is left out with both reasons and both flags in one line."""
    (project.folder / "node_modules/.bin").mkdir(parents=True)
    (project.folder / "node_modules/tool.js").write_text("1")
    (project.folder / "node_modules/.bin/tool").symlink_to("../tool.js")
    source = 'print(len(open("node_modules/.bin/tool").read()))'
    result = project.run(source, "--allow-read-root", "node_modules", code=1)
    (denial,) = [denial for denial in result["denials"] if denial["action"] == "copy"]
    assert denial["subject"].endswith(".bin")
    assert "fs.deny_hidden" in denial["reason"]
    assert "fs.allow_symlinks" in denial["reason"]
    flags = denial["how_to_allow"]["flag"]
    assert flags == "--allow-hidden --allow-symlinks"
    result = project.run(source, "--allow-read-root", "node_modules", *flags.split())
    assert result["stdout"]["text"] == "1\n"


COPY_RULES = [
    ({"deny_hidden": True}, ".secret", "fs.deny_hidden"),
    ({"max_read_bytes": 5}, "data/in.txt", "fs.max_read_bytes"),
    ({"allow_symlinks": False}, "link", "fs.allow_symlinks"),
    ({"max_depth": 1}, "data/in.txt", "fs.max_depth"),
]


@pytest.mark.parametrize(("fs", "name", "field"), sample(COPY_RULES, 3))
def test_an_omitted_file_gets_advice_that_works(project: Project, fs: dict[str, object], name: str, field: str) -> None:
    """Each rule about input files leaves them out by name; with the advised line the program finds them."""
    (project.folder / "link").symlink_to("run.sh")
    source = f"print(len(open({name!r}).read()) > 3)"
    rules = {"read_roots": ["."], **fs}
    result = project.run(source, "--policy", project.policy(**rules), code=1)
    (denial,) = [denial for denial in result["denials"] if denial["field"] == field]
    assert name in denial["subject"]
    rules[field.removeprefix("fs.")] = denial["how_to_allow"]["value"]
    assert project.run(source, "--policy", project.policy(**rules))["stdout"]["text"] == "True\n"


def test_absolute_roots_keep_their_path(project: Project) -> None:
    """Absolute roots keep their path; nested roots are copied once and write access wins; a root can be a file."""
    place = project.folder.parent / "else where"
    (place / "in").mkdir(parents=True)
    (place / "in/a").write_text("a")
    (place / "one.txt").write_text("1")
    source = f"""
import os
os.chdir({str(place)!r})
print(sorted(os.listdir(".")), open("in/a").read())
open("in/b", "w").write("b")
open("one.txt", "a").write("2")
try:
    open("c", "w")
except OSError as exc:
    print(exc.errno)
"""
    rules = {"read_roots": [str(place)], "write_roots": [f"{place}/in", f"{place}/one.txt"]}
    result = project.run(source, "--policy", project.policy(**rules))
    assert result["stdout"]["text"] == "['in', 'one.txt'] a\n30\n"
    assert ((place / "in/b").read_text(), (place / "one.txt").read_text()) == ("b", "12")


def test_out_returns_the_programs_files(project: Project) -> None:
    """With --out DIR, files that the program writes to /x07/out come back to DIR, in every run and at any path."""
    # In a root, and hidden there; also a file that is a root of its own, which its name would otherwise keep out.
    roots = ("--allow-write-root", ".", "--allow-read-root", "key.pem", "--out", ".made here")
    for number in ("1", "2"):
        source = f'open("/x07/out/made", "w").write("{number}"); open("beside", "w").write(open("key.pem").read())'
        result = project.run(source, *roots)
        assert result["changes"]["state"] == "applied"
        assert (project.folder / ".made here/made").read_text() == number
        assert (project.folder / "beside").read_text() == "a key\n"


def test_a_project_starts_in_its_own_folder(project: Project) -> None:
    """With a manifest the program starts in /x07/in/project, where its roots are."""
    (project.folder / "main.py").write_text("import os\nprint(os.getcwd(), sorted(os.listdir()))\nopen('x', 'w')\n")
    (project.folder / "x07-sandbox.toml").write_text(
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nentry = "main.py"\nfiles = ["main.py"]\n'
    )
    done = project.x07("run", ".")
    assert (done.stdout, done.stderr) == ("/x07/in/project []\n", "")
    done = project.x07("run", "--allow-write-root", ".", "--hide", "x07-sandbox.toml", ".")
    assert done.stdout == "/x07/in/project ['data', 'main.py', 'out', 'run.sh']\n"
    assert "1 added: applied" in done.stderr


def test_the_next_command_repairs_a_killed_apply(project: Project) -> None:
    """After SIGKILL while changes are applied, the next x07 command leaves the whole old tree or the whole new one."""
    for number in range(150):
        (project.folder / f"data/{number}").write_text(str(number))
    before = project.seen()
    source = """
for n in range(150):
    open(f"data/{n}", "w").write("new" * 100)
    open(f"data/n{n}", "w").write("x")
"""
    project.run(source, "--allow-write-root", ".", "--changes", "keep")
    project.x07("apply")
    after = project.seen()
    project.x07("undo")
    assert project.seen() == before
    torn = 0
    for step in range(60):
        if torn and step >= 12:
            break
        # The folder of prepared files shows that it has begun, and a new file that it is halfway, however slow this
        # machine is.
        sign = (".x07-apply-*", "data/n*")[step % 2]
        argv = [*X07, "apply"]
        with subprocess.Popen(argv, cwd=project.folder, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and not list(project.folder.glob(sign)):
                time.sleep(0.001)
            time.sleep(0.004 * (step // 2))
            child.send_signal(signal.SIGKILL)
        torn += project.seen() not in (before, after)
        project.x07("policy", "check", "built-in:cli")  # any command
        assert project.seen() in (before, after)
        assert not [name for name in os.listdir(project.folder) if name.startswith(".x07")]  # noqa: PTH208 - names
        if project.seen() == after:
            project.x07("undo")
    assert torn, "no kill came while something was under way: the test looks at nothing"


def test_concurrent_changes_are_a_conflict(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two concurrent runs that change the same file, one is applied and the other is a conflict."""
    monkeypatch.setenv("X07_VM_MAX_RUNNING", "4")  # concurrently, even with one processor
    source = """
import sys
print("up", flush=True)
input()
for name in ("in.txt", *range(40)):
    open(f"data/{name}", "w").write(sys.argv[1])
"""
    argv = [*X07, "run", "--allow-write-root", ".", "-c", source, "--toolchain", "python", "--report-out"]
    reports = [project.folder.parent / f"{word}.json" for word in ("one", "two")]
    running = [
        subprocess.Popen(
            [*argv, str(path), "--", path.stem], cwd=project.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for path in reports
    ]
    for child in running:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"  # it has its copies
    for child in running:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.flush()
    for child in running:
        child.communicate()
    results = [json.loads(path.read_bytes()) for path in reports]
    assert sorted(result["changes"]["state"] for result in results) == ["applied", "conflict"]
    words = {text for name, text in project.seen().items() if re.fullmatch(r"data/(\d+|in\.txt)", name)}
    assert len(words) == 1


def test_the_hosts_variables_go_in_by_their_names_only(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the host variables in env.allow_keys reach the program, and env.deny_keys removes any of them."""
    for name in ("WANTED", "DENIED", "OTHER"):
        monkeypatch.setenv(name, name.lower())
    document = msgspec.to_builtins(default_policy())
    document["env"] |= {"allow_keys": ["WANTED", "DENIED", "MISSING"], "deny_keys": ["DENIED", "HOME"]}
    path = project.folder.parent / "env.json"
    path.write_bytes(render_policy(document))
    source = (
        "import os; ours = ('X07_', 'PYTHON'); "
        "print(sorted(name for name in os.environ if not name.startswith(ours)), os.environ['WANTED'])"
    )
    result = project.run(source, "--policy", str(path), "--env", "NAMED=1")
    assert result["stdout"]["text"] == "['LANG', 'NAMED', 'PATH', 'WANTED'] wanted\n"
