/*
 * Event channels, polling, the one-shot timer and memory reservations of a domain that is alone: cores that other guests
 * only use. Expectations follow Xen's common/event_channel.c, common/sched/core.c and common/memory.c.
 */
#include "guest.h"

enum {
    EVTCHNOP_bind_interdomain = 0,
    EVTCHNOP_status = 5,
    EVTCHNOP_bind_ipi = 7,
    EVTCHNOP_bind_vcpu = 8,
    VCPUOP_set_singleshot_timer = 8,
    XENMEM_decrease_reservation = 1,
    XENMEM_current_reservation = 3,
    XENMEM_maximum_reservation = 4,
    XENMEM_exchange = 11,
    XENMEM_populate_physmap = 6,
};

static u32 counts[256];
static void count(u32 port) { counts[port]++; }

static int is_set(const u64 *bits, u32 port) { return *(volatile const u64 *)&bits[port / 64] >> port % 64 & 1; }

static s64 send(u32 port) { return HC2(event_channel_op, EVTCHNOP_send, &port); }

static s64 close(u32 port) { return HC2(event_channel_op, EVTCHNOP_close, &port); }

static s64 bind_virq(u32 virq, u32 vcpu)
{
    struct evtchn_bind_virq bind = {.virq = virq, .vcpu = vcpu};
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_virq, &bind);
    return rc ? rc : (s64)bind.port;
}

static s64 bind_ipi(u32 vcpu)
{
    struct {
        u32 vcpu, port;
    } bind = {.vcpu = vcpu};
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_ipi, &bind);
    return rc ? rc : (s64)bind.port;
}

static s64 alloc_unbound(u16 dom, u16 remote)
{
    struct {
        u16 dom, remote_dom;
        u32 port;
    } alloc = {dom, remote, 0};
    s64 rc = HC2(event_channel_op, EVTCHNOP_alloc_unbound, &alloc);
    return rc ? rc : (s64)alloc.port;
}

static s64 bind_interdomain(u16 remote, u32 remote_port)
{
    struct {
        u16 remote_dom;
        u32 remote_port, local_port;
    } bind = {remote, remote_port, 0};
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_interdomain, &bind);
    return rc ? rc : (s64)bind.local_port;
}

static s64 status(u32 port)
{
    struct {
        u16 dom;
        u32 port, status, vcpu, more[2];
    } query = {.dom = DOMID_SELF, .port = port};
    s64 rc = HC2(event_channel_op, EVTCHNOP_status, &query);
    return rc ? rc : (s64)query.status;
}

static void ports(void)
{
    s64 ipi = bind_ipi(0);

    check(ipi > 0 && ipi < 256, "an IPI port");
    event_listen((u32)ipi, count);
    check_value("it can be sent to", send((u32)ipi), 0);
    check_value("and arrives at once", counts[ipi], 1);
    events_mask();
    send((u32)ipi);
    send((u32)ipi);
    check_value("with upcalls masked it waits", counts[ipi], 1);
    check(is_set(shared_info->evtchn_pending, (u32)ipi) && shared_info->vcpu_info[0].evtchn_upcall_pending,
          "and is pending");
    events_unmask();
    check_value("and arrives once when unmasked", counts[ipi], 2);
    __atomic_fetch_or(&shared_info->evtchn_mask[ipi / 64], 1UL << ipi % 64, __ATOMIC_SEQ_CST);
    send((u32)ipi);
    check(counts[ipi] == 2 && is_set(shared_info->evtchn_pending, (u32)ipi), "a masked port only becomes pending");
    u32 port = (u32)ipi;
    check_value("unmask it by hypercall", HC2(event_channel_op, EVTCHNOP_unmask, &port), 0);
    check_value("which delivers it", counts[ipi], 3);
    check_value("status: IPI", status((u32)ipi), 5);
    check_value("close it", close((u32)ipi), 0);
    check_value("status: closed", status((u32)ipi), 0);
    check_value("refused: close it twice", close((u32)ipi), -XEN_EINVAL);
    check_value("refused: send to a closed port", send((u32)ipi), -XEN_EINVAL);
    check_value("refused: send to port 0", send(0), -XEN_EINVAL);
    check_value("refused: send to port 4096", send(4096), -XEN_EINVAL);
    check_value("refused: send to the last port number", send(~0U), -XEN_EINVAL);
    check_value("refused: close port 0", close(0), -XEN_EINVAL);
    check_value("refused: close the last port number", close(~0U), -XEN_EINVAL);
    check_value("refused: IPI to a vCPU that is not there", bind_ipi(7), -XEN_ENOENT);
    check_value("refused: unmask of no port", (port = 4096, HC2(event_channel_op, EVTCHNOP_unmask, &port)), -XEN_EINVAL);

    s64 virq = bind_virq(VIRQ_TIMER, 0);
    check(virq > 0, "a VIRQ port");
    check_value("refused: the same VIRQ twice", bind_virq(VIRQ_TIMER, 0), -XEN_EEXIST);
    check_value("refused: a VIRQ that is none", bind_virq(24, 0), -XEN_EINVAL);
    check_value("refused: a VIRQ on a vCPU that is not there", bind_virq(1, 9), -XEN_ENOENT);
    check_value("refused: send to a VIRQ port", send((u32)virq), -XEN_EINVAL);
    check_value("status: VIRQ", status((u32)virq), 4);
    check_value("close it", close((u32)virq), 0);
    check(bind_virq(VIRQ_TIMER, 0) == virq, "the lowest free port is given again");
    close((u32)virq);
    check_value("status: interdomain", status(start_info->console_evtchn), 2);
}

static void pairs(void)
{
    s64 left = alloc_unbound(DOMID_SELF, DOMID_SELF);

    check(left > 0, "an unbound port for itself");
    check_value("status: unbound", status((u32)left), 1);
    check_value("a send to it is dropped", send((u32)left), 0);
    check_value("refused: bind to a port that is not unbound", bind_interdomain(DOMID_SELF, start_info->console_evtchn), -XEN_EINVAL);
    check_value("refused: bind to port 4096", bind_interdomain(DOMID_SELF, 4096), -XEN_EINVAL);
    check_value("refused: bind to a domain that is not there", bind_interdomain(0x1234, 1), -XEN_ESRCH);
    s64 right = bind_interdomain(DOMID_SELF, (u32)left);
    check(right > 0 && right != left, "its other end");
    event_listen((u32)left, count);
    u32 before = counts[left];
    event_listen((u32)right, count);
    check(is_set(shared_info->evtchn_pending, (u32)right) == 0, "what was pending from the binding is delivered");
    u32 before_right = counts[right];
    check_value("send from the right", send((u32)right), 0);
    check_value("arrives left", counts[left] - before, 1);
    check_value("send from the left", send((u32)left), 0);
    check_value("arrives right", counts[right] - before_right, 1);
    check_value("refused: bind it a second time", bind_interdomain(DOMID_SELF, (u32)left), -XEN_EINVAL);
    check_value("close one end", close((u32)right), 0);
    check_value("the other is unbound again", status((u32)left), 1);
    check_value("close that too", close((u32)left), 0);
    check_value("refused: a port of another domain's", alloc_unbound(0x1234, DOMID_SELF), -XEN_ESRCH);
}

static s64 poll(const u32 *list, u32 n, u64 timeout)
{
    struct sched_poll args = {.ports = (u64)list, .nr_ports = n, .timeout = timeout};
    return HC2(sched_op, SCHEDOP_poll, &args);
}

static void polling(void)
{
    u32 ipi = (u32)bind_ipi(0), bad = 4096;
    u64 start;

    events_mask();
    send(ipi); /* its mask bit is set: nobody listens */
    start = system_time();
    check_value("poll of a pending port returns at once", poll(&ipi, 1, 0), 0);
    check(system_time() - start < 1000000000UL, "at once");
    __atomic_fetch_and(&shared_info->evtchn_pending[ipi / 64], ~(1UL << ipi % 64), __ATOMIC_SEQ_CST);
    start = system_time();
    check_value("poll with a timeout", poll(&ipi, 1, start + 5000000), 0);
    check(system_time() - start >= 5000000, "lasts that long");
    check_value("poll of nothing with a timeout", poll(NULL, 0, system_time() + 1000000), 0);
    check_value("poll with a timeout in the past", poll(&ipi, 1, 1), 0);
    check_value("refused: poll of port 4096", poll(&bad, 1, system_time() + 1000000), -XEN_EINVAL);
    check_value("refused: poll of 129 ports", poll(&ipi, 129, system_time() + 1000000), -XEN_EINVAL);
    check_value("refused: poll of ports nowhere", poll((u32 *)0x5000, 1, system_time() + 1000000), -XEN_EFAULT);
    events_unmask();
    close(ipi);
}

static u64 ticked;
static void on_timer(void) { ticked++; }
static int has_ticked(void) { return ticked != 0; }

static s64 singleshot(u64 deadline, u32 flags)
{
    struct {
        u64 deadline;
        u32 flags;
    } args = {deadline, flags};
    return HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, &args);
}

static void timers(void)
{
    timer_init(on_timer);
    check_value("a one-shot timer by vcpu_op", singleshot(system_time() + 2000000, 0), 0);
    wait_until(has_ticked);
    ticked = 0;
    s64 rc = singleshot(1, 1);
    check_value("in the past; the flag against that is no longer heeded", rc, 0);
    if (rc)
        singleshot(1, 0);
    wait_until(has_ticked);
    check(1, "which fires");
    ticked = 0;
    timer_set(system_time() + 1000000000000UL);
    check_value("a nearer deadline replaces a far one", timer_set(system_time() + 1000000), 0);
    wait_until(has_ticked);
    check(1, "which fires");
}

static s64 reservation(u64 operation, u64 *frame, u64 n)
{
    struct {
        u64 extent_start, nr_extents;
        u32 extent_order, mem_flags;
        u16 domid;
    } args = {(u64)frame, n, 0, 0, DOMID_SELF};
    return HC2(memory_op, operation, &args);
}

static void reservations(void)
{
    u16 self = DOMID_SELF;
    u8 *page = page_alloc();
    u64 frame = va_to_mfn(page), old = frame, pfn = va_to_pfn(page), bad = 0;
    s64 before = HC2(memory_op, XENMEM_current_reservation, &self);

    check(before > 0 && before <= HC2(memory_op, XENMEM_maximum_reservation, &self), "the reservation is below its bound");
    check_value("refused: give back frame 0", reservation(XENMEM_decrease_reservation, &bad, 1), 0);
    bad = ~0UL;
    check_value("refused: give back no frame", reservation(XENMEM_decrease_reservation, &bad, 1), 0);
    map_page(page, 0);
    check_value("give back a page", reservation(XENMEM_decrease_reservation, &frame, 1), 1);
    check_value("the reservation is smaller", HC2(memory_op, XENMEM_current_reservation, &self), before - 1);
    check_value("refused: give it back twice", reservation(XENMEM_decrease_reservation, &frame, 1), 0);
    s64 rc = map_page(page, pte_of(old, PTE_RW));
    check(rc == -XEN_EBUSY || rc == -XEN_EINVAL, label("refused: map what was given back (%ld)", rc));
    frame = pfn;
    check_value("take one", reservation(XENMEM_populate_physmap, &frame, 1), 1);
    ((u64 *)start_info->mfn_list)[pfn] = frame;
    check_value("the M2P knows it", (s64)((volatile u64 *)M2P_VIRT_START)[frame], (s64)pfn);
    check_value("it can be mapped", map_page(page, pte_of(frame, PTE_RW)), 0);
    int empty = 1;
    for (int i = 0; i < 512; i++)
        empty = empty && ((volatile u64 *)page)[i] == 0;
    check(empty, "it is empty");
    check_value("the reservation is as before", HC2(memory_op, XENMEM_current_reservation, &self), before);
}

/* Frames that are given back while they are mapped stay until they are not. */
static void held_frames(void)
{
    u16 self = DOMID_SELF;
    u8 *page = page_alloc();
    u64 frame = va_to_mfn(page), old = frame, pfn = va_to_pfn(page), other;
    s64 before = HC2(memory_op, XENMEM_current_reservation, &self);

    page[5] = 0x77;
    check_value("give back a mapped page", reservation(XENMEM_decrease_reservation, &frame, 1), 1);
    check_value("it is still counted", HC2(memory_op, XENMEM_current_reservation, &self), before);
    check_value("and still there", *(volatile u8 *)(page + 5), 0x77);
    other = pfn;
    s64 taken = reservation(XENMEM_populate_physmap, &other, 1);
    check(taken == 0 || (taken == 1 && other != old), "nobody gets it meanwhile");
    if (taken == 1)
        check_value("give the other one back", reservation(XENMEM_decrease_reservation, &other, 1), 1);
    check_value("it goes with its mapping", map_page(page, 0), 0);
    check_value("it is not counted any more", HC2(memory_op, XENMEM_current_reservation, &self), before - 1);
    check(map_page(page, pte_of(old, PTE_RW)) != 0, "refused: map it again");
    frame = pfn;
    check_value("take one", reservation(XENMEM_populate_physmap, &frame, 1), 1);
    ((u64 *)start_info->mfn_list)[pfn] = frame;
    check_value("it can be mapped", map_page(page, pte_of(frame, PTE_RW)), 0);
    check_value("it is empty", *(volatile u8 *)(page + 5), 0);
}

static struct {
    struct {
        u64 extent_start, nr_extents;
        u32 extent_order, mem_flags;
        u16 domid;
    } in, out;
    u64 nr_exchanged;
} trade;

static s64 exchange(u64 *frames, u64 n, u64 *names)
{
    trade.in.extent_start = (u64)frames;
    trade.out.extent_start = (u64)names;
    trade.in.nr_extents = trade.out.nr_extents = n;
    trade.in.domid = trade.out.domid = DOMID_SELF;
    trade.nr_exchanged = 0;
    return HC2(memory_op, XENMEM_exchange, &trade);
}

static void exchanges(void)
{
    u8 *page = page_alloc();
    u64 frame = va_to_mfn(page), pfn = va_to_pfn(page), name = pfn;

    page[5] = 0x78;
    check_value("refused: exchange a mapped page", exchange(&frame, 1, &name), -XEN_EINVAL);
    check_value("and none is", trade.nr_exchanged, 0);
    map_page(page, 0);
    check_value("exchange a page", exchange(&frame, 1, &name), 0);
    check_value("one is", trade.nr_exchanged, 1);
    ((u64 *)start_info->mfn_list)[pfn] = name;
    check_value("the M2P knows the new one", (s64)((volatile u64 *)M2P_VIRT_START)[name], (s64)pfn);
    if (name != frame)
        check(map_page(page, pte_of(frame, PTE_RW)) != 0, "refused: map the old one");
    check_value("the new one can be mapped", map_page(page, pte_of(name, PTE_RW)), 0);
    check_value("it is empty", *(volatile u8 *)(page + 5), 0);
}

static s64 watchdog(u32 id, u32 seconds)
{
    struct {
        u32 id, timeout;
    } args = {id, seconds};
    return HC2(sched_op, SCHEDOP_watchdog, &args);
}

static void watchdogs(void)
{
    check_value("refused: a watchdog that is not in use", watchdog(1, 5), -XEN_EINVAL);
    check_value("a watchdog", watchdog(0, 1000), 1);
    check_value("a second one", watchdog(0, 1000), 2);
    check_value("refused: a third one", watchdog(0, 1000), -XEN_ENOSPC);
    check_value("set one anew", watchdog(1, 2000), 0);
    check_value("stop it", watchdog(1, 0), 0);
    check_value("stop the other", watchdog(2, 0), 0);
    check_value("refused: stop it twice", watchdog(2, 0), -XEN_EINVAL);
}

void guest_main(void)
{
    check_begin("channels");
    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    ports();
    pairs();
    polling();
    timers();
    reservations();
    held_frames();
    exchanges();
    watchdogs();
    if (cmdline_flag("bite")) {
        watchdog(0, 0);
        for (;;)
            __asm__ volatile("");
    }
    if (!check_end())
        printk("channels: OK\n");
}
