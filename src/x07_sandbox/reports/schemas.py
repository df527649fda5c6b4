"""The published JSON Schemas of all documents, generated from their types.

Each module that has documents is listed here, and each of its types with a `schema_version` is a document.
``python -m x07_sandbox.reports.schemas FOLDER`` writes the files. A unit test compares them.
"""

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec

from x07_sandbox.conformance import behaviours
from x07_sandbox.files import changes
from x07_sandbox.images import store
from x07_sandbox.policy.schema import render_schema
from x07_sandbox.records import listing, pruning, stopping, sweep
from x07_sandbox.reports import commands, sandboxes
from x07_sandbox.reports import result as short_result
from x07_sandbox.sessions import preview, result
from x07_sandbox.x07 import bundle, runner_report

_REF: Final = "#/$defs/{name}"
_RUNNER: Final = (runner_report.CompileRunReport, runner_report.RunOsReport)
# The modules whose documents have only one type. The version in the type names the file.
_OWNERS: Final = (preview, behaviours, commands, sandboxes, listing, pruning, stopping, sweep, bundle)
# Documents of X07's own tools, whose files have X07's names.
_NAMES: Final = {
    "runtime.attest": "x07-runtime.attest",
    "policy.init.report": "x07-policy-init.report",
    "bundle.report": "x07-bundle.report",
    "vm.bundle.manifest": "x07-vm.bundle.manifest",
}


def schemas() -> dict[str, str]:
    """Return the text of each schema file by file name."""
    made = {}
    alone = (kind for owner in _OWNERS for kind in _documents(owner))
    for kind in chain[type[msgspec.Struct]]((runner_report.Attestation,), alone):
        version = _version(kind)
        name = version.partition("@")[0].removeprefix("x07.").removeprefix("sandbox.")
        made[_NAMES.get(name, name)] = _text(version, _any_of((kind,)))
    made["image"] = _text(store.SCHEMA, _any_of((store.Manifest,)))
    made["x07-os-runner.report"] = _text(runner_report.SCHEMA, _any_of(_RUNNER))
    made["x07-run.report"] = _text(runner_report.WRAPPED_SCHEMA, _wrapped())
    made["result"] = _text(result.SCHEMA, _result())
    made["changes"] = _text(changes.SCHEMA, _changes())
    made["run-os-policy"] = render_schema().decode()
    return {f"{name}.schema.json": text for name, text in made.items()}


def _documents(owner: ModuleType) -> Iterator[type[msgspec.Struct]]:
    """Yield the types of a module that are documents."""
    for kind in vars(owner).values():
        own = isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == owner.__name__
        if own and _version(kind):
            yield kind


def _version(kind: type[msgspec.Struct]) -> str:
    """Return the `schema_version` of a type, or "" if it is no document."""
    found = next((one.default for one in msgspec.structs.fields(kind) if one.name == "schema_version"), "")
    return found if isinstance(found, str) else ""


def _any_of(types: tuple[type[msgspec.Struct], ...]) -> dict[str, Any]:
    refs, definitions = msgspec.json.schema_components(types, ref_template=_REF)
    top = refs[0] if len(refs) == 1 else {"anyOf": list(refs)}
    return {**top, "$defs": {name: _closed(schema) for name, schema in definitions.items()}}


def _wrapped() -> dict[str, Any]:
    made = _any_of((runner_report.WrappedReport, *_RUNNER))
    made["$defs"]["WrappedReport"]["properties"]["report"] = {"anyOf": made.pop("anyOf")[1:]}
    return {"$ref": _REF.format(name="WrappedReport"), **made}


def _changes() -> dict[str, Any]:
    """Return the schema of printed changes: without offsets of saved content, and with base64 of exact names."""
    made = _any_of((changes.ChangeSet,))
    del made["$defs"]["Node"]["properties"]["at"]
    for definition in made["$defs"].values():
        keys = {"root", "guest", "name", "target", "reveal"} & definition["properties"].keys()
        definition["properties"] |= {f"{key}_base64": {"type": "string"} for key in sorted(keys)}
    return made


def _result() -> dict[str, Any]:
    """Return the schema of a result, full or short."""
    made = _any_of((result.Result, short_result.OmittedControls))
    del made["anyOf"], made["$defs"]["Result"]["properties"]["files"]
    made = {"$ref": _REF.format(name="Result"), **made}
    made["$defs"]["Result"]["properties"]["controls_omitted"] = {
        "description": "Only with plain `--json`: a summary of the controls that the document omits.",
        "$ref": _REF.format(name="OmittedControls"),
    }
    return made


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Make `schema_version` a required key. The types have a default for that key, but every document contains it."""
    if "schema_version" in schema.get("properties", ()):
        schema = schema | {"required": list(dict.fromkeys(["schema_version", *schema.get("required", ())]))}
        schema["properties"]["schema_version"].pop("default", None)
    return schema


def _text(name: str, schema: dict[str, Any]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name, "title": name}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file_name, text in schemas().items():
        (Path(sys.argv[1]) / file_name).write_text(text, encoding="utf-8")
