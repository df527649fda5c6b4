/*
 * One program for most tests of behaviour: its first argument says what it does. Built once a test session.
 * What it reports goes to standard output as lines of "key value".
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *error_name(int number)
{
	const char *name = number ? strerrorname_np(number) : "OK";

	return name ? name : "?";
}

static void report(const char *key, const char *subject, int result)
{
	printf("%s %s %s\n", key, subject, error_name(result < 0 ? errno : 0));
}

static _Noreturn void sleep_for_ever(void)
{
	for (;;)
		pause();
}

static void write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t put = write(fd, data, size);

		if (put < 0) {
			if (errno == EINTR)
				continue;
			_exit(99);
		}
		data += put;
		size -= put;
	}
}

/* ---------------------------------------------------------------------------------------------- ends and streams */

static int do_nothing(char **args)
{
	(void)args;
	return 0;
}

static int do_exit(char **args)
{
	return atoi(args[0]);
}

static int do_args(char **args)
{
	for (; *args; args++)
		write_all(1, *args, strlen(*args) + 1);
	return 0;
}

static int do_flood(char **args)
{
	static char junk[65536];

	memset(junk, 'x', sizeof junk);
	for (;;)
		for (const char *fd = args[0]; *fd; fd++)
			if (write(*fd - '0', junk, sizeof junk) < 0)
				return 98;
}

/* ---------------------------------------------------------------------------------------------------- processes */

static int do_spawn(char **args)
{
	int made = 0, refused = 0;

	for (int i = atoi(args[0]); i > 0; i--) {
		pid_t child = fork();

		if (child == 0)
			sleep_for_ever();
		if (child > 0)
			made++;
		else
			refused++;
	}
	printf("made %d\nrefused %d\n", made, refused);
	return 0;
}

static int do_bomb(char **args)
{
	(void)args;
	for (;;)
		fork();
}

/* Leaves a child of a child in a session of its own that keeps standard output and writes on for ever. */
static int do_outlive(char **args)
{
	(void)args;
	if (fork() == 0) {
		setsid();
		if (fork() == 0) {
			signal(SIGHUP, SIG_IGN);
			signal(SIGTERM, SIG_IGN);
			sleep_for_ever();
		}
		_exit(0);
	}
	wait(NULL);
	for (int i = 0; i < 20000; i++)
		printf("line %d\n", i);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- memory */

static _Noreturn void hog(void)
{
	for (;;) {
		char *block = malloc(1 << 20);

		if (!block)
			_exit(97);
		memset(block, 1, 1 << 20);
	}
}

static int do_hog(char **args)
{
	(void)args;
	puts("allocating");
	fflush(stdout);
	hog();
}

static int do_hog_child(char **args)
{
	int status;

	(void)args;
	if (fork() == 0)
		hog();
	wait(&status);
	printf("status %d\n", status);
	return 0;
}

static int do_core(char **args)
{
	struct rlimit limit;
	struct stat info;
	int status;

	(void)args;
	getrlimit(RLIMIT_CORE, &limit);
	printf("limit %s\n", limit.rlim_max ? "some" : "none");
	fflush(stdout);
	if (fork() == 0)
		abort();
	wait(&status);
	printf("core %d\n", WCOREDUMP(status) != 0);
	printf("file %d\n", stat("core", &info) == 0);
	return 0;
}

/* -------------------------------------------------------------------------------------------------------- files */

/* 10 GB into each folder of the arguments, or as much as it takes. */
static int do_write(char **args)
{
	static char block[1 << 20];
	const long long wanted = 10LL * 1000 * 1000 * 1000;

	memset(block, 'w', sizeof block);
	for (; *args; args++) {
		char path[4096];
		long long done = 0;
		int fd, number = 0;

		snprintf(path, sizeof path, "%s/big", *args);
		fd = open(path, O_WRONLY | O_CREAT, 0600);
		if (fd < 0) {
			printf("open %s %s\n", *args, error_name(errno));
			continue;
		}
		while (done < wanted) {
			ssize_t put = write(fd, block, sizeof block);

			if (put < 0) {
				number = errno;
				break;
			}
			done += put;
		}
		printf("wrote %s %s %lld\n", *args, error_name(number), done >> 20);
		fflush(stdout);
		close(fd);
	}
	return 0;
}

/* Takes the whole scratch disk without writing it. */
static int do_fill(char **args)
{
	int fd = open("filled", O_WRONLY | O_CREAT, 0600), number = 0;
	off_t size = 0;

	(void)args;
	for (off_t step = 1 << 30; step >= 4096;) {
		number = posix_fallocate(fd, size, step);
		if (number == 0)
			size += step;
		else
			step /= 2;
	}
	printf("filled %s %lld\n", error_name(number), (long long)size >> 20);
	fflush(stdout);
	return 0;
}

/* Empty files in each folder of the arguments until no more can be made. */
static int do_many(char **args)
{
	for (; *args; args++) {
		int count = 0, fd;

		for (;;) {
			char path[4096];

			snprintf(path, sizeof path, "%s/f%d", *args, count);
			fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
			if (fd < 0)
				break;
			close(fd);
			count++;
		}
		printf("files %s %s %d\n", *args, error_name(errno), count);
		fflush(stdout);
	}
	return 0;
}

/* ----------------------------------------------------------------------------------------------------- the world */

static void try_paths(void)
{
	static const char *const gone[] = {
		"/run/x07/agent.zip", "/x07/agent", "/dev/vda", "/dev/vdb", "/dev/vport0p1", "/dev/vport1p1",
		"/dev/console", "/dev/mem", "/dev/kmsg", "/dev/net", "/sys/fs/cgroup/x07", "/sys/class",
		"/proc/1", "/proc/1/fd", "/initrd", "/old", "/agent.zip",
	};
	static const char *const read_only[] = {"/", "/etc", "/usr/bin", "/x07", "/x07/in", "/x07/out", "/dev", "/run", "/sys", "/proc", "/opt", "/root", "/var/tmp"};

	for (size_t i = 0; i < sizeof gone / sizeof *gone; i++) {
		struct stat info;

		report("see", gone[i], stat(gone[i], &info));
	}
	for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++) {
		char path[256];
		int fd;

		snprintf(path, sizeof path, "%s/new", read_only[i]);
		fd = open(path, O_WRONLY | O_CREAT, 0600);
		report("make", read_only[i], fd);
		if (fd >= 0)
			close(fd);
	}
}

static void try_writes(void)
{
	static const char *const files[] = {
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/x07/in/artifact",
		"/x07/in/policy.json", "/etc/passwd", "/etc/machine-id", "/proc/self/oom_score_adj",
	};

	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		int fd = open(files[i], O_WRONLY);
		/* The one that opens: a process may raise its own score, and may not lower it. */
		int result = fd < 0 ? fd : (int)write(fd, "-1000", 5);

		report("write", files[i], result);
		if (fd >= 0)
			close(fd);
	}
	report("chmod", "artifact", chmod("/x07/in/artifact", 0777));
	report("unlink", "artifact", unlink("/x07/in/artifact"));
}

static void try_rights(void)
{
	report("signal", "pid1", kill(1, SIGKILL));
	report("signal", "pid1-stop", kill(1, SIGSTOP));
	report("trace", "pid1", (int)ptrace(PTRACE_ATTACH, 1, NULL, NULL));
	report("mount", "tmpfs", mount("x", "/tmp", "tmpfs", 0, NULL));
	report("remount", "root", mount("", "/", "", MS_REMOUNT | MS_BIND, NULL));
	report("umount", "/x07/in", umount2("/x07/in", MNT_DETACH));
	report("chroot", "/tmp", chroot("/tmp"));
	report("setuid", "0", setuid(0));
	report("setgid", "0", setgid(0));
	report("sethostname", "x", sethostname("x", 1));
	report("nice", "-5", setpriority(PRIO_PROCESS, 0, -5));
	report("mknod", "/tmp/disk", mknod("/tmp/disk", S_IFBLK | 0600, 254 << 8));
	report("unshare", "mount", unshare(CLONE_NEWNS));
}

/* A user namespace of its own gives capabilities in there: what do they reach? */
static void try_user_namespace(void)
{
	if (unshare(CLONE_NEWUSER) < 0) {
		report("userns", "unshare", -1);
		return;
	}
	report("userns", "unshare", 0);
	report("userns", "mount-namespace", unshare(CLONE_NEWNS));
	report("userns", "umount-in", umount2("/x07/in", MNT_DETACH));
	report("userns", "remount-root", mount("", "/", "", MS_REMOUNT | MS_BIND, NULL));
	report("userns", "remount-in", mount("", "/x07/in", "", MS_REMOUNT | MS_BIND, NULL));
	report("userns", "mount-sysfs", mount("s", "/tmp", "sysfs", 0, NULL));
	report("userns", "mount-proc", mount("p", "/tmp", "proc", 0, NULL));
	report("userns", "mount-cgroup", mount("c", "/tmp", "cgroup2", 0, NULL));
	report("userns", "mount-disk", mount("/dev/vda", "/tmp", "erofs", MS_RDONLY, NULL));
	report("userns", "setns-pid1", open("/proc/1/ns/mnt", O_RDONLY));
	report("userns", "kill-pid1", kill(1, SIGKILL));
	umount2("/proc/sys", MNT_DETACH);
	report("userns", "write-sysctl", open("/proc/sys/kernel/core_pattern", O_WRONLY));
}

static void show_file(const char *path)
{
	char line[512];
	FILE *file = fopen(path, "r");

	while (file && fgets(line, sizeof line, file))
		printf("%s: %s", path, line);
	if (file)
		fclose(file);
}

static int do_look(char **args)
{
	extern char **environ;
	char text[4096];
	DIR *folder;
	struct stat info;

	(void)args;
	for (char **entry = environ; *entry; entry++)
		printf("env %s\n", *entry);
	printf("cwd %s\n", getcwd(text, sizeof text));
	gethostname(text, sizeof text);
	printf("hostname %s\n", text);
	printf("pid %d\nsession %d\numask %o\n", getpid(), getsid(0), umask(0));
	printf("ids %d %d %d %d groups %d\n", getuid(), geteuid(), getgid(), getegid(), getgroups(0, NULL));
	stat(".", &info);
	printf("cwd-mode %o %d\n", info.st_mode & 07777, info.st_uid);
	report("make", "cwd", open("own", O_WRONLY | O_CREAT, 0600));
	show_file("/proc/self/status");
	show_file("/proc/net/dev");
	show_file("/proc/self/cgroup");
	show_file("/proc/self/mounts");
	folder = opendir("/proc");
	for (struct dirent *entry; folder && (entry = readdir(folder));)
		if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9')
			printf("process %s\n", entry->d_name);
	for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
		struct rlimit limit;

		getrlimit(resource, &limit);
		printf("rlimit %d %lld %lld\n", resource, (long long)limit.rlim_cur, (long long)limit.rlim_max);
	}
	for (int number = 1; number < 32; number++) {
		struct sigaction action;

		sigaction(number, NULL, &action);
		if (action.sa_handler != SIG_DFL)
			printf("not-default %d\n", number);
	}
	try_paths();
	try_writes();
	try_rights();
	fflush(stdout);
	if (fork() == 0) {
		try_user_namespace();
		fflush(stdout);
		_exit(0);
	}
	wait(NULL);
	return 0;
}

/* -------------------------------------------------------------------------------------------------------- main */

static const struct {
	const char *name;
	int (*act)(char **args);
} ACTS[] = {
	{"nothing", do_nothing}, {"exit", do_exit}, {"args", do_args}, {"flood", do_flood}, {"spawn", do_spawn},
	{"bomb", do_bomb}, {"outlive", do_outlive}, {"hog", do_hog}, {"hog-child", do_hog_child}, {"core", do_core},
	{"write", do_write}, {"fill", do_fill}, {"many", do_many}, {"look", do_look},
};

int main(int argc, char **argv)
{
	const char *act = argc > 1 ? argv[1] : "nothing";

	for (size_t i = 0; i < sizeof ACTS / sizeof *ACTS; i++)
		if (strcmp(act, ACTS[i].name) == 0)
			return ACTS[i].act(argv + 2);
	return 96;
}
