# Runs a jail and outlives it: at the deadline, when the runner ends, or when asked by SIGTERM, it kills all of the jail.
#
#     perl supervisor.pl DEADLINE_S RUNNER_PID KEEP_FD NEST PRCTL SIGPROCMASK SIGTIMEDWAIT CAPSET CLOSE_RANGE UNSHARE \
#         MOUNT COMMAND...
#
# The last seven are the numbers of these system calls here. KEEP_FD stays open (-1: none). It ends as COMMAND ended
# (128 + N for a signal), or by SIGALRM at the deadline, by SIGTERM when asked or without its runner. Signal 40, when
# sent with a value, by sigqueue(3), sets another deadline, that many seconds from then; it is a real-time signal, of
# which none is lost while another waits.
#
# Why a process, and not the kernel's parent-death signal alone: bubblewrap's inner process asks for that signal late,
# and one whose parent had died by then would never get it. Here nothing that was started can be lost: orphans become
# children of this process (a subreaper, prctl(2)), which ends only when it has no child left. And should this process
# itself be killed, the jail's first process dies with it, and all others with that one, since it is the first of a pid
# namespace around the jail, with its own /proc (NEST; 0: this host does not let us).
# Perl, because every Debian has it; no module, because each costs more than the rest of the start.

my ($deadline, $runner, $keep, $nest, @calls) = map { $_ + 0 } splice @ARGV, 0, 11;
my ($prctl, $sigprocmask, $sigtimedwait, $capset, $close_range, $unshare, $mount) = @calls;
my ($PDEATHSIG, $SUBREAPER, $NO_NEW_PRIVS, $BLOCK, $SETMASK) = (1, 36, 38, 0, 2);
my ($NEWNS, $NEWUSER, $NEWPID) = (0x20000, 0x10000000, 0x20000000);
my ($PRIVATE, $NOSUID_NODEV_NOEXEC) = (0x44000, 2 | 4 | 8); # MS_REC | MS_PRIVATE
my ($KILL, $DEADLINE, $ALRM, $TERM, $CHLD, $EINTR, $QUEUED) = (9, 40, 14, 15, 17, 4, -1);
my $set = pack 'Q', 1 << ($DEADLINE - 1) | 1 << ($ALRM - 1) | 1 << ($TERM - 1) | 1 << ($CHLD - 1);
my $info = "\0" x 128; # siginfo_t of 64-bit Linux: si_code at 8, si_value at 24
my $none = pack 'Q', 0;

sub call {
    my ($what, $number, @words) = @_;
    syscall($number, @words) == 0 or die "$what: $!\n";
}

sub put {
    my ($name, $text) = @_;
    open my $file, '>', "/proc/self/$name" or die "$name: $!\n";
    syswrite $file, $text or die "$name: $!\n";
}

# Blocked and then waited for, so that none can come between a look and a wait.
call('rt_sigprocmask', $sigprocmask, $BLOCK, $set, 0, 8);
call('subreaper', $prctl, $SUBREAPER, 1, 0, 0, 0);
call('parent-death signal', $prctl, $PDEATHSIG, $TERM, 0, 0, 0);
getppid == $runner or die "the runner is gone\n";
my $children = "/proc/$$/task/$$/children"; # proc(5)
-r $children or die "$children: $!\n";
alarm $deadline;

my ($uid, $gid) = ($>, $) + 0); # now: in a new user namespace nobody has a name until it is mapped
if ($nest && $uid == 0) {
    call('unshare', $unshare, $NEWPID);
} elsif ($nest) {
    # Refused where the host lets bubblewrap make user namespaces and not us: the jail then goes without.
    $nest = syscall($unshare, $NEWUSER | $NEWPID) == 0;
    if ($nest) {
        put('setgroups', 'deny');
        put('uid_map', "$uid $uid 1");
        put('gid_map', "$gid $gid 1");
    }
}
# The child is let go only after it has asked to die with this process: an answer that lay in the pipe before that could
# be read after this process was killed.
pipe my $asked_r, my $asked_w or die "pipe: $!\n";
pipe my $alive_r, my $alive_w or die "pipe: $!\n";
my $jail = fork // die "fork: $!\n";
if (!$jail) {
    call('parent-death signal', $prctl, $PDEATHSIG, $KILL, 0, 0, 0);
    syswrite $asked_w, '.' or exit 1;
    if ($nest) {
        call('unshare', $unshare, $NEWNS);
        call('mount', $mount, 'none', '/', 0, $PRIVATE, 0);
        call('/proc', $mount, 'proc', '/proc', 'proc', $NOSUID_NODEV_NOEXEC, 0);
    }
    close $alive_w;
    sysread($alive_r, my $word, 1) or exit 1; # the supervisor had gone by then
    call('rt_sigprocmask', $sigprocmask, $SETMASK, $none, 0, 8);
    exec {$ARGV[0]} @ARGV;
    die "$ARGV[0]: $!\n";
}
close $asked_w;
syswrite $alive_w, '.' or die "pipe: $!\n" if sysread $asked_r, my $asked, 1;
call('no new privileges', $prctl, $NO_NEW_PRIVS, 1, 0, 0, 0);
# Version 3 of capset's header (capabilities(7)), this process; all sets empty.
call('capset', $capset, pack('LL', 0x20080522, 0), pack('L6', (0) x 6));
call('close_range', $close_range, 0, $keep - 1, 0) if $keep > 0;
call('close_range', $close_range, $keep + 1, 0xFFFFFFFF, 0);

my $status;
my $signal = $CHLD;
while (($signal == $CHLD || $signal == $DEADLINE) && !defined $status) {
    do { $signal = syscall($sigtimedwait, $set, $info, 0, 8) } while $signal < 0 && $! == $EINTR;
    alarm(unpack 'l', substr $info, 24, 4) if $signal == $DEADLINE && unpack('l', substr $info, 8, 4) == $QUEUED;
    while ((my $ended = waitpid -1, 1) > 0) { $status = $? if $ended == $jail }
}
# Each turn kills every child and waits for one. When one has ended, those that it left are children of this process.
while (1) {
    my $list;
    kill $KILL, split ' ', <$list> // '' if open $list, '<', $children;
    my $ended = waitpid -1, 0;
    last if $ended < 0;
    $status = $? if $ended == $jail;
}
if ($signal == $ALRM || $signal == $TERM) {
    kill $signal, $$;
    call('rt_sigprocmask', $sigprocmask, $SETMASK, $none, 0, 8);
}
exit($status & 127 ? 128 + ($status & 127) : $status >> 8);
