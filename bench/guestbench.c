/*
 * What a guest pays for the operations that a hypervisor makes dear.
 *
 *     gcc -static -O2 -o guestbench guestbench.c
 *     guestbench [--time SECONDS] [NAME ...]
 *
 * One line each:  BENCH {"name": "syscall", "value": 1.234, "unit": "us"}
 * then BENCH-DONE. Every value is a time for one operation: less is better.
 *
 *   syscall        getppid, entered and left                                    us
 *   fork           fork, exit in the child, wait                                ms
 *   exec           vfork, exec of this program, exit, wait                      ms
 *   page_fault     first write to a page of anonymous memory                    us
 *   pipe           one byte to another process and back through two pipes      us
 *   cpu_loop       1000 instructions of register arithmetic                     us
 *   mem_loop       1000 words of 1 MiB read, changed and written               us
 *
 * The count of each is found by doubling until a batch takes long enough (a
 * fifth of the time given); the value is the median of five batches.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCHES 5
#define PAGE 4096UL
#define MAX_PAGES 4096UL /* 16 MiB at once: guests are small */
#define WORDS (1UL << 17)

static void fail(const char *what)
{
	printf("BENCH-ERROR %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void wait_for(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	if (!WIFEXITED(status) || WEXITSTATUS(status)) {
		errno = ECHILD;
		fail("child");
	}
}

/* Each takes a count and returns the seconds that so many operations took. */

static double bench_syscall(unsigned long count)
{
	double start = now();

	for (unsigned long i = 0; i < count; i++)
		syscall(SYS_getppid);
	return now() - start;
}

static double bench_fork(unsigned long count)
{
	double start = now();

	for (unsigned long i = 0; i < count; i++) {
		pid_t child = fork();

		if (child < 0)
			fail("fork");
		if (!child)
			_exit(0);
		wait_for(child);
	}
	return now() - start;
}

static __attribute__((noinline)) pid_t start_self(void)
{
	static char path[] = "/proc/self/exe", option[] = "--exit";
	static char *const arguments[] = { path, option, NULL };
	pid_t child = vfork();

	if (!child) {
		execv(path, arguments);
		_exit(1);
	}
	return child;
}

static double bench_exec(unsigned long count)
{
	double start = now();

	for (unsigned long i = 0; i < count; i++) {
		pid_t child = start_self();

		if (child < 0)
			fail("vfork");
		wait_for(child);
	}
	return now() - start;
}

static double bench_page_fault(unsigned long count)
{
	double taken = 0;

	while (count) {
		unsigned long pages = count < MAX_PAGES ? count : MAX_PAGES;
		char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		double start;

		if (memory == MAP_FAILED)
			fail("mmap");
		madvise(memory, pages * PAGE, MADV_NOHUGEPAGE); /* refused by a kernel that has none */
		start = now();
		for (unsigned long i = 0; i < pages; i++)
			((volatile char *)memory)[i * PAGE] = 1;
		taken += now() - start;
		munmap(memory, pages * PAGE);
		count -= pages;
	}
	return taken;
}

static double bench_pipe(unsigned long count)
{
	int there[2], back[2];
	char byte = 0;
	double start;
	pid_t child;

	if (pipe(there) || pipe(back))
		fail("pipe");
	child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		close(there[1]);
		close(back[0]);
		while (read(there[0], &byte, 1) == 1)
			if (write(back[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	close(there[0]);
	close(back[1]);
	start = now();
	for (unsigned long i = 0; i < count; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			fail("pipe");
	start = now() - start;
	close(there[1]);
	close(back[0]);
	wait_for(child);
	return start;
}

static double bench_cpu_loop(unsigned long count)
{
	unsigned long value = 1, turns = count * 1000 / 6; /* six instructions a turn */
	double start = now();

	__asm__ volatile("1:\n\t"
			 "imul $1234567, %0, %0\n\t"
			 "add $1, %0\n\t"
			 "xor $85, %0\n\t"
			 "add $3, %0\n\t"
			 "dec %1\n\t"
			 "jnz 1b"
			 : "+r"(value), "+r"(turns)
			 :
			 : "cc");
	return now() - start;
}

static double bench_mem_loop(unsigned long count)
{
	static volatile unsigned long words[WORDS];
	double start = now();

	for (unsigned long i = 0; i < count * 1000; i++)
		words[i & (WORDS - 1)] += i;
	return now() - start;
}

static const struct benchmark {
	const char *name;
	double (*run)(unsigned long count);
	const char *unit;
	double scale; /* units in a second */
	unsigned long first;
} benchmarks[] = {
	{ "syscall", bench_syscall, "us", 1e6, 1000 },
	{ "fork", bench_fork, "ms", 1e3, 5 },
	{ "exec", bench_exec, "ms", 1e3, 5 },
	{ "page_fault", bench_page_fault, "us", 1e6, 256 },
	{ "pipe", bench_pipe, "us", 1e6, 50 },
	{ "cpu_loop", bench_cpu_loop, "us", 1e6, 1000 },
	{ "mem_loop", bench_mem_loop, "us", 1e6, 200 },
};

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static void measure(const struct benchmark *benchmark, double seconds)
{
	unsigned long count = benchmark->first;
	double each[BATCHES];

	while (benchmark->run(count) < seconds / BATCHES && count < 1UL << 40)
		count *= 2;
	for (int i = 0; i < BATCHES; i++)
		each[i] = benchmark->run(count) / (double)count;
	qsort(each, BATCHES, sizeof(each[0]), compare);
	printf("BENCH {\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"}\n", benchmark->name,
	       each[BATCHES / 2] * benchmark->scale, benchmark->unit);
	fflush(stdout);
}

static int wanted(const char *name, int argc, char **argv)
{
	if (!argc)
		return 1;
	for (int i = 0; i < argc; i++)
		if (!strcmp(name, argv[i]))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	double seconds = 0.5;
	int first = 1;

	if (argc == 2 && !strcmp(argv[1], "--exit"))
		return 0;
	setvbuf(stdout, NULL, _IOLBF, 0); /* children must find nothing buffered */
	if (argc >= 3 && !strcmp(argv[1], "--time")) {
		seconds = atof(argv[2]);
		first = 3;
	}
	if (!(seconds > 0) || seconds > 600) {
		printf("BENCH-ERROR --time: give seconds, more than 0 and at most 600\n");
		return 2;
	}
	for (size_t i = 0; i < sizeof(benchmarks) / sizeof(benchmarks[0]); i++)
		if (wanted(benchmarks[i].name, argc - first, argv + first))
			measure(&benchmarks[i], seconds);
	printf("BENCH-DONE\n");
	return 0;
}
