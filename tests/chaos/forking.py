"""What is done with snapshots of a sandbox: `python forking.py FOLDER ACTION...`.

What fails for a reason is printed, and the next is tried. Anything else ends the program with a traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from x07_sandbox import Sandbox, SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox import Snapshot


def say(text: str) -> None:
    """Write a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def forks(sandbox: Sandbox) -> None:
    """Change a file in each of two forks, and apply the changes of one."""
    first, second = sandbox.fork(2)
    for one in (first, second):
        one.shell("echo new > a; echo new > b; echo new > c", check=True)
    first.close("apply")
    second.close("discard")


def checkpoint(sandbox: Sandbox) -> None:
    """Go back to a checkpoint, while a command runs."""
    point = sandbox.checkpoint()
    running = sandbox.start(["sleep", "600"])
    sandbox.rollback(point)
    say(running.wait(60).reason_code)


def snapshot(sandbox: Sandbox) -> None:
    """Keep a snapshot, start a sandbox from it, and remove it."""
    kept: Snapshot = sandbox.snapshot("kept")
    try:
        with Sandbox(snapshot=kept) as other:
            other.kill()
    finally:
        kept.remove()


def pause(sandbox: Sandbox) -> None:
    """Pause a sandbox, and go on with it."""
    sandbox.pause()
    again = Sandbox.connect(sandbox.id)
    again.exec(["true"])
    again.close("discard")


ACTIONS: dict[str, Callable[[Sandbox], None]] = {
    action.__name__: action for action in (forks, checkpoint, snapshot, pause)
}


def main(folder: Path, *names: str) -> None:
    """Do what is named, each in a sandbox of its own, in which a program runs."""
    for name in names:
        kind = Sandbox.create if name == "pause" else Sandbox
        try:
            with kind(backend="qemu", workdir=folder, allow_hosts=["a.example:443"]) as sandbox:
                sandbox.start(["sleep", "600"], detach=True)
                ACTIONS[name](sandbox)
                say(f"{name} done")
        except SandboxError as exc:
            say(f"{name}: {exc}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
