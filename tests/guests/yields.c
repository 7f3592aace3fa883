/* Yields for ever with events masked, as a boot loader does that waits for its disk. */
#include "guest.h"

void guest_main(void)
{
    printk("yields: spinning\n");
    console_flush();
    events_mask();
    for (;;)
        HC2(sched_op, SCHEDOP_yield, 0);
}
