"""x07 in containers without privileges, by the commands of docs/how-to/run-in-a-container.md."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines import missing, podman_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Need

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "run-in-a-container.md"
# A Debian root with x07-sandbox and a guest image, as the page's first part makes it from an image of a registry.
MAKE = """
source scripts/lib.sh
source scripts/fresh_root.sh
new_work_folder
make_root "$(runtime_packages | tr '\\n' ,)mount,passwd" /opt/x07-sandbox '--aptopt=APT::Install-Recommends "false"'
inside /opt/x07-sandbox env -i "${environment[@]}" scripts/setup.sh
inside /opt/x07-sandbox env -i "${environment[@]}" X07_VM_CACHE_DIR=/opt/x07-cache .venv/bin/x07 image build
ln -s /opt/x07-sandbox/.venv/bin/x07 "$fresh/usr/local/bin/x07"
rm -r "$fresh/opt/x07-cache/templates" "$fresh/opt/x07-cache/verdicts"
chown -R 1000 "$fresh/opt/x07-cache"
tar --directory="$fresh" --create . | "$PODMAN" import - localhost/x07-sandbox
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.timeout(1800),
    pytest.mark.full("makes a Debian root and a guest image in it"),
]


class Host:
    """A host with podman and the page's image. folder: stands for /srv."""

    def __init__(self, folder: Path, podman: str) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text('[engine]\nruntime = "runc"\n', encoding="ascii")
        self.env = {"PATH": f"{Path(podman).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "PODMAN": podman, "LC_ALL": "C"}
        self.env |= {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1", "CONTAINERS_CONF": str(folder / "containers.conf")}

    def shell(self, script: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a script of the page, with `folder` in place of /srv."""
        words = ["/bin/bash", "-e", "-o", "pipefail", "-c", script.replace("/srv/", f"{self.folder}/")]
        return subprocess.run(words, cwd=ROOT, env=self.env | (env or {}), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def host(need: Need) -> Iterator[Host]:
    """Podman with the page's image."""
    need(not (reason := missing("podman")), reason, installable=os.geteuid() == 0)
    with tempfile.TemporaryDirectory(prefix="x07-podman-", dir="/var/tmp") as name, podman_store(Path(name)) as found:
        Path(name).chmod(0o755)
        made = Host(Path(name), found["X07_VM_PODMAN_BIN"])
        done = made.shell(MAKE, {**os.environ, **made.env})
        assert done.returncode == 0, done.stdout + done.stderr
        yield made


def commands(heading: str) -> str:
    """Return the commands of a section of the page, one after the other."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "".join(re.sub(r"(?m)^# ", "", block) for block in re.findall(r"(?ms)^```console\n(.*?)^```$", section))


def test_the_podman_form_works(host: Host) -> None:
    """x07 works in a read-only container of an ordinary user without capabilities, and doctor says what it lacks."""
    done = host.shell(commands("In a container"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "good  VM start: the guest agent answered and ran a program" in lines
    assert [line for line in lines if line.startswith("note  control groups: ") and "no host control groups" in line]
    (hot,) = [line for line in lines if " hot clones: " in line]
    assert hot.startswith("note")
    assert "warming up" not in done.stderr
    assert re.search(r"(?m)^ *\d+ +the$|^the +\d+$", done.stdout), done.stdout[-500:]


@pytest.mark.parametrize("mode", ["0777", "2777"])
def test_the_pod_s_folders_work(host: Host, mode: str) -> None:
    """A volume of emptyDir's shape is refused with the way out, and the page's init container makes usable folders."""
    volume = f"/srv/volume-{mode}"
    options = "--user 1000 --group-add 2000 --cap-drop ALL --security-opt no-new-privileges --read-only"
    run = f"podman run --rm --network none {options}"
    script = re.search(r"(?ms)^        - \|\n(.*?)^      securityContext", PAGE.read_text(encoding="utf-8"))
    assert script is not None
    variables = "--env HOME=/tmp --env X07_VM_CACHE_DIR=/x07/cache --env X07_VM_STATE_DIR=/x07/jobs"
    program = "x07-sandbox x07 run -c 'echo hello' --toolchain shell"
    made = host.shell(f"mkdir {volume} && chgrp 2000 {volume} && chmod {mode} {volume}")
    assert made.returncode == 0, made.stderr
    refused = host.shell(f"{run} --volume {volume}:/x07 {variables} {program}")
    assert refused.returncode == 125
    assert "In a pod, let an init container run mkdir -m 0700 /x07/private" in refused.stderr
    places = {"cache": "/x07/cache", "jobs": "/x07/jobs", "tmp": "/tmp"}  # noqa: S108 - of the container
    mounts = " ".join(f"--volume {volume}/{name}:{place}" for name, place in places.items())
    done = host.shell(
        f"{run} --volume {volume}:/volume x07-sandbox sh -ec '{script[1]}'\n{run} {mounts} {variables} {program}"
    )
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
