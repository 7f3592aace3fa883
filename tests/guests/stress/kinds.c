/* Processes, memory and pipes; and the table of all kinds of work. */
#include "stress.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL

int child_code(int number)
{
    return (number * 7 + 3) & 127;
}

static void run_fork(int worker, unsigned int seed)
{
    enum { CHILDREN = 6 };
    pid_t children[CHILDREN];
    unsigned int *private = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (private == MAP_FAILED)
        fail("fork: mmap: %m");
    for (unsigned int at = 0; at < 4 * PAGE / 4; at += 64)
        private[at] = seed + at;
    for (int index = 0; index < CHILDREN; index++) {
        children[index] = begin();
        if (children[index] == 0) {
            for (unsigned int at = 0; at < 4 * PAGE / 4; at += 64) {
                if (private[at] != seed + at)
                    fail("worker %d: a child sees %u at %u, not %u", worker, private[at], at, seed + at);
                private[at] = (unsigned int)index;
            }
            _exit(index + 1);
        }
    }
    for (int index = 0; index < CHILDREN; index++)
        finished(children[index], index + 1, "fork");
    for (unsigned int at = 0; at < 4 * PAGE / 4; at += 64)
        if (private[at] != seed + at)
            fail("worker %d: a child's write reached its parent at %u", worker, at);
    munmap(private, 4 * PAGE);
}

static void run_exec(int worker, unsigned int seed)
{
    enum { CHILDREN = 3 };
    pid_t children[CHILDREN];
    char number[16];
    (void)worker;
    for (int index = 0; index < CHILDREN; index++) {
        /* vfork holds us until the child has its own copy of the argument. */
        snprintf(number, sizeof(number), "%u", (seed + (unsigned int)index) & 0xffff);
        children[index] = spawn((const char *const[]){ "/proc/self/exe", "--child", number, NULL }, -1, -1);
    }
    for (int index = 0; index < CHILDREN; index++)
        finished(children[index], child_code((int)((seed + (unsigned int)index) & 0xffff)), "exec");
}

static sigjmp_buf fault_back;
static volatile sig_atomic_t fault_code;
static void *volatile fault_address;

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    fault_code = info->si_code;
    fault_address = info->si_addr;
    siglongjmp(fault_back, 1);
}

enum access { READ, WRITE, CALL };

static void must_fault(volatile char *address, enum access how, int code, const char *what)
{
    if (!sigsetjmp(fault_back, 1)) {
        if (how == READ)
            (void)*address;
        else if (how == WRITE)
            *address = 1;
        else
            ((void (*)(void))(uintptr_t)address)();
        fail("%s: no SIGSEGV", what);
    }
    if (fault_code != code || fault_address != address)
        fail("%s: SIGSEGV code %d at %p, not %d at %p", what, (int)fault_code, fault_address, code, (void *)address);
    atomic_fetch_add(&shared->faults, 1);
}

static void fill(unsigned char *area, unsigned long pages, unsigned int seed)
{
    for (unsigned long page = 0; page < pages; page++)
        memset(area + page * PAGE, (int)((seed + page) & 0xff), PAGE);
}

static void expect(const unsigned char *at, unsigned long value, const char *what)
{
    for (unsigned long offset = 0; offset < PAGE; offset += 511)
        if (at[offset] != (value & 0xff))
            fail("%s: %u in memory at %lu, not %lu", what, at[offset], offset, value & 0xff);
}

static void run_mmap(int worker, unsigned int seed)
{
    enum { PAGES = 48 };
    struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO }, before;
    (void)worker;
    sigaction(SIGSEGV, &action, &before);
    unsigned char *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        fail("mmap: %m");
    fill(area, PAGES, seed);
    for (unsigned long turn = 0; turn < 8; turn++) {
        unsigned long page = (seed >> turn) % (PAGES - 8);
        unsigned char *at = area + page * PAGE;
        if (mprotect(at, 4 * PAGE, PROT_READ))
            fail("mprotect: %m");
        must_fault((char *)at + PAGE + turn, WRITE, SEGV_ACCERR, "write to a page for reading");
        expect(at + PAGE, seed + page + 1, "after mprotect for reading");
        must_fault((char *)at, CALL, SEGV_ACCERR, "call into a page for reading");
        if (mprotect(at, 4 * PAGE, PROT_NONE))
            fail("mprotect: %m");
        must_fault((char *)at + 2 * PAGE, READ, SEGV_ACCERR, "read of a page without access");
        if (mprotect(at, 4 * PAGE, PROT_READ | PROT_WRITE))
            fail("mprotect: %m");
        expect(at + 2 * PAGE, seed + page + 2, "after mprotect for writing");
        if (munmap(at + 4 * PAGE, 2 * PAGE))
            fail("munmap: %m");
        must_fault((char *)at + 5 * PAGE, WRITE, SEGV_MAPERR, "write to an unmapped page");
        if (mmap(at + 4 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
            at + 4 * PAGE)
            fail("mmap at a place: %m");
        expect(at + 5 * PAGE, 0, "a new page");
        fill(at + 4 * PAGE, 2, seed + (unsigned int)page + 4);
        unsigned char *moved = mremap(at, 2 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
        if (moved == MAP_FAILED)
            fail("mremap: %m");
        expect(moved + PAGE, seed + page + 1, "after mremap");
        expect(moved + 5 * PAGE, 0, "what mremap added");
        if (mremap(moved, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at)
            fail("mremap back: %m");
        munmap(moved + 2 * PAGE, 4 * PAGE);
        if (turn & 1 && madvise(at, PAGE, MADV_DONTNEED) == 0) {
            expect(at, 0, "after MADV_DONTNEED");
            fill(at, 1, seed + (unsigned int)page);
        }
    }
    for (unsigned long page = 0; page < PAGES; page++)
        expect(area + page * PAGE, seed + page, "at the end");
    munmap(area, PAGES * PAGE);
    sigaction(SIGSEGV, &before, NULL);
}

static void feed(int output, unsigned int seed)
{
    unsigned char block[3000];
    for (unsigned int at = 0; at < 40; at++) {
        for (unsigned int byte = 0; byte < sizeof(block); byte++)
            block[byte] = (unsigned char)((seed = seed * 1103515245 + 12345) >> 16);
        if (write(output, block, sizeof(block)) != sizeof(block))
            fail("pipe: write: %m");
    }
}

/* More than a pipe holds through one pipe, and single bytes to and fro: sleeping and waking in both processes. */
static void run_pipe(int worker, unsigned int seed)
{
    int there[2], back[2];
    unsigned char block[1000], byte;
    unsigned int next = seed;
    long got = 0;
    (void)worker;
    if (pipe(there) || pipe(back))
        fail("pipe: %m");
    pid_t child = begin();
    if (child == 0) {
        feed(back[1], seed);
        for (int turn = 0; turn < 100; turn++) {
            if (read(there[0], &byte, 1) != 1)
                fail("pipe: the child reads: %m");
            byte ^= 0x5a;
            if (write(back[1], &byte, 1) != 1)
                fail("pipe: the child writes: %m");
        }
        _exit(17);
    }
    while (got < 40 * 3000) {
        size_t most = 40 * 3000 - got < (long)sizeof(block) ? (size_t)(40 * 3000 - got) : sizeof(block);
        ssize_t count = read(back[0], block, most);
        if (count <= 0)
            fail("pipe: read: %m");
        for (ssize_t at = 0; at < count; at++)
            if (block[at] != (unsigned char)((next = next * 1103515245 + 12345) >> 16))
                fail("pipe: wrong byte at %ld", got + at);
        got += count;
    }
    for (unsigned int turn = 0; turn < 100; turn++) {
        unsigned char sent = (unsigned char)(seed + turn);
        if (write(there[1], &sent, 1) != 1 || read(back[0], &byte, 1) != 1)
            fail("pipe: %m");
        if (byte != (sent ^ 0x5a))
            fail("pipe: %u came back for %u", byte, sent);
    }
    finished(child, 17, "pipe");
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
}

const struct kind kinds[] = {
    { "fork", run_fork },       { "exec", run_exec },       { "mmap", run_mmap },
    { "pipe", run_pipe },       { "fpu", run_fpu },         { "signals", run_signals },
    { "ptrace", run_trace },    { "threads", run_threads }, { "shootdown", run_shootdown },
    { "archive", run_archive }, { "steps", run_steps },
};
const int kind_count = sizeof(kinds) / sizeof(kinds[0]);

void prepare(void)
{
    prepare_registers();
}
