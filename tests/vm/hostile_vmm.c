/*
 * What stands in QEMU's place in the tests of the jail: it gets QEMU's command line and tries what a taken-over VMM would.
 *
 * Its behaviour is its file name. `hostile-look` reads what the test knows about the host from the channel (lines
 * "kind value", then "go"), tries everything, and answers one JSON object a line: probe, arg, err (errno, 0: it
 * worked), value. The others flood, stay silent, hang up, refuse to die, and so on: see main().
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/aio_abi.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/keyctl.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/msg.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define GIB (1ULL << 30)

static int channel = -1, qmp = -1, console = -1, scratch = -1;
/* Where QEMU would find the image's parts. */
static char kernel_path[64], initrd_path[64], root_path[64];

static void write_all(int fd, const char *text, size_t size)
{
	while (size > 0) {
		ssize_t count = write(fd, text, size);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0 && errno == EAGAIN) { /* a restored program's sockets do not block */
			poll(&(struct pollfd){ fd, POLLOUT, 0 }, 1, -1);
			continue;
		}
		if (count < 0)
			_exit(9);
		text += count;
		size -= count;
	}
}

/* One finding. arg holds plain names only: none of ours has a quote or a backslash. */
static void say(const char *probe, const char *arg, int err, long long value)
{
	char line[1024];
	int size = snprintf(line, sizeof line, "{\"probe\": \"%s\", \"arg\": \"%.700s\", \"err\": %d, \"value\": %lld}\n",
			    probe, arg, err, value);
	write_all(channel, line, size);
}

/* result: what a system call gave; a descriptor that it opened is closed by the caller. */
static void tried(const char *probe, const char *arg, long result)
{
	say(probe, arg, result < 0 ? errno : 0, result);
}

static void tried_fd(const char *probe, const char *arg, int fd)
{
	tried(probe, arg, fd);
	if (fd >= 0)
		close(fd);
}

static int number_after(const char *text, const char *key)
{
	const char *found = strstr(text, key);
	return found ? atoi(found + strlen(key)) : -1;
}

static void copy_path(char *to, const char *from)
{
	snprintf(to, 64, "%.*s", (int)strcspn(from, ","), from);
}

/* Which descriptors and files QEMU would have been given. */
static void read_arguments(char **argv)
{
	for (; *argv; argv++) {
		const char *file = strstr(*argv, "file.filename=");
		if (file && strstr(*argv, "node-name=root,"))
			copy_path(root_path, file + strlen("file.filename="));
		if (!strcmp(*argv, "-kernel") && argv[1])
			copy_path(kernel_path, argv[1]);
		if (!strcmp(*argv, "-initrd") && argv[1])
			copy_path(initrd_path, argv[1]);
		if (strstr(*argv, "socket,id=channel,"))
			channel = number_after(*argv, "fd=");
		if (strstr(*argv, "socket,id=qmp,"))
			qmp = number_after(*argv, "fd=");
		if (strstr(*argv, "socket,id=console,"))
			console = number_after(*argv, "fd=");
		if (strstr(*argv, "set=2,fd="))
			scratch = number_after(*argv, "set=2,fd=");
	}
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);
}

/* --- files --- */

static void change_file(const char *path)
{
	struct timespec times[2] = { { 1, 0 }, { 1, 0 } };

	tried_fd("write-file", path, open(path, O_WRONLY));
	tried_fd("write-file", path, open(path, O_RDONLY | O_TRUNC));
	tried("write-file", path, truncate(path, 0));
	tried("chmod-path", path, chmod(path, 0666));
	tried("chmod-path", path, chown(path, getuid(), getgid()));
	tried("chmod-path", path, utimensat(AT_FDCWD, path, times, 0));
	tried("chmod-path", path, setxattr(path, "user.x07", "x", 1, 0));
	tried("unlink", path, unlink(path));
	int fd = open(path, O_RDONLY);
	if (fd >= 0) {
		int flags = 0;
		tried("chmod-fd", path, fchmod(fd, 0666));
		tried("chmod-fd", path, fsetxattr(fd, "user.x07", "x", 1, 0));
		if (ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0)
			tried("chmod-fd", path, ioctl(fd, FS_IOC_SETFLAGS, &flags));
		tried("times-fd", path, futimens(fd, times));
		close(fd);
	}
}

static void change_folder(const char *folder)
{
	char path[700];

	snprintf(path, sizeof path, "%s/x07-was-here", folder);
	tried_fd("create", folder, open(path, O_WRONLY | O_CREAT, 0600));
	tried("make-folder", folder, mkdir(path, 0700));
	tried("make-device", folder, mknod(path, S_IFCHR | 0666, makedev(1, 1)));
	tried("make-fifo", folder, mkfifo(path, 0600));
	tried("make-link", folder, symlink("/", path));
	tried_fd("temporary", folder, open(folder, O_TMPFILE | O_RDWR, 0600));
	tried("chmod-folder", folder, chmod(folder, 0777));
}

static void walk(const char *folder, int depth)
{
	DIR *open_folder = opendir(folder);
	struct dirent *entry;
	char path[700];

	if (!open_folder) {
		tried("list", folder, -1);
		return;
	}
	while ((entry = readdir(open_folder))) {
		struct stat info;
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		snprintf(path, sizeof path, "%s/%s", strcmp(folder, "/") ? folder : "", entry->d_name);
		if (lstat(path, &info) < 0)
			continue;
		say(S_ISDIR(info.st_mode) ? "folder" : "file", path, 0, info.st_mode);
		if (S_ISDIR(info.st_mode) && depth < 12) {
			walk(path, depth + 1);
			continue;
		}
		if (S_ISREG(info.st_mode))
			change_file(path);
	}
	closedir(open_folder);
	change_folder(folder);
}

static void descriptors(void)
{
	for (int fd = 0; fd < 4096; fd++) {
		struct stat info;
		char what[64];
		int flags = fcntl(fd, F_GETFL);
		if (flags < 0)
			continue;
		fstat(fd, &info);
		snprintf(what, sizeof what, "%d %s%s", fd,
			 S_ISSOCK(info.st_mode) ? "socket" :
			 S_ISREG(info.st_mode)  ? "regular" :
			 S_ISCHR(info.st_mode)  ? "device" :
			 S_ISDIR(info.st_mode)  ? "folder" :
			 S_ISFIFO(info.st_mode) ? "pipe" : "other",
			 (flags & O_PATH)                      ? " path" :
			 (flags & O_ACCMODE) == O_RDONLY ? " read" : " write");
		say("descriptor", what, 0, info.st_ino);
		struct timespec times[2] = { { 1, 0 }, { 1, 0 } };
		if (S_ISREG(info.st_mode) && fd != scratch) {
			tried("chmod-given", what, fchmod(fd, 0666));
			tried("times-given", what, futimens(fd, times));
			tried("write-given", what, pwrite(fd, "x", 1, 0));
			tried("cut-given", what, ftruncate(fd, 0));
		}
		if (S_ISDIR(info.st_mode))
			tried_fd("climb", what, openat(fd, "../../../../../etc/passwd", O_RDONLY));
	}
}

/* --- processes --- */

static int child_of_clone(void *unused)
{
	(void)unused;
	_exit(0);
}

static void reap(void)
{
	while (waitpid(-1, NULL, __WALL) > 0)
		;
}

static void processes(void)
{
	static char stack[65536] __attribute__((aligned(16)));
	char *top = stack + sizeof stack;
	unsigned long long clone_args[11] = { 0 };
	char buffer[16];
	struct iovec mine = { buffer, sizeof buffer }, theirs = { (void *)write_all, sizeof buffer };

	say("own-pid", "", 0, getpid());
	say("parent", "", 0, getppid());
	for (int pid = 2; pid < 70000; pid++)
		if (pid != getpid() && (kill(pid, 0) == 0 || errno == EPERM))
			say("sees-process", "", 0, pid);
	tried("kill-all", "", kill(-1, SIGTERM));
	tried("kill-init", "", kill(1, SIGKILL));
	tried("outlive", "no parent-death signal", prctl(PR_SET_PDEATHSIG, 0));
	tried("ptrace-init", "", ptrace(PTRACE_ATTACH, 1, 0, 0));
	tried("ptrace-me", "", ptrace(PTRACE_TRACEME, 0, 0, 0));
	tried("read-init", "", process_vm_readv(1, &mine, 1, &theirs, 1, 0));
	int init = syscall(SYS_pidfd_open, 1, 0);
	for (int fd = 0; fd < 16; fd++)
		tried_fd("descriptor-of-init", "", syscall(SYS_pidfd_getfd, init, fd, 0));
	close(init);
	struct utsname names = { 0 };
	uname(&names);
	say("nodename", names.nodename, 0, 0);
	for (int which = 0; which < RLIM_NLIMITS; which++) {
		struct rlimit more = { RLIM_INFINITY, RLIM_INFINITY };
		struct rlimit limit;
		getrlimit(which, &limit);
		snprintf(buffer, sizeof buffer, "%d", which);
		say("limit", buffer, 0, limit.rlim_max);
		if (limit.rlim_max != RLIM_INFINITY)
			tried("raise-limit", buffer, setrlimit(which, &more));
	}
	long pid = fork();
	if (pid == 0)
		_exit(0);
	tried("fork", "", pid);
#ifdef SYS_fork
	pid = syscall(SYS_fork);
	if (pid == 0)
		_exit(0);
	tried("fork", "raw", pid);
#endif
	pid = vfork();
	if (pid == 0)
		_exit(0);
	tried("fork", "vfork", pid);
	tried("fork", "shared memory", clone(child_of_clone, top, CLONE_VM | SIGCHLD, NULL));
	clone_args[4] = SIGCHLD;
	pid = syscall(SYS_clone3, clone_args, sizeof clone_args);
	if (pid == 0)
		_exit(0);
	tried("fork", "clone3", pid);
	char *shell[] = { "/bin/sh", "-c", "exit", NULL };
	tried("execute", "/bin/sh", execv(shell[0], shell));
	reap();
}

/* --- rights --- */

static void capabilities(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { { 0 } };
	unsigned long long bounding = 0, ambient = 0;

	syscall(SYS_capget, &header, data);
	for (int cap = 0; cap < 64; cap++) {
		if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1)
			bounding |= 1ULL << cap;
		if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
			ambient |= 1ULL << cap;
	}
	say("caps", "effective", 0, data[0].effective | (long long)data[1].effective << 32);
	say("caps", "permitted", 0, data[0].permitted | (long long)data[1].permitted << 32);
	say("caps", "inheritable", 0, data[0].inheritable | (long long)data[1].inheritable << 32);
	say("caps", "bounding", 0, bounding);
	say("caps", "ambient", 0, ambient);
}

static int cloned(void *flags)
{
	/* In a namespace of its own: what it could do there. */
	(void)flags;
	capabilities();
	tried("mount", "in a new user namespace", mount("x", "/usr", "tmpfs", 0, NULL));
	_exit(0);
}

static void rights(void)
{
	static char stack[262144] __attribute__((aligned(16)));
	static const struct { int flag; const char *name; } namespaces[] = {
		{ CLONE_NEWUSER, "user" }, { CLONE_NEWNS, "mount" }, { CLONE_NEWPID, "pid" }, { CLONE_NEWNET, "net" },
		{ CLONE_NEWIPC, "ipc" }, { CLONE_NEWUTS, "uts" }, { CLONE_NEWCGROUP, "cgroup" },
		{ CLONE_NEWUSER | CLONE_NEWNS, "user and mount" },
	};
	unsigned long long clone_args[11] = { CLONE_NEWUSER, 0, 0, 0, SIGCHLD };

	say("uid", "", 0, getuid());
	say("gid", "", 0, getgid());
	say("groups", "", 0, getgroups(0, NULL));
	say("no-new-privs", "", 0, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	say("seccomp", "", 0, prctl(PR_GET_SECCOMP, 0, 0, 0, 0));
	capabilities();
	tried("become-root", "setuid", setuid(0));
	tried("become-root", "setresuid", setresuid(0, 0, 0));
	tried("become-root", "setgid", setgid(0));
	tried("become-root", "setgroups", setgroups(0, NULL));
	tried("mount", "tmpfs", mount("x", "/usr", "tmpfs", 0, NULL));
	tried("mount", "writable again", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
	tried("mount", "umount", umount2("/usr", MNT_DETACH));
	tried("mount", "chroot", chroot("/usr"));
	tried("mount", "pivot_root", syscall(SYS_pivot_root, "/", "/"));
	tried("mount", "fsopen", syscall(SYS_fsopen, "tmpfs", 0));
	tried("mount", "open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
	tried("hostname", "", sethostname("x", 1));
	for (size_t i = 0; i < sizeof namespaces / sizeof *namespaces; i++)
		tried("clone", namespaces[i].name,
		      clone(cloned, stack + sizeof stack, namespaces[i].flag | SIGCHLD, NULL));
	long pid = syscall(SYS_clone3, clone_args, sizeof clone_args);
	if (pid == 0)
		cloned(NULL);
	tried("clone", "clone3", pid);
	reap();
	for (size_t i = 0; i < sizeof namespaces / sizeof *namespaces; i++)
		tried("unshare", namespaces[i].name, unshare(namespaces[i].flag));
	capabilities();
}

/* --- kernel --- */

static void *sleeper(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void kernel(void)
{
	long attributes[32] = { 0 };
	char buffer[64];
	union bpf_attr_like { char bytes[128]; } bpf = { { 0 } };

	tried("keyring", "add", syscall(SYS_add_key, "user", "x07", "x", 1, KEY_SPEC_SESSION_KEYRING));
	tried("keyring", "read session", syscall(SYS_keyctl, KEYCTL_READ, KEY_SPEC_SESSION_KEYRING, buffer, sizeof buffer));
	tried("keyring", "search", syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", "x07-secret", 0));
	tried("keyring", "request", syscall(SYS_request_key, "user", "x07-secret", NULL, KEY_SPEC_PROCESS_KEYRING));
	tried_fd("kernel", "bpf", syscall(SYS_bpf, 0, &bpf, sizeof bpf));
	tried_fd("kernel", "perf", syscall(SYS_perf_event_open, attributes, 0, -1, -1, 0));
	tried_fd("kernel", "userfaultfd", syscall(SYS_userfaultfd, 1));
	tried_fd("kernel", "io_uring", syscall(SYS_io_uring_setup, 8, attributes));
#ifdef __x86_64__
	say("kernel", "x32", syscall(0x40000000 + SYS_getpid) < 0 ? errno : 0, 0);
#endif
}

/* --- what all jobs of a host share --- */

static void shared(void)
{
	static const struct { int command; const char *name; } locks[] = {
		{ F_SETLK, "F_SETLK" }, { F_SETLKW, "F_SETLKW" }, { F_OFD_SETLK, "F_OFD_SETLK" },
		{ F_OFD_SETLKW, "F_OFD_SETLKW" },
	};
	struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET };
	uint64_t hint = 2; /* RWH_WRITE_LIFE_SHORT */
	aio_context_t pool = 0;
	int fd = open(root_path, O_RDONLY);

	say("shared", "open", fd < 0 ? errno : 0, 0);
	tried("aio", "io_setup", syscall(SYS_io_setup, 1, &pool));
	tried("lock", "flock", flock(fd, LOCK_EX | LOCK_NB));
	for (size_t i = 0; i < sizeof locks / sizeof *locks; i++)
		tried("lock", locks[i].name, fcntl(fd, locks[i].command, &lock));
	tried("lock", "F_GETLK", fcntl(fd, F_GETLK, &lock));
	tried("lock", "F_SETLEASE", fcntl(fd, F_SETLEASE, F_RDLCK));
	/* The kernel looks at 32 bits of the command, so others above them must not lead past the filter. */
	tried("lock", "F_SETLEASE above 32 bits", syscall(SYS_fcntl, fd, 1ULL << 32 | F_SETLEASE, F_RDLCK));
	tried("lock", "F_NOTIFY", fcntl(fd, F_NOTIFY, DN_ACCESS));
	tried("lock", "F_SET_RW_HINT", fcntl(fd, F_SET_RW_HINT, &hint));
	tried_fd("notice", "inotify_init1", inotify_init1(0));
#ifdef SYS_inotify_init
	tried_fd("notice", "inotify_init", syscall(SYS_inotify_init));
#endif
	tried_fd("notice", "fanotify_init", fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID, O_RDONLY));
	close(fd);
}

static void memory(void)
{
	unsigned long long total = 0, step = 64 << 20;
	void *got;

	tried_fd("memory", "memfd", memfd_create("x", 0));
	tried("memory", "shm", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600));
	tried("memory", "msg", msgget(IPC_PRIVATE, IPC_CREAT | 0600));
	tried("memory", "sem", semget(IPC_PRIVATE, 1, IPC_CREAT | 0600));
	while ((got = mmap(NULL, step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) !=
		       MAP_FAILED &&
	       total < 1024 * GIB)
		total += step;
	say("memory", "mapped", got == MAP_FAILED ? errno : 0, total);
}

static void disk(void)
{
	struct stat info;
	long result = pwrite(scratch, "x", 1, 8 * GIB - 1);
	tried("scratch", "last byte", result);
	tried("scratch", "past the end", pwrite(scratch, "x", 1, 8 * GIB));
	tried("scratch", "longer", ftruncate(scratch, 8 * GIB + 4096));
	tried("scratch", "allocate", fallocate(scratch, 0, 8 * GIB, 4096));
	fstat(scratch, &info);
	say("scratch", "size", 0, info.st_size);
	tried("scratch", "give it a name", linkat(scratch, "", AT_FDCWD, "/x", AT_EMPTY_PATH));
	tried("scratch", "mark as set-id", fchmod(scratch, 06777));
}

static void threads(int telling)
{
	pthread_attr_t small;
	pthread_t thread;
	long count = 0;
	int err = 0;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	while (count < 5000 && !(err = pthread_create(&thread, &small, sleeper, NULL)))
		count++;
	if (telling)
		say("threads", "", err, count);
}

/* --- network --- */

static void network(const char *kind, const char *value)
{
	int port = atoi(value), fd;
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port),
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port),
				   .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct sockaddr_un name = { .sun_family = AF_UNIX };

	if (!strcmp(kind, "tcp")) {
		fd = socket(AF_INET, SOCK_STREAM, 0);
		tried("tcp", "", fd < 0 ? -1 : connect(fd, (void *)&v4, sizeof v4));
		close(fd);
		fd = socket(AF_INET6, SOCK_STREAM, 0);
		tried("tcp", "6", fd < 0 ? -1 : connect(fd, (void *)&v6, sizeof v6));
		close(fd);
	} else if (!strcmp(kind, "udp")) {
		fd = socket(AF_INET, SOCK_DGRAM, 0);
		tried("udp", "", fd < 0 ? -1 : sendto(fd, "x", 1, 0, (void *)&v4, sizeof v4));
		close(fd);
	} else if (!strcmp(kind, "abstract") || !strcmp(kind, "unix")) {
		int abstract = !strcmp(kind, "abstract");
		strncpy(name.sun_path + abstract, value, sizeof name.sun_path - 2);
		fd = socket(AF_UNIX, SOCK_STREAM, 0);
		tried(kind, value, connect(fd, (void *)&name,
					   offsetof(struct sockaddr_un, sun_path) + abstract + strlen(value)));
		close(fd);
	}
}

static void families(void)
{
	static const struct { int family, type; const char *name; } all[] = {
		{ AF_INET, SOCK_STREAM, "inet" }, { AF_INET6, SOCK_STREAM, "inet6" }, { AF_NETLINK, SOCK_RAW, "netlink" },
		{ AF_PACKET, SOCK_RAW, "packet" }, { AF_VSOCK, SOCK_STREAM, "vsock" }, { AF_ALG, SOCK_SEQPACKET, "alg" },
		{ AF_INET, SOCK_RAW, "raw" }, { AF_BLUETOOTH, SOCK_RAW, "bluetooth" }, { AF_CAN, SOCK_RAW, "can" },
		{ AF_TIPC, SOCK_RDM, "tipc" },
	};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		tried_fd("family", all[i].name, socket(all[i].family, all[i].type, 0));
}

static void about_host(const char *kind, const char *value)
{
	network(kind, value);
	if (!strcmp(kind, "read"))
		tried_fd("read", value, open(value, O_RDONLY));
	else if (!strcmp(kind, "own"))
		tried_fd("own", value, open(value, O_RDONLY));
	else if (!strcmp(kind, "file"))
		change_file(value);
	else if (!strcmp(kind, "folder"))
		change_folder(value);
	else if (!strcmp(kind, "pid")) {
		int pid = atoi(value);
		siginfo_t info = { .si_signo = SIGKILL, .si_code = SI_QUEUE };
		struct rlimit limit = { 0, 0 };
		cpu_set_t cpus;

		CPU_ZERO(&cpus);
		CPU_SET(0, &cpus);
		tried("signal", value, kill(pid, SIGKILL));
		tried("signal", "tgkill", syscall(SYS_tgkill, pid, pid, SIGKILL));
		tried("signal", "tkill", syscall(SYS_tkill, pid, SIGKILL));
		tried("signal", "sigqueue", syscall(SYS_rt_sigqueueinfo, pid, SIGKILL, &info));
		tried("signal", "owner of a socket", fcntl(channel, F_SETOWN, pid));
		tried("signal", "owner of a socket, by ioctl", ioctl(channel, FIOSETOWN, &pid));
		tried("reach-process", "prlimit", syscall(SYS_prlimit64, pid, RLIMIT_CORE, &limit, NULL));
		tried("reach-process", "priority", setpriority(PRIO_PROCESS, pid, 19));
		tried("reach-process", "processors", sched_setaffinity(pid, sizeof cpus, &cpus));
		tried("ptrace", value, ptrace(PTRACE_ATTACH, atoi(value), 0, 0));
		tried_fd("pidfd", value, syscall(SYS_pidfd_open, atoi(value), 0));
	} else if (!strcmp(kind, "shm"))
		tried("host-shm", value, shmget(atoi(value), 0, 0));
	else if (!strcmp(kind, "shm-id"))
		tried("host-shm", value, shmat(atoi(value), NULL, 0) == (void *)-1 ? -1 : 0);
	else if (!strcmp(kind, "mq"))
		tried_fd("host-mq", value, mq_open(value, O_RDONLY));
}

static void look(void)
{
	static char text[16384];
	size_t size = 0;
	char *line, *rest = text;

	while (size < sizeof text - 1 && !strstr(text, "go\n")) {
		ssize_t count = read(channel, text + size, sizeof text - 1 - size);
		if (count <= 0)
			break;
		size += count;
	}
	descriptors();
	walk("/", 0);
	while ((line = strsep(&rest, "\n")) && strcmp(line, "go")) {
		char *value = strchr(line, ' ');
		if (value) {
			*value++ = '\0';
			about_host(line, value);
		}
	}
	families();
	kernel();
	shared();
	disk();
	processes();
	rights();
	threads(1);
	memory();
	say("end", "", 0, 0);
}

/* --- the others --- */

/* What QEMU would be given to boot: CRC-32 of each file of the image, and of the scratch disk's first bytes. */
static uint32_t crc32(int fd, unsigned long long size)
{
	static unsigned char block[1 << 20];
	static uint32_t table[256];
	uint32_t crc = ~0U;

	for (uint32_t i = 0; i < 256; i++) {
		table[i] = i;
		for (int bit = 0; bit < 8; bit++)
			table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320U : 0);
	}
	for (unsigned long long done = 0; done < size;) {
		ssize_t count = pread(fd, block, sizeof block < size - done ? sizeof block : size - done, done);
		if (count <= 0)
			break;
		for (ssize_t i = 0; i < count; i++)
			crc = crc >> 8 ^ table[(crc ^ block[i]) & 0xFF];
		done += count;
	}
	return ~crc;
}

static void digest(void)
{
	const char *names[] = { kernel_path, initrd_path, root_path };
	char text[32] = { 0 };

	for (int i = 0; i < 3; i++) {
		int fd = open(names[i], O_RDONLY);
		say("digest", names[i], fd < 0 ? errno : 0, crc32(fd, ~0ULL));
	}
	/* The test says how many bytes of the scratch disk are ours. */
	if (read(channel, text, sizeof text - 1) > 0)
		say("digest", "scratch", 0, crc32(scratch, strtoull(text, NULL, 10)));
	say("end", "", 0, 0);
}

static void flood(void)
{
	static char junk[65536];
	struct pollfd streams[3] = { { qmp, POLLOUT, 0 }, { console, POLLOUT, 0 }, { 2, POLLOUT, 0 } };

	memset(junk, 'x', sizeof junk);
	memcpy(junk, "{\"event\": \"X\"}\r\n\033[2J", 19);
	for (int i = 0; i < 3; i++)
		fcntl(streams[i].fd, F_SETFL, O_NONBLOCK);
	for (;;) {
		poll(streams, 3, -1);
		for (int i = 0; i < 3; i++)
			if (streams[i].revents && write(streams[i].fd, junk, sizeof junk) < 0 && errno != EAGAIN)
				_exit(1);
	}
}

static void hog(void)
{
	for (;;) {
		char *block = mmap(NULL, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (block == MAP_FAILED)
			break;
		memset(block, 1, 16 << 20);
	}
	say("hog", "", errno, 0);
	say("end", "", 0, 0);
}

static void stubborn(void)
{
	sigset_t all;

	for (int number = 1; number < 65; number++)
		signal(number, SIG_IGN);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	prctl(PR_SET_PDEATHSIG, 0);
	setsid();
	for (int i = 0; i < 8; i++)
		if (fork() == 0)
			break;
	threads(0);
}

int main(int argc, char **argv)
{
	const char *name = strrchr(argv[0], '/');

	(void)argc;
	name = name ? name + 1 : argv[0];
	read_arguments(argv);
	if (!strcmp(name, "hostile-look"))
		look();
	else if (!strcmp(name, "hostile-digest"))
		digest();
	else if (!strcmp(name, "hostile-flood"))
		flood();
	else if (!strcmp(name, "hostile-garbage"))
		for (;;)
			write_all(channel, "not a frame at all, whatever one may think of it", 48);
	else if (!strcmp(name, "hostile-exit"))
		return 3;
	else if (!strcmp(name, "hostile-abort"))
		abort();
	else if (!strcmp(name, "hostile-hang-up"))
		close(channel);
	else if (!strcmp(name, "hostile-hog"))
		hog();
	else if (!strcmp(name, "hostile-stubborn"))
		stubborn();
#ifdef __x86_64__
	else if (!strcmp(name, "hostile-abi"))
		__asm__ volatile("int $0x80" : : "a"(20) : "memory"); /* getpid by the 32-bit numbers */
#endif
	for (;;)
		pause(); /* hostile-mute comes here at once */
}
