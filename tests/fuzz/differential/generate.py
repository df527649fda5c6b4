"""The fuzzer's inputs: endless random cases, the same for the same seed."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from tests.fuzz.differential.case import Case, Mode, Step
from tests.fuzz.differential.corpus import CORPUS
from tests.fuzz.differential.http1 import PLACES, PREFIXES, Writer
from tests.fuzz.differential.others import http2, tls

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS: Final = ("http1",) * 10 + ("http2",) * 3 + ("tls",) * 2 + ("corpus",) * 3


def cases(seed: int) -> Iterator[Case]:
    """Yield random cases, endlessly."""
    random = Random(seed)  # noqa: S311
    number = 0
    while True:
        number += 1
        yield _case(random, f"seed {seed}, input {number}")


def _case(random: Random, name: str) -> Case:
    kind = random.choice(_KINDS)
    mode: Mode = random.choice(("any", "any", "http")) if kind == "http1" else "any"
    if kind == "http1":
        chance = random.choice((0.05, 0.2, 0.5))
        places = random.sample(PLACES, random.choice((1, 1, 2, 3)))
        steps = Writer(random, dict.fromkeys(places, chance)).connection()
    elif kind == "http2":
        steps = http2(random)
    elif kind == "tls":
        steps, mode = tls(random), random.choice(("tls", "any"))
    else:
        chosen = random.choice(CORPUS)
        steps, mode = list(chosen.steps), chosen.mode
    if random.random() < 0.02:
        steps[:0] = [random.choice(PREFIXES), None]
    if random.random() < (1.0 if kind == "corpus" else 0.05):
        place = random.choice([at for at, step in enumerate(steps) if step is not None])
        steps[place] = _mutated(random, steps[place] or b"")
    return Case(f"{name} ({kind})", mode, _cut(random, steps), half_close=random.random() < 0.1)


def _cut(random: Random, steps: list[Step]) -> tuple[Step, ...]:
    """Return the same bytes in other reads: joined, as they are, or cut at random places, with a pause at some."""
    way = random.randrange(4)
    found: list[Step] = []
    for step in steps:
        if step is None or way == 0:
            found.append(step)
        elif way == 1 and len(step) > 1:
            at = random.randrange(1, len(step))
            found += [step[:at], *([None] if random.random() < 0.3 else []), step[at:]]
        elif found and found[-1] is not None:
            found[-1] += step
        else:
            found.append(step)
    return tuple(step for step in found if step != b"")


def _mutated(random: Random, data: bytes) -> bytes:
    """Return the bytes with a few of them changed, removed, repeated or inserted."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(out) + 1)
        end = min(len(out), at + random.choice((1, 1, 2, 8)))
        kind = random.randrange(4)
        if kind == 0:
            out[at:end] = b""
        elif kind == 1:
            out[at:at] = out[at:end]
        elif kind == 2:
            out[at:at] = bytes([random.choice(b"\0\t\n\x0b\x0c\r !/:@,;\x7f\x80\xa0\xff0")])
        else:
            out[at:end] = random.randbytes(end - at)
    return bytes(out)
