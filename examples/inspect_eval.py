"""An evaluation in Inspect: each sample runs in a sandbox of its own.

    python examples/inspect_eval.py                               with a scripted model, offline
    inspect eval examples/inspect_eval.py --model PROVIDER/MODEL  with a real one

Needs: .venv/bin/pip install -e '.[inspect]'
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from inspect_ai import Task, eval, task  # noqa: A004 - Inspect's name
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash, python

ORDERS: Final = Path(__file__).parent / "orders.jsonl"
CODE: Final = "import json\nprint(sum(json.loads(line)['total'] or 0 for line in open('orders.jsonl')))"


@task
def total() -> Task:
    """Ask for the sum of all orders in a file."""
    sample = Sample(
        input="What is the sum of `total` in orders.jsonl?", target="118.5", files={"orders.jsonl": str(ORDERS)}
    )
    tools = use_tools(bash(timeout=60), python(timeout=60))
    return Task(dataset=[sample], solver=[tools, generate()], scorer=includes(), sandbox="x07")


def main() -> int:
    """Run the evaluation with a model that says what is written here."""
    answers = [
        ModelOutput.for_tool_call("mockllm/model", "bash", {"command": "head -n 1 orders.jsonl"}),
        ModelOutput.for_tool_call("mockllm/model", "python", {"code": CODE}),
        ModelOutput.from_content("mockllm/model", "The sum is 118.5."),
    ]
    for answer in answers:
        answer.usage = ModelUsage()  # else Inspect counts tokens, for which it downloads a table
    with tempfile.TemporaryDirectory() as logs:
        [log] = eval(
            total(), model=get_model("mockllm/model", custom_outputs=answers), log_dir=logs, display="none", score=True
        )
        if log.status != "success" or not log.samples:
            sys.exit(f"inspect_eval: {log.error.message if log.error else log.status}")
        for message in log.samples[0].messages:
            if message.role == "tool":
                print(f"{message.function}: {message.error.message if message.error else message.text.strip()}")
        print("accuracy:", log.results.scores[0].metrics["accuracy"].value if log.results else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
