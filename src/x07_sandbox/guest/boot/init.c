/*
 * /init of the initramfs: loads the modules for the root disk, mounts the root file system read-only and the virtual
 * file systems, copies the agent and executes it.
 *
 * On failure it prints a message and exits, which panics the kernel; with panic=-1 and QEMU's -no-reboot the machine
 * ends at once. It is linked statically, because the initramfs has no loader, by the image's own compiler.
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
/* Frequency of QEMU's APIC timer, after the kernel's divider. */
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

/* Open descriptors 0 to 2, which Python needs. Without a console device, /dev/console cannot be opened. */
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
 * Without a deadline timer, as under emulation, the kernel calibrates the APIC timer against the TSC for a tenth of a
 * second. If the host deschedules the machine meanwhile, the result is wrong: all timers fire late, or the kernel finds
 * no working timer and hangs at its first wait. So verify the calibration, and reboot; the host then starts another
 * machine. A timer that fires early is set again, so half the frequency is still good enough.
 *
 * If the host is always like that, as under a CPU quota, its last attempt accepts any timer (x07.timer=any).
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
	/* The last device is the processor's; a global one may precede it. */
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

/* Load the modules in name order: the build numbers the files. */
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

/* Poll: the disk appears after its driver is loaded, and without udev there is no event. */
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
	mount_at("cgroup2", ROOT "/sys/fs/cgroup", "cgroup2", plain,
		 /* Programs are moved into groups of their own, which would take a grace period of RCU each time. */
		 "favordynmods");
	mount_at("run", ROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64m");
	/* Small: the agent mounts a /tmp of the job's size over it. */
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
 * Modules for network policies are not copied: a bind mount keeps that folder of the initramfs reachable after its root
 * is covered. Only jobs with such a policy load them.
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
	/* EBUSY if the kernel has mounted it already. */
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
