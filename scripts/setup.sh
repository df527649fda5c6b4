#!/bin/bash -p
# Install what x07-sandbox needs and make .venv. --dev adds what the tests need. quickstart.sh and test.sh start with the
# same steps. Environment: X07_PYTHON is the Python for .venv.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

kind=runtime
case "$#:${1:-}" in
    0:) ;;
    1:--dev) kind=dev ;;
    *) fail "unknown arguments: $*" "Usage: scripts/setup.sh [--dev]" ;;
esac

set_up "$kind"
say "Ready: .venv/bin/x07"
