/*
 * Asks `cpuid` natively and by forced emulation: both must say the same. Under a timer, so that many stops of the engine
 * come in between: one that meets an instruction may take Xen's leaves from it, but no feature may come or go.
 *
 * Command line: `popcnt=0` when the policy took popcnt away, `count=N` rounds (default 2000).
 */
#include "guest.h"

struct words { u32 a, b, c, d; };

static volatile u64 fired;
static void on_timer(void)
{
    fired++;
    timer_set(system_time() + 1000000UL);
}

static struct words once(u32 leaf, u32 subleaf)
{
    struct words w;
    __asm__ volatile("cpuid" : "=a"(w.a), "=b"(w.b), "=c"(w.c), "=d"(w.d) : "0"(leaf), "2"(subleaf));
    return w;
}

static struct words forced(u32 leaf, u32 subleaf)
{
    struct words w;
    __asm__ volatile("ud2\n\t.ascii \"xen\"\n\tcpuid"
                     : "=a"(w.a), "=b"(w.b), "=c"(w.c), "=d"(w.d) : "0"(leaf), "2"(subleaf));
    return w;
}

static int same(struct words x, struct words y) { return x.a == y.a && x.b == y.b && x.c == y.c && x.d == y.d; }

/* What two in a row agree on. */
static struct words native(u32 leaf, u32 subleaf)
{
    struct words first, second = once(leaf, subleaf);

    do {
        first = second;
        second = once(leaf, subleaf);
    } while (!same(first, second));
    return first;
}

void guest_main(void)
{
    static const u32 leaves[] = {0, 1, 2, 4, 5, 7, 0xb, 0xd, 0x14, 0x40000000, 0x40000001, 0x40000002, 0x40000005,
                                 0x40000100, 0x80000000, 0x80000001, 0x80000002, 0x80000007, 0x80000008, 0x80000009};
    const char *option = cmdline_option("popcnt");
    const char *rounds = cmdline_option("count");
    int hidden = option && *option == '0';
    u64 count = rounds ? parse_number(rounds) : 2000, wrong = 0;

    check_begin("cpuid");
    for (unsigned i = 0; i < sizeof(leaves) / sizeof(*leaves); i++)
        for (u32 subleaf = 0; subleaf < 2; subleaf++)
            check(same(native(leaves[i], subleaf), forced(leaves[i], subleaf)), label("leaf %x %u", leaves[i], subleaf));
    struct words xen = native(0x40000000, 0);
    check(xen.b == 0x566e6558 && xen.c == 0x65584d4d && xen.d == 0x4d4d566e, "native cpuid names Xen");
    check(native(1, 0).c >> 31, "a hypervisor is there");
    check_value("popcnt is shown", native(1, 0).c >> 23 & 1, !hidden);
    PROBE("popcnt %%rax, %%rax", "i"(0));
    check_value("popcnt", trap_seen.count ? (s64)trap_seen.vector : -1, hidden ? 6 : -1);
    /* A stop that is under way must not make an instruction tell something else of the features. */
    struct words features = native(1, 0);
    timer_init(on_timer);
    timer_set(system_time() + 1000000UL);
    for (u64 n = 0; n < count; n++) {
        struct words now = once(1, 0);
        wrong += now.c != features.c || now.d != features.d;
        wrong += (once(0x80000001, 0).d >> 29 & 1) != 1;
    }
    check_value("answers that changed", wrong, 0);
    u64 before = fired;
    while (fired < before + 2)
        barrier();
    if (!check_end())
        printk("cpuid: OK\n");
    shutdown(SHUTDOWN_poweroff);
}
