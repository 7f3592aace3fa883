/*
 * A static Linux program for a guest: parallel workers that check every result of what they ask of the kernel.
 *
 *     stress SECONDS [WORKERS [WITHOUT]]   WORKERS: 0 for one for each CPU, at least 4; WITHOUT: kinds, with commas
 *
 * Every 5 s a line of progress; at last `STRESS OK n rounds` or `STRESS FAIL what`. Beside the workers one process
 * loads and unloads /lib/stress/NAME.ko, if there are any, and one takes CPUs offline and online again, if there are
 * several; both only in a Xen guest whose image holds /etc/stress-guest, never on the machine that builds it.
 * What a worker does is in kinds.c; this file starts, counts and ends them.
 */
#include "stress.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROGRESS 5.0
#define GRACE 90.0 /* seconds for what was begun when time was up: 32 vCPUs may share one CPU of the host */
#define MAX_WORKERS 128

struct shared *shared;

void fail(const char *format, ...)
{
    if (!atomic_exchange(&shared->claimed, 1)) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(shared->why, sizeof(shared->why), format, arguments);
        va_end(arguments);
        atomic_store(&shared->failed, 1);
    }
    _exit(1);
}

double now(void)
{
    struct timespec time;
    long seen = atomic_load(&shared->latest);
    if (clock_gettime(CLOCK_MONOTONIC, &time))
        fail("clock_gettime: %m");
    long value = time.tv_sec * 1000000000 + time.tv_nsec;
    if (value < seen)
        fail("the clock went back by %ld ns from one CPU to another", seen - value);
    while (seen < value && !atomic_compare_exchange_weak(&shared->latest, &seen, value))
        ;
    return (double)value / 1e9;
}

void finished(pid_t child, int code, const char *what)
{
    int status;
    pid_t found;
    do
        found = waitpid(child, &status, 0);
    while (found < 0 && errno == EINTR);
    if (found != child)
        fail("%s: waitpid: %m", what);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != code)
        fail("%s: status 0x%x, not exit code %d", what, status, code);
}

pid_t begin(void)
{
    pid_t child = fork();
    if (child < 0)
        fail("fork: %m");
    return child;
}

pid_t spawn(const char *const *arguments, int input, int output)
{
    pid_t child = vfork();
    if (child < 0)
        fail("vfork: %m");
    if (child == 0) {
        if ((input >= 0 && dup2(input, 0) < 0) || (output >= 0 && dup2(output, 1) < 0))
            _exit(126);
        execv(arguments[0], (char *const *)arguments);
        _exit(127);
    }
    return child;
}

static bool ended(void)
{
    return atomic_load(&shared->stop) || atomic_load(&shared->failed);
}

static void pause_ms(long ms)
{
    struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
    nanosleep(&time, NULL);
}

/* Root on a real machine must not lose its CPUs or get modules: only a Xen guest that is not dom0 may. */
static bool in_guest(void)
{
    char type[16] = "", uuid[64] = "";
    FILE *file = fopen("/sys/hypervisor/type", "r");
    bool xen = file && fgets(type, sizeof(type), file) && !strcmp(type, "xen\n");
    if (file)
        fclose(file);
    file = fopen("/sys/hypervisor/uuid", "r");
    bool guest = file && fgets(uuid, sizeof(uuid), file) && strncmp(uuid, "00000000-0000-", 14);
    if (file)
        fclose(file);
    return xen && guest && !access("/init", X_OK) && !access("/etc/stress-guest", F_OK);
}

static bool loaded(const char *name)
{
    char line[512];
    bool found = false;
    size_t length = strlen(name);
    FILE *file = fopen("/proc/modules", "r");
    if (!file)
        fail("/proc/modules: %m");
    while (fgets(line, sizeof(line), file))
        found |= !strncmp(line, name, length) && line[length] == ' ';
    fclose(file);
    return found;
}

static void modules(void)
{
    char path[512], name[256];
    while (!ended()) {
        struct dirent *entry;
        DIR *folder = opendir("/lib/stress");
        int count = 0;
        while (folder && (entry = readdir(folder)) && !ended()) {
            char *dot = strrchr(entry->d_name, '.');
            if (!dot || strcmp(dot, ".ko"))
                continue;
            snprintf(path, sizeof(path), "/lib/stress/%s", entry->d_name);
            snprintf(name, sizeof(name), "%.*s", (int)(dot - entry->d_name), entry->d_name);
            finished(spawn((const char *const[]){ "/bin/busybox", "insmod", path, NULL }, -1, -1), 0, "insmod");
            if (!loaded(name))
                fail("module %s is not there after insmod", name);
            finished(spawn((const char *const[]){ "/bin/busybox", "rmmod", name, NULL }, -1, -1), 0, "rmmod");
            if (loaded(name))
                fail("module %s is still there after rmmod", name);
            atomic_fetch_add(&shared->modules, 1);
            count++;
        }
        if (folder)
            closedir(folder);
        if (!count)
            return;
        pause_ms(50);
    }
}

static void set_online(int cpu, int online)
{
    char path[64], value = '?';
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || write(file, online ? "1" : "0", 1) != 1)
        fail("CPU %d cannot be taken %s: %m", cpu, online ? "online" : "offline");
    if (pread(file, &value, 1, 0) != 1 || value != '0' + online)
        fail("CPU %d says %c, not %d", cpu, value, online);
    close(file);
}

static void run_on(int cpu)
{
    cpu_set_t one, all;
    unsigned int here = ~0U;
    if (sched_getaffinity(0, sizeof(all), &all))
        fail("sched_getaffinity: %m");
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof(one), &one))
        fail("cannot run on CPU %d: %m", cpu);
    if (syscall(SYS_getcpu, &here, NULL, NULL) || here != (unsigned int)cpu)
        fail("on CPU %u, not %d", here, cpu);
    now();
    CPU_SET(0, &all);
    CPU_CLR(cpu, &all);
    if (sched_setaffinity(0, sizeof(all), &all))
        fail("sched_setaffinity: %m");
}

static void hotplug(int cpus)
{
    for (int turn = 0; !ended(); turn++) {
        int cpu = 1 + turn % (cpus - 1);
        set_online(cpu, 0);
        pause_ms(100);
        set_online(cpu, 1);
        run_on(cpu);
        atomic_fetch_add(&shared->plugged, 1);
        pause_ms(300);
    }
}

static const char *without = "";

static bool left_out(const char *name)
{
    size_t length = strlen(name);
    for (const char *at = without; (at = strstr(at, name)); at += length)
        if ((at == without || at[-1] == ',') && (at[length] == ',' || !at[length]))
            return true;
    return false;
}

static void work(int worker)
{
    for (unsigned int turn = 0; !ended(); turn++) {
        int kind = (int)((turn + (unsigned int)worker) % (unsigned int)kind_count);
        if (left_out(kinds[kind].name))
            continue;
        atomic_store(&shared->doing[worker], kind + 1);
        now();
        kinds[kind].run(worker, turn * 2654435761U + (unsigned int)worker);
        atomic_fetch_add(&shared->done[kind], 1);
    }
    atomic_store(&shared->doing[worker], 0);
}

static long total(void)
{
    long sum = 0;
    for (int kind = 0; kind < kind_count; kind++)
        sum += atomic_load(&shared->done[kind]);
    return sum;
}

static void progress(double seconds)
{
    printf("stress: %.0f s, %ld rounds:", seconds, total());
    for (int kind = 0; kind < kind_count; kind++)
        printf(" %s %ld", kinds[kind].name, atomic_load(&shared->done[kind]));
    printf(", modules %ld, hotplug %ld, faults %ld\n", atomic_load(&shared->modules), atomic_load(&shared->plugged),
           atomic_load(&shared->faults));
}

static void name_stuck(int workers)
{
    for (int worker = 0; worker < workers; worker++)
        if (atomic_load(&shared->doing[worker]))
            printf("stress: worker %d still does %s\n", worker, kinds[atomic_load(&shared->doing[worker]) - 1].name);
}

/* Until all children are gone. What goes away on its own must have ended well. */
static void watch(int children, int workers, double start, double seconds)
{
    double next = PROGRESS;
    while (children) {
        int status;
        pid_t child = waitpid(-1, &status, WNOHANG);
        if (child > 0) {
            children--;
            if (status && !atomic_exchange(&shared->claimed, 1)) {
                snprintf(shared->why, sizeof(shared->why), "a worker ended with status 0x%x", status);
                atomic_store(&shared->failed, 1);
            }
            continue;
        }
        double passed = now() - start;
        if (passed >= next) {
            progress(passed);
            next += PROGRESS;
        }
        if (passed >= seconds)
            atomic_store(&shared->stop, 1);
        if (atomic_load(&shared->failed))
            return;
        if (passed >= seconds + GRACE) {
            name_stuck(workers);
            fail("%d processes do not end", children);
        }
        pause_ms(50);
    }
}

static int start_all(int workers, int cpus)
{
    int children = workers;
    for (int worker = 0; worker < workers; worker++)
        if (begin() == 0) {
            work(worker);
            _exit(0);
        }
    if (!in_guest()) {
        printf("stress: no guest made for this: modules and CPUs are left alone\n");
        return children;
    }
    children++;
    if (begin() == 0) {
        modules();
        _exit(0);
    }
    if (cpus > 1) {
        children++;
        if (begin() == 0) {
            hotplug(cpus);
            _exit(0);
        }
    }
    return children;
}

int main(int count, char **arguments)
{
    if (count == 3 && !strcmp(arguments[1], "--child"))
        return child_code(atoi(arguments[2]));
    double seconds = count > 1 ? atof(arguments[1]) : 10;
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    int workers = count > 2 ? atoi(arguments[2]) : 0;
    if (!workers)
        workers = cpus < 4 ? 4 : cpus;
    without = count > 3 ? arguments[3] : "";
    if (seconds <= 0 || workers < 1 || workers > MAX_WORKERS) {
        fprintf(stderr, "usage: stress SECONDS [WORKERS [WITHOUT]]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        printf("STRESS FAIL mmap: %m\n");
        return 1;
    }
    prepare();
    printf("stress: %d CPUs, %d workers, %.0f s\n", cpus, workers, seconds);
    /* The watcher may call fail() itself; the parent of it all prints the verdict whatever becomes of the watcher. */
    pid_t watcher = fork();
    if (watcher == 0) {
        setpgid(0, 0);
        double start = now();
        watch(start_all(workers, cpus), workers, start, seconds);
        progress(now() - start);
        _exit(0);
    }
    int status = 1;
    if (watcher < 0 || waitpid(watcher, &status, 0) != watcher || status || atomic_load(&shared->failed)) {
        printf("STRESS FAIL %s\n", shared->why[0] ? shared->why : "the watcher ended early");
        kill(-watcher, SIGKILL);
        return 1;
    }
    printf("STRESS OK %ld rounds\n", total());
    return 0;
}
