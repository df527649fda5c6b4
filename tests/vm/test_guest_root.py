"""Programs that are root in the VM: what they can do, and attacks on the agent, the gate and the kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vm.conftest import left_behind
from x07_sandbox import Sandbox, SandboxError, exec_command

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("image", "state")]

# Each attack runs in a process of its own, as root of the guest, and prints "done" if it got what it wanted.
ATTACKS = r"""
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CALL = {"mount_setattr": 442, "open_tree": 428, "fsopen": 430, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
        "keyctl": 250, "init_module": 175, "reboot": 169, "quotactl": 179, "swapon": 167, "kexec_load": 246,
        "open_by_handle_at": 304, "pidfd_getfd": 438, "io_uring_setup": 425, "fanotify_init": 300, "setns": 308}
NEW = {"mount": 0x20000, "user": 0x10000000, "net": 0x40000000, "pid": 0x20000000, "cgroup": 0x2000000}
attacks = {}

def attack(function):
    attacks[function.__name__] = function
    return function

def call(name, *words):
    found = libc.syscall(CALL[name], *words)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found

def put(path, text):
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, text.encode())

def checked(found):
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

for space, flag in NEW.items():
    attacks[f"unshare_{space}"] = lambda flag=flag: os.unshare(flag)
for name, words in {
    "open_tree": (-100, b"/", 1), "fsopen": (b"tmpfs", 0), "bpf": (0, 0, 0), "perf_event_open": (0, 0, -1, -1, 0),
    "userfaultfd": (0,), "keyctl": (0, -3, 0), "init_module": (b"", 0, b""),
    "quotactl": (0, b"/", 0, 0), "swapon": (b"/etc/passwd", 0), "kexec_load": (0, 0, 0, 0),
    "open_by_handle_at": (-100, b"", 0), "pidfd_getfd": (3, 0, 0), "io_uring_setup": (8, 0), "fanotify_init": (0, 0),
}.items():
    attacks[name] = lambda name=name, words=words: call(name, *words)

@attack
def mount_tmpfs(): checked(libc.mount(b"x", b"/mnt", b"tmpfs", 0, None))
@attack
def mount_image_disk(): checked(libc.mount(b"/dev/vda", b"/mnt", b"erofs", 1, None))
@attack
def unmount_proc(): checked(libc.umount2(b"/proc", 2))
@attack
def change_root(): os.chroot("/tmp")
@attack
def enter_the_net_of_init(): os.setns(os.open("/proc/1/ns/net", os.O_RDONLY), 0)
@attack
def see_init(): os.stat("/proc/1/environ"); open("/proc/1/environ").read()
@attack
def signal_init(): os.kill(1, signal.SIGKILL)
@attack
def trace_init(): checked(libc.ptrace(16, 1, 0, 0))
@attack
def make_a_disk_device(): os.mknod("/disk", 0o60600, os.makedev(254, 0)); open("/disk", "rb").read(1)
@attack
def make_a_port_device(): os.mknod("/port", 0o20600, os.makedev(240, 1)); open("/port", "rb").read(1)
@attack
def open_a_device_of_the_agent():
    for name in ("vda", "vdb", "vport1p1", "vport0p1", "hvc0", "mem", "kmsg", "port"):
        if os.path.exists(f"/dev/{name}"): return
    raise PermissionError(errno.ENOENT, "none")
@attack
def read_kernel_memory(): open("/proc/kcore", "rb").read(1)
@attack
def press_sysrq(): put("/proc/sysrq-trigger", "c")
@attack
def change_a_sysctl(): put("/proc/sys/user/max_user_namespaces", "10")
@attack
def load_code_on_a_crash(): put("/proc/sys/kernel/core_pattern", "|/bin/sh")
@attack
def raise_the_memory_limit(): put("/sys/fs/cgroup/memory.max", "max")
@attack
def leave_the_control_group(): put("/sys/fs/cgroup/cgroup.procs", "0")
@attack
def escape_the_oom_killer(): put("/proc/self/oom_score_adj", "-1000")
@attack
def raise_a_limit():
    checked(libc.setrlimit(resource.RLIMIT_NOFILE, struct.pack("=QQ", 1 << 20, 1 << 20)))
@attack
def use_real_time(): os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
@attack
def set_the_clock(): time.clock_settime(time.CLOCK_REALTIME, 0)
@attack
def rename_the_host(): socket.sethostname("other")
@attack
def send_raw_packets(): socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
@attack
def send_frames(): socket.socket(17, socket.SOCK_RAW)
@attack
def change_the_firewall(): socket.socket(16, socket.SOCK_RAW, 12)
@attack
def take_the_loopback_down():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 0))
@attack
def add_a_route():
    with socket.socket(16, socket.SOCK_RAW, 0) as one:
        body = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + struct.pack("=HHI", 8, 4, 1)
        one.send(struct.pack("=IHHII", 16 + len(body), 24, 0x605, 1, 0) + body)
        number = struct.unpack("=i", one.recv(4096)[16:20])[0]
        if number: raise OSError(-number, os.strerror(-number))
@attack
def talk_to_the_host(): socket.socket(40, socket.SOCK_STREAM).connect((2, 1))
@attack
def gain_capabilities():
    checked(libc.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", 0xFFFFFFFF, 0xFFFFFFFF, 0, 511, 511, 0)))
@attack
def gain_capabilities_by_a_file():
    os.system("cp /usr/bin/cat /tmp/cat")
    os.setxattr("/tmp/cat", "security.capability", struct.pack("=5I", 0x2000001, 1 << 12 | 1 << 21, 0, 0, 0))
    if not int(os.popen("/tmp/cat /proc/self/status | grep CapEff").read().split()[1], 16) & (1 << 12 | 1 << 21):
        raise PermissionError(errno.EPERM, "none gained")
@attack
def remap_users(): put("/proc/self/uid_map", "0 0 1")
@attack
def become_an_unmapped_user(): os.setresuid(70000, 70000, 70000)
@attack
def give_a_file_to_the_real_root(): os.mkdir("/tmp/a"); os.chown("/tmp/a", 65536, 65536)
@attack
def mark_a_layer(): os.mkdir("/layer"); os.setxattr("/layer", "trusted.overlay.redirect", b"/../../..")
@attack
def type_into_a_terminal():
    master = os.open("/dev/ptmx", os.O_RDWR)
    fcntl.ioctl(master, 0x5412, b"x")
@attack
def change_the_machine_id(): put("/etc/machine-id", "x")
@attack
def halt(): call("reboot", 0xFEE1DEAD, 672274793, 0x4321FEDC, 0)

found = {}
for name, function in attacks.items():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            said = "done"
        except OSError as exc:
            said = errno.errorcode.get(exc.errno, "?")
        except BaseException as exc:
            said = repr(exc)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    found[name] = os.read(read, 999).decode()
    os.close(read)
    os.waitpid(pid, 0)
print(json.dumps(found))
"""
# What packages need to be installed.
ALLOWED = """
set -e
test "$(id -u):$(id -g):$HOME" = 0:0:/root
touch /etc/new /usr/bin/new /root/new /var/new /run/new /opt/new /new
echo changed >> /etc/passwd; rm /usr/bin/head; mv /etc/ssl /etc/tls; mkdir /usr/lib/new
chown 33:44 /etc/new; chmod 4755 /usr/bin/new; ln /etc/new /etc/newer; test "$(stat -c %u:%g /etc/newer)" = 33:44
python3 -c 'import os; os.setgroups([5]); os.setresgid(33, 33, 33); os.setresuid(33, 33, 33); open("/tmp/of33", "w")'
test "$(stat -c %u /tmp/of33)" = 33
ln -s /etc/alternatives/x /usr/bin/linked; mkdir -p /etc/alternatives; ln -s /usr/bin/true /etc/alternatives/x
mkfifo /etc/pipe; cp -a /etc/new /etc/copy; test "$(stat -c %u:%g /etc/copy)" = 33:44
sh -c 'kill $$' || true
"""


def test_root_can_change_the_system_of_its_vm(tmp_path: Path, state: Path) -> None:
    """Root inside writes to the whole system, owns files and changes users, but reaches neither agent nor kernel."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "a").write_text("1\n")
    with Sandbox(guest_root=True, workdir=work) as sandbox:
        done = sandbox.shell(ALLOWED)
        assert done.ok, done.stderr
        assert sandbox.exec(["linked"]).ok
        sandbox.files.write("/etc/written", b"1")
        assert sandbox.files.read("/etc/written") == b"1"
        assert sandbox.shell("cat a; echo 2 > b; chown 7 b; rm a").stdout == b"1\n"
        attack(sandbox)
    assert [(path.name, path.read_text()) for path in work.iterdir()] == [("b", "2\n")]
    assert left_behind(state) == []


def attack(sandbox: Sandbox) -> None:
    """Try all attacks of root inside, each of which must be refused; the sandbox must still work after that."""
    sandbox.files.write("/root/attacks.py", ATTACKS.encode())
    done = sandbox.exec(["python3", "/root/attacks.py"])
    assert done.ok, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 50
    assert {name: said for name, said in found.items() if said == "done" or not said.startswith("E")} == {}
    assert sandbox.exec(["echo", "on"]).stdout == b"on\n"
    filled = sandbox.shell("fallocate -l 100G /big || for n in 1 2 3; do fallocate -l 3G /big$n; done; df / | tail -1")
    assert b"100%" in filled.stdout, filled
    assert sandbox.exec(["rm", "-f", "/big1", "/big2", "/big3"]).ok
    assert sandbox.exec(["echo", "on"]).stdout == b"on\n"


def test_limits_hold_for_root() -> None:
    """Memory, tasks and time of root inside are limited as for other programs."""
    with Sandbox(guest_root=True, memory="128M", procs=20) as sandbox:
        assert sandbox.exec(["python3", "-c", "x = b'1' * (1 << 28)"]).outcome == "oom"
        fork = "import os, time\nfor number in range(100):\n    if os.fork() == 0: time.sleep(600)"
        assert b"BlockingIOError" in sandbox.exec(["python3", "-c", fork], timeout_s=60).stderr
        assert sandbox.exec(["sleep", "60"], timeout_s=0.5).outcome == "timeout"
        assert sandbox.exec(["true"]).ok


def test_a_run_can_be_root() -> None:
    """A run has the same root inside."""
    result = exec_command(["sh", "-c", "id -u; touch /usr/new && echo wrote"], guest_root=True)
    assert result.stdout.text == "0\nwrote\n"


@pytest.mark.parametrize("backend", ["os", "none"])
def test_other_backends_refuse_root(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends without a kernel of their own refuse root inside."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    with pytest.raises(SandboxError, match="no kernel of its own"):
        Sandbox(guest_root=True, backend=backend)
