"""The timer of an emulated machine: on a busy host its kernel may calibrate it wrong, and another boot is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from x07_sandbox.host import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.backends.base import HandshakeFailure

_SAID: Final = "x07 init: the timer was measured wrong"  # guest/boot/init.c
MISCALIBRATED: Final = "its kernel calibrated its timer wrong, as happens on an overloaded host"
MISCALIBRATED_FIX: Final = "try again when the host is less busy"


def boot_attempts() -> Iterator[bool]:
    """Yield, for each allowed boot attempt, whether it is the last one."""
    return (number == settings.BOOTS_MAX for number in range(1, settings.BOOTS_MAX + 1))


def miscalibrated(failure: HandshakeFailure) -> bool:
    """Whether the machine gave up booting because of its timer."""
    return _SAID in failure.console_tail
