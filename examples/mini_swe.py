"""mini-swe-agent fixes a program in a sandbox. The model here is a script, so that the example runs offline.

    python examples/mini_swe.py FOLDER

Needs: .venv/bin/pip install -e '.[mini-swe-agent]'
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")

from minisweagent.agents.default import DefaultAgent
from minisweagent.models.test_models import DeterministicModel, make_output

from x07_sandbox import diff
from x07_sandbox.integrations.mini_swe_agent import X07Environment

COMMANDS = (
    "echo 'print(6 * 9)' > answer.py; python3 answer.py",
    "sed -i 's/9/7/' answer.py && python3 answer.py",
    "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; python3 answer.py",
)


def main(folder: str) -> None:
    """Let the agent work on a copy of the folder, and print what it submits and changes."""
    environment = X07Environment(workdir=folder, memory="256M")
    try:
        model = DeterministicModel(outputs=[make_output("", [{"command": command}]) for command in COMMANDS])
        agent = DefaultAgent(model, environment, system_template="You write programs.", instance_template="{{task}}")
        print(agent.run("Print 42 from answer.py.")["submission"].strip())
    finally:
        environment.cleanup()
    print(diff(environment.sandbox.result).patch.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
