"""A runner that starts a machine with a short deadline and then stands still, as one that Ctrl-Z has stopped.

Arguments: digest of the image, deadline in seconds. Prints the pid of the jail's first process as JSON, and goes on,
when it may, to the machine's end.
"""

from __future__ import annotations

import json
import select
import signal
import sys

from x07_sandbox.backends.base import MachineKind
from x07_sandbox.backends.qemu.start import QemuJob, start_qemu
from x07_sandbox.images.store import find_image
from x07_sandbox.images.verify import open_image
from x07_sandbox.records.runs import Claim, create_record, new_run_id


def main(image: str, deadline_s: str) -> None:
    """Start, say so, stop, wait for the machine's end."""
    with open_image(find_image(image)) as opened:
        record = create_record(
            Claim(run_id=new_run_id(), phase="run", wall_ms=1000), backend="qemu", image_digest=opened.manifest.digest
        )
        kind = MachineKind(image=opened, ram_bytes=512 << 20)
        job = QemuJob(record=record, kind=kind, deadline_s=int(deadline_s), any_timer=True)
        with start_qemu(job, kvm=False) as instance:
            instance.release()
            sys.stdout.write(json.dumps({"inner": instance.inner.pid}) + "\n")
            sys.stdout.flush()
            signal.raise_signal(signal.SIGSTOP)
            while instance.exit_status() is None:
                for fd, _ in _poll(instance.pidfd, *instance.side_fds()).poll():
                    if fd != instance.pidfd:
                        instance.drain(fd)


def _poll(*fds: int) -> select.poll:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll


if __name__ == "__main__":
    main(*sys.argv[1:])
