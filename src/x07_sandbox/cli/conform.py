"""`x07 conform`: run the conformance tests of a backend on this machine."""

import argparse
import os
import tempfile
from typing import Final

from x07_sandbox.backends.registry import BY_NAME, Platform
from x07_sandbox.backends.selection import backend_request, select, this_platform
from x07_sandbox.cli.console import LiveLine, show
from x07_sandbox.cli.json_output import print_document
from x07_sandbox.cli.parser import add_document_flags, add_row, option
from x07_sandbox.conformance.behaviours import Verdict, conform
from x07_sandbox.host.paths import cache_folder
from x07_sandbox.options import BY_FLAG
from x07_sandbox.reports.conform import ConformReport

_WORDS: Final = {"passed": "ok", "failed": "FAILED", "gap": "gap", "skipped": "skipped"}
_EPILOG: Final = """Each line shows one behaviour and its verdict: ok, FAILED, gap (the backend is known to lack the
behaviour) or skipped (this host cannot test it). docs/backends/README.md lists all behaviours.

examples:
  x07 conform
  x07 conform --backend os --i-accept-weaker-isolation
  x07 conform --json | jq '.backends[].verdicts[] | select(.verdict == "failed")'

exit code: 0 nothing failed; 1 something failed
"""


def add_conform(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `x07 conform`."""
    parser.description = "Run small test programs on a backend. The test takes a few minutes and changes nothing."
    parser.epilog = _EPILOG
    option(parser, "--backend", "B", "test one backend, such as qemu (default: every VM backend that can run here)")
    for flag in ("--sandbox-backend", "--i-accept-weaker-isolation"):
        add_row(parser, BY_FLAG[flag])
    add_document_flags(parser)
    parser.set_defaults(carry_out=_conform)


def _conform(options: argparse.Namespace) -> int:
    reports, live = [], LiveLine()

    def tell(verdict: Verdict) -> None:
        live("")
        if not options.json:
            what = f"{verdict.group} {verdict.name}: {verdict.reason or verdict.promise}"
            show(f"{_WORDS[verdict.verdict]:8}{name} {what}")
        live(f"conform: {name}: after {verdict.name}")

    with tempfile.TemporaryDirectory(prefix="conform-", dir=cache_folder("tmp")) as folder:
        # A separate state folder, so that no test becomes the latest run for `x07 diff` and `x07 undo`.
        os.environ["X07_VM_STATE_DIR"] = f"{folder}/jobs"
        for name in backends_to_test(options, this_platform()):
            live(f"conform: {name}: preparing")
            try:
                reports.append(conform(name, on_verdict=tell))
            finally:
                live("")
    failed = any(verdict.verdict == "failed" for report in reports for verdict in report.verdicts)
    print_document(ConformReport(good=not failed, backends=tuple(reports)), options)
    return 1 if failed else 0


def backends_to_test(options: argparse.Namespace, platform: Platform) -> list[str]:
    """Return the backends to test. Raises UsageError, RefusedError."""
    wanted = backend_request(
        sandbox=options.sandbox_backend,
        backend=options.backend,
        accepted=options.i_accept_weaker_isolation,
    )
    chosen = select(platform, wanted).backend
    words = (wanted.sandbox_flag, wanted.sandbox_variable)
    if wanted.backend_flag or wanted.backend_variable or any(word not in {None, "auto"} for word in words):
        return [chosen]
    return [row.name for row in BY_NAME.values() if row.may_run(platform) and not row.weaker]
