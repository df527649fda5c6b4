"""A result as HTML: one page for `x07 report`, and the same without its frame for notebooks. Without I/O.

Names and output of a guest are hostile. Only a `Markup` is HTML: `_tag` escapes any other text, after it has made
control characters visible. The page has no script, loads nothing, and has a Content-Security-Policy that forbids both.
The number of rows and of characters is limited.
"""

from __future__ import annotations

import html
import json
from base64 import b64decode
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.errors import escaped, is_visible, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Document = dict[str, Any]
"""A result, or a part of it, as `Result.document` returns it."""

PATCH_MAX: Final = 256 * 1024
"""How many bytes of a patch a page shows."""

_TEXT_MAX: Final = 32 * 1024  # characters of the beginning, and of the end, of an output
_NAME_MAX: Final = 400
_ROWS_MAX: Final = 200
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_KIB: Final = 1024
_MS: Final = 1000
_TONES: Final = {"none": "good", "program": "bad", "policy": "warn", "host": "bad"}
_RESULTS: Final = (("allowed", "good"), ("denied", "bad"), ("failed", "warn"))
_STYLE: Final = """
.x07{--ink:#1c2024;--soft:#5b6570;--line:#d5dae0;--card:#f6f8fa;--paper:#fff;--good:#1a7f37;--bad:#b3261e;
--warn:#8a5a00;--start:#8aa4c8;--run:#2563c9;--end:#b9a3d6;--add:#e2f5e6;--del:#fbe6e4;
font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:0 auto;
padding:1rem;overflow-wrap:anywhere;color-scheme:light dark;text-align:left}
@media(prefers-color-scheme:dark){.x07{--ink:#e4e8ec;--soft:#9aa5b1;--line:#3a424b;--card:#1d2228;--paper:#14181c;
--good:#57c878;--bad:#ff8a80;--warn:#e5b454;--start:#5d789e;--run:#6ea0f5;--end:#8f78b3;--add:#16331f;--del:#3c1d1c}}
.x07 *{box-sizing:border-box}
.x07 h1{font-size:1.35rem;line-height:1.3;margin:.2rem 0 .6rem;font-weight:600}
.x07 h2{font-size:1.05rem;margin:1.8rem 0 .5rem;padding-bottom:.2rem;border-bottom:1px solid var(--line)}
.x07 h3{font-size:.95rem;margin:1rem 0 .3rem}
.x07 p,.x07 td,.x07 h1,.x07 .row>div{overflow:clip}
.x07 p{margin:.3rem 0}.x07 small,.x07 .soft{color:var(--soft)}.x07 small{font-size:.85em}
.x07 .badge{border:1px solid;border-radius:.3rem;padding:.05rem .45rem;font-weight:600;white-space:nowrap}
.x07 .good{color:var(--good)}.x07 .bad{color:var(--bad)}.x07 .warn{color:var(--warn)}
.x07 code,.x07 pre{font:.87em/1.45 ui-monospace,monospace}
.x07 code{background:var(--card);border-radius:.2rem;padding:.05rem .25rem;color:inherit;white-space:pre-wrap}
.x07 .guest{font-family:ui-monospace,monospace;font-size:.92em;
text-decoration:underline dotted var(--soft);text-underline-offset:.2em;unicode-bidi:isolate}
.x07 pre{margin:.2rem 0 .6rem;padding:.5rem .7rem;background:var(--card);color:var(--ink);border:1px solid var(--line);
border-left:3px dotted var(--soft);white-space:pre-wrap;overflow:hidden auto;max-height:34rem;unicode-bidi:isolate}
.x07 .esc{background:var(--warn);color:var(--paper);border-radius:.15rem;font-style:normal;padding:0 .1rem}
.x07 table{border-collapse:collapse;width:100%;table-layout:fixed;font-size:.92em;margin:.3rem 0;background:none}
.x07 th,.x07 td{padding:.3rem .5rem .3rem 0;vertical-align:top;border-bottom:1px solid var(--line);text-align:left;
background:none;white-space:normal}
.x07 th{font-weight:600;color:var(--soft)}
.x07 svg{display:block;width:100%;height:14px;background:var(--card);border:1px solid var(--line);border-radius:.2rem}
.x07 .start{fill:var(--start)}.x07 .run{fill:var(--run)}.x07 .end{fill:var(--end)}.x07 .full{fill:var(--bad)}
.x07 .row{display:grid;grid-template-columns:9rem 1fr 15rem;gap:.2rem .8rem;align-items:center;margin:.35rem 0}
.x07 .key{display:inline-block;width:.8em;height:.8em;border-radius:.15rem;margin:0 .35em 0 .9em}
.x07 .key.start{background:var(--start)}.x07 .key.run{background:var(--run)}.x07 .key.end{background:var(--end)}
.x07 .diff{padding:0;max-height:none}.x07 .diff span{display:block;padding:0 .7rem}
.x07 .diff .add{background:var(--add)}.x07 .diff .del{background:var(--del)}
.x07 .diff .file{font-weight:700;border-top:1px solid var(--line);padding-top:.3rem;margin-top:.3rem}
.x07 .diff .note{color:var(--soft)}
.x07 summary{cursor:pointer;color:var(--soft)}
@media(max-width:640px){.x07 .row{grid-template-columns:1fr}.x07 thead{display:none}
.x07 table,.x07 tbody,.x07 tr,.x07 td{display:block}.x07 tr{border-bottom:1px solid var(--line);padding:.3rem 0}
.x07 td{border:0;padding:.1rem 0}.x07 td[data-of]::before{content:attr(data-of) ": ";color:var(--soft)}}
"""


class Markup(str):
    """Finished HTML. All other text is escaped."""

    __slots__ = ()


def page(document: Document, *, program: str | None = None, patch: bytes = b"", more_patch: str = "") -> str:
    """Return a whole page about a result. program: the name of the program, if it is known.

    patch: the changes in git's format, of which at most PATCH_MAX bytes are shown. more_patch: the command that prints
    all of them; empty if *patch* is complete.
    """
    body = fragment(document, program=program, patch=patch, more_patch=more_patch)
    title = visible(f"x07 run {document['run']}: {document['outcome']}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>body{{margin:0}}"
        "@media(prefers-color-scheme:dark){body{background:#14181c}}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def fragment(document: Document, *, program: str | None = None, patch: bytes = b"", more_patch: str = "") -> str:
    """Return what a page shows, for a notebook. Its styles apply only to itself. Arguments: see `page`."""
    sections = (
        _top(document, program),
        _section("Times", _times(document["phases"])),
        _section("Limits and use", _limits(document)),
        _section("Denied", _denials(document["denials"], document["denials_lost"])),
        _section("What it seems to lack", map(_hint, document["hints"])),
        _section("Connections", _connections(document["net"])),
        _section("Commands", _commands(document["commands"])),
        _section("Output", _outputs(document)),
        _section("Changes to files", _changes(document, patch, more_patch)),
        _section("Evidence", _evidence(document)),
    )
    return _framed(sections)


def command_fragment(command: Document) -> str:
    """Return a command of a sandbox as HTML, for a notebook. command: the fields of an `Ended`."""
    tone = "good" if command["outcome"] == "ok" else "bad"
    use = f"command {command['id']}, {_time(command['wall_ms'])}, {_time(command['cpu_ms'])} of CPU time"
    streams = [(name, command[name].decode("utf-8", "surrogateescape"), "") for name in ("stdout", "stderr")]
    cut = [_tag("p", "There was more output.", class_="warn")] if command["truncated"] else []
    return _framed(
        (
            _heading(command["outcome"], tone, command["reason"]),
            _tag("p", use, class_="soft"),
            _section("Denied", _denials(command["denials"], 0)),
            _section("Output", [*(_stream(*one) for one in streams if one[1]), *cut]),
        )
    )


def visible(text: str, *, lines: bool = False) -> Markup:
    r"""Return text escaped for HTML. Unprintable characters become marked escapes, such as \x1b, and bytes \xff.

    lines: whether line feeds and tabs are kept.
    """
    if is_visible(text):
        return Markup(html.escape(text))
    kept = "\n\t" if lines else ""
    parts = groupby(text, lambda char: is_visible(char) or char in kept)
    return Markup(
        "".join(
            html.escape(part) if shown else f'<i class="esc">{html.escape(escaped(part))}</i>'
            for shown, part in ((shown, "".join(chars)) for shown, chars in parts)
        )
    )


def _tag(name: str, *parts: object, **attributes: str) -> Markup:
    """Return an element. A part that is no `Markup` is escaped. class_ and data_of stand for class and data-of."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"' for key, value in attributes.items()
    )
    inner = "".join(part if isinstance(part, Markup) else visible(str(part)) for part in parts)
    return Markup(f"<{name}{words}>{inner}</{name}>")


def _framed(sections: Iterable[Markup]) -> str:
    return f'<div class="x07"><style>{_STYLE}</style>\n{"".join(sections)}</div>'


def _section(title: str, parts: Iterable[Markup]) -> Markup:
    """Return a section, or nothing if it has no parts."""
    inner = Markup("".join(parts))
    return Markup(_tag("section", _tag("h2", title), inner) + "\n" if inner else "")


def _heading(outcome: str, tone: str, reason: str) -> Markup:
    return _tag("h1", _tag("span", outcome, class_=f"badge {tone}"), " ", _short(reason))


def _short(text: str) -> str:
    return text if len(text) <= _NAME_MAX else f"{text[:_NAME_MAX]}..."


def _guest(text: str) -> Markup:
    """Return a name that a guest may have chosen, marked."""
    return _tag("bdi", _short(text), class_="guest")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], most: int = _ROWS_MAX) -> Markup:
    lines = [
        _tag("tr", *(_tag("td", cell, data_of=name) for name, cell in zip(head, row, strict=True)))
        for row in rows[:most]
    ]
    more = len(rows) - most
    end = _tag("p", f"and {more} more", class_="soft") if more > 0 else Markup()
    top = _tag("thead", _tag("tr", *(_tag("th", name) for name in head)))
    return Markup(_tag("table", top, _tag("tbody", *lines)) + end)


def _bar(parts: Sequence[tuple[float, float, str]], whole: float) -> Markup:
    """Return a bar. parts: start, end and class of each part, in the unit of *whole*."""
    scale = 100 / whole if whole > 0 else 0
    return _tag(
        "svg",
        *(
            _tag("rect", class_=kind, height="100%", x=f"{start * scale:.2f}%", width=f"{width:.2f}%")
            for start, end, kind in parts
            if (width := min(100.0, max(0.3, (end - start) * scale))) and end > start
        ),
        role="img",
        aria_hidden="true",
    )


def _row(name: object, bar: Markup, text: object) -> Markup:
    return _tag("div", _tag("div", name), bar, _tag("div", text, class_="soft"), class_="row")


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < _MS else f"{ms / _MS:.2f} s"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < _KIB:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= _KIB
    return f"{count:.1f} GiB"


def _top(document: Document, program: str | None) -> Markup:
    began = datetime.fromtimestamp(int(document["run"].partition("-")[0]) / _MS, UTC)
    facts = {
        "Program": None if program is None else _guest(program),
        "Run": document["run"],
        "Started": f"{began:%Y-%m-%d %H:%M:%S} UTC",
        "Exit status": document["exit_code"],
        "Signal": document["signal"],
        "Isolation": " by ".join(filter(None, (document["isolation"], document["backend"]))),
        "Policy": document["policy"] and _short(document["policy"]),
        "Fault": None if document["fault"] == "none" else f"of the {document['fault']}",
    }
    known = [(_tag("span", name, class_="soft"), value) for name, value in facts.items() if value not in {None, ""}]
    cells = [_tag("p", name, ": ", value) for name, value in known]
    notes = [*document["warnings"], *filter(None, [document["input_problem"]])]
    warned = [_tag("p", "Warning: ", _short(text), class_="warn") for text in notes[:_ROWS_MAX]]
    legend = _tag("p", _tag("small", "Names and text that the program could choose look ", _guest("like this"), "."))
    head = _heading(document["outcome"], _TONES.get(document["fault"], "bad"), document["reason"])
    return Markup(_tag("header", head, *cells, *warned, legend) + "\n")


def _times(phases: Document) -> Iterator[Markup]:
    """Yield a bar for each phase, from the start of its VM."""
    if not phases:
        return
    longest = max(max(phase["times_ms"].values(), default=0) for phase in phases.values())
    for name, phase in phases.items():
        times = phase["times_ms"]
        end = max(times.values(), default=0)
        started, exited = times.get("started", times.get("opened", end)), times.get("exited", end)
        bar = _bar([(0, started, "start"), (started, exited, "run"), (exited, end, "end")], longest)
        steps = ", ".join(f"{step} {_time(at)}" for step, at in times.items())
        yield _row(_tag("strong", name), bar, f"{phase['start']} start, {phase['outcome']}")
        yield _tag("p", _tag("small", f"{_short(phase['reason'])} ({steps})"))
    keys = (("start", "start of the VM"), ("run", "program, or open sandbox"), ("end", "after it"))
    words = [part for kind, text in keys for part in (_tag("span", class_=f"key {kind}"), text)]
    yield _tag("p", _tag("small", "Each bar begins at the start of a VM.", *words))


def _limits(document: Document) -> Iterator[Markup]:
    """Yield a bar for each limit whose use is known."""
    limits, run = document["limits"], document["phases"].get("run")
    if limits is None:
        return
    if run is not None:
        times = run["times_ms"]
        if "started" in times:  # the limits of a sandbox hold for each command
            spent = times.get("exited", times.get("end", times["started"])) - times["started"]
            yield _use("Elapsed time", spent, limits["wall_ms"], _time)
            yield _use("CPU time", run["cpu_ms"], limits["cpu_ms"], _time)
        elif document["commands"]:
            cpu_ms = sum(one["cpu_ms"] for one in document["commands"])
            yield _tag("p", f"CPU time of all commands: {_time(cpu_ms)}")
        unmeasured = [f"open files, at most {limits['fds']} in each process"]
        if run["memory_peak_bytes"]:
            whose = "Memory" if "started" in times else "Memory of the largest command"
            yield _use(whose, run["memory_peak_bytes"], limits["mem_bytes"], _size)
        else:
            unmeasured.append(f"memory, at most {_size(limits['mem_bytes'])}")
        if run["tasks_peak"]:
            yield _use("Processes", run["tasks_peak"], limits["procs"] + 1, str)  # and the program's first thread
        else:
            unmeasured.append(f"processes, at most {limits['procs'] + 1}")
        yield _tag("p", _tag("small", f"Not measured: {'; '.join(unmeasured)}."))
    if (scaling := document["scaling"]) is not None:
        yield _tag("p", _tag("small", f"The VM was emulated: both time limits were multiplied by {scaling['factor']}."))


def _use(name: str, used: float, limit: float, word: Any) -> Markup:  # noqa: ANN401 - a function of a number
    bar = _bar([(0, min(used, limit), "full" if used >= limit else "run")], limit)
    return _row(name, bar, f"{word(used)} of {word(limit)}")


def _denials(denials: Sequence[Document], lost: int) -> Iterator[Markup]:
    rows = []
    for one in denials:
        times = f" ({one['count']} times)" if one["count"] > 1 else ""
        what = Markup(f"{visible(one['action'])} {_guest(one['subject'])}{times}")
        rows.append((what, _short(one["reason"] or one["field"]), one["enforced_by"], _how(one["how_to_allow"])))
    if rows:
        yield _table(("Action", "Why", "Denied by", "To allow it"), rows)
    if lost:
        yield _tag("p", f"{lost} more denials were not recorded.", class_="warn")


def _how(how: Document | None) -> Markup:
    """Return the change that allows something: settings first, then a command, a flag or a field of the policy."""
    if how is None:
        return _tag("span", "It cannot be allowed.", class_="soft")
    lines = []
    if how["setting"]:
        lines.append(("In your settings, under [net]: ", how["setting"]))
    if how["command"]:
        lines.append(("Run ", how["command"]))
    if flag := how["next_flag"] if how["command"] else how["flag"]:
        lines.append(("Use " if not how["command"] else "Then use ", flag))
    elif how["json_path"]:
        value = json.dumps(how["value"], ensure_ascii=False)
        lines.append(("In the policy: ", f"{how['json_path'].removeprefix('$.')} = {value}"))
    return Markup("".join(_tag("div", text, _tag("code", _short(code))) for text, code in lines))


def _hint(hint: Document) -> Markup:
    if hint["in_vm"]:
        return _tag("p", _guest(hint["subject"]), " has another path in the VM: ", _guest(hint["in_vm"]))
    return _tag("p", _guest(hint["subject"]), _how(hint["how"]))


def _connections(net: Document | None) -> Iterator[Markup]:
    if net is None:
        return
    rows = [
        (
            Markup(f"{_guest(_destination(one))} {visible(one['transport'])}"),
            Markup(_tag("span", f"{word} by {one['rule']}", class_=tone) + _because(one)),
            one["count"],
            f"{_size(one['sent_bytes'])} out, {_size(one['received_bytes'])} in",
        )
        for word, tone in _RESULTS
        for one in net[word]
    ]
    yield _table(("Destination", "Decision", "Times", "Bytes"), rows) if rows else _tag("p", "There were none.")
    if net["more"]:
        yield _tag("p", f"and {net['more']} more that were denied", class_="soft")


def _destination(contact: Document) -> str:
    return f"{contact['host']}:{contact['port']}" if contact["port"] else contact["host"] or "(others)"


def _because(contact: Document) -> Markup:
    found = filter(None, (contact["reason"], contact["address"] and f"address {contact['address']}"))
    return Markup("".join(_tag("div", _tag("bdi", _short(text)), class_="soft") for text in found))


def _commands(commands: Sequence[Document]) -> Iterator[Markup]:
    if not commands:
        return
    shown = commands[-_ROWS_MAX:]
    if len(shown) < len(commands):
        yield _tag("p", f"The last {len(shown)} of {len(commands)} commands:", class_="soft")
    first = shown[0]["began_ms"]
    whole = max(one["began_ms"] + one["wall_ms"] for one in shown) - first
    for one in shown:
        began = one["began_ms"] - first
        bar = _bar([(began, began + one["wall_ms"], "run" if one["outcome"] == "ok" else "full")], whole)
        status = f" ({one['exit_code']})" if one["exit_code"] is not None else ""
        status = f" (signal {one['signal']})" if one["signal"] is not None else status
        words = f"{one['outcome']}{status}, {_time(one['wall_ms'])}, CPU {_time(one['cpu_ms'])}"
        digest = _tag("small", one["argv_sha256"].removeprefix("sha256:")[:12])
        name = Markup(f"{one['id']} {_guest(one['name'])} {digest}")
        yield _row(name, bar, words)
    yield _tag(
        "p", _tag("small", "Of each command: its number, its first word, and the start of the digest of its arguments.")
    )


def _outputs(document: Document) -> Iterator[Markup]:
    build = document["build"] or {}
    named = [("stdout", document["stdout"]), ("stderr", document["stderr"])]
    named += [(f"{name} of the build", output) for name, output in build.items()]
    for name, output in named:
        if output["bytes"]:
            notes = [_size(output["bytes"])]
            notes += ["the program wrote more than the limit"] * output["truncated"]
            notes += [f"not passed on: {why}" for why in filter(None, [output.get("undelivered")])]
            yield _stream(name, _text(output), ", ".join(notes))


def _text(output: Document) -> str:
    if output.get("base64") is None:
        return output.get("text") or ""
    return b64decode(output["base64"]).decode("utf-8", "surrogateescape")


def _stream(name: str, text: str, notes: str) -> Markup:
    left_out = len(text) - 2 * _TEXT_MAX
    parts = [visible(text[: 2 * _TEXT_MAX], lines=True)]
    if left_out > 0:
        gap = _tag("strong", f"... {left_out} characters are left out ...", class_="warn")
        ends = visible(text[:_TEXT_MAX], lines=True), visible(text[-_TEXT_MAX:], lines=True)
        parts = [Markup(f"{ends[0]}\n{gap}\n{ends[1]}")]
    return Markup(_tag("h3", name, " ", _tag("small", notes)) + _tag("pre", *parts))


def _changes(document: Document, patch: bytes, more_patch: str) -> Iterator[Markup]:
    changes = document["changes"]
    if changes["state"] == "none":
        return
    counts = ", ".join(f"{changes[word]} {word}" for word in ("added", "changed", "deleted"))
    yield _tag("p", _tag("strong", changes["state"]), f": {counts}. ", _short(changes["reason"]))
    if changes["names"]:
        rows = [(one["action"], _guest(one["name"] or "."), _guest(one["root"])) for one in changes["names"]]
        table = _table(("Action", "Name", "In"), rows)
        yield _tag("details", _tag("summary", f"The names, {len(rows)}"), table) if patch else table
    if changes["left_out"]:
        yield _tag("h3", f"Left out: {changes['left_out']}")
        left = changes["left_out_entries"]
        rules = [(_guest(one["name"]), ", ".join(one["rules"]), _tag("code", _short(one["take"]))) for one in left]
        yield _table(("Name", "Refused by", "Flags that apply it"), rules)
    if patch:
        yield _tag("h3", "The changes")
        yield _diff(patch[:PATCH_MAX].decode("utf-8", "surrogateescape"))
    if more_patch:
        yield _tag("p", "This is the beginning. To see all: ", _tag("code", more_patch), class_="warn")


def _diff(patch: str) -> Markup:
    """Return a patch with a colour for each kind of line. Lines of the same kind share an element."""
    lines = _kinds(patch.removesuffix("\n").split("\n"))
    parts = ((kind, "\n".join(line for _, line in same)) for kind, same in groupby(lines, lambda pair: pair[0]))
    return _tag("pre", *(_tag("span", visible(text, lines=True), class_=kind) for kind, text in parts), class_="diff")


def _kinds(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the class of each line, and the line. A line of content begins with a blank, + or -, and is in a hunk."""
    in_hunk = False
    for line in lines:
        if line.startswith(("diff --git ", "# ")):
            in_hunk = False
            yield "file" if not line.startswith("# ") or line.startswith("# in ") else "note", line
        else:
            in_hunk = in_hunk or line.startswith("@@ ")
            yield {"+": "add", "-": "del", " ": "same"}.get(line[:1], "note") if in_hunk else "note", line


def _evidence(document: Document) -> Iterator[Markup]:
    digests = [(name, _tag("code", value)) for name, value in document["digests"].items() if value]
    filters = [(f"filter {name}", _tag("code", value)) for name, value in document["filters"].items()]
    if digests or filters:
        yield _tag("details", _tag("summary", "Digests"), _table(("Of", "Digest"), [*digests, *filters]))
    if document["controls"]:
        rows = [(one["field"], one["state"], one["by"], one["why"]) for one in document["controls"]]
        table = _table(("Field of the policy", "State", "By", "How"), rows)
        yield _tag("details", _tag("summary", f"What enforces each field of the policy, {len(rows)}"), table)
    yield _tag("p", _tag("small", "All of this as JSON: ", _tag("code", f"x07 inspect {document['run']}")))
