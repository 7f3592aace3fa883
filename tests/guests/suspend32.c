/*
 * A 32-bit guest that suspends itself twice, with a segment of its own, a second vCPU if there is one, and pages that it
 * knows by heart; and says each time what became of them.
 *
 * Command line: with `t` its frame list is a tree of frames, else a list at an address.
 */
#include "guest32.h"

#define HC(name, a, b, c, d, e) hypercall(HC_##name, (u32)(a), (u32)(b), (u32)(c), (u32)(d), (u32)(e))
#define SHUTDOWN_suspend 2

struct start_info *start_info;
extern u8 shared_info_page[], _end[];
extern const u32 trap_entries[];
extern void event_entry(void), failsafe_entry(void);
void guest_init(void);
void trap_dispatch(struct trap_frame *frame);

static volatile struct shared_info *shared_info;
static u64 gdt[512] __attribute__((aligned(4096)));
static u32 window[1024] __attribute__((aligned(4096)));
static u32 pattern[8][1024] __attribute__((aligned(4096)));
static u32 tree_top[1024] __attribute__((aligned(4096)));
static u32 tree_middle[1024] __attribute__((aligned(4096)));
static volatile u32 beats, second;

static u32 *frame_list(void) { return (u32 *)start_info->mfn_list; }
static u32 mfn_of(const void *p) { return frame_list()[((u32)p - VIRT_BASE) / PAGE_SIZE]; }

static void put(const char *text)
{
    volatile struct console_ring *ring = (void *)(VIRT_BASE + M2P[start_info->console_mfn] * PAGE_SIZE);
    u32 port = start_info->console_evtchn;

    for (; *text; text++) {
        while (ring->out_prod - ring->out_cons >= sizeof(ring->out))
            HC(event_channel_op, EVTCHNOP_send, &port, 0, 0, 0);
        ring->out[ring->out_prod % sizeof(ring->out)] = *text;
        ring->out_prod++;
    }
    HC(event_channel_op, EVTCHNOP_send, &port, 0, 0, 0);
}

static void shutdown(u32 reason)
{
    for (;;)
        HC(sched_op, SCHEDOP_shutdown, &reason, 0, 0, 0);
}

void trap_dispatch(struct trap_frame *frame)
{
    if (frame->vector == 256) {
        shared_info->vcpu_info[0].evtchn_upcall_pending = 0;
        shared_info->vcpu_info[0].evtchn_pending_sel = 0;
        return;
    }
    put("unexpected trap\n");
    shutdown(SHUTDOWN_crash);
}

static s32 map(const void *va, u64 entry) { return HC(update_va_mapping, va, entry, entry >> 32, UVMF_INVLPG, 0); }

static u32 cr3_of(u32 mfn) { return mfn << 12 | mfn >> 20; }

static void publish(void)
{
    u32 leaves = (start_info->nr_pages + 1023) / 1024;

    shared_info->max_pfn = start_info->nr_pages;
    if (start_info->cmd_line[0] == 't') {
        for (u32 leaf = 0; leaf < leaves; leaf++)
            tree_middle[leaf] = mfn_of((u8 *)frame_list() + leaf * PAGE_SIZE);
        tree_top[0] = mfn_of(tree_middle);
        shared_info->p2m_cr3 = 0;
        shared_info->frame_list_list = mfn_of(tree_top);
    } else {
        shared_info->p2m_vaddr = start_info->mfn_list;
        shared_info->p2m_cr3 = cr3_of(mfn_of((void *)start_info->pt_base));
    }
}

static void second_vcpu(void)
{
    for (;;) {
        beats++;
        if (!(beats & 1023))
            HC(sched_op, SCHEDOP_yield, 0, 0, 0, 0);
    }
}

static void bring_second_up(void)
{
    static struct vcpu_context context;
    static u8 stack[2048];

    if (HC(vcpu_op, VCPUOP_is_up, 1, 0, 0, 0) < 0)
        return;
    context.ctrlreg[3] = cr3_of(mfn_of((void *)start_info->pt_base));
    context.regs.eip = (u32)second_vcpu;
    context.regs.cs = KERNEL_CS;
    context.regs.ss = context.regs.ds = context.regs.es = context.kernel_ss = KERNEL_DS;
    context.regs.esp = (u32)stack + sizeof(stack) - 16;
    if (HC(vcpu_op, VCPUOP_initialise, 1, &context, 0, 0) || HC(vcpu_op, VCPUOP_up, 1, 0, 0, 0))
        shutdown(SHUTDOWN_crash);
    second = 1;
}

static void own_segment(void)
{
    u32 base = (u32)window - 0x100, frame;

    gdt[1] = 0x00cfb2000000ffffULL | (u64)(base & 0xffffff) << 16 | (u64)(base >> 24) << 56;
    window[2] = 0x5e9;
    frame = mfn_of(gdt);
    if (map(gdt, (u64)frame << 12 | PTE_P) || HC(set_gdt, &frame, 16, 0, 0, 0))
        shutdown(SHUTDOWN_crash);
    __asm__ volatile("movl %0, %%fs" : : "r"(8 | 1));
}

static int pages_are_good(void)
{
    for (u32 page = 0; page < 8; page++)
        for (u32 word = 0; word < 1024; word++)
            if (pattern[page][word] != page * 7919 + word * 31)
                return 0;
    return 1;
}

static void report(s32 cancelled)
{
    u32 found, before = beats;

    __asm__ volatile("movl %%fs:0x108, %0" : "=r"(found));
    while (second && beats < before + 3000)
        HC(sched_op, SCHEDOP_yield, 0, 0, 0, 0);
    put(cancelled ? "suspend32: awake, cancelled, " : "suspend32: awake, elsewhere, ");
    put(found == 0x5e9 ? "segment good, " : "segment BAD, ");
    put(pages_are_good() ? "pages good, " : "pages BAD, ");
    put(M2P[mfn_of(pattern[3])] == ((u32)pattern[3] - VIRT_BASE) / PAGE_SIZE ? "frames good" : "frames BAD");
    put(second ? ", second good\n" : "\n");
}

static void sleep_now(void)
{
    u32 reason = SHUTDOWN_suspend, store = start_info->store_mfn, console = start_info->console_mfn;

    shared_info->vcpu_info[0].evtchn_upcall_mask = 1;
    publish();
    start_info->store_mfn = M2P[store];
    start_info->console_mfn = M2P[console];
    map((void *)shared_info, 0);
    s32 cancelled = HC(sched_op, SCHEDOP_shutdown, &reason, mfn_of(start_info), 0, 0);
    if (cancelled) {
        start_info->store_mfn = store;
        start_info->console_mfn = console;
    }
    if (map((void *)shared_info, (u64)start_info->shared_info | PTE_P | PTE_W | PTE_AD))
        shutdown(SHUTDOWN_crash);
    report(cancelled);
}

void guest_init(void)
{
    static struct trap_info list[33];

    shared_info = (void *)shared_info_page;
    if (map(shared_info_page, (u64)start_info->shared_info | PTE_P | PTE_W | PTE_AD))
        shutdown(SHUTDOWN_crash);
    for (u32 n = 0; n < 32; n++)
        list[n] = (struct trap_info){ n, 0, KERNEL_CS, trap_entries[n] };
    HC(set_trap_table, list, 0, 0, 0, 0);
    HC(set_callbacks, KERNEL_CS, event_entry, KERNEL_CS, failsafe_entry, 0);
    for (u32 page = 0; page < 8; page++)
        for (u32 word = 0; word < 1024; word++)
            pattern[page][word] = page * 7919 + word * 31;
    own_segment();
    bring_second_up();
    put("suspend32: ready\n");
    sleep_now();
    sleep_now();
    put("suspend32: done\n");
    shutdown(SHUTDOWN_poweroff);
}
