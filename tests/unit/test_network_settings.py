"""The user's own network settings: what they open and refuse. Of the user's certificates, nothing else is passed on."""

from __future__ import annotations

import contextlib
import os
import ssl
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import HostError, SandboxError, UsageError
from x07_sandbox.host.paths import settings_file
from x07_sandbox.network.rules import NetSettings, Proxy
from x07_sandbox.network.settings import (
    parse_settings,
    read_certificates,
    read_settings,
    settings_from_json,
    settings_to_json,
)
from x07_sandbox.policy.hosts import Addresses, addresses

if TYPE_CHECKING:
    from pathlib import Path

ALL: Final = b"""
[net]
allow_local = ["192.168.7.5:8080", "127.0.0.1:8600", "[::1]:8600", "169.254.169.254:80", "100.64.0.1:22", "[fe80::1]:1",
    "10.0.0.0/8:443", "[fd00::/8]:443"]
allow_special = ["198.18.0.0/15:443", "[2001:db8::1]:80"]
allow_loopback = true
allow_metadata = true
opaque_ports = [443, 8443]
max_connections = 512
connections_per_second = 1000
max_pending = 256
idle_seconds = 60
proxy = "http://user:p%40ss@[::1]:3128/"
proxy_resolves = true

[other]
key = "of another part"
"""


def known(text: str) -> Addresses:
    """The range of addresses that *text* means."""
    found = addresses(text)
    assert found is not None
    return found


OPENED: Final = NetSettings(
    allow_local=frozenset(
        (known(address), port)
        for address, port in (
            *(("192.168.7.5", 8080), ("127.0.0.1", 8600), ("::1", 8600), ("169.254.169.254", 80)),
            *(("100.64.0.1", 22), ("fe80::1", 1), ("10.0.0.0/8", 443), ("fd00::/8", 443)),
        )
    ),
    allow_special=frozenset({(known("198.18.0.0/15"), 443), (known("2001:db8::1"), 80)}),
    opaque_ports=frozenset({443, 8443}),
    max_connections=512,
    connections_per_second=1000,
    max_pending=256,
    idle_seconds=60,
    proxy=Proxy(host=ip_address("::1"), port=3128, authorization="Basic dXNlcjpwQHNz", resolves=True),
)


def test_a_proxys_password_is_in_no_message() -> None:
    """No error or representation of the settings contains the proxy's password."""
    assert "dXNl" not in repr(OPENED)
    for url in ("http://user:secret@", "http://user:secret@h@x:1", "http://user:secret@h:99999", "ftp://u:secret@h:1"):
        with pytest.raises(UsageError) as caught:
            parse_settings(f'[net]\nproxy = "{url}"'.encode(), "here")
        assert "secret" not in str(caught.value)


def test_every_key_is_read() -> None:
    """Each key of [net] is read, and other tables are ignored."""
    assert parse_settings(ALL, "here") == OPENED


@pytest.mark.parametrize(
    "text", [b"", b"[net]\n", b"[other]\nkey = 1\n", b"[net]\nallow_local = []\nopaque_ports = []"]
)
def test_nothing_is_open_by_default(text: bytes) -> None:
    """Nothing is open by default."""
    assert parse_settings(text, "here") == NetSettings()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[net", "it is not valid TOML"),
        ("\udcff", "it is not valid TOML"),
        ("a = " + "[" * 9999, "it is not valid TOML"),
        ("a = " + "9" * 9999, "it is not valid TOML"),
        ("net = 1", "net is not a table"),
        ("[net]\nallow_hosts = []", r"\[net\] has an unknown key 'allow_hosts'"),
        ("[net]\nallow_loopback = 1", "net.allow_loopback is not true or false"),
        ("[net]\nopaque_ports = 443", "net.opaque_ports is not a list of numbers"),
        ('[net]\nopaque_ports = ["443"]', "net.opaque_ports is not a list of numbers"),
        ("[net]\nopaque_ports = [0]", "invalid port"),
        ("[net]\nopaque_ports = [65536]", "invalid port"),
        ("[net]\nopaque_ports = [true]", "invalid port"),
        ('[net]\nproxy = "https://h.example:1"', "net.proxy is not the URL of an HTTP proxy with a port"),
        ('[net]\nproxy = "http://h.example"', "net.proxy is not the URL"),
        ('[net]\nproxy = "http://h.example:1/path"', "net.proxy is not the URL"),
        ("[net]\nproxy_resolves = true", "net.proxy_resolves is true, but net.proxy is missing"),
        ("[net]\nmax_connections = 513", "net.max_connections is not a whole number from 1 to 512"),
        ("[net]\nmax_pending = true", "net.max_pending is not a whole number from 1 to 256"),
        ("[net]\nconnections_per_second = 0", "net.connections_per_second is not a whole number from 1 to 1000"),
        ("[net]\nidle_seconds = 60.0", "net.idle_seconds is not a whole number from 1 to 86400"),
        ('[net]\nallow_local = "10.0.0.1:80"', "net.allow_local is not a list of strings"),
        ("[net]\nallow_local = [80]", "net.allow_local is not a list of strings"),
        (
            '[net]\nallow_local = ["10.0.0.1"]',
            "the entry '10.0.0.1' of net.allow_local is invalid .the port is missing",
        ),
        ('[net]\nallow_local = ["10.0.0.0/33:80"]', "the entry '10.0.0.0/33:80' of net.allow_local is invalid"),
        ('[net]\nallow_local = ["0.0.0.0/0:80"]', "0.0.0.0 is an unspecified address"),
        ('[net]\nallow_local = ["93.184.215.0/24:80"]', "is not special"),
        ('[net]\nallow_local = ["fd00::/8:80"]', "needs brackets"),
        (
            '[net]\nallow_loopback = true\nallow_local = ["127.0.0.0/8:80"]',
            "a loopback address, .* List the address by itself",
        ),
        ('[net]\nallow_local = ["169.254.170.2/31:80"]', "a cloud metadata service .* set allow_metadata = true"),
        ('[net]\nallow_special = ["10.0.0.1:80"]', "Move the entry to allow_local"),
        ('[net]\nallow_special = ["224.0.0.1:80"]', "it is always denied"),
        ('[net]\nallow_local = ["nas.local:80"]', "is not an address"),
        ('[net]\nallow_local = ["93.184.215.14:80"]', "93.184.215.14 is not special"),
        ('[net]\nallow_local = ["198.18.0.16:80"]', "a benchmark address"),
        ('[net]\nallow_local = ["0.0.0.0:80"]', "an unspecified address"),
        ('[net]\nallow_local = ["[64:ff9b:1::1]:80"]', "an embedded IPv4 address"),
    ],
)
def test_invalid_settings_are_an_error(text: str, why: str) -> None:
    """An invalid key, type, port or address is an error that names the file."""
    with pytest.raises(UsageError, match=why) as caught:
        parse_settings(text.encode(errors="surrogateescape"), "/home/u/x07.toml")
    assert "/home/u/x07.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("127.0.0.1", "allow_loopback"),
        ("[::1]", "allow_loopback"),
        ("[::ffff:127.0.0.1]", "allow_loopback"),
        ("169.254.169.254", "allow_metadata"),
        ("100.100.100.200", "allow_metadata"),
    ],
)
def test_loopback_and_metadata_need_a_second_key(address: str, word: str) -> None:
    """Loopback and metadata addresses need allow_loopback or allow_metadata too."""
    text = f'[net]\nallow_local = ["{address}:80"]\n'
    with pytest.raises(UsageError, match=rf"set {word} = true in \[net\]"):
        parse_settings(text.encode(), "here")
    other = {"allow_loopback": "allow_metadata", "allow_metadata": "allow_loopback"}[word]
    with pytest.raises(UsageError, match=word):
        parse_settings(f"{text}{other} = true\n{word} = false".encode(), "here")
    assert len(parse_settings(f"{text}{word} = true".encode(), "here").allow_local) == 1


def test_too_long_a_file_is_an_error() -> None:
    """A settings file above one mebibyte is refused."""
    with pytest.raises(UsageError, match="has more than 1048576 bytes"):
        parse_settings(b"#" * ((1 << 20) + 1), "here")
    assert parse_settings(b"#" * (1 << 20), "here") == NetSettings()


def test_the_file_is_found_where_settings_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings file is in XDG_CONFIG_HOME, else in ~/.config."""
    folder = tmp_path / "x07"
    folder.mkdir()
    (folder / "sandbox.toml").write_bytes(ALL)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_settings() == OPENED
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_file() == tmp_path / ".config" / "x07" / "sandbox.toml"
    assert read_settings() == NetSettings()
    monkeypatch.delenv("HOME")
    with pytest.raises(HostError, match="HOME is not set"):
        read_settings()


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666, 0o660])
def test_a_file_that_others_can_write_is_refused(mode: int, tmp_path: Path) -> None:
    """A settings file that others can write is refused with the command to fix it."""
    path = tmp_path / "sandbox.toml"
    path.write_bytes(ALL)
    path.chmod(mode)
    with pytest.raises(HostError, match=f"run: chmod go-w {path}"):
        read_settings(path)
    path.chmod(0o644)
    assert read_settings(path) == OPENED


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """A settings file of another user is refused."""
    path = tmp_path / "sandbox.toml"
    path.write_bytes(ALL)
    os.chown(path, 65_532, 65_532)
    with pytest.raises(HostError, match="it belongs to you or root"):
        read_settings(path)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """An unreadable settings file is an error that names it."""
    with pytest.raises(HostError, match=f"cannot read {tmp_path}: Is a directory"):
        read_settings(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="Not a directory"):
        read_settings(tmp_path / "file" / "sandbox.toml")


LOCAL: Final = st.sampled_from(["10.1.2.3", "fd00::/8", "fe80::1", "100.64.0.0/10", "::1", "169.254.169.254"])
PORT: Final = st.integers(1, 65_535)


@given(st.sets(st.tuples(LOCAL.map(known), PORT), max_size=5), st.sets(PORT, max_size=5))
def test_settings_reach_the_gate_as_they_are(local: set[tuple[object, int]], ports: set[int]) -> None:
    """Settings reach the gate's process unchanged."""
    settings = NetSettings(allow_local=frozenset(local), opaque_ports=frozenset(ports))  # type: ignore[arg-type]
    assert settings_from_json(settings_to_json(settings)) == settings


@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda text: f'[net]\nallow_local = ["{text}"]'.encode()))
def test_any_file_is_settings_or_our_error(data: bytes) -> None:
    """Any file gives settings or an error of ours."""
    with contextlib.suppress(SandboxError):
        assert isinstance(parse_settings(data, "here"), NetSettings)


def test_a_relative_place_for_settings_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative XDG_CONFIG_HOME is ignored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", ".")
    assert settings_file() == tmp_path / ".config/x07/sandbox.toml"


# certificates


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority."""
    return trustme.CA()


def test_certificates_are_passed_on_without_their_comments(tmp_path: Path, authority: trustme.CA) -> None:
    """Comments around the certificates, and the file's form of line ends, are dropped."""
    pem = authority.cert_pem.bytes()
    path = tmp_path / "ca.pem"
    path.write_bytes(b"# the company's\r\n" + pem.replace(b"\n", b"\r\n") + b"\nsubject=x\n" + pem)
    assert read_certificates(path) == pem * 2


def test_anything_else_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    """A file with a key, another PEM object, a malformed certificate, no certificate or too many bytes is refused."""
    pem, path = authority.cert_pem.bytes(), tmp_path / "ca.pem"
    leaf = authority.issue_cert("a.example")
    malformed = b"-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----\n"
    cases = {
        leaf.private_key_and_cert_chain_pem.bytes(): "a private key",
        pem + b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n": "a private key",
        pem + b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n": "something else in PEM",
        ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem.decode()) + b"more").encode(): "malformed",
        pem[:-20]: "something else in PEM",
        b"": "no certificates",
        pem + malformed: "malformed",
        pem + b"#" * (256 << 10): "more than 262144 bytes",
    }
    for data, why in cases.items():
        path.write_bytes(data)
        with pytest.raises(UsageError, match=why):
            read_certificates(path)
    with pytest.raises(UsageError, match="No such file"):
        read_certificates(tmp_path / "missing")
