#!/bin/bash -p
# Test x07-sandbox under KVM on any x86_64 host: boot Debian with its stock kernel on a processor that QEMU emulates, with
# AMD's hardware virtualisation (SVM), and use x07 in it. /dev/kvm works there, slowly. Takes about 8 minutes.
#   scripts/nested_kvm_check.sh
# Prints one line for each point, and then a summary. Exit status: 0 all points passed, 1 a failure, 77 cannot run here.
# Needs root, the packages that scripts/setup.sh installs, 5 GB of memory, and 5 GB in ${TMPDIR:-/var/tmp}.
set -euo pipefail
unset CDPATH # cd would print where it went

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
# shellcheck source=scripts/fresh_root.sh
source "$root/scripts/fresh_root.sh"

LIMIT_S=1800 # of the machine
MEMORY_MIB=4096
USER_NAME=tester
SCRIPT=scripts/nested_kvm_check.sh

# ------------------------------------------------------------------------------------------------- in the machine

export X07_VM_SAVE_FIRST=1 # as timed below
x07() { "$root/.venv/bin/x07" "$@"; }

# ran START OUTPUT ARGUMENT...: run a program, and check its output, and that its VM was under KVM and had this start mode.
ran() {
    local start=$1 output=$2 said code=0
    shift 2
    said=$(x07 run --json "$@") || code=$?
    printf '%s\n' "$said" | cut -c 1-300
    [[ $code -eq 0 ]]
    grep -Fq '"isolation": "vm-hardware"' <<<"$said"
    grep -Fq -- "-run\", \"start\": \"$start\"" <<<"$said"
    grep -Fq "\"text\": \"$output\\n\"" <<<"$said"
}

# refused WORDS COMMAND...: check that a command fails with exit code 125 and an error that contains WORDS.
refused() {
    local words=$1 said code=0
    shift
    said=$("$@" 2>&1) || code=$?
    printf '%s: %s\n' "$code" "$said"
    [[ $code -eq 125 ]] && grep -Fq -- "$words" <<<"$said"
}

# wait_until COMMAND...: wait until a command succeeds, at most two minutes.
wait_until() {
    local _
    for _ in {1..240}; do
        "$@" && return
        sleep 0.5
    done
    return 1
}
no_vms() { ! pgrep qemu-system >/dev/null; }
some_vms() { ! no_vms; }

hello=(--toolchain python -c 'print(6 * int(input()))' --input-b64 Nwo=)

p_doctor() {
    x07 doctor | tee doctor
    grep -q 'good  isolation: vm-hardware' doctor && grep -q 'good  VM start' doctor
}
p_cold_c() {
    [[ $(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) -lt $MEMORY_MIB ]]
    printf '#include <stdio.h>\nint main(void) { puts("built"); }\n' >hello.c
    ran cold built --cold hello.c
}
p_cold_python() { ran cold 42 --cold "${hello[@]}"; }
p_save_run() { ran clone 42 "${hello[@]}"; }
p_clone() { ran clone 42 "${hello[@]}"; }
p_clone_build() { ran clone built --no-cache hello.c; }
p_pool() {
    x07 pool start --size 1
    ran pool 42 "${hello[@]}"
    x07 pool stop
    wait_until no_vms
}
p_sandbox_command() {
    mkdir site && echo 'hello from the VM' >site/index.txt
    x07 sandbox create --name box --workdir site
    [[ $(x07 sandbox exec box -- sh -c 'wc -w <index.txt >words.txt; cat words.txt') == 4 ]]
    x07 sandbox close box
    x07 inspect box | grep -F '"isolation": "vm-hardware"'
    [[ $(<site/words.txt) == 4 ]]
}
p_sandbox_library() {
    "$root/.venv/bin/python" -I -c '
from x07_sandbox import Sandbox
with Sandbox() as sandbox:
    sandbox.files.write("greet.py", b"print(6 * 7)\n")
    done = sandbox.exec(["python3", "greet.py"])
    assert (done.exit_code, done.stdout) == (0, b"42\n"), done
assert sandbox.result.isolation == "vm-hardware", sandbox.result'
}
p_forks() {
    "$root/.venv/bin/python" -I -c '
from x07_sandbox import Sandbox
with Sandbox() as sandbox:
    echo = sandbox.start(["cat"])
    sandbox.files.write("file", b"one")
    point = sandbox.checkpoint()
    forks = sandbox.fork(2)
    for number, fork in enumerate(forks):
        fork.files.write("file", b"%d" % number)
    assert [fork.files.read("file") for fork in forks] == [b"0", b"1"]
    for one in (forks[0].process(echo.id), echo):
        one.write(b"line\n")
        assert one.read_until(b"\n", timeout_s=60) == b"line\n"
    for fork in forks:
        fork.close()
    sandbox.files.write("file", b"two")
    sandbox.rollback(point)
    assert sandbox.files.read("file") == b"one"
assert forks[0].result.isolation == "vm-hardware", forks[0].result'
}
p_changes() {
    mkdir work && cd work && echo one >a.txt
    ran clone written --workdir . --toolchain python -c 'open("b.txt", "w").write("2"); print("written")'
    [[ $(<b.txt) == 2 ]]
    x07 undo
    [[ ! -e b.txt && $(<a.txt) == one ]]
}
p_network() {
    mkdir -p web ~/.config/x07 && echo served >web/page
    printf '[net]\nallow_loopback = true\nallow_local = ["127.0.0.1:8080"]\n' >~/.config/x07/sandbox.toml
    chmod 700 ~/.config/x07 && chmod 600 ~/.config/x07/sandbox.toml
    python3 -m http.server --directory web --bind 127.0.0.1 8080 &>/dev/null &
    server=$!
    trap 'kill "$server"' EXIT
    local get='import urllib.request; print(urllib.request.urlopen("http://host.x07:8080/page").read().decode().strip())'
    ran clone served --allow-host host.x07:8080 --toolchain python -c "$get"
}
p_killed_runner() {
    # Not a job of this shell, which would ignore SIGINT.
    "$root/.venv/bin/x07" run --toolchain python -c 'import time; time.sleep(500)' --timeout 400 &
    local runner=$!
    wait_until some_vms
    sleep 10 # so that the program runs
    kill -KILL "$runner"
    wait_until no_vms
    x07 sweep | tee swept
    grep -q '^removed ' swept
    ! x07 ps --all | grep orphaned
}
p_require_hardware() {
    ran clone 42 --require-hardware "${hello[@]}"
    trap 'mv /dev/kvm-away /dev/kvm' EXIT
    mv /dev/kvm /dev/kvm-away
    refused 'Use a host where KVM works' x07 run --require-hardware "${hello[@]}"
    X07_VM_REQUIRE_HARDWARE=1 refused 'unset X07_VM_REQUIRE_HARDWARE' x07 run "${hello[@]}"
}
as_user() {
    setpriv --reuid="$USER_NAME" --regid="$USER_NAME" "$1" env HOME="/home/$USER_NAME" \
        "$root/$SCRIPT" --point "$2"
}
p_user_in_group() { as_user --init-groups cold_python; }
p_user_outside_group() { as_user --clear-groups not_in_group; }
p_not_in_group() { refused 'usermod -aG kvm' x07 run --require-hardware "${hello[@]}"; }

points() {
    local number=0 failed=0 started=$SECONDS name words code
    while IFS='|' read -r name words; do
        number=$((number + 1)) SECONDS=0 code=0
        timeout -k 5 400 "$root/$SCRIPT" --point "$name" >"/root/$name.log" 2>&1 </dev/null || code=$?
        if [[ $code -eq 0 ]]; then
            say "point: ok     $SECONDS s  $words"
        else
            failed=$((failed + 1))
            say "point: FAILED $SECONDS s  $words (exit status $code)"
            tail -n 25 "/root/$name.log" | sed 's/^/    /'
        fi
        started=$((started + SECONDS))
    done <<'END'
doctor|doctor: the proof of KVM, and a VM
cold_c|C program, booted VMs for build and run, with 4 GiB of RAM
cold_python|Python program, booted VM
save_run|Python program, with saving a VM for builds and one for runs
clone|Python program, cloned VM
clone_build|C program, cloned VMs for build and run
pool|pool started, a program in it, pool stopped
sandbox_command|sandbox created, used and closed by commands
sandbox_library|sandbox from the library
forks|two forks of a sandbox, a checkpoint and a rollback
changes|changes applied and undone
network|network: a server allowed with allow_local
killed_runner|runner killed, VM gone, record swept
require_hardware|--require-hardware with and without /dev/kvm
user_in_group|ordinary user in the group kvm, booted VM
user_outside_group|ordinary user outside the group kvm: refused, with the fix
END
    say "summary: $number points, $failed failed, $started s"
}

# The machine's first process.
machine() {
    export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mountpoint -q /dev || mount -t devtmpfs dev /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts pts /dev/pts
    mount -t tmpfs shm /dev/shm
    mount -t tmpfs run /run
    mount -t cgroup2 none /sys/fs/cgroup
    ln -sfn /proc/self/fd /dev/fd
    ip link set lo up
    modprobe kvm_amd
    chgrp kvm /dev/kvm && chmod 660 /dev/kvm # there is no udev
    say "machine: Linux $(uname -r), $(nproc) processors, $(free -m | awk '/^Mem/ { print $2 }') MiB, booted in" \
        "$(cut -d ' ' -f 1 /proc/uptime) s"
    points
    sync
    echo o >/proc/sysrq-trigger
    sleep 60
}

case "$#:${1:-}" in
    0:) ;;
    1:--machine) machine && exit ;;
    2:--point)
        mkdir -p ~/points && cd ~/points
        "p_$2"
        exit
        ;;
    *) fail "unknown arguments: $*" "Usage: $SCRIPT" ;;
esac

# ------------------------------------------------------------------------------------------------------- on the host

cannot() {
    say "${0##*/}: cannot run here: $*"
    exit 77
}
# enough WHAT MIB NEEDED
enough() { [[ $2 -ge $3 ]] || cannot "it needs $3 MiB of $1, and $2 MiB are free"; }

[[ $(uname -m) == x86_64 ]] || cannot "only QEMU for x86_64 emulates SVM"
[[ $EUID -eq 0 ]] || cannot "it needs root"
for program in mmdebstrap qemu-system-x86_64 mke2fs; do
    command -v "$program" >/dev/null || cannot "$program is missing; run scripts/setup.sh"
done
enough memory "$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)" $((MEMORY_MIB + 1024))
enough "disk space in ${TMPDIR:-/var/tmp}" "$(df --output=avail -m "${TMPDIR:-/var/tmp}" | tail -n 1 | tr -d " ")" 5120

began=$SECONDS
new_work_folder
place=/opt/x07-sandbox
mkdir -p "$work/etc/initramfs-tools/conf.d"
printf '%s\n' virtio_pci virtio_blk ext4 >"$work/etc/initramfs-tools/modules"
printf 'MODULES=list\nCOMPRESS=zstd\nBUSYBOX=n\nFSTYPE=ext4\n' >"$work/etc/initramfs-tools/conf.d/nested"
include=$(runtime_packages | tr '\n' ,)linux-image-amd64,initramfs-tools,kmod,procps,iproute2,passwd,mount
make_root "$include" "$place" "--essential-hook=cp -r '$work/etc' \"\$1\"" \
    '--aptopt=APT::Install-Recommends "false"' '--dpkgopt=path-exclude=/usr/share/doc/*'
step "Installing x07-sandbox in it, and building a guest image"
inside "$place" env -i "${environment[@]}" scripts/setup.sh
inside "$place" env -i "${environment[@]}" .venv/bin/python -I -c '
from x07_sandbox.images.build import build_image
build_image(progress=print)'
cp "$fresh"/boot/vmlinuz-* "$work/vmlinuz"
cp "$fresh"/boot/initrd.img-* "$work/initrd"
chroot "$fresh" useradd --create-home --groups kvm "$USER_NAME"
home=$fresh/home/$USER_NAME
mkdir -p "$home/.cache" && cp -a "$fresh/root/.cache/x07-sandbox" "$home/.cache/"
chown -R --reference="$home" "$home/.cache"
rm -rf "$fresh"/var/cache/apt/archives/*.deb "$fresh"/var/lib/apt/lists/*
truncate -s 8G "$work/disk"
mke2fs -q -t ext4 -E lazy_itable_init=1 -d "$fresh" "$work/disk"
say "The machine was made in $((SECONDS - began)) s."

step "In the machine, with 2 emulated processors"
# The kernel cannot calibrate its clock against an emulated timer on a busy host, so it is given the host's frequency.
khz=$(awk '/^bogomips/ { printf "%d", $3 * 500; exit }' /proc/cpuinfo)
words="root=/dev/vda rw console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off nowatchdog tsc=reliable no_timer_check"
words+=" tsc_early_khz=$khz cryptomgr.notests init=$place/$SCRIPT -- --machine"
timeout "$LIMIT_S" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -M q35 -cpu max \
    -accel tcg,thread=multi,tb-size=1024 -m "$MEMORY_MIB" -smp 2 -kernel "$work/vmlinuz" -initrd "$work/initrd" \
    -append "$words" -drive "file=$work/disk,if=virtio,format=raw,cache=unsafe" -serial stdio \
    </dev/null > >(sed -u 's|\r||g' | tee "$work/said") &
machine=$!
trap 'kill "$machine" 2>/dev/null || true; wait; rm -rf --one-file-system -- "$work"' EXIT
wait "$machine" || fail "the machine ended with exit status $?" "See its messages above. 124: it took over $LIMIT_S s."
grep -q '^summary: .* 0 failed,' "$work/said" || fail "not all points passed" "See the messages above."
