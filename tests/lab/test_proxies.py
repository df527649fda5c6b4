"""Runs whose connections go through a real proxy of the host's network, and what they still cannot reach."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import need
from tests.lab.laboratory import LAN
from tests.lab.test_runs import COMMAND, OS, Run, hosts, rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.laboratory import Laboratory

pytestmark = pytest.mark.usefixtures("state")

TINYPROXY: Final = """
Listen 127.0.0.1
Port {port}
MaxClients 20
BasicAuth user secret-word
"""
SQUID: Final = """
http_port 127.0.0.1:{port}
http_access allow CONNECT
http_access deny all
dns_nameservers 45.45.45.53
pid_filename none
access_log none
cache_log {folder}/cache.log
coredump_dir {folder}
shutdown_lifetime 0 seconds
"""
PROXIES: Final = {
    "tinyproxy": (TINYPROXY, 8888, "user:secret-word@", ["tinyproxy", "-d", "-c"]),
    "squid": (SQUID, 3128, "", ["squid", "-N", "-n", f"x07lab{os.getpid()}", "-f"]),
}


@contextlib.contextmanager
def proxy_running(lab: Laboratory, name: str, folder: Path) -> Iterator[str]:
    """Run a proxy on the host's loopback in the laboratory; yield its URL."""
    text, port, user, words = PROXIES[name]
    program = shutil.which(words[0], path="/usr/sbin:/usr/bin")
    need(program, name, installable=True)
    folder.mkdir()
    folder.chmod(0o777)  # for the proxy's own user
    (folder / "conf").write_text(text.format(port=port, folder=folder), encoding="ascii")
    argv = [*lab.gate_prefix, str(program), *words[1:], str(folder / "conf")]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder) as process:
        try:
            ask = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
            deadline = time.monotonic() + 30
            while lab.run(["python3", "-c", ask]).returncode:
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield f"http://{user}127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.parametrize("name", PROXIES)
def test_a_run_reaches_listed_hosts_through_a_proxy(
    lab: Laboratory, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a proxy in the user's settings, listed hosts are reached through it, at addresses that x07 has checked."""
    lab.reset_names()
    run = Run(lab, tmp_path)
    settings = tmp_path / "config/x07/sandbox.toml"
    settings.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ends = ("web.lab.example", 80), ("web.lab.example", 81), ("private.lab.example", 8000), (LAN, 8000)
    listed = hosts(*ends)
    with proxy_running(lab, name, tmp_path / "proxy") as url:
        settings.write_text(f'[net]\nproxy = "{url}"\n', encoding="ascii")
        said, result = run.connect(*ends, flags=OS, allow_hosts=listed)
        by_name = {row["host"]: row["address"] for row in result["net"]["allowed"]}
        assert said["web.lab.example:80"] == "hello"
        assert by_name == {"web.lab.example": "46.46.46.46"}
        assert [row[:2] for row in rows(result, "denied")] == list(ends[2:])
        ((_, _, rule),) = rows(result, "failed")
        assert rule == {"tinyproxy": "proxy:500", "squid": "proxy:503"}[name]
        assert "secret-word" not in str(result)

        settings.write_text(f'[net]\nproxy = "{url}"\nproxy_resolves = true\n', encoding="ascii")
        said, result = run.connect(*ends, flags=OS, allow_hosts=listed)
        assert (said["web.lab.example:80"], said["private.lab.example:8000"]) == ("hello", "hello")
        assert [row[:2] for row in rows(result, "denied")] == [(LAN, 8000)]
        assert {row["address"] for row in result["net"]["allowed"]} == {""}
        (control,) = [control for control in result["controls"] if control["field"] == "net.allow_hosts"]
        assert "your proxy resolves the names" in control["why"]
        for words in (["run", "--dry-run", *OS, "--policy"], ["policy", "check", "--host", "web.lab.example:80"]):
            more = [str(tmp_path / "policy.json"), *([str(tmp_path / "prog.py")] if words[0] == "run" else [])]
            told = lab.run([*COMMAND, *words, *more]).stdout.decode()
            assert "your proxy" in told
            assert "not checked" in told
