"""The table of reasons: how a run or a phase ended, as a code with parameters, and the sentence for each code.

Code that learns more about an end changes the parameters, never the sentence. An error that ended a run is a reason
too: its code is the error's (`errors`), and its sentence is the error's text.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from x07_sandbox.errors import Flag

# What set a limit: a policy field, an option, or x07 itself.
_SET_BY: Final = "[ ({field})][ ({option})][ (to allow more, use {more})][ ({fixed})]"
_DENIED: Final = "[; it was denied {denied}]"  # new processes or threads, the lack of which often explains the end
_TIME: Final = f"reached its time limit[ of {{limit}}]{_SET_BY}"
# In braces: a parameter. In brackets: words that are left out if their parameter is missing.
REASONS: Final = {
    "exited": f"the {{subject}} exited with status {{status}}{_DENIED}",
    "signal": f"the {{subject}} was killed by {{signal}}[ ({{core}})]{_DENIED}",
    "wall-time": f"the {{subject}} {_TIME}{_DENIED}",
    "wall-time-emulated": (
        f"the {{subject}} {_TIME}; the VM is emulated, so CPU work takes many times longer than on hardware{_DENIED}"
    ),
    "wall-time-stopped": f"the {{subject}} was stopped by a signal and then {_TIME}{_DENIED}",
    "cpu-time": f"the {{subject}} reached its CPU time limit[ of {{limit}}]{_SET_BY}{_DENIED}",
    "memory": f"the {{subject}} was killed at its memory limit[ of {{limit}}]{_SET_BY}{_DENIED}",
    "output": f"the {{subject}} exceeded the output limit of {{limit}} for {{stream}}{_SET_BY}{_DENIED}",
    "not-executable": "the {subject} could not be executed: {problem}",
    "no-interpreter": "the {subject} could not be executed: {problem} (its interpreter or loader)",
    "command-not-in-image": "the command {name} is not in the image {image}. {advice}: {command}",
    "command-not-in-vm": "{name} or its interpreter does not exist in the VM",
    "command-not-on-host": "the command {name} is not installed on this host",
    "built": "the program was built",
    "not-built": "the build succeeded, but its output {problem}",
    "cancelled": "the run was cancelled[ by {by}][ while the guest was {doing}]",
    "cancelled-before-apply": "the run was cancelled[ by {by}] before its changes were applied",
    "not-prepared": "the guest could not prepare the program: {problem}",
    "guest-failed": "the guest failed while {doing}: {problem}",
    "agent-died": "the guest agent died while {doing} (kernel: {problem})",
    "kernel-panic": "the guest kernel panicked while {doing} (kernel: {problem})",
    "protocol": "the guest violated the channel protocol[ while {doing}]: {problem}",
    "boot-late": "the guest did not boot in time",
    "guest-late": "the guest reached its deadline while {doing}",
    "guest-silent": "the guest agent stopped responding while {doing}",
    "wait-status": "the guest reported an invalid wait status: {status}",
    "guest-off": "the guest powered off while {doing}",
    "supervisor-ended": "{supervisor} {how} while the guest was {doing}[: {problem}]",
    "supervisor-uid": "{supervisor} {how} while the guest was {doing}: {problem}",
    "supervisor-killed": (
        "{supervisor} {how} while the guest was {doing}; if this host ran out of memory, run fewer programs at once "
        "(X07_VM_MAX_RUNNING=1)"
    ),
    "closed": "the sandbox was closed",
    "expired": "the sandbox reached its lifetime of {limit}[ after {event}]",
    "idle": "the sandbox was idle for {limit}",
    "gate-exited": "the egress gate exited while the guest was {doing}",
    "bug": "bug in x07-sandbox: {problem}",
}
_OPTIONAL: Final = re.compile(r"\[([^]]*)\]")


def sentence(code: str, params: Mapping[str, object], word: Callable[[Flag], str] = str) -> str:
    """Return the sentence for a code, without a full stop. word: returns the name of an option, for the reader."""
    values = {name: word(value) if isinstance(value, Flag) else value for name, value in params.items()}
    words = []
    for number, part in enumerate(_OPTIONAL.split(REASONS[code])):
        try:
            words.append(part.format_map(values))
        except KeyError:
            if number % 2 == 0:  # not in brackets
                raise
    return "".join(words)


def ends_with_command(code: str) -> bool:
    """Return whether the sentence ends with a command to paste, which no full stop may follow."""
    return REASONS[code].endswith("{command}")
