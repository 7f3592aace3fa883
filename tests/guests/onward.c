/*
 * Goes on for as long as it is left to, and looks at each tick whether all it ever set is still what it was: vector and
 * x87 registers, the bases of FS and GS, a descriptor table and an LDT, debug registers, memory, the clock, its ports.
 *
 * Command line: `count=N` ticks (default 40).
 */
#include "guest.h"

#define PERIOD 10000000UL
enum { SEGBASE_FS = 0, SEGBASE_GS_USER = 1 };
#define PATTERN(n) ((n) * 0x9e3779b97f4a7c15UL)

static volatile u64 fired;
static u64 awaited, pages_wrong;
static u64 *pages[16], *descriptors;
static u16 x87_control = 0x027f, x87_found;
static double x87_value = 1.0 / 3, x87_back;

static void on_timer(void) { fired++; }
static int has_fired(void) { return fired >= awaited; }

static void set_all(void)
{
    u64 frame;
    struct { u64 a, b; } __attribute__((aligned(16))) vector = {PATTERN(1), PATTERN(2)};

    for (u64 n = 0; n < 16; n++) {
        pages[n] = page_alloc();
        for (u64 i = 0; i < 512; i++)
            pages[n][i] = PATTERN(n * 512 + i);
    }
    descriptors = page_alloc();
    descriptors[1] = 0x00aff3000000ffffUL & ~(1UL << 53); /* data, DPL 3 */
    make_readonly(descriptors);
    frame = va_to_mfn(descriptors);
    check_value("set_gdt", HC2(set_gdt, &frame, 512), 0);
    check_value("set_segment_base fs", HC2(set_segment_base, SEGBASE_FS, PATTERN(3) & 0x7fffffffff00UL), 0);
    check_value("set_segment_base user gs", HC2(set_segment_base, SEGBASE_GS_USER, 0x123456789000UL), 0);
    check_value("set_debugreg", HC2(set_debugreg, 0, 0x1234), 0);
    __asm__ volatile("fninit\n\tfldcw %0\n\tfldl %1" : : "m"(x87_control), "m"(x87_value));
    __asm__ volatile("movdqa %0, %%xmm7\n\tmovdqa %0, %%xmm15" : : "m"(vector));
}

static int all_is_there(void)
{
    struct { u64 a, b; } __attribute__((aligned(16))) low, high;
    u64 fs_low, fs_high, wrong = 0;

    __asm__ volatile("movdqa %%xmm7, %0\n\tmovdqa %%xmm15, %1" : "=m"(low), "=m"(high));
    wrong |= low.a != PATTERN(1) || low.b != PATTERN(2) || high.a != PATTERN(1) || high.b != PATTERN(2);
    __asm__ volatile("fnstcw %0\n\tfstl %1" : "=m"(x87_found), "=m"(x87_back));
    wrong |= (x87_found != x87_control || *(u64 *)&x87_back != *(u64 *)&x87_value) << 1;
    __asm__ volatile("movl $0xc0000100, %%ecx\n\trdmsr" : "=a"(fs_low), "=d"(fs_high) : : "ecx");
    wrong |= ((fs_low & 0xffffffff) | fs_high << 32) != (PATTERN(3) & 0x7fffffffff00UL) ? 4 : 0;
    wrong |= HC1(get_debugreg, 0) != 0x1234 ? 8 : 0;
    for (u64 n = 0; n < 16; n++)
        for (u64 i = 0; i < 512; i++)
            pages_wrong += pages[n][i] != PATTERN(n * 512 + i);
    wrong |= pages_wrong ? 16 : 0;
    __asm__ volatile("movl %0, %%es" : : "r"(8 | 3)); /* faults if the table is gone */
    __asm__ volatile("movl %0, %%es" : : "r"(0));
    wrong |= make_writable(descriptors) == 0 ? 32 : 0; /* still held as descriptors */
    if (wrong)
        printk("onward: wrong %lx\n", wrong);
    return !wrong;
}

void guest_main(void)
{
    const char *option = cmdline_option("count");
    u64 count = option ? parse_number(option) : 40, lost = 0, back = 0, before = 0;

    check_begin("onward");
    timer_init(on_timer);
    set_all();
    u64 deadline = system_time() + PERIOD;
    for (awaited = 1; awaited <= count; awaited++) {
        timer_set(deadline);
        wait_until(has_fired);
        u64 now = system_time();
        back += now < before;
        before = now;
        lost += !all_is_there();
        if (awaited % 5 == 0)
            printk("onward: tick %lu\n", awaited);
        deadline = now + PERIOD;
    }
    check_value("ticks after which something was lost", lost, 0);
    check_value("times the clock went back", back, 0);
    check_end();
    shutdown(SHUTDOWN_poweroff);
}
