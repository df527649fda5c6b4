"""Retention: after a run, and at most once an hour, the records of runs that exceed the limits are removed."""

import contextlib
import os
from collections.abc import Callable
from typing import Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.locks import file_lock
from x07_sandbox.host.paths import state_dir
from x07_sandbox.sessions.folder import runs_dir

MARK: Final = ".retention"  # its time is that of the last removal; it has content once the message was shown
_EVERY_MS: Final = 3_600_000
_BUDGET_S: Final = 0.3


def retain_records(say: Callable[[str], None] | None = None) -> None:
    """Remove records of runs that exceed the limits, within 0.3 s. The next call goes on. Errors are ignored.

    say: called with a line the first time that something is removed.
    """
    with contextlib.suppress(SandboxError, OSError):
        mark = runs_dir(state_dir()) / MARK
        if os.path.lexists(mark) and abs(unix_ms() - mark.lstat().st_mtime_ns // 1_000_000) < _EVERY_MS:
            return
        from x07_sandbox.host.user_settings import disk_limits
        from x07_sandbox.housekeeping.pruner import Pruner
        from x07_sandbox.housekeeping.records import prune_records

        with file_lock(mark, most_s=0):
            os.utime(mark)
            pruner = Pruner(lambda _text: None, dry_run=False)
            done = prune_records(pruner, budget_s=_BUDGET_S)
            runs = sum(row.kind == "run" for row in pruner.removed)
            if runs and say is not None and not mark.stat().st_size:
                _, days, most, mib = disk_limits()
                say(
                    f"removed the records of {runs} old run{'' if runs == 1 else 's'}: x07 keeps those of the last "
                    f"{days} days, at most {most} and {mib} MiB ([disk] in sandbox.toml). This message is shown once"
                )
                mark.write_text("shown\n")
            if not done:
                os.utime(mark, (0, 0))
