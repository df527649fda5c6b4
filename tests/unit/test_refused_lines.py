"""Lines about denials: the most useful first, few, short and safe for a terminal."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from x07_sandbox.cli.messages import denial_lines, for_flags, say_denials
from x07_sandbox.cli.os_runner import OPTIONS
from x07_sandbox.policy.denials import Contact, Denial, Hint, HowToAllow, NetworkUse, Outcome
from x07_sandbox.policy.hints import Adding
from x07_sandbox.sessions.result import Result, draft_result

DEFAULT = "built-in:default"


def denial(subject: str, how: HowToAllow | None = None, *, action: str = "read", count: int = 1) -> Denial:
    """A denial reported by the guest."""
    return Denial(
        field="permissions",
        action=action,
        subject=subject,
        enforced_by="it",
        observed_by="guest",
        count=count,
        how_to_allow=how,
    )


def result(*denials: Denial, outcome: Outcome = "failed", lost: int = 0, hints: tuple[Hint, ...] = ()) -> Result:
    """A run with this outcome."""
    ended = {"reason_code": "exited", "fault": "program", "x07_exit_code": 1, "exit_code": 1, "artifact_from": "build"}
    found = {"denials": list(denials), "denials_lost": lost, "hints": list(hints)}
    return replace(draft_result("1-1-1"), outcome=outcome, **ended, **found)


def test_failed_connections_of_a_failed_run_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that failed prints the first destinations that could not be reached, unless the program gave up itself."""

    def contact(host: str, *, rule: str = "dial:failed", count: int = 1) -> Contact:
        return Contact(host=host, port=5432, transport="tcp", rule=rule, reason="Connection refused", count=count)

    rows = [contact("x.example", rule="dial:given-up"), contact("db.example.org"), contact("2001:db8::1", count=3)]
    failed = replace(result(), net=NetworkUse(failed=[*rows, *(contact(f"h{number}.example") for number in range(4))]))
    say_denials(failed)
    assert capsys.readouterr().err.splitlines() == [
        "x07: connection to db.example.org:5432 failed: connection refused",
        "x07: connection to [2001:db8::1]:5432 failed (3 times): connection refused",
        "x07: connection to h0.example:5432 failed: connection refused",
        "x07: connection to h1.example:5432 failed: connection refused",
        "x07: and 2 more failed connections; --json lists them",
    ]
    assert denial_lines(replace(failed, outcome="ok")) == []


def test_a_successful_run_names_only_what_the_program_may_not_notice() -> None:
    """After success, what was not copied in and denied connections are printed, but nothing that --hide left out."""
    rows = [("hide", "copy"), ("fs.deny_hidden", "copy"), ("net.allow_hosts", "look up"), ("fs.write_roots", "write")]
    denials = [replace(denial(f"n{at}"), field=field, action=action) for at, (field, action) in enumerate(rows)]
    lines = denial_lines(replace(result(*denials), outcome="ok"))
    assert [line.split(". ")[0] for line in lines] == ["denied: copying n1 into the VM", "denied: DNS lookup of n2"]


def test_four_denials_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Four denials are printed, those that something would allow first, and the rest is counted."""
    flag = HowToAllow(json_path="$.fs.write_roots", value=["/data"], flag="--allow-write-root /data")
    line = HowToAllow(json_path="$.limits.fds", value=60)
    say_denials(
        result(*(denial(f"/{name}") for name in "abcd"), denial("/data/", flag), denial("x", line, count=3), lost=7)
    )
    assert capsys.readouterr().err.splitlines() == [
        "x07: denied: reading the folder /data. To allow it, use --allow-write-root /data",
        "x07: denied: reading x (3 times). To allow it, set limits.fds to 60 in the policy.",
        "x07: denied: reading /a. It cannot be allowed.",
        "x07: denied: reading /b. It cannot be allowed.",
        "x07: and up to 9 more denials; --json lists those that were recorded",
    ]


def test_a_template_without_processes_names_one_with_them() -> None:
    """The hint for a shell under built-in:cli names a policy that allows processes."""
    how = HowToAllow(json_path="$.process.allow_spawn", value=True)
    ended = result(replace(denial("a new process", how, action="start"), field="process.allow_spawn"))
    advice = (
        "built-in:cli allows no processes; to allow them, use "
        "--policy built-in:default --allow-read-root . --allow-write-root out"
    )
    assert denial_lines(replace(ended, policy="built-in:cli"))[-1] == advice
    assert not any("allows no processes" in line for line in denial_lines(replace(ended, policy=DEFAULT)))
    assert not any("allows no processes" in line for line in denial_lines(replace(ended, policy="mine.json")))


def test_paths_that_one_flag_allows_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Paths that one flag would allow share one line with their common folder."""
    flag = HowToAllow(json_path="$.fs.write_roots", value=["/p"], flag="--allow-write-root /p")
    other = HowToAllow(json_path="$.fs.write_roots", value=["/q"], flag="--allow-write-root /q")
    many = [denial(f"/p/pkg/{number}/__pycache__/", flag, action="write") for number in range(60)]
    say_denials(result(*many, denial("/q/x", other, action="write"), denial("/p/y", flag)))
    assert capsys.readouterr().err.splitlines() == [
        (
            "x07: denied: writing to 60 paths in /p/pkg/, such as /p/pkg/0/__pycache__/. "
            "To allow it, use --allow-write-root /p"
        ),
        "x07: denied: writing to /q/x. To allow it, use --allow-write-root /q",
        "x07: denied: reading /p/y. To allow it, use --allow-write-root /p",
    ]


@pytest.mark.parametrize(
    ("action", "subject", "value", "expected"),
    [
        ("look up", "a.org", None, "DNS lookup of a.org"),
        ("connect", "a.org:1", None, "a connection to a.org:1"),
        ("write", "/opt/x07/", ".", "writing to . (/opt/x07 in the VM)"),
        ("write", "/opt/x07/a", ".", "writing to . (/opt/x07/a in the VM)"),
        ("write", "/data/a", "/data", "writing to /data/a"),
        ("write", "(openat)", None, "writing to an unknown path (openat)"),
        ("raise", "(prlimit64)", None, "raising a resource limit (prlimit64)"),
        ("chmod", "/a", None, "chmod on /a"),
        ("copy", ".hid", None, "copying .hid into the VM"),
    ],
)
def test_a_denied_action_does_not_read_like_advice(action: str, subject: str, value: str | None, expected: str) -> None:
    """A denied action is a noun phrase, and a write names the host folder that would have to be writable."""
    how = None if value is None else HowToAllow(json_path="$.fs.write_roots", value=[value], flag="--flag")
    (line,) = denial_lines(result(denial(subject, how, action=action, count=2)))
    times = "" if action == "copy" else " (2 times)"  # entries that were left out are no attempts
    assert line.startswith(f"denied: {expected}{times}. ")


def test_a_missing_module_is_added_in_two_steps() -> None:
    """The command that builds the image comes before the flag that uses it, also for a command without that flag."""
    how = Adding("x07 image build --name mine --pip a", "--image mine").how
    assert how.flag == "--image mine, after x07 image build --name mine --pip a"
    ended = result(hints=(Hint(subject="the Python module a", how=how),))
    first = "the Python module a is missing. To add it, run x07 image build --name mine --pip a, then"
    assert denial_lines(ended) == [f"{first} use --image mine"]
    assert denial_lines(for_flags(ended, ["--policy"])) == [f"{first} use x07 run with --image mine"]


def test_equal_advice_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that could neither be executed nor read is one line."""
    programs = [HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{name}"]) for name in "abc"]
    tried = [denial(how.value[0], how, action=action) for how in programs for action in ("execute", "read")]
    say_denials(result(*tried, *(denial("/z", action=action) for action in ("read", "write"))))
    assert [re.split("[.;] ", line)[0] for line in capsys.readouterr().err.splitlines()] == [
        *(f"x07: denied: executing /bin/{name}" for name in "abc"),
        "x07: denied: reading /z",
        "x07: and 1 more denials",
    ]


def test_lines_are_short_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Long lists are shortened to what is added, and control characters are escaped."""
    how = HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{number}" for number in range(100)])
    flags = [HowToAllow(json_path=None, value=None, flag=f"--allow-{name}-root /a") for name in ("read", "write")]
    hint = Hint(subject="the program x\x1b[2J", how=flags[0], to_write=flags[1])
    say_denials(result(denial("/bin/\x1b[2J99", how), hints=(hint,)))
    errors = capsys.readouterr().err
    assert 'set process.allow_execs to [..., "/bin/99"] in the policy.' in errors
    assert r"the program x\x1b[2J is missing. To add it, use --allow-read-root /a" in errors
    assert "\x1b" not in errors
    say_denials(result(hints=(Hint(subject="the library /tmp/a.so", kind="library", how=how),)))
    assert "x07: the library /tmp/a.so cannot be loaded from there. To allow it, set process" in capsys.readouterr().err


def test_a_first_step_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A change that is only a first step is called one."""
    files = HowToAllow(json_path="$.fs.enabled", value=True)
    how = HowToAllow(json_path="$.process.max_live", value=16)
    spawn = replace(denial("a new process", how, action="start"), field="process.allow_spawn")
    say_denials(result(spawn, hints=(Hint(subject="/a", how=files),)))
    assert capsys.readouterr().err.splitlines() == [
        (
            "x07: denied: starting a new process. "
            "To allow it, first set process.max_live to 16 in the policy. The next run then names the next step."
        ),
        (
            "x07: /a is not in the sandbox. "
            "To allow it, first set fs.enabled to true in the policy. The next run then names the next step."
        ),
    ]


def test_the_command_to_write_a_policy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """If the built-in policy must change, the command that writes the template in use is named."""
    line = HowToAllow(json_path="$.limits.fds", value=512)
    flag = HowToAllow(json_path="$.fs.read_roots", value=["/d"], flag="--allow-read-root /d")
    suggested = []
    denials: list[tuple[Denial, Outcome]] = [(denial("in the policy", how), "failed") for how in (line, line, flag)]
    denials.append((denial("link", line, action="change"), "ok"))
    for (tried, outcome), policy in zip(denials, (DEFAULT, "own.json", DEFAULT, DEFAULT), strict=True):
        say_denials(replace(result(tried, outcome=outcome), policy=policy))
        suggested.append('x07 policy init --template default --out "$PWD/policy.json"' in capsys.readouterr().err)
    assert suggested == [True, False, False, True]
    ended = result(denial("x", HowToAllow(json_path="$.fs.deny_hidden", value=False)))
    assert "x07 policy init --template worker --out" in denial_lines(replace(ended, policy="built-in:worker"))[-1]
    assert len(denial_lines(replace(ended, policy=None))) == 1


def test_nothing_is_reported_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Denials that are reported elsewhere are not printed again."""
    say_denials(result(denial("/a"), outcome="ok"))
    say_denials(result(denial("/a", action="plan"), denial("/b", action="change")))
    assert capsys.readouterr().err == ""


def test_os_runner_suggests_only_its_own_flags() -> None:
    """x07-os-runner suggests only flags that it has."""
    root = HowToAllow(json_path="$.fs.write_roots", value=["/d"], flag="--allow-write-root /d")
    reveal = HowToAllow(json_path=None, value=None, flag="--reveal x.pem")
    output = HowToAllow(json_path=None, value=None, flag="--max-output-bytes 4")
    hint = Hint(subject="/m", how=HowToAllow(json_path="$.fs.read_roots", value=["/m"], flag="--allow-read-root /m"))
    found = result(denial("a", root), denial("b", reveal), denial("c", output), lost=1, hints=(hint,))
    assert denial_lines(for_flags(found, frozenset(option.flag for option in OPTIONS)), "x07 run ") == [
        'denied: reading a. To allow it, set fs.write_roots to ["/d"] in the policy.',
        "denied: reading b. To allow it, use x07 run with --reveal x.pem",
        "denied: reading c. To allow it, use --max-output-bytes 4",
        "and up to 1 more denials; x07 run --json lists those that were recorded",
        '/m is not in the sandbox. To allow it, set fs.read_roots to ["/m"] in the policy.',
    ]


@pytest.mark.parametrize(
    ("field", "action", "what"),
    [
        ("limits.cpu_ms", "use", "CPU time"),
        ("limits.wall_ms", "run", "time"),
        ("limits.mem_bytes", "use", "memory"),
        ("limits.procs", "start", "process"),
    ],
)
def test_a_limit_that_was_reached_is_named(field: str, action: str, what: str) -> None:
    """A limit that was reached is named with the value or flag that raises it."""
    tried = replace(denial("more", HowToAllow(json_path=f"$.{field}", value=8000), action=action), field=field)
    advice = f"denied: {what} limit reached. To allow more, "
    assert denial_lines(result(tried)) == [f"{advice}set {field} to 8000 in the policy."]
    flagged = replace(tried, how_to_allow=HowToAllow(json_path=None, value=None, flag="--timeout 9"))
    assert denial_lines(result(flagged)) == [f"{advice}use --timeout 9"]


def test_a_failed_connection_ends_with_its_flag() -> None:
    """A failed connection in a run without network ends with the flag to paste."""
    how = HowToAllow(json_path=None, value=None, flag="--allow-host example.org:443")
    hint = Hint(subject="the connection to example.org:443", kind="network", how=how)
    assert denial_lines(result(hints=(hint,))) == [
        (
            "the connection to example.org:443 failed: this run has no network. To allow it, use "
            "--allow-host example.org:443"
        )
    ]
