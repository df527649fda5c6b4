"""`x07 policy check` and `schema`: verdicts, exit codes and unreadable files."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from tests.unit.policy_command import as_json, policy
from x07_sandbox.host.paths import settings_file
from x07_sandbox.policy.decode import policy_digest, render_policy
from x07_sandbox.policy.schema import render_schema
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

GOOD = render_policy(TEMPLATES["cli"])


def test_valid_policies_are_reported(tmp_path: Path) -> None:
    """`x07 policy check` reports valid policies and templates with one line each and exit code 0."""
    (tmp_path / "p.json").write_bytes(GOOD)
    assert policy(tmp_path, "check", "p.json", "built-in:default") == (
        0,
        "p.json: valid (sandbox.cli.base)\nbuilt-in:default: valid (sandbox.default.base)\n",
        "",
    )
    code, found = as_json(tmp_path, "check", "p.json")
    assert (code, found["ok"]) == (0, True)
    assert found["files"] == [
        {
            "file": "p.json",
            "status": "valid",
            "policy_id": "sandbox.cli.base",
            "digest": policy_digest(TEMPLATES["cli"]),
        }
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not valid JSON"),
        (
            GOOD.replace(b'"procs": 16', b'"procss": 16'),
            "$.limits.procss: is not a field of the policy; did you mean procs",
        ),
        (GOOD.replace(b'"procs": 16', b'"procs": 1025'), "$.limits.procs must be from 0 to 1024, not 1025"),
    ],
)
def test_an_invalid_policy_has_an_exit_code_of_its_own(tmp_path: Path, data: bytes, why: str) -> None:
    """An invalid policy ends with exit code 3 and its reasons, with JSON path and suggestion."""
    (tmp_path / "p.json").write_bytes(data)
    code, out, err = policy(tmp_path, "check", "p.json")
    assert (code, out) == (3, "")
    assert why in err
    code, found = as_json(tmp_path, "check", "p.json")
    (row,) = found["files"]
    assert (code, found["ok"], row["status"]) == (3, False, "invalid")
    assert why in f"{row['problems'][0]['json_path']}: {row['text']}"
    assert policy(tmp_path, "explain", "p.json")[0] == 3


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """`x07 policy check` reports every problem of every file at once."""
    (tmp_path / "a.json").write_bytes(GOOD.replace(b'"fds": 128', b'"fds": -1').replace(b'"enabled"', b'"enable"'))
    (tmp_path / "b.json").write_bytes(GOOD.replace(b'"wall_ms"', b'"wal_ms"'))
    _, found = as_json(tmp_path, "check", "a.json", "b.json")
    first, second = ([problem["json_path"] for problem in row["problems"]] for row in found["files"])
    assert {"$.limits.fds", "$.fs.enable", "$.net.enable", "$.process.enabled"} <= set(first)
    assert set(second) == {"$.limits.wal_ms", "$.limits.wall_ms"}


@pytest.mark.parametrize("name", ["missing.json", ".", "pipe", "/dev/zero", "large.json", "built-in:nope", "loop"])
def test_unreadable_and_invalid_policies_differ(tmp_path: Path, name: str) -> None:
    """An unreadable policy ends with exit code 2, even next to an invalid one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bad.json").write_bytes(b"{}")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(100_000_000)
    code, out, err = policy(tmp_path, "check", name)
    assert (code, out) == (2, "")
    assert name in err
    code, found = as_json(tmp_path, "check", "bad.json", name)
    assert (code, [row["status"] for row in found["files"]]) == (2, ["invalid", "unreadable"])
    code, found = as_json(tmp_path, "explain", name)
    assert (code, found["ok"], name in found["error"]["what"]) == (2, False, True)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("worker", "or built-in:worker"), ("", "the path is empty"), ("other", "Use a readable file.")],
)
def test_a_template_name_gets_a_suggestion(tmp_path: Path, name: str, suggestion: str) -> None:
    """A bare template name or an empty file name is an error with a suggestion."""
    code, out, err = policy(tmp_path, "check", name)
    assert (code, out) == (2, "")
    assert suggestion in err


def test_a_file_with_a_non_utf8_name_is_checked(tmp_path: Path) -> None:
    """A policy file whose name is not UTF-8 can be checked; the name is printed escaped."""
    name = os.fsdecode(b"p\xff.json")
    (tmp_path / name).write_bytes(GOOD)
    argv = [*X07, "policy", "check", name]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"p\\xff.json: valid (sandbox.cli.base)\n")


@pytest.mark.parametrize(
    "words", [("check", "--json"), ("explain", "--json"), ("init", "--json", "--template", "cli", "--project")]
)
def test_documents_escape_non_utf8_names(tmp_path: Path, words: tuple[str, ...]) -> None:
    """JSON documents contain no lone surrogates; such file names are escaped."""
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    (folder / "policy.json").write_bytes(GOOD)
    argv = [*X07, "policy", *words, str(folder / "policy.json")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True)
    assert b"/f\\\\xff" in done.stdout
    assert json.dumps(json.loads(done.stdout), ensure_ascii=False).encode()  # raises for half a pair


def test_the_schema_is_printed_as_it_is_published(tmp_path: Path) -> None:
    """`x07 policy schema` prints the published schema."""
    assert policy(tmp_path, "schema") == (0, render_schema().decode(), "")


WITH_HOST = render_policy(TEMPLATES["http-client"]).replace(
    b'"allow_hosts": []', b'"allow_hosts": [{"host": "*.Example.org", "ports": [443]}]'
)


def test_check_host_names_the_allowing_rule(tmp_path: Path) -> None:
    """`x07 policy check --host` names the rule that allows a connection."""
    (tmp_path / "p.json").write_bytes(WITH_HOST)
    code, out, err = policy(tmp_path, "check", "--host", "A.example.org.:443", "p.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "a.example.org:443 (tcp): allowed",
        "  rule net.allow_hosts[0]: *.example.org is listed with port 443",
        "  its addresses are checked at run time; special ones, such as private ones, are denied",
    ]
    code, found = as_json(tmp_path, "check", "--host", "a.example.org:443", "p.json")
    assert (code, found["allowed"], found["rule"], found["resolved_later"]) == (0, True, "net.allow_hosts[0]", True)
    assert found["how_to_allow"] is None


def test_check_host_says_what_would_allow_it(tmp_path: Path) -> None:
    """`x07 policy check --host` ends with 1 for a denied connection and says what would allow it."""
    code, out, err = policy(tmp_path, "check", "--host", "example.org:443")
    assert (code, err) == (1, "")
    assert 'add {"host": "example.org", "ports": [443]} to net.allow_hosts in the policy' in out
    assert "--allow-host example.org:443" in out
    code, out, _ = policy(tmp_path, "check", "--host", "10.0.0.5:22", "--udp", "built-in:cli")
    assert (code, out.splitlines()[1:]) == (
        1,
        [
            "  rule deny-floor:private: 10.0.0.5 is a private address",
            f'  to allow it: set allow_local = ["10.0.0.5:22"] under [net] in {settings_file()}',
            "  and: set net.enabled to true in the policy",
        ],
    )
    line = 'allow_loopback = true and allow_local = ["127.0.0.1:8080"]'
    code, out, _ = policy(tmp_path, "check", "--host", "host.x07:8080")
    assert (code, out.splitlines()[2:]) == (
        1,
        [
            f"  to allow it: set {line} under [net] in {settings_file()}",
            '  and: add {"host": "host.x07", "ports": [8080]} to net.allow_hosts in the policy',
            "  or, for one run: --allow-host host.x07:8080",
        ],
    )
    assert "no change to the policy or the settings allows it" in policy(tmp_path, "check", "--host", "224.0.0.1:1")[1]
    code, found = as_json(tmp_path, "check", "--host", "example.org:53", "--udp")
    assert (code, found["rule"], found["how_to_allow"]["json_path"]) == (1, "net.allow_udp", "$.net.allow_udp")


@pytest.mark.parametrize(
    ("denied", "rule"),
    [
        ("a.example.org:*", "deny-host:a.example.org"),
        ("a.example.org:80,443", "deny-host:a.example.org"),
        ("a.example.org:80", "net.allow_hosts[0]"),
        ("b.example.org:*", "net.allow_hosts[0]"),
    ],
)
def test_check_host_accepts_deny_host(tmp_path: Path, denied: str, rule: str) -> None:
    """`x07 policy check --host` with --deny-host decides as a run does."""
    (tmp_path / "p.json").write_bytes(WITH_HOST)
    code, found = as_json(tmp_path, "check", "--host", "a.example.org:443", "--deny-host", denied, "p.json")
    assert (code, found["rule"]) == (0 if rule.startswith("net.") else 1, rule)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--deny-host", "a.org:*", "built-in:cli"), 2, "--deny-host requires --host"),
        (("--host", "a.org:1", "--deny-host", "a.org"), 2, "cannot use --deny-host 'a.org'"),
        (("--host", "127.1:80"), 2, "looks like an address"),
        (("--host", "example.org"), 2, "the port is"),
        (("--host", "a.org:1", "a.json", "b.json"), 2, "--host accepts one policy"),
        (("--udp", "built-in:cli"), 2, "--udp requires --host"),
        (("--host", "a.org:1", "missing.json"), 2, "missing.json"),
        (("--host", "a.org:1", "bad.json"), 3, "$.net.allow_hosts[0] has the invalid host *.org ('*' must be"),
    ],
)
def test_invalid_arguments_of_check_host_are_reported(
    tmp_path: Path, words: tuple[str, ...], code: int, why: str
) -> None:
    """An invalid host, port or policy of `x07 policy check --host` is an error."""
    (tmp_path / "bad.json").write_bytes(WITH_HOST.replace(b"*.Example.org", b"*.org"))
    found = policy(tmp_path, "check", *words)
    assert (found[0], found[1], why in found[2]) == (code, "", True)
