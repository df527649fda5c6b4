"""The host's apt sources: an image uses only signed http or https sources of the host's release."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x07_sandbox.errors import ImageError
from x07_sandbox.images import sources

if TYPE_CHECKING:
    from pathlib import Path

DEB822 = """# the distribution
Types: deb deb-src
URIs: http://mirror.example/debian
# a comment inside
Suites: trixie trixie-updates trixie-backports
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

types: deb
uris: https://user:secret@mirror.example:8080/debian-security
suites: trixie-security
components: main
signed-by:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----
"""


def _apt(folder: Path, files: dict[str, str]) -> Path:
    (folder / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _read(apt: Path) -> tuple[list[dict[str, str]], list[str]]:
    notes: list[str] = []
    return sources.host_sources("trixie", "amd64", note=notes.append, apt=apt), notes


def test_deb822_sources_are_read_with_their_keys(tmp_path: Path) -> None:
    """A .sources file is read with its inline key, and suites of other releases are left out."""
    found, notes = _read(_apt(tmp_path / "apt", {"sources.list.d/debian.sources": DEB822}))
    assert [source["Suites"] for source in found] == ["trixie trixie-updates", "trixie-security"]
    assert notes == []
    assert next(iter(sources.parse_deb822(sources.encoded(found[1]))))["Signed-By"].endswith(
        "-----END PGP PUBLIC KEY BLOCK-----"
    )
    assert "deb-src" not in sources.encoded(found[0])


def test_one_line_sources_are_read_with_their_options(tmp_path: Path) -> None:
    """A .list file is read with its options."""
    text = (
        "deb [arch=amd64,arm64 signed-by=/k.gpg] http://mirror.example/debian trixie main contrib # best\n"
        "deb-src http://x y z\n"
    )
    found, _ = _read(_apt(tmp_path / "apt", {"sources.list": text}))
    assert sources.encoded(found[0]) == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main contrib\nSigned-By: /k.gpg\n"
    )


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("deb file:/srv/repository trixie main", "does not use http"),
        ("deb cdrom:[Debian]/ trixie main", "does not use http"),
        ("deb [trusted=yes] http://mirror.example/d trixie main", "signatures are not verified"),
        ("deb http://mirror.example/d bookworm main", "not for trixie"),
        ("deb http://mirror.example/d ./", "not for trixie"),
    ],
)
def test_other_sources_are_left_out_with_a_note(tmp_path: Path, line: str, note: str) -> None:
    """Local, unsigned and foreign sources are left out with a note."""
    good = "deb http://mirror.example/debian trixie main\n"
    found, notes = _read(_apt(tmp_path / "apt", {"sources.list": good, "sources.list.d/other.list": line + "\n"}))
    assert len(found) == 1
    assert len(notes) == 1
    assert note in notes[0]
    assert "mirror.example" not in notes[0]


@pytest.mark.parametrize(
    "stanza",
    ["Enabled: no\nTypes: deb", "Types: deb-src", "Types: deb\nArchitectures: arm64"],
    ids=["off", "src", "arch"],
)
def test_sources_that_apt_skips_are_skipped(tmp_path: Path, stanza: str) -> None:
    """Disabled, source-only and foreign-architecture sources are skipped silently."""
    text = f"{stanza}\nURIs: http://a.example/\nSuites: trixie\nComponents: main\n"
    files = {"sources.list": "deb http://b.example/ trixie main\n", "sources.list.d/a.sources": text}
    found, notes = _read(_apt(tmp_path / "apt", files))
    assert [source["URIs"] for source in found] == ["http://b.example/"]
    assert notes == []


def test_no_usable_source_is_an_error(tmp_path: Path) -> None:
    """No usable source is an error."""
    with pytest.raises(ImageError, match="no signed http or https source"):
        _read(_apt(tmp_path / "apt", {"sources.list": "deb http://m.example/ stable main\n"}))


def test_only_files_that_apt_reads_are_read(tmp_path: Path) -> None:
    """Only the files that apt reads are read."""
    text = "deb http://m.example/ trixie main\n"
    files = {"sources.list": text, "sources.list.d/x.list.save": text, "sources.list.d/y.disabled": text}
    apt = _apt(tmp_path / "apt", files)
    assert sources.source_files(apt) == [apt / "sources.list"]


def test_fetch_settings_are_kept_and_nothing_else() -> None:
    """Proxy and retry settings of apt.conf are kept; trust and install settings are not."""
    dump = """APT::Install-Recommends "1";
Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Verify-Peer "";
Acquire::Retries "3";
Acquire::AllowInsecureRepositories "1";
APT::Get::AllowUnauthenticated "1";
DPkg::Post-Invoke:: "rm -rf /tmp/x";
Dir::Etc "etc/apt";
"""
    assert sources.fetch_settings(dump) == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Retries "3";',
    ]


def test_release_is_read_from_os_release(tmp_path: Path) -> None:
    """The image uses the host's release."""
    path = tmp_path / "os-release"
    path.write_text('ID=debian\nVERSION_CODENAME="trixie"\n')
    assert sources.release_codename(path) == "trixie"
    path.write_text("ID=other\n")
    with pytest.raises(ImageError, match="has no VERSION_CODENAME"):
        sources.release_codename(path)


@given(st.text(max_size=300))
def test_any_text_is_read_without_a_crash(text: str) -> None:
    """Any text in a sources file is parsed without a crash."""
    for parse in (sources.parse_deb822, sources.parse_one_line):
        for stanza in parse(text):
            source, reason = sources.select(stanza, "trixie", "amd64")
            assert source is None or not reason
