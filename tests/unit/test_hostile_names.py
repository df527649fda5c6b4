"""A hundred hostile names at every door through which text of a guest reaches a person or a model."""

from __future__ import annotations

import base64
import fcntl
import html
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Final

import pytest
from msgspec.structs import replace

from tests.command import x07
from tests.hostile_names import FILES, NAMES, unseen
from x07_sandbox.backends.jailed import BoundedStream
from x07_sandbox.channel import files as channel
from x07_sandbox.cli.console import LiveLine, Progress, say, show, show_table
from x07_sandbox.cli.messages import say_changes, say_denials
from x07_sandbox.cli.sandbox import _fields, _line
from x07_sandbox.errors import PeerError, SandboxError, escaped
from x07_sandbox.files.changes import Change, ChangeSet, Node, RootChanges, encode, in_json
from x07_sandbox.host.documents import render_json
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.integrations.mcp_tools import marked
from x07_sandbox.library.files import _infos
from x07_sandbox.library.tools import CallError, errors
from x07_sandbox.policy.denials import Denial, Hint, HowToAllow
from x07_sandbox.records.runs import all_runs
from x07_sandbox.reports.sandboxes import FileRow, FilesReport
from x07_sandbox.sessions.html import page
from x07_sandbox.sessions.model_text import reason_of, untrusted
from x07_sandbox.sessions.result import ChangedName, Changes, LeftOutEntry, Result, draft_result
from x07_sandbox.sessions.saved_changes import summarize
from x07_sandbox.sessions.transfers import TerminalFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RUN: Final = f"{unix_ms()}-1-0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder of a run in progress."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    made = all_runs() / RUN
    made.mkdir(mode=0o700)
    fd = os.open(made, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)  # as if the run were in progress
    yield made
    os.close(fd)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        """Return True."""
        return True


def _result(name: str) -> Result:
    """Return a result whose texts are a name that a program chose."""
    how = HowToAllow(json_path="$.fs.read_roots", value=[name], flag=f"--allow-read-root {name}")
    denial = Denial(
        field="fs.read_roots",
        action="read",
        subject=name,
        enforced_by="x",
        observed_by="guest",
        count=1,
        how_to_allow=how,
        reason=name,
    )
    left = LeftOutEntry(name=escaped(name), rules=("protected",), entries=1, take="--allow-hidden")
    text, raw = in_json(name) if name not in {"\ud800", "\udfff\ud83d"} else (escaped(name), "")
    changed = ChangedName(root="/work", name=text, action="deleted", name_base64=raw)
    changes = Changes(state="kept", reason=name, deleted=1, names=(changed,), left_out=1, left_out_entries=(left,))
    return replace(
        draft_result(RUN),
        reason=name,
        reason_code="guest-failed",
        denials=[denial],
        hints=[Hint(subject=name, kind="elsewhere", how=how, in_vm=name)],
        changes=changes,
        warnings=[name],
    )


def _infos_of(name: str) -> list[channel.FileInfo]:
    """Return a file as the client of the file server gets it from a guest, which the test plays."""
    buffer = channel.Buffer()
    buffer.data += channel.encode(channel.Answer(0, entries=(channel.FileInfo(name, 0o120777, 1, 1, name),)))
    values = buffer.take()
    assert values is not None
    return _infos(None, channel.answer_of(values))  # type: ignore[arg-type, return-value]  # the server is not asked


def _listed(name: str) -> None:
    try:
        (info,) = _infos_of(name)
    except PeerError as exc:
        say(str(exc))
    else:
        show(_line(info))  # type: ignore[arg-type]


def _progress(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        terminal = _Terminal()
        patch.setattr(sys, "stderr", terminal)
        LiveLine()(name)
        Progress(name)(name)
    say(terminal.getvalue().replace("\r\033[K", ""))


def _console(name: str) -> None:
    read, write = os.pipe()
    os.write(write, name.encode("utf-8", "surrogatepass"))
    os.close(write)
    stream = BoundedStream(read, keep_bytes=1 << 16)
    stream.read()
    os.close(read)
    assert not unseen(stream.text(), kept="\n\t")
    show(stream.text())


def _page(name: str) -> None:
    text = html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", page(_result(name).document()), flags=re.DOTALL))
    show(text.replace("\n", ""))
    assert not unseen(text)


def _model(name: str) -> None:
    """Print what a model gets through MCP and from tools: an error of the library, and how a command ended."""
    for raised in (PeerError("bad answer", name), SandboxError("cannot do it", name, "Wait"), OSError(name)):
        with pytest.raises(CallError) as caught, errors("cannot read a"):
            raise raised
        answer = caught.value.answer
        inside = marked(answer.parts)
        assert len(answer.facts["error"]) < 120
        assert inside.count("END]") == 1 or "END" in name
        for text in (inside, answer.text()):
            assert not unseen(text)
            show(text)
    result = _result(name)
    assert reason_of(result) == ""
    for _, text in untrusted(result):
        show(text)


DOORS: Final[dict[str, Callable[[str], object]]] = {
    "message": lambda name: say(f"deleted: {escaped(name)}"),
    "result": show,
    "table": lambda name: show_table(("PROGRAM", "TAGS"), [(name, name)]),
    "progress": _progress,
    "error": lambda name: say(str(SandboxError(f"cannot read {escaped(name)}", escaped(name), "Wait"))),
    "ls": _listed,
    "console": _console,
    "denials": lambda name: say_denials(_result(name)),
    "changes": lambda name: say_changes(_result(name)),
    "page": _page,
    "model": _model,
}


@pytest.mark.parametrize("door", DOORS)
def test_no_name_reaches_a_terminal_or_a_model_unescaped(
    door: str, capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that a program or a broken guest chose prints no control sequence and nothing that cannot be seen."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path))
    assert (len(NAMES), len({*NAMES})) == (100, 100)
    for name in NAMES:
        DOORS[door](name)
        printed = b"".join(capsysbinary.readouterr())
        assert printed
        assert not unseen(printed), name
        assert not re.search(rb"^x07: forged", printed, re.MULTILINE), name


def test_output_on_a_terminal_has_no_control_character() -> None:
    """Output that is printed as it comes loses no character that can be seen, and no control character passes."""
    for name in NAMES:
        raw = name.encode("utf-8", "surrogatepass")
        printed = TerminalFilter()(raw).decode()
        ordinary = "".join(char for char in printed if char in "\n\t\r\u2028\u2029\u00a0\u3000\u2003\ue000\U0010ffff")
        assert not unseen(printed, kept=ordinary) - {char for char in name if char.isidentifier() or ord(char) > 0xFF}
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", printed)


def test_a_run_with_hostile_texts_is_shown(tmp_path: Path, folder: Path) -> None:
    """The commands that list and show runs print names in their records escaped."""
    for name in map(os.fsdecode, FILES):
        text = name.encode("utf-8", "replace").decode()
        document = {"schema_version": "x07.sandbox.request@0.1.0", "program": text}
        (folder / "request.json").write_text(json.dumps(document))
        (folder / "result.json").write_bytes(render_json(_result(name)))
        for words in (("report", "--list"), ("inspect", RUN), ("report", RUN), ("ps",)):
            done = x07(tmp_path, *words)
            assert (done.code, RUN.encode() in done.out) == (0, True)
            assert unseen(done.out) | unseen(done.err) == set()


def exact(row: dict[str, str], key: str = "name") -> bytes:
    """Return a name of a document as bytes, as library.md tells its readers."""
    return base64.b64decode(row[f"{key}_base64"]) if f"{key}_base64" in row else row[key].encode()


def test_documents_keep_names_without_loss() -> None:
    """With --json each name and target is exact, in ASCII, and valid for strict readers of JSON."""
    for raw in FILES:
        (info,) = _infos_of(os.fsdecode(raw))
        data = render_json(FilesReport(files=(FileRow(**_fields(info)),)))  # type: ignore[arg-type]
        (row,) = json.loads(data.decode("ascii"))["files"]
        json.dumps(row, ensure_ascii=False).encode()  # raises for half a surrogate pair
        assert (exact(row), exact(row, "target")) == (raw, raw)


def _changed() -> ChangeSet:
    link = [Node(kind="link", target=os.fsdecode(raw)) for raw in FILES]
    changes = [
        Change(name=os.fsdecode(raw), before=None, after=node)
        for raw, node in sorted(zip(FILES, link, strict=True), key=lambda pair: os.fsdecode(pair[0]))
    ]
    return ChangeSet(run=RUN, roots=(RootChanges(root="/work", guest="/work", missing=False, changes=tuple(changes)),))


def test_changes_keep_names_without_loss(tmp_path: Path, folder: Path) -> None:
    """`x07 diff --json` and the changes of a result name each file exactly; the text of `x07 diff` is safe to print."""
    (folder / "changes").mkdir(mode=0o700)
    (folder / "changes" / "changes.json").write_bytes(encode(_changed()))
    (folder / "changes" / "data").touch()
    done = x07(tmp_path, "diff", RUN, "--json")
    assert done.code == 0, done
    rows = json.loads(done.out.decode("ascii"))["roots"][0]["changes"]
    assert sorted(map(exact, rows)) == sorted(FILES)
    assert sorted(exact(row["after"], "target") for row in rows) == sorted(FILES)
    result = replace(draft_result(RUN), changes=summarize(_changed(), "kept"))
    assert sorted(map(exact, json.loads(render_json(result))["changes"]["names"])) == sorted(FILES)
    for words in (("diff", RUN, "--stat"), ("diff", RUN)):
        done = x07(tmp_path, *words)
        assert done.code == 0
        names = [line for line in done.out.split(b"\n") if line.startswith((b"diff --git", b"added", b"+++"))]
        assert len(names) >= len(FILES)
        assert not unseen(b"\n".join(names))
