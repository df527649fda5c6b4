"""What may be wrong with a policy document: problems, the error that lists them, and the rules.

The rules are what the schema cannot express: ``validate_basic`` of X07's own runner, and two rules of this tool. They
apply even if their section is disabled, and are checked on the plain document. Values of the wrong type are left to
the schema.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from x07_sandbox.errors import Command, Text, UsageError

HUGE: int = 10**20  # replaces every larger number in a document; outside the range of every field
MISSING = "is missing"  # the message for a required field that is absent
ADVICE = "Correct the policy. docs/reference/policy.md describes every field"
_SHOWN_CHARS = 80  # of an untrusted key, in a message
_HOST_MAX_BYTES = 255
_TOKENS_MAX = 256

# X07 passes these lists to the program joined with ';'.
_JOINED = (
    *(("fs", name) for name in ("read_roots", "write_roots")),
    *(("env", name) for name in ("allow_keys", "deny_keys")),
    *(("process", name) for name in ("allow_execs", "allow_exec_prefixes", "allow_env_keys", "allow_cwd_roots")),
    ("db", "sqlite", "allow_paths"),
    *(("db", "net", name) for name in ("allow_dns", "allow_cidrs")),
)
_PATTERNS = ("process", "allow_args_regex_lite")
_HOSTS = ("net", "allow_hosts")
# Tokens, each a character or an escape with at most one '*' after it; a single backslash may remain at the end.
_REGEX_LITE = re.compile(r"(?:(?:\\.|[^\\*])\*?)*(\\?)", re.DOTALL)


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One problem at one place of the document.

    json_path: the place, such as ``$.limits.cpu_ms`` or ``$.net.allow_hosts[2].ports``. message: without a full stop.
    suggestion: the key or value that the author probably meant.
    """

    json_path: str
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        """Return one line of a list: place, colon, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else f"{self.json_path}:")

    @property
    def sentence(self) -> str:
        """One sentence: place, message, suggestion."""
        return self._line("the document" if self.json_path == "$" else self.json_path)

    def _line(self, place: str) -> str:
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return f"{place} {self.message}{hint}"


class PolicyError(UsageError):
    """A policy document is invalid. ``problems`` lists all its problems.

    in_schema: whether the document matches the schema and violates only rules that a schema cannot express.
    """

    code = "policy"
    before_fix = "\n  "

    def __init__(
        self, what: str, why: str, fix: Text, problems: Iterable[Problem] = (), *, in_schema: bool = False
    ) -> None:
        super().__init__(what, why, fix)
        # Not in args: pickle rebuilds from args and then restores these attributes.
        self.problems: tuple[Problem, ...] = tuple(problems)
        self.in_schema = in_schema

    @classmethod
    def of(cls, source: str, problems: Sequence[Problem], *, in_schema: bool = False) -> "PolicyError":
        """Return the error for *problems* (at least one) in the document called *source*."""
        why = "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        if len(problems) == 1:
            why = problems[0].sentence
        fix: Text = ADVICE
        if any(problem.message == MISSING for problem in problems):
            fix = (f"{ADVICE}. To write a complete policy: ", Command("x07 policy new"))
        return cls(f"policy {source} is invalid", why, fix, problems, in_schema=in_schema)


def json_path(parts: Iterable[str | int]) -> str:
    """Return a path like ``$.a.b[3]``. A key that is not an identifier is quoted, escaped and truncated."""
    text = "$"
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.isascii() and len(part) <= _SHOWN_CHARS:
            text += f".{part}"
        else:
            shown = part if len(part) <= _SHOWN_CHARS else part[:_SHOWN_CHARS] + "..."
            text += f"[{json.dumps(shown)}]"
    return text


def rule_problems(document: object) -> Iterator[Problem]:
    """Yield a problem for each violation of a rule below in *document* (a json.loads value)."""
    for rule in RULES:
        yield from rule.check(document)


def spawn_needs_limits(document: object) -> Iterator[Problem]:
    """Check that ``allow_spawn`` is combined with at least one program and with limits above zero."""
    if _get(document, "process", "allow_spawn") is not True:
        return
    execs = [_get(document, "process", name) for name in ("allow_execs", "allow_exec_prefixes")]
    if all(names is None or names == [] for names in execs):
        yield Problem(
            "$.process.allow_execs",
            "must list a program while allow_spawn is true, unless allow_exec_prefixes lists a prefix",
        )
    for name in ("max_live", "max_spawns", "max_runtime_ms"):
        value = _get(document, "process", name)
        if value is None or (value == 0 and not isinstance(value, bool)):
            yield Problem(f"$.process.{name}", "must be above 0 while allow_spawn is true")


def cwd_needs_roots(document: object) -> Iterator[Problem]:
    """Check that ``allow_cwd`` is combined with at least one folder to start in."""
    roots = _get(document, "process", "allow_cwd_roots")
    if _get(document, "process", "allow_cwd") is True and (roots is None or roots == []):
        yield Problem("$.process.allow_cwd_roots", "must list a folder while allow_cwd is true")


def db_needs_driver(document: object) -> Iterator[Problem]:
    """Check that ``db.enabled`` is combined with at least one driver."""
    drivers = _get(document, "db", "drivers")
    if _get(document, "db", "enabled") is not True or not isinstance(drivers, dict):
        return
    if not any(drivers.get(name) is True for name in ("sqlite", "postgres", "mysql", "redis")):
        yield Problem("$.db.drivers", "at least one driver must be true while db.enabled is true")


def hosts_are_plain(document: object) -> Iterator[Problem]:
    """Check that a host is one word of at most 255 bytes and has at least one port."""
    hosts = _get(document, *_HOSTS)
    for index, entry in enumerate(hosts if isinstance(hosts, list) else ()):
        if not isinstance(entry, dict):
            continue
        place = (*_HOSTS, index)
        if entry.get("ports") == []:
            yield Problem(json_path((*place, "ports")), "must list at least one port")
        host = entry.get("host")
        if not isinstance(host, str):
            continue
        if any(char in ";\0" or char.isspace() for char in host):
            yield Problem(json_path((*place, "host")), "must not contain ';', whitespace or NUL")
        # surrogatepass: an unpaired surrogate is reported by the decoder.
        if len(host.encode("utf-8", "surrogatepass")) > _HOST_MAX_BYTES:
            yield Problem(json_path((*place, "host")), f"must have at most {_HOST_MAX_BYTES} bytes")


def entries_lack(char: str, shown: str, places: Iterable[tuple[str, ...]], document: object) -> Iterator[Problem]:
    """Check that no entry of these lists contains *char*. shown: the character in messages."""
    for place in places:
        for index, entry in _strings(document, place):
            if char in entry:
                yield Problem(json_path((*place, index)), f"must not contain {shown}")


def patterns_are_regex_lite(document: object) -> Iterator[Problem]:
    """Check that patterns are valid for X07's regex-lite."""
    for index, pattern in _strings(document, _PATTERNS):
        if fault := regex_lite_fault(pattern):
            yield Problem(json_path((*_PATTERNS, index)), fault)


def regex_lite_fault(pattern: str) -> str | None:
    """Return the problem with a pattern in X07's regex-lite, or None for a valid pattern."""
    if not pattern:
        return "must not be empty"
    if ";" in pattern:
        return "must not contain ';'"
    if len(pattern.encode("utf-8", "surrogatepass")) - pattern.count("\\") > _TOKENS_MAX:
        return f"must have at most {_TOKENS_MAX} tokens (bytes; an escape counts once)"
    match = _REGEX_LITE.match(pattern)
    if match is None or match.end() < len(pattern):
        return "a '*' must follow something to repeat"
    return "must not end in a single backslash" if match[1] else None


def id_is_one_line(document: object) -> Iterator[Problem]:
    r"""Check that the id is one line. X07 has no such rule. The schema's ``$`` accepts "name\n" in some languages."""
    policy_id = _get(document, "policy_id")
    if isinstance(policy_id, str) and not is_policy_id(policy_id):
        yield Problem("$.policy_id", "must be 1 to 64 letters, digits, '_', '.' or '-'")


def is_policy_id(text: str) -> bool:
    """Return whether *text* is a valid policy id."""
    return re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", text) is not None


class Rule(msgspec.Struct, frozen=True):
    """One rule: its check, and its text in docs/reference/policy.md."""

    check: Callable[[object], Iterator[Problem]]
    doc: str


RULES = (
    Rule(
        spawn_needs_limits,
        "`process.allow_spawn` requires a non-empty `allow_execs` or `allow_exec_prefixes`, "
        "and `max_live`, `max_spawns` and `max_runtime_ms` above 0.",
    ),
    Rule(cwd_needs_roots, "`process.allow_cwd` requires a non-empty `allow_cwd_roots`."),
    Rule(db_needs_driver, "`db.enabled` requires at least one of `db.drivers`."),
    Rule(
        hosts_are_plain,
        "Each entry of `net.allow_hosts` has at least one port, and a host of at most 255 bytes "
        "without `;`, whitespace or NUL.",
    ),
    Rule(
        partial(entries_lack, ";", "';'", _JOINED),  # with which X07 joins them
        "The entries of these lists contain no `;`: " + ", ".join(f"`{'.'.join(p)}`" for p in _JOINED) + ".",
    ),
    Rule(
        patterns_are_regex_lite,
        "A pattern of `process.allow_args_regex_lite` contains no `;`, no `*` at the start or after another `*`, "
        "and no single backslash at the end. (`.` matches any byte, `\\c` matches c, and `*` repeats. "
        "The pattern must match the whole argument.)",
    ),
    Rule(id_is_one_line, "`policy_id` is one line, without a line break at its end."),
    # They become environment variables. X07's own runner has no such rule.
    Rule(
        partial(entries_lack, "\0", "a NUL", (*_JOINED, _PATTERNS)),
        "The lists of rule 5 and the patterns of rule 6 contain no NUL.",
    ),
)


def _get(document: object, *names: str) -> Any:  # noqa: ANN401 - it is whatever JSON held there
    """Return the value at a path of keys, or None if it is absent."""
    for name in names:
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


def _strings(document: object, place: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    entries = _get(document, *place)
    if isinstance(entries, list):
        yield from ((index, entry) for index, entry in enumerate(entries) if isinstance(entry, str))
