"""Opening a sandbox, and forks of one, for a caller from Python and for the process that holds one."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from x07_sandbox.backends.registry import backend_request, select, this_platform
from x07_sandbox.errors import Flag, UsageError, listed
from x07_sandbox.host.settings import LIFETIME_S, QUEUE_S
from x07_sandbox.library.arguments import SANDBOX, bad_argument, checked_options, checked_seconds
from x07_sandbox.options import BY_KEYWORD, keyword
from x07_sandbox.sessions.request import RunCaller, make_request
from x07_sandbox.sessions.run import pool_machines, sweep_before_start
from x07_sandbox.sessions.sandbox import NAME, NAME_RULE, OpenSandbox
from x07_sandbox.sessions.shared import Life

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.sessions.command import AnySandbox

_OF_FORKS: Final = ("lifetime_s", "idle_s", "name", "tags", "wait_s")
OF_SANDBOXES: Final = (*_OF_FORKS, "backend", "snapshot")
"""The keywords of `Sandbox` that runs do not have."""
_TAGS_MAX: Final = 64
_TAG_MAX: Final = 256


def open_sandbox(
    given: Mapping[str, Any],
    cancel: Cancel,
    *,
    machines: MachineSource | None = None,
    choice: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _text: None,
    word: Callable[[Flag], str] = keyword,
) -> OpenSandbox:
    """Open a sandbox. Raises SandboxError.

    given: keywords of `Sandbox` whose value is not the default. choice: keywords of `backend_request`; None for those
    that the keyword `backend` stands for. word: returns the name of an option, for the reader of messages.
    """
    life = checked_life(given)
    if (snapshot := given.get("snapshot")) is not None:
        return _fork(snapshot, given, life, RunCaller(cancel=cancel, progress=progress, word=word))
    backend = given.get("backend")
    selected = select(this_platform(), backend_request(**(choice or {"backend": backend, "flags": ()})))
    of_runs = {name: value for name, value in given.items() if name not in OF_SANDBOXES}
    request = replace(make_request(checked_options(of_runs, SANDBOX)), queue_s=_checked_wait(given))
    sweep_before_start()
    caller = RunCaller(
        cancel=cancel, progress=progress, choice=selected, machines=machines or pool_machines(), word=word
    )
    return OpenSandbox(request, caller, life)


def _fork(snapshot: object, given: Mapping[str, Any], life: Life, caller: RunCaller) -> OpenSandbox:
    """Open a sandbox from a snapshot. Raises SandboxError."""
    from x07_sandbox.library.snapshots import folder_of  # few sandboxes are forks
    from x07_sandbox.sessions.snapshots import read

    if more := sorted(given.keys() - {*_OF_FORKS, "snapshot"}):
        flags = [Flag(BY_KEYWORD[name].flag) if name in BY_KEYWORD else name for name in more]
        why = (*listed(flags, " and "), " cannot be given for a sandbox that starts from a snapshot")
        raise UsageError("cannot open the sandbox", why, ("Omit ", *listed(flags, " and ")))
    folder = folder_of(snapshot)
    saved = read(folder)
    wait_s = _checked_wait(given)
    selected = select(this_platform(), backend_request(backend=saved.backend, flags=()))
    sweep_before_start()
    request, caller = replace(saved.request, queue_s=wait_s), replace(caller, choice=selected)
    return OpenSandbox(request, caller, life, folder, saved)


def _checked_wait(given: Mapping[str, Any]) -> float:
    wait_s = given.get("wait_s", QUEUE_S)
    if not isinstance(wait_s, bool) and wait_s == 0:
        return 0.0
    wrong = bad_argument("wait_s", f"is {wait_s!r}, not a number of seconds from 0", SANDBOX)
    return checked_seconds("wait_s", wait_s, wrong)


def checked_life(given: Mapping[str, Any]) -> Life:
    """Return how long a sandbox lasts and how it is found, from keywords. Raises UsageError."""
    idle_s, name, tags, backend = (given.get(key) for key in ("idle_s", "name", "tags", "backend"))
    if backend is not None and not isinstance(backend, str):
        raise bad_argument("backend", f"is {type(backend).__name__}, not str", SANDBOX)
    if name and not (isinstance(name, str) and NAME.fullmatch(name)):
        raise bad_argument("name", f"is {name!r}; {NAME_RULE}", SANDBOX)
    tags = {} if tags is None else tags
    try:
        pairs = [*tags.items()]
    except AttributeError:
        raise bad_argument("tags", f"is {type(tags).__name__}, not a mapping of str to str", SANDBOX) from None
    for part in (word for pair in pairs for word in pair):
        if not isinstance(part, str) or len(part) > _TAG_MAX or not part.isprintable():
            raise bad_argument("tags", f"has {part!a}, not a text of at most {_TAG_MAX} characters", SANDBOX)
    if len(pairs) > _TAGS_MAX:
        raise bad_argument("tags", f"has {len(pairs)} entries, more than {_TAGS_MAX}", SANDBOX)
    return Life(
        lifetime_s=checked_seconds("lifetime_s", given.get("lifetime_s", LIFETIME_S)),
        idle_s=None if idle_s is None else checked_seconds("idle_s", idle_s),
        name=name or "",
        tags=dict(pairs),
    )


def forks_of(opened: AnySandbox, count: int, given: Mapping[str, Any]) -> Sequence[tuple[AnySandbox, Cancel | None]]:
    """Return *count* forks, each with what cancels it. given: keywords of `Sandbox`. Raises SandboxError."""
    from x07_sandbox.library.run import run_uninterrupted
    from x07_sandbox.library.snapshots import checked_count

    count = checked_count(count)
    checked_life(given)
    if not isinstance(opened, OpenSandbox):
        from x07_sandbox.library.held import HeldSandbox

        assert isinstance(opened, HeldSandbox)  # there is no other kind
        return [(fork, None) for fork in opened.fork(count, given)]
    cancels: list[Cancel] = []

    def cancel_all() -> None:
        for one in cancels:
            one()

    return run_uninterrupted(cancel_all, lambda: _own_forks(opened, count, given, cancels))


def _own_forks(
    opened: OpenSandbox, count: int, given: Mapping[str, Any], cancels: list[Cancel]
) -> list[tuple[OpenSandbox, Cancel]]:
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.snapshots import started

    with contextlib.ExitStack() as stack, opened.saved(count) as place:

        def start() -> tuple[OpenSandbox, Cancel]:
            cancel = Cancel()
            cancels.append(cancel)
            stack.callback(cancel.close)
            return open_sandbox({**given, "snapshot": place.path}, cancel), cancel

        found = started(count, start, lambda one: one[0].finish("discard"))
        stack.pop_all()
    return found


def fork_runs(opened: OpenSandbox, count: int, given: Mapping[str, Any], *, flags: bool) -> list[str]:
    """Return the ids of *count* forks, each held by a process of its own. Raises SandboxError."""
    from x07_sandbox.host.waiting import Cancel
    from x07_sandbox.library.held import create, discard
    from x07_sandbox.library.held_messages import Create
    from x07_sandbox.library.snapshots import started

    with contextlib.closing(Cancel()) as cancel, opened.saved(count) as place:
        asked = Create({**given, "snapshot": place.path}, None, flags=flags)
        return started(count, partial(create, asked, cancel.fd), discard)
