/* Event channels, two-level ABI unless a guest brings another one, vCPU 0. */
#include "guest.h"

#define MAX_PORTS 256

static void (*handlers[MAX_PORTS])(u32 port);
void (*event_scan)(void);
extern char event_entry[], failsafe_entry[], syscall_entry[];

static struct vcpu_info *vcpu(void) { return &shared_info->vcpu_info[0]; }

void events_init(void)
{
    struct callback_register events = {CALLBACKTYPE_event, CALLBACKF_mask_events, (u64)event_entry};
    struct callback_register failsafe = {CALLBACKTYPE_failsafe, 0, (u64)failsafe_entry};
    struct callback_register syscalls = {CALLBACKTYPE_syscall, CALLBACKF_mask_events, (u64)syscall_entry};

    for (int i = 0; i < 64; i++)
        shared_info->evtchn_mask[i] = ~0UL;
    if (HC2(callback_op, CALLBACKOP_register, &events) || HC2(callback_op, CALLBACKOP_register, &failsafe) ||
        HC2(callback_op, CALLBACKOP_register, &syscalls))
        shutdown(SHUTDOWN_crash);
    events_unmask();
}

void events_mask(void)
{
    *(volatile u8 *)&vcpu()->evtchn_upcall_mask = 1;
    barrier();
}

void events_unmask(void)
{
    barrier();
    *(volatile u8 *)&vcpu()->evtchn_upcall_mask = 0;
    barrier();
    if (*(volatile u8 *)&vcpu()->evtchn_upcall_pending)
        HC2(xen_version, XENVER_version, 0); /* any hypercall delivers what came while masked */
}

void event_listen(u32 port, void (*handler)(u32 port))
{
    if (port >= MAX_PORTS)
        panic("event port %u is beyond this guest's table\n", port);
    handlers[port] = handler;
    HC2(event_channel_op, EVTCHNOP_unmask, &port);
}

void event_send(u32 port) { HC2(event_channel_op, EVTCHNOP_send, &port); }

void event_deliver(u32 port)
{
    if (port < MAX_PORTS && handlers[port])
        handlers[port](port);
}

/* Called with events masked by Xen; the iret after it unmasks. */
void event_upcall(void)
{
    while (__atomic_exchange_n(&vcpu()->evtchn_upcall_pending, 0, __ATOMIC_SEQ_CST)) {
        if (event_scan) {
            event_scan();
            continue;
        }
        u64 selectors = __atomic_exchange_n(&vcpu()->evtchn_pending_sel, 0UL, __ATOMIC_SEQ_CST);
        for (u32 word = 0; word < 64; word++) {
            if (!(selectors >> word & 1))
                continue;
            u64 *pending = &shared_info->evtchn_pending[word];
            u64 ready = *(volatile u64 *)pending & ~shared_info->evtchn_mask[word];
            __atomic_fetch_and(pending, ~ready, __ATOMIC_SEQ_CST);
            for (u32 bit = 0; bit < 64; bit++) {
                if (ready >> bit & 1)
                    event_deliver(word * 64 + bit);
            }
        }
    }
}

void wait_until(int (*ready)(void))
{
    events_mask();
    while (!ready()) {
        HC2(sched_op, SCHEDOP_block, 0); /* unmasks, and does not sleep when something is pending */
        events_mask();
    }
    events_unmask();
}
