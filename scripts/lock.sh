#!/usr/bin/env bash
# Writes requirements/runtime.txt and requirements/dev.txt anew from the .in files: every version pinned, every
# wheel's hash, no package-index address. Used by hand; needs python3.11 with venv. Nothing else of the project is
# touched. To move to new releases: scripts/lock.sh --upgrade
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# The oldest supported Python resolves for all: what only it needs does no harm to the newer ones.
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --upgrade 'pip>=26' pip-tools

export CUSTOM_COMPILE_COMMAND='scripts/lock.sh'
for name in runtime dev; do
    # A release has to be a week old: a stolen upload is mostly found by then.
    "$work/venv/bin/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
        --pip-args='--uploaded-prior-to=P7D' "$@" \
        --output-file="requirements/$name.txt" "requirements/$name.in"
done
echo "requirements/runtime.txt and requirements/dev.txt are written."
