"""Compare the egress gate with QEMU's user networking (slirp) and passt, and measure the cost of hosts for a run.

    .venv/bin/python -m bench.network [--rounds 5] [--pairs 10] [--json FILE]

Each round runs every case once. All cases have the same measuring program, QEMU, kernel and root file system, and the
servers of the tests' laboratory. Needs root, passt, and network access for apt, which downloads the kernel package with
the driver of the network card.

The case "ours" is a normal `x07 run`: a cloned VM in the jail, with the program's filters and limits. For slirp and
passt, the same VM is booted without the jail and with a virtio-net card. The MTU is 1500 for slirp and 65520 for passt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import selectors
import signal
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bench import network_guest
from bench.figures import memory_bytes
from bench.ours import X07
from tests.lab.laboratory import DNS_ADDRESS, GATE_ADDRESS, ROUTER, Laboratory
from x07_sandbox.backends.qemu import machine as machines
from x07_sandbox.backends.qemu.start import tsc_khz
from x07_sandbox.guest.system import children_of  # includes the children of all threads
from x07_sandbox.host.arch import host_arch
from x07_sandbox.images import boot
from x07_sandbox.images.build import build_image
from x07_sandbox.images.store import find_image, image_is_current
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.guest import ram_class_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from x07_sandbox.images.store import Image

NAME: Final = "raw.lab.example"
PORTS: Final = (network_guest.ECHO, network_guest.DISCARD, network_guest.CHARGEN, network_guest.HTTP)
DRIVER: Final = "virtio_net"
OURS, SLIRP, PASST = "ours", "slirp", "passt"
# Address, prefix length, router, resolver, MTU.
CARDS: Final = {SLIRP: "10.0.2.15,24,10.0.2.2,10.0.2.3,1500", PASST: f"{GATE_ADDRESS},24,{ROUTER},{DNS_ADDRESS},65520"}
CASE_S: Final = 300.0
BOOTS: Final = 3  # boot attempts, because the guest can miscalibrate its timer
SAMPLE_S: Final = 0.05
MB: Final = 1e6
ROWS: Final = (
    ("up", "one flow up, MiB/s"),
    ("down", "one flow down, MiB/s"),
    ("look_up_ms", "name lookup, ms"),
    ("connect_ms", "connect, ms"),
    ("connect_p90_ms", "connect, ms, p90"),
    ("echo_ms", "connect and echo of byte 0x01, ms"),
    ("echo_text_ms", "connect and echo of a letter, ms"),
    ("many", f"{network_guest.FLOWS} downloads, MiB/s"),
    ("complete", f"{network_guest.FLOWS} downloads, complete"),
    ("last_s", f"{network_guest.FLOWS} downloads, seconds"),
    ("fairness", "bytes of the slowest / fastest"),
)
# Ours divided by the other case: limit (the lowest accepted value) and goal.
RATIOS: Final = (("up", 1.0, 2.0), ("down", 0.6, 1.0), ("many", None, None))
CONNECT_MS: Final = 10.0  # limit of the difference
MEMORY_MB: Final = (45, 30)  # of gate and resolver: limit, goal

Figures = dict[str, Any]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(prog="bench.network", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of empty runs, without and with hosts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()
    if reason := Laboratory.why_not():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="x07-bench-")))
        image = find_image(None)
        if not image_is_current(image):
            image = build_image(progress=lambda text: print(text, file=sys.stderr))
        lab = stack.enter_context(Laboratory())
        ours = Ours(lab, image, work)
        card = Card(lab, image, work)
        cases: dict[str, Callable[[], Figures]] = {OURS: ours.figures}
        cases |= {name: partial(card.figures, name) for name in CARDS}
        for hosts in (False, True):  # the first run of each kind saves its template
            ours.empty_run_s(hosts=hosts)
        found: dict[str, list[Figures]] = {name: [] for name in cases}
        for turn in range(options.rounds):
            for name, case in cases.items():
                sys.stderr.write(f"\rround {turn + 1} of {options.rounds}: {name}    ")
                load = os.getloadavg()[0]
                found[name].append(case() | {"load": load})
        pairs = []
        for turn in range(options.pairs):
            sys.stderr.write(f"\rpair {turn + 1} of {options.pairs}           ")
            pairs.append((ours.empty_run_s(hosts=False), ours.empty_run_s(hosts=True)))
        sys.stderr.write("\n")
    show(found, pairs)
    if options.json is not None:
        options.json.write_text(json.dumps({"figures": found, "quiet_s": pairs}, indent=1))


class Ours:
    """`x07 run` in the laboratory."""

    def __init__(self, lab: Laboratory, image: Image, work: Path) -> None:
        self.lab = lab
        self.image = image
        self.policy = work / "policy.json"
        self.report = work / "report.json"
        self.empty = work / "empty.py"
        self.empty.write_text("pass\n")
        document = msgspec.to_builtins(default_policy())
        document["limits"]["wall_ms"] = document["limits"]["cpu_ms"] = 600_000
        self.policy.write_bytes(render_policy(document))

    def _argv(self, program: str | Path, *, hosts: bool) -> list[str]:
        argv = [*self.lab.gate_prefix, str(X07), "run", "--policy", str(self.policy), "--image", self.image.digest]
        argv += ["--no-pool", "--report-out", str(self.report)]
        argv += ["--allow-host", f"{NAME}:{','.join(map(str, PORTS))}"] if hosts else []
        return [*argv, str(program)]

    def _check(self, *, hosts: bool) -> None:
        """Raise SystemExit if the run was not as expected."""
        result = json.loads(self.report.read_bytes())
        phase = result["phases"]["run"]
        wrong = result["outcome"] != "ok" or phase["start"] != "hot" or (result["net"] is not None) != hosts
        if wrong or result["isolation"] != "vm-emulated":  # the other cases are emulated
            raise SystemExit(f"unexpected run: {result['reason']}, {phase['start']}, {result['isolation']}")

    def empty_run_s(self, *, hosts: bool) -> float:
        """Return the seconds for a program that does nothing."""
        started = time.monotonic()
        subprocess.run(self._argv(self.empty, hosts=hosts), check=True, stdin=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        self._check(hosts=hosts)
        return seconds

    def figures(self) -> Figures:
        """Return the figures of the program, and the memory of gate and resolver."""
        argv = [*self._argv(network_guest.__file__, hosts=True), "--", NAME]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            lines = Lines(process.stdout.fileno())
            samples: dict[str, list[tuple[float, float]]] = {"rest": [], "many": []}
            found: Figures | None = None
            for line in lines.until_end():
                found = line if line is not None else found
                if lines.stage in samples and (sample := _memory_mb(process.pid)) is not None:
                    samples[lines.stage].append(sample)
            process.wait()
        self._check(hosts=True)
        if found is None:
            raise SystemExit("ours: the program printed no figures")
        for name, rows in samples.items():
            if not rows:
                raise SystemExit(f"ours: gate and resolver were not found in stage {name}")
            for which, column in zip(("rss", "pss"), zip(*rows, strict=True), strict=True):
                found[f"{name}_{which}_mb"] = max(column)
        return found


class Lines:
    """The output of the measuring program, and its current stage."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.stage = ""
        self.tail = b""

    def until_end(self) -> Iterator[Figures | None]:
        """Yield the figures when they arrive, and None every SAMPLE_S. Raises SystemExit after CASE_S."""
        deadline = time.monotonic() + CASE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.fd, selectors.EVENT_READ)
            while True:
                if time.monotonic() > deadline:
                    raise SystemExit(f"timeout in stage {self.stage!r}: {self.tail[-2000:].decode()}")
                if not selector.select(SAMPLE_S):
                    yield None
                    continue
                try:
                    data = os.read(self.fd, 65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return
                *whole, self.tail = (self.tail + data).split(b"\n")
                for line in whole:
                    yield self._take(line.decode("utf-8", "replace").strip())

    def _take(self, line: str) -> Figures | None:
        if line.startswith("stage "):
            self.stage = line.removeprefix("stage ")
        elif line.startswith(network_guest.PREFIX):
            figures: Figures = json.loads(line.removeprefix(network_guest.PREFIX))
            return figures
        elif line:
            print(line, file=sys.stderr)
        return None


def _memory_mb(runner: int) -> tuple[float, float] | None:
    """Return the RSS and PSS of a run's gate and resolver together, or None unless both are running."""
    rss, pss, count = 0, 0, 0
    pending = [runner]
    try:
        while pending:
            pid = pending.pop()
            pending += children_of(pid)
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"network.gate import" in words or b"network.resolver import" in words:
                used = memory_bytes(pid)
                rss, pss, count = rss + used["Rss"], pss + used["Pss"], count + 1
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (rss / MB, pss / MB) if count == 2 else None  # noqa: PLR2004 - gate and resolver


class Card:
    """The same VM with a network card, and with the measuring program instead of the agent."""

    def __init__(self, lab: Laboratory, image: Image, work: Path) -> None:
        self.lab = lab
        self.image = image
        self.initrd = work / "initrd.cpio"
        program = io.BytesIO()
        with zipfile.ZipFile(program, "w") as archive:
            archive.write(network_guest.__file__, "__main__.py")
        entries = [
            boot.Entry("agent.zip", stat.S_IFREG | 0o400, program.getvalue())
        ]  # replaces the agent in the image's initrd
        for number, (name, data) in enumerate(card_modules(image.manifest.kernel_release, work)):
            entries.append(boot.Entry(f"modules/net/card-{number}-{name}.ko", stat.S_IFREG | 0o444, data))
        first = (image.folder / image.manifest.parts.initrd.file).read_bytes()
        self.initrd.write_bytes(boot.padded(first + bytes(-len(first) % 4) + boot.packed(entries), host_arch()))

    def figures(self, name: str) -> Figures:
        """Return the figures of the program in a VM with the network card of *name*."""
        for _ in range(BOOTS):
            with contextlib.ExitStack() as stack:
                if (found := self._boot(name, stack)) is not None:
                    return found
        raise SystemExit(f"{name}: the VM printed no figures in {BOOTS} boots")

    def _boot(self, name: str, stack: contextlib.ExitStack) -> Figures | None:
        """Boot a VM; return None if it ended without figures."""
        ends = {end: _pair(stack) for end in ("channel", "net", "qmp", "console")}
        with tempfile.TemporaryFile(dir="/var/tmp") as scratch:
            scratch.truncate(self.image.manifest.scratch_disk.bytes)
            theirs = {end: pair[1].fileno() for end, pair in ends.items()}
            argv = self._argv(scratch.fileno(), theirs, CARDS[name])
            passed = [scratch.fileno(), *theirs.values()]
            if name == PASST:
                near, far = (sock.fileno() for sock in _pair(stack))
                stack.enter_context(self._running(["passt", "-f", "-q", "-4", "-F", str(far)], [far]))
                argv += ["-netdev", f"stream,id=card,server=off,addr.type=fd,addr.str={near}"]
                passed.append(near)
            else:
                argv += ["-netdev", "user,id=card,ipv6=off"]
            stack.enter_context(self._running([*argv, "-device", "virtio-net-device,netdev=card"], passed))
        for pair in ends.values():
            pair[1].close()
        found = None
        for line in Lines(ends["console"][0].fileno()).until_end():
            found = line if line is not None else found
        return found

    def _argv(self, scratch_fd: int, ends: dict[str, int], setting: str) -> list[str]:
        """Return QEMU's command line for use outside the jail."""
        arch, parts = host_arch(), self.image.manifest.parts
        machine = machines.Machine(
            arch=arch,
            ram_bytes=ram_class_bytes(default_policy().limits.mem_bytes),
            kvm_fd=None,
            tsc_khz=tsc_khz(arch),
            scratch_fd=scratch_fd,
            channel_fd=ends["channel"],
            net_fd=ends["net"],
            qmp_fd=ends["qmp"],
            console_fd=ends["console"],
            mark="bench",
        )
        words = machines.kernel_command_line(machine)
        paths = machine.paths
        changed = {
            paths.kernel: str(self.image.folder / parts.kernel.file),
            paths.root: str(self.image.folder / parts.root.file),
            paths.initrd: str(self.initrd),
            words: f"{words} {network_guest.CARD}{setting}",
        }
        argv = [changed.get(word, word) for word in machines.qemu_argv(machine)]
        return [word.replace(f"={paths.root}", f"={changed[paths.root]}") for word in argv]

    @contextlib.contextmanager
    def _running(self, argv: list[str], passed: list[int]) -> Iterator[None]:
        with subprocess.Popen([*self.lab.gate_prefix, *argv], pass_fds=passed, stdin=subprocess.DEVNULL) as process:
            try:
                yield
            finally:
                process.kill()


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    stack.callback(near.close)
    stack.callback(far.close)
    return near, far


def card_modules(release: str, work: Path) -> tuple[tuple[str, bytes], ...]:
    """Return the card's driver and its dependencies from the image's kernel package, in load order."""
    folder = work / "kernel"
    folder.mkdir(mode=0o755)
    package = f"linux-image-{release}"
    done = subprocess.run(["apt-get", "download", package], cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cannot download {package}: {done.stderr.strip()}\nRun apt-get update, then x07 image build")
    (deb,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(folder / "tree")], check=True)
    return next(boot.read_modules(folder / "tree", [DRIVER]))


def show(found: dict[str, list[Figures]], pairs: list[tuple[float, float]]) -> None:
    """Print the table, the ratios, the limits and the goals."""
    medians = {
        case: {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "errors"}
        for case, rows in found.items()
    }
    loads = [row["load"] for rows in found.values() for row in rows]
    count = len(found[OURS])
    print(f"medians of {count} rounds, {os.cpu_count()} cores, load {min(loads):.1f} to {max(loads):.1f}")
    print(f"{'':34} {''.join(f'{case:>26}' for case in found)}")
    for key, title in ROWS:
        cells = [
            f"{medians[case][key]:.2f} ({min(row[key] for row in rows):.2f}-{max(row[key] for row in rows):.2f})"
            for case, rows in found.items()
        ]
        print(f"{title:34} {''.join(f'{cell:>26}' for cell in cells)}")
    for case, rows in found.items():
        if errors := sorted({error for row in rows for error in row["errors"]}):
            print(f"errors, {case}: {', '.join(errors)}")
    ours = medians[OURS]
    for other in (SLIRP, PASST):
        theirs = medians[other]
        for key, limit, goal in RATIOS:
            suffix = "" if limit is None else f"   limit {limit}, goal {goal}"
            print(f"{key + ', ours / ' + other:36} {ours[key] / theirs[key]:6.2f}{suffix}")
        for key in ("connect_ms", "echo_ms", "echo_text_ms"):
            difference = ours[key] - theirs[key]
            suffix = f"   limit {CONNECT_MS:.0f}" if key == "connect_ms" else ""
            print(f"{key + ', ours minus ' + other:36} {difference:6.1f} ms{suffix}")
    for when in ("rest", "many"):
        rss, pss = ours[f"{when}_rss_mb"], ours[f"{when}_pss_mb"]
        print(
            f"gate and resolver, {when}: RSS {rss:.1f} MB, PSS {pss:.1f} MB   limit {MEMORY_MB[0]}, goal {MEMORY_MB[1]}"
        )
    if pairs:
        without, with_hosts = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        more = statistics.median((after - before) * 1000 for before, after in pairs)
        print(
            f"x07 run of an empty program: {without:.0f} ms, with hosts {with_hosts:.0f} ms, difference {more:+.0f} ms"
        )


if __name__ == "__main__":
    main()
