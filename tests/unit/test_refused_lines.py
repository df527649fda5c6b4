"""Promises of the lines about refusals: the first few, what can be allowed first, short, harmless to a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.cli.os_runner_options import OPTIONS
from x07_sandbox.cli.refused import for_flags, lines, tell
from x07_sandbox.plan.denials import Denial, Hint, HowToAllow
from x07_sandbox.runs.result import NOTHING, Digests, Result

if TYPE_CHECKING:
    import pytest

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


def result(*denials: Denial, outcome: str = "failed", lost: int = 0, hints: tuple[Hint, ...] = ()) -> Result:
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
        stdout=NOTHING,
        stderr=NOTHING,
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
    tell(result(*(denial(f"/{name}") for name in "abcd"), denial("/data/", flag), denial("x", line, count=3), lost=7))
    assert capsys.readouterr().err.splitlines() == [
        "x07: refused: read /data/; --allow-write-root /data lets it",
        "x07: refused: read x (3 times); $.limits.fds = 60 in the policy lets it",
        "x07: refused: read /a; nothing allows it",
        "x07: refused: read /b; nothing allows it",
        "x07: and up to 9 more things were refused; --json lists them, or as many as were seen",
    ]


def test_paths_that_one_flag_allows_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of sixty folders of one read root that could not be written, one line has the folder that they lie in."""
    flag = HowToAllow(json_path="$.fs.write_roots", value=["/p"], flag="--allow-write-root /p")
    other = HowToAllow(json_path="$.fs.write_roots", value=["/q"], flag="--allow-write-root /q")
    many = [denial(f"/p/pkg/{number}/__pycache__/", flag, action="write") for number in range(60)]
    tell(result(*many, denial("/q/x", other, action="write"), denial("/p/y", flag)))
    assert capsys.readouterr().err.splitlines() == [
        "x07: refused: write /p/pkg/ (60 places in it, such as /p/pkg/0/__pycache__/); --allow-write-root /p lets it",
        "x07: refused: write /q/x; --allow-write-root /q lets it",
        "x07: refused: read /p/y; --allow-write-root /p lets it",
    ]


def test_what_one_change_allows_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that a shell could neither execute nor read is one line; what nothing allows stands there as it was."""
    programs = [HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{name}"]) for name in "abc"]
    tried = [denial(how.value[0], how, action=action) for how in programs for action in ("execute", "read")]
    tell(result(*tried, *(denial("/z", action=action) for action in ("read", "write"))))
    assert [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        *(f"x07: refused: execute /bin/{name}" for name in "abc"),
        "x07: refused: read /z",
        "x07: and 1 more things were refused",
    ]


def test_lines_are_short_and_act_on_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a long list only what is added is shown; names and hints come without control characters."""
    how = HowToAllow(json_path="$.process.allow_execs", value=[f"/bin/{number}" for number in range(100)])
    flags = [HowToAllow(json_path=None, value=None, flag=f"--allow-{name}-root /a") for name in ("read", "write")]
    hint = Hint(subject="/a\x1b[2J", how=flags[0], to_write=flags[1])
    tell(result(denial("/bin/\x1b[2J99", how), hints=(hint,)))
    said = capsys.readouterr().err
    assert '$.process.allow_execs = [..., "/bin/99"] in the policy lets it' in said
    assert "is not in the sandbox; --allow-read-root /a lets it (to write: --allow-write-root /a)" in said
    assert "\x1b" not in said
    tell(result(hints=(Hint(subject="the library /tmp/a.so", kind="library", how=how),)))
    assert "x07: the library /tmp/a.so cannot be loaded from where it lies; $.process" in capsys.readouterr().err


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
    tell(result(spawn, hints=(Hint(subject="/a", how=files),)))
    assert capsys.readouterr().err.splitlines() == [
        "x07: refused: start a new process; $.process.max_live = 16 in the policy comes first",
        "x07: /a is not in the sandbox; $.fs.enabled = true in the policy comes first",
    ]


def test_who_has_no_policy_yet_is_told_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the built-in policy is to be changed, also for changes, what writes it is named; a flag needs none."""
    line = HowToAllow(json_path="$.limits.fds", value=512)
    flag = HowToAllow(json_path="$.fs.read_roots", value=["/d"], flag="--allow-read-root /d")
    said = []
    denials = [(denial("in the policy", how), "failed") for how in (line, line, flag)]
    denials.append((denial("link", line, action="change"), "ok"))
    for (tried, outcome), policy in zip(denials, (DEFAULT, "own.json", DEFAULT, DEFAULT), strict=True):
        tell(replace(result(tried, outcome=outcome), policy=policy))
        said.append('x07 policy init --template default --out "$PWD/policy.json"' in capsys.readouterr().err)
    assert said == [True, False, False, True]


def test_the_template_in_use_is_the_one_to_begin_with() -> None:
    """Who names another built-in policy is told of that one; where there is no policy, of none."""
    tried = result(denial("x", HowToAllow(json_path="$.fs.deny_hidden", value=False)))
    assert "x07 policy init --template worker --out" in lines(replace(tried, policy="built-in:worker"))[-1]
    assert len(lines(replace(tried, policy=None))) == 1


def test_what_others_say_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of a program that ended well, of a plan that was refused, or of changes that were kept back."""
    tell(result(denial("/a"), outcome="ok"))
    tell(result(denial("/a", action="plan"), denial("/b", action="change")))
    assert capsys.readouterr().err == ""


def test_another_command_is_told_what_it_can_do() -> None:
    """What x07-os-runner says names no flag that it lacks: the policy's field instead, else that x07 run has it."""
    root = HowToAllow(json_path="$.fs.write_roots", value=["/d"], flag="--allow-write-root /d")
    reveal = HowToAllow(json_path=None, value=None, flag="--reveal x.pem")
    output = HowToAllow(json_path=None, value=None, flag="--max-output-bytes 4")
    hint = Hint(subject="/m", how=HowToAllow(json_path="$.fs.read_roots", value=["/m"], flag="--allow-read-root /m"))
    found = result(denial("a", root), denial("b", reveal), denial("c", output), lost=1, hints=(hint,))
    assert lines(for_flags(found, frozenset(option.flag for option in OPTIONS)), "x07 run ") == [
        'refused: read a; $.fs.write_roots = ["/d"] in the policy lets it',
        "refused: read b; x07 run with --reveal x.pem lets it",
        "refused: read c; --max-output-bytes 4 lets it",
        "and up to 1 more things were refused; x07 run --json lists them, or as many as were seen",
        '/m is not in the sandbox; $.fs.read_roots = ["/m"] in the policy lets it',
    ]
