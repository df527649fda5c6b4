# Runs a jail and kills all of it at the deadline, when the runner ends, or on SIGTERM.
#
#     perl supervisor.pl DEADLINE_S RUNNER_PID KEEP_FD NEST USERNS_FD USERNS PRCTL SIGPROCMASK SIGTIMEDWAIT CAPSET \
#         CLOSE_RANGE UNSHARE MOUNT DUP3 COMMAND...
#
# The last eight are system call numbers. KEEP_FD stays open (-1: none). USERNS_FD: a descriptor (-1: none) to replace by
# a user namespace with the map USERNS: uid_map and gid_map in user_namespaces(7), with commas for line breaks. Exits with
# COMMAND's status (128 + N for a signal), by SIGALRM at the deadline, or by SIGTERM. Signal 40 with a value, by
# sigqueue(3), sets the deadline to that many seconds from now; it is a real-time signal, so none is lost.
#
# Parent-death signals alone do not suffice: bubblewrap's inner process requests one late, and would miss its parent's
# death before that. This process is a subreaper (prctl(2)): orphans become its children, and it ends after its last
# child. If it is killed, the jail's first process dies with it, and with that one a pid namespace around the jail, with
# its own /proc (NEST; 0: not possible on this host).
# Perl, because every Debian has it; no modules, because each takes longer than the rest of the start.

my ($deadline, $runner, $keep, $nest, $userns_fd) = map { $_ + 0 } splice @ARGV, 0, 5;
my $map = shift @ARGV;
my ($prctl, $sigprocmask, $sigtimedwait, $capset, $close_range, $unshare, $mount, $dup3) = map { $_ + 0 } splice @ARGV, 0, 8;
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
    my ($name, $text, $process) = (@_, 'self');
    open my $file, '>', "/proc/$process/$name" or die "$name: $!\n";
    syswrite $file, $text or die "$name: $!\n";
}

# A user namespace exists as long as a descriptor or a process of it; here it starts with a process.
sub make_userns {
    pipe my $made_r, my $made_w or die "pipe: $!\n";
    pipe my $taken_r, my $taken_w or die "pipe: $!\n";
    my $first = fork // die "fork: $!\n";
    if (!$first) {
        close $taken_w;
        call('user namespace', $unshare, $NEWUSER);
        syswrite $made_w, '.';
        sysread $taken_r, my $word, 1; # until the supervisor has it, or is gone
        exit;
    }
    close $made_w;
    sysread $made_r, my $word, 1 or exit 1;
    put($_, $map =~ tr/,/\n/r, $first) for 'uid_map', 'gid_map';
    open my $space, '<', "/proc/$first/ns/user" or die "user namespace: $!\n";
    syscall($dup3, fileno $space, $userns_fd, 0) == $userns_fd or die "dup3: $!\n";
    close $taken_w;
    waitpid $first, 0;
}

# Blocked, then waited for, so that none is missed.
call('rt_sigprocmask', $sigprocmask, $BLOCK, $set, 0, 8);
call('subreaper', $prctl, $SUBREAPER, 1, 0, 0, 0);
call('parent-death signal', $prctl, $PDEATHSIG, $TERM, 0, 0, 0);
getppid == $runner or die "the runner is gone\n";
my $children = "/proc/$$/task/$$/children"; # proc(5)
-r $children or die "$children: $!\n";
alarm $deadline;

make_userns() if $userns_fd >= 0; # before unshare: the next child is the first of a new pid namespace
my ($uid, $gid) = ($>, $) + 0); # before unshare: a new user namespace maps no ids
if ($nest && $uid == 0) {
    call('unshare', $unshare, $NEWPID);
} elsif ($nest) {
    # Where only bubblewrap may make user namespaces, the jail does without.
    $nest = syscall($unshare, $NEWUSER | $NEWPID) == 0;
    if ($nest) {
        put('setgroups', 'deny');
        put('uid_map', "$uid $uid 1");
        put('gid_map', "$gid $gid 1");
    }
}
# The child continues only once its parent-death signal is set: an earlier answer in the pipe could outlive this process.
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
    sysread($alive_r, my $word, 1) or exit 1; # the supervisor is gone
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
# Kill every child and wait for one; the children that it leaves become ours.
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
