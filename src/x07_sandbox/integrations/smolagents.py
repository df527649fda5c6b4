"""An executor of smolagents that is a Python process in a sandbox: `CodeAgent(..., executor=X07Executor(sandbox))`."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from smolagents import AgentError, AgentLogger, LogLevel
from smolagents.local_python_executor import CodeOutput
from smolagents.remote_executors import RemotePythonExecutor

from x07_sandbox import SandboxError

if TYPE_CHECKING:
    from x07_sandbox import Process, Sandbox

    StreamName = Literal["stdout", "stderr"]

TIMEOUT_S: Final = 60.0
LOGS_MAX: Final = 50_000
_ANSWER_MAX: Final = 16 << 20
# Of the tool final_answer: smolagents copies these imports, which may fail, out of their try statements.
_OPTIONAL: Final = ("import numpy", "import PIL", "from PIL")
# Reads code as JSON lines. Prints go to standard output, and what comes of the code to standard error.
_PYTHON: Final = """
import ast, json, os, sys, traceback
requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(2), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(1, 2)
names = {"__name__": "__main__"}
for line in requests:
    (end, code), answer, last = json.loads(line), {}, None
    try:
        tree = ast.parse(code, "<code>")
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, "<code>", "exec"), names)
        if last is not None and (value := eval(compile(last, "<code>", "eval"), names)) is not None:
            answer = {"output": repr(value)[:50000]}
    except BaseException as error:
        if type(error).__name__ == "FinalAnswerException":
            answer = {"final": error.value}
        else:
            frames = error.__traceback__ and error.__traceback__.tb_next
            answer = {"error": "".join(traceback.format_exception(type(error), error, frames))[-10000:]}
    os.write(1, end.encode())
    print(json.dumps(answer), file=answers, flush=True)
"""


class X07Executor(RemotePythonExecutor):
    """Runs the code of an agent in one Python process, which keeps its names. It does not close the sandbox.

    timeout_s: after this time the process is killed. The next one has the agent's tools and variables, and no others.
    """

    def __init__(self, sandbox: Sandbox, *, timeout_s: float = TIMEOUT_S, logger: AgentLogger | None = None) -> None:
        super().__init__([], logger or AgentLogger(LogLevel.ERROR), allow_pickle=False)  # it would be run on the host
        self._sandbox, self._timeout_s = sandbox, timeout_s
        self._process: Process | None = None
        self._setup: list[str] = []

    def __call__(self, code_action: str) -> CodeOutput:
        """Run the code of the agent. Raises AgentError if it fails."""
        if self._process is None:
            self._process = self._sandbox.start(["python3", "-u", "-c", _PYTHON])
            for code in self._setup:
                self._run(self._process, code)
        return self._run(self._process, code_action)

    def run_code_raise_errors(self, code: str) -> CodeOutput:
        """Run code that defines the agent's tools or variables, now and in each process from now on."""
        code = "\n".join(_soft(line) if line.startswith(_OPTIONAL) else line for line in code.split("\n"))
        answer = self(code)
        self._setup = [*(each for each in self._setup if each != code), code]
        return answer

    def install_packages(self, additional_imports: list[str]) -> list[str]:
        """Install nothing: the packages of tools must be in the image."""
        return additional_imports

    def cleanup(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _run(self, process: Process, code: str) -> CodeOutput:
        end = secrets.token_hex(16)
        deadline = time.monotonic() + self._timeout_s
        try:
            process.write(json.dumps([end, code]).encode() + b"\n")
            logs = _until(process, "stdout", end.encode(), LOGS_MAX, deadline).decode(errors="replace")
            answer: dict[str, Any] = json.loads(_until(process, "stderr", b"\n", _ANSWER_MAX, deadline))
            output = self._deserialize_final_answer(answer["final"]) if "final" in answer else answer.get("output")
        except SandboxError:
            raise
        except Exception as exc:  # whatever the program in the sandbox has answered
            self.cleanup()
            why = f"it took more than {self._timeout_s} s" if isinstance(exc, TimeoutError) else exc
            raise AgentError(f"The Python process ended: {why}. All variables are lost.", self.logger) from exc
        if "error" in answer:
            raise AgentError(f"{logs}\n{answer['error']}", self.logger)
        return CodeOutput(output=output, logs=logs, is_final_answer="final" in answer)


def _soft(line: str) -> str:
    return f"try:\n    {line}\nexcept ImportError:\n    pass"


def _until(process: Process, stream: StreamName, end: bytes, most: int, deadline: float) -> bytes:
    """Return what arrives on a stream before *end*, at most *most* bytes of it. Raises TimeoutError, EOFError."""
    kept, tail = bytearray(), b""
    while end not in tail:
        piece = process.read(stream, max(0.0, deadline - time.monotonic()))
        if not piece:
            raise EOFError(process.wait().reason)
        tail = tail[-len(end) :] + piece
        kept += piece[: most + len(end) - len(kept)]
    return bytes(kept.partition(end)[0][:most])
