"""The host's apt sources and settings, as far as they may be used for a guest image.

Only signed `deb` sources over http or https are used, for the host's release, its updates and its security suite. All
other sources are skipped with a note, since their packages would depend on this one machine. Pins are ignored.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from x07_sandbox.errors import ImageError

MAX_BYTES = 1024 * 1024
# Settings for downloading, not for trust or selection; except Check-Valid-Until and Check-Date, which hosts with a
# frozen copy of the archive need.
SETTINGS = re.compile(r"Acquire::(?:https?(?:::.+)?|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date|By-Hash)")
OPTIONS = {
    "signed-by": "Signed-By",
    "arch": "Architectures",
    "trusted": "Trusted",
    "check-valid-until": "Check-Valid-Until",
    "check-date": "Check-Date",
    "by-hash": "By-Hash",
}
PASSED_ON = ("Signed-By", "Check-Valid-Until", "Check-Date", "By-Hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One stanza of apt sources."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    fields: tuple[tuple[str, str], ...] = ()  # further deb822 fields, passed on unchanged

    def stanza(self) -> str:
        """Return the source in deb822 format."""
        lists = (("URIs", self.uris), ("Suites", self.suites), ("Components", self.components))
        fields = [("Types", "deb"), *((name, " ".join(words)) for name, words in lists), *self.fields]
        return "".join(f"{name}: {value}\n" for name, value in fields)


def release_codename(os_release: Path = Path("/etc/os-release")) -> str:
    """Return VERSION_CODENAME of the host. Raises ImageError."""
    for line in _text(os_release).splitlines():
        if match := re.fullmatch(r'VERSION_CODENAME="?([a-z0-9.-]+)"?', line.strip()):
            return match[1]
    why = f"{os_release} has no VERSION_CODENAME"
    raise ImageError("cannot build a guest image", why, "Build it on a Debian host")


def host_sources(
    codename: str, deb_arch: str, *, note: Callable[[str], None], apt: Path = Path("/etc/apt")
) -> list[Source]:
    """Return the usable sources below *apt*, in apt's order. Raises ImageError if none serves the suite itself."""
    usable: list[Source] = []
    for path in source_files(apt):
        text = _text(path)
        parsed = parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text)
        for stanza in parsed:
            source, reason = select(stanza, codename, deb_arch)
            if source is None:
                if reason:
                    note(f"skipping a source in {path.name}: {reason}")
            elif source not in usable:
                usable.append(source)
    if not any(codename in source.suites for source in usable):
        why = f"no signed http or https source below {apt} serves the suite {codename}"
        fix = f"Add one for {codename} (by that name, not as 'stable') to {apt}/sources.list.d"
        raise ImageError(f"cannot build a guest image of {codename}", why, fix)
    return usable


def source_files(apt: Path) -> list[Path]:
    """Return the files that apt reads: sources.list, then sources.list.d in name order."""
    files = [apt / "sources.list"] if (apt / "sources.list").is_file() else []
    folder = apt / "sources.list.d"
    if folder.is_dir():
        files += sorted(
            p
            for p in folder.iterdir()
            if p.suffix in {".list", ".sources"} and re.fullmatch(r"[A-Za-z0-9._-]+", p.name) and p.is_file()
        )
    return files


def select(stanza: dict[str, str], codename: str, deb_arch: str) -> tuple[Source | None, str]:
    """Return the usable part of *stanza*, or None and why it is unusable ("" if apt would skip it too)."""
    if (
        stanza.get("Enabled", "yes").lower() in {"no", "false", "off", "0", "without", "disable"}
        or "deb" not in stanza.get("Types", "").split()
    ):
        return None, ""
    if stanza.get("Trusted", "").lower() in {"yes", "true", "on", "1", "with", "enable"}:
        return None, "its option trusted means that its signatures are not verified"
    architectures = stanza.get("Architectures", "").split()
    if architectures and deb_arch not in architectures:
        return None, ""
    uris = tuple(uri for uri in stanza.get("URIs", "").split() if re.match(r"https?://", uri))
    if not uris:
        return None, "it does not use http or https"
    wanted = {codename, f"{codename}-updates", f"{codename}-security"}
    suites = tuple(suite for suite in stanza.get("Suites", "").split() if suite in wanted)
    components = tuple(stanza.get("Components", "").split())
    if not suites or not components:
        return None, f"it is not for {codename}, its updates or its security fixes"
    fields = tuple((name, stanza[name]) for name in PASSED_ON if name in stanza)
    return Source(uris=uris, suites=suites, components=components, fields=fields), ""


def parse_deb822(text: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a .sources file; continuation lines (keys in Signed-By) keep their newlines."""
    stanza: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, name = {}, ""
        elif line[0] in " \t":
            if name:
                stanza[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            name = _canonical(name.strip())
            stanza[name] = value.strip()


def parse_one_line(text: str) -> Iterator[dict[str, str]]:
    """Yield the entries of a .list file as deb822 stanzas."""
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        match = re.fullmatch(r"(deb|deb-src)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)((?:\s+\S+)*)", line)
        if match is None:
            continue
        kind, options, uri, suite, components = match.groups()
        stanza = {"Types": kind, "URIs": uri, "Suites": suite, "Components": components.strip()}
        for option in (options or "").split():
            key, _, value = option.partition("=")
            if (field := OPTIONS.get(key.lower())) is not None:
                stanza[field] = value.replace(",", " ")
        yield stanza


def fetch_settings(dump: str) -> list[str]:
    """Return the download settings (proxies, retries) in the output of `apt-config dump`, for --aptopt."""
    found = ((line, re.fullmatch(r'(\S+) "(.+)";', line)) for line in dump.splitlines())
    return [line for line, match in found if match and SETTINGS.fullmatch(match[1])]


def _canonical(name: str) -> str:
    known = {field.lower(): field for field in ("Types", "URIs", "Suites", "Components", "Enabled", *OPTIONS.values())}
    return known.get(name.lower(), name)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError as exc:
        raise ImageError(f"cannot read {path}", exc.strerror or str(exc), "Make it readable") from exc
