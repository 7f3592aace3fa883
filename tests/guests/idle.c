/* Blocks for ever: what an idle domain costs. */
#include "guest.h"

static int never(void) { return 0; }

void guest_main(void)
{
    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    printk("idle: blocking\n");
    wait_until(never);
}
