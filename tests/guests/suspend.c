/*
 * Suspends itself when control/shutdown says so, and goes on: where it was, or as another domain on other frames.
 * Echoes console lines; obeys poweroff and reboot.
 *
 * Command line: `tree`: tells of its frame list as a tree of frames, not as a list at an address; `balloon=N`: gives N
 * pages back first; `now`: suspends without being asked; `keep`: leaves a mapping of shared_info, so that it cannot be
 * saved; `plain`: says nothing of its frame list. With a second vCPU, that one counts all the time.
 */
#include "guest.h"

#define PAGES 16
#define XENMEM_decrease_reservation 1

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

struct reservation {
    u64 extents, count;
    u32 order, flags;
    u16 domid;
};

static char path[128];
static char text[256];
static u64 *pattern[PAGES];
static u64 expected, wakes;
static volatile u64 beats, broken_beats;
static u64 *tree_top, *tree_middle;
static int second;

static u64 *frame_list(void) { return (u64 *)start_info->mfn_list; }

static u64 checksum(void)
{
    u64 sum = 0;

    for (u64 page = 0; page < PAGES; page++)
        for (u64 word = 0; word < 512; word++)
            sum = (sum << 1 | sum >> 63) ^ pattern[page][word];
    return sum;
}

static void fill(void)
{
    u64 value = 88172645463325252UL;

    for (u64 page = 0; page < PAGES; page++) {
        pattern[page] = page_alloc();
        for (u64 word = 0; word < 512; word++) {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            pattern[page][word] = value;
        }
    }
    expected = checksum();
}

/* Where tools find the list of frames. */
static void publish(void)
{
    u64 leaves = (start_info->nr_pages + 511) / 512;

    if (cmdline_flag("plain"))
        return;
    shared_info->max_pfn = start_info->nr_pages;
    if (cmdline_flag("tree")) {
        if (!tree_top) {
            tree_top = page_alloc();
            tree_middle = page_alloc();
        }
        for (u64 leaf = 0; leaf < leaves; leaf++)
            tree_middle[leaf] = va_to_mfn((u8 *)frame_list() + leaf * PAGE_SIZE);
        tree_top[0] = va_to_mfn(tree_middle);
        shared_info->p2m_cr3 = 0;
        shared_info->pfn_to_mfn_frame_list_list = va_to_mfn(tree_top);
    } else {
        shared_info->p2m_vaddr = start_info->mfn_list;
        shared_info->p2m_cr3 = va_to_mfn((void *)start_info->pt_base) << PAGE_SHIFT;
    }
}

static void give_back(u64 count)
{
    for (; count; count--) {
        void *page = page_alloc();
        u64 pfn = va_to_pfn(page), mfn = pfn_to_mfn(pfn);
        struct reservation r = {(u64)&mfn, 1, 0, 0, DOMID_SELF};

        if (map_page(page, 0) || HC2(memory_op, XENMEM_decrease_reservation, &r) != 1)
            panic("suspend: cannot give a page back\n");
        frame_list()[pfn] = ~0UL;
    }
}

static void second_main(void)
{
    u64 count = 0, copy;

    __asm__ volatile("movq %0, %%xmm5" : : "r"(0x0123456789abcdefUL));
    for (;;) {
        count++;
        __asm__ volatile("movq %%xmm5, %0" : "=r"(copy));
        if (copy != 0x0123456789abcdefUL || beats != count - 1)
            broken_beats++;
        beats = count;
        if (!(count & 1023))
            HC2(sched_op, SCHEDOP_yield, 0);
    }
}

static void bring_second_up(void)
{
    static struct context context;
    static u8 stack[8192] __attribute__((aligned(16)));

    if (HC3(vcpu_op, VCPUOP_is_up, 1, 0) < 0)
        return;
    context.flags = 4; /* VGCF_in_kernel */
    context.regs.rip = (u64)second_main;
    context.regs.cs = FLAT_CS64;
    context.regs.ss = context.kernel_ss = FLAT_SS64;
    context.regs.rsp = context.kernel_sp = (u64)stack + sizeof(stack) - 8;
    context.ctrlreg[3] = va_to_mfn((void *)start_info->pt_base) << PAGE_SHIFT;
    if (HC3(vcpu_op, VCPUOP_initialise, 1, &context) || HC3(vcpu_op, VCPUOP_up, 1, 0))
        panic("suspend: no second vCPU\n");
    second = 1;
}

static void connect(void)
{
    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    events_init();
    console_init();
    xenstore_init();
}

static void map_shared_info(void)
{
    if (map_page(shared_info, (start_info->shared_info & PTE_ADDR) | PTE_RW))
        shutdown(SHUTDOWN_crash);
}

static void report(s64 cancelled)
{
    u64 xmm, before = beats, end = system_time() + 5000000000UL;

    __asm__ volatile("movq %%xmm3, %0" : "=r"(xmm));
    while (second && beats < before + 5000 && system_time() < end)
        HC2(sched_op, SCHEDOP_yield, 0);
    if (xs_read("domid", text, sizeof(text)) < 0)
        panic("suspend: no domid\n");
    wakes++;
    printk("suspend: awake %lu, %s, domid %s, memory %s, vector %s, second %s, frames %s\n", wakes,
           cancelled ? "cancelled" : "elsewhere", text, checksum() == expected ? "good" : "BAD",
           xmm == 0xfedcba9876543210UL ? "good" : "BAD",
           !second ? "none" : beats >= before + 5000 && !broken_beats ? "good" : "BAD",
           mfn_to_pfn(va_to_mfn(pattern[3])) == va_to_pfn(pattern[3]) ? "good" : "BAD");
    xs_watch("control/shutdown", "control");
}

static void sleep_now(void)
{
    u32 reason = SHUTDOWN_suspend;
    u64 store = start_info->store_mfn, console = start_info->console_mfn, start = va_to_mfn(start_info);

    console_flush();
    events_mask();
    publish();
    start_info->store_mfn = mfn_to_pfn(store);
    start_info->console_mfn = mfn_to_pfn(console);
    if (!cmdline_flag("keep"))
        map_page(shared_info, 0);
    __asm__ volatile("movq %0, %%xmm3" : : "r"(0xfedcba9876543210UL));
    s64 cancelled = HC3(sched_op, SCHEDOP_shutdown, &reason, start);
    if (cancelled) {
        start_info->store_mfn = store;
        start_info->console_mfn = console;
    }
    map_shared_info();
    if (!cancelled)
        connect();
    events_unmask();
    report(cancelled);
}

static void obey(void)
{
    if (xs_read("control/shutdown", text, sizeof(text)) <= 0)
        return;
    xs_write("control/shutdown", ""); /* the acknowledgement */
    if (str_equal(text, "poweroff") || str_equal(text, "halt"))
        shutdown(SHUTDOWN_poweroff);
    if (str_equal(text, "reboot"))
        shutdown(SHUTDOWN_reboot);
    if (str_equal(text, "suspend"))
        sleep_now();
}

static int something_to_do(void)
{
    if (console_line(text, sizeof(text)) >= 0) {
        printk("echo: %s\n", text);
        return 1;
    }
    if (xs_event(path, sizeof(path))) {
        if (str_equal(path, "control/shutdown"))
            obey();
        return 1;
    }
    return 0;
}

void guest_main(void)
{
    const char *option = cmdline_option("balloon");

    fill();
    if (option)
        give_back(parse_number(option));
    bring_second_up();
    xenstore_init();
    xs_watch("control/shutdown", "control");
    printk("suspend: ready\n");
    if (cmdline_flag("now"))
        sleep_now();
    for (;;)
        wait_until(something_to_do);
}
