/*
 * Two sets of the engine's cached address translations: of the kernel's page tables and of the program's.
 *
 * A guest goes from one to the other and back with each system call. The engine knows one set, in its CPU state, and
 * forgets it with each change of tables; so the set that is not in use lies here, and they change places. As on real
 * hardware a guest must ask for what it changed to be forgotten, and then both sets forget it.
 *
 * Blocks of code are told apart by a bit of the translation mode that means nothing without MPX (its "in use"): the same
 * address may be other code in the other tables, and the engine's table of recent jumps knows addresses and modes alone.
 *
 * The engine finds writes to code by entries that are marked when a write there must be looked at. It marks the entries
 * of the code's own address only; `reeve_translated` marks all that lead to its frame, in both sets.
 */
#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

struct tables {
    uint64_t *own, *other; /* the set in use, inside of the CPU state, and the one that is not */
    uint64_t words;        /* of a set */
    uint8_t *env;
    void *cpu;
    uint32_t hflags, cr3;  /* offsets in env */
    uint64_t other_cr3;    /* whose the other set is */
    uint32_t stale;        /* the other set is to be forgotten before it is used */
    uint32_t lost;         /* blocks whose frame was not found, for statistics */
    void (*flush)(void *cpu);
    void (*flush_page)(void *cpu, uint64_t va);
    void *(*to_host)(void *env, uint64_t va, int access, int mode);
    void (*mark)(void *cpu, uint64_t host, uint64_t length);
    uint64_t switches, blocks;
};

struct block { /* struct uc_tb of the public unicorn.h */
    uint64_t pc;
    uint16_t icount, size;
};

enum { KERNEL_TAG = 1 << 26, FETCH = 2, USER_INDEX = 1 };

static void tables_exchange(struct tables *t)
{
    for (uint64_t i = 0; i < t->words; i++) {
        uint64_t word = t->own[i];
        t->own[i] = t->other[i];
        t->other[i] = word;
    }
}

EXPORTED void reeve_tag(struct tables *t, int kernel)
{
    uint32_t *mode = (uint32_t *)(t->env + t->hflags);

    *mode = kernel ? *mode | KERNEL_TAG : *mode & ~(uint32_t)KERNEL_TAG;
}

EXPORTED void reeve_switch(struct tables *t, uint64_t cr3, int kernel)
{
    uint64_t *current = (uint64_t *)(t->env + t->cr3);

    reeve_tag(t, kernel);
    tables_exchange(t);
    if (t->other_cr3 != cr3)
        t->stale = 1;
    t->other_cr3 = *current;
    *current = cr3;
    if (t->stale) {
        t->stale = 0;
        t->flush(t->cpu);
    }
    t->switches++;
}

EXPORTED void reeve_flush_page(struct tables *t, uint64_t va)
{
    t->flush_page(t->cpu, va);
    if (!t->stale) {
        tables_exchange(t);
        t->flush_page(t->cpu, va);
        tables_exchange(t);
    }
}

static int mark(struct tables *t, uint64_t va)
{
    uint64_t host = (uint64_t)t->to_host(t->env, va, FETCH, USER_INDEX);

    if (!host)
        return 0;
    t->mark(t->cpu, host & ~4095ULL, 4096);
    if (!t->stale) {
        tables_exchange(t);
        t->mark(t->cpu, host & ~4095ULL, 4096);
        tables_exchange(t);
    }
    return 1;
}

/* The hook of new blocks. */
EXPORTED void reeve_translated(void *engine, struct block *new, struct block *before, void *data)
{
    struct tables *t = data;
    uint64_t last = new->pc + new->size - 1;

    (void)engine, (void)before;
    t->blocks++;
    if (!mark(t, new->pc) || ((last ^ new->pc) >> 12 && !mark(t, last))) {
        t->lost++;
        t->stale = 1;
        t->flush(t->cpu);
    }
}
