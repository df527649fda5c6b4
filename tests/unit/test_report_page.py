"""The page about a result: what it shows, that hostile text stays text, and `x07 report`."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.browser import missing, running
from tests.command import X07, x07
from x07_sandbox import Ended
from x07_sandbox.policy.denials import Contact, Control, Denial, Hint, HowToAllow, NetworkUse
from x07_sandbox.policy.model import Limits
from x07_sandbox.sessions.html import PATCH_MAX, fragment, page, visible
from x07_sandbox.sessions.result import (
    BuildOutput,
    ChangedName,
    Changes,
    CommandReport,
    Digests,
    LeftOutEntry,
    Output,
    PhaseReport,
    Result,
    Scaling,
    draft_result,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Need

RUN: Final = "1764273600000-4711-0"
HOSTILE: Final = (
    "</pre></title></style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href='https://evil.example/'>x</a>\"' onmouseover='document.title=1' \x00\x1b[31m\u202egnp\u202c\ud800&amp;"
    "<style>*{width:5000px}</style><svg onload=document.title='owned'>" + "w" * 3000
)
PATCH: Final = (
    "# in /work\ndiff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n-old\n--- no header\n+new\n same\n"
)
_TAGS: Final = (
    "html head meta title style body div header section h1 h2 h3 p small span bdi i code pre strong table thead tbody "
    "tr th td svg rect details summary"
)
_ATTRIBUTES: Final = "lang charset http-equiv content name class data-of role aria-hidden x width height"
_HOW: Final = HowToAllow(
    json_path="$.net.allow_hosts", value=["a.example:443"], flag="--allow-host a", setting="allow_local = [1]"
)


def _output(text: str) -> Output:
    return Output(bytes=len(text), truncated=True, text=text, undelivered="the disk is full")


def _phase(**times: float) -> PhaseReport:
    return PhaseReport(
        job_id=f"{RUN}-run",
        start="hot",
        outcome="ok",
        reason_code="exited",
        reason="the program exited with status 0",
        times_ms=times,
        stdout=_output("x"),
        stderr=_output("x"),
        cpu_ms=70_000,
        memory_peak_bytes=1 << 28,
        tasks_peak=3,
    )


def full_result() -> Result:
    """Return a result in which every field has a value."""
    contact = Contact(host="a.example", port=443, transport="tcp", rule="net.allow_hosts[0]", reason="r", address="::1")
    denial = Denial(
        field="net.allow_hosts",
        action="connect",
        subject="a.example:443",
        enforced_by="egress gate",
        observed_by="host",
        count=2,
        how_to_allow=_HOW,
        reason="it is not listed",
    )
    command = CommandReport(
        id=1,
        name="make",
        argv_sha256="sha256:ab",
        outcome="ok",
        exit_code=0,
        signal=None,
        began_ms=5,
        wall_ms=20,
        cpu_ms=9,
    )
    return msgspec.structs.replace(
        draft_result(RUN),
        outcome="ok",
        fault="none",
        reason="the program exited with status 0",
        exit_code=0,
        isolation="vm-emulated",
        backend="qemu",
        phases={"build": _phase(seeded=90, started=200, exited=300, end=310), "run": _phase(hello=40, end=100)},
        stdout=_output("printed\n"),
        stderr=Output(bytes=3, truncated=False, base64=base64.b64encode(b"\xff\x00a").decode()),
        build=BuildOutput(stdout=_output("b"), stderr=_output("b")),
        policy="built-in:default",
        digests=Digests(image="sha256:1", policy="sha256:2"),
        controls=[Control(field="limits.wall_ms", state="enforced", by="the host", why="it kills the VM")],
        denials=[denial, msgspec.structs.replace(denial, how_to_allow=None)],
        denials_lost=4,
        hints=[Hint(subject="the program jq", how=_HOW), Hint(subject="/x", kind="elsewhere", how=_HOW, in_vm="/y")],
        changes=Changes(
            state="applied",
            added=1,
            left_out=1,
            names=(ChangedName(root="/work", name="a.py", action="changed"),),
            left_out_entries=(LeftOutEntry(name="Makefile", rules=("protected",), entries=1, take="--allow-x"),),
        ),
        input_problem="the pipe broke",
        filters={"base": "sha256:3"},
        net=NetworkUse(allowed=[contact], denied=[contact], failed=[contact], more=3),
        scaling=Scaling(factor=12, wall_ms=1, cpu_ms=1),
        limits=Limits(cpu_ms=60_000, wall_ms=60_000, mem_bytes=1 << 29, fds=64, procs=8, core_dumps=False),
        commands=(command, msgspec.structs.replace(command, id=2, outcome="timeout", exit_code=None, signal=9)),
        warnings=["emulated"],
    )


def _poisoned(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a document in which every text is hostile, except what decides how the document is read."""
    kept = {"run", "outcome", "fault", "state", "kind", "base64", "action", "text"}
    if isinstance(value, dict):
        return {
            key: _poisoned(one) if key not in kept or not isinstance(one, str) else one for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_poisoned(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


def hostile_page() -> str:
    """Return a page in which every name and text is hostile."""
    document = _poisoned(full_result().document())
    for name in ("stdout", "stderr"):
        document[name] |= {"text": HOSTILE, "base64": None}
    document["denials"][0]["action"] = HOSTILE
    patch = PATCH.replace("a.py", HOSTILE.replace("\n", "")).encode("utf-8", "surrogatepass")
    return page(document, program=HOSTILE, patch=patch, more_patch=HOSTILE)


class _Elements(HTMLParser):
    """Collects the elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", [page(full_result().document(), patch=PATCH.encode()), hostile_page()])
def test_a_page_has_only_elements_that_do_nothing(text: str) -> None:
    """A page has no script, link, image or handler, whatever names and output are."""
    found = _Elements(text)
    assert found.tags <= {*_TAGS.split()}
    assert found.open == []
    assert {*found.attributes} <= {*_ATTRIBUTES.split()}
    assert not any("owned" in value or "://" in value for values in found.attributes.values() for value in values)
    assert not re.search(r"url\(|@import|://", text.replace("https://evil.example/", ""))
    assert not re.search(r"[\x00\x1b\u202e\ud800]", text)
    assert text.encode().decode() == text


def test_a_page_shows_what_happened() -> None:
    """A page names the outcome, the times, the use of limits, denials with their fix, connections and changes."""
    text = page(full_result().document(), program="prog.py", patch=PATCH.encode(), more_patch="x07 diff 1764")
    found = _Elements(text).text
    for words in (
        "ok the program exited with status 0",
        "Program: prog.py",
        "Started: 2025-11-27 20:00:00 UTC",
        "256.0 MiB of 512.0 MiB",
        "3 of 9",
        "connect a.example:443 (2 times)",
        "Use --allow-host a",
        "In your settings, under [net]: allow_local = [1]",
        "It cannot be allowed.",
        "4 more denials were not recorded.",
        "allowed by net.allow_hosts[0]",
        "1 make ab",
        "timeout (signal 9)",
        r"\xff\x00a",
        "the program wrote more than the limit",
        "Left out: 1",
        "To see all: x07 diff 1764",
        "x07 inspect 1764273600000-4711-0",
    ):
        assert words in found
    assert "<title>x07 run 1764273600000-4711-0: ok</title>" in text
    assert '<span class="del">-old\n--- no header</span><span class="add">+new</span>' in text


def test_a_page_about_a_sandbox_shows_its_life_and_what_was_measured() -> None:
    """A sandbox's page shows when it was open, what its commands used and how they ended, and what was not measured."""
    result = full_result()
    commands = (msgspec.structs.replace(result.commands[0], outcome="timeout", exit_code=None, cpu_ms=1500.0),) * 2
    phase = msgspec.structs.replace(_phase(hello=20, opened=50, end=250), memory_peak_bytes=1 << 27, tasks_peak=0)
    held = msgspec.structs.replace(result, phases={"run": phase}, commands=commands, build=None)
    text = page(held.document())
    found = _Elements(text).text
    for words in ("CPU time of all commands: 3.00 s", "Memory of the largest command", "128.0 MiB of 512.0 MiB"):
        assert words in found
    assert "Not measured: open files, at most 64 in each process; processes, at most 9." in found
    assert "timeout, 20 ms, CPU 1.50 s" in found
    assert "None" not in found
    assert '<rect class="start" height="100%" x="0.00%" width="20.00%">' in text
    assert '<rect class="run" height="100%" x="20.00%" width="80.00%">' in text
    unmeasured = msgspec.structs.replace(held, phases={"run": msgspec.structs.replace(phase, memory_peak_bytes=0)})
    assert "each process; memory, at most 512.0 MiB; processes" in _Elements(page(unmeasured.document())).text


def test_a_page_about_a_run_that_never_started_is_short() -> None:
    """A result without phases, limits or output has a page, too."""
    text = page(draft_result(RUN).document())
    assert "Limits and use" not in text
    assert "internal-error" in text


def test_a_page_is_bounded() -> None:
    """Huge outputs, many rows and a huge patch make a page of limited size, which says what is missing."""
    result, big = full_result(), _output("\x1b" * 2_000_000)
    row = result.denials[0]
    huge = msgspec.structs.replace(
        result,
        stdout=big,
        stderr=big,
        build=BuildOutput(stdout=big, stderr=big),
        reason="r" * 1_000_000,
        denials=[row] * 5000,
        commands=result.commands * 5000,
        warnings=["w" * 1_000_000] * 10,
    )
    text = page(huge.document(), program="p" * 1_000_000, patch=b"+\x1b\n" * 1_000_000)
    assert len(text) < 12_000_000
    assert "and 4800 more" in text
    assert "The last 200 of 10000 commands" in text
    assert "characters are left out" in text
    assert PATCH_MAX < 1_000_000


@given(st.text())
def test_visible_text_has_no_markup_and_no_control_character(text: str) -> None:
    """Any text becomes printable text without a character that HTML interprets, and ordinary text is unchanged."""
    shown = _Elements(f"<p>{visible(text)}</p>")
    assert shown.tags <= {"p", "i"}
    assert shown.text.isprintable()
    if text.isprintable():
        assert shown.text == text


def test_notebooks_show_results_and_commands() -> None:
    """A `Result` and an `Ended` show themselves in a notebook, with styles that apply only to them."""
    result = full_result()
    assert result._repr_html_() == fragment(result.document())
    ended = Ended(
        id=3,
        outcome="timeout",
        reason="it ran too long",
        reason_code="wall-time",
        x07_exit_code=124,
        exit_code=None,
        signal=9,
        stdout=HOSTILE.encode("utf-8", "replace"),
        stderr=b"",
        truncated=True,
        wall_ms=1500,
        cpu_ms=2,
        memory_peak_bytes=1,
        denials=tuple(result.denials),
    )
    found = _Elements(ended._repr_html_())
    assert found.tags <= {*_TAGS.split()}
    assert "command 3, 1.50 s, 2 ms of CPU time" in found.text
    style = found.text.partition("Denied")[0]
    rules = [rule for rule in re.findall(r"([^{}]+)\{", style) if not rule.strip().startswith("@media")]
    assert all(".x07" in selector for rule in rules for selector in rule.split(",") if selector.strip())


@pytest.fixture
def finished(state: Path) -> Path:
    """The folder of a run that has ended."""
    folder = state.parent / "runs" / RUN
    for place in (state, folder.parent, folder):
        place.mkdir(mode=0o700)
    (folder / "result.json").write_bytes(msgspec.json.encode(full_result().document()))
    (folder / "request.json").write_text('{"program": "prog\\u001b.py"}', encoding="utf-8")
    return folder


def test_report_writes_a_page(finished: Path, tmp_path: Path) -> None:
    """`x07 report` writes the page of the latest run into the run's folder, or to a file, and prints the path."""
    done = x07(tmp_path, "report")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{finished}/report.html\n".encode()
    done = x07(tmp_path, "report", "--html", "r.html", RUN[:8])
    assert (done.code, done.out, done.err) == (0, b"r.html\n", "")
    assert (tmp_path / "r.html").read_bytes() == (finished / "report.html").read_bytes()
    assert "prog<i" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_report_lists_runs(finished: Path, tmp_path: Path) -> None:
    """`x07 report --list` prints the last runs with outcome and time; control characters in names are escaped."""
    (finished.parent / "1764273500000-1-0").mkdir(mode=0o700)
    done = x07(tmp_path, "report", "--list")
    assert (done.code, done.err) == (0, "")
    head, first, second = done.out.decode().splitlines()
    assert head.split() == ["RUN", "OUTCOME", "STARTED", "TOOK", "PROGRAM"]
    assert re.fullmatch(rf"{RUN}  ok  +\S+ ago  0\.4s  prog\\x1b\.py", first)
    assert "no result" in second
    assert x07(tmp_path, "report", "--list", "1").code == 2


def test_report_says_why_there_is_no_page(finished: Path, tmp_path: Path) -> None:
    """Without a result, or with one of another version, `x07 report` says so and names `x07 inspect`."""
    (finished / "result.json").write_bytes(b'{"schema_version": "x07.sandbox.result@9.0.0"}')
    done = x07(tmp_path, "report", RUN)
    assert (done.code, done.out) == (2, b"")
    assert "another version of x07" in done.err
    (finished / "result.json").unlink()
    assert f"x07 inspect {RUN}" in x07(tmp_path, "report", RUN).err
    assert "no run has ended" in x07(tmp_path, "report").err


def test_report_opens_the_page_if_asked(finished: Path, tmp_path: Path) -> None:
    """`x07 report --open` opens the page in the user's browser, or says that there is none."""
    script, opened = tmp_path / "browser", tmp_path / "opened"
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}\n', encoding="utf-8")
    script.chmod(0o700)
    argv = [*X07, "report", "--open"]
    usual = {name: value for name, value in os.environ.items() if name not in {"BROWSER", "DISPLAY"}}
    done = subprocess.run(argv, env=usual | {"BROWSER": f"{script} %s"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert opened.read_text(encoding="utf-8") == (finished / "report.html").as_uri()
    done = subprocess.run(argv, env=usual | {"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert "no browser was found" in done.stderr


def test_a_browser_shows_a_hostile_page_as_text(need: Need, tmp_path: Path) -> None:
    """In Chromium a hostile page runs no script, loads nothing, keeps its title, and does not scroll sideways."""
    reason = missing()
    need(not reason, reason, installable=False)
    file = tmp_path / "page.html"
    file.write_text(hostile_page(), encoding="utf-8")
    with running() as browser:
        for width in (1200, 480):
            for dark in (False, True):
                browser.open(file, width, dark=dark)
                assert browser.value("document.title") == f"x07 run {RUN}: ok"
                assert browser.value("document.scripts.length") == 0
                assert browser.value("document.querySelectorAll('[onerror],[onload],img,a,script,link').length") == 0
                assert browser.requested() == [file.as_uri()]
                assert browser.value("document.querySelectorAll('details').forEach(one => one.open = true)") is None
                assert browser.value("document.documentElement.scrollWidth") <= width
                wide = "[...document.querySelectorAll('.x07 *')].filter(one => one.scrollWidth > innerWidth).length"
                assert browser.value(wide) == 0
                # Piled-up accents of a name cover nothing around it.
                over = "[...document.querySelectorAll('.guest')].map(one => one.closest('p, td, h1, pre, .row > div'))"
                assert browser.value(f"{over}.every(one => getComputedStyle(one).overflow !== 'visible')")
                background = browser.value("getComputedStyle(document.body).backgroundColor")
                assert background == ("rgb(20, 24, 28)" if dark else "rgba(0, 0, 0, 0)")
        # The policy in the page holds even if escaping had failed.
        script = "<script>document.title = 'owned'</script><img src='https://192.0.2.1/' onerror='document.title = 1'>"
        file.write_text(hostile_page().replace("<body>", f"<body>{script}"), encoding="utf-8")
        browser.open(file, 1200)
        assert browser.value("document.scripts.length") == 1
        assert browser.value("document.title") == f"x07 run {RUN}: ok"
        failed = [event["params"] for event in browser.events if event.get("method") == "Network.loadingFailed"]
        assert [one.get("blockedReason") for one in failed] == ["csp"]
