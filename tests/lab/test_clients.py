"""Common client programs inside the guest, through the gate, against real servers of the laboratory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.conftest import FULL, need
from tests.lab.laboratory import SITE
from tests.lab.test_packages_as_root import make_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.laboratory import Laboratory

pytestmark = pytest.mark.vm

WEB: Final = "web.lab.example"
FILES: Final = "files.lab.example:9444"
REDIS: Final = "redis.lab.example"
NODE: Final = f"""
require("https").get("https://{WEB}/", answer => answer.pipe(process.stdout))
"""


@pytest.fixture(scope="module")
def far_end(lab: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package index, a git repository and a Redis server."""
    redis = shutil.which("redis-check-rdb")
    need(redis, "redis-tools", installable=True)  # which holds the server, under another name
    site = tmp_path_factory.mktemp("site")
    make_wheel(site / "simple/tiny", "tiny", "print('tiny was installed')\n")
    _make_repository(site / "work", site / "repo.git")
    lab.names({name: [SITE] for name in ("files.lab.example", REDIS)})
    inside = ["ip", "netns", "exec", lab.inet, "bash", "-c", 'exec -a redis-server "$0" "$@"', str(redis)]
    options = ["--bind", SITE, "--port", "6379", "--save", "", "--protected-mode", "no", "--daemonize", "no"]
    with (
        lab.serving(site, 9444, tls=True),
        subprocess.Popen([*inside, *options], stdout=subprocess.DEVNULL, cwd=site) as server,
    ):
        try:
            _wait_for_redis(lab)
            yield
        finally:
            server.kill()
            lab.reset_names()


def _make_repository(work: Path, bare: Path) -> None:
    """Make a repository that a server of plain files can serve."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@lab.example", "-c", "init.defaultBranch=main"]
    work.mkdir()
    (work / "README").write_text("from the laboratory\n", encoding="ascii")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, "-C", str(work), *words], check=True)
    subprocess.run([*git, "clone", "-q", "--bare", str(work), str(bare)], check=True)
    subprocess.run([*git, "-C", str(bare), "update-server-info"], check=True)


def _wait_for_redis(lab: Laboratory) -> None:
    ask = ["redis-cli", "-h", SITE, "-t", "1", "ping"]
    deadline = time.monotonic() + 20
    while lab.run(ask).stdout != b"PONG\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)  # no event announces that it listens


def run_inside(lab: Laboratory, image: str, state: Path, script: str, hosts: tuple[str, ...]) -> dict[str, Any]:
    """Return the result of a shell script in a guest whose connections go through the gate."""
    program = state / "client.sh"
    program.write_text("set -eu\n" + script, encoding="ascii")
    argv = [
        sys.executable,
        "-c",
        "import sys; from x07_sandbox.cli.main import main; sys.exit(main())",
        "run",
        "--json",
    ]
    # --cold: for two runs of an image, it takes more to save a VM than it saves.
    argv += ["--cold", "--image", image, "--ca", str(lab.ca_file), "--timeout", "150"]  # a script has several clients
    argv += [word for host in hosts for word in ("--allow-host", host)]
    found: dict[str, Any] = json.loads(lab.run([*argv, str(program)], timeout_s=200).stdout)
    return found


CLIENTS: Final = {
    f"curl -sS https://{WEB}/; curl -sS http://{WEB}/; env -i curl -sS https://{WEB}/": "hello" * 3,
    f"python3 -c 'from urllib.request import urlopen; print(urlopen(\"https://{WEB}/\").read().decode())'": "hello\n",
    f"git clone -q https://{FILES}/repo.git /tmp/r && cat /tmp/r/README": "from the laboratory\n",
}
MORE_CLIENTS: Final = {
    f"node -e '{NODE}'": "hello",
    f"python3 -c 'import requests; print(requests.get(\"https://{WEB}/\").text)'": "hello\n",
    f"pip install -q --no-deps -t /tmp/t --index-url https://{FILES}/simple/ tiny; python3 /tmp/t/tiny.py": (
        "tiny was installed\n"
    ),
    f"redis-cli -h {REDIS} set k v; redis-cli -h {REDIS} get k": "OK\nv\n",
}
UNLISTED: Final = {
    "curl -sS https://other.lab.example/": "Could not resolve host: other.lab.example",
    f"curl -sS https://{WEB}:8443/": f"Failed to connect to {WEB} port 8443",
    "git clone -q https://other.lab.example/repo.git /tmp/r": "fatal: unable to access",
    "python3 -c 'import socket; socket.create_connection((\"other.lab.example\", 6379))'": "Name or service not known",
}


@pytest.mark.usefixtures("state", "far_end")
def test_real_clients_work(lab: Laboratory, with_packages: str, tmp_path: Path) -> None:
    """Clients such as curl, git, pip and Node reach listed hosts by name, with TLS verified by `--ca`."""
    clients = CLIENTS | (MORE_CLIENTS if FULL else {})
    script = "".join(f"{words}\n" for words in clients)
    result = run_inside(lab, with_packages, tmp_path, script, (f"{WEB}:80,443", FILES, f"{REDIS}:6379"))
    printed = "".join(clients.values())
    assert (result["outcome"], result["stdout"]["text"]) == ("ok", printed), (result["reason"], result["stderr"])
    assert result["net"]["denied"] == []


@pytest.mark.usefixtures("state", "far_end")
def test_an_unlisted_host_is_a_network_error(lab: Laboratory, with_packages: str, tmp_path: Path) -> None:
    """Clients get an ordinary network error for a host or port that is not listed, and the result lists it."""
    script = "".join(f"! {words}\n" for words in UNLISTED) + "echo end\n"
    result = run_inside(lab, with_packages, tmp_path, script, (f"{WEB}:443",))
    assert result["stdout"]["text"] == "end\n"
    assert [said for said in UNLISTED.values() if said not in result["stderr"]["text"]] == []
    denied = {(row["host"], row["port"], row["rule"].partition("[")[0]) for row in result["net"]["denied"]}
    assert denied == {("other.lab.example", 0, "net.allow_hosts"), (WEB, 8443, "net.allow_hosts")}
    assert result["denials"][0]["how_to_allow"]["flag"].startswith("--allow-host ")
