"""An environment of mini-swe-agent that is a sandbox.

mini -c mini.yaml -c environment.environment_class=x07_sandbox.integrations.mini_swe_agent.X07Environment
"""

from __future__ import annotations

import functools
from typing import Any

from minisweagent.exceptions import Submitted
from minisweagent.utils.serialize import recursive_merge
from pydantic import BaseModel, ConfigDict

from x07_sandbox import Sandbox, SandboxError
from x07_sandbox.integrations import require_usage, was_stopped

_SUBMITTED = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
_UNAME = ("system", "release", "version", "machine")


class X07EnvironmentConfig(BaseModel):
    """What the configuration of an agent may set. timeout: of a command, in seconds. All else: see `Sandbox`."""

    model_config = ConfigDict(extra="forbid")

    cwd: str = ""
    timeout: int = 30
    env: dict[str, str] = {}
    policy: str | None = None
    image: str | None = None
    workdir: str | None = None
    allow_hosts: tuple[str, ...] = ()
    guest_root: bool = False
    memory: str | int | None = None
    lifetime_s: float = 24 * 3600


class X07Environment:
    """One sandbox. Each command of the agent is a new shell in it."""

    def __init__(self, *, config_class: type[X07EnvironmentConfig] = X07EnvironmentConfig, **options: Any) -> None:  # noqa: ANN401
        self.config = config_class(**options)
        self.sandbox = Sandbox(**self.config.model_dump(exclude={"cwd", "timeout"}))

    def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: int | None = None) -> dict[str, Any]:
        """Run the commands of an action. Raises Submitted if they say that the task is done."""
        try:
            ended = self.sandbox.shell(
                action.get("command", ""),
                cwd=cwd or self.config.cwd or None,
                timeout_s=timeout or self.config.timeout,
                merge=True,
                keep="both",
            )
        except SandboxError as exc:
            require_usage(exc)
            return _answer("", -1, str(exc))
        output = ended.stdout.decode(errors="replace")
        if was_stopped(ended):
            return _answer(output, -1, ended.reason)
        _check_finished(output, ended.x07_exit_code)
        return _answer(output, ended.x07_exit_code)

    def get_template_vars(self, **variables: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the configuration, the facts that uname prints in the sandbox, and *variables*."""
        merged: dict[str, Any] = recursive_merge(self.config.model_dump(), self._uname, variables)
        return merged

    @functools.cached_property
    def _uname(self) -> dict[str, str]:
        facts = self.sandbox.shell('for what in -s -r -v -m; do uname "$what"; done', check=True).stdout.decode()
        return dict(zip(_UNAME, facts.splitlines(), strict=True))

    def serialize(self) -> dict[str, Any]:
        """Return what a trajectory says about the environment."""
        kind = f"{type(self).__module__}.{type(self).__name__}"
        return {"info": {"config": {"environment": self.config.model_dump(mode="json"), "environment_type": kind}}}

    def cleanup(self) -> None:
        """Close the sandbox. Changes to the folder of *workdir* are kept, for x07 diff and x07 apply."""
        self.sandbox.close("keep")


def _answer(output: str, code: int, problem: str = "") -> dict[str, Any]:
    return {"output": output, "returncode": code, "exception_info": problem}


def _check_finished(output: str, code: int) -> None:
    first, _, rest = output.lstrip().partition("\n")
    if first.strip() == _SUBMITTED and code == 0:
        extra = {"exit_status": "Submitted", "submission": rest}
        raise Submitted({"role": "exit", "content": rest, "extra": extra})
