/*
 * The plainest updates of page tables: L1 entries of the domain's own frames by mmu_update, update_va_mapping and
 * multicalls of these, and the invalidation of single pages.
 *
 * It does what hypervisor/memory/pagetables.py does (update, update_l1, _get_leaf, _put_leaf), on the same frame table.
 * An error, an upper table, a mapping that becomes executable, a frame that was executed and is written, a frame of
 * another domain: all of that is Python's. What was done of a list when such an entry comes stays done, and Python goes on
 * behind it, by the same arguments with which a preempted call goes on. One entry is done whole or not at all.
 *
 * Included by fastpath.c.
 */
enum { UPDATES_MOST = 128, EFAULT = 14, PREEMPTED = 0x80000000, DOMID_SELF = 0x7ff0, ENTRY = 64 };
enum { MMU_UPDATE = 1, MULTICALL = 13, UPDATE_VA_MAPPING = 14, MMUEXT_OP = 26 };
enum { INVLPG_LOCAL = 7, INVLPG_MULTI = 9, INVLPG_ALL = 11, UVMF_INVLPG = 2 };
enum { KIND_NONE = 0, KIND_L1 = 1, KIND_WRITABLE = 6 }; /* hypervisor.memory.frames */
#define PTE_NX (1ULL << 63)
#define L1_DISALLOW (0x98ULL | 1ULL << 62)
#define USER_BITS (1ULL << 52 | PTE_US)
#define LAZY_NX (1ULL << 53 | PTE_NX)
#define SAME (~(PTE_NX | 0x7ffULL << 52 | 0xe00 | 0x100 | 0x60 | PTE_US)) /* PageTables.SAME */

static u64 frame_of(const struct context *c, u64 entry)
{
    return ((entry & PTE_ADDR) - c->base) >> 12; /* below the base: larger than any */
}

/* PageTables.update_l1; 0: not plain, and nothing was changed */
static int update_l1(struct context *c, u64 at, u64 new)
{
    u64 *words = (u64 *)c->memory, old = words[at], next = 0, before = 0;

    if (new & PTE_P) {
        if (new & L1_DISALLOW)
            return 0;
        if (!(new & PTE_US))
            new |= USER_BITS;
        if (c->lazy_nx && (new & (PTE_RW | PTE_NX)) == PTE_RW)
            new |= LAZY_NX;
        if (old & PTE_P && !((old ^ new) & SAME)) {
            if (old & ~new & PTE_NX)
                return 0;
            words[at] = new;
            return 1;
        }
        next = frame_of(c, new);
        if (next >= c->frames || !c->refs[next] || !(new & PTE_NX))
            return 0;
        if (new & PTE_RW && c->kind[next] != KIND_WRITABLE && c->count[next])
            return 0;
    }
    if (old & PTE_P) {
        before = frame_of(c, old);
        if (before >= c->frames || (old & PTE_RW && c->executed[before]))
            return 0;
    }
    if (new & PTE_P) {
        if (new & PTE_RW) {
            c->kind[next] = KIND_WRITABLE;
            c->count[next]++;
        }
        c->refs[next]++;
    }
    words[at] = new;
    if (old & PTE_P) {
        if (old & PTE_RW && !--c->count[before])
            c->stamp[before] = c->epoch;
        c->refs[before]--;
    }
    return 1;
}

/* mmu._update_one and PageTables.update, of frames that are no upper tables */
static int update_one(struct context *c, u64 ptr, u64 value)
{
    u64 *words = (u64 *)c->memory, index = (ptr >> 12) - (c->base >> 12), at = index * 512 + (ptr >> 3 & 511);
    u64 command = ptr & 7;

    if (command == 1 || command > 3 || index >= c->frames || !c->refs[index])
        return 0;
    if (command == 2)
        value |= words[at] & 0x60;
    if (c->count[index] && c->kind[index] == KIND_L1)
        return update_l1(c, at, value);
    if ((c->count[index] && c->kind[index] != KIND_NONE && c->kind[index] != KIND_WRITABLE) || c->executed[index])
        return 0;
    words[at] = value;
    return 1;
}

/* mmu.mmu_update; `args` become those of what is left */
static int mmu_update(struct context *c, u64 *args)
{
    u64 count = (u32)args[1], entry[2];
    i64 at;

    if (count > UPDATES_MOST || args[2] || (u32)args[3] != DOMID_SELF)
        return 0;
    for (; count; args[1] = --count, args[0] += sizeof(entry)) {
        if ((args[0] & 0xfff) + sizeof(entry) > 4096)
            return 0;
        at = translate(c, Q(c, c->cr + 24), args[0], PTE_P | PTE_US);
        if (at < 0)
            return 0;
        memcpy(entry, c->memory + at, sizeof(entry)); /* once: another process may write there */
        if (!update_one(c, entry[0], entry[1]))
            return 0;
    }
    return 1;
}

/* GuestAccess.l1_slot */
static i64 l1_slot(const struct context *c, u64 va)
{
    const u64 *words = (const u64 *)c->memory;
    u64 table = (Q(c, c->cr + 24) & PTE_ADDR) - c->base, entry;

    for (int shift = 36; shift >= 18; shift -= 9) {
        if (table >= c->limit)
            return -1;
        entry = words[(table + (va >> shift & 0xff8)) >> 3];
        if (!(entry & PTE_P) || entry & PTE_PSE)
            return -1;
        table = (entry & PTE_ADDR) - c->base;
    }
    return table < c->limit ? (i64)((table + (va >> 9 & 0xff8)) >> 3) : -1;
}

static int update_va_mapping(struct context *c, const u64 *args)
{
    i64 at = l1_slot(c, args[0]);
    u64 flush = args[2] & 3;

    if (at < 0 || (u64)at >> 9 >= c->frames || !c->count[at >> 9] || c->kind[at >> 9] != KIND_L1 || flush & 1)
        return 0;
    if (!update_l1(c, (u64)at, args[1]))
        return 0;
    if (flush == UVMF_INVLPG)
        reeve_flush_page(c->tables, args[0] & ~0xfffULL);
    return 1;
}

/* mmuext_op, one operation that invalidates a page */
static int invalidate(struct context *c, const u64 *args)
{
    u64 operation[3];
    u32 command;
    i64 at;

    if ((u32)args[1] != 1 || args[2] || (u32)args[3] != DOMID_SELF || (args[0] & 0xfff) + sizeof(operation) > 4096)
        return 0;
    at = translate(c, Q(c, c->cr + 24), args[0], PTE_P | PTE_US);
    if (at < 0)
        return 0;
    memcpy(operation, c->memory + at, sizeof(operation));
    command = (u32)operation[0];
    if (command != INVLPG_LOCAL && command != INVLPG_MULTI && command != INVLPG_ALL)
        return 0;
    reeve_flush_page(c->tables, operation[1] & ~0xfffULL);
    return 1;
}

/* A call whose result is 0 when it was done. 0: not, or not all; `args` are those of what is left. */
static int plain_call(struct context *c, u64 number, u64 *args)
{
    switch (number) {
    case MMU_UPDATE:
        return mmu_update(c, args);
    case UPDATE_VA_MAPPING:
        return update_va_mapping(c, args);
    case MMUEXT_OP:
        return invalidate(c, args);
    }
    return 0;
}

/* May hold translated code: who writes there has to tell the engine. */
static int is_code(const struct context *c, i64 at)
{
    return (u64)at >> 12 >= c->frames || c->executed[at >> 12];
}

/* multicall.multicall */
static int multicall(struct context *c, u64 *args, i64 *result)
{
    u64 count = (u32)args[1], entry[8], before[2];
    i64 at;

    if (count > UPDATES_MOST)
        return 0;
    for (; count; args[1] = --count, args[0] += ENTRY) {
        at = translate(c, Q(c, c->cr + 24), args[0], PTE_P | PTE_US | PTE_RW);
        if (at < 0 || (args[0] & 0xfff) + ENTRY > 4096 || is_code(c, at))
            return 0;
        memcpy(entry, c->memory + at, ENTRY);
        memcpy(before, entry + 2, sizeof(before));
        if (!plain_call(c, entry[0], entry + 2)) {
            if (memcmp(before, entry + 2, sizeof(before)))
                memcpy(c->memory + at + 16, entry + 2, sizeof(before));
            return 0;
        }
        at = translate(c, Q(c, c->cr + 24), args[0], PTE_P | PTE_US | PTE_RW);
        if (at < 0) { /* it was its own entry that it has mapped away */
            *result = -EFAULT;
            return 1;
        }
        if (is_code(c, at))
            return 0; /* likewise, to code: once more, in Python */
        memset(c->memory + at + 8, 0, sizeof(u64));
    }
    return 1;
}

/* Dispatcher.hypercall. 0: Python has to do it, or the rest of it. */
static int hypercall(struct context *c)
{
    u64 number = GPR(c, RAX), args[4] = { GPR(c, RDI), GPR(c, RSI), GPR(c, RDX), GPR(c, R10) };
    i64 result = 0;
    int done;

    if (SELECTOR(c, CS) != KERNEL_CS || Q(c, c->eflags) & FLAG_TF)
        return 0;
    done = number == MULTICALL ? multicall(c, args, &result) : plain_call(c, number, args);
    if (done) {
        GPR(c, RAX) = (u64)result;
        RIP(c) += 2;
    } else {
        GPR(c, RDI) = args[0];
        GPR(c, RSI) = args[1];
    }
    return done;
}
