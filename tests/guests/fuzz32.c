/*
 * Does whatever it is told, as a 32-bit PAE guest: see fuzz.c, whose `box` and `struct call` it shares with the host.
 */
#include "guest32.h"

#define CALLS 64
#define ARENA 32
#define WINDOW_VA 0x10000000U

typedef long long s64;

enum kind { HYPERCALL, WRITE8, WRITE4, WRITE1, EXCHANGE, COMPARE_EXCHANGE, OR8, AND8, FILL, IRET, USER, TOUCH };

struct call {
    u64 nr, args[6], kind, delay;
    s64 result;
    u64 trapped; /* 1 + vector, 0: no trap */
};
_Static_assert(sizeof(struct call) == 88, "struct call");

static struct {
    u64 mark[2];
    u64 raw, count, seed;
    u64 batches, done, traps;
    u64 values[64];
    u64 arena, arena_pages, window, window_l1, edge, info, recover, spin, spin_stack;
    u64 events, broken;
} box __attribute__((aligned(4096), section(".data"))) = {.mark = {0x7a7a75667a7a7566ULL, 0x21646c726f77206fULL}};

#define PAGES(name, count) static u8 name[(count) * PAGE_SIZE] __attribute__((aligned(4096), used))
static struct call calls[CALLS] __attribute__((aligned(4096), used));
static u8 images[CALLS][512] __attribute__((aligned(4096), used));
PAGES(gap, 1);
PAGES(big, 3);
PAGES(info_page, 1);
PAGES(iret_stack, 2);
PAGES(spin_stack, 1);
/* What programs play with: never healed. */
static struct {
    u8 arena[ARENA * PAGE_SIZE], tables[4 * PAGE_SIZE], edge[2 * PAGE_SIZE];
} play __attribute__((aligned(4096)));
static char fuzz_done[] = "\1fuzz: batch done";

struct start_info *start_info;
u32 fuzz_stack, trap_resume;
static volatile struct { u32 count, vector; } trap_seen;
static u32 base_mfn, must_heal, in_user;
extern u8 shared_info_page[], trap_stack_top[], _end[];
extern const u32 trap_entries[], trap_entry_128;
extern u8 fuzz_back[], fuzz_restart[], fuzz_spin[];
void event_entry(void), failsafe_entry(void), user_leave(u32 value), fuzz_loop(void), guest_init(void);
u32 user_run(u32 eip, u32 esp, u32 native);
s32 fuzz_call(struct call *call);
s32 fuzz_iret(u32 frame);
void fuzz_leave(void);
void trap_dispatch(struct trap_frame *frame);

__asm__(".text\n"
        ".macro fuzz_save\n"
        "movl 4(%esp), %eax\n"
        "pushl %ebx\n pushl %ebp\n pushl %esi\n pushl %edi\n"
        "movl %esp, fuzz_stack\n movl $fuzz_back, trap_resume\n"
        ".endm\n"
        "fuzz_call: fuzz_save\n"
        "movl 8(%eax), %ebx\n movl 16(%eax), %ecx\n movl 24(%eax), %edx\n movl 32(%eax), %esi\n movl 40(%eax), %edi\n"
        "movl 48(%eax), %ebp\n movl (%eax), %eax\n"
        "int $0x82\n"
        ".globl fuzz_back, fuzz_restart, fuzz_spin, fuzz_leave\n"
        "fuzz_leave:\n"
        "fuzz_back: movl fuzz_stack, %esp\n cld\n movl $0, trap_resume\n"
        "popl %edi\n popl %esi\n popl %ebp\n popl %ebx\n ret\n"
        "fuzz_iret: fuzz_save\n movl %eax, %esp\n movl $23, %eax\n int $0x82\n ud2\n"
        /* After a trap between two calls. */
        "fuzz_restart: movl $boot_stack_top, %esp\n call fuzz_loop\n ud2\n"
        /* A second vCPU does nothing, again and again. */
        "fuzz_spin: movl $29, %eax\n xorl %ebx, %ebx\n xorl %ecx, %ecx\n int $0x82\n jmp fuzz_spin\n");

#define PROBE(code, ...)                                                                                               \
    do {                                                                                                               \
        trap_seen.count = 0;                                                                                           \
        __asm__ volatile("movl $9f, trap_resume\n\t" code "\n9:\tmovl $0, trap_resume" ::__VA_ARGS__                   \
                         : "memory", "cc", "eax", "ecx", "edx");                                                       \
    } while (0)

/* Any trap ends what was going on: an expected one where PROBE wants it, a program's with the program. */
void trap_dispatch(struct trap_frame *frame)
{
    volatile struct shared_info *shared = (void *)shared_info_page;

    if (frame->vector == 256) {
        /* Events are taken and forgotten, wherever the vcpu_info is. */
        box.events++;
        shared->vcpu_info[0].evtchn_upcall_pending = shared->vcpu_info[1].evtchn_upcall_pending = 0;
        info_page[0] = info_page[64] = 0;
        return;
    }
    box.traps++;
    trap_seen.count++;
    trap_seen.vector = frame->vector;
    if (frame->cs & 2) { /* from ring 2 or 3, on the trap stack */
        if (in_user)
            user_leave(1);
        if (trap_resume)
            fuzz_leave();
    }
    if (!trap_resume) {
        box.broken++;
        must_heal = 1;
        trap_resume = (u32)fuzz_restart;
    }
    frame->eip = trap_resume;
    frame->cs = KERNEL_CS;
    frame->eflags = 0x202;
    trap_resume = 0;
}

#define HC(name, a, b, c, d, e) hypercall(HC_##name, (u32)(a), (u32)(b), (u32)(c), (u32)(d), (u32)(e))

static u32 mfn_of(const void *va) { return base_mfn + ((u32)va - VIRT_BASE) / PAGE_SIZE; }

static s32 map(const void *va, u64 entry)
{
    return HC(update_va_mapping, va, entry, entry >> 32, UVMF_INVLPG, 0);
}

static s32 set_entry(const void *table, u32 slot, u64 value)
{
    struct mmu_update request = {((u64)mfn_of(table) << 12) + slot * 8, value};
    return HC(mmu_update, &request, 1, 0, DOMID_SELF, 0);
}

static void heal(void)
{
    static struct trap_info list[34];

    for (u32 n = 0; n < 32; n++)
        list[n] = (struct trap_info){n, n == 3 ? 3 : 0, KERNEL_CS, trap_entries[n]};
    list[32] = (struct trap_info){128, 3, KERNEL_CS, trap_entry_128};
    HC(set_trap_table, list, 0, 0, 0, 0);
    HC(set_callbacks, KERNEL_CS, event_entry, KERNEL_CS, failsafe_entry, 0);
    HC(stack_switch, KERNEL_DS, trap_stack_top, 0, 0, 0);
    HC(vm_assist, 0, 2, 0, 0, 0);
    HC(fpu_taskswitch, 0, 0, 0, 0, 0);
    if (must_heal || !(box.batches & 15))
        for (u8 *page = (u8 *)&box; page < _end; page += PAGE_SIZE)
            if (page != shared_info_page && (page < (u8 *)&play || page >= (u8 *)(&play + 1)))
                map(page, (u64)mfn_of(page) << 12 | PTE_P | PTE_W | PTE_AD);
    must_heal = 0;
}

static void access(struct call *call)
{
    u32 at = call->args[0], low = call->args[1], high = call->args[1] >> 32, third = call->args[2];

    switch (call->kind) {
    case WRITE8:
        PROBE("movl %2, 4(%0)\n\tmovl %1, (%0)", "r"(at), "r"(low), "r"(high));
        break;
    case WRITE4:
        PROBE("movl %1, (%0)", "r"(at), "r"(low));
        break;
    case WRITE1:
        PROBE("movb %b1, (%0)", "r"(at), "b"(low));
        break;
    case EXCHANGE:
        PROBE("movl %1, %%eax\n\txchgl %%eax, (%0)", "r"(at), "r"(low));
        break;
    case COMPARE_EXCHANGE: /* with what is there, for it would fail otherwise */
        PROBE("movl (%%edi), %%eax\n\tmovl 4(%%edi), %%edx\n\tmovl %1, %%ecx\n\tlock cmpxchg8b (%%edi)", "D"(at),
              "S"(high), "b"(low));
        break;
    case OR8:
        PROBE("lock orl %1, (%0)", "r"(at), "r"(low));
        break;
    case AND8:
        PROBE("lock andl %1, (%0)", "r"(at), "r"(low));
        break;
    case FILL:
        trap_seen.count = 0;
        __asm__ volatile("movl $9f, trap_resume\n\trep stosl\n9:\tmovl $0, trap_resume"
                         : "+D"(at), "+c"(third)
                         : "a"(low)
                         : "memory", "cc", "edx");
        break;
    case IRET:
        trap_seen.count = 0;
        fuzz_iret(at);
        break;
    case USER:
        trap_seen.count = 0;
        in_user = 1;
        call->result = user_run(at, low, third);
        in_user = 0;
        break;
    case TOUCH:
        for (u32 va = at; va < low; va += PAGE_SIZE) {
            PROBE("movl %1, (%0)\n\tmovl %2, 4(%0)", "r"(va + (third & 0xff8)), "r"((u32)call->args[3]),
                  "r"((u32)(call->args[3] >> 32)));
            if (!trap_seen.count)
                call->result++;
        }
        break;
    }
}

static void carry_out(struct call *call)
{
    for (volatile u32 n = call->delay & 0xffff; n; n--)
        ;
    call->result = 0;
    trap_seen.count = 0;
    if (call->kind == HYPERCALL)
        call->result = fuzz_call(call);
    else
        access(call);
    call->trapped = trap_seen.count ? 1 + trap_seen.vector : 0;
    box.done++;
}

static u64 draw(void)
{
    u64 x = box.seed;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return box.seed = x;
}

/* Calls that take what keeps this guest alive are left to programs. */
static u32 draw_number(void)
{
    static const u8 numbers[] = {1, 1, 2, 5, 7, 8, 9, 10, 12, 12, 13, 14, 14, 15, 17, 18, 20, 20, 20, 21, 22, 24, 24, 25,
                                 26, 26, 26, 27, 28, 29, 32, 32, 32, 33, 34, 35, 36, 38, 39, 40, 41, 48, 55, 63, 6, 16};
    u32 random = draw() >> 5;
    return random >> 8 & 255 ? numbers[(random >> 16) % sizeof(numbers)] : random >> 16;
}

static u32 draw_argument(void)
{
    u64 random = draw();
    switch (random & 7) {
    case 0:
    case 1:
        return random >> 32 & 31;
    case 2:
        return (u32)big + (random >> 16 & 0x1fff);
    case 3:
        return (u32)draw() >> (random >> 8 & 31);
    default:
        return box.values[random >> 16 & 63] + (random & 0x100 ? random >> 32 & 0xfff : 0);
    }
}

static void draw_multicall(struct call *call)
{
    struct multicall_entry *entries = (struct multicall_entry *)big + (draw() & 31);

    call->args[0] = (u32)entries;
    call->args[1] = draw() & 7;
    for (u32 n = 0; n < call->args[1]; n++) {
        entries[n].op = draw_number();
        if (entries[n].op == 23)
            entries[n].op = 14;
        for (int i = 0; i < 6; i++)
            entries[n].args[i] = draw_argument();
    }
}

static void raw_batch(void)
{
    static struct call call;

    for (u64 n = box.count; n; n--) {
        call.nr = draw_number();
        if (call.nr == 23)
            continue;
        for (int i = 0; i < 6; i++)
            call.args[i] = draw_argument();
        for (int i = 0; i < 16; i++)
            ((u32 *)big)[draw() & 2047] = draw_argument();
        if (call.nr == HC_multicall)
            draw_multicall(&call);
        carry_out(&call);
    }
}

static void set_up(void)
{
    u8 *l1 = play.tables, *l2 = l1 + PAGE_SIZE;

    base_mfn = *(u32 *)start_info->mfn_list;
    map(shared_info_page, (u64)start_info->shared_info | PTE_P | PTE_W | PTE_AD);
    for (u32 n = 0; n < 4; n++)
        map(l1 + n * PAGE_SIZE, (u64)mfn_of(l1 + n * PAGE_SIZE) << 12 | PTE_P);
    map(play.edge + PAGE_SIZE, 0);
    set_entry(l2, WINDOW_VA >> 21 & 511, (u64)mfn_of(l1) << 12 | PTE_P | PTE_W | PTE_AD);
    set_entry((void *)start_info->pt_base, WINDOW_VA >> 30, (u64)mfn_of(l2) << 12 | PTE_P);
    box.arena = (u32)play.arena;
    box.arena_pages = ARENA;
    box.edge = (u32)play.edge + PAGE_SIZE;
    box.window = WINDOW_VA;
    box.window_l1 = (u32)l1;
    box.info = (u32)info_page;
    box.recover = (u32)fuzz_back;
    box.spin = (u32)fuzz_spin;
    box.spin_stack = (u32)spin_stack + sizeof(spin_stack);
}

void fuzz_loop(void)
{
    for (;;) {
        heal();
        ((volatile struct shared_info *)shared_info_page)->vcpu_info[0].evtchn_upcall_mask = 0;
        box.batches++;
        HC(console_io, 0, sizeof(fuzz_done) - 1, fuzz_done, 0, 0);
        if (box.raw)
            raw_batch();
        else
            for (u64 n = 0; n < box.count && n < CALLS; n++)
                carry_out(&calls[n]);
    }
}

void guest_init(void)
{
    set_up();
    fuzz_loop();
}
