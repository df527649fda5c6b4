#!/bin/bash -p
# VM smoke gate: check that the promises of `x07 run` hold on this host, with the backend that x07 selects.
#   scripts/ci/check_vm_sandbox_smoke.sh
# Prints one line per check: ok, skip or fail, the name, and the observation. Ends with "ok: VM sandbox smoke passed" and
# exit code 0, or with exit code 1. Needs x07 on PATH (or .venv/bin/x07), Python 3.11 and a guest image, but no network.
# Job records are in a temporary folder. Environment: X07_VM_BACKEND selects a backend; gvisor, podman, docker and
# containerd also need X07_I_ACCEPT_WEAKER_ISOLATION=1, and vz needs X07_VM_VZ_GUEST_BUNDLE. X07_VM_GUEST_IMAGE and the
# variables of the backend's clients apply too. Runs in bash 3.2, which macOS has.
set -euo pipefail
export PODMAN_IGNORE_CGROUPSV1_WARNING=1
unset CDPATH

root=$(cd -- "$(/usr/bin/dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
smoke=$root/scripts/ci/smoke
programs=$smoke/programs

[[ $# -eq 0 ]] || fail "unknown argument: $1" "Set X07_VM_BACKEND to select a backend."
case ${X07_SANDBOX_BACKEND:-} in
    '' | vm | auto) ;;
    *) fail "X07_SANDBOX_BACKEND=$X07_SANDBOX_BACKEND is not a VM class" "Unset it: this gate checks --sandbox-backend vm." ;;
esac
export X07_SANDBOX_BACKEND=vm
export X07_I_ACCEPT_WEAKER_ISOLATION=${X07_I_ACCEPT_WEAKER_ISOLATION:-0}

if [[ ${X07_VM_BACKEND:-} == vz && -z ${X07_VM_VZ_GUEST_BUNDLE:-} ]]; then
    fail "the backend vz needs X07_VM_VZ_GUEST_BUNDLE" "Make a guest bundle: scripts/build_vz_guest_bundle.sh"
fi

x07=$(command -v x07 || true)
[[ -n $x07 || ! -x $root/.venv/bin/x07 ]] || x07=$root/.venv/bin/x07
[[ -n $x07 ]] || fail "x07 was not found on PATH" "Run scripts/setup.sh, or add x07 to PATH."
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || fail "python3 was not found on PATH" "Install Python 3.11 or newer."
timeout=$(command -v timeout || command -v gtimeout) ||
    fail "the timeout command was not found" "Install GNU coreutils (macOS: brew install coreutils)."

# ---------------------------------------------------------------------------------------------------- state folder

work=$(mktemp -d "${TMPDIR:-/tmp}/x07-smoke.XXXXXX")
export X07_VM_STATE_DIR=$work/jobs
listener=''

clean_up() {
    if [[ -n $listener ]]; then
        kill "$listener" 2>/dev/null || true
        wait "$listener" 2>/dev/null || true
    fi
    rm -rf -- "$work"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

host() { "$python" -I "$smoke/host.py" "$@"; }

# run_x07 NAME ARGUMENTS...: run x07. Sets $code, and $result to the file with the JSON that x07 printed.
run_x07() {
    result=$work/result-$1.json
    code=0
    shift
    "$timeout" --kill-after=20 300 "$x07" run --json --no-pool "$@" >"$result" 2>"$result.err" </dev/null || code=$?
}

# value KEY...: print one value of the last result.
value() { host value "$result" "$@" 2>/dev/null || true; }

# ----------------------------------------------------------------------------------------------- results of checks

skip() {
    printf '%s\n' "$*"
    exit 3
}

wrong() {
    printf '%s\n' "$*"
    if [[ -s ${result:-} ]]; then printf 'x07 exited with %s: %s\n' "$code" "$(value reason)"; fi
    if [[ -s ${result:-}.err ]]; then tail -n 5 -- "$result.err"; fi
    exit 1
}

# want NAME ACTUAL EXPECTED: fail the check unless the values are equal.
want() { [[ $2 == "$3" ]] || wrong "$1 is $(printf %q "$2"), not $(printf %q "$3")"; }

has() { grep -qE "^ +$1( |\$)" "$work/help"; }
needs_run() { has run || skip "this version has no x07 run"; }

# ---------------------------------------------------------------------------------------------------------- checks

check_backend() {
    local backend isolation
    needs_run
    run_x07 backend "$programs/probe.py"
    want "the exit code" "$code" 0
    backend=$(value backend) isolation=$(value isolation)
    case ${X07_VM_BACKEND:-} in
        '') ;;
        firecracker) want "the backend" "$backend" firecracker-ctr ;;
        container) want "the backend" "$backend" apple-container ;;
        *) want "the backend" "$backend" "$X07_VM_BACKEND" ;;
    esac
    case $backend:$isolation:$X07_I_ACCEPT_WEAKER_ISOLATION in
        *:vm-hardware:* | *:vm-emulated:*) ;;
        podman:container:[1tTyY]* | docker:container:[1tTyY]* | containerd:container:[1tTyY]*) ;;
        gvisor:user-kernel:[1tTyY]*) ;;
        *) wrong "the isolation $(printf %q "$isolation") needs X07_I_ACCEPT_WEAKER_ISOLATION=1" ;;
    esac
    say "$backend, $isolation"
}

check_build() {
    needs_run
    cp -R -- "$smoke/project" "$work/project"
    cp -- "$programs/probe.py" "$work/project/"
    printf '%s' "$targets" >"$work/project/targets"
    run_x07 build --no-cache "$work/project"
    want "the exit code" "$code" 0
    want "the outcome" "$(value outcome)" ok
    want "the build's network access" "$(value stdout text)" "interfaces: none; reached: none"
    want "the number of connections to this host" "$(wc -l <"$work/hits" | tr -d ' ')" 1
    want "the origin of the artifact" "$(value artifact_from)" build
    [[ -n $(value phases build job_id) && $(value phases build job_id) != $(value phases run job_id) ]] ||
        wrong "build and run were not separate jobs"
    [[ $(value digests artifact) == sha256:* ]] || wrong "the artifact has no digest"
    say "compiled without network in one job; $(value digests artifact | cut -c 1-19) ran in another"
}

check_mounts() {
    needs_run
    mkdir -- "$work/roots" "$work/roots/readable" "$work/roots/writable"
    echo hello >"$work/roots/readable/in.txt"
    echo secret >"$work/roots/other.txt"
    host policy "$root/examples/policy.json" "$work/policy-roots.json" 'fs.enabled=true' \
        'fs.read_roots=["readable"]' 'fs.write_roots=["writable"]'
    cd -- "$work/roots"
    run_x07 mounts --policy "$work/policy-roots.json" "$programs/roots.py" -- "$work/roots/other.txt"
    want "the exit code" "$code" 0
    case $(value stdout text) in
        *'read root: written'*) wrong "the program could write to its read root" ;;
        'read: hello; read root: E'*'; other file: missing') ;;
        *) want "the program's output" "$(value stdout text)" "read: hello; read root: EROFS; other file: missing" ;;
    esac
    want "the file in the read root" "$(cat readable/in.txt)" hello
    want "the file from the write root" "$(cat writable/out.txt 2>/dev/null)" HELLO
    want "the state of the changes" "$(value changes state)" applied
    say "the read root is read-only, the change in the write root was applied, nothing else is visible"
}

check_limits() {
    local memory="oom, 137"
    needs_run
    host policy "$root/examples/policy.json" "$work/policy-memory.json" limits.mem_bytes=67108864
    run_x07 memory --policy "$work/policy-memory.json" "$programs/memory.py"
    if [[ $(value backend) == gvisor && $(value outcome) == guest-lost ]]; then
        memory="ended by gVisor, which does not say why" # a known gap of the backend
    else
        want "the outcome of using 256 MiB with a limit of 64 MiB" "$(value outcome)" oom
        want "its exit code" "$code" 137
    fi
    host policy "$root/examples/policy.json" "$work/policy-wall.json" limits.wall_ms=5000
    run_x07 wall --policy "$work/policy-wall.json" "$programs/sleep.py" -- 60
    want "the outcome of a minute with a limit of 5 s" "$(value outcome)" timeout
    want "its exit code" "$code" 124
    want "its output" "$(value stdout text)" started
    say "64 MiB of memory ($memory), 5 s of time (timeout, 124)"
}

check_labels() {
    local jobs faults
    needs_run
    result=$work/result-build.json code=0
    jobs=("$(value phases build job_id)" "$(value phases run job_id)")
    [[ -n ${jobs[0]} && -n ${jobs[1]} ]] || wrong "the build check recorded no jobs"
    faults=$(host labels "$X07_VM_STATE_DIR" "${jobs[@]}" 2>&1) || wrong "$faults"
    [[ -z $faults ]] || wrong "$faults"
    say "io.x07.schema, run_id, runner_instance and deadline_unix_ms of both jobs match their records"
}

# runtime BACKEND ARGUMENTS...: call the client of a backend that keeps containers, as the backend does.
runtime() {
    local backend=$1 namespace=${X07_VM_CONTAINERD_NAMESPACE:-x07}
    shift
    case $backend in
        podman) set -- "${X07_VM_PODMAN_BIN:-podman}" "$@" ;;
        docker) set -- "${X07_VM_DOCKER_BIN:-docker}" "$@" ;;
        apple-container) set -- container "$@" ;;
        containerd)
            set -- --address "${X07_VM_CONTAINERD_SOCK:-/run/containerd/containerd.sock}" --namespace "$namespace" "$@"
            set -- "${X07_VM_CTR_BIN:-ctr}" "$@"
            ;;
        firecracker-ctr)
            set -- --namespace "$namespace" "$@"
            set -- --address "${X07_VM_FIRECRACKER_CONTAINERD_SOCK:-/run/firecracker-containerd/containerd.sock}" "$@"
            set -- "${X07_VM_FIRECRACKER_CTR_BIN:-firecracker-ctr}" "$@"
            ;;
    esac
    "$timeout" 30 "$@"
}

# containers BACKEND JOB: print the containers of a job, one per line.
containers() {
    case $1 in
        podman | docker) runtime "$1" ps --all --quiet --filter "label=io.x07.run_id=$2" ;;
        containerd | firecracker-ctr) runtime "$1" containers ls --quiet "labels.\"io.x07.run_id\"==$2" ;;
        apple-container) runtime "$1" list --all --quiet | grep -Fx "x07-$2" || true ;;
        gvisor) [[ ! -e $work/gvisor/bundles/x07-$2 ]] || echo "x07-$2" ;;
    esac
}

# left_over JOB BACKEND: print what a killed run left, one per line: processes, containers, and control groups if this
# version has a sweep that removes them.
left_over() {
    if has sweep; then host remains "$X07_VM_STATE_DIR" "$1"; else host remains "$X07_VM_STATE_DIR" "$1" | grep -v group || true; fi
    containers "$2" "$1" | sed 's/^/container /'
}

# container_labels JOB BACKEND: compare the labels of a job's container with its record.
container_labels() {
    local job=$1 backend=$2 name place
    name=$(host value "$X07_VM_STATE_DIR/$job/job.json" container_id)
    case $backend in
        podman | docker) place='' && runtime "$backend" inspect --format '{{json .Config.Labels}}' "$name" ;;
        containerd | firecracker-ctr) place=Labels && runtime "$backend" containers info "$name" ;;
        apple-container) place='0 configuration labels' && runtime "$backend" inspect "$name" ;;
        gvisor) place=annotations && cat -- "$work/gvisor/bundles/$name/config.json" ;;
        *) return 0 ;; # its machines have no labels but those of the record
    esac >"$work/container.json" || wrong "$backend has no container for job $job"
    for name in schema run_id runner_instance deadline_unix_ms; do
        # shellcheck disable=SC2086 # one word for each key
        want "the container's label io.x07.$name" "$(host value "$work/container.json" $place "io.x07.$name")" \
            "$(host value "$X07_VM_STATE_DIR/$job/owner.json" labels "io.x07.$name")"
    done
}

check_orphan() {
    local job='' left='' backend count pid
    needs_run
    export X07_VM_STATE_DIR=$work/orphan
    host policy "$root/examples/policy.json" "$work/policy-long.json" limits.wall_ms=300000
    "$x07" run --no-pool --policy "$work/policy-long.json" "$programs/sleep.py" -- 280 \
        >"$work/victim.out" 2>"$work/victim.err" </dev/null &
    pid=$!
    # The run is a child of this shell, so its pid cannot have been reused.
    trap 'kill -TERM "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true' EXIT
    for ((count = 0; count < 600; count++)); do
        [[ ! -s $work/victim.out ]] || break
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    result=$work/victim code=running
    [[ -s $work/victim.out ]] || wrong "the run to kill did not start"
    for job in "$X07_VM_STATE_DIR"/*-run; do job=${job##*/}; done
    [[ -f $X07_VM_STATE_DIR/$job/job.json ]] || wrong "the run to kill has no record"
    [[ -n $(host remains "$X07_VM_STATE_DIR" "$job") ]] || wrong "the record of a live run lists no live process"
    backend=$(host value "$X07_VM_STATE_DIR/$job/job.json" backend)
    container_labels "$job" "$backend"
    kill -KILL "$pid"
    wait "$pid" 2>/dev/null || true
    trap - EXIT
    echo "$job" >"$work/orphan.job"
    echo "$backend" >"$work/orphan.backend"
    if has sweep; then
        code=0
        "$timeout" --kill-after=20 120 "$x07" sweep --json >"$work/sweep.json" 2>"$work/sweep.err" </dev/null || code=$?
        echo "$code" >"$work/sweep.code"
    fi
    for ((count = 0; count < 30; count++)); do
        left=$(left_over "$job" "$backend")
        [[ -n $left ]] || break
        sleep 0.5
    done
    [[ -z $left ]] || wrong "15 s after its runner was killed, job $job still has: $left"
    if has sweep; then
        say "a killed runner left no process, control group or container"
    else
        say "a killed runner left no process"
    fi
}

check_sweep() {
    local job
    has sweep || skip "this version has no x07 sweep"
    [[ -s $work/orphan.job && -s $work/sweep.code ]] || wrong "the orphan check left no job to sweep"
    job=$(<"$work/orphan.job")
    result=$work/sweep code=$(<"$work/sweep.code")
    [[ $code == 0 ]] || wrong "x07 sweep exited with $code and kept $(host value "$work/sweep.json" kept)"
    case $(<"$work/orphan.backend") in
        qemu | vz) ;;
        *)
            if [[ -e $work/orphan/$job/reaped ]] && ! host removed "$work/sweep.json" "$job"; then
                say "the reaper removed the killed runner's container before x07 sweep did"
                return
            fi
            ;;
    esac
    host removed "$work/sweep.json" "$job" || wrong "x07 sweep --json does not list job $job as removed"
    [[ ! -d $work/orphan/$job || -e $work/orphan/$job/reaped || -e $work/orphan/$job/done ]] ||
        wrong "the record of $job has neither done nor reaped"
    say "x07 sweep removed the killed runner's job and listed it"
}

check_network() {
    needs_run
    host policy "$root/examples/policy.json" "$work/policy-net.json" \
        net.enabled=true net.allow_tcp=true net.allow_dns=true 'net.allow_hosts=[]'
    # shellcheck disable=SC2086 # one word for each target
    run_x07 network --policy "$work/policy-net.json" "$programs/probe.py" -- $targets
    want "the number of connections to this host" "$(wc -l <"$work/hits" | tr -d ' ')" 1
    if [[ $(value outcome) == refused ]]; then
        want "the exit code" "$code" 125
        say "refused before anything started: the host list is empty"
        return
    fi
    want "the exit code" "$code" 0
    want "the program's network access" "$(value stdout text)" "interfaces: none; reached: none"
    say "net.enabled with an empty host list gives no interface and no connection"
}

# refused_weaker NAME ARGUMENTS...: x07 run must refuse these before anything starts.
refused_weaker() {
    local name=$1
    shift
    run_x07 "weaker-$name" "$@" "$programs/mark.py" -- "$work/ran-$name"
    [[ ! -e $work/ran-$name ]] || wrong "$name ran the program"
    want "the outcome with $name" "$(value outcome)" refused
    want "its exit code" "$code" 125
    want "its backend" "$(value backend)" ""
    [[ $(value reason) == *"weaker isolation"* ]] || wrong "the reason does not mention weaker isolation"
}

check_weaker() {
    local name
    needs_run
    export X07_I_ACCEPT_WEAKER_ISOLATION=0
    unset X07_VM_BACKEND
    refused_weaker os --sandbox-backend os
    refused_weaker none --sandbox-backend none
    for name in gvisor podman docker containerd; do refused_weaker "$name" --backend "$name"; done
    say "os, none and all containers are refused without --i-accept-weaker-isolation"
}

x07_project() {
    cp -R -- "$smoke/x07" "$work/$1"
    cd -- "$work/$1"
    "$timeout" 60 "$x07" policy init --template worker --project x07.json >"$work/init.out" 2>"$work/init.err" </dev/null ||
        wrong "x07 policy init failed: $(<"$work/init.err")"
}

check_x07_program() {
    needs_run
    has policy || skip "this version has no x07 policy"
    x07_project x07-program
    result=$work/result-x07-program.json code=0
    "$timeout" --kill-after=20 300 "$x07" run --report runner --no-pool --project x07.json --profile sandbox \
        --input /dev/null >"$result" 2>"$result.err" </dev/null || code=$?
    if [[ $code -ne 0 ]] && grep -q 'no X07 toolchain' "$result.err"; then
        skip "the guest image has no X07 toolchain; x07 image build --x07-toolchain DIR adds one"
    fi
    want "the exit code" "$code" 0
    want "the output, in base64" "$(value solve solve_output_b64)" b2s=
    say "a project with profile sandbox printed ok"
}

# make_bundle ARGUMENTS...: make a bundle. Sets $code, and $result to the file with its report.
make_bundle() {
    result=$work/result-bundle.json code=0
    "$timeout" --kill-after=20 300 "$x07" bundle --json --out "$work/bundled" --emit-dir "$work/emitted" "$@" \
        >"$result" 2>"$result.err" </dev/null || code=$?
}

# start_bundle ARGUMENTS...: start the bundle. Sets $code, and $result to the file with its output.
start_bundle() {
    result=$work/bundled.out code=0
    "$timeout" --kill-after=20 300 "$work/bundled" "$@" >"$result" 2>"$result.err" </dev/null || code=$?
}

check_bundle() {
    has bundle || skip "this version has no command x07 bundle"
    needs_run
    make_bundle "$programs/probe.py"
    want "the exit code of x07 bundle" "$code" 0
    want "the version of its report" "$(value schema_version)" x07.bundle.report@0.4.0
    cmp -s -- "$work/emitted/policy.used.json" "$work/bundled.vm/policy.json" || wrong "the policies differ"
    # shellcheck disable=SC2086 # one word for each target
    start_bundle $targets
    want "the bundle's exit code" "$code" 0
    want "the bundle's network access" "$(<"$work/bundled.out")" "interfaces: none; reached: none"
    printf ' ' >>"$work/bundled.vm/policy.json"
    start_bundle
    want "the exit code after a change of the policy" "$code" 125
    want "the output after a change of the policy" "$(<"$work/bundled.out")" ""
    x07_project bundle
    make_bundle --force --project x07.json --profile sandbox
    if [[ $code -eq 0 ]] || ! grep -q 'no X07 toolchain' "$result.err" "$result"; then
        want "the exit code of x07 bundle for an X07 project" "$code" 0
        start_bundle
        want "the X07 project's output" "$(<"$work/bundled.out")" ok
        want "its exit code" "$code" 0
    fi
    say "a bundle ran its program without network, and was refused after a change of one byte"
}

# ------------------------------------------------------------------------------------------------------------ gate

passed=0 failed=0

# The subshell is not part of a condition, because set -e has no effect in a condition. Output of programs is printed as
# plain text and never at the start of a line, where a CI service would take it for a command.
check() {
    local name=$1 status=0
    set +e
    (
        set -e
        "check_${name//-/_}"
    ) >"$work/said" 2>&1
    status=$?
    set -e
    LC_ALL=C tr -c '[:print:]\n' '?' <"$work/said" | head -c 4000 >"$work/shown"
    case $status in
        0) passed=$((passed + 1)) && say "ok: $name: $(<"$work/shown")" ;;
        3) say "skip: $name: $(<"$work/shown")" ;;
        *) failed=$((failed + 1)) && say "fail: $name: $(sed '2,$s/^/    | /' "$work/shown")" ;;
    esac
}

"$timeout" 60 "$x07" --help >"$work/help" 2>&1 </dev/null || fail "$x07 --help failed" "Reinstall x07: scripts/setup.sh"

: >"$work/hits"
# Not with host(), so that $! is the pid of the listener and not of a subshell.
"$python" -I "$smoke/host.py" listen "$work/port" "$work/hits" 3600 >/dev/null </dev/null &
listener=$!
for ((count = 0; count < 100; count++)); do
    [[ ! -s $work/port ]] || break
    sleep 0.1
done
[[ -s $work/port ]] || fail "the loopback listener did not start" "See the message above."
host connect "$(<"$work/port")" # counts as one hit; a connection out of a VM would add another
# Loopback, and the host's address in QEMU's user network.
targets="127.0.0.1:$(<"$work/port") 10.0.2.2:$(<"$work/port")"

for name in backend build mounts limits labels orphan sweep network weaker x07-program bundle; do
    check "$name"
done

if [[ $failed -gt 0 ]]; then
    say "fail: VM sandbox smoke: $failed failed, $passed passed"
    exit 1
elif [[ $passed -eq 0 ]]; then
    say "fail: VM sandbox smoke: no check ran"
    exit 1
fi
say "ok: VM sandbox smoke passed"
