#!/bin/bash -p
# Install everything, build the guest image and run two example programs in VMs. Later runs take seconds.
# Environment: X07_PYTHON is the Python for .venv.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

[[ $# -eq 0 ]] || fail "unknown arguments: $*" "Usage: scripts/quickstart.sh"

say "x07-sandbox: set up, build the guest image, run two examples."
set_up runtime

step "Guest image: .venv/bin/x07 image build"
.venv/bin/x07 image build ||
    fail "the guest image could not be built" "See the message above, or run .venv/bin/x07 doctor."

# example ARGUMENT...: show the command as a user would type it, then run it.
example() {
    step ".venv/bin/x07 run $*"
    .venv/bin/x07 run "$@" || fail "the example ended with exit code $?" "See the message above."
}
example --input examples/text.txt examples/word_frequency.c
example --input examples/orders.jsonl examples/jsonl_to_csv.py

step "Done. To run your own program:"
say "    .venv/bin/x07 run PROGRAM.py"
