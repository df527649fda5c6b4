# The first process of a jail in which criu(8) dumps a process, or restores one.
#
#     perl criu.pl dump RELEASE_FD USERNS_FD CALLS PID CONTROL_FD IMAGES_FD SCRATCH_FD FDS FILES CRIU... -- COMMAND...
#     perl criu.pl restore RELEASE_FD USERNS_FD CALLS PID MOUNTS CRIU...
#
# RELEASE_FD is a pipe; if it ends empty, as when the runner dies, nothing starts. USERNS_FD (-1: none) is closed at once.
#
# dump     Starts COMMAND as process PID, with at most FILES open files. Its sockets replace the descriptors FDS
#          (separated by commas) and its standard error. They are made here, since criu can dump only sockets of its own
#          network namespace; the other ends are sent over the socket CONTROL_FD. A message there starts CRIU. The answer
#          names, a line each, the sockets and SCRATCH_FD as criu does.
# restore  RELEASE_FD contains the length of a mark (four bytes), the mark, and a seccomp filter. CRIU leaves the process
#          stopped. This process then replaces the mark of the dumped process by the new one, makes the process load the
#          filter for all its threads, unmounts MOUNTS (paths, separated by commas), drops all capabilities, and lets the
#          process continue. It exits with that process's status (128 + N for a signal).
#
# CALLS: system calls as NAME=NUMBER, separated by commas. x86_64 only. Perl without modules, as for the supervisor.

my ($mode, $release_fd, $userns_fd, $calls, $pid) = splice @ARGV, 0, 5;
my %number = map { /(\w+)=(\d+)/ ? ($1, $2 + 0) : () } split /,/, $calls;
$pid += 0; # syscall takes a string as an address
my ($AF_UNIX, $SOCK_STREAM, $SCM_RIGHTS, $SOL_SOCKET, $NOFILE) = (1, 1, 1, 1, 7);
my ($GETREGS, $SETREGS, $STEP, $DETACH, $SEIZE, $INTERRUPT) = (12, 13, 9, 17, 0x4206, 0x4207); # ptrace(2)
my ($RAX, $RDX, $RSI, $RDI, $ORIG_RAX, $RIP, $RSP) = (10, 12, 13, 14, 15, 16, 19); # in struct user_regs_struct
my $KILLED = 75; # EX_TEMPFAIL in sysexits.h
my ($ALL, $LAZILY, $SET_FILTER, $ALL_THREADS, $RED_ZONE) = (0x40000000, 2, 1, 1, 128);

sub call {
    my ($name, @words) = @_;
    my $result = syscall($number{$name}, @words);
    $result >= 0 or die "$name: $!\n";
    return $result;
}

sub status { return $_[0] & 127 ? 128 + ($_[0] & 127) : $_[0] >> 8 }

sub text {
    my ($path) = @_;
    open my $file, '<', $path or die "$path: $!\n";
    local $/;
    return <$file>;
}

sub released {
    open my $pipe, '<&=', $release_fd or die "the release: $!\n";
    my $message = do { local $/; <$pipe> } // '';
    close $pipe;
    length $message or exit 1; # the runner is gone
    return $message;
}

# criu tests the kernel first, unless this folder contains the results of its last tests.
sub run_criu {
    my ($folder, @words) = @_;
    my $child = fork // die "fork: $!\n";
    if (!$child) {
        $ENV{XDG_RUNTIME_DIR} = $folder;
        exec {$words[0]} @words;
        die "$words[0]: $!\n";
    }
    waitpid $child, 0;
    return status($?);
}

sub failed {
    my ($status) = @_;
    if ($status > 128) { # for example if there was no memory
        print STDERR 'criu was killed by signal ', $status - 128, "\n";
        exit $KILLED;
    }
    my @errors = grep { /Error/ && !/RLIMIT_NOFILE/ } -e '/criu/logs/log' ? split /\n/, text('/criu/logs/log') : ();
    die 'criu: ', join('; ', @errors > 3 ? @errors[-3 .. -1] : @errors), "\n";
}

sub dump_process {
    my ($control_fd, $images_fd, $scratch_fd, $fds, $files) = splice @ARGV, 0, 5;
    call('close', $userns_fd + 0) if $userns_fd >= 0;
    my @criu;
    while ((my $word = shift @ARGV) ne '--') { push @criu, $word }
    open my $control, '+<&=', $control_fd or die "the control socket: $!\n";
    my (@near, @far);
    my @places = (split(/,/, $fds), 2);
    for (@places) {
        socketpair my $ours, my $theirs, $AF_UNIX, $SOCK_STREAM, 0 or die "socketpair: $!\n";
        push @near, $ours;
        push @far, $theirs;
    }
    # struct msghdr with one byte of data and one struct cmsghdr
    my $rights = pack 'Qll l* x![Q]', 16 + 4 * @near, $SOL_SOCKET, $SCM_RIGHTS, map { fileno $_ } @near;
    my $data = '.';
    my $vector = pack 'PQ', $data, 1;
    call('sendmsg', fileno $control, pack('QQ PQ PQ Q', 0, 0, $vector, 1, $rights, length $rights, 0), 0);
    close $_ for @near;
    released();
    # COMMAND has no filter, so it must not be able to make a user namespace, in which it would have capabilities.
    open my $most, '>', '/proc/sys/user/max_user_namespaces' or die "max_user_namespaces: $!\n";
    syswrite $most, '0' or die "max_user_namespaces: $!\n";
    close $most;
    # criu needs free numbers below that of the process.
    for (my $last = 1; $last + 1 < $pid;) {
        $last = fork // die "fork: $!\n";
        exit 0 if !$last;
        waitpid $last, 0;
    }
    my $process = fork // die "fork: $!\n";
    if (!$process) {
        call('setsid');
        open STDIN, '+<', '/criu/null' or die "/criu/null: $!\n";
        open STDOUT, '+<', '/criu/null' or die "/criu/null: $!\n";
        call('dup3', fileno $far[$_], $places[$_] + 0, 0) for 0 .. $#places;
        my $next = 3;
        for my $fd (sort { $a <=> $b } $scratch_fd, @places[0 .. $#places - 1]) {
            call('close_range', $next, $fd - 1, 0) if $next < $fd;
            $next = $fd + 1;
        }
        call('close_range', $next, 0xFFFFFFFF, 0);
        call('prlimit64', 0, $NOFILE, pack('QQ', $files, $files), 0);
        exec {$ARGV[0]} @ARGV;
        die "$ARGV[0]: $!\n";
    }
    my @names = map { readlink("/proc/self/fd/" . fileno $_) =~ /(\d+)/ } @far;
    my ($mount) = text("/proc/self/fdinfo/$scratch_fd") =~ /^mnt_id:\s*(\d+)/m;
    my ($inode) = text("/proc/self/fdinfo/$scratch_fd") =~ /^ino:\s*(\d+)/m;
    my $scratch = sprintf 'file[%x:%x]', $mount, $inode;
    sysread $control, my $order, 1 or exit 1;
    my $status = run_criu('/criu/logs', @criu, '-t', $process, map { ('--external', $_) } $scratch, map { "unix[$_]" } @names);
    failed($status) if $status;
    open my $results, '>', "/proc/self/fd/$images_fd/criu.kdat" or die "criu.kdat: $!\n";
    syswrite $results, text('/criu/logs/criu.kdat') if -e '/criu/logs/criu.kdat';
    close $results;
    syswrite $control, join "\n", $scratch, map { "socket:[$_]" } @names;
}

# Make a stopped process load a filter for all its threads. It has run nothing since its restore, so it can be trusted.
sub load_filter {
    my ($memory, $filter) = @_;
    my @registers = unpack 'Q27', registers();
    my @old = @registers;
    my $place = $registers[$RSP] - $RED_ZONE - length($filter) - 64;
    $place -= $place % 16;
    poke($memory, $place, pack('S x6 Q', length($filter) / 8, $place + 16) . $filter); # struct sock_fprog
    # The process was dumped in a system call, so the instruction is at hand.
    my $entry = $registers[$RIP];
    $entry -= 2 if peek($memory, $entry - 2, 2) eq "\x0f\x05";
    peek($memory, $entry, 2) eq "\x0f\x05" or die "the process is at no system call\n";
    @registers[$RAX, $RDI, $RSI, $RDX] = ($number{seccomp}, $SET_FILTER, $ALL_THREADS, $place);
    @registers[$ORIG_RAX, $RIP] = (~0, $entry);
    call('ptrace', $SETREGS, $pid, 0, pack 'Q27', @registers);
    for (1 .. 9) { # other stops may come first
        call('ptrace', $STEP, $pid, 0, 0);
        waitpid $pid, $ALL;
        @registers = unpack 'Q27', registers();
        last if $registers[$RIP] == $entry + 2;
    }
    $registers[$RIP] == $entry + 2 && $registers[$RAX] == 0 or die "the filter was not loaded\n";
    call('ptrace', $SETREGS, $pid, 0, pack 'Q27', @old);
}

sub registers {
    my $buffer = "\0" x (27 * 8);
    syscall($number{ptrace}, $GETREGS, $pid, 0, $buffer) == 0 or die "ptrace: $!\n"; # `call` would fill a copy
    return $buffer;
}

sub peek {
    my ($memory, $place, $length) = @_;
    sysseek $memory, $place, 0 and (sysread $memory, my $bytes, $length) == $length or die "memory: $!\n";
    return $bytes;
}

sub poke {
    my ($memory, $place, $bytes) = @_;
    sysseek $memory, $place, 0 and (syswrite $memory, $bytes) == length $bytes or die "memory: $!\n";
}

# Arguments and environment of the dumped process contain its mark.
sub replace_mark {
    my ($memory, $mark) = @_;
    my ($begin, $end) = (split ' ', (text("/proc/$pid/stat") =~ /.*\) (.*)/)[0])[45, 48]; # arg_start, env_end in proc(5)
    my $words = peek($memory, $begin, $end - $begin);
    my ($old) = $words =~ /\0X07_INSTANCE=(\w+)/ or die "the process has no mark\n";
    length $old == length $mark or die "its mark has another length\n";
    $words =~ s/$old/$mark/g;
    poke($memory, $begin, $words);
}

sub restore_process {
    call('close', $userns_fd + 0) if $userns_fd >= 0;
    my @mounts = split /,/, shift @ARGV;
    my ($mark, $filter) = unpack 'L/a a*', released();
    my $status = run_criu('/criu/images', @ARGV);
    failed($status) if $status;
    call('close', $_) for grep { $_ > 2 } map { /^fd\[(\d+)\]:/ ? $1 + 0 : () } @ARGV;
    opendir my $folder, '/proc' or die "/proc: $!\n";
    my @all = sort { $a <=> $b } grep { /^\d+$/ } readdir $folder;
    closedir $folder;
    "@all" eq "$$ $pid" or die "the processes are @all\n"; # the filter is for one process
    open my $memory, '+<', "/proc/$pid/mem" or die "memory: $!\n";
    call('ptrace', $SEIZE, $pid, 0, 0);
    call('ptrace', $INTERRUPT, $pid, 0, 0);
    waitpid $pid, $ALL;
    replace_mark($memory, $mark);
    load_filter($memory, $filter);
    close $memory;
    opendir my $threads, "/proc/$pid/task" or die "/proc: $!\n";
    for (grep { /^\d+$/ } readdir $threads) {
        my $state = text("/proc/$pid/task/$_/status");
        $state =~ /^Seccomp:\s*2$/m && $state =~ /^NoNewPrivs:\s*1$/m or die "thread $_ has no filter\n";
    }
    closedir $threads;
    call('umount2', $_, $LAZILY) for @mounts;
    kill 'CONT', $pid or die "SIGCONT: $!\n"; # its main thread stays stopped until it is no longer traced
    # Version 3 of capset's header (capabilities(7)), this process; all sets empty.
    call('capset', pack('LL', 0x20080522, 0), pack('L6', (0) x 6));
    call('ptrace', $DETACH, $pid, 0, 0);
    while ((my $ended = wait) > 0) { exit status($?) if $ended == $pid }
}

$mode eq 'dump' ? dump_process() : restore_process();
