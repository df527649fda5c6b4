"""`x07 mcp` with the TypeScript clients of MCP, which most editors and assistants use."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integrations.mcp.shared import X07, runs

SCRIPT = Path(__file__).with_name("clients.mjs")
PACKAGES = [
    "@modelcontextprotocol/sdk@1",
    "@modelcontextprotocol/client@2",
    "@modelcontextprotocol/ext-tasks@0.2",
]


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clients' packages, and the script that uses them."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *PACKAGES]
    done = subprocess.run(install, check=False, capture_output=True, text=True, timeout=140)
    if done.returncode:
        pytest.skip(f"npm could not install {', '.join(PACKAGES)}: {done.stderr[-300:]}")
    shutil.copy(SCRIPT, folder)
    return folder


@pytest.mark.parametrize("which", ["v1", "v2", "tasks"])
def test_a_typescript_client_can_use_the_server(node_folder: Path, which: str) -> None:
    """Both generations of the client use the tools, see progress and cancel, and tasks have the published form."""
    command = ["node", str(node_folder / SCRIPT.name), which, X07]
    done = subprocess.run(command, check=False, env=os.environ, capture_output=True, text=True, timeout=140)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert runs() == []
