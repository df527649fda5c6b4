"""The account of a run's connections: bounded, plain text and complete."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.channel.messages import Denied
from x07_sandbox.network import ledger
from x07_sandbox.network.ledger import LOG_MAX_BYTES, ROWS_MAX, Ledger
from x07_sandbox.network.rules import make_allowlist
from x07_sandbox.network.settings import parse_settings
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.denials import Contact, Denial, HowToAllow, NetworkUse
from x07_sandbox.policy.model import EffectivePolicy, HostPorts
from x07_sandbox.sessions.egress import denials, denials_without_gate, new_denials

if TYPE_CHECKING:
    from collections.abc import Callable

LINE_MAX: Final = 16 * 1024  # with all texts at their longest, each character escaped


class Log:
    """A ledger, its lines, and a clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[bytes] = []
        self.ledger = Ledger(self.write, lambda: self.now)

    def write(self, line: bytes) -> bool:
        """Keep a line."""
        self.lines.append(line)
        return True

    def events(self) -> list[dict[str, Any]]:
        """The parsed lines."""
        return [json.loads(line) for line in self.lines]


def contact(host: str = "a.example", **more: Any) -> Contact:  # noqa: ANN401 - as Contact has them
    """A contact with defaults."""
    words: dict[str, Any] = {"port": 443, "transport": "tcp", "rule": "net.allow_hosts[0]"}
    return Contact(**(words | more), host=host)


def test_a_connection_is_counted_with_its_bytes() -> None:
    """Connections of one kind form one row with count and bytes, and each event is one log line."""
    log = Log()
    for _ in range(2):
        counters = log.ledger.allowed(contact(address="93.184.215.14"))
        counters[1] += 10
        counters[2] += 200
        log.now += 0.5
        log.ledger.closed(contact(address="93.184.215.14"), 10, 200)
    log.ledger.denied(contact("b.example", rule="net.allow_hosts", reason="no entry lists b.example"))
    log.ledger.failed(contact(rule="dial:failed", reason="Connection refused"))
    use = log.ledger.use()
    (row,) = use.allowed
    assert (row.host, row.address, row.count, row.sent_bytes, row.received_bytes) == (
        *("a.example", "93.184.215.14"),
        *(2, 20, 400),
    )
    assert [(row.host, row.rule, row.count) for row in use.denied] == [("b.example", "net.allow_hosts", 1)]
    assert [(row.host, row.rule, row.count) for row in use.failed] == [("a.example", "dial:failed", 1)]
    assert (use.more, use.log_dropped) == (0, 0)
    lines = [(line["ms"], line["event"], line["host"]) for line in log.events()]
    assert lines == [
        *((0, "open", "a.example"), (500, "closed", "a.example"), (500, "open", "a.example")),
        *((1000, "closed", "a.example"), (1000, "denied", "b.example"), (1000, "failed", "a.example")),
    ]
    assert log.events()[1] == {
        "ms": 500,
        "event": "closed",
        "host": "a.example",
        "port": 443,
        "transport": "tcp",
        "rule": "net.allow_hosts[0]",
        "address": "93.184.215.14",
        "sent_bytes": 10,
        "received_bytes": 200,
    }


@pytest.mark.parametrize("table", ["allowed", "denied", "failed"])
def test_rows_are_bounded_and_the_rest_is_counted(table: str) -> None:
    """Each table has at most 256 rows and one more for each rule, and the rest is counted."""
    log = Log()
    count: Callable[[Contact], object] = getattr(log.ledger, table)
    for _ in range(2):
        for number in range(ROWS_MAX + 44):
            count(contact(f"n{number}.example"))
    use = log.ledger.use()
    rows: list[Contact] = getattr(use, table)
    assert {row.count for row in rows[:ROWS_MAX]} == {2}
    rest = [(row.host, row.port, row.rule, row.count) for row in rows[ROWS_MAX:]]
    # A guest cannot make rows of other rules, so all connections of a rule can be counted.
    assert (rest, use.more) == (([], 88) if table == "denied" else ([("", 0, rows[0].rule, 88)], 0))


def test_lines_are_bounded_in_time() -> None:
    """The log is limited to 20 lines a second after a burst, and states how many it dropped."""
    log = Log()
    for _ in range(100):
        for _ in range(1000):
            log.ledger.denied(contact())
        log.now += 0.1
    events = log.events()
    lines = [line for line in events if line["event"] == "denied"]
    assert 290 <= len(lines) <= 100 + 20 * 10
    assert len(events) <= 100 + 2 * 20 * 10  # each line may have one before it about those that were left out
    use = log.ledger.use()
    assert use.denied[0].count == 100_000
    assert use.log_dropped == 100_000 - len(lines)
    left_out = sum(line["lines"] for line in events if line["event"] == "dropped")
    assert left_out + len(lines) <= 100_000
    log.now += 100
    log.ledger.denied(contact())
    assert sum(line.get("lines", 0) for line in log.events()) == use.log_dropped


def test_the_log_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a run is limited to about 8 MiB."""
    assert LOG_MAX_BYTES == 8 << 20
    monkeypatch.setattr(ledger, "LOG_MAX_BYTES", 100_000)
    log = Log()
    for _ in range(5000):
        log.ledger.denied(contact("\U0001f600" * 300, reason="\u202e" * 600, tls_name="\x1b" * 300))
        log.now += 1
    assert sum(map(len, log.lines)) <= 100_000 + LINE_MAX
    assert log.ledger.use().log_dropped > 4000


HOSTILE: Final = 'a\n{"event":"open"}\x1b[2J\u202e\u2028\x7f\x85\0"\\\r'


@given(st.lists(st.tuples(st.text(max_size=400), st.text(max_size=700), st.text(max_size=400)), max_size=30))
@example([(HOSTILE, HOSTILE, HOSTILE)])
def test_any_text_is_one_bounded_line(texts: list[tuple[str, str, str]]) -> None:
    """Any text gives one printable log line of bounded length."""
    log = Log()
    for host, reason, tls_name in texts:
        log.ledger.denied(contact(host, reason=reason, tls_name=tls_name))
    assert len(log.lines) == len(texts)
    for line in log.lines:
        assert len(line) <= LINE_MAX
        assert line.endswith(b"\n")
        assert line[:-1].decode("ascii").isprintable()
    assert [line["host"] for line in log.events()] == [host[:253] for host, _, _ in texts]
    use = log.ledger.use()
    assert all(len(row.host) <= 253 and len(row.reason) <= 500 and len(row.tls_name) <= 253 for row in use.denied)
    assert msgspec.json.decode(msgspec.json.encode(use), type=NetworkUse) == use


EVENTS: Final = st.lists(
    st.tuples(st.sampled_from(["allowed", "denied", "failed"]), st.integers(0, 400), st.integers(0, 30)), max_size=200
)


@given(EVENTS, st.integers(1, 5))
def test_numbers_add_up(events: list[tuple[str, int, int]], most: int) -> None:
    """Rows, excess counts, lines and dropped lines add up to the number of events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "ROWS_MAX", most)
        log = Log()
        for kind, number, wait in events:
            getattr(log.ledger, kind)(contact(f"n{number}.example"))
            log.now += wait / 100
        use = log.ledger.use()
    rows = [*use.allowed, *use.denied, *use.failed]
    assert sum(row.count for row in rows) + use.more == len(events)
    assert max(len(use.allowed) - 1, len(use.denied), len(use.failed) - 1) <= most
    assert len([line for line in log.events() if line["event"] != "dropped"]) + use.log_dropped == len(events)


def test_a_flood_of_refusals_hides_no_connection() -> None:
    """A flood of refusals hides no connection from the log."""
    log = Log()
    for number in range(1000):
        log.ledger.denied(contact(f"n{number}.example"))
    log.ledger.allowed(contact("real.example"))
    for number in range(10):
        log.ledger.denied(contact(f"m{number}.example"))
    use = log.ledger.use()
    events = log.events()
    assert [line["host"] for line in events if line["event"] == "open"] == ["real.example"]
    assert events[-1]["event"] == "dropped"
    assert sum(line["lines"] for line in events if line["event"] == "dropped") == use.log_dropped == 910


def test_a_line_that_is_not_written_is_counted() -> None:
    """Lines lost to a full disk are counted."""
    ledger = Ledger(lambda _: False, lambda: 0.0)
    ledger.allowed(contact())
    assert ledger.use().log_dropped == 1


def test_excess_denials_are_counted() -> None:
    """A result lists at most 64 refused connections and counts the rest."""
    log = Log()
    for number in range(300):
        log.ledger.denied(contact(f"n{number}.example", port=0, rule="net.allow_hosts"))
    log.ledger.denied(contact("real.example", rule="tls:other-name", reason="it names another host"))
    found, more = denials(log.ledger.use(), make_allowlist(default_policy()))
    assert (found[0].subject, len(found), len(found) + more) == ("real.example:443", 64, 301)


def test_a_command_is_told_only_what_is_new() -> None:
    """A command of a sandbox lists connections that were denied since it started, with their own count."""
    log = Log()
    log.ledger.denied(contact("old.example", rule="net.allow_hosts"))
    log.ledger.denied(contact("again.example", rule="net.allow_hosts"))
    before = log.ledger.use()
    log.ledger.denied(contact("again.example", rule="net.allow_hosts"))
    log.ledger.denied(contact("again.example", rule="net.allow_hosts"))
    log.ledger.denied(contact("new.example", rule="net.allow_hosts"))
    rows = new_denials(log.ledger.use(), before).denied
    assert [(row.host, row.count) for row in rows] == [("again.example", 2), ("new.example", 1)]
    assert new_denials(before, before).denied == []


def unreachable(*reported: tuple[str, str]) -> list[Denial]:
    """The denials of what a guest without a network reported."""
    effective = EffectivePolicy(default_policy(), b"", "built-in:default")
    refused = [Denied(1, "network", call, 0, path, write=False, times=2) for call, path in reported]
    return denials_without_gate(refused, effective, "the virtual machine")


def test_a_program_without_a_network_leaves_a_trace() -> None:
    """What a program without a network looked up or connected to is listed, with the flag that would allow it."""
    found = unreachable(("connect", "1.1.1.1:80"), ("connect", "[2606:4700::1]:443"), ("lookup", "pypi.org"))
    assert [(one.action, one.subject, one.count, one.observed_by) for one in found] == [
        ("connect", "1.1.1.1:80", 2, "guest"),
        ("connect", "[2606:4700::1]:443", 2, "guest"),
        ("look up", "pypi.org", 2, "guest"),
    ]
    assert {one.field for one in found} == {"net.allow_hosts"}
    flags = [one.how_to_allow.flag for one in found if one.how_to_allow is not None]
    assert flags == [f"--allow-host {words}" for words in ("1.1.1.1:80", "'[2606:4700::1]:443'", "pypi.org:443")]


@pytest.mark.parametrize(
    "path", ["", ":", "a b:1", "[:1", "1.1.1.1", "1.1.1.1:0", "1.1.1.1:99999", "x" * 2000 + ":1", "\x9b:1"]
)
def test_a_lying_guest_cannot_break_the_list(path: str) -> None:
    """What is no address and port is left out, whatever a broken guest reports."""
    assert unreachable(("connect", path)) == []


def test_advice_about_a_name_like_an_option_can_be_pasted() -> None:
    """The flag for a name that starts with a hyphen has it behind an equals sign, so that no shell takes it apart."""
    (found,) = unreachable(("lookup", "--allow-host.example"))
    assert found.how_to_allow is not None
    assert found.how_to_allow.flag == "--allow-host=--allow-host.example:443"


def test_hosts_that_belong_together_are_named_together() -> None:
    """If pypi.org is granted, the denial of the host with its files says that both belong together."""
    log = Log()
    log.ledger.denied(contact("files.pythonhosted.org", rule="net.allow_hosts"))
    net = replace(default_policy().net, allow_hosts=(HostPorts(host="pypi.org", ports=(443,)),))
    for policy, wanted in ((default_policy(), ""), (replace(default_policy(), net=net), "pypi.org, which is granted")):
        found, _ = denials(log.ledger.use(), make_allowlist(policy))
        assert found[0].reason.startswith(wanted)
        assert bool(found[0].reason) == bool(wanted)


def test_the_advice_for_a_resolved_name_is_about_its_address() -> None:
    """The advice for a listed name with a special address keeps the entries of the settings, and IPv6 has brackets."""
    log = Log()
    log.ledger.denied(contact("a.example", port=80, rule="deny-floor:private", address="fd00::5"))
    log.ledger.denied(contact("2606:4700::1", port=80, rule="net.allow_hosts"))
    log.ledger.denied(contact("lo.example", port=81, rule="deny-floor:loopback", address="127.0.0.1"))
    settings = parse_settings(b'[net]\nallow_local = ["10.0.0.0/8:443"]', "here")
    found, _ = denials(log.ledger.use(), make_allowlist(default_policy(), settings=settings))
    advice = [denial.how_to_allow for denial in found]
    line = 'allow_local = ["10.0.0.0-10.255.255.255:443", "[fd00::5]:80"]'
    assert advice[0] == HowToAllow(json_path=None, value=None, setting=line)
    assert [denial.subject for denial in found[:2]] == ["a.example:80", "[2606:4700::1]:80"]
    assert advice[2] is not None
    assert advice[2].setting == (
        'allow_loopback = true and allow_local = ["10.0.0.0-10.255.255.255:443", "127.0.0.1:81"]'
    )
    assert advice[1] is not None
    assert advice[1].flag == "--allow-host '[2606:4700::1]:80'"
    opened = parse_settings(f"[net]\n{line}".encode(), "here")
    assert opened.allows(ip_address("fd00::5"), 80)
    assert opened.allow_local > settings.allow_local


def test_the_advice_for_a_lookup_has_the_port_that_the_program_wanted() -> None:
    """The advice for a name that was only looked up has the port of its URL in the error output, else 443."""
    log = Log()
    for name in ("plain.example", "other.example"):
        log.ledger.denied(contact(name, port=0, rule="net.allow_hosts"))
    text = "HTTPConnectionPool(host='plain.example', port=80): Max retries exceeded with url: /"
    found, _ = denials(log.ledger.use(), make_allowlist(default_policy()), text)
    flags = [denial.how_to_allow.flag for denial in found if denial.how_to_allow is not None]
    assert flags == ["--allow-host plain.example:80", "--allow-host other.example:443"]


def test_a_refusal_names_the_setting_that_allows_it() -> None:
    """A refusal that only the user's settings can allow names the line to add."""
    log = Log()
    rules = {"10.0.0.1": "private", "169.254.169.254": "metadata"}
    for host, rule in (*((host, f"deny-floor:{kind}") for host, kind in rules.items()), ("a.example", "tls:not-tls")):
        log.ledger.denied(contact(host, rule=rule, reason="why"))
    found, _ = denials(log.ledger.use(), make_allowlist(default_policy()))
    settings = [denial.how_to_allow.setting if denial.how_to_allow else None for denial in found]
    metadata = 'allow_metadata = true and allow_local = ["169.254.169.254:443"]'
    assert settings == ['allow_local = ["10.0.0.1:443"]', metadata, "opaque_ports = [443]"]
    assert {denial.reason for denial in found} == {"why"}
    assert [denial.field for denial in found] == [row.rule for row in log.ledger.use().denied]
