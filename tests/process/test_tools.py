"""Tools of a sandbox for a language model: their answers, errors, schemas, and functions for agent frameworks."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import threading
import time
from typing import Any, get_type_hints

import jsonschema
import pytest

from x07_sandbox import AsyncSandbox, Sandbox, SandboxError, tools

NAMES = ["run", "shell", "wait", "kill", "read", "write", "edit", "list", "search"]
ESC = "\x1b"

pytestmark = pytest.mark.usefixtures("only_os")


@pytest.fixture
def sandbox(shared: Sandbox) -> Sandbox:
    """The open sandbox that no test closes."""
    return shared


def call(sandbox: Sandbox, tool: str, arguments: dict[str, Any] | str, **options: Any) -> str:  # noqa: ANN401 - of tools
    """Carry out one call as a model's."""
    return tools(sandbox, **options).call(tool, arguments)


def facts(answer: str) -> dict[str, str]:
    """The facts in the first line of an answer."""
    return dict(fact.split(": ", 1) for fact in answer.split("\n", 1)[0].split("; "))


def test_commands_answer_with_facts_first_and_output_after(sandbox: Sandbox) -> None:
    """A model gets the outcome and exit code in the first line, and below it output that cannot imitate it."""
    assert call(sandbox, "run", {"argv": ["echo", "a b"]}) == "outcome: ok; exit code: 0\noutput:\na b\n"
    assert call(sandbox, "run", {"argv": ["cat"], "stdin": "given"}).endswith("output:\ngiven")
    answer = call(sandbox, "shell", '{"command": "echo out; echo err >&2; exit 3"}')
    assert answer == "outcome: failed; exit code: 3; reason: the program exited with status 3\noutput:\nout\nerr\n"
    apart = call(sandbox, "shell", {"command": "echo out; echo err >&2; exit 3"}, merge=False)
    assert apart.endswith("stdout:\nout\n\nstderr:\nerr\n")
    assert call(sandbox, "run", {"argv": ["pwd"], "cwd": "/tmp"}).endswith("\n/tmp\n")  # noqa: S108 - the guest's
    assert call(sandbox, "shell", {"command": "true"}) == "outcome: ok; exit code: 0"


def test_output_is_escaped_and_bounded(sandbox: Sandbox) -> None:
    """Control characters are visible, and of long output the beginning and the end are returned."""
    answer = call(sandbox, "shell", {"command": r"printf '\033[31mred\0\377\n'; seq 100000"})
    assert r"\x1b[31mred\x00\xff" in answer
    assert ESC not in answer
    assert "bytes left out" in answer
    assert answer.endswith("100000\n")
    assert len(answer) < 21_000


def test_an_ended_command_has_text_for_a_model(sandbox: Sandbox) -> None:
    """`Ended.for_model` has facts, standard output and error within the limit, and refuses a wrong limit."""
    ended = sandbox.shell("seq 10000; seq 5000 >&2; exit 1")
    answer = ended.for_model(max_bytes=1000)
    assert answer.startswith("outcome: failed; exit code: 1; reason: the program exited with status 1\nstdout:\n1\n2\n")
    assert answer.endswith("5000\n")
    assert len(answer) < 1300
    with pytest.raises(SandboxError, match="max_bytes"):
        ended.for_model(max_bytes=0)


def test_a_timeout_and_a_signal_are_told_as_reasons(sandbox: Sandbox) -> None:
    """A command that was ended says why, with the output until then."""
    answer = call(sandbox, "shell", {"command": "echo first; sleep 60", "timeout_s": 0.5})
    assert answer.startswith("outcome: timeout; exit code: None; reason: ")
    assert answer.endswith("output:\nfirst\n")
    assert "reason: " in call(sandbox, "shell", {"command": "kill -SEGV $$"})
    slow = call(sandbox, "shell", {"command": "sleep 60", "timeout_s": 100}, timeout_s=0.5)
    assert slow.startswith("outcome: timeout")  # a model may only ask for less


def test_a_long_command_can_be_waited_for_and_killed(sandbox: Sandbox) -> None:
    """A call answers before its command ends, with a number by which the model waits for it or kills it."""
    box = tools(sandbox, answer_s=0.3)
    first = facts(box.call("shell", {"command": "echo begun; while [ ! -e go ]; do sleep 0.05; done; echo done"}))
    assert first["state"] == "running"
    number = int(first["command"])
    assert facts(box.call("wait", {"command": number}))["state"] == "running"
    assert "begun" in box.call("wait", {"command": number})
    box.call("write", {"path": "go", "content": ""})
    while (answer := box.call("wait", {"command": number})).startswith("state"):
        pass
    assert answer == "outcome: ok; exit code: 0\noutput:\nbegun\ndone\n"
    assert f"no command with the number {number} is running" in box.call("wait", {"command": number})
    number = int(facts(box.call("run", {"argv": ["sleep", "600"]}))["command"])
    assert box.call("kill", {"command": number}).startswith("outcome: signalled")
    assert "no command" in box.call("kill", {"command": number})


def test_files_are_written_read_edited_listed_and_searched(sandbox: Sandbox) -> None:
    """A model writes a file, reads it by lines, replaces exact text once, and finds lines in a folder."""
    box = tools(sandbox)
    assert box.call("write", {"path": "src/a.py", "content": "x = 1\ny = 1\nx = 2\n"}) == "bytes: 18"
    assert box.call("read", {"path": "src/a.py"}) == "bytes of file: 18\ncontent:\nx = 1\ny = 1\nx = 2\n"
    assert box.call("read", {"path": "src/a.py", "line": 3}).endswith("content:\nx = 2\n")
    assert box.call("read", {"path": "src/a.py", "line": 9}) == "bytes of file: 18"
    assert box.call("edit", {"path": "src/a.py", "old": "y = 1", "new": "y = 3"}) == "replaced: 1"
    assert "occurs 2 times" in box.call("edit", {"path": "src/a.py", "old": "x = ", "new": "z = "})
    assert box.call("edit", {"path": "src/a.py", "old": "x = ", "new": "z = ", "all": True}) == "replaced: 2"
    assert "not in src/a.py" in box.call("edit", {"path": "src/a.py", "old": "x = ", "new": ""})
    assert sandbox.files.read("src/a.py") == b"z = 1\ny = 3\nz = 2\n"
    assert '{"name": "a.py", "kind": "file", "size": 18}' in box.call("list", {"path": "src"})
    box.call("write", {"path": "src/b.txt", "content": "z = 5"})
    found = box.call("search", {"pattern": "^z = [0-9]", "path": "src"})
    assert sorted(found.split("\n")[2:]) == ["./src/a.py:1:z = 1", "./src/a.py:3:z = 2", "./src/b.txt:1:z = 5"]
    assert facts(box.call("search", {"pattern": "z", "path": "src", "name": "*.txt"}))["lines"] == "1"
    assert box.call("search", {"pattern": "nowhere", "path": "src"}) == "lines: 0"


def test_an_edit_keeps_the_mode_of_a_file_and_bytes_that_are_no_text(sandbox: Sandbox) -> None:
    """Replacing text in a script leaves it executable, and leaves its other bytes as they are."""
    sandbox.files.write("script", b"#!/bin/sh\n# \xff\necho old\n", mode=0o755)
    assert call(sandbox, "edit", {"path": "script", "old": "old", "new": "new"}) == "replaced: 1"
    assert sandbox.files.read("script") == b"#!/bin/sh\n# \xff\necho new\n"
    assert sandbox.files.stat("script").mode == 0o755


def test_long_files_are_read_in_parts(sandbox: Sandbox) -> None:
    """Each answer says where the next part begins, by line or by byte, and all parts are the whole file."""
    box = tools(sandbox)
    lines = "".join(f"line {number} of the file\n" for number in range(1, 4001))
    sandbox.files.write("long.txt", lines.encode())
    found, line = "", 1
    while line:
        answer = box.call("read", {"path": "long.txt", "line": line})
        found += answer.split("content:\n", 1)[1].rstrip("\n") + "\n"
        line = int(facts(answer).get("next line", 0))
    assert found == lines, "parts differ from the file"
    sandbox.files.write("one-line", b"x" * 50_000)
    answer = box.call("read", {"path": "one-line"})
    assert facts(answer) == {"bytes of file": "50000", "next offset": "20000"}
    rest = box.call("read", {"path": "one-line", "offset": 45_000})
    assert rest == "bytes of file: 50000\ncontent:\n" + "x" * 5000


def test_binary_files_are_named_and_not_printed(sandbox: Sandbox) -> None:
    """A file with zero bytes is said to be binary; base64 gives its bytes, and writes them."""
    box, data = tools(sandbox), bytes(range(256))
    encoded = base64.b64encode(data).decode()
    assert box.call("write", {"path": "data.bin", "content": encoded, "base64": True}) == "bytes: 256"
    answer = box.call("read", {"path": "data.bin"})
    assert answer.startswith("bytes of file: 256; kind: binary; next: ")
    assert "\n" not in answer
    assert box.call("read", {"path": "data.bin", "base64": True}).endswith(f"content:\n{encoded}")
    assert "is not base64" in box.call("write", {"path": "data.bin", "content": "?", "base64": True})


WRONG: dict[str, tuple[str, Any, str]] = {
    "unknown tool": ("rm", {}, "there is no tool rm. The tools are run, shell,"),
    "unknown argument": ("read", {"path": "a", "policy": "x"}, "read has no argument policy; it has path, line,"),
    "missing argument": ("read", {}, "wrong arguments for read: Object missing required field `path`"),
    "wrong type": ("shell", {"command": 5}, "wrong arguments for shell: Expected `str`, got `int`"),
    "no JSON": ("shell", "{", "the arguments of shell are no JSON object"),
    "JSON of another kind": ("shell", "[1]", "the arguments of shell are no JSON object"),
    "no arguments": ("shell", None, "the arguments of shell are no JSON object"),
    "half a pair": ("shell", {"command": "\ud800"}, "half of a surrogate pair"),
    "half a pair in a list": ("run", {"argv": ["\udfff"]}, "half of a surrogate pair"),
    "empty": ("run", {"argv": []}, "wrong arguments for run"),
    "negative time": ("shell", {"command": "ls", "timeout_s": -1}, "wrong arguments for shell"),
    "no such file": ("read", {"path": "/none"}, "cannot read /none: No such file or directory. Paths are those of"),
    "a folder": ("read", {"path": "/"}, "cannot read /: Is a directory. Use the tool that lists a folder."),
    "read-only": ("write", {"path": "/usr/x", "content": ""}, "cannot write /usr/x: "),
    "a zero byte": ("shell", {"command": "echo \0"}, "cannot run the command: "),
    "a wrong pattern": ("search", {"pattern": "("}, "problem: "),
    "a path like an option": ("search", {"pattern": "x", "path": "-delete"}, "problem: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_answered_with_what_to_do(sandbox: Sandbox, case: str) -> None:
    """A call that is wrong or fails is answered with one sentence about why, and the sandbox goes on."""
    tool, arguments, wanted = WRONG[case]
    answer = call(sandbox, tool, arguments)
    assert wanted in answer
    assert "Traceback" not in answer
    assert call(sandbox, "shell", {"command": "echo on"}).endswith("on\n")


def test_a_name_with_control_characters_is_escaped(sandbox: Sandbox) -> None:
    """Paths in errors, names in lists and lines that were found show no control character."""
    box = tools(sandbox)
    name = f"odd{ESC}[2J\n.txt"
    box.call("write", {"path": f"odd/{name}", "content": f"hit{ESC}[2J"})
    for answer in (
        box.call("list", {"path": "odd"}),
        box.call("search", {"pattern": "hit", "path": "odd"}),
        box.call("read", {"path": f"no{ESC}"}),
        box.call("read", {"path": f"odd/{name}"}),
    ):
        assert ESC not in answer


def test_a_lost_sandbox_raises() -> None:
    """A model cannot mend a sandbox that has ended, so its program gets the error."""
    with Sandbox() as other:
        box = tools(other)
        other.close()
        with pytest.raises(SandboxError, match="it was closed"):
            box.call("shell", {"command": "ls"})
        with pytest.raises(SandboxError, match="it was closed"):
            box.call("read", {"path": "x"})


def test_a_model_can_be_told_where_it_is(sandbox: Sandbox) -> None:
    """A program can ask for facts about the sandbox: system, user, folder, and common programs, also missing ones."""
    about = dict(line.split(": ", 1) for line in tools(sandbox).about().split("\n"))
    assert {"system", "architecture", "user", "folder", "programs"} <= about.keys()
    assert about["folder"] == sandbox.shell("pwd").stdout.decode().strip()
    assert "bash, python3" in about["programs"]
    there = about["programs"].split(", ") + about.get("missing", "").split(", ")
    assert {"git", "curl", "rg", "node"} <= set(there)
    for name in ("perl", "git"):
        assert (name in about["programs"].split(", ")) == sandbox.shell(f"command -v {name}").ok


def test_functions_have_what_frameworks_read(sandbox: Sandbox) -> None:
    """Each tool is a function with a name, a docstring, typed arguments with descriptions, and text as its result."""
    box = tools(sandbox)
    assert [each.__name__ for each in box] == NAMES
    assert len(box) == len(NAMES)
    for each in box:
        hints = get_type_hints(each, include_extras=True)
        assert hints.pop("return") is str
        assert list(inspect.signature(each).parameters) == list(hints)
        assert all(isinstance(hint.__metadata__[0], str) for hint in hints.values())
        assert each.__doc__
    shell = box[NAMES.index("shell")]
    assert shell("echo 1", timeout_s=9) == shell(command="echo 1") == "outcome: ok; exit code: 0\noutput:\n1\n"
    assert shell() == box.call("shell", {})


def test_definitions_are_json_schemas(sandbox: Sandbox) -> None:
    """A program without a framework gets names, descriptions and valid schemas, which describe each argument."""
    definitions = json.loads(json.dumps(list(tools(sandbox).definitions)))
    assert [one["name"] for one in definitions] == NAMES
    for one in definitions:
        jsonschema.Draft202012Validator.check_schema(one["parameters"])
        assert one["parameters"]["additionalProperties"] is False
        assert all(field["description"] for field in one["parameters"]["properties"].values())
    (shell,) = (one["parameters"] for one in definitions if one["name"] == "shell")
    assert shell["required"] == ["command"]
    jsonschema.validate({"command": "ls", "timeout_s": 5}, shell)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"command": "ls", "policy": "x"}, shell)


def test_several_calls_at_once(sandbox: Sandbox) -> None:
    """Frameworks call tools from several threads: each gets its own answer."""
    box, answers = tools(sandbox), {}

    def ask(number: int) -> None:
        answers[number] = box.call("shell", {"command": f"sleep 0.2; echo {number}"})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"outcome: ok; exit code: 0\noutput:\n{number}\n" for number in range(8)}


def test_tools_of_an_asynchronous_sandbox_are_coroutine_functions() -> None:
    """With AsyncSandbox, tools are awaited, may be made before it is open, and a cancelled call kills its command."""

    async def main() -> None:
        sandbox = AsyncSandbox()
        box = tools(sandbox)
        assert all(inspect.iscoroutinefunction(each) for each in box)
        assert inspect.iscoroutinefunction(box.call)
        async with sandbox:
            shell = box[NAMES.index("shell")]
            assert await shell("echo 1") == "outcome: ok; exit code: 0\noutput:\n1\n"
            assert await box.call("write", '{"path": "a", "content": "b"}') == "bytes: 1"
            task = asyncio.create_task(shell("echo $$ > pid; exec sleep 600"))
            waited = await shell("until [ -s pid ]; do sleep 0.05; done; kill -0 $(cat pid); echo $?")
            assert waited.endswith("\n0\n")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert "gone" in await shell("while kill -0 $(cat pid) 2>/dev/null; do sleep 0.05; done; echo gone")

    asyncio.run(main())


def test_a_hostile_file_that_grows_is_read_within_bounds(sandbox: Sandbox) -> None:
    """A file that the program changes while it is read gives a bounded answer."""
    box = tools(sandbox)
    writer = sandbox.start(["sh", "-c", "while :; do seq 100000 >> grow; done"], timeout_s=30)
    while not sandbox.files.exists("grow"):
        time.sleep(0.01)
    for line in (1, 5000):
        assert len(box.call("read", {"path": "grow", "line": line})) < 21_000
    writer.kill()
    writer.wait()
