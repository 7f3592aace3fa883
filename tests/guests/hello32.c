/*
 * A 32-bit PAE guest that tries what is particular to its kind, and says PASS or FAIL for each.
 */
#include "guest32.h"

#define HC(name, a, b, c, d, e) hypercall(HC_##name, (u32)(a), (u32)(b), (u32)(c), (u32)(d), (u32)(e))

struct start_info *start_info;
extern u8 shared_info_page[], hypercall_page[], boot_stack_top[], trap_stack_top[], _end[];
extern const u32 trap_entries[], trap_entry_128;
extern void event_entry(void), failsafe_entry(void), user_leave(u32 value);
extern u32 user_run(u32 eip, u32 esp, u32 native);
void guest_init(void);
void trap_dispatch(struct trap_frame *frame);

static volatile struct shared_info *shared_info;
static u8 page_a[PAGE_SIZE] __attribute__((aligned(4096)));
static u8 page_b[PAGE_SIZE] __attribute__((aligned(4096)));
static u64 table[512] __attribute__((aligned(4096)));
static u64 gdt[512] __attribute__((aligned(4096)));
static u8 user_code[PAGE_SIZE] __attribute__((aligned(4096)));
static u8 user_stack[PAGE_SIZE] __attribute__((aligned(4096)));
static volatile struct trap_frame last;
static volatile u32 resume, events, upcall_port;

/* -- console */

static void put(const char *text)
{
    volatile struct console_ring *ring =
        (void *)(VIRT_BASE + M2P[start_info->console_mfn] * PAGE_SIZE);
    u32 port = start_info->console_evtchn;

    for (; *text; text++) {
        while (ring->out_prod - ring->out_cons >= sizeof(ring->out))
            HC(event_channel_op, EVTCHNOP_send, &port, 0, 0, 0);
        ring->out[ring->out_prod % sizeof(ring->out)] = *text;
        ring->out_prod++;
    }
    HC(event_channel_op, EVTCHNOP_send, &port, 0, 0, 0);
}

static void put_hex(u32 value)
{
    char text[9];

    for (int i = 0; i < 8; i++)
        text[i] = "0123456789abcdef"[value >> (28 - 4 * i) & 15];
    text[8] = 0;
    put(text);
}

static void check(const char *name, u32 found, u32 wanted)
{
    put(found == wanted ? "PASS " : "FAIL ");
    put(name);
    if (found != wanted) {
        put(": ");
        put_hex(found);
        put(" instead of ");
        put_hex(wanted);
    }
    put("\n");
}

static void shutdown(u32 reason)
{
    for (;;)
        HC(sched_op, SCHEDOP_shutdown, &reason, 0, 0, 0);
}

/* -- traps */

void trap_dispatch(struct trap_frame *frame)
{
    if (frame->vector == 256) {
        shared_info->vcpu_info[0].evtchn_upcall_pending = 0;
        shared_info->vcpu_info[0].evtchn_pending_sel = 0;
        for (u32 word = 0; word < 32; word++) {
            u32 pending = shared_info->evtchn_pending[word] & ~shared_info->evtchn_mask[word];
            shared_info->evtchn_pending[word] &= ~pending;
            if (pending >> (upcall_port & 31) & 1 && word == upcall_port >> 5)
                events++;
        }
        return;
    }
    __builtin_memcpy((void *)&last, frame, (frame->cs & 3) == 3 ? sizeof(*frame) : sizeof(*frame) - 8);
    if ((frame->cs & 3) == 3)
        user_leave(frame->eax);
    if (resume)
        frame->eip = resume;
    else if (frame->vector != 3 && frame->vector != 128) {
        put("unexpected trap ");
        put_hex(frame->vector);
        put(" at ");
        put_hex(frame->eip);
        shutdown(SHUTDOWN_crash);
    }
    resume = 0;
}

static void traps(void)
{
    static struct trap_info list[34];

    for (u32 n = 0; n < 32; n++)
        list[n] = (struct trap_info){ n, n == 3 ? 3 : 0, KERNEL_CS, trap_entries[n] };
    list[32] = (struct trap_info){ 128, 3, KERNEL_CS, trap_entry_128 };
    check("set_trap_table", HC(set_trap_table, list, 0, 0, 0, 0), 0);
    check("set_callbacks", HC(set_callbacks, KERNEL_CS, event_entry, KERNEL_CS, failsafe_entry, 0), 0);
    check("stack_switch", HC(stack_switch, KERNEL_DS, trap_stack_top, 0, 0, 0), 0);
    last.vector = 99;
    __asm__ volatile("int3");
    check("int3", last.vector, 3);
    check("the kernel's code selector", last.cs & 0xffff, KERNEL_CS);
    __asm__ volatile("movl $1f, %0; movl 0x10, %%eax; 1:" : "=m"(resume) : : "eax", "memory");
    check("page fault", last.vector, 14);
    check("its error code", last.error, 0);
    check("its address", shared_info->vcpu_info[0].cr2, 0x10);
    __asm__ volatile("movl $1f, %0; int $0x81; 1:" : "=m"(resume) : : "memory");
    check("int without a gate", last.vector << 16 | last.error, 13 << 16 | 0x81 << 3 | 2);
    u32 root;
    __asm__ volatile("mov %%cr3, %0" : "=r"(root));
    u32 mfn = ((u32 *)start_info->mfn_list)[(start_info->pt_base - VIRT_BASE) / PAGE_SIZE];
    check("cr3", root, mfn << 12 | mfn >> 20);
}

/* -- memory */

static u32 mfn_of(const void *p) { return ((u32 *)start_info->mfn_list)[((u32)p - VIRT_BASE) / PAGE_SIZE]; }

static s32 map(const void *va, u64 entry)
{
    return HC(update_va_mapping, va, entry, entry >> 32, UVMF_INVLPG, 0);
}

static volatile u64 *l1_entry(const void *va)
{
    /* The tables from pt_base on: the L3, the L2 of slot 3, the L1s. */
    return (u64 *)(start_info->pt_base + 2 * PAGE_SIZE) + ((u32)va - VIRT_BASE) / PAGE_SIZE;
}

static s32 mmuext(u32 cmd, u32 arg1)
{
    struct mmuext_op op = { cmd, arg1, 0 };
    return HC(mmuext_op, &op, 1, 0, DOMID_SELF, 0);
}

static s32 update(const volatile void *entry, u64 value)
{
    struct mmu_update request = { (u64)mfn_of((void *)((u32)entry & ~4095U)) << 12 | ((u32)entry & 4095U), value };
    return HC(mmu_update, &request, 1, 0, DOMID_SELF, 0);
}

static void memory(void)
{
    u64 a = (u64)mfn_of(page_a) << 12 | PTE_P | PTE_W | PTE_AD, b = (u64)mfn_of(page_b) << 12 | PTE_P | PTE_W | PTE_AD;
    volatile u32 *half = (volatile u32 *)l1_entry(page_a);
    u64 *l3 = (u64 *)start_info->pt_base, *l2 = (u64 *)(start_info->pt_base + PAGE_SIZE);
    u32 window[3];

    check("m2p", M2P[mfn_of(page_a)], ((u32)page_a - VIRT_BASE) / PAGE_SIZE);
    check("m2p of nobody", M2P[1], ~0U);
    check("machphys_mapping", HC(memory_op, XENMEM_machphys_mapping, window, 0, 0, 0), 0);
    check("its start", window[0], (u32)M2P);
    *(u32 *)page_a = 0xaaaa;
    *(u32 *)page_b = 0xbbbb;
    check("update_va_mapping", map(page_a, b), 0);
    check("what it maps", *(volatile u32 *)page_a, 0xbbbb);
    check("vm_assist", HC(vm_assist, 0, 2, 0, 0, 0), 0);
    half[1] = 0x10; /* a frame far away, were the entry present: the hypervisor clears that bit */
    check("an upper half written first", half[0] & 1, 0);
    half[1] = a >> 32;
    half[0] = (u32)a;
    map(page_a, a);
    check("two halves of an entry", *(volatile u32 *)page_a, 0xaaaa);
    check("writable mapping of a table", map(page_a, (u64)mfn_of(l3) << 12 | PTE_P | PTE_W), -XEN_EBUSY);
    check("an L2 slot of Xen's", update(l2 + 500, 0), -XEN_EPERM);
    check("the last L3 slot", update(l3 + 3, 0), -XEN_EINVAL);
    table[3] = l3[3] & ~0xfffULL & ~(1ULL << 63);
    table[3] = (u64)mfn_of(l2) << 12 | PTE_P;
    map(table, (u64)mfn_of(table) << 12 | PTE_P);
    check("a second L3 with the same last L2", mmuext(MMUEXT_PIN_L3_TABLE, mfn_of(table)), -XEN_EINVAL);
    map(table, (u64)mfn_of(table) << 12 | PTE_P | PTE_W);
    table[3] = 0;
    map(table, (u64)mfn_of(table) << 12 | PTE_P);
    check("an L3 without its last entry", mmuext(MMUEXT_PIN_L3_TABLE, mfn_of(table)), -XEN_EINVAL);
    check("a user root", mmuext(MMUEXT_NEW_USER_BASEPTR, mfn_of(l3)), -XEN_EINVAL);
    check("the root again", mmuext(MMUEXT_NEW_BASEPTR, mfn_of(l3)), 0);
}

static void new_root(void)
{
    /* A root of its own: another L3 over a copy of the last L2. */
    u64 *l3 = (u64 *)start_info->pt_base, *l2 = (u64 *)(start_info->pt_base + PAGE_SIZE);

    map(table, (u64)mfn_of(table) << 12 | PTE_P | PTE_W);
    for (u32 i = 0; i < 428; i++)
        ((u64 *)page_b)[i] = l2[i];
    for (u32 i = 0; i < 4; i++)
        table[i] = 0;
    table[3] = (u64)mfn_of(page_b) << 12 | PTE_P;
    table[100] = 0x123;
    map(table, (u64)mfn_of(table) << 12 | PTE_P);
    map(page_b, (u64)mfn_of(page_b) << 12 | PTE_P);
    check("pin a root", mmuext(MMUEXT_PIN_L3_TABLE, mfn_of(table)), 0);
    check("entries past the fourth", (u32)table[100], 0);
    check("Xen's entries in its last L2", ((u64 *)page_b)[428] != 0, 1);
    check("use it", mmuext(MMUEXT_NEW_BASEPTR, mfn_of(table)), 0);
    check("m2p there", M2P[mfn_of(page_a)], ((u32)page_a - VIRT_BASE) / PAGE_SIZE);
    check("and back", mmuext(MMUEXT_NEW_BASEPTR, mfn_of(l3)), 0);
    check("unpin it", mmuext(MMUEXT_UNPIN_TABLE, mfn_of(table)), 0);
    check("the last L2 is free again", map(page_b, (u64)mfn_of(page_b) << 12 | PTE_P | PTE_W), 0);
}

/* -- hypercalls with translated arguments */

static void translated(void)
{
    struct { u32 extents, count, order, flags; u16 domid; } __attribute__((aligned(4))) reservation = {
        0, 2, 0, 0, DOMID_SELF
    };
    u32 frames[2] = { mfn_of(page_a), mfn_of(page_b) };
    struct multicall_entry calls[3] = {
        { HC_xen_version, 99, { 0 } },
        { HC_set_segment_base, 99, { 0 } },
        { HC_multicall, 99, { 0 } },
    };
    struct { s32 state; u64 entry, times[4]; } __attribute__((packed, aligned(4))) runstate;

    _Static_assert(sizeof(reservation) == 20 && sizeof(runstate) == 44, "layouts");
    map(page_a, 0);
    map(page_b, 0);
    reservation.extents = (u32)frames;
    check("decrease_reservation", HC(memory_op, XENMEM_decrease_reservation, &reservation, 0, 0, 0), 2);
    check("m2p of a frame given back", M2P[frames[0]], ~0U);
    check("increase_reservation", HC(memory_op, XENMEM_increase_reservation, &reservation, 0, 0, 0), 2);
    check("two frames", frames[0] != frames[1], 1);
    check("multicall", HC(multicall, calls, 3, 0, 0, 0), 0);
    check("its first result", calls[0].result, 4 << 16 | 17);
    check("its second result", calls[1].result, -XEN_ENOSYS);
    check("its third result", calls[2].result, -XEN_EINVAL);
    check("runstate", HC(vcpu_op, VCPUOP_get_runstate_info, 0, &runstate, 0, 0), 0);
    check("which is running", runstate.state, 0);
    check("an address of Xen's", HC(memory_op, XENMEM_machphys_mapping, 0xF5800000U, 0, 0, 0), -XEN_EFAULT);
}

static void segments(void)
{
    u32 frame = mfn_of(gdt), found, base = (u32)page_a - 0x100;

    map(page_a, (u64)mfn_of(gdt) << 12 | PTE_P);
    gdt[1] = 0x00cfb2000000ffffULL | (u64)(base & 0xffffff) << 16 | (u64)(base >> 24) << 56;
    gdt[2] = 0x00afb8000000ffffULL; /* 64-bit code */
    map(gdt, (u64)mfn_of(gdt) << 12 | PTE_P);
    check("a GDT with 64-bit code", HC(set_gdt, &frame, 16, 0, 0, 0), -XEN_EINVAL);
    map(gdt, (u64)mfn_of(gdt) << 12 | PTE_P | PTE_W);
    gdt[2] = 0;
    map(gdt, (u64)mfn_of(gdt) << 12 | PTE_P);
    check("set_gdt", HC(set_gdt, &frame, 16, 0, 0, 0), 0);
    __asm__ volatile("movl %1, %%fs; movl %%fs:0x108, %0" : "=r"(found) : "r"(8 | 1) : "memory");
    check("a segment with a base", found, (u32)gdt[1]);
    u64 flat = 0x00cf92000000ffffULL; /* of ring 0: becomes ring 1's */
    u64 where = (u64)mfn_of(gdt) << 12 | 3 * 8;
    check("update_descriptor", HC(update_descriptor, where, where >> 32, flat, flat >> 32, 0), 0);
    check("its privilege level", (u32)(gdt[3] >> 45) & 3, 1);
}

/* -- user mode */

static u32 run_user(const u8 *code, u32 size, u32 native)
{
    __builtin_memcpy(user_code, code, size);
    last.vector = 99;
    return user_run((u32)user_code, (u32)user_stack + PAGE_SIZE, native);
}

static void user(void)
{
    /* mov $0x1234,%eax; int $0x80 */
    static const u8 call[] = { 0xb8, 0x34, 0x12, 0, 0, 0xcd, 0x80 };
    /* mov 0xf5800000,%eax */
    static const u8 read_m2p[] = { 0xa1, 0, 0, 0x80, 0xf5 };
    /* mov 0xc0000000,%eax */
    static const u8 read_kernel[] = { 0xa1, 0, 0, 0, 0xc0 };
    /* int $0x82 */
    static const u8 hypercall_code[] = { 0xcd, 0x82 };
    u64 code = (u64)mfn_of(user_code) << 12 | PTE_P | PTE_W | PTE_U | PTE_AD;
    u64 stack = (u64)mfn_of(user_stack) << 12 | PTE_P | PTE_W | PTE_U | PTE_AD;

    check("user pages", map(user_code, code) | map(user_stack, stack), 0);
    check("user mode by hypercall", run_user(call, sizeof(call), 0), 0x1234);
    check("its call", last.vector, 128);
    check("its code selector", last.cs & 0xffff, 0xe02b);
    check("its stack", last.esp, (u32)user_stack + PAGE_SIZE);
    check("user mode by iret", run_user(call, sizeof(call), 1), 0x1234);
    run_user(read_m2p, sizeof(read_m2p), 1);
    check("users do not see the m2p", last.vector << 8 | last.error, 14 << 8 | 5);
    run_user(read_kernel, sizeof(read_kernel), 0);
    check("users do not see the kernel", last.vector << 8 | last.error, 14 << 8 | 5);
    run_user(hypercall_code, sizeof(hypercall_code), 0);
    check("users make no hypercalls", last.vector << 16 | last.error, 13 << 16 | 0x82 << 3 | 2);
}

/* -- events */

static void timer(void)
{
    struct { u32 virq, vcpu, port; } bind = { 0, 0, 0 };
    u64 deadline;

    check("bind_virq", HC(event_channel_op, EVTCHNOP_bind_virq, &bind, 0, 0, 0), 0);
    upcall_port = bind.port;
    shared_info->vcpu_info[0].evtchn_upcall_mask = 0;
    deadline = shared_info->vcpu_info[0].system_time + 20000000;
    check("set_timer_op", HC(set_timer_op, deadline, deadline >> 32, 0, 0, 0), 0);
    while (!events)
        HC(sched_op, SCHEDOP_block, 0, 0, 0, 0);
    check("one upcall", events, 1);
    struct { u32 ports, count; u64 timeout; } poll = {
        (u32)&bind.port, 1, shared_info->vcpu_info[0].system_time + 5000000
    };
    check("poll with a timeout", HC(sched_op, SCHEDOP_poll, &poll, 0, 0, 0), 0);
    check("the wall clock", shared_info->wc_sec > 1700000000U, 1);
}

/* -- a second vCPU */

static volatile u32 second_says;

static void second_vcpu(void)
{
    u32 segment;

    __asm__ volatile("mov %%cs, %0" : "=r"(segment));
    __asm__ volatile("int3");
    second_says = segment;
    HC(vcpu_op, VCPUOP_down, 1, 0, 0, 0);
    for (;;)
        HC(sched_op, SCHEDOP_block, 0, 0, 0, 0);
}

static void second(void)
{
    static struct vcpu_context context;
    static u8 stack[2048];

    if (HC(vcpu_op, VCPUOP_is_up, 1, 0, 0, 0) < 0)
        return;
    u32 root = mfn_of((void *)start_info->pt_base);
    context.ctrlreg[3] = root << 12 | root >> 20;
    context.regs.eip = (u32)second_vcpu;
    context.regs.cs = KERNEL_CS;
    context.regs.ss = context.regs.ds = context.regs.es = context.kernel_ss = KERNEL_DS;
    context.regs.esp = (u32)stack + sizeof(stack) - 16;
    context.traps[3] = (struct trap_info){ 3, 3, KERNEL_CS, trap_entries[3] };
    check("VCPUOP_initialise", HC(vcpu_op, VCPUOP_initialise, 1, &context, 0, 0), 0);
    last.vector = 99;
    check("VCPUOP_up", HC(vcpu_op, VCPUOP_up, 1, 0, 0, 0), 0);
    while (!second_says || HC(vcpu_op, VCPUOP_is_up, 1, 0, 0, 0))
        HC(sched_op, SCHEDOP_yield, 0, 0, 0, 0);
    check("the second vCPU ran", second_says, KERNEL_CS);
    check("its trap", last.vector, 3);
}

void guest_init(void)
{
    shared_info = (void *)shared_info_page;
    if (map(shared_info_page, (u64)start_info->shared_info | PTE_P | PTE_W | PTE_AD))
        shutdown(SHUTDOWN_crash);
    put("hello32: ");
    put(start_info->magic);
    put(" ");
    put(start_info->cmd_line);
    put("\n");
    traps();
    memory();
    new_root();
    translated();
    segments();
    user();
    timer();
    second();
    put("hello32: done\n");
    shutdown(SHUTDOWN_poweroff);
}
