/* What the files of stress share. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

/* One page that all processes see. */
struct shared {
    atomic_int stop;    /* time is up */
    atomic_int claimed; /* someone writes `why` */
    atomic_int failed;  /* it is written */
    atomic_long latest; /* the latest time that any CPU saw, ns */
    atomic_long modules, plugged, faults;
    atomic_long done[32]; /* by kind */
    atomic_int doing[128]; /* by worker: its kind + 1 */
    char why[256];
};

struct kind {
    const char *name;
    void (*run)(int worker, unsigned int seed);
};

extern struct shared *shared;
extern const struct kind kinds[];
extern const int kind_count;

/* Keep the first failure of all processes and end this one. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Monotonic time in seconds; it must not go back on any CPU. */
double now(void);
/* fork; 0 in the child. */
pid_t begin(void);
/* vfork and exec; -1 leaves input or output as it is. */
pid_t spawn(const char *const *arguments, int input, int output);
/* Wait for a child that must exit with `code`. */
void finished(pid_t child, int code, const char *what);

/* Reference results, before the first fork. */
void prepare(void);
/* What `stress --child number` exits with. */
int child_code(int number);

/* archive.c */
void run_archive(int worker, unsigned int seed);
/* threads.c */
void run_threads(int worker, unsigned int seed);
void run_shootdown(int worker, unsigned int seed);
/* trace.c */
void run_trace(int worker, unsigned int seed);
void run_steps(int worker, unsigned int seed);
/* registers.c */
void prepare_registers(void);
void run_fpu(int worker, unsigned int seed);
void run_signals(int worker, unsigned int seed);
