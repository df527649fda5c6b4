# Confines this process without namespaces, waits for its release, and becomes COMMAND. See jail/landlock.py.
#
#     perl landlock.pl FILTER_FD RULESET_FD FDS CLOSE_RANGE MMAP READ EXECVE PRCTL SECCOMP PRLIMIT64 \
#         N (LIMIT SOFT HARD)... N VARIABLE... COMMAND...
#
# FDS: descriptors that COMMAND gets besides 0 to 2, separated by commas. RULESET_FD: a Landlock ruleset. Then system call
# numbers. LIMIT: RLIMIT_*. VARIABLE: NAME=value of the environment.
#
# FILTER_FD is a pipe with three addresses and a length, eight bytes each, then a seccomp filter of that length; if it ends
# empty, as when the runner dies, nothing starts. Path, arguments and environment of COMMAND are placed at the addresses,
# with which alone the filter allows execve. COMMAND does not know them, so it can execute nothing, not even itself.
# Perl without modules, as for the supervisor.

my ($filter_fd, $ruleset_fd, $keep) = splice @ARGV, 0, 3;
my ($close_range, $mmap, $read, $execve, $prctl, $seccomp, $prlimit) = map { $_ + 0 } splice @ARGV, 0, 7;
my $restrict_self = 446; # the same on every architecture
my ($NO_NEW_PRIVS, $FILTER) = (38, 1);
my ($READ_WRITE, $AT_THIS_PLACE) = (3, 0x100022); # MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_PRIVATE
my $PAGE = 65536; # a multiple of every page size

sub call {
    my ($what, $number, @words) = @_;
    my $result = syscall($number, @words);
    $result >= 0 or die "$what: $!\n";
    return $result;
}

# Place bytes at an address, by read(2).
sub put {
    my ($at, $bytes) = @_;
    my $first = $at - $at % $PAGE;
    my $length = length($bytes) + $at % $PAGE;
    call('mmap', $mmap, $first, $length, $READ_WRITE, $AT_THIS_PLACE, -1, 0) == $first or die "mmap: another place\n";
    pipe my $from, my $into or die "pipe: $!\n";
    syswrite($into, $bytes) == length $bytes or die "pipe: too long\n";
    call('read', $read, fileno $from, $at, length $bytes) == length $bytes or die "read: too short\n";
}

sub words { return splice @ARGV, 0, shift @ARGV }

my @limits = words();
my @variables = words();

my $next = 3;
for my $fd (sort { $a <=> $b } $filter_fd, $ruleset_fd, split /,/, $keep) {
    call('close_range', $close_range, $next, $fd - 1, 0) if $next < $fd;
    $next = $fd + 1;
}
call('close_range', $close_range, $next, 0xFFFFFFFF, 0);

call('no new privileges', $prctl, $NO_NEW_PRIVS, 1, 0, 0, 0);
call('Landlock', $restrict_self, $ruleset_fd + 0, 0);
call('close_range', $close_range, $ruleset_fd + 0, $ruleset_fd + 0, 0);

while (my ($which, $soft, $hard) = splice @limits, 0, 3) {
    call("limit $which", $prlimit, 0, $which + 0, pack('QQ', $soft, $hard), 0);
}

open my $pipe, '<&=', $filter_fd or die "the filter: $!\n";
my $message = do { local $/; <$pipe> } // '';
close $pipe;
my ($path, $arguments, $environment, $length, $filter) = unpack 'Q4 a*', $message;
defined $length && $length == length $filter or exit 1; # the runner is gone
put($path, pack 'Z*', $ARGV[0]);
put($arguments, pack 'p*', @ARGV, undef);
put($environment, pack 'p*', @variables, undef);
my $program = pack 'S x6 P', length($filter) / 8, $filter; # struct sock_fprog
call('seccomp', $seccomp, $FILTER, 0, $program);
syscall $execve, $path, $arguments, $environment;
die "$ARGV[0]: $!\n";
