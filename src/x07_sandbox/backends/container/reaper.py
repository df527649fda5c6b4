"""A program that removes a container after its deadline, or after the x07 process that started it (the runner) ended.

    python -I -S reaper.py FOLDER DEADLINE_S RUNNER_FD CLIENT WORD...

DEADLINE_S: in seconds on the boot clock. RUNNER_FD: a pipe that closes when the runner ends. A byte in it means that
the container is gone. CLIENT WORD...: the command that removes the container. The program imports little, since it
lives as long as the job.
"""

import os
import select
import sys
import time

_TRIES = 5


def main(folder: str, deadline_s: float, runner_fd: int, removing: list[str]) -> None:
    """Wait for the deadline or the runner's end, then remove the container unless the runner has removed it."""
    poll = select.poll()
    poll.register(runner_fd, select.POLLIN)
    # At most an hour at a time: poll(2) does not count the time in which the machine sleeps.
    while (left_s := deadline_s - time.clock_gettime(time.CLOCK_BOOTTIME)) > 0:
        if poll.poll(min(left_s, 3600) * 1000 + 1):
            if os.read(runner_fd, 1):
                return
            break
    for attempt in range(_TRIES):
        pid = os.posix_spawn(removing[0], removing, os.environ)
        if not os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            _clean_up(folder)
            return
        time.sleep(0.2 * 2**attempt)


def _clean_up(folder: str) -> None:
    """Remove the container's files from the job's folder, then write the file `reaped` there."""
    for name in ("resolv.conf", "engine"):
        try:
            os.unlink(f"{folder}/{name}")  # noqa: PTH108 - pathlib would be one more import
        except OSError:
            continue
    try:
        fd = os.open(f"{folder}/reaped", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    os.write(fd, b"reaped\n")
    os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
