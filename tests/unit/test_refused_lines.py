"""Promises of the lines about refusals: the first few, what can be allowed first, short, harmless to a terminal."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from x07_sandbox.cli.denials_text import denial_lines, for_flags, say_denials
from x07_sandbox.cli.os_runner_options import OPTIONS
from x07_sandbox.plan.denials import Denial, Hint, HowToAllow
from x07_sandbox.runs.result import EMPTY_OUTPUT, Digests, Outcome, Result

DEFAULT = "built-in:default"


def denial(subject: str, how: HowToAllow | None = None, *, action: str = "read", count: int = 1) -> Denial:
    """One of the guest's."""
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
    """A run that ended so."""
    return Result(
        run="1-1-1",
        outcome=outcome,
        fault="program",
        reason="",
        x07_exit_code=1,
        exit_code=1,
        signal=None,
        isolation=None,
        backend=None,
        jail=None,
        artifact_from="build",
        build=None,
        stdout=EMPTY_OUTPUT,
        stderr=EMPTY_OUTPUT,
        phases={},
        digests=Digests(),
        controls=[],
        denials=list(denials),
        denials_lost=lost,
        hints=list(hints),
        warnings=[],
    )


def test_the_first_few_are_told_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Four lines, those that something would allow first, and one line about all others."""
    flag = HowToAllow(json_path="$.fs.write_roots", value=["/data"], flag="--allow-write-root /data")
    line = HowToAllow(json_path="$.limits.fds", value=60)
    say_denials(
        result(*(denial(f"/{name}") for name in "abcd"), denial("/data/", flag), denial("x", line, count=3), lost=7)
    )
    assert capsys.readouterr().err.splitlines() == [
        "x07: denied: read /data/. To allow it, use --allow-write-root /data",
        "x07: denied: read x (3 times). To allow it, set limits.fds to 60 in the policy.",
        "x07: denied: read /a. It cannot be allowed.",
        "x07: denied: read /b. It cannot be allowed.",
        "x07: and up to 9 more denials; --json lists those that were recorded",
    ]


def test_a_template_without_processes_names_one_with_them() -> None:
    """A shell that could start nothing under built-in:cli is told which policy lets it, with the same folders."""
    how = HowToAllow(json_path="$.process.allow_spawn", value=True)
    ended = result(replace(denial("a new process", how, action="start"), field="process.allow_spawn"))
    advice = (
        "built-in:cli allows no processes; to allow them: "
        "--policy built-in:default --allow-read-root . --allow-write-root out"
    )
    assert denial_lines(replace(ended, policy="built-in:cli"))[-1] == advice
    assert not any("allows no processes" in line for line in denial_lines(replace(ended, policy=DEFAULT)))
    assert not any("allows no processes" in line for line in denial_lines(replace(ended, policy="mine.json")))


def test_paths_that_one_flag_allows_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of sixty folders of one read root that could not be written, one line has the folder that they lie in."""
    flag = HowToAllow(json_path="$.fs.write_roots", value=["/p"], flag="--allow-write-root /p")
    other = HowToAllow(json_path="$.fs.write_roots", value=["/q"], flag="--allow-write-root /q")
    many = [denial(f"/p/pkg/{number}/__pycache__/", flag, action="write") for number in range(60)]
    say_denials(result(*many, denial("/q/x", other, action="write"), denial("/p/y", flag)))
    assert capsys.readouterr().err.splitlines() == [
        (
            "x07: denied: write /p/pkg/ (60 paths in it, such as /p/pkg/0/__pycache__/). "
            "To allow it, use --allow-write-root /p"
        ),
        "x07: denied: write /q/x. To allow it, use --allow-write-root /q",
        "x07: denied: read /p/y. To allow it, use --allow-write-root /p",
    ]


def test_what_one_change_allows_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that a shell could neither execute nor read is one line; what nothing allows stands there as it was."""
    programs = [HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{name}"]) for name in "abc"]
    tried = [denial(how.value[0], how, action=action) for how in programs for action in ("execute", "read")]
    say_denials(result(*tried, *(denial("/z", action=action) for action in ("read", "write"))))
    assert [re.split("[.;] ", line)[0] for line in capsys.readouterr().err.splitlines()] == [
        *(f"x07: denied: execute /bin/{name}" for name in "abc"),
        "x07: denied: read /z",
        "x07: and 1 more denials",
    ]


def test_lines_are_short_and_act_on_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a long list only what is added is shown; names and hints come without control characters."""
    how = HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{number}" for number in range(100)])
    flags = [HowToAllow(json_path=None, value=None, flag=f"--allow-{name}-root /a") for name in ("read", "write")]
    hint = Hint(subject="the program x\x1b[2J", how=flags[0], to_write=flags[1])
    say_denials(result(denial("/bin/\x1b[2J99", how), hints=(hint,)))
    said = capsys.readouterr().err
    assert 'set process.allow_execs to [..., "/bin/99"] in the policy.' in said
    assert r"the program x\x1b[2J is missing. To add it, use --allow-read-root /a" in said
    assert "\x1b" not in said
    say_denials(result(hints=(Hint(subject="the library /tmp/a.so", kind="library", how=how),)))
    assert "x07: the library /tmp/a.so cannot be loaded from there. To allow it, set process" in capsys.readouterr().err


def test_what_has_to_come_first_is_not_said_to_let_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A value of another field than the one that refused it is called what it is: a first step."""
    files = HowToAllow(json_path="$.fs.enabled", value=True)
    spawn = Denial(
        field="process.allow_spawn",
        action="start",
        subject="a new process",
        enforced_by="it",
        observed_by="guest",
        count=1,
        how_to_allow=HowToAllow(json_path="$.process.max_live", value=16),
    )
    say_denials(result(spawn, hints=(Hint(subject="/a", how=files),)))
    assert capsys.readouterr().err.splitlines() == [
        "x07: denied: start a new process. First set process.max_live to 16 in the policy, then process.allow_spawn.",
        "x07: /a is not in the sandbox. First set fs.enabled to true in the policy, then fs.read_roots.",
    ]


def test_who_has_no_policy_yet_is_told_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the built-in policy is to be changed, also for changes, what writes it is named; a flag needs none."""
    line = HowToAllow(json_path="$.limits.fds", value=512)
    flag = HowToAllow(json_path="$.fs.read_roots", value=["/d"], flag="--allow-read-root /d")
    said = []
    denials: list[tuple[Denial, Outcome]] = [(denial("in the policy", how), "failed") for how in (line, line, flag)]
    denials.append((denial("link", line, action="change"), "ok"))
    for (tried, outcome), policy in zip(denials, (DEFAULT, "own.json", DEFAULT, DEFAULT), strict=True):
        say_denials(replace(result(tried, outcome=outcome), policy=policy))
        said.append('x07 policy init --template default --out "$PWD/policy.json"' in capsys.readouterr().err)
    assert said == [True, False, False, True]


def test_the_template_in_use_is_the_one_to_begin_with() -> None:
    """Who names another built-in policy is told of that one; where there is no policy, of none."""
    tried = result(denial("x", HowToAllow(json_path="$.fs.deny_hidden", value=False)))
    assert "x07 policy init --template worker --out" in denial_lines(replace(tried, policy="built-in:worker"))[-1]
    assert len(denial_lines(replace(tried, policy=None))) == 1


def test_what_others_say_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of a program that ended well, of a plan that was refused, or of changes that were kept back."""
    say_denials(result(denial("/a"), outcome="ok"))
    say_denials(result(denial("/a", action="plan"), denial("/b", action="change")))
    assert capsys.readouterr().err == ""


def test_another_command_is_told_what_it_can_do() -> None:
    """What x07-os-runner says names no flag that it lacks: the policy's field instead, else that x07 run has it."""
    root = HowToAllow(json_path="$.fs.write_roots", value=["/d"], flag="--allow-write-root /d")
    reveal = HowToAllow(json_path=None, value=None, flag="--reveal x.pem")
    output = HowToAllow(json_path=None, value=None, flag="--max-output-bytes 4")
    hint = Hint(subject="/m", how=HowToAllow(json_path="$.fs.read_roots", value=["/m"], flag="--allow-read-root /m"))
    found = result(denial("a", root), denial("b", reveal), denial("c", output), lost=1, hints=(hint,))
    assert denial_lines(for_flags(found, frozenset(option.flag for option in OPTIONS)), "x07 run ") == [
        'denied: read a. To allow it, set fs.write_roots to ["/d"] in the policy.',
        "denied: read b. To allow it, use x07 run with --reveal x.pem",
        "denied: read c. To allow it, use --max-output-bytes 4",
        "and up to 1 more denials; x07 run --json lists those that were recorded",
        '/m is not in the sandbox. To allow it, set fs.read_roots to ["/m"] in the policy.',
    ]


@pytest.mark.parametrize(
    ("field", "action", "value", "said"),
    [
        (
            "limits.cpu_ms",
            "use",
            8000,
            "CPU time limit reached. To allow more, set limits.cpu_ms to 8000 in the policy.",
        ),
        ("limits.wall_ms", "run", 9000, "time limit reached. To allow more, set limits.wall_ms to 9000 in the policy."),
        (
            "limits.mem_bytes",
            "use",
            64,
            "memory limit reached. To allow more, set limits.mem_bytes to 64 in the policy.",
        ),
        ("limits.procs", "start", 8, "process limit reached. To allow more, set limits.procs to 8 in the policy."),
    ],
)
def test_a_limit_that_was_reached_is_named(field: str, action: str, value: int, said: str) -> None:
    """The limit, and what raises it: the policy's value, or the flag where there is one."""
    tried = replace(denial("more", HowToAllow(json_path=f"$.{field}", value=value), action=action), field=field)
    assert denial_lines(result(tried)) == [f"denied: {said}"]
    flagged = replace(tried, how_to_allow=HowToAllow(json_path=None, value=None, flag="--timeout 9"))
    assert denial_lines(result(flagged)) == [f"denied: {said.partition('set limits')[0]}use --timeout 9"]


def test_a_failed_connection_is_told_with_its_flag() -> None:
    """A run without network says so, and the flag stands last, to be copied."""
    how = HowToAllow(json_path=None, value=None, flag="--allow-host example.org:443")
    hint = Hint(subject="the connection to example.org:443", kind="network", how=how)
    assert denial_lines(result(hints=(hint,))) == [
        (
            "the connection to example.org:443 failed: this run has no network. To allow it, use "
            "--allow-host example.org:443"
        )
    ]
