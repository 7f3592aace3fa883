/*
 * Two vCPUs: a token handed to and fro by spinning, each other's runstate, one clock for both. Needs 2 vCPUs.
 *
 * Command line: `count=N` (default 400) how often each has the token.
 */
#include "guest.h"

#define RUNNING 0
#define RUNNABLE 1
#define BLOCKED 2

struct runstate {
    volatile u32 state;
    u64 since, times[4];
};

/* struct vcpu_guest_context of 64-bit guests (public/arch-x86/xen.h), as far as it is used here. */
struct context {
    u8 fpu[512];
    u64 flags;
    struct {
        u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
        u32 error, vector;
        u64 rip, cs, rflags, rsp, ss, es, ds, fs, gs;
    } regs;
    u8 traps[256 * 16];
    u64 ldt_base, ldt_entries, gdt_frames[16], gdt_entries, kernel_ss, kernel_sp, ctrlreg[8], debugreg[8];
    u64 callbacks[3], vm_assist, fs_base, gs_base_kernel, gs_base_user;
};
_Static_assert(sizeof(struct context) == 5168, "the context's size");

static volatile u32 token, stage;
static volatile u64 latest, backwards, count = 400;
static struct runstate second_state;

static u64 clock_of(int vcpu)
{
    volatile struct vcpu_time_info *t = &shared_info->vcpu_info[vcpu].time;
    u32 version, low, high;
    u64 ns;

    do {
        version = t->version;
        __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
        u64 delta = ((u64)high << 32 | low) - t->tsc_timestamp;
        delta = t->tsc_shift < 0 ? delta >> -t->tsc_shift : delta << t->tsc_shift;
        ns = t->system_time + (u64)((unsigned __int128)delta * t->tsc_to_system_mul >> 32);
        barrier();
    } while (version & 1 || version != t->version);
    return ns;
}

/* What the other one read before must not be later. */
static void take_turns(u32 self, int vcpu)
{
    for (u64 turn = 0; turn < count; turn++) {
        while (token != self)
            __asm__ volatile("pause");
        u64 now = clock_of(vcpu);
        if (now < latest)
            backwards++;
        latest = now;
        token = !self;
    }
}

static void second_main(void)
{
    u64 area = (u64)&second_state;

    if (HC3(vcpu_op, VCPUOP_register_runstate_memory_area, 1, &area))
        panic("no runstate area\n");
    take_turns(1, 1);
    stage = 1;
    while (stage == 1)
        __asm__ volatile("pause");
    for (;;)
        HC2(sched_op, SCHEDOP_block, 0);
}

/* Let the second vCPU run until it is in `state`. */
static int reaches(u32 state)
{
    u64 end = system_time() + 5000000000UL;
    while (second_state.state != state && system_time() < end)
        HC2(sched_op, SCHEDOP_yield, 0);
    return second_state.state == state;
}

void guest_main(void)
{
    static struct context context;
    static u8 stack[8192] __attribute__((aligned(16)));
    const char *option = cmdline_option("count");

    if (option)
        count = parse_number(option);
    check_begin("smp");
    context.flags = 4; /* VGCF_in_kernel */
    context.regs.rip = (u64)second_main;
    context.regs.cs = FLAT_CS64;
    context.regs.ss = context.kernel_ss = FLAT_SS64;
    context.regs.rsp = context.kernel_sp = (u64)stack + sizeof(stack) - 8;
    context.ctrlreg[3] = va_to_mfn((void *)start_info->pt_base) << PAGE_SHIFT;
    check_value("VCPUOP_initialise", HC3(vcpu_op, VCPUOP_initialise, 1, &context), 0);
    u64 start = system_time();
    check_value("VCPUOP_up", HC3(vcpu_op, VCPUOP_up, 1, 0), 0);
    take_turns(0, 0);
    while (!stage)
        __asm__ volatile("pause");
    printk("smp: %lu handovers in %lu us\n", 2 * count, (system_time() - start) / 1000);
    check_value("one clock for both vCPUs", (s64)backwards, 0);
    check(reaches(RUNNABLE), "a vCPU that waits for its turn is runnable");
    stage = 2;
    check(reaches(BLOCKED), "a vCPU that waits for an event is blocked");
    check(second_state.times[RUNNING] && second_state.times[RUNNABLE], "its times add up");
    if (!check_end())
        printk("smp: OK\n");
}
