"""Promises of `x07 policy check` (also of a connection), `digest` and `schema`: verdicts, exit codes, bad files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from tests.unit.policy_command import as_json, policy
from x07_sandbox.policy.canonical import policy_digest
from x07_sandbox.policy.default import render_policy
from x07_sandbox.policy.schema import render_schema
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

GOOD = render_policy(TEMPLATES["cli"])


def test_good_policies_are_told_to_be_valid(tmp_path: Path) -> None:
    """Valid policies, and templates by their name, make exit code 0 and a line each."""
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
        (b"", "is not JSON"),
        (b"not JSON", "is not JSON"),
        (b'{"limits": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested deeper"),
        (GOOD.replace(b'"procs": 16', b'"procs": 16, "procs": 16'), "$.limits.procs: appears more than once"),
        (
            GOOD.replace(b'"procs": 16', b'"procss": 16'),
            "$.limits.procss: is not a field of the policy; did you mean procs",
        ),
        (GOOD.replace(b'"procs": 16', b'"procs": 1025'), "$.limits.procs: must be from 0 to 1024, not 1025"),
        (GOOD.replace(b'"procs": 16', b'"procs": "16"'), '$.limits.procs: must be an integer, not "16"'),
        (GOOD.replace(b"run-os-policy", b"arch.rr.policy"), "$.schema_version"),
    ],
)
def test_an_invalid_policy_has_an_exit_code_of_its_own(tmp_path: Path, data: bytes, why: str) -> None:
    """What can be read and is no valid policy makes exit code 3 and the reason, with its JSON path and a suggestion."""
    (tmp_path / "p.json").write_bytes(data)
    code, out, err = policy(tmp_path, "check", "p.json")
    assert (code, out) == (3, "")
    assert why in err
    code, found = as_json(tmp_path, "check", "p.json")
    (row,) = found["files"]
    assert (code, found["ok"], row["status"]) == (3, False, "invalid")
    assert why in f"{row['problems'][0]['json_path']}: {row['text']}"
    assert [policy(tmp_path, verb, "p.json")[0] for verb in ("digest", "check")] == [3, 3]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """One call names every problem of every file, each with its place."""
    (tmp_path / "a.json").write_bytes(GOOD.replace(b'"fds": 128', b'"fds": -1').replace(b'"enabled"', b'"enable"'))
    (tmp_path / "b.json").write_bytes(GOOD.replace(b'"wall_ms"', b'"wal_ms"'))
    _, found = as_json(tmp_path, "check", "a.json", "b.json")
    first, second = ([problem["json_path"] for problem in row["problems"]] for row in found["files"])
    assert {"$.limits.fds", "$.fs.enable", "$.net.enable", "$.process.enabled"} <= set(first)
    assert set(second) == {"$.limits.wal_ms", "$.limits.wall_ms"}


@pytest.mark.parametrize("name", ["missing.json", ".", "pipe", "/dev/zero", "large.json", "built-in:nope", "loop"])
def test_what_cannot_be_read_is_told_apart_from_what_is_invalid(tmp_path: Path, name: str) -> None:
    """A missing file, a folder, a pipe, an endless device, 100 MB: exit code 2 at once, also beside an invalid one."""
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
    code, found = as_json(tmp_path, "digest", name)
    assert (code, found["ok"], name in found["error"]["what"]) == (2, False, True)


@pytest.mark.parametrize(
    ("name", "told"), [("worker", "or built-in:worker"), ("", "its name is empty"), ("other", "Name a readable file.")]
)
def test_a_name_that_is_no_files_is_told_with_what_was_meant(tmp_path: Path, name: str, told: str) -> None:
    """The mere name of a template is told with the one that it has here, and an empty name as what it is."""
    code, out, err = policy(tmp_path, "check", name)
    assert (code, out) == (2, "")
    assert told in err


def test_a_digest_is_one_line(tmp_path: Path) -> None:
    """`x07 policy digest` prints the canonical digest; with --json the digest of the bytes too, as a result has it."""
    (tmp_path / "p.json").write_bytes(json.dumps(json.loads(GOOD)).encode())
    digest = policy_digest(TEMPLATES["cli"])
    assert policy(tmp_path, "digest", "p.json") == (0, f"{digest}\n", "")
    _, found = as_json(tmp_path, "digest", "p.json")
    assert found["digest"] == digest
    assert found["file_digest"] == f"sha256:{sha256((tmp_path / 'p.json').read_bytes()).hexdigest()}"


def test_a_file_whose_name_is_no_text_is_checked_as_any_other(tmp_path: Path) -> None:
    """A name that is no UTF-8 is printed as it is."""
    name = os.fsdecode(b"p\xff.json")
    (tmp_path / name).write_bytes(GOOD)
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "policy", "check", name]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"p\xff.json: valid (sandbox.cli.base)\n")


@pytest.mark.parametrize(
    "words", [("check", "--json"), ("explain", "--json"), ("init", "--json", "--template", "cli", "--project")]
)
def test_a_name_that_is_no_text_is_spelt_out_in_a_document(tmp_path: Path, words: tuple[str, ...]) -> None:
    """No document has half a surrogate pair in it, which strict readers of JSON refuse: such a name is spelt out."""
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    (folder / "policy.json").write_bytes(GOOD)
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "policy", *words, str(folder / "policy.json")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True)
    assert b"/f\\\\udcff" in done.stdout
    assert json.dumps(json.loads(done.stdout), ensure_ascii=False).encode()  # raises for half a pair


def test_the_schema_is_printed_as_it_is_published(tmp_path: Path) -> None:
    """`x07 policy schema` prints the bytes of schemas/run-os-policy.schema.json."""
    assert policy(tmp_path, "schema") == (0, render_schema().decode(), "")


def test_wrong_words_are_one_json_object_too(tmp_path: Path) -> None:
    """With --json a usage error is one JSON object, exit code 2."""
    code, found = as_json(tmp_path, "check")
    assert (code, found["error"]["what"]) == (2, "wrong usage")


WITH_HOST = render_policy(TEMPLATES["http-client"]).replace(
    b'"allow_hosts": []', b'"allow_hosts": [{"host": "*.Example.org", "ports": [443]}]'
)


def test_a_connection_can_be_asked_about(tmp_path: Path) -> None:
    """`x07 policy check --host` names the rule that would allow a connection, exit 0."""
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


def test_a_denied_connection_says_what_would_allow_it(tmp_path: Path) -> None:
    """`x07 policy check --host` ends with 1 for a denied connection, and names what allows it, if anything does."""
    code, out, err = policy(tmp_path, "check", "--host", "example.org:443")
    assert (code, err) == (1, "")
    assert 'add {"host": "example.org", "ports": [443]} to net.allow_hosts in the policy' in out
    assert "--allow-host example.org:443" in out
    code, out, _ = policy(tmp_path, "check", "--host", "10.0.0.5:22", "--udp", "built-in:cli")
    assert (code, out.splitlines()[1:]) == (
        1,
        [
            "  rule deny-floor:private: 10.0.0.5 is a private address",
            "  no change to the policy allows it",
        ],
    )
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
def test_a_connection_can_be_asked_about_with_a_denial(tmp_path: Path, denied: str, rule: str) -> None:
    """`x07 policy check --host` with --deny-host decides as a run with that flag does."""
    (tmp_path / "p.json").write_bytes(WITH_HOST)
    code, found = as_json(tmp_path, "check", "--host", "a.example.org:443", "--deny-host", denied, "p.json")
    assert (code, found["rule"]) == (0 if rule.startswith("net.") else 1, rule)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--deny-host", "a.org:*", "built-in:cli"), 2, "--deny-host requires --host"),
        (("--host", "a.org:1", "--deny-host", "a.org"), 2, "cannot use --deny-host 'a.org'"),
        (("--host", "127.1:80"), 2, "looks like an address"),
        (("--host", "example.org"), 2, "a port from 1 to 65535"),
        (("--host", "a.org:1", "a.json", "b.json"), 2, "--host accepts one policy"),
        (("--udp", "built-in:cli"), 2, "--udp requires --host"),
        (("--host", "a.org:1", "missing.json"), 2, "missing.json"),
        (("--host", "a.org:1", "bad.json"), 3, "$.net.allow_hosts[0]: host *.org: '*' must be"),
    ],
)
def test_a_wrong_question_about_a_connection_is_told(
    tmp_path: Path, words: tuple[str, ...], code: int, why: str
) -> None:
    """A bad host, port or number of policies is wrong usage, and a policy whose hosts mean nothing is invalid."""
    (tmp_path / "bad.json").write_bytes(WITH_HOST.replace(b"*.Example.org", b"*.org"))
    found = policy(tmp_path, "check", *words)
    assert (found[0], found[1], why in found[2]) == (code, "", True)


def test_a_host_that_means_nothing_is_invalid(tmp_path: Path) -> None:
    """`x07 policy check` says of a host that no run could use that the policy is invalid, and why."""
    document = json.loads(WITH_HOST)
    document["net"]["allow_hosts"][0]["host"] = "*.com"
    (tmp_path / "p.json").write_text(json.dumps(document), encoding="utf-8")
    code, out, err = policy(tmp_path, "check", "p.json")
    assert code == 3
    assert "$.net.allow_hosts[0]" in out + err
