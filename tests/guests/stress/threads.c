/* Threads: locks, conditions, thread-local data; and mappings that change under other threads (TLB flushes by IPI). */
#include "stress.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

enum { THREADS = 4, TURNS = 150 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long counter, turn_of;
static atomic_long atomic_counter;
static _Thread_local long mine;

static void *count_up(void *argument)
{
    long self = (long)argument;
    mine = self * 1000;
    for (int turn = 0; turn < TURNS; turn++) {
        pthread_mutex_lock(&lock);
        long seen = counter;
        if (turn % 16 == 0)
            sched_yield();
        counter = seen + 1;
        pthread_mutex_unlock(&lock);
        atomic_fetch_add(&atomic_counter, 1);
        mine++;
    }
    for (int turn = 0; turn < 10; turn++) { /* in turn: each waits for its predecessor's wake-up */
        pthread_mutex_lock(&lock);
        while (turn_of % THREADS != self)
            pthread_cond_wait(&changed, &lock);
        turn_of++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return (void *)(mine - self * 1000);
}

void run_threads(int worker, unsigned int seed)
{
    pthread_t threads[THREADS];
    (void)seed;
    counter = turn_of = 0;
    atomic_store(&atomic_counter, 0);
    for (long index = 0; index < THREADS; index++)
        if (pthread_create(&threads[index], NULL, count_up, (void *)index))
            fail("worker %d: no thread %ld", worker, index);
    for (int index = 0; index < THREADS; index++) {
        void *result;
        if (pthread_join(threads[index], &result) || (long)result != TURNS)
            fail("worker %d: thread %d counted %ld", worker, index, (long)result);
    }
    if (counter != THREADS * TURNS || atomic_load(&atomic_counter) != THREADS * TURNS || turn_of != THREADS * 10)
        fail("worker %d: threads counted %ld and %ld of %d, %ld turns", worker, counter, atomic_load(&atomic_counter),
             THREADS * TURNS, turn_of);
}

static volatile long *_Atomic page;
static atomic_int writable, over;

/* The page is for reading now: wait until it is not, then try the write again. */
static void on_fault(int number)
{
    (void)number;
    atomic_fetch_add(&shared->faults, 1);
    while (!atomic_load(&writable))
        sched_yield();
}

static void *write_on(void *argument)
{
    long slot = 1 + (long)argument;
    while (!atomic_load(&over)) {
        page[slot]++;
        for (volatile int wait = 0; wait < 100; wait++)
            ;
    }
    return NULL;
}

void run_shootdown(int worker, unsigned int seed)
{
    enum { WRITERS = 2 };
    pthread_t threads[WRITERS];
    struct sigaction action = { .sa_handler = on_fault }, before;
    sigaction(SIGSEGV, &action, &before);
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        fail("shootdown: mmap: %m");
    atomic_store(&writable, 1);
    atomic_store(&over, 0);
    for (long index = 0; index < WRITERS; index++)
        if (pthread_create(&threads[index], NULL, write_on, (void *)index))
            fail("worker %d: no writer %ld", worker, index);
    for (unsigned int turn = 0; turn < 10; turn++) {
        atomic_store(&writable, 0);
        if (mprotect((void *)page, 4096, PROT_READ))
            fail("shootdown: mprotect: %m");
        long first = page[1], second = page[2];
        for (unsigned int wait = 0; wait < 3 + seed % 3; wait++)
            sched_yield();
        if (page[1] != first || page[2] != second)
            fail("worker %d: a page for reading was written: a stale TLB entry", worker);
        if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE))
            fail("shootdown: mprotect: %m");
        atomic_store(&writable, 1);
        sched_yield();
    }
    atomic_store(&over, 1);
    for (int index = 0; index < WRITERS; index++)
        pthread_join(threads[index], NULL);
    munmap((void *)page, 4096);
    sigaction(SIGSEGV, &before, NULL);
}
