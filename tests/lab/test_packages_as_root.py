"""Root in a VM installs packages with apt and pip, and the allowlist holds for it as for every other program."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.conftest import need
from tests.lab.laboratory import GATE_ADDRESS, GATE_ADDRESS_6, OTHER_SITE, ROUTER, SECRET_PORT, SITE, SITE_6

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.laboratory import Laboratory

pytestmark = pytest.mark.vm

IMAGE_PACKAGES: Final = ("adduser", "apt", "passwd", "python3-pip")
APT: Final = ("apt.lab.example", 8081)
INDEX: Final = ("index.lab.example", 8082)
# Run in the laboratory: opens a sandbox, runs each script in it, and prints their outputs and the connections.
DRIVER: Final = """
import json, sys
import msgspec
from x07_sandbox import Sandbox
image, hosts, scripts = json.loads(sys.argv[1])
with Sandbox(guest_root=True, image=image, allow_hosts=hosts, memory="512M") as sandbox:
    said = [sandbox.shell(script, merge=True, timeout_s=150) for script in scripts]
ends = [[one.exit_code, one.stdout.decode(errors="replace")] for one in said]
print(json.dumps([ends, msgspec.to_builtins(sandbox.result.net)]))
"""

# The package greeter needs greeter-data, whose postinst makes a user and a file of that user.
POSTINST: Final = """#!/bin/sh
set -e
useradd --system --home-dir /var/lib/greeter --create-home --shell /usr/sbin/nologin greeter
echo "made by $(id -un)" > /var/lib/greeter/made
chown greeter:greeter /var/lib/greeter/made
"""
GREET: Final = "#!/bin/sh\ncat /usr/share/greeter/text; stat -c %U /var/lib/greeter/made; cat /var/lib/greeter/made\n"
GREETED: Final = "hello from a package\ngreeter\nmade by root\n"
APT_INSTALL: Final = f"""
set -e
rm -f /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] http://{APT[0]}:{APT[1]}/ ./' > /etc/apt/sources.list
apt-get update && apt-get install -y greeter
"""
PIP_INSTALL: Final = (
    "pip install --break-system-packages --root-user-action ignore"
    f" --index-url http://{INDEX[0]}:{INDEX[1]}/simple/ --trusted-host {INDEX[0]} tiny-of-lab"
)
TARGETS: Final = (
    ("other.lab.example", 80),
    ("own.lab.example", SECRET_PORT),
    (OTHER_SITE, 80),
    (SITE, 80),
    (ROUTER, 80),
    (GATE_ADDRESS, SECRET_PORT),
    ("127.0.0.1", SECRET_PORT),
    (APT[0], INDEX[1]),
)
"""Unlisted: another server by name and by address, other ports of the mirrors, and the host's own addresses."""
TARGETS_6: Final = ((SITE_6, 80), (GATE_ADDRESS_6, SECRET_PORT))
CONNECT: Final = """
python3 - <<'END'
import socket
for end in TARGETS:
    try:
        socket.create_connection(end, timeout=60).close()
        print("connected", *end)
    except OSError:
        print("no", *end)
END
"""


@pytest.fixture(scope="module")
def apt_image() -> str:
    """The name of an image with apt and pip, shared by all tests; one worker builds it."""
    from x07_sandbox import SandboxError
    from x07_sandbox.images.build import build_image

    name = "with-apt"
    try:
        build_image(name=name, include=IMAGE_PACKAGES, progress=lambda _text: None)
    except SandboxError as exc:
        need(None, f"an image with {', '.join(IMAGE_PACKAGES)}: {exc}", installable=True)
    return name


@pytest.fixture(scope="module")
def mirrors(lab: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Debian repository and a Python package index, at two names and two ports."""
    dpkg_deb = shutil.which("dpkg-deb")
    need(dpkg_deb, "dpkg", installable=True)
    site = tmp_path_factory.mktemp("mirrors")
    make_repository(str(dpkg_deb), site / "apt", site / "build")
    make_index(site / "index")
    lab.names({APT[0]: [SITE], INDEX[0]: [SITE]})
    with lab.serving(site / "apt", APT[1]), lab.serving(site / "index", INDEX[1]):
        yield
    lab.reset_names()


def make_repository(dpkg_deb: str, folder: Path, build: Path) -> None:
    """Make two packages, and the lists of them that apt reads."""
    folder.mkdir()
    packages = {
        "greeter": ("greeter-data", {"usr/bin/greet": GREET}),
        "greeter-data": ("passwd", {"DEBIAN/postinst": POSTINST, "usr/share/greeter/text": "hello from a package\n"}),
    }
    entries = []
    for name, (depends, contents) in packages.items():
        control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nDepends: {depends}\n"
        control += "Maintainer: Nobody <nobody@lab.example>\nDescription: a package of the laboratory\n"
        for path, text in {**contents, "DEBIAN/control": control}.items():
            file = build / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="ascii")
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        deb = folder / f"{name}_1.0_all.deb"
        subprocess.run(
            [dpkg_deb, "--root-owner-group", "--build", str(build / name), str(deb)], check=True, capture_output=True
        )
        entries.append(f"{control}Filename: ./{deb.name}\n{_size_and_hash(deb)}\n")
    listing = folder / "Packages"
    listing.write_text("\n".join(entries), encoding="ascii")
    digest = hashlib.sha256(listing.read_bytes()).hexdigest()
    release = f"Suite: lab\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {listing.stat().st_size} Packages\n"
    (folder / "Release").write_text(release, encoding="ascii")


def _size_and_hash(file: Path) -> str:
    return f"Size: {file.stat().st_size}\nSHA256: {hashlib.sha256(file.read_bytes()).hexdigest()}\n"


def make_wheel(folder: Path, name: str, source: str, entry_points: str = "") -> Path:
    """Make a wheel of one module, which pip installs."""
    module = name.replace("-", "_")
    info, wheel = f"{module}-1.0.dist-info", folder / f"{module}-1.0-py3-none-any.whl"
    contents = {
        f"{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*contents, f"{info}/RECORD")))
    return wheel


def make_index(folder: Path) -> None:
    """Make an index (PEP 503) of one wheel that has a command."""
    source, command = (
        "def main():\n    print('hello from a wheel')\n",
        "[console_scripts]\ntiny-of-lab = tiny_of_lab:main\n",
    )
    wheel = make_wheel(folder / "simple/tiny-of-lab", "tiny-of-lab", source, command)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>\n'
    wheel.with_name("index.html").write_text(link, encoding="ascii")


def run_as_root(lab: Laboratory, image: str, *scripts: str) -> tuple[list[tuple[int, str]], dict[str, Any]]:
    """Return exit status and output of each script in one sandbox of the laboratory, and the sandbox's connections."""
    hosts = [f"{host}:{port}" for host, port in (APT, INDEX)]
    ends, net = json.loads(lab.python(DRIVER, json.dumps([image, hosts, scripts]), timeout_s=400))
    return [tuple(end) for end in ends], net


@pytest.mark.full("fetches and builds an image with apt and pip")
@pytest.mark.usefixtures("state", "mirrors")
def test_root_installs_packages_from_listed_hosts_only(lab: Laboratory, apt_image: str) -> None:
    """Root inside installs with apt and pip from two listed mirrors, runs what it installed, and reaches no others."""
    mark = lab.mark()
    targets = TARGETS + (TARGETS_6 if lab.ipv6 else ())
    connect_to_all = CONNECT.replace("TARGETS", repr(targets))
    ends, net = run_as_root(lab, apt_image, APT_INSTALL, "greet", PIP_INSTALL, "tiny-of-lab", connect_to_all)
    apt, greet, pip, tiny, connect = ends
    assert apt[0] == 0, apt[1]
    assert greet == (0, GREETED)
    assert pip[0] == 0, pip[1]
    assert tiny == (0, "hello from a wheel\n")
    assert connect == (0, "".join(f"no {host} {port}\n" for host, port in targets))

    allowed = {(row["host"], row["port"], row["address"]) for row in net["allowed"]}
    assert allowed == {(*APT, SITE), (*INDEX, SITE)}
    assert all(row["received_bytes"] > 0 for row in net["allowed"])
    denied = {(row["host"], row["port"], row["rule"].partition("[")[0]) for row in net["denied"]}
    names = {"other.lab.example", "own.lab.example"}  # are refused before the program knows an address and a port
    refused = {(host, 0 if host in names else port) for host, port in targets if host != "127.0.0.1"}
    assert denied == {(host, port, "net.allow_hosts") for host, port in refused}
    lab.wait_quiet()
    assert {contact.where for contact in lab.contacts(mark) if contact.proto != "dns"} == set()
    mirrored = {f"{SITE}:{port}" for port in (APT[1], INDEX[1])}
    assert {packet.where for packet in lab.packets(mark) if packet.proto == "tcp"} == mirrored
