"""Override flags: what they add and remove, with reproducible results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox.errors import UsageError
from x07_sandbox.policy.changes import Overrides, derive_policy
from x07_sandbox.policy.decode import decode_policy, default_policy, render_policy
from x07_sandbox.policy.hosts import addresses, covers, is_name, meaning
from x07_sandbox.policy.model import EffectivePolicy, HostPorts, Policy
from x07_sandbox.policy.templates import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Mapping

BUILT_IN = "built-in:default"


def derive(
    base: Policy | None = None,
    files: Mapping[str, bytes] | None = None,
    path: str = BUILT_IN,
    flags: Overrides | None = None,
    **words: Any,  # noqa: ANN401 - fields of Overrides
) -> EffectivePolicy:
    """The policy derived from *base* and *flags* or *words*; *files* holds the host files."""
    base = base or default_policy()
    wanted = flags or Overrides(**words)
    read = (files or {}).__getitem__
    return derive_policy(base, render_policy(base), path, wanted, read_spec_file=read, may_relax=True)


def digest_of(derived: EffectivePolicy) -> str:
    """The digest of base and flags in the id of a derived policy."""
    return derived.policy.policy_id.rpartition(".g")[2]


def with_hosts(*hosts: tuple[str, tuple[int, ...]], **changes: object) -> Policy:
    """The default policy with hosts."""
    base = default_policy()
    entries = tuple(HostPorts(host=host, ports=ports) for host, ports in hosts)
    return replace(base, net=replace(base.net, allow_hosts=entries, **changes))


def hosts_of(derived: EffectivePolicy) -> list[tuple[str, tuple[int, ...]]]:
    """Hosts and ports in order."""
    return [(entry.host, entry.ports) for entry in derived.policy.net.allow_hosts]


@pytest.mark.parametrize(
    ("flags", "digest"),
    [
        (
            {"allow_host": ("Example.com:443, 80",), "allow_read_root": ("data",), "deny_host": ("bad.example:*",)},
            "bc4c6893",
        ),
        ({"allow_write_root": (" tmp ", "tmp")}, "9e3171d5"),
    ],
)
def test_the_digest_is_upstreams(flags: dict[str, Any], digest: str) -> None:
    """The digest of base and flags equals X07's."""
    derived = derive_policy(default_policy(), b"{}\n", BUILT_IN, Overrides(**flags), read_spec_file=str.encode)
    assert digest_of(derived) == digest


def test_a_derived_policy_names_its_origin() -> None:
    """Id, file name and notes of a derived policy contain the digest."""
    derived = derive(allow_host=("example.org:443",))
    mark = f".g{digest_of(derived)}"
    assert derived.policy.policy_id == f"sandbox.default.base{mark}"
    assert derived.file_name == f"sandbox.default.base{mark}.policy.json"
    first, second = derived.policy.notes_in_force.split("\n")
    assert first == default_policy().notes
    assert (BUILT_IN in second, digest_of(derived) in second) == (True, True)
    long = replace(default_policy(), policy_id="x" * 60)
    derived = derive(long, allow_host=("example.org:443",))
    assert derived.policy.policy_id == "x" * 54 + f".g{digest_of(derived)}"
    assert derived.file_name == "x" * 60 + f".g{digest_of(derived)}.policy.json"


def test_notes_get_their_line_only_where_there_is_room() -> None:
    """The line about the origin is added to the notes if there is room."""
    full = replace(default_policy(), notes="x" * 4090)
    assert derive(full, allow_read_root=("a",)).policy.notes == "x" * 4090
    none = decode_policy(render_policy({k: v for k, v in document().items() if k != "notes"}), source="p")
    assert derive(none, allow_read_root=("a",)).policy.notes_in_force.startswith(f"Derived from {BUILT_IN}")
    assert "caf? ?" in derive(none, path="caf\udce9 \ud800", allow_read_root=("a",)).policy.notes_in_force


def document() -> dict[str, Any]:
    """The default policy as JSON."""
    found: dict[str, Any] = json.loads(render_policy(default_policy()))
    return found


def test_hosts_are_joined_and_keep_their_order() -> None:
    """Hosts are merged in order: base, files, flags."""
    base = with_hosts(("B.example", (443,)), ("a.example", (80,)), ("b.EXAMPLE", (22,)))
    files = {"more.txt": b"\xef\xbb\xbf# all of ours\n\n z.example : 1 , 2 # one\r\n[::1]:5\ny.example:7"}
    derived = derive(base, files, allow_host_file=("more.txt",), allow_host=("x.example:9", "a.example:8,80"))
    assert hosts_of(derived) == [
        ("b.example", (22, 443)),
        ("a.example", (8, 80)),
        ("z.example", (1, 2)),
        ("::1", (5,)),
        ("y.example", (7,)),
        ("x.example", (9,)),
    ]


def test_a_denied_host_is_removed() -> None:
    """A denied host or port is removed whatever allows it, in any spelling."""
    base = with_hosts(("a.example", (1, 2)), ("b.example.", (3,)), ("[2001:db8::1]", (4,)), ("10.1.2.3", (5, 6)))
    derived = derive(
        base,
        {"deny.txt": b"A.example:2\n10.0.0.0/8:6"},
        allow_host=("b.example:9", "a.example:2"),
        deny_host=("B.example:*", "2001:0db8:0::1:*"),
        deny_host_file=("deny.txt",),
    )
    assert hosts_of(derived) == [("a.example", (1,)), ("10.1.2.3", (5,))]


def test_a_run_can_deny_part_of_a_network() -> None:
    """A run can deny part of an allowed network, because the gate enforces it."""
    base = with_hosts(("10.0.0.0/8", (443, 80)))
    overrides = Overrides(deny_host=("10.1.2.3:443",))
    derived = derive_policy(base, render_policy(base), "p", overrides, read_spec_file=lambda _: b"", gate=True)
    assert hosts_of(derived) == [("10.0.0.0/8", (80, 443))]
    assert derived.denied == {"10.1.2.3": {443}}


def test_a_policy_cannot_deny_part_of_a_network() -> None:
    """A policy cannot deny part of an allowed network, so that is an error."""
    base = with_hosts(("10.0.0.0/8", (443, 80)))
    with pytest.raises(UsageError, match=r"is only part of 10\.0\.0\.0/8"):
        derive(base, deny_host=("10.1.2.3:443",))
    with pytest.raises(UsageError, match="is only part of"):
        derive(base, deny_host=("::ffff:10.1.2.3:*",))
    assert hosts_of(derive(base, deny_host=("10.1.2.3:22",))) == [("10.0.0.0/8", (80, 443))]
    assert hosts_of(derive(base, deny_host=("10.1.2.3:*", "10.0.0.0/8:*"))) == []


@pytest.mark.parametrize(
    ("host", "dns"),
    [
        ("example.org:443", True),
        ("bücher.example:443", True),
        ("10.0.0.1:443", False),
        ("2001:db8::abcd:443", False),
        ("[2001:db8::abcd]:443", False),
        ("2001:db8::/32:443", False),
        ("fe80::a-fe80::f:443", False),
    ],
)
def test_only_names_need_name_resolution(host: str, dns: object) -> None:
    """allow_dns is enabled only if a name is among the hosts."""
    base = with_hosts(allow_dns=False)
    derived = derive(base, allow_host=(host,))
    assert derived.policy.net.allow_dns is dns
    assert len(hosts_of(derived)) == 1


def test_a_deny_switches_nothing_on() -> None:
    """Denying hosts enables nothing."""
    base = with_hosts(("a.example", (1,)), ("b.example", (2,)), allow_dns=False)
    assert derive(base, deny_host=("a.example:*",)).policy.net.allow_dns is False


def test_roots_are_added_once() -> None:
    """Roots are trimmed and added once."""
    derived = derive(TEMPLATES["cli"], allow_read_root=(" data ", ".", "data"), allow_write_root=("out", "tmp"))
    assert derived.policy.fs.read_roots == (".", "data")
    assert derived.policy.fs.write_roots == ("out", "tmp")
    assert derived.policy.net == TEMPLATES["cli"].net


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "",
            "example.org",
            ":443",
            "a:0",
            "[::1",
            "[2001:db8::1:80",
            "a:65536",
            "a:1,,2",
            "a:\u0661",
        ),
        *("a b:1", "a;b:1", "a\0:1", "\udcff:1", "x" * 256 + ":1", "https://example.org:443", "*.example.org:443"),
    ],
)
def test_a_bad_host_is_wrong_usage(spec: str) -> None:
    """A malformed host is a usage error in flags and files."""
    every: list[dict[str, Any]] = [{"allow_host": (spec,)}, {"deny_host": (spec,)}]
    for flags in every:
        with pytest.raises(UsageError, match=r"cannot use --(allow|deny)-host .* Write HOST:PORT"):
            derive(**flags)
    line = spec.encode(errors="surrogateescape")
    if spec.strip():
        with pytest.raises(UsageError, match=r"cannot use --allow-host-file f(, line 2)?: "):
            derive(None, {"f": b"# first\n" + line}, allow_host_file=("f",))


def test_all_ports_can_only_be_denied() -> None:
    """'*' as ports is accepted only in --deny-host."""
    with pytest.raises(UsageError, match="only with --deny-host"):
        derive(allow_host=("example.org:*",))
    with pytest.raises(UsageError, match="a number from 1 to 65535"):
        derive(deny_host=("example.org:80,*",))
    assert hosts_of(derive(allow_host=("example.org:1",), deny_host=("example.org:*",))) == []


@pytest.mark.parametrize("root", ["", "  ", "x" * 4097, "a;b", "a\0b", "a\udcff"])
def test_a_bad_root_is_wrong_usage(root: str) -> None:
    """A malformed root is a usage error."""
    with pytest.raises(UsageError, match="cannot use --allow-write-root"):
        derive(allow_write_root=(root,))


def test_a_section_that_is_off_is_not_changed() -> None:
    """Flags for a disabled section are an error that names the field."""
    every: list[dict[str, Any]] = [{"allow_host": ("a:1",)}, {"deny_host": ("a:1",)}, {"allow_host_file": ("f",)}]
    for flags in every:
        with pytest.raises(UsageError, match=r"net\.enabled is false"):
            derive(TEMPLATES["cli"], **flags)
        with pytest.raises(UsageError, match=r"net\.allow_tcp is false"):
            derive(with_hosts(allow_tcp=False, allow_udp=True), **flags)
    with pytest.raises(UsageError, match=r"fs\.enabled is false"):
        derive(TEMPLATES["worker"], allow_read_root=("a",))


def test_a_policy_holds_only_so_much() -> None:
    """Too many hosts, ports or roots are refused."""
    hosts = tuple(f"h{number}.example:1" for number in range(257))
    assert len(hosts_of(derive(allow_host=hosts[:256]))) == 256
    with pytest.raises(UsageError, match="at most 256 entries, not 257"):
        derive(allow_host=hosts)
    assert len(hosts_of(derive(allow_host=hosts, deny_host=(hosts[0],)))) == 256
    ports = ",".join(map(str, range(1, 65)))
    with pytest.raises(UsageError, match="at most 64 entries, not 65"):
        derive(allow_host=(f"a:{ports}", "a:65"))
    with pytest.raises(UsageError, match="at most 128 entries, not 129"):
        derive(allow_read_root=tuple(map(str, range(129))))


# properties

HOSTS = st.sampled_from(
    ["a.example", "A.example", "b.example", "10.0.0.1", "10.0.0.0/30", "10.0.0.1-10.0.0.9", "::1", "[::1]", "::/64"]
)
PORTS = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)
SPECS = st.builds(lambda host, ports: f"{host}:{','.join(map(str, ports))}", HOSTS, PORTS)
DENIES = SPECS | HOSTS.map(lambda host: f"{host}:*")
ROOTS = st.text(min_size=1, max_size=6)
FLAGS = st.fixed_dictionaries(
    {
        "allow_host": st.lists(SPECS, max_size=4).map(tuple),
        "deny_host": st.lists(DENIES, max_size=3).map(tuple),
        "allow_read_root": st.lists(ROOTS, max_size=3).map(tuple),
        "allow_write_root": st.lists(ROOTS, max_size=3).map(tuple),
    }
)
BASES = st.lists(st.tuples(HOSTS, PORTS.map(tuple)), max_size=4).map(lambda hosts: with_hosts(*hosts))


@given(BASES, FLAGS)
@example(default_policy(), {})
def test_any_flags_give_a_valid_policy_and_always_the_same_or_wrong_usage(base: Policy, flags: dict[str, Any]) -> None:
    """Any flags give a valid, reproducible policy in which every denial holds, or a usage error."""
    try:
        derived = derive(base, flags=Overrides(**flags))
    except UsageError:
        with pytest.raises(UsageError):
            derive(base, flags=Overrides(**flags))
        return
    assert decode_policy(derived.data, source="p") == derived.policy
    assert derive(base, flags=Overrides(**flags)).data == derived.data
    for spec in flags.get("deny_host", ()):
        denied, _, ports = spec.rpartition(":")
        gone = set(range(65536)) if ports == "*" else set(map(int, ports.split(",")))
        for host, left in hosts_of(derived):
            assert covers(meaning(denied), meaning(host)) == "none" or not gone & set(left)


@pytest.mark.parametrize("host", ["1", "10.0.0.9-10.0.0.1", "10.0.0.1-::1", "a-b.example", "a/8", "10.0.0.0/33", "[a]"])
def test_malformed_networks_are_no_addresses(host: str) -> None:
    """A malformed network or range is no address."""
    assert addresses(host) is None
    assert is_name(host) == any(char.isalpha() for char in host)


def test_allow_flags_change_only_built_in_policies() -> None:
    """--allow-hidden and --allow-symlinks change only built-in policies."""
    derived = derive(allow_hidden=True, allow_symlinks=True).policy
    assert (derived.fs.deny_hidden, derived.fs.allow_symlinks) == (False, True)
    assert derived.policy_id != derive(allow_hidden=True).policy.policy_id
    only = derive(allow_symlinks=True).policy
    assert (only.fs.deny_hidden, only.fs.allow_symlinks) == (True, True)
    for word, field in (("hidden", "fs.deny_hidden"), ("symlinks", "fs.allow_symlinks")):
        flags = Overrides(**{f"allow_{word}": True})  # type: ignore[arg-type] # a bool
        derive_policy(derived, b"", BUILT_IN, flags, read_spec_file=str.encode)
        with pytest.raises(UsageError, match=f"cannot use --allow-{word}.*Set {field} to"):
            derive_policy(default_policy(), b"", BUILT_IN, flags, read_spec_file=str.encode)
