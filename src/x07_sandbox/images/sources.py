"""The host's apt sources, settings and package lists, as far as they may be used for a guest image.

Only signed `deb` sources over http or https are used, for the host's release, its updates and its security suite. All
other sources are skipped with a note, since their packages would depend on this one machine. Pins are ignored.

On a host without package lists, nothing is looked up: mmdebstrap downloads lists, and reports unknown packages.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from x07_sandbox.errors import ImageError, UsageError
from x07_sandbox.host.paths import raised_as
from x07_sandbox.images import commands

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
_FIELDS = {field.lower(): field for field in ("Types", "URIs", "Suites", "Components", "Enabled", *OPTIONS.values())}


def release_codename(os_release: Path = Path("/etc/os-release")) -> str:
    """Return VERSION_CODENAME of the host. Raises ImageError."""
    for line in _text(os_release).splitlines():
        if match := re.fullmatch(r'VERSION_CODENAME="?([a-z0-9.-]+)"?', line.strip()):
            return match[1]
    why = f"{os_release} has no VERSION_CODENAME"
    raise ImageError("cannot build a guest image", why, "Build it on a Debian host")


def host_sources(
    codename: str, deb_arch: str, *, note: Callable[[str], None], apt: Path = Path("/etc/apt")
) -> list[dict[str, str]]:
    """Return the usable sources below *apt*, in apt's order. Raises ImageError if none serves the suite itself."""
    usable: list[dict[str, str]] = []
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
    if not any(codename in source["Suites"].split() for source in usable):
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


def select(stanza: dict[str, str], codename: str, deb_arch: str) -> tuple[dict[str, str] | None, str]:
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
    uris = " ".join(uri for uri in stanza.get("URIs", "").split() if re.match(r"https?://", uri))
    if not uris:
        return None, "it does not use http or https"
    wanted = {codename, f"{codename}-updates", f"{codename}-security"}
    suites = " ".join(suite for suite in stanza.get("Suites", "").split() if suite in wanted)
    components = " ".join(stanza.get("Components", "").split())
    if not suites or not components:
        return None, f"it is not for {codename}, its updates or its security fixes"
    passed_on = {name: stanza[name] for name in PASSED_ON if name in stanza}
    return {"Types": "deb", "URIs": uris, "Suites": suites, "Components": components, **passed_on}, ""


def encoded(stanza: dict[str, str]) -> str:
    """Return a stanza in deb822 format."""
    return "".join(f"{name}: {value}\n" for name, value in stanza.items())


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
            name = _FIELDS.get(name.strip().lower(), name.strip())
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


def _text(path: Path) -> str:
    with raised_as(ImageError, f"cannot read {path}", "Make it readable"), path.open("rb") as file:
        return file.read(MAX_BYTES).decode(errors="replace")


NEAR_MAX = 3
_NEAR = 0.75
_PYTHON = "python3-"


def write_sources(work: Path, suite: str, deb_arch: str, note: Callable[[str], None]) -> Path:
    """Write the apt sources of an image to a file in *work*, and return the file's path. Raises ImageError."""
    file = work / "build.sources"
    found = host_sources(suite, deb_arch, note=note)
    file.write_text("\n".join(map(encoded, found)))
    return file


def check_known(file: Path, include: Sequence[str], suite: str) -> None:
    """Raise UsageError for the first package that no source in *file* has. The error suggests similar names."""
    known = package_names(file) if include else frozenset()
    if not known:
        return
    unknown = (name for name in include if name not in known)
    # A virtual package has no version of its own, but other packages provide it.
    mark = "Reverse Provides:"
    if name := next((name for name in unknown if not _cache(file, "showpkg", name).partition(mark)[2].strip()), None):
        near = near_names(name, known)
        fixes = [f"Use one of these: {', '.join(near)}"] if near else ["Find it with apt-cache search"]
        fixes += [f"For the PyPI package, use --pip {name}"] if f"{_PYTHON}{name}" in known else []
        fixes.append("If it is new, run apt-get update")
        why = f"Debian {suite} has no package with this name"
        raise UsageError(f"cannot add {name!r} to an image", why, ". ".join(fixes))


def package_names(file: Path) -> frozenset[str]:
    """Return all package names in the host's lists for the sources in *file*. Return none if the host has no lists."""
    return frozenset(_cache(file, "pkgnames").split())


def versions(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages in *names* that the host's package lists contain."""
    wanted = [name for name in names if name in package_names(file)]
    if not wanted:
        return {}
    stanzas = parse_deb822(_cache(file, "show", "--no-all-versions", *wanted))
    return {stanza["Package"]: stanza["Version"] for stanza in stanzas if {"Package", "Version"} <= stanza.keys()}


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the names in *known* that are closest to *name*, the most likely first."""
    known = set(known)
    likely = [each for each in (f"{_PYTHON}{name}", f"lib{name}-dev", f"lib{name}") if each in known]
    # Comparing all 70,000 names would be slow.
    similar = [each for each in known if abs(len(each) - len(name)) <= 2 and each[0] == name[0]]  # noqa: PLR2004
    near = likely + difflib.get_close_matches(name, sorted(similar), NEAR_MAX, _NEAR)
    return list(dict.fromkeys(near + near_projects(name, known, prefix=_PYTHON)))[:NEAR_MAX]


def near_projects(name: str, known: Iterable[str], *, prefix: str = "") -> list[str]:
    """Return the Python projects packaged in Debian that are closest to *name*, each with *prefix* before it."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    projects = sorted(each.removeprefix(_PYTHON) for each in known if each.startswith(_PYTHON))
    near = difflib.get_close_matches(name, projects, NEAR_MAX, _NEAR)
    return [prefix + each for each in sorted(near, key=lambda each: each[0] != name[0])]


def _cache(file: Path, *words: str) -> str:
    options = [
        f"Dir::Etc::sourcelist={file}",
        "Dir::Etc::sourceparts=/dev/null",
        "Dir::State::status=/dev/null",  # ignore the packages installed on this host
        "Dir::Cache::pkgcache=",  # no cache: the sources differ from the host's
        "Dir::Cache::srcpkgcache=",
    ]
    argv = [commands.tool("apt-cache"), "-q", *(word for option in options for word in ("-o", option)), *words]
    return commands.capture(argv).decode(errors="replace")
