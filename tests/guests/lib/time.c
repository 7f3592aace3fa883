/* The paravirtual clock (struct vcpu_time_info) and the one-shot timer. */
#include "guest.h"

static void (*on_timer)(void);

u64 system_time(void)
{
    volatile struct vcpu_time_info *t = &shared_info->vcpu_info[0].time;
    u32 version;
    u64 ns;

    do {
        u32 low, high;
        version = t->version;
        barrier();
        __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
        u64 delta = ((u64)high << 32 | low) - t->tsc_timestamp;
        s8 shift = t->tsc_shift;
        delta = shift < 0 ? delta >> -shift : delta << shift;
        ns = t->system_time + (u64)((unsigned __int128)delta * t->tsc_to_system_mul >> 32);
        barrier();
    } while (version & 1 || version != t->version);
    return ns;
}

static void timer_event(u32 port)
{
    (void)port;
    if (on_timer)
        on_timer();
}

void timer_init(void (*handler)(void))
{
    struct evtchn_bind_virq bind = {.virq = VIRQ_TIMER, .vcpu = 0};

    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0); /* a PV vCPU starts with a 100 Hz tick */
    on_timer = handler;
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_virq, &bind);
    if (rc)
        panic("binding VIRQ_TIMER failed: %ld\n", rc);
    event_listen(bind.port, timer_event);
}

s64 timer_set(u64 deadline) { return HC1(set_timer_op, deadline); }
