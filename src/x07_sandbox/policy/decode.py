"""The policy document: decoding it, what may be wrong with it, and the built-in default.

The rules are what the schema cannot express: ``validate_basic`` of X07's own runner, and two rules of this tool. They
apply even if their section is disabled, and are checked on the plain document. Values of the wrong type are left to
the schema.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NoReturn

import msgspec

from x07_sandbox.host.documents import prepared
from x07_sandbox.policy import model
from x07_sandbox.policy.model import (
    ADVICE,
    HUGE,
    HostPorts,
    Policy,
    PolicyError,
    Problem,
    json_path,
    leaf_values,
)

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


MAX_BYTES = 1 << 20
MAX_PROBLEMS = 100
_MAX_DEPTH = 32  # the model itself is five levels deep
_INT_CHARS = len(str(HUGE)) - 1  # Python refuses to convert very long ones
_TOO_DEEP = f"is nested too deeply: the maximum is {_MAX_DEPTH} levels"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANKS = " \t\r\n"


class _Repeated(dict[str, object]):
    """An object in which a key is repeated: the last value of each key, and the names of the repeated keys."""

    names: tuple[str, ...] = ()


def decode_policy(data: bytes, *, source: str) -> Policy:
    """Return the policy in *data*, checked against the schema and every rule. source: the document's name in errors.

    Raises PolicyError with all problems (at most MAX_PROBLEMS) if the document is invalid.
    """
    document = parse(data, source=source)
    policy = accept(document)
    if policy is None:
        raise _invalid(document, source)
    return policy


def check_policy(policy: Policy, *, source: str) -> None:
    """Raise PolicyError with all problems of a policy that was changed. source: its name in errors."""
    document = msgspec.json.decode(msgspec.json.encode(policy))
    if accept(document) is None:
        raise _invalid(document, source)


def parse(data: bytes, *, source: str) -> object:
    """Return the JSON value in *data*. Raises PolicyError if the data is not JSON.

    Whitespace around schema_version is stripped, because X07's own runner strips it too.
    """
    if len(data) > MAX_BYTES:
        _unreadable(source, f"is too large: it has {len(data)} bytes, and the maximum is {MAX_BYTES}")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_make_object, parse_int=_bounded_int, parse_constant=_no_constant)
    except UnicodeDecodeError as exc:
        _unreadable(source, f"is not UTF-8 text: byte {exc.start} is invalid")
    except json.JSONDecodeError as exc:
        _unreadable(source, f"is not valid JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})")
    except ValueError as exc:
        _unreadable(source, f"is not valid JSON: {exc}")
    except RecursionError:
        _unreadable(source, _TOO_DEEP)
    if isinstance(value, dict) and isinstance(version := value.get("schema_version"), str):
        value["schema_version"] = version.strip(_BLANKS)
    return value


def accept(document: object) -> Policy | None:
    """Return the policy in *document* or None if the document is invalid."""
    if any(_text_problems(document)):
        return None
    try:
        policy = msgspec.convert(document, prepared(Policy))
    except msgspec.ValidationError:
        return None
    return None if any(rule_problems(document)) else policy


def _invalid(document: object, source: str) -> PolicyError:
    """Return the error with the problems of an invalid document: at most one for each place and kind of check."""
    from x07_sandbox.policy.schema import schema_problems

    found = list(islice(_text_problems(document), MAX_PROBLEMS + 1))
    too_deep = any(problem.message == _TOO_DEEP for problem in found)
    found += islice(() if too_deep else schema_problems(document), MAX_PROBLEMS + 1)
    in_schema, reported = not found, {problem.json_path for problem in found}
    rules = (problem for problem in rule_problems(document) if problem.json_path not in reported)
    found += islice(() if too_deep else rules, MAX_PROBLEMS + 1)
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [Problem("$", f"has more problems than these {MAX_PROBLEMS}")]
    return PolicyError.of(source, found or [Problem("$", "is not valid")], in_schema=in_schema)


def _unreadable(source: str, message: str) -> NoReturn:
    # The message says where; a chained RecursionError would only add a huge traceback.
    problem = Problem("$", message)
    fault, _, why = message.partition(": ")
    raise PolicyError(f"policy {source} {fault}", why, ADVICE, (problem,)) from None


def _make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.names = tuple(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return repeated


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")  # NaN and Infinity, which Python's parser accepts


def _bounded_int(digits: str) -> int:
    if len(digits) <= _INT_CHARS:
        return int(digits)
    return -HUGE if digits.startswith("-") else HUGE


def _text_problems(document: object) -> Iterator[Problem]:
    """Yield repeated keys, strings that are not valid Unicode, and nesting that is too deep. Not recursive."""
    waiting: list[tuple[tuple[str | int, ...], object]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > _MAX_DEPTH:
            yield Problem("$", _TOO_DEEP)
            return
        if isinstance(value, str):
            if _SURROGATE.search(value):
                yield Problem(json_path(place), "is not valid Unicode (an unpaired \\u surrogate)")
        elif isinstance(value, dict):
            if isinstance(value, _Repeated):
                yield from (Problem(json_path((*place, name)), "appears more than once") for name in value.names)
            waiting.extend(((*place, name), inner) for name, inner in reversed(value.items()))
        elif isinstance(value, list):
            waiting.extend(((*place, index), inner) for index, inner in reversed(list(enumerate(value))))


_MIB = 1 << 20


def default_policy() -> Policy:
    """Return the built-in default: one minute, 512 MiB, 64 processes, no host files, no network hosts.

    Processes may be started because the machine is thrown away after the run. fs and net are enabled with empty lists
    so that a flag can add a folder or a host without a policy file.
    """
    return Policy(
        schema_version=model.SCHEMA_VERSION,
        policy_id="sandbox.default.base",
        notes="Built in: a minute, 512 MiB, no host files or network until added.",
        limits=model.Limits(cpu_ms=60_000, wall_ms=60_000, mem_bytes=512 * _MIB, fds=1024, procs=64, core_dumps=False),
        fs=model.Fs(
            enabled=True,
            read_roots=(),
            write_roots=(),
            deny_hidden=True,
            allow_symlinks=False,
            allow_mkdir=True,
            allow_remove=True,
            allow_rename=True,
            allow_walk=True,
            allow_glob=True,
            max_read_bytes=256 * _MIB,
            max_write_bytes=256 * _MIB,
            max_entries=100_000,
            max_depth=128,
        ),
        net=model.Net(enabled=True, allow_dns=True, allow_tcp=True, allow_udp=False, allow_hosts=()),
        env=model.Env(enabled=True, allow_keys=(), deny_keys=()),
        time=model.Time(
            enabled=True,
            allow_monotonic=True,
            allow_wall_clock=True,
            allow_sleep=True,
            max_sleep_ms=86_400_000,
            allow_local_tzid=False,
        ),
        language=model.Language(allow_unsafe=True, allow_ffi=True),
        threads=model.ABSENT_THREADS,
        process=model.Process(
            enabled=True,
            allow_spawn=True,
            max_live=64,
            max_spawns=1024,
            allow_exec=True,
            allow_exit=True,
            allow_exec_prefixes=("/",),
            max_runtime_ms=60_000,
            max_stdout_bytes=10 * _MIB,
            max_stderr_bytes=10 * _MIB,
            max_total_bytes=16 * _MIB,
            max_stdin_bytes=_MIB,
        ),
    )


def render_policy(policy: Policy | Mapping[str, object]) -> bytes:
    """Return a policy as file content: indented JSON with sorted keys and the defaults of every present section."""
    document = msgspec.to_builtins(policy) if isinstance(policy, Policy) else policy
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys, without whitespace, final newline or escapes for non-ASCII characters."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def policy_digest(policy: Policy) -> str:
    """Return `sha256:` and the digest of the canonical JSON of *policy*, with the defaults of every section.

    The field `digests.policy` in a run's result is a different digest: that of the policy file's bytes.
    """
    return f"sha256:{hashlib.sha256(canonical_json(msgspec.to_builtins(policy))).hexdigest()}"


_SECTIONS = ("fs.", "net.", "db.", "env.", "time.", "threads.", "process.")
# Variables not named after their fields.
_IRREGULAR = {
    "fs.deny_hidden": "X07_OS_DENY_HIDDEN",
    "db.drivers.postgres": "X07_OS_DB_PG",
    "db.connect_timeout_ms": "X07_OS_DB_MAX_CONNECT_TIMEOUT_MS",
    "db.query_timeout_ms": "X07_OS_DB_MAX_QUERY_TIMEOUT_MS",
}


def _variable(field: str) -> str:
    """Return a field's variable: X07_OS_PROC_MAX_LIVE for "process.max_live", X07_OS_FS for "fs.enabled"."""
    path = field.removesuffix(".enabled").replace("process", "proc").replace(".drivers", "")
    return _IRREGULAR.get(field) or f"X07_OS_{path.replace('.', '_').upper()}"


# (variable, field), in the order of the model.
VARIABLES: tuple[tuple[str, str], ...] = tuple(
    (_variable(field), field) for field in leaf_values(default_policy()) if field.startswith(_SECTIONS)
)


def program_environment(policy: Policy) -> dict[str, str]:
    """Return all X07 variables of a sandboxed program. None of them comes from the host's environment."""
    values = leaf_values(policy)
    carried = {variable: _text(values[field]) for variable, field in VARIABLES}
    return {"X07_WORLD": "run-os-sandboxed", "X07_OS_SANDBOXED": "1", **carried}


def _text(value: object) -> str:
    match value:
        case bool():
            return "1" if value else "0"
        case tuple():
            # Ports are joined by commas, everything else by semicolons.
            return ("," if value and isinstance(value[0], int) else ";").join(_entry(entry) for entry in value)
        case _:
            return str(value)


def _entry(entry: object) -> str:
    if isinstance(entry, HostPorts):
        return f"{entry.host}:{','.join(str(port) for port in entry.ports)}"
    return str(entry)
