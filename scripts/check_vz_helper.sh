#!/bin/bash -p
# Check the types of x07-vz-helper on Linux, against hand-written stubs of Apple's frameworks (macos/stubs).
#   scripts/check_vz_helper.sh [--sources DIR] [--build FILE]
# --sources: check the Swift files in DIR instead. --build: also build a program FILE, for tests: its machine is a
# stand-in that runs no guest. Needs Debian's package swiftlang. The last line is: ok: checked x07-vz-helper
set -euo pipefail
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

sources=$root/macos/x07-vz-helper build=''
read_options '[--sources DIR] [--build FILE]' sources build -- "$@"
[[ $(uname -s) == Linux ]] || fail "the stubs are for Linux" "On a Mac, run: scripts/build_vz_helper.sh FILE"
command -v swiftc >/dev/null ||
    fail "the Swift compiler was not found" "Run: apt-get install --no-install-recommends swiftlang"

work=$(mktemp -d "${TMPDIR:-/tmp}/x07-swift.XXXXXX")
trap 'rm -rf -- "$work"' EXIT
options=(-swift-version 5 -warnings-as-errors -module-cache-path "$work/cache" -I "$work")
modules=("$work/Darwin" "$work/Security" "$work/Virtualization")
for module in "${modules[@]}"; do
    library=()
    [[ -z $build ]] || library=(-emit-object -o "$module.o" -parse-as-library)
    swiftc "${options[@]}" -module-name "${module##*/}" -emit-module -emit-module-path "$module.swiftmodule" \
        "${library[@]}" "$root/macos/stubs/${module##*/}.swift"
done
swiftc "${options[@]}" -typecheck "$sources"/*.swift
[[ -z $build ]] || swiftc "${options[@]}" -o "$build" "$sources"/*.swift "${modules[@]/%/.o}"
printf 'ok: checked x07-vz-helper\n'
