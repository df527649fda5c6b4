"""Measure how much longer CPU work takes in an emulated VM than on the host.

    .venv/bin/python -m bench.emulation [--rounds 5]

Each round does each kind of work once on the host and once in a VM, with the programs of the same root file system. A
time is the CPU time of the processes on the host, or of QEMU for the VM, so it does not include other load on the host.
The program does each kind of work once before the timing, so that QEMU has translated its code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from bench import peers
from bench.figures import WrongRunError
from bench.ours import X07
from x07_sandbox.host.linux import children_of
from x07_sandbox.images.store import find_image

DRIVER: Final = r'''
import json, os, re, resource, subprocess, sys

INTEGERS = """
#include <stdio.h>
#include <string.h>
static char composite[2000000];
int main(int argc, char **argv) {
    unsigned hash = 0;
    for (int round = 0; round < 12; round++) {
        memset(composite, 0, sizeof composite);
        for (int i = 2; i < 1415; i++)
            if (!composite[i])
                for (int j = i * i; j < 2000000; j += i) composite[j] = 1;
        for (int i = 0; i < 2000000; i++) hash = hash * 31 + composite[i];
    }
    return printf("%u", hash) < 0;
}
"""
FLOATS = """
#include <stdio.h>
static double a[160][160], b[160][160], c[160][160];
int main(int argc, char **argv) {
    for (int i = 0; i < 160 * 160; i++) a[i / 160][i % 160] = i * 0.5, b[i / 160][i % 160] = i * 0.25;
    for (int round = 0; round < 20; round++)
        for (int i = 0; i < 160; i++)
            for (int j = 0; j < 160; j++)
                for (int k = 0; k < 160; k++) c[i][j] += a[i][k] * b[k][j];
    return printf("%f", c[7][9]) < 0;
}
"""
FUNCTION = """
int f%d(int *v, int n) {
    int s = %d;
    for (int i = 0; i < n; i++) { if (v[i] %% 3) s += v[i] * i; else s ^= v[i] >> 2; }
    switch (s & 7) { case 0: return s + 1; case 1: return s * 3; case 2: return s - n; default: return s; }
}
"""

def command(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

def compiled(name, text):
    with open(name + ".c", "w") as file:
        file.write(text)
    command("gcc", "-O2", "-o", name, name + ".c")
    return lambda: command("./" + name)

def text():
    text = json.dumps(sorted((i * 7919) % 10007 for i in range(20000)))
    return [sum(int(word) % 97 for word in re.findall("[0-9]+", text)) for _ in range(60)]

class Point:
    def __init__(self, x):
        self.x = x
    def moved(self, by):
        return Point(self.x + by)

def objects():
    found = {}
    for i in range(500000):
        found[i % 1000] = Point(i).moved(i % 7).x
    return sum(found.values())

def gcc():
    with open("many.c", "w") as file:
        file.write("".join(FUNCTION % (i, i) for i in range(50)))
    return lambda: command("gcc", "-O2", "-c", "many.c")

def processes():
    for _ in range(300):
        command("/bin/true")

def cpu_s():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)

os.chdir("/tmp")
kind = sys.argv[1]
makers = {
    "C, integers": lambda: compiled("integers", INTEGERS),
    "C, floating point": lambda: compiled("floats", FLOATS),
    "Python, text": lambda: text,
    "Python, objects": lambda: objects,
    "gcc": gcc,
    "starting processes": lambda: processes,
}
work = makers[kind]()
work()
before = cpu_s()
print("begin", flush=True)
input()
work()
print(cpu_s() - before, flush=True)
sys.stdin.read()
'''
KINDS: Final = ("C, integers", "C, floating point", "Python, text", "Python, objects", "gcc", "starting processes")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="bench.emulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="x07-bench-") as name:
        work = Path(name)
        root = peers.unpacked_root(find_image(None).folder / "root.erofs", work)
        (root / "prog/driver.py").write_text(DRIVER)
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for turn in range(rounds):
            for kind in KINDS:
                pair = host_s(root, kind), guest_s(work, root / "prog/driver.py", kind)
                times[kind].append(pair)
                print(f"round {turn + 1}: {kind}: host {pair[0]:.2f} s, VM {pair[1]:.2f} s", flush=True)
    print(f"\n{'VM / host, CPU time':22} median   min   max   of {rounds} rounds")
    for kind, pairs in times.items():
        ratios = [guest / host for host, guest in pairs]
        print(f"{kind:22} {statistics.median(ratios):6.1f} {min(ratios):5.1f} {max(ratios):5.1f}")


def host_s(root: Path, kind: str) -> float:
    """Return the CPU seconds of the work on the host, as the program measures them."""
    argv = peers.bwrap(root, ["/usr/bin/env", "PATH=/usr/bin:/bin", "/usr/bin/python3", "/prog/driver.py", kind]).argv
    done = subprocess.run(argv, input=b"\n\n", capture_output=True, check=True)
    return float(done.stdout.split()[-1])


def guest_s(work: Path, driver: Path, kind: str) -> float:
    """Return the CPU seconds that QEMU takes for the work. Raises WrongRunError."""
    state = Path(tempfile.mkdtemp(dir=work)) / "jobs"
    env = os.environ | {"X07_VM_STATE_DIR": str(state)}
    words: list[str | Path] = [X07, "run", "--no-pool", "--timeout", "600", "--cpu-time", "600", driver, "--", kind]
    with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"begin\n":
            raise WrongRunError(f"{kind}: the program did not begin")
        (owner,) = state.glob("*-run*/owner.json")
        vmm = children_of(json.loads(owner.read_bytes())["processes"]["inner"]["pid"])[0]
        before = _cpu_s(vmm)
        process.stdin.write(b"\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise WrongRunError(f"{kind}: the program ended early")
        seconds = _cpu_s(vmm) - before
        process.stdin.close()
    return seconds


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its threads. See proc_pid_stat(5)."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICKS


if __name__ == "__main__":
    main()
