"""An emulated machine's timer: its kernel may measure it wrong on a busy host, and then another machine is booted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.host import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.base import HandshakeFailure

_SAID: Final = "x07 init: the timer was measured wrong"  # guest/boot/init.c
MISCALIBRATED: Final = "its kernel measured its timer wrong, as on a host with too little time for it"
MISCALIBRATED_FIX: Final = "try again with less beside it"


def boot_attempts() -> Iterator[bool]:
    """Yield, for each boot that a job may have, whether it is the last one."""
    return (number == settings.BOOTS_MAX for number in range(1, settings.BOOTS_MAX + 1))


def miscalibrated(failure: HandshakeFailure) -> bool:
    """Whether a machine gave up booting because its kernel had measured its timer wrong: another may do better."""
    return _SAID in failure.console_tail
