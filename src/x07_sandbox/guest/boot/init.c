/*
 * The initramfs's /init: from kernel to agent, with nothing else in between.
 *
 * Loads the modules that the root disk needs, mounts the root file system read-only, lays the virtual file
 * systems over it, hands over the agent and becomes it. It decides nothing: all that is special to a job
 * comes later over the channel. On any failure it says so on the console and ends, which panics the kernel;
 * with panic=-1 and QEMU's -no-reboot the whole machine is gone, and the host sees that at once.
 *
 * Static, because the initramfs holds no loader. Built by the image's own compiler.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ROOT "/n"
#define DISK "/dev/vda"
#define DISK_WAIT_MS 10000
#define AGENT "/run/x07/agent.zip"
/* What QEMU's APIC counts in a second, divided as the kernel divides it. */
#define APIC_HZ 62500000.0

static void die(const char *what, const char *name)
{
	dprintf(2, "x07 init: %s %s: %s\n", what, name, strerror(errno));
	_exit(1);
}

static void make_dir(const char *path, mode_t mode)
{
	if (mkdir(path, mode) != 0 && errno != EEXIST)
		die("mkdir", path);
}

static void mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	if (mount(source, target, type, flags, data) != 0)
		die("mount", target);
}

/*
 * The agent and Python expect descriptors 0 to 2: without them the first print would kill PID 1. A machine
 * without a console device has no /dev/console that opens, so /dev/null stands in.
 */
static void open_standard_fds(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);

	if (fd < 0)
		fd = open("/dev/null", O_RDWR);
	if (fd < 0)
		_exit(1);
	for (int i = 0; i < 3; i++)
		if (fd != i)
			dup2(fd, i);
	if (fd > 2)
		close(fd);
}

static FILE *opened(const char *path)
{
	FILE *file = fopen(path, "re");

	if (file == NULL)
		die("open", path);
	return file;
}

static int command_line_has(const char *word)
{
	char line[2048] = "";
	FILE *file = opened("/proc/cmdline");
	int has = fgets(line, sizeof line, file) != NULL && strstr(line, word) != NULL;

	fclose(file);
	return has;
}

/*
 * Where the processor has no deadline timer, as under emulation, the kernel confinement how fast its APIC counts, against
 * the TSC, for a tenth of a second. If the host takes the processor away meanwhile, the result is wrong by as much as
 * it was away: all timers come late, or the kernel finds none that works and stays silent when it first has to wait.
 * No machine should go on so, least of all one that is saved; the host starts another when it reads this line. A timer
 * that comes early is set again until it is time, so that only half the speed is too little.
 *
 * Where the host is like that all the time, as under a quota, the last that it tries takes any timer that there is.
 */
static void check_timer(void)
{
	char line[200], name[32] = "<NULL>";
	double mult = 0, shift = 0, hz;
	FILE *list;
	int any;

	make_dir("/proc", 0555);
	mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	list = opened("/proc/timer_list");
	/* The last device in it is the one processor's; one for all may stand before. */
	while (fgets(line, sizeof line, list) != NULL) {
		sscanf(line, "Clock Event Device: %31s", name);
		sscanf(line, " mult: %lf", &mult);
		sscanf(line, " shift: %lf", &shift);
	}
	fclose(list);
	hz = mult * 1e9 / (double)(1ull << (int)shift);
	any = strcmp(name, "lapic") != 0 || command_line_has("x07.timer=any");
	if (strcmp(name, "<NULL>") != 0 && (any || (hz > 0.5 * APIC_HZ && hz < 1.05 * APIC_HZ)))
		return;
	dprintf(2, "x07 init: the timer was measured wrong: %s at %.0f Hz\n", name, hz);
	reboot(RB_AUTOBOOT);
	_exit(1);
}

static int is_module(const struct dirent *entry)
{
	size_t length = strlen(entry->d_name);

	return length > 3 && strcmp(entry->d_name + length - 3, ".ko") == 0;
}

/* Name order is loading order: the build numbers the files. A module that is already there is no error. */
static void load_modules(void)
{
	struct dirent **entries;
	int count = scandir("/modules", &entries, is_module, alphasort);

	if (count < 0)
		die("read", "/modules");
	for (int i = 0; i < count; i++) {
		char path[300];
		int fd;

		snprintf(path, sizeof path, "/modules/%s", entries[i]->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			die("open", path);
		if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
			die("load", path);
		close(fd);
	}
}

/* The disk appears some time after its driver was loaded; nothing announces it without a udev. */
static void mount_root(void)
{
	const struct timespec pause = {0, 1000000};

	make_dir(ROOT, 0755);
	for (int waited_ms = 0; waited_ms < DISK_WAIT_MS; waited_ms++) {
		if (mount(DISK, ROOT, "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL) == 0)
			return;
		if (errno != ENOENT && errno != ENXIO && errno != ENOTBLK)
			break;
		nanosleep(&pause, NULL);
	}
	die("mount", DISK);
}

static void mount_virtual(void)
{
	const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;

	mount_at("proc", ROOT "/proc", "proc", plain, NULL);
	mount_at("sysfs", ROOT "/sys", "sysfs", plain, NULL);
	mount_at("cgroup2", ROOT "/sys/fs/cgroup", "cgroup2", plain, NULL);
	mount_at("run", ROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64m");
	/* Small: the agent puts a /tmp of the job's own size over it. */
	mount_at("tmp", ROOT "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=16m");
}

static void copy_file(const char *from, const char *to)
{
	static char buffer[65536];
	int in = open(from, O_RDONLY | O_CLOEXEC);
	int out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0400);
	ssize_t got;

	if (in < 0)
		die("open", from);
	if (out < 0)
		die("create", to);
	while ((got = read(in, buffer, sizeof buffer)) > 0)
		for (ssize_t done = 0; done < got;) {
			ssize_t put = write(out, buffer + done, got - done);

			if (put < 0)
				die("write", to);
			done += put;
		}
	if (got < 0)
		die("read", from);
	close(in);
	close(out);
}

/*
 * The modules for a network policy are not copied: a bind mount keeps that folder of the initramfs in
 * reach after its root is covered. Only a job that has such a policy pays for loading them.
 */
static void hand_over(void)
{
	make_dir(ROOT "/run/x07", 0700);
	copy_file("/agent.zip", ROOT AGENT);
	make_dir(ROOT "/run/x07/modules", 0700);
	mount_at("/modules/net", ROOT "/run/x07/modules", NULL, MS_BIND, NULL);
	mount_at(NULL, ROOT "/run/x07/modules", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
}

int main(void)
{
	char *const argv[] = {"python3", "-I", "-S", AGENT, NULL};
	char *const envp[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", NULL};

	umask(022);
	mkdir("/dev", 0755);
	/* May fail with EBUSY where the kernel has mounted it already; the next open decides. */
	mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755");
	open_standard_fds();
	check_timer();
	load_modules();
	mount_root();
	mount_virtual();
	hand_over();
	mount_at("/dev", ROOT "/dev", NULL, MS_MOVE, NULL);
	/* pivot_root does not work on the initramfs; moving the root mount over it does. */
	if (chdir(ROOT) != 0)
		die("chdir", ROOT);
	mount_at(".", "/", NULL, MS_MOVE, NULL);
	if (chroot(".") != 0 || chdir("/") != 0)
		die("chroot", ROOT);
	execve("/usr/bin/python3", argv, envp);
	die("exec", "/usr/bin/python3");
}
