"""A stand-in for Apple's `container`, which runs only on macOS: its commands and JSON of three versions, over podman.

It runs the real guest image in a container of podman: it has the real one's grammar, and no virtual machine. So limits
by user, such as RLIMIT_NPROC, count the tasks of all containers of this host. Start it as
`apple_container.py VERSION FOLDER PODMAN WORD...`. FOLDER holds what the real one's service would keep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

VERSIONS = ("0.6.0", "0.12.3", "1.2.2")
USAGE = 64  # the exit code of Apple's argument parser
MIB = 1 << 20


class Service(NamedTuple):
    """The containers and images of one user. version: that of the program."""

    version: tuple[int, ...]
    folder: Path
    podman: str

    def argv(self, *words: str) -> list[str]:
        """Return a command of podman. Its default runtime refuses hosts that mix versions of control groups."""
        return [self.podman, "--runtime", "runc", *words]

    def call(self, *words: str) -> str:
        """Return podman's output. Ends with an error if it fails."""
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            fail(done.stderr.strip())
        return done.stdout

    def container(self, name: str) -> dict[str, Any] | None:
        """Return a container as this version prints it."""
        try:
            configuration = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None
        done = subprocess.run(self.argv("inspect", name), capture_output=True, check=False)
        state = json.loads(done.stdout)[0]["State"]["Status"] if not done.returncode else "stopped"
        status = "running" if state == "running" else "stopped"
        if self.version < (1,):
            return {"configuration": configuration, "networks": [], "status": status}
        return {"configuration": configuration, "id": name, "status": {"networks": [], "state": status}}

    def image(self, reference: str) -> dict[str, Any]:
        """Return podman's description of an image. Ends with an error if there is none."""
        done = subprocess.run(self.argv("image", "inspect", reference), capture_output=True, check=False)
        if done.returncode:
            fail(f"image not found: {reference}")
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found


def fail(why: str, status: int = 1) -> NoReturn:
    """End as the real program does."""
    sys.stderr.write(f"Error: {why}\n")
    sys.exit(status)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


class Arguments(argparse.ArgumentParser):
    """Arguments without abbreviations, whose errors end with Apple's status."""

    def error(self, message: str) -> NoReturn:
        """End with a usage error."""
        fail(message, USAGE)


def create_options(version: tuple[int, ...]) -> Arguments:
    """Return the options of `create` that this program knows, as far as the version has them."""
    parser = Arguments(prog="container create", allow_abbrev=False, epilog="This is a stand-in for Apple's container.")
    for name in ("--name", "--cpus", "--memory", "--uid", "--gid", "--workdir", "--entrypoint"):
        parser.add_argument(name)
    for name in ("--network", "--mount", "--label"):
        parser.add_argument(name, action="append", default=[])
    for name in ("--interactive", "--no-dns"):
        parser.add_argument(name, action="store_true")
    if version >= (0, 7):
        parser.add_argument("--progress", choices=["none", "ansi"])
    else:
        parser.add_argument("--disable-progress-updates", action="store_true")
    if version >= (0, 8):
        parser.add_argument("--read-only", action="store_true")
    if version >= (0, 9):
        parser.add_argument("--ulimit", action="append", default=[])
    if version >= (1,):
        parser.add_argument("--cap-add", action="append", default=[])
        parser.add_argument("--cap-drop", action="append", default=[])
    parser.add_argument("image")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def create(service: Service, words: list[str]) -> None:
    """Create a container: `container create`."""
    asked = create_options(service.version).parse_args(words)
    if len(asked.name) > 63:
        fail(f"container ID {asked.name} is not a valid container ID")
    if asked.network != ["none"]:
        fail("the stand-in has no networks")
    memory = int(asked.memory.removesuffix("M"))
    if service.version >= (0, 10) and memory < 200:
        fail("minimum memory amount allowed is 200 MiB")
    image = service.image(asked.image)
    mounts = [dict(part.partition("=")[::2] for part in mount.split(",")) for mount in asked.mount]
    for mount in mounts:
        if mount.keys() - {"type", "target", "size", "mode"} or mount["type"] != "tmpfs":
            fail(f"unknown mount directive {mount}")
    command = [*(image["Config"].get("Entrypoint") or ()), *asked.arguments]
    configuration = {
        "id": asked.name,
        "image": {"reference": asked.image, "descriptor": descriptor(image)},
        "mounts": [
            {"type": {"tmpfs": {}}, "source": "tmpfs", "destination": mount["target"], "options": []}
            for mount in mounts
        ],
        "networks": [],
        "publishedPorts": [],
        "publishedSockets": [],
        "labels": dict(label.split("=") for label in asked.label),
        "initProcess": {
            "executable": command[0],
            "arguments": command[1:],
            "environment": image["Config"].get("Env") or [],
            "terminal": False,
            "user": {"id": {"uid": int(asked.uid), "gid": int(asked.gid)}},
            "workingDirectory": asked.workdir,
        },
        "resources": {"cpus": int(asked.cpus), "memoryInBytes": memory * MIB},
        "rosetta": False,
        "runtimeHandler": "container-runtime-linux",
    }
    argv = [
        "create",
        "--name",
        asked.name,
        "--pull",
        "never",
        "--network",
        "none",
        "--user",
        f"{asked.uid}:{asked.gid}",
    ]
    argv += ["--interactive"] * asked.interactive
    argv += ["--memory", str(memory * MIB), "--cpus", asked.cpus, "--workdir", asked.workdir, "--hostname", asked.name]
    argv += ["--log-driver", "none", "--cgroupns", "private", "--no-hosts", "--pids-limit", "4096"]
    if service.version >= (0, 8):
        configuration["readOnly"] = asked.read_only
        argv += ["--read-only", "--read-only-tmpfs=false"] * asked.read_only
    if service.version >= (1,):
        configuration["capAdd"], configuration["capDrop"] = asked.cap_add, asked.cap_drop
        argv += [word for name in asked.cap_drop for word in ("--cap-drop", name)]
        argv += [word for name in asked.cap_add for word in ("--cap-add", name)]
    else:  # the real one gives the root of its VM more than podman gives a container
        argv += ["--cap-add", "NET_ADMIN"]
    for mount in mounts:
        words = ["rw", "exec", f"size={mount['size']}", f"mode={mount['mode']}", "notmpcopyup"]
        argv += ["--tmpfs", f"{mount['target']}:{','.join(words)}"]
    service.call(*argv, image["Id"], *asked.arguments)
    (service.folder / asked.name).write_text(json.dumps(configuration), encoding="utf-8")
    say(asked.name)


def descriptor(image: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptor of an image. podman's id stands in for the digest of its index."""
    return {"digest": f"sha256:{image['Id']}", "mediaType": "application/vnd.oci.image.index.v1+json", "size": 1}


def images(service: Service, words: list[str]) -> None:
    """List or inspect images: `container image`."""
    if words[:1] == ["list"]:
        rows = json.loads(service.call("image", "list", "--format", "json"))
        found = [(name, service.image(name)) for row in rows for name in row.get("Names") or ()]
        if service.version < (1,):
            shown = [{"reference": name, "descriptor": descriptor(image)} for name, image in found]
        else:
            shown = [{"id": image["Id"], **configured(name, image), "variants": []} for name, image in found]
        say(json.dumps(shown))
        return
    reference = words[-1]
    image = service.image(reference)
    variant = {
        "platform": {"os": "linux", "architecture": image["Architecture"]},
        "size": 1,
        "config": {"config": {"Labels": image["Config"].get("Labels") or {}}},
    }
    old = {"name": reference, "index": descriptor(image), "variants": [variant]}
    say(json.dumps([old if service.version < (1,) else old | configured(reference, image)]))


def configured(name: str, image: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an image's description that is new in version 1.0."""
    return {"configuration": {"name": name, "descriptor": descriptor(image), "creationDate": "2026-01-01T00:00:00Z"}}


def show(service: Service, names: list[str], *, missing_is_error: bool) -> None:
    """Print containers: `container inspect` and `list`."""
    found = {name: service.container(name) for name in names}
    absent = [name for name, one in found.items() if one is None]
    if absent and missing_is_error and service.version >= (1,):
        fail(f"container not found: {', '.join(absent)}")
    say(json.dumps([one for one in found.values() if one is not None]))


def delete(service: Service, name: str) -> None:
    """Remove a container: `container delete --force`."""
    if service.container(name) is None:
        fail(f"get failed: container {name} not found")
    service.call("rm", "--force", "--time", "0", "--ignore", name)
    with contextlib.suppress(FileNotFoundError):
        (service.folder / name).unlink()
    say(name)


def main(version: str, folder: str, podman: str, *words: str) -> None:
    """Carry out one command."""
    service = Service(tuple(map(int, version.split("."))), Path(folder), podman)
    match list(words):
        case ["create", *rest]:
            create(service, rest)
        case ["image", *rest]:
            images(service, rest)
        case ["inspect", name]:
            show(service, [name], missing_is_error=True)
        case ["list", "--all", *rest]:
            names = sorted(path.name for path in service.folder.iterdir())
            if rest == ["--quiet"]:
                say("\n".join(names))
            else:
                show(service, names, missing_is_error=False)
        case ["start", "--attach", "--interactive", name]:
            os.execv(service.podman, service.argv(*words))  # noqa: S606
        case ["delete", "--force", name]:
            delete(service, name)
        case ["system", "status"]:
            if service.folder.with_name("stopped").exists():
                fail("apiserver is not running and not registered with launchd (stand-in)")
            say("apiserver is running (stand-in)")
        case _:
            fail(f"the stand-in does not know {words}", USAGE)


if __name__ == "__main__":
    main(*sys.argv[1:])
