/*
 * Sets a watchdog of one second and lets it run out: the domain ends with reason watchdog.
 *
 * Command line: `stop` stops it in time; the guest then powers off.
 */
#include "guest.h"

static s64 watchdog(u32 id, u32 seconds)
{
    struct {
        u32 id, timeout;
    } args = {id, seconds};
    return HC2(sched_op, SCHEDOP_watchdog, &args);
}

static int never(void) { return 0; }

void guest_main(void)
{
    s64 id = watchdog(0, 1);

    printk("watchdog: set, %d\n", (int)id);
    if (cmdline_flag("stop")) {
        watchdog(id, 0);
        shutdown(SHUTDOWN_poweroff);
    }
    wait_until(never);
}
