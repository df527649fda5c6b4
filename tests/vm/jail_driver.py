"""A runner with a hostile program in QEMU's place: run by path, as root or as an ordinary user.

    jail_driver.py '{"binary": PATH, "do": "hold" | "talk" | "phase", ...}'

Prints one JSON object per line on standard output, and reads one word per line from standard input. hold: wait
blocked, continue at "release", end at "stop". talk: send the next line, a JSON string, over the channel, continue,
print the answer, end at "stop". die: release the program, and be killed after so many microseconds. die-early: be
killed so many microseconds after the start began. phase: be the host's side of a run's conversation, as in a run.
thread: as hold, but a thread that has ended when the test gets the answer starts and releases the program. With
"hot": true the program is dumped first, and restored.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from x07_sandbox.backends.base import MachineKind, NoAnswerError, evidence_of, greet
from x07_sandbox.backends.qemu.hot import Dump, Restore, restored
from x07_sandbox.backends.qemu.machine import Origin
from x07_sandbox.backends.qemu.start import QemuJob, Source, start_qemu
from x07_sandbox.backends.qemu.template import filled_from
from x07_sandbox.channel.messages import CWD, FREE, Exec
from x07_sandbox.errors import BackendError
from x07_sandbox.host import settings
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import children_of
from x07_sandbox.host.paths import state_dir, unnamed_file
from x07_sandbox.host.waiting import Cancel, Deadline
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.policy.controls import run_limits
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.outcomes import classify
from x07_sandbox.records.runs import Claim, create_record, new_run_id
from x07_sandbox.sessions.session import Session
from x07_sandbox.sessions.specs import opening
from x07_sandbox.sessions.transfers import CommandStreams, Receivers, Sink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.qemu.instance import QemuInstance
    from x07_sandbox.host.arch import Arch

_TALK_S = 60.0
_TALK_BYTES = 4 * settings.MIB


def tell(event: str, **fields: object) -> None:
    """Print one line for the test."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def status_kib(name: str) -> int:
    """Return a value of /proc/self/status in KiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def wait_for(word: str) -> None:
    """Wait for the test's word."""
    got = sys.stdin.readline().strip()
    if got != word:
        raise SystemExit(f"the test said {got!r} instead of {word!r}")


def swap(folder: Path, how: str) -> None:
    """Replace the path of each part of the image, which has been opened and checked.

    file, link: by a file or a link, the checked file keeping another name. over: by a file, with rename(2).
    """
    for name in ("vmlinux", "initrd.cpio", "root.erofs", "scratch.head"):
        other = folder / f"{name}.other"
        other.write_bytes(b"not what was checked")
        if how != "over":
            (folder / name).rename(folder / f"{name}.checked")
        if how == "link":
            (folder / name).symlink_to(other)
        else:
            other.replace(folder / name)


@contextlib.contextmanager
def dumped(kind: MachineKind, arch: Arch) -> Iterator[Source]:
    """The hostile program, dumped in a jail while it waits for its first word, as QEMU is for hot clones."""
    assert kind.image is not None
    head, disk = kind.image.fds["scratch"], kind.image.manifest.scratch_disk
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=state_dir())))
        (folder / "images").mkdir(mode=0o700)
        fds = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o444) for name in ("ram", "state")]
        fds.append(unnamed_file(folder, ""))  # the program may fill it, and this process may be killed
        fds.append(os.open(folder / "images", os.O_RDONLY))
        for fd in fds:
            stack.callback(os.close, fd)
        control, theirs = (stack.enter_context(end) for end in socket.socketpair())
        fill, ram_fd = filled_from(head, disk), fds[0]
        source = Source(
            origin=Origin.WARMING,
            files={"ram": ram_fd, "state": fds[1]},
            ram_fd=ram_fd,
            disk_fd=fds[2],
            fill=fill,
            criu=Dump(fds[3], control, theirs.fileno()),
        )
        claim = Claim(run_id=new_run_id(), phase="template", wall_ms=1000)
        record = create_record(claim, backend="qemu", image_digest=kind.image_digest)
        job = QemuJob(record=record, kind=kind, deadline_s=60)
        with start_qemu(job, kvm=False, arch=arch, source=source) as instance:
            instance.release()
            exe = Path()
            while exe != Path(arch.qemu_binary):
                time.sleep(0.01)
                with contextlib.suppress(OSError):  # its first children only use up numbers
                    exe = next((Path(f"/proc/{pid}/exe").readlink() for pid in children_of(instance.inner.pid)), exe)
            time.sleep(0.1)  # it waits for its first word
            control.sendall(b".")
            names = tuple(control.recv(4096).decode().split("\n"))
            assert len(names) > 1, instance.console_tail()
        yield restored(ram_fd, fill, Restore(fds[3], names))


@contextlib.contextmanager
def started(order: dict[str, Any]) -> Iterator[QemuInstance]:
    """The hostile program in the jail, blocked."""
    with open_image(find_image(order.get("image"))) as image, contextlib.ExitStack() as stack:
        if "swap" in order:
            swap(find_image(order.get("image")).folder, order["swap"])
        parts = ("ram", "root") if order.get("hot") else ("kernel", "initrd", "root")
        record = create_record(
            Claim(run_id=new_run_id(), phase="run", wall_ms=1000), backend="qemu", image_digest=image.manifest.digest
        )
        kind = MachineKind(image=image, ram_bytes=512 * settings.MIB)
        job = QemuJob(record=record, kind=kind, deadline_s=order.get("deadline_s", 120))
        arch = replace(host_arch(), qemu_binary=order["binary"], firmware=())
        source = stack.enter_context(dumped(kind, arch)) if order.get("hot") else None
        with start_qemu(job, kvm=False, arch=arch, source=source) as instance:
            assert instance.supervisor is not None
            tell(
                "started",
                supervisor=instance.supervisor.pid,
                inner=instance.inner.pid,
                jail=instance.jail,
                holds=list(instance.groups.holds),
                folder=str(record.folder),
                image_files=[getattr(instance.paths, name) for name in parts],
                root_inode=os.fstat(image.fds["root"]).st_ino,
            )
            yield instance
        tell("gone", done=(record.folder / "done").is_file())


def hold(order: dict[str, Any]) -> None:
    """Start the program from this thread; then wait."""
    with started(order) as instance:
        wait_for("release")
        instance.release()
        wait_for("stop")


def die(order: dict[str, Any]) -> None:
    """Release the program, and be killed during what follows."""
    with started(order) as instance:
        instance.release()
        kill_after(order["after_us"])


def die_early(order: dict[str, Any]) -> None:
    """Be killed during the start."""
    killer = threading.Thread(target=kill_after, args=(order["after_us"],))
    killer.start()
    with started(order):
        killer.join()


def kill_after(microseconds: int) -> None:
    """Send SIGKILL to this process."""
    time.sleep(microseconds / 1e6)
    os.kill(os.getpid(), signal.SIGKILL)


def talk(order: dict[str, Any]) -> None:
    """Print the program's findings, at most 4 MiB of them."""
    with started(order) as instance:
        facts = json.loads(sys.stdin.readline())
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the read below shows too
            os.write(instance.channel_fd, facts.encode())
        instance.release()
        deadline = Deadline.after(_TALK_S)
        data = b""
        chunk = b"-"
        poll = select.poll()
        poll.register(instance.channel_fd, select.POLLIN)
        while b'"end"' not in data and len(data) < _TALK_BYTES and not deadline.passed():
            if poll.poll(deadline.left_s() * 1000):
                try:
                    chunk = os.read(instance.channel_fd, 65536)
                except ConnectionResetError:  # it ended without reading our words
                    chunk = b""
                data += chunk
                if not chunk:
                    break
        if not chunk:
            instance.child.wait(60)
        tell("findings", text=data.decode(), status=instance.exit_status(), console=instance.console_tail())
        wait_for("stop")


def phase(order: dict[str, Any]) -> None:
    """Run a phase of a run up to its verdict."""
    with contextlib.ExitStack() as stack:
        cancel = Cancel()
        stack.callback(cancel.close)
        sinks = []
        for name in ("stdout", "stderr"):
            keep_fd = os.memfd_create(name)
            stack.callback(os.close, keep_fd)
            sinks.append(Sink(name, keep_fd=keep_fd, live_fd=None, max_bytes=settings.MIB))
        instance = stack.enter_context(started(order))
        limits = run_limits(default_policy()).for_guest()
        opened = opening(FREE, limits, [], out_writable=False)
        command = Exec(1, ["/bin/true"], {}, CWD, limits)
        given = CommandStreams(stdin_fd=None, stdout=sinks[0], stderr=sinks[1])
        before = status_kib("VmRSS")
        clock = Deadline.after(0)
        try:
            greet(instance, boot_s=order["boot_s"])
            session = Session(instance, cancel, opened)
            evidence = session.run(command, given, 1000, Receivers()).evidence
        except NoAnswerError as exc:
            evidence = evidence_of(exc.failure)
        verdict = classify(evidence)
        console, errors = instance.shown
        said = {"console": console, "errors": errors, "qmp": instance.qmp}
        tell(
            "verdict",
            outcome=verdict.outcome,
            reason=verdict.reason,
            seconds=clock.clock() - clock.at,
            grown_kib=status_kib("VmHWM") - before,
            said={name: stream.total_bytes for name, stream in said.items()},
            kept=len(evidence.console_tail),
        )


def main() -> None:
    """Carry out the order."""
    order = json.loads(sys.argv[1])
    if order["do"] == "thread":
        instances: list[QemuInstance] = []
        stack = contextlib.ExitStack()
        starter = threading.Thread(target=lambda: instances.append(stack.enter_context(started(order))))
        starter.start()
        starter.join()
        instances[0].release()
        tell("thread-ended")
        wait_for("stop")
        stack.close()
        return
    try:
        {"hold": hold, "talk": talk, "phase": phase, "die": die, "die-early": die_early}[order["do"]](order)
    except BackendError as exc:
        tell("refused", text=str(exc))


if __name__ == "__main__":
    main()
