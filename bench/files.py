"""Compare copying files in and changes out with GNU tar, which runs in the guest and uses the same channel.

    .venv/bin/python -m bench.files [--rounds 7]

Both run the same program, which changes each file, and end with the changed files on the host. x07 checks, journals
and applies the changes; tar only copies. The cases are interleaved. The figures are medians of whole commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from bench.ours import X07
from x07_sandbox.policy.decode import default_policy, render_policy

MIB: Final = 1 << 20
TREES: Final = {"1,000 files of 1 KiB": (1000, 1024), "64 files of 1 MiB": (64, MIB)}
CHANGE: Final = 'for file in *; do echo x >>"$file"; done'


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Compare copying files in and changes out with tar.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="x07-bench-") as name:
        work = Path(name)
        policy = work / "policy.json"
        document = msgspec.to_builtins(default_policy())
        document["limits"]["wall_ms"] = document["limits"]["cpu_ms"] = 600_000
        policy.write_bytes(render_policy(document))
        for what, (count, size) in TREES.items():
            measure(work, policy, what, [os.urandom(size) for _ in range(count)], rounds)


def measure(work: Path, policy: Path, what: str, contents: list[bytes], rounds: int) -> None:
    """Measure one tree and print its figures."""
    times: dict[str, list[float]] = {"no files": [], "ours": [], "tar": []}
    for _ in range(rounds):
        times["no files"].append(_timed(_run(policy, ":"), work))
        tree = _tree(work / "ours", contents)
        times["ours"].append(_timed(_run(policy, CHANGE, "--allow-write-root", "."), tree))
        _check(tree, contents)
        tree = _tree(work / "theirs", contents)
        out = work / "out"
        out.mkdir()
        times["tar"].append(_tar(tree, out, policy))
        _check(out, contents)
        for folder in (tree, out, work / "ours"):
            shutil.rmtree(folder)
    base, ours, tar = (statistics.median(times[name]) for name in ("no files", "ours", "tar"))
    print(f"{what}: no files {base:.2f} s, ours {ours:.2f} s, tar {tar:.2f} s")
    print(f"  ours / tar: {ours / tar:.2f}; minus a run without files: {(ours - base) / (tar - base):.2f}")


def _tree(folder: Path, contents: list[bytes]) -> Path:
    folder.mkdir()
    for number, data in enumerate(contents):
        (folder / f"{number:04}.dat").write_bytes(data)
    return folder


def _run(policy: Path, script: str, *flags: str) -> list[str | Path]:
    return [X07, "run", "--policy", policy, *flags, "--toolchain", "shell", "-c", script]


def _tar(tree: Path, out: Path, policy: Path) -> float:
    text = f"mkdir t && cd t && tar -xf - && {CHANGE} && tar -cf - ."
    run = _run(policy, text, "--max-output-bytes", str(128 * MIB))
    started = time.monotonic()
    packing = subprocess.Popen(["tar", "-cf", "-", "-C", tree, "."], stdout=subprocess.PIPE)
    running = subprocess.Popen(run, stdin=packing.stdout, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-xf", "-", "-C", out], stdin=running.stdout, check=True)
    if packing.wait() or running.wait():
        raise SystemExit("a timed run of tar failed")
    return time.monotonic() - started


def _timed(argv: list[str | Path], cwd: Path) -> float:
    started = time.monotonic()
    done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"a timed run failed: {json.dumps(done.stderr.decode())}")
    return seconds


def _check(folder: Path, contents: list[bytes]) -> None:
    for number, data in enumerate(contents):
        if (folder / f"{number:04}.dat").read_bytes() != data + b"x\n":
            raise SystemExit(f"a timed run did not change file {number} as expected")


if __name__ == "__main__":
    main()
