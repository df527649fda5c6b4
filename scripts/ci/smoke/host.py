"""Host-side helpers of check_vm_sandbox_smoke.sh: a listener, policies, results and records.

    host.py listen PORT_FILE HITS_FILE SECONDS    accept loopback connections; write a line to HITS_FILE for each
    host.py connect PORT                          make one connection to the listener
    host.py policy FILE OUT [FIELD=JSON...]       write FILE to OUT with some fields changed
    host.py value FILE KEY...                     print one value of a JSON document; a list has numbers as keys
    host.py labels STATE JOB...                   print the errors in the labels of these jobs, one per line
    host.py remains STATE JOB                     print what a job left on this host, one per line
    host.py removed FILE JOB                      exit with 0 if `x07 sweep --json` lists the job as removed

Needs Python 3.11 or newer and no packages.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

_LABELS: Final = ("schema", "run_id", "runner_instance", "deadline_unix_ms")  # the required ones, each as io.x07.NAME
_MOST_BYTES: Final = 64 * 1024 * 1024


def read(path: str | Path) -> Any:  # noqa: ANN401 - any JSON value
    """Return the JSON document in a file."""
    with Path(path).open("rb") as file:
        return json.loads(file.read(_MOST_BYTES))


def listen(port_file: str, hits_file: str, seconds: str) -> None:
    """Accept connections on a free loopback port for some seconds, or until killed."""
    end = time.monotonic() + float(seconds)
    with socket.create_server(("127.0.0.1", 0)) as server, Path(hits_file).open("a", encoding="utf-8") as hits:
        ready = Path(f"{port_file}.new")
        ready.write_text(str(server.getsockname()[1]), encoding="utf-8")
        ready.replace(port_file)
        while (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                server.accept()[0].close()
            except TimeoutError:
                return
            hits.write("connected\n")
            hits.flush()


def connect(port: str) -> None:
    """Make one connection to the listener, and wait until the listener closes it."""
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        connection.recv(1)


def policy(source: str, target: str, *changes: str) -> None:
    """Copy a policy and change some fields, each given as section.name=JSON."""
    document = read(source)
    for change in changes:
        field, _, text = change.partition("=")
        section, _, name = field.partition(".")
        document[section][name] = json.loads(text)
    Path(target).write_text(json.dumps(document), encoding="utf-8")


def value(path: str, *keys: str) -> None:
    """Print one value of a document, or nothing if it is absent."""
    found = read(path)
    for key in keys:
        if isinstance(found, list):
            found = dict(enumerate(found)).get(int(key))
        else:
            found = found.get(key) if isinstance(found, dict) else None
    print(found if isinstance(found, str) else "" if found is None else json.dumps(found))


def labels(state: str, *jobs: str) -> None:
    """Print the errors in the labels of these jobs."""
    runners = set()
    for job in jobs:
        folder = Path(state) / job
        record, labels = read(folder / "job.json"), read(folder / "owner.json").get("labels", {})
        for name in _LABELS:
            if not labels.get(f"io.x07.{name}"):
                print(f"{job} has no label io.x07.{name}")
        wanted = {"schema": "1", "run_id": record["run_id"], "deadline_unix_ms": str(record["deadline_unix_ms"])}
        for name, text in wanted.items():
            if labels.get(f"io.x07.{name}") != text:
                print(f"{job}: io.x07.{name} is {labels.get(f'io.x07.{name}')!r}, not {text!r}")
        if record["run_id"] != job:
            print(f"{job}: job.json has the run_id {record['run_id']!r}")
        if not record["created_unix_ms"] < record["deadline_unix_ms"]:
            print(f"{job}: its deadline is not after its creation")
        runners.add(labels.get("io.x07.runner_instance"))
    if len(runners) > 1:
        print(f"the jobs of one run name several runners: {runners}")


def remains(state: str, job: str) -> None:
    """Print the control groups of a job, and its processes: the recorded ones and those with its mark in their argv."""
    folder = Path(state) / job
    if not (folder / "owner.json").is_file():
        return
    owner = read(folder / "owner.json")
    for name, process in owner.get("processes", {}).items():
        if _lives(process["pid"], process["start_ticks"]):
            print(f"its {name} process {process['pid']} is alive")
    for pid in _marked(owner["instance"]):
        print(f"process {pid} has the job's mark in its arguments")
    for group in owner.get("cgroups", []):
        if Path(group).exists():
            print(f"its control group {group} still exists")


def _lives(pid: int, start_ticks: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    fields = text.rpartition(")")[2].split()
    return fields[0] not in {"Z", "X"} and int(fields[19]) == start_ticks


def _marked(mark: str) -> Iterator[int]:
    if not Path("/proc/self").exists():
        yield from _marked_by_ps(mark)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                yield int(process.name)
        except OSError:
            continue


def _marked_by_ps(mark: str) -> Iterator[int]:
    """As `_marked`, where there is no /proc, as on macOS."""
    listed = subprocess.run(["/bin/ps", "-axwwo", "pid=,command="], capture_output=True, check=True, timeout=30).stdout
    for line in listed.decode(errors="replace").splitlines():
        pid, _, command = line.strip().partition(" ")
        if mark in command:
            yield int(pid)


def removed(path: str, job: str) -> None:
    """Exit with 0 if a sweep report lists the job as removed, else with 1."""
    rows = read(path).get("removed", [])
    sys.exit(0 if any(job in json.dumps(row) for row in rows) else 1)


COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "listen": listen,
    "connect": connect,
    "policy": policy,
    "value": value,
    "labels": labels,
    "remains": remains,
    "removed": removed,
}

if __name__ == "__main__":
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except (OSError, ValueError, LookupError, AttributeError) as exc:
        print(f"host.py {sys.argv[1]}: {type(exc).__name__}: {exc}")
        sys.exit(1)
