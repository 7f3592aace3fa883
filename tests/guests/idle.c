/* Blocks for ever: what an idle domain costs. With `ticking` it never stops the tick that it started with. */
#include "guest.h"

static int never(void) { return 0; }

void guest_main(void)
{
    if (cmdline_flag("ticking")) {
        struct evtchn_bind_virq bind = {.virq = VIRQ_TIMER, .vcpu = 0};
        HC2(event_channel_op, EVTCHNOP_bind_virq, &bind);
    } else {
        HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    }
    printk("idle: blocking\n");
    wait_until(never);
}
