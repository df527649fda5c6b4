"""Hints for a failed program: missing network, modules or programs, with a line to paste."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.unit.test_refused_lines import result
from x07_sandbox.cli.messages import denial_lines
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.denials import GuestMount, HowToAllow
from x07_sandbox.policy.guest import WORK
from x07_sandbox.policy.hints import ImageInUse, hints
from x07_sandbox.policy.model import HostPorts

START = "/opt/x07"
POLICY = default_policy()
ALL_LISTS = "--include git,make,python3-numpy --pip httpx,h11 --preload h11"
SCIENCE = ImageInUse("sci", include=("git", "make"), pip=("httpx", "h11"), preload=("h11",))


def found(text: str) -> list[tuple[str, str | None]]:
    """Subject and flag of each hint for a program's last errors."""
    return [(hint.subject, hint.how.flag) for hint in hints(text.encode(), POLICY, (), START)]


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("curl: (6) Could not resolve host: example.org\n", "example.org:443"),
        ("curl: (7) Failed to connect to example.org port 8080 after 1 ms: no server\n", "example.org:8080"),
        ("wget: unable to resolve host address \u2018example.org\u2019\n", "example.org:443"),
        (
            "fatal: unable to access 'https://github.com/a/b.git/': Could not resolve host: github.com\n",
            "github.com:443",
        ),
        ("fatal: unable to access 'http://git.example:81/a': Could not resolve host: git.example\n", "git.example:81"),
        ("Error: getaddrinfo EAI_AGAIN registry.npmjs.org\n", "registry.npmjs.org:443"),
        ("Error: connect ENETUNREACH 192.0.2.7:5432 - Local (0.0.0.0:0)\n", "192.0.2.7:5432"),
        ('Get "http://example.org/": dial tcp: lookup example.org on [::1]:53: connection refused\n', "example.org:80"),
        ("dial tcp 192.0.2.7:25: connect: network is unreachable\n", "192.0.2.7:25"),
        (
            (
                "HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded with url: /simple/six/ (by "
                "NewConnectionError: [Errno -3] Temporary failure in name resolution)\n"
            ),
            "pypi.org:443",
        ),
        (
            (
                '  File "<string>", line 1, in <module>\n    urllib.request.urlopen("https://example.org/data")\n'
                "urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>\n"
            ),
            "example.org:443",
        ),
        (
            '    socket.create_connection(("192.0.2.7", 80))\nOSError: [Errno 101] Network is unreachable\n',
            "192.0.2.7:80",
        ),
        (
            (
                "error sending request for url (https://crates.io/): failed to lookup address information: Name or "
                "service not known\n"
            ),
            "crates.io:443",
        ),
    ],
)
def test_a_failed_connection_names_the_flag(text: str, host: str) -> None:
    """A failed connection names the flag that allows its host and port."""
    assert found(text) == [(f"the connection to {host}", f"--allow-host {host}")]


@pytest.mark.parametrize(
    "text",
    [
        "socket.gaierror: [Errno -3] Temporary failure in name resolution\n",
        "Error: Network is unreachable (os error 101)\n",
        "curl: (6) Could not resolve host: $(reboot).example\n",
        "curl: (6) Could not resolve host: intranet\n",
    ],
)
def test_an_unknown_host_gives_the_flags_form(text: str) -> None:
    """If no valid host is named, the hint gives the form of the flag."""
    assert found(text) == [("a connection", "--allow-host HOST:PORT")]


@pytest.mark.parametrize(
    "text",
    [
        "ConnectionRefusedError: [Errno 111] Connection refused\n",
        "Error: connect ECONNREFUSED 127.0.0.1:5432\n",
        "curl: (7) Failed to connect to localhost port 80: Connection refused\n",
        'print("see https://example.org/")\nValueError\n',
        "Error: connect ENETUNREACH 192.0.2.7:99999\n",
    ],
)
def test_local_servers_and_urls_give_no_hint(text: str) -> None:
    """A missing local server, a URL in a text and an invalid port give no hint."""
    assert found(text) == []


def test_a_run_with_network_has_no_such_hint() -> None:
    """A run with allowed hosts gets no network hint."""
    text = b"curl: (6) Could not resolve host: example.org\n"
    allowed = replace(POLICY.net, allow_hosts=(HostPorts(host="a.example", ports=(443,)),))
    assert hints(text, replace(POLICY, net=allowed), (), START) == []
    (hint,) = hints(text, replace(POLICY, net=replace(POLICY.net, enabled=False)), (), START)
    assert (hint.kind, hint.how.json_path, hint.how.value) == ("network", "$.net.enabled", True)


@pytest.mark.parametrize(
    ("text", "subject", "flags"),
    [
        ("ModuleNotFoundError: No module named 'numpy'\n", "the Python module numpy", "--include python3-numpy"),
        (
            "ModuleNotFoundError: No module named 'unknown_one.it'\n",
            "the Python module unknown_one",
            "--pip PACKAGE",
        ),
        ("/usr/bin/python3: No module named pip\n", "the Python module pip", "--pip PACKAGE"),
        ("prog.sh: line 1: pip: command not found\n", "the program pip", "--pip PACKAGE"),
        ("prog.sh: 2: node: not found\n", "the program node", "--include nodejs"),
        ("/usr/bin/env: \u2018ruby\u2019: No such file or directory\n", "the program ruby", "--include ruby"),
        ("Error: spawn git ENOENT\n", "the program git", "--include git"),
        ("E   ModuleNotFoundError: No module named 'numpy'\n", "the Python module numpy", "--include python3-numpy"),
    ],
)
def test_a_missing_package_names_the_build_command(text: str, subject: str, flags: str) -> None:
    """A missing module or program names the command that adds it to the image in use."""
    assert found(text) == [(subject, f"x07 image build --name default {flags}")]


@pytest.mark.parametrize(
    ("image", "module", "advice"),
    [
        (SCIENCE, "numpy", "x07 image build --name sci --include git,make,python3-numpy"),
        (SCIENCE, "unknown_one", "x07 image build --name sci --pip httpx,h11,PACKAGE"),
        (
            SCIENCE._replace(name="sha256:0123456789ab"),
            "numpy",
            f"--image mine, after x07 image build --name mine {ALL_LISTS}",
        ),
        (ImageInUse(on_host=True), "numpy", "apt-get install python3-numpy"),
    ],
)
def test_the_build_command_keeps_what_the_image_has(image: ImageInUse, module: str, advice: str) -> None:
    """The command that adds a package keeps the image's packages, wheels and preloaded modules."""
    text = f"ModuleNotFoundError: No module named '{module}'\n".encode()
    assert [hint.how.flag for hint in hints(text, POLICY, (), START, image=image)] == [advice]


def test_the_path_of_a_copied_file_on_the_host_gets_its_path_in_the_vm() -> None:
    """If a program opens a copied file by its path on the host, the hint names its path in the VM."""
    areas = (
        GuestMount(given="big.csv", at=f"{START}/big.csv", write=False, host="/home/me/big.csv"),
        GuestMount(given=".", at=WORK, write=True, host="/srv/project"),
    )
    for path, in_vm in (("/home/me/big.csv", f"{START}/big.csv"), ("/srv/project/a/b", f"{WORK}/a/b")):
        text = f"FileNotFoundError: [Errno 2] No such file or directory: '{path}'"
        (hint,) = hints(text.encode(), POLICY, areas, START)
        assert (hint.subject, hint.kind, hint.how, hint.in_vm) == (
            path,
            "elsewhere",
            HowToAllow(json_path=None, value=None),
            in_vm,
        )
        (line,) = denial_lines(replace(result(outcome="failed"), hints=[hint]))
        assert line == f"{path} has another path in the VM: {in_vm}"
    (hint,) = hints(b"cat: /home/me/big.csv2: No such file or directory", POLICY, areas, START)
    assert hint.kind == "missing"
