# Confines this process without namespaces, waits to be let go, and becomes COMMAND (jail/landlock.py says who holds what).
#
#     perl landlock.pl GATE_FD FDS RULESET CLOSE_RANGE MMAP READ EXECVE PRCTL SECCOMP PRLIMIT64 \
#         N (LIMIT SOFT HARD)... N (FILE RIGHTS)... N VARIABLE... COMMAND...
#
# FDS: descriptors that stay open besides 0 to 2, with commas between. RULESET: struct landlock_ruleset_attr in
# hexadecimal digits. Then the numbers of these system calls here. RIGHTS: what Landlock allows on FILE, a path or the
# number of an open descriptor. LIMIT: one of RLIMIT_*. VARIABLE: NAME=value of the environment.
#
# GATE_FD is a pipe. What comes from it until its end are three addresses and the length of what follows, eight bytes
# each, and a filter of system calls; where nothing comes, as when the runner dies, nothing starts. Path, arguments and environment of COMMAND are put
# at these addresses, and the filter allows execve with them only. COMMAND finds nothing there any more and does not know
# them, so it can execute nothing, also not itself.
# Perl without a module, as for the supervisor: it starts in a millisecond, and what follows is system calls.

my ($gate, $keep, $ruleset) = splice @ARGV, 0, 3;
my ($close_range, $mmap, $read, $execve, $prctl, $seccomp, $prlimit) = map { $_ + 0 } splice @ARGV, 0, 7;
my ($create_ruleset, $add_rule, $restrict_self) = (444, 445, 446); # the same everywhere, as seccomp's and these are not
my ($NO_NEW_PRIVS, $PATH_BENEATH, $FILTER) = (38, 1, 1);
my ($READ_WRITE, $AT_THIS_PLACE) = (3, 0x100022); # MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_PRIVATE
my $PAGE = 65536; # a multiple of every size of a page

sub call {
    my ($what, $number, @words) = @_;
    my $result = syscall($number, @words);
    $result >= 0 or die "$what: $!\n";
    return $result;
}

# The bytes at an address of their own; read(2) puts them there.
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
my %rules = words();
my @variables = words();

my $next = 3;
for my $fd (sort { $a <=> $b } $gate, split /,/, $keep) {
    call('close_range', $close_range, $next, $fd - 1, 0) if $next < $fd;
    $next = $fd + 1;
}
call('close_range', $close_range, $next, 0xFFFFFFFF, 0);

call('no new privileges', $prctl, $NO_NEW_PRIVS, 1, 0, 0, 0);
my $attributes = pack 'H*', $ruleset;
my $domain = call('Landlock', $create_ruleset, $attributes, length $attributes, 0);
while (my ($file, $rights) = each %rules) {
    my $opened;
    if ($file =~ m{^/}) {
        open $opened, '<', $file or die "$file: $!\n";
    }
    my $rule = pack 'Ql', $rights, $opened ? fileno $opened : $file;
    call("Landlock, $file", $add_rule, $domain, $PATH_BENEATH, $rule, 0);
}
call('Landlock', $restrict_self, $domain, 0);
call('close_range', $close_range, $domain, $domain, 0);

while (my ($which, $soft, $hard) = splice @limits, 0, 3) {
    call("limit $which", $prlimit, 0, $which + 0, pack('QQ', $soft, $hard), 0);
}

open my $pipe, '<&=', $gate or die "the gate: $!\n";
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
