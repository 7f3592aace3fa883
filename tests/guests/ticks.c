/*
 * Takes timer events at 100 Hz and checks the clock: it never goes back, and a timer never fires early.
 *
 * Command line: `count=N` (default 20).
 */
#include "guest.h"

#define PERIOD 10000000UL

static volatile u64 fired;
static u64 clock_at_event;

static void on_timer(void)
{
    clock_at_event = system_time();
    fired++;
}

static u64 awaited;
static int has_fired(void) { return fired >= awaited; }

static int clock_is_monotonic(void)
{
    u64 before = system_time();
    for (int i = 0; i < 2000; i++) {
        u64 now = system_time();
        if (now < before) {
            printk("clock went from %lu to %lu\n", before, now);
            return 0;
        }
        before = now;
    }
    return 1;
}

void guest_main(void)
{
    const char *option = cmdline_option("count");
    u64 count = option ? parse_number(option) : 20;
    u64 worst = 0, sum = 0, early = 0, before = 0, back = 0;

    check_begin("ticks");
    timer_init(on_timer);
    u64 start = system_time();
    u64 deadline = start + PERIOD;
    for (awaited = 1; awaited <= count; awaited++) {
        timer_set(deadline);
        wait_until(has_fired);
        if (clock_at_event < deadline)
            early++;
        if (clock_at_event < before)
            back++;
        before = clock_at_event;
        u64 late = clock_at_event - deadline;
        sum += late;
        if (late > worst)
            worst = late;
        deadline += PERIOD;
    }
    u64 took = system_time() - start;
    printk("ticks: %lu in %lu us, late by %lu us on average and %lu us at worst\n", count, took / 1000,
           sum / count / 1000, worst / 1000);
    check_value("no timer fires before its deadline", (s64)early, 0);
    check_value("time at events never goes back", (s64)back, 0);
    check_value("one event for one deadline", (s64)fired, (s64)count);
    check(took >= count * PERIOD, "the clock ran at least as long as the timers");
    check(clock_is_monotonic(), "the clock is monotonic");
    timer_set(system_time() + PERIOD);
    awaited = count + 1;
    timer_set(0);
    u64 until = system_time() + 3 * PERIOD;
    while (system_time() < until)
        HC2(sched_op, SCHEDOP_yield, 0);
    check_value("a stopped timer does not fire", (s64)fired, (s64)count);
    timer_set(1);
    wait_until(has_fired);
    check(1, "a deadline in the past fires at once");
    if (!check_end())
        printk("ticks: OK\n");
}
