"""Tools of a sandbox for a language model: functions with JSON schemas, whose answers are text for the model."""

from __future__ import annotations

import base64 as b64
import binascii
import contextlib
import errno
import inspect
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeVar, get_type_hints, overload

import msgspec
from msgspec import Meta

from x07_sandbox.errors import RefusedError, SandboxError, UsageError, escaped
from x07_sandbox.library.async_sandbox import AsyncSandbox
from x07_sandbox.library.awaited import Awaited, awaited
from x07_sandbox.library.sandbox import Sandbox
from x07_sandbox.sessions.command import STREAMS, given_up
from x07_sandbox.sessions.model_text import ERRORS_MAX, OUTPUT_MAX, Answer, answer_of, bounded, reason_of, shown

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from x07_sandbox.sessions.command import Process

TIMEOUT_S: Final = 300.0
ANSWER_S: Final = 50.0
CONTENT_MAX: Final = 1_000_000  # characters of a file that a model sends
_TEXT_MAX: Final = 100_000  # characters of a command
_PATH_MAX: Final = 1000
_WORDS_MAX: Final = 1000
_SHOWN_MAX: Final = 200  # characters of a name in a sentence
_ENTRIES_MAX: Final = 500
_LINE_MAX: Final = 300  # characters of a line that was found
_READ_MAX: Final = OUTPUT_MAX * 3 // 4  # bytes of which base64 has as many as text may have
_EDIT_MAX: Final = 8 << 20  # bytes of a file to edit
_SKIP_MAX: Final = 64 << 20  # bytes before the first line to read
_CHUNK: Final = 1 << 20
_SEARCH_MAX: Final = 256 * 1024  # bytes of lines that were found
_SEARCH_S: Final = 120.0
_LOOK_S: Final = 60.0
# Portable, since an imported image may have BusyBox. $1: folder or file. $2: pattern of names. $3: pattern of text.
_SEARCH: Final = 'exec find -H "$1" -name .git -prune -o -type f -name "$2" -exec grep -nHE -e "$3" {} +'
# What a model asks first. Each line of the answer is for a name in _FACTS; then come the programs that are there.
_LOOK: Final = """[ ! -r /etc/os-release ] || . /etc/os-release; echo "${PRETTY_NAME:-Linux}"; uname -m; id -un; pwd
echo $(($(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo 0) >> 20)) MiB
for program; do command -v "$program" >/dev/null && echo "$program"; done; true"""
_FACTS: Final = ("system", "architecture", "user", "folder", "memory")
PROGRAMS: Final = (
    *("bash", "python3", "pip", "gcc", "make", "node", "npm", "perl", "git", "curl", "wget", "rg", "jq", "ps", "less"),
    *("patch", "tar", "unzip", "zip", "xz", "file", "tree", "sqlite3", "vi", "nano"),
)
"""Programs that models like to use."""
_PERSON: Final = "The person who set this up can: "
_ADVICE: Final = {
    errno.ENOENT: "Paths are those of the sandbox, not of the host.",
    errno.EROFS: "Write below the working folder, or in /tmp.",
    errno.EACCES: "Use files below the working folder, or in /tmp.",
    errno.EISDIR: "Use the tool that lists a folder.",
}

Path = Annotated[
    str, "A path in the sandbox, absolute or below its working folder.", Meta(min_length=1, max_length=_PATH_MAX)
]
Words = Annotated[list[str], "The program and its arguments.", Meta(min_length=1, max_length=_WORDS_MAX)]
Seconds = Annotated[float, "Kill it after this many seconds; 0 for the usual limit.", Meta(ge=0)]
Folder = Annotated[str, "The folder to run it in; empty for the working folder.", Meta(max_length=_PATH_MAX)]
Number = Annotated[int, "The number that the answer of run or shell has.", Meta(ge=1)]
Base64 = Annotated[bool, "The content is base64, for files that are not text."]


class CallError(Exception):
    """A call is wrong, or cannot be carried out. The text tells the model why, and what to do.

    untrusted: text that a guest may have chosen, for a part of its own.
    """

    def __init__(self, text: str, untrusted: str = "") -> None:
        super().__init__(text, untrusted)

    @property
    def answer(self) -> Answer:
        """The answer to the call, for the model."""
        return Answer({"error": self.args[0]}, (("error", bounded(escaped(self.args[1]), ERRORS_MAX)),))


class Calls:
    """What the tools of one sandbox do: a public method for each, with annotations for its schema. Thread-safe.

    timeout_s: the time limit of each command; a model can only ask for less. answer_s: after this time a call answers
    that its command still runs. merge: whether standard error is part of standard output.
    """

    def __init__(
        self, sandbox: Sandbox, timeout_s: float = TIMEOUT_S, answer_s: float = ANSWER_S, *, merge: bool = True
    ) -> None:
        self._sandbox, self._timeout_s, self._answer_s, self._merge = sandbox, timeout_s, answer_s, merge
        self._running: dict[int, Process] = {}

    def run(
        self,
        argv: Words,
        stdin: Annotated[str, "Its standard input.", Meta(max_length=CONTENT_MAX)] = "",
        cwd: Folder = "",
        timeout_s: Seconds = 0,
    ) -> Answer:
        """Run a program in the sandbox without a shell, and return its exit code and output.

        If it takes long, the answer has its number: call wait or kill with it.
        """
        return self._command("cannot run the program", argv, stdin, cwd, timeout_s)

    def shell(
        self,
        command: Annotated[str, "Text for bash -c.", Meta(min_length=1, max_length=_TEXT_MAX)],
        cwd: Folder = "",
        timeout_s: Seconds = 0,
    ) -> Answer:
        """Run shell commands in the sandbox, and return their exit code and output.

        Files and background processes stay for the next call; variables and the current folder do not. Long output is
        returned as its beginning and end. If it takes long, the answer has its number: call wait or kill with it.
        """
        with errors("cannot run the command", self._sandbox):
            words = [self._sandbox._shell(), "-c", command]  # noqa: SLF001 - of this package
        return self._command("cannot run the command", words, "", cwd, timeout_s)

    def wait(self, command: Number) -> Answer:
        """Wait for a command that was still running, and return its exit code and output."""
        return self._collected(command, self._found(command))

    def kill(self, command: Number) -> Answer:
        """Kill a command that is still running, with its processes, and return its output."""
        process = self._found(command)
        with errors("cannot kill the command", self._sandbox):
            process.kill()
        return self._collected(command, process)

    def read(
        self,
        path: Path,
        line: Annotated[int, "The first line to return.", Meta(ge=1)] = 1,
        offset: Annotated[int, "The first byte to return, instead of a line.", Meta(ge=0, le=1 << 40)] = 0,
        base64: Annotated[bool, "Return exact bytes as base64, for files that are not text."] = False,  # noqa: FBT002
    ) -> Answer:
        """Read a part of a file in the sandbox. Control characters are escaped; use base64 for exact bytes."""
        files = self._sandbox.files
        with errors(f"cannot read {named(path)}", self._sandbox):
            size = files.stat(path).size
            at = self._start_of(path, line) if line > 1 and not offset else offset
            data = files.read(path, offset=at, max_bytes=_READ_MAX if base64 else OUTPUT_MAX)
        facts: dict[str, Any] = {"bytes_of_file": size}
        if base64:
            facts |= {"offset": at, "bytes": len(data)} | _rest("next_offset", at + len(data), size)
            return Answer(facts, (("content", b64.b64encode(data).decode()),))
        if b"\0" in data:
            return Answer(facts | {"kind": "binary", "next": "use base64 to get its bytes, or a program that knows it"})
        if not offset and at + len(data) < size and (whole := data.rpartition(b"\n")[0]):
            count = whole.count(b"\n") + 1
            facts |= {"lines": f"{line} to {line + count - 1}", "next_line": line + count}
            return Answer(facts, (("content", shown(whole, OUTPUT_MAX)),))
        return Answer(facts | _rest("next_offset", at + len(data), size), (("content", shown(data, OUTPUT_MAX)),))

    def write(
        self,
        path: Path,
        content: Annotated[str, "The content of the file.", Meta(max_length=CONTENT_MAX)],
        base64: Base64 = False,  # noqa: FBT002
    ) -> Answer:
        """Create or replace a file in the sandbox, and the folders above it."""
        try:
            data = b64.b64decode(content, validate=True) if base64 else content.encode()
        except binascii.Error as exc:
            raise CallError(f"the content is not base64: {exc}. Encode it, or leave base64 out.") from None
        with errors(f"cannot write {named(path)}", self._sandbox):
            self._sandbox.files.write(path, data)
        return Answer({"bytes": len(data)})

    def edit(
        self,
        path: Path,
        old: Annotated[str, "The exact text to replace.", Meta(min_length=1, max_length=_TEXT_MAX)],
        new: Annotated[str, "The text to put in its place.", Meta(max_length=CONTENT_MAX)],
        all: Annotated[bool, "Replace every occurrence, not the only one."] = False,  # noqa: A002, FBT002
    ) -> Answer:
        """Replace text in a file of the sandbox. The old text must occur exactly once, unless all is set."""
        before, after = old.encode(), new.encode()
        with errors(f"cannot edit {named(path)}", self._sandbox):
            data = self._sandbox.files.read(path, max_bytes=_EDIT_MAX + 1)
        if len(data) > _EDIT_MAX:
            raise CallError(f"{named(path)} has more than {_EDIT_MAX >> 20} MiB. Edit it with a program.")
        if not (count := data.count(before)):
            raise CallError(f"the old text is not in {named(path)}. Read it again: white space must match exactly.")
        if count > 1 and not all:
            raise CallError(f"the old text occurs {count} times in {named(path)}. Pass more of it, or set all.")
        with errors(f"cannot edit {named(path)}", self._sandbox):
            self._sandbox.files.write(path, data.replace(before, after))
        return Answer({"replaced": count})

    def list(self, path: Path = ".") -> Answer:
        """List a folder of the sandbox."""
        with errors(f"cannot list {named(path)}", self._sandbox):
            found = self._sandbox.files.list(path)
        lines = [json.dumps({"name": one.name, "kind": one.kind, "size": one.size}) for one in found[:_ENTRIES_MAX]]
        facts = {"entries": len(found), "left_out": len(found) - len(lines)}
        return Answer(facts, (("entries", bounded("\n".join(lines), OUTPUT_MAX)),))

    def search(
        self,
        pattern: Annotated[str, "An extended regular expression.", Meta(min_length=1, max_length=_PATH_MAX)],
        path: Path = ".",
        name: Annotated[str, "A pattern for the names of files, such as *.py.", Meta(max_length=_PATH_MAX)] = "*",
    ) -> Answer:
        """Search the text of files in a folder of the sandbox. Return the matching lines, with path and number."""
        place = path if path.startswith("/") else posixpath.join(".", path)  # no option of find
        with errors(f"cannot search {named(path)}", self._sandbox):
            ended = self._sandbox.exec(
                ["sh", "-c", _SEARCH, "search", place, name, pattern],
                timeout_s=min(_SEARCH_S, self._timeout_s),
                max_output_bytes=_SEARCH_MAX,
            )
        lines = [shown(line, _LINE_MAX) for line in ended.stdout.splitlines()]
        facts = {"lines": len(lines)} | ({"more": "yes, and they are not shown"} if ended.truncated else {})
        if ended.stderr or ended.reason_code != "exited":
            facts |= {"problem": reason_of(ended) or ended.outcome}
        text = bounded("\n".join(lines), OUTPUT_MAX)
        return Answer(facts, (("found", text), ("problem", shown(ended.stderr, _LINE_MAX * 4))))

    def call(self, tool: str, arguments: Mapping[str, Any] | str) -> str:
        """Carry out a call, and return the text for the model. arguments: as a dict, or as the model's JSON."""
        try:
            return self.answer(tool, msgspec.structs.asdict(arguments_of(tool, arguments))).text()
        except CallError as exc:
            return exc.answer.text()

    def answer(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        """Carry out a call with checked arguments. Raises CallError, and SandboxError if the sandbox has ended."""
        found: Answer = getattr(self, tool)(**arguments)
        return found

    def about(self) -> str:
        """Return what a model should know of the sandbox: system, user, folder, memory, programs, and missing ones.

        Each has a line. All of it is untrusted text. Raises SandboxError, and CallError if the sandbox cannot tell.
        """
        with errors("cannot look around in the sandbox", self._sandbox):
            ended = self._sandbox.exec(["sh", "-c", _LOOK, "look", *PROGRAMS], timeout_s=_LOOK_S, max_output_bytes=4096)
        lines = [escaped(line[:_SHOWN_MAX]) for line in ended.stdout.decode("utf-8", "surrogateescape").splitlines()]
        found = dict(zip(_FACTS, lines, strict=False))
        if found.get("memory") == "0 MiB":  # it does not show its limit
            del found["memory"]
        there = set(lines[len(_FACTS) :])
        found["programs"] = ", ".join(name for name in PROGRAMS if name in there)
        found["missing"] = ", ".join(name for name in PROGRAMS if name not in there)
        return "\n".join(f"{name}: {value}" for name, value in found.items() if value)

    def wake(self) -> None:
        """Have calls look whether somebody still waits for them."""
        self._sandbox.wake()

    def _command(self, what: str, argv: Sequence[str], stdin: str, cwd: str, timeout_s: float) -> Answer:
        limit_s = min(timeout_s or self._timeout_s, self._timeout_s)
        with errors(what, self._sandbox):
            process = self._sandbox.start(argv, cwd=cwd or None, timeout_s=limit_s, merge=self._merge)
            process.feed(stdin.encode())
            process.close_stdin()
        return self._collected(process.id, process)

    def _collected(self, number: int, process: Process) -> Answer:
        """Wait for the end of a command. Return what to tell the model about it, or that it still runs."""
        self._running[number] = process
        try:
            ended = process.collect(OUTPUT_MAX, "both", None, self._answer_s)
        except TimeoutError:
            if not given_up():
                facts = {"state": "running", "command": number, "next": "call wait with this number, or kill"}
                parts = ((name, shown(process.kept(name), ERRORS_MAX)) for name in STREAMS)
                return Answer(facts, tuple(parts))
            process.kill()  # no model has its number
            raise
        except BaseException:
            process.kill()
            raise
        self._running.pop(number, None)
        return answer_of(ended, ended.stdout, ended.stderr, OUTPUT_MAX)

    def _found(self, number: int) -> Process:
        if (process := self._running.get(number)) is not None:
            return process
        raise CallError(f"no command with the number {number} is running. Start it again if needed.")

    def _start_of(self, path: str, line: int) -> int:
        """Return the offset at which a line starts, or the size of the file if it has fewer lines."""
        at, left = 0, line - 1
        while left and at < _SKIP_MAX and (data := self._sandbox.files.read(path, offset=at, max_bytes=_CHUNK)):
            if (count := data.count(b"\n")) < left:
                left, at = left - count, at + len(data)
                continue
            for _ in range(left):
                end = data.index(b"\n") + 1
                data, at = data[end:], at + end
            return at
        if left and at >= _SKIP_MAX:
            raise CallError(f"line {line} is more than {_SKIP_MAX >> 20} MiB into the file. Use offset, or a program.")
        return at


class AsyncCalls(Awaited[Calls]):
    """What the tools of a sandbox for asyncio do, which may be opened later. Its arguments are those of `Calls`."""

    def __init__(self, sandbox: AsyncSandbox, *words: float, merge: bool = True) -> None:
        self._sandbox, self._words, self._merge = sandbox, words, merge
        self._calls: Calls | None = None

    @property
    def _target(self) -> Calls:
        self._calls = self._calls or Calls(self._sandbox._target, *self._words, merge=self._merge)  # noqa: SLF001 - as above
        return self._calls

    answer = awaited(Calls.answer)
    call = awaited(Calls.call)
    about = awaited(Calls.about)


def _rest(name: str, at: int, size: int) -> dict[str, int]:
    return {name: at} if at < size else {}


@contextlib.contextmanager
def errors(what: str, sandbox: Sandbox | AsyncSandbox | None = None) -> Iterator[None]:
    """Turn errors into CallError, except that of a sandbox that has ended.

    The advice of a SandboxError is for the people who set the options, unless the model's call is wrong.
    """
    try:
        yield
    except TimeoutError:
        raise CallError(f"{what}: there was no answer in time. Try again later.") from None
    except OSError as exc:
        advice = _ADVICE.get(exc.errno or 0, "Check the path.")
        raise CallError(f"{what}: {exc.strerror or 'it failed'}. {advice}", "" if exc.strerror else str(exc)) from exc
    except SandboxError as exc:
        if sandbox is not None and not sandbox.alive:
            raise
        if isinstance(exc, UsageError | RefusedError):  # about what the model or that person asked for
            fix = f"{exc.fix}{exc.stop}" if exc.code == "usage" else f"{_PERSON}{exc.fix}."
            raise CallError(f"{what}: {exc.what}: {exc.why}. {fix}") from exc
        raise CallError(f"{what}: {exc.what}. {_PERSON}{exc.fix}.", exc.why) from exc


def named(text: str) -> str:
    """Return an untrusted name for a sentence: its beginning, on one line."""
    return escaped(text[:_SHOWN_MAX])


# schemas


def _hints(name: str) -> dict[str, Any]:
    """Return the annotations of a tool's arguments."""
    found = get_type_hints(getattr(Calls, name), include_extras=True)
    return {key: value for key, value in found.items() if key != "return"}


def _field(name: str, hint: Any, default: Any) -> tuple[Any, ...]:  # noqa: ANN401 - of an annotation
    about, *limits = hint.__metadata__
    field = name, Annotated[hint.__origin__, Meta(description=about), *limits]
    return field if default is inspect.Parameter.empty else (*field, default)


def struct_of(name: str, *more: tuple[str, Any]) -> type[msgspec.Struct]:
    """Return a type with the arguments of a tool as fields, after *more* fields."""
    given = inspect.signature(getattr(Calls, name)).parameters
    fields = [_field(key, hint, given[key].default) for key, hint in _hints(name).items()]
    return msgspec.defstruct(name, [*more, *fields], kw_only=True)


TOOLS: Final = ("run", "shell", "wait", "kill", "read", "write", "edit", "list", "search")
ARGUMENTS: Final = {name: struct_of(name) for name in TOOLS}


def schema_of(model: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of the arguments of a tool."""
    _, parts = msgspec.json.schema_components([model])
    found = {name: value for name, value in parts[model.__name__].items() if name not in {"title", "description"}}
    return found | {"additionalProperties": False}


def arguments_of(
    tool: str, given: Mapping[str, Any] | str, models: Mapping[str, type[msgspec.Struct]] = ARGUMENTS, about: str = ""
) -> Any:  # noqa: ANN401 - one of the models
    """Check the arguments of a call and return them, with defaults. Raises CallError.

    given: a dict, or a model's JSON. about: advice for a model that passed an unknown argument.
    """
    if (model := models.get(tool)) is None:
        raise CallError(f"there is no tool {named(tool)}. The tools are {', '.join(models)}.")
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given or "{}", type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise CallError(f"the arguments of {tool} are no JSON object: {named(str(exc))}.") from None
    if not isinstance(given, Mapping):
        raise CallError(f"the arguments of {tool} are no JSON object.")
    known = model.__struct_fields__
    if unknown := sorted(given.keys() - set(known)):
        listed = ", ".join(named(name) for name in unknown[:5])
        raise CallError(f"{tool} has no argument {listed}; it has {', '.join(known) or 'none'}. {about}".rstrip())
    for name, value in given.items():
        if any("\ud800" <= char <= "\udfff" for text in _texts(value) for char in text):
            raise CallError(f"{name} contains half of a surrogate pair. Send valid Unicode, or use base64.")
    try:
        return msgspec.convert(dict(given), model)
    except msgspec.ValidationError as exc:
        raise CallError(f"wrong arguments for {tool}: {named(str(exc))}.") from None


def _texts(value: object) -> Iterator[str]:
    return (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


# functions

_F = TypeVar("_F", bound="Callable[..., Any]")


def _described(name: str, function: _F) -> _F:
    """Give a function the name, signature and docstring of a tool."""
    given = inspect.signature(getattr(Calls, name)).parameters
    hints = _hints(name)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = inspect.getdoc(getattr(Calls, name))
    function.__annotations__ = hints | {"return": str}
    parameters = [given[key].replace(annotation=hint) for key, hint in hints.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=str)  # type: ignore[attr-defined]
    return function


def _function(call: Callable[..., str], name: str) -> Callable[..., str]:
    def function(*words: Any, **more: Any) -> str:  # noqa: ANN401 - see `_described`
        return call(name, dict(zip(ARGUMENTS[name].__struct_fields__, words, strict=False)) | more)

    return function


def _async_function(call: Callable[..., Coroutine[Any, Any, str]], name: str) -> Callable[..., Any]:
    async def function(*words: Any, **more: Any) -> str:  # noqa: ANN401 - see `_described`
        return await call(name, dict(zip(ARGUMENTS[name].__struct_fields__, words, strict=False)) | more)

    return function


class Tools(Sequence[_F], Generic[_F]):
    """The tools of a sandbox: functions with names, signatures and docstrings, as agent frameworks want them.

    definitions: for a model without a framework. call: carries out its calls. about: tells it where it is.
    """

    def __init__(self, functions: Mapping[str, _F], call: _F, about: _F) -> None:
        self._functions = [_described(name, function) for name, function in functions.items()]
        self._call, self._about = call, about

    @property
    def definitions(self) -> Sequence[dict[str, Any]]:
        """What a model must know of each tool: its name, its description, and the JSON Schema of its parameters."""
        return [
            {"name": each.__name__, "description": each.__doc__, "parameters": schema_of(ARGUMENTS[each.__name__])}
            for each in self._functions
        ]

    @property
    def call(self) -> _F:
        """A function that carries out a call: `call(name, arguments)`, with arguments as a dict or JSON text.

        It returns text for the model, also if the call is wrong or fails. Raises SandboxError if the sandbox has ended.
        """
        return self._call

    @property
    def about(self) -> _F:
        """A function that returns facts about the sandbox, for a prompt: `about()`.

        The facts are system, architecture, user, folder, memory, and common programs that are there or missing. All of
        it is untrusted text.
        """
        return self._about

    @overload
    def __getitem__(self, index: int) -> _F: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_F]: ...

    def __getitem__(self, index: int | slice) -> _F | Sequence[_F]:
        return self._functions[index]

    def __len__(self) -> int:
        return len(self._functions)


@overload
def tools(
    sandbox: Sandbox, *, timeout_s: float = ..., answer_s: float = ..., merge: bool = ...
) -> Tools[Callable[..., str]]: ...


@overload
def tools(
    sandbox: AsyncSandbox, *, timeout_s: float = ..., answer_s: float = ..., merge: bool = ...
) -> Tools[Callable[..., Coroutine[Any, Any, str]]]: ...


def tools(
    sandbox: Sandbox | AsyncSandbox, *, timeout_s: float = TIMEOUT_S, answer_s: float = ANSWER_S, merge: bool = True
) -> Tools[Any]:
    """Return the tools of a sandbox for a language model: run, shell, wait, kill, read, write, edit, list and search.

    Each is a function that returns text for the model, to give to an agent framework. The first line of the text has
    facts; what follows is untrusted, with control characters escaped, and bounded. A call that is wrong or fails
    returns an error as text. SandboxError is raised if the sandbox has ended. Those of an AsyncSandbox are coroutine
    functions.

    timeout_s: the time limit of each command; the model can only ask for less. answer_s: after this time a call answers
    that its command still runs, with a number for wait and kill. merge: whether standard error is part of standard
    output, in order.
    """
    if isinstance(sandbox, Sandbox):
        calls = Calls(sandbox, timeout_s, answer_s, merge=merge)
        return Tools({name: _function(calls.call, name) for name in TOOLS}, calls.call, calls.about)
    later = AsyncCalls(sandbox, timeout_s, answer_s, merge=merge)
    return Tools({name: _async_function(later.call, name) for name in TOOLS}, later.call, later.about)
