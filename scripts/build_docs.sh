#!/usr/bin/env bash
# Builds the documentation as a site, in build/docs/index.html. Every warning, such as a link to nowhere, is an error.
# The tools come with scripts/setup.sh --dev.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
exec "$root/.venv/bin/sphinx-build" -q -W --keep-going -E -b html "$root/docs" "$root/build/docs"
