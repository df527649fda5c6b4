"""Denials in a result: the field, and what would allow it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from tests.fuzz.fuzz_observed import AREAS
from tests.fuzz.fuzz_observed import CWD as START
from tests.policies import document_with
from x07_sandbox.channel.messages import Denied
from x07_sandbox.policy.changes import flag_reach
from x07_sandbox.policy.denials import GuestMount, Hint, HowToAllow
from x07_sandbox.policy.hints import Adding, LocalModules, hints
from x07_sandbox.policy.model import Policy
from x07_sandbox.policy.observed import denials, limit_hit, more_tasks, too_much_output

EACCES, EPERM, EROFS, EMFILE, EBUSY = 13, 1, 30, 24, 16
LISTED: Final = {"process.allow_exec_prefixes": [], "process.allow_execs": ["/usr/bin/env"]}


def policy(changes: Mapping[str, object]) -> Policy:
    """The default policy with these fields, named by path."""
    return msgspec.convert(document_with(changes), Policy)


def kernel(call: str, path: str, error: int, *, write: bool = False) -> Denied:
    """A guest's report of a call that the kernel refused."""
    return Denied(1, "kernel", call, error, path, write, times=1)


def seccomp(call: str) -> Denied:
    """A guest's report of a call that a filter refused."""
    return Denied(1, "seccomp", call, EPERM, "", write=False, times=2)


NO_ADVICE: Final = object()


class Case(NamedTuple):
    """A denial, its field, and the value that would allow it. path: of the value, if it is not the field."""

    changes: Mapping[str, object]
    denied: Denied
    field: str
    value: object = NO_ADVICE
    path: str | None = ""


CASES: Final = [
    # filters
    Case({"threads.enabled": False}, seccomp("clone"), "threads.enabled", value=True),
    Case({"process.allow_spawn": False}, seccomp("clone"), "process.allow_spawn", value=True),
    Case({"process.enabled": False}, seccomp("vfork"), "process.allow_spawn", value=True, path="$.process.enabled"),
    Case({"process.allow_exec": False}, seccomp("execve"), "process.allow_exec", value=True),
    Case({"process.enabled": False}, seccomp("execve"), "process.allow_exec", value=True, path="$.process.enabled"),
    Case({}, seccomp("clone"), "system-calls"),
    # programs
    Case(LISTED, kernel("execve", "/usr/bin/true", EACCES), "process.allow_execs", ["/usr/bin/env", "/usr/bin/true"]),
    Case(LISTED, kernel("execve", "/tmp/a/made", EACCES), "process.allow_exec_prefixes", ["/tmp/"]),  # noqa: S108
    # on the list already: it is the file that cannot be executed
    Case(LISTED, kernel("execve", "/usr/bin/env", EACCES), "permissions"),
    Case({"process.allow_exec_prefixes": ["../x07/"]}, kernel("execve", "/opt/x07/a.txt", EACCES), "permissions"),
    # on the list, but made by the program: an entry counts only for files that existed before
    Case(
        {"process.allow_exec_prefixes": ["/opt/x07/bin/"]},
        kernel("execve", "/opt/x07/bin/made", EACCES),
        "process.allow_exec_prefixes",
        ["/opt/x07/bin/", "/opt/x07/"],
    ),
    Case(
        {"process.allow_exec_prefixes": [], "process.allow_execs": ["/data/out/made"]},
        kernel("execve", "/data/out/made", EACCES),
        "process.allow_exec_prefixes",
        ["/data/out/"],
    ),
    # in a read root nothing can be made
    Case(
        {"process.allow_exec_prefixes": [], "process.allow_execs": ["in/tool"]},
        kernel("execve", "/opt/x07/in/tool", EACCES),
        "permissions",
    ),
    # of a folder that is not known
    Case(LISTED, kernel("execve", ".../tool", EACCES), "permissions"),
    Case({}, kernel("bind", "", EACCES, write=True), "permissions"),
    # no policy could say it
    Case({}, kernel("mkdir", "/srv/a;b/", EROFS, write=True), "fs.write_roots"),
    Case({"process.allow_exec_prefixes": []}, kernel("execve", "/usr/bin/a;b", EACCES), "process.allow_execs"),
    Case({}, kernel("execve", "/opt/x07/a.txt", EACCES), "permissions"),
    # files
    Case({"limits.fds": 256}, kernel("openat", "", EMFILE), "limits.fds", 512),
    Case({"limits.fds": 256}, kernel("prlimit64", "nofile", EPERM), "limits.fds", 512),
    Case({}, kernel("setrlimit", "core", EPERM, write=True), "limits.core_dumps", value=True),
    Case({"limits.core_dumps": True}, kernel("setrlimit", "core", EPERM, write=True), "limits.core_dumps"),
    Case({}, kernel("prlimit64", "", EPERM, write=True), "permissions"),
    # no root can be made of these, but of a new folder in them
    Case({}, kernel("mkdir", "/", EROFS, write=True), "fs.write_roots", None, path=None),
    Case({}, kernel("openat", "/x07/out/", EROFS, write=True), "fs.write_roots", None, path=None),
    Case(
        {"fs.enabled": False},
        kernel("mkdir", "/srv/", EROFS, write=True),
        "fs.write_roots",
        value=True,
        path="$.fs.enabled",
    ),
    Case({"fs.enabled": True}, kernel("openat", "/data/a/b", EROFS, write=True), "fs.write_roots", ["/data"]),
    Case({"fs.enabled": True}, kernel("openat", "/opt/x07/in/", EROFS, write=True), "fs.write_roots", ["in"]),
    Case({}, kernel("openat", "/data/out/locked", EACCES, write=True), "permissions"),
    # the folders around a relative root belong to it
    Case(
        {"fs.write_roots": ["rr/one.txt"]},
        kernel("openat", "/opt/x07/rr/", EACCES, write=True),
        "fs.write_roots",
        ["rr/one.txt", "rr"],
    ),
    Case({}, kernel("mkdir", "/opt/x07/rr/a/", EROFS, write=True), "fs.write_roots", ["rr/a"]),
    Case({"fs.deny_hidden": True}, kernel("mkdir", "/opt/x07/.rr/", EACCES, write=True), "permissions"),
    # a root stays where it is, but for one around it
    Case({}, kernel("rename", "/opt/x07/in", EBUSY, write=True), "fs.write_roots", ["."]),
    Case({}, kernel("rmdir", "/data/out", EBUSY, write=True), "fs.write_roots", ["/data"]),
    Case({}, kernel("rename", "/data", EBUSY, write=True), "fs.write_roots"),
    Case({}, kernel("rmdir", "/tmp", EBUSY, write=True), "fs.write_roots"),  # noqa: S108 - the guest's
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.denied.call} {case.denied.path}")
def test_a_refusal_names_the_field_and_what_would_allow_it(case: Case) -> None:
    """A denial names its field and the smallest policy change that would allow it."""
    (denial,) = denials([case.denied], policy(case.changes), AREAS, START)
    assert (denial.field, denial.observed_by, denial.count) == (case.field, "guest", case.denied.times)
    how = denial.how_to_allow
    if case.value is NO_ADVICE:
        assert how is None
    else:
        path = f"$.{case.field}" if case.path == "" else case.path
        assert how is not None
        assert (how.json_path, how.value) == (path, case.value)


def test_a_denial_by_mode_names_the_action() -> None:
    """A denial by file mode names the attempted action."""
    closed = [kernel("openat", "/data/out/x", EACCES, write=True), kernel("chmod", "/etc/x", EPERM, write=True)]
    assert [denial.action for denial in denials(closed, policy({}), AREAS, START)] == ["write", "chmod"]


def test_advice_is_quoted_for_a_shell() -> None:
    """Names in suggested flags are quoted for a shell."""
    name = "/srv/$(id) 'b'"
    (denial,) = denials([kernel("mkdir", f"{name}/", EROFS, write=True)], policy({}), (), START)
    (hint,) = hints(b"cat: /d/$(id>&2): No such file or directory\n", policy({}), (), START)
    assert denial.how_to_allow is not None
    assert hint.to_write is not None
    assert denial.how_to_allow.value == [name]
    assert shlex.split(denial.how_to_allow.flag or "") == ["--allow-write-root", name]
    assert shlex.split(hint.how.flag or "") == ["--allow-read-root", "/d/$(id>&2)"]
    assert hint.to_write.flag == "--allow-write-root /d"
    (denial,) = denials([kernel("mkdir", "/srv/a\nb/", EROFS, write=True)], policy({}), (), START)
    assert denial.how_to_allow == HowToAllow(json_path="$.fs.write_roots", value=["/srv/a\nb"])
    (denial,) = denials([kernel("mkdir", "/$(id)/../opt/", EROFS, write=True)], policy({}), (), START)
    assert denial.how_to_allow is not None
    assert shlex.split(denial.how_to_allow.flag or "") == ["--allow-write-root", "/$(id)/../opt/FOLDER"]
    (hint,) = hints(b"No such file or directory: '-x/y'\n", policy({}), (), START)
    assert (hint.how.flag, hint.how.value) == ("--allow-read-root ./-x/y", ["-x/y"])


@pytest.mark.parametrize("folder", ["/", "/opt/"])
def test_a_new_system_folder_can_be_a_root(folder: str) -> None:
    """A new folder in a system folder can itself become a write root, and the flag says so."""
    (denial,) = denials([kernel("mkdir", folder, EROFS, write=True)], policy({}), (), START)
    flag = f"--allow-write-root {folder}FOLDER"
    assert denial.how_to_allow == HowToAllow(json_path=None, value=None, flag=flag)


def test_a_missing_path_suggests_a_write_root() -> None:
    """A missing path suggests its folder as a write root too."""
    message = "FileNotFoundError: [Errno 2] No such file or directory: '{}'"
    found = {}
    for path in ("/data/out.txt", "/top.txt", "out/result.txt"):
        (hint,) = hints(message.format(path).encode(), policy({}), (), START)
        found[path] = hint.to_write and hint.to_write.flag
    assert found == {
        "/data/out.txt": "--allow-write-root /data",
        "/top.txt": None,
        "out/result.txt": "--allow-write-root out",
    }
    (hint,) = hints(message.format("/data/x").encode(), policy({"fs.enabled": False}), (), START)
    assert hint.how == HowToAllow(json_path="$.fs.enabled", value=True)
    assert hints(message.format("/data/a;b").encode(), policy({}), (), START) == []


def test_equal_denials_are_merged() -> None:
    """Calls that are the same to the policy form one denial with added counts."""
    (denial,) = denials([seccomp("clone"), seccomp("vfork")], policy({"process.allow_spawn": False}), (), START)
    assert (denial.subject, denial.count) == ("a new process", 4)


def test_a_mount_inside_a_write_root_is_not_advised_as_a_root_again() -> None:
    """Replacing a mount inside a write root names the field and advises nothing."""
    areas = (GuestMount(given=".", at=START, write=True), GuestMount(given="k", at=f"{START}/k", write=True))
    for call, error in (("rename", EBUSY), ("unlink", EACCES)):
        (denial,) = denials([kernel(call, f"{START}/k", error, write=True)], policy({}), areas, START)
        assert (denial.field, denial.action, denial.how_to_allow) == ("fs.write_roots", "replace", None)


def test_project_folders_are_named_relatively() -> None:
    """Folders of a project are suggested by their relative names."""
    project = "/x07/in/project"
    for folder, given in ((f"{project}/", "."), (f"{project}/src/a b/", "src/a b")):
        (denial,) = denials([kernel("openat", folder, EROFS, write=True)], policy({}), (), project)
        assert denial.how_to_allow is not None
        assert denial.how_to_allow.value == [given]
        assert denial.how_to_allow.flag == f"--allow-write-root {shlex.quote(given)}"


@pytest.mark.parametrize(
    ("outcome", "held", "own", "cpu_ms", "flag"),
    [
        ("timeout", {"limits.wall_ms": 2000}, {"limits.wall_ms": 9000}, None, "--timeout 4"),
        ("timeout", {"limits.wall_ms": 2000}, {"limits.wall_ms": 2500}, None, "--timeout 2.5"),
        ("timeout", {"limits.wall_ms": 350_500}, {"limits.wall_ms": 600_000}, None, "--timeout 600"),
        ("oom", {"limits.mem_bytes": 1 << 28}, {"limits.mem_bytes": 1 << 31}, None, "--memory 512M"),
        ("cpu-limit", {"limits.cpu_ms": 5000}, {"limits.cpu_ms": 5000}, 3000, "--cpu-time-limit-seconds 6"),
        ("cpu-limit", {"limits.cpu_ms": 3000}, {"limits.cpu_ms": 3000, "limits.wall_ms": 90_000}, 3000, None),
    ],
)
def test_a_limiting_flag_is_suggested(
    outcome: str, held: dict[str, Any], own: dict[str, Any], cpu_ms: int | None, flag: str | None
) -> None:
    """If a flag set the limit, the advice is that flag."""
    reach = flag_reach(policy(own).limits, policy(held).limits, may_raise=False)
    denial = limit_hit(outcome, policy(held), reach, cpu_ms=cpu_ms)
    assert denial is not None
    assert (denial.how_to_allow and denial.how_to_allow.flag) == flag
    assert flag is None or denial.how_to_allow == HowToAllow(json_path=None, value=None, flag=flag)


@pytest.mark.parametrize(
    ("outcome", "flag", "path", "value"),
    [
        ("timeout", "--timeout 120", "$.limits.wall_ms", 120_000),
        ("cpu-limit", "--cpu-time 120", "$.limits.cpu_ms", 120_000),
        ("oom", "--memory 1G", "$.limits.mem_bytes", 1 << 30),
    ],
)
def test_a_reached_limit_is_a_denial(outcome: str, flag: str, path: str, value: int) -> None:
    """A limit that ended the program is a denial with twice the value, and with a built-in policy names the flag."""
    limits = policy({}).limits
    with_flag = limit_hit(outcome, policy({}), flag_reach(None, limits, may_raise=True))
    for denial, named in ((with_flag, flag), (limit_hit(outcome, policy({})), None)):
        assert denial is not None
        assert denial.how_to_allow == HowToAllow(json_path=path, value=value, flag=named)
    assert limit_hit("failed", policy({})) is None


def test_more_processes_and_open_files_have_flags_too() -> None:
    """Refused processes and descriptors suggest `--procs` and `--fds`."""
    reach = flag_reach(None, policy({}).limits, may_raise=True)
    tasks = more_tasks(policy({"process.max_live": 8}), 8, 1, reach)
    assert tasks.how_to_allow == HowToAllow(json_path="$.process.max_live", value=16, flag="--procs 16")
    (files,) = denials([kernel("openat", "/data/x", EMFILE)], policy({"limits.fds": 256}), (), "/opt/x07", reach)
    assert files.how_to_allow == HowToAllow(json_path="$.limits.fds", value=512, flag="--fds 512")


@pytest.mark.parametrize(("most", "flag"), [(1000, "2000"), (0, "1"), (None, None)])
def test_too_much_output_names_the_flag(most: int | None, flag: str | None) -> None:
    """Exceeding the output limit suggests --max-output-bytes with twice the value."""
    denial = too_much_output("stdout", most)
    assert (denial.field, denial.subject, denial.observed_by) == ("output", "more to stdout", "host")
    assert (denial.how_to_allow and denial.how_to_allow.flag) == (flag and f"--max-output-bytes {flag}")


def test_a_maximal_limit_gets_no_advice() -> None:
    """A limit at its maximum gets no advice."""
    denial = limit_hit("timeout", policy({"limits.wall_ms": 600_000}))
    assert denial is not None
    assert denial.how_to_allow is None
    assert more_tasks(policy({"limits.procs": 1024}), None, 3).how_to_allow is None


@pytest.mark.parametrize(
    ("text", "subject", "flag"),
    [
        ("FileNotFoundError: [Errno 2] No such file or directory: '/srv/a b.csv'", "/srv/a b.csv", "/srv/a b.csv"),
        ("sort: cannot read: '/srv/x': No such file or directory\n", "/srv/x", "/srv/x"),
        ("head: cannot open '/srv/x' for reading: No such file or directory\n", "/srv/x", "/srv/x"),
        ("cat: '/srv/my dir/f.txt': No such file or directory\n", "/srv/my dir/f.txt", "'/srv/my dir/f.txt'"),
        ('cat: "/srv/it\'s": No such file or directory\n', "/srv/it's", "/srv/it"),
        ("/srv/my dir/f.txt: No such file or directory\n", "/srv/my dir/f.txt", "'/srv/my dir/f.txt'"),
        ("what():  filesystem error: cannot open: No such file or directory [in/x]\n", "in/x", "in/x"),
        ("open /srv/x: no such file or directory\n", "/srv/x", "/srv/x"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'a.csv'", "./a.csv", "./a.csv"),
    ],
)
def test_a_missing_path_gives_a_hint(text: str, subject: str, flag: str) -> None:
    """A missing path or module suggests the flag that provides it."""
    (hint,) = hints(text.encode(), policy({}), (), "/opt/x07")
    assert hint.subject == subject
    assert flag in (hint.how.flag or "")


def test_a_local_module_suggests_a_project() -> None:
    """A missing module next to the program suggests running the folder as a project."""
    text = b"ModuleNotFoundError: No module named '%s'\n"
    beside = LocalModules({"helper"}, Adding("x07 init .", "x07 run ."))
    ((own,), (other,)) = (hints(text % name, policy({}), (), START, beside) for name in (b"helper", b"numpy"))
    assert (own.how.command, own.how.next_flag) == ("x07 init .", "x07 run .")
    assert "--include python3-numpy" in (other.how.flag or "")


@pytest.mark.parametrize(
    "message", ["No such file or directory: '{}' -> b'{}'", "No such file or directory [{}] [{}]\n"]
)
def test_two_paths_give_two_hints(message: str) -> None:
    """An error with two paths gives a hint for each."""
    found = hints(message.format("/tmp/a", "/srv/out/b").encode(), policy({}), (), START)  # noqa: S108 - a text
    assert [hint.subject for hint in found] == ["/tmp/a", "/srv/out/b"]  # noqa: S108 - a text
    assert found[1].to_write is not None
    assert found[1].to_write.flag == "--allow-write-root /srv/out"


@pytest.mark.parametrize(
    "message",
    [
        """    print(os.environ["{}"])
          ~~~~~~~~~~^^^^^^^^
  File "<frozen os>", line 717, in __getitem__
KeyError: '{}'
""",
        """  File "/usr/lib/python3.11/os.py", line 680, in __getitem__
    raise KeyError(key) from None
KeyError: '{1}'
""",
        """    os.environb[b"{}"]
  File "<frozen os>", line 717, in __getitem__
KeyError: b'{}'
""",
        "/x07/in/program/it.sh: line 2: {}: unbound variable\n",
        "/x07/in/program/it.sh: 2: {}: parameter not set\n",
        "it.sh: line 3: {}: parameter null or not set\n",
        "it.sh: 3: {}: parameter not set or null\n",
    ],
)
def test_a_missing_variable_gives_a_hint(message: str) -> None:
    """A missing environment variable suggests --env, or the policy field that forbids it."""

    def hint(name: str, ours: tuple[str, ...] = (), **env: object) -> Hint | None:
        values = {f"env.{key}": value for key, value in env.items()}
        found = hints(message.format(name, name).encode(), policy(values), (), START, host_variables=ours)
        assert [(one.subject, one.kind) for one in found] in ([], [(f"the variable {name}", "variable")])
        return found[0] if found else None

    def how(name: str, ours: tuple[str, ...] = (), **env: object) -> HowToAllow:
        found = hint(name, ours, **env)
        assert found is not None
        return found.how

    assert how("TOKEN", ("TOKEN",)) == HowToAllow(json_path="$.env.allow_keys", value=["TOKEN"], flag="--env TOKEN")
    assert how("TOKEN", ("OTHER",)) == HowToAllow(json_path=None, value=None, flag="--env TOKEN=VALUE")
    assert how("TOKEN", allow_keys=["TOKEN"]).flag == "--env TOKEN=VALUE"
    assert how("T", deny_keys=["T", "U"]) == HowToAllow(json_path="$.env.deny_keys", value=["U"])
    assert how("T", enabled=False) == HowToAllow(json_path="$.env.enabled", value=True)
    assert hint("X07_OS_FS") is None
    assert hint("TOKEN", ("TOKEN",), allow_keys=["TOKEN"]) is None


def test_a_missing_dictionary_key_gives_no_hint() -> None:
    """A missing key of the program's own dictionary gives no hint."""
    for where in ('File "it.py", line 2, in __getitem__\n', 'File "<frozen os>", line 717, in get\n', "\n"):
        assert hints(f"  {where}KeyError: 'TOKEN'\n".encode(), policy({}), (), START) == []


def test_a_missing_program_gives_a_hint() -> None:
    """A program missing for Python's subprocess suggests an image with it."""
    raised = """Traceback (most recent call last):
  File "/usr/lib/python3.13/subprocess.py", line 1972, in _execute_child
    raise child_exception_type(errno_num, err_msg, err_filename)
    ~~~~~~~~~~~~~~~~~~~~~~~~~~^^^
FileNotFoundError: [Errno 2] No such file or directory: '{}'
"""
    (first,) = hints(raised.format("ffmpeg").encode(), policy({}), (), START)
    assert (first.subject, first.how.json_path) == ("the program ffmpeg", None)
    assert first.how.flag == "x07 image build --name default --include ffmpeg"
    assert first.to_write is None
    for path in ("/srv/tool", "./tool"):
        (hint,) = hints(raised.format(path).encode(), policy({}), (), START)
        assert hint.subject == path
    other = raised.format("data.txt").replace("subprocess.py", "mine.py")
    assert [hint.subject for hint in hints(other.encode(), policy({}), (), START)] == ["./data.txt"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No such file or directory: '/usr/lib/x'",  # the machine's own
        "No such file or directory: '/opt/x07/made-by-me'",
        "No such file or directory: '/data/missing'",  # a root: missing here, so missing on the host too
        "No such file or directory: '../../etc/shadow'",
        "No such file or directory: '/srv/\x1b[31mred'",
        "/srv/x: Permission denied",
    ],
)
def test_an_unavailable_path_gives_no_hint(text: str) -> None:
    """A missing path that no flag can provide gives no hint."""
    assert hints(text.encode(), policy({}), AREAS, "/opt/x07") == []


@pytest.mark.parametrize(
    ("text", "path", "how"),
    [
        (
            "ImportError: /tmp/a b.so: failed to map segment from shared object",
            "/tmp/a b.so",  # noqa: S108 - the guest's
            ("$.process.allow_exec_prefixes", ["/tmp/"]),  # noqa: S108 - as above
        ),
        (
            "./it: error while loading shared libraries: ./lib/q.so: failed to map segment from shared object\n",
            "/opt/x07/lib/q.so",
            ("$.process.allow_exec_prefixes", ["/opt/x07/"]),
        ),
        (
            "OSError: /data/q.so: failed to map segment from shared object\n",
            "/data/q.so",
            ("$.process.allow_execs", ["/usr/bin/env", "/data/q.so"]),
        ),
    ],
)
def test_an_unloadable_library_gives_a_hint(text: str, path: str, how: tuple[str, object]) -> None:
    """A library that cannot be loaded suggests the policy change that allows it."""
    (hint,) = hints(text.encode(), policy(LISTED), AREAS, START)
    assert (hint.subject, hint.kind) == (f"the library {path}", "library")
    assert (hint.how.json_path, hint.how.value) == how
    (hint,) = hints(text.encode(), policy({"process.allow_exec": False}), AREAS, START)
    assert hint.how == HowToAllow(json_path="$.process.allow_exec", value=True)
    assert hints(b"q.so: failed to map segment from shared object", policy(LISTED), AREAS, START) == []


@pytest.mark.parametrize("path", ["in/.cfg", "/data/.cfg", "/srv/.cfg", ".cfg"])
def test_a_missing_hidden_file_gives_a_hint(path: str) -> None:
    """A missing hidden file suggests fs.deny_hidden = false."""
    text = f"FileNotFoundError: [Errno 2] No such file or directory: '{path}'"
    (hint,) = hints(text.encode(), policy({"fs.deny_hidden": True}), AREAS, START)
    assert hint.subject == (path if "/" in path else f"./{path}")
    assert hint.how == HowToAllow(json_path="$.fs.deny_hidden", value=False)
    inside = path.startswith(("in/", "/data"))
    assert bool(hints(text.encode(), policy({"fs.deny_hidden": False}), AREAS, START)) is not inside


def test_hints_are_few_however_long_the_text() -> None:
    """At most three hints are given."""
    text = "".join(f"cat: /srv/{number % 5}: No such file or directory\n" for number in range(1300))
    assert len(hints(text.encode(), policy({}), (), "/opt/x07")) == 3
    assert hints(b"\xff'/" * 20_000, policy({}), (), "/opt/x07") == []
