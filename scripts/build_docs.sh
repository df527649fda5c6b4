#!/bin/bash -p
# Build the documentation site, build/docs/index.html. Warnings, such as broken links, are errors.
# scripts/setup.sh --dev installs the tools.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/.venv/bin/sphinx-build" -q -W --keep-going -E -b html "$root/docs" "$root/build/docs"
