/*
 * The FIFO event ABI: the way there from two-level, priorities, masks, ports that stay busy, words full of noise, and
 * the way back. Expectations follow Xen's common/event_fifo.c and common/event_channel.c.
 *
 * Needs `console_io` on the command line: the reset at the end closes the console's port too.
 */
#include "guest.h"

enum {
    EVTCHNOP_status = 5,
    EVTCHNOP_bind_ipi = 7,
    EVTCHNOP_reset = 10,
    EVTCHNOP_init_control = 11,
    EVTCHNOP_expand_array = 12,
    EVTCHNOP_set_priority = 13,
};

#define PENDING (1U << 31)
#define MASKED (1U << 30)
#define LINKED (1U << 29)
#define LINK_MASK 0x1ffffU

struct control_block {
    u32 ready, reserved, head[16];
};
static struct control_block *control;
static u32 *words;
static u32 heads[16];

static u32 log[64];
static u32 logged;

static void record(u32 port)
{
    if (logged < 64)
        log[logged] = port;
    logged++;
}

/* One event off a queue, as the public header wants it; false when that was the last. */
static int take(u32 queue)
{
    u32 port = heads[queue] ? heads[queue] : __atomic_load_n(&control->head[queue], __ATOMIC_SEQ_CST);
    u32 word = __atomic_load_n(&words[port % 1024], __ATOMIC_SEQ_CST);

    while (!__atomic_compare_exchange_n(&words[port % 1024], &word, word & ~(LINKED | LINK_MASK), 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
        ;
    heads[queue] = word & LINK_MASK;
    if (word & PENDING && !(word & MASKED)) {
        __atomic_fetch_and(&words[port % 1024], ~PENDING, __ATOMIC_SEQ_CST);
        event_deliver(port);
    }
    return heads[queue] != 0;
}

static void scan(void)
{
    u32 ready = __atomic_exchange_n(&control->ready, 0, __ATOMIC_SEQ_CST);

    while (ready) {
        u32 queue = (u32)__builtin_ctz(ready);
        if (!take(queue))
            ready &= ~(1U << queue);
        ready |= __atomic_exchange_n(&control->ready, 0, __ATOMIC_SEQ_CST);
    }
}

static s64 on_port(u32 operation, u32 port) { return HC2(event_channel_op, operation, &port); }

static s64 bind_ipi(void)
{
    u32 bind[2] = {0, 0};
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_ipi, bind);
    return rc ? rc : (s64)bind[1];
}

static s64 set_priority(u32 port, u32 priority)
{
    u32 set[2] = {port, priority};
    return HC2(event_channel_op, EVTCHNOP_set_priority, set);
}

static u8 link_bits;
static s64 init_control(u64 frame, u32 offset, u32 vcpu)
{
    struct {
        u64 frame;
        u32 offset, vcpu;
        u8 link_bits, pad[7];
    } init = {frame, offset, vcpu, 0, {0}};
    s64 rc = HC2(event_channel_op, EVTCHNOP_init_control, &init);
    link_bits = init.link_bits;
    return rc;
}

static s64 expand_array(u64 frame) { return HC2(event_channel_op, EVTCHNOP_expand_array, &frame); }

static u32 listening(void)
{
    s64 port = bind_ipi();
    if (port <= 0)
        panic("fifo: no port: %ld\n", port);
    event_listen((u32)port, record);
    return (u32)port;
}

static void start(u8 *page, u8 *array)
{
    u64 table = va_to_mfn((void *)start_info->pt_base);
    u32 early = (u32)bind_ipi();

    check_value("refused: priority without FIFO", set_priority(early, 3), -XEN_ENOSYS);
    check_value("refused: the array before a control block", expand_array(va_to_mfn(array)), -XEN_EOPNOTSUPP);
    check_value("refused: a vCPU that is not there", init_control(va_to_mfn(page), 0, 99), -XEN_ENOENT);
    check_value("refused: a block over the page's end", init_control(va_to_mfn(page), 4096 - 64, 0), -XEN_EINVAL);
    check_value("refused: a block not aligned", init_control(va_to_mfn(page), 4, 0), -XEN_EINVAL);
    check_value("refused: no frame", init_control(~0UL, 0, 0), -XEN_EINVAL);
    check_value("refused: a page table", init_control(table, 0, 0), -XEN_EINVAL);
    on_port(EVTCHNOP_unmask, early);
    events_mask();
    on_port(EVTCHNOP_send, early);
    event_listen(early, record);
    check_value("a control block", init_control(va_to_mfn(page), 64, 0), 0);
    check_value("17 bits of link", link_bits, 17);
    check_value("refused: a second one", init_control(va_to_mfn(page), 1024, 0), -XEN_EINVAL);
    check_value("refused: an array page that is no frame", expand_array(~0UL >> 12), -XEN_EINVAL);
    check_value("refused: an array page that is a page table", expand_array(table), -XEN_EINVAL);
    check_value("a page of the array", expand_array(va_to_mfn(array)), 0);
    check(words[early] == (PENDING | LINKED), "what was pending before is pending there");
    event_scan = scan;
    events_unmask();
    check(logged == 1 && log[0] == early, "and arrives");
    check_value("close it", on_port(EVTCHNOP_close, early), 0);
}

static void frames(u8 *array)
{
    check_value("its page can be mapped read-only", make_readonly(array), 0);
    check_value("refused: and be made a page table", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(array), 0), -XEN_EINVAL);
    check_value("writable again", make_writable(array), 0);
}

static void priorities(void)
{
    u32 low = listening(), middle = listening(), high = listening(), also = listening();

    check_value("the highest priority", set_priority(high, 0), 0);
    check_value("the lowest", set_priority(low, 15), 0);
    check_value("refused: one below", set_priority(low, 16), -XEN_EINVAL);
    check_value("refused: of a closed port", set_priority(also + 1, 1), -XEN_EACCES);
    check_value("refused: of port 4096", set_priority(4096, 1), -XEN_EINVAL);
    logged = 0;
    events_mask();
    on_port(EVTCHNOP_send, low);
    on_port(EVTCHNOP_send, middle);
    on_port(EVTCHNOP_send, also);
    on_port(EVTCHNOP_send, middle);
    on_port(EVTCHNOP_send, high);
    check((words[middle] & LINK_MASK) == also, "events of one priority are linked");
    events_unmask();
    check(logged == 4 && log[0] == high && log[1] == middle && log[2] == also && log[3] == low,
          "they arrive by priority, then in order, each once");
    on_port(EVTCHNOP_close, low);
    on_port(EVTCHNOP_close, middle);
    on_port(EVTCHNOP_close, high);
    on_port(EVTCHNOP_close, also);
}

static s64 poll(u32 port, u64 timeout)
{
    struct sched_poll args = {.ports = (u64)&port, .nr_ports = 1, .timeout = timeout};
    return HC2(sched_op, SCHEDOP_poll, &args);
}

static void masks(void)
{
    u32 port = listening();

    logged = 0;
    __atomic_fetch_or(&words[port], MASKED, __ATOMIC_SEQ_CST);
    on_port(EVTCHNOP_send, port);
    check(logged == 0 && words[port] == (PENDING | MASKED), "a masked port only becomes pending");
    check_value("a poll of it returns at once", poll(port, 0), 0);
    check_value("unmask it", on_port(EVTCHNOP_unmask, port), 0);
    check(logged == 1 && words[port] == 0, "which delivers it");
    u64 begin = system_time();
    check_value("a poll of it with a timeout", poll(port, begin + 3000000), 0);
    check(system_time() - begin >= 3000000, "lasts that long");
    check_value("refused: a poll of a closed port", poll(port + 1, 0), -XEN_EINVAL);

    events_mask();
    on_port(EVTCHNOP_send, port);
    check_value("close a port that is linked", on_port(EVTCHNOP_close, port), 0);
    check(words[port] == LINKED, "it is not pending any more");
    u32 other = (u32)bind_ipi();
    check(other == port + 1, "and not given out while it is linked");
    events_unmask();
    check(logged == 1 && words[port] == 0, "its event is passed over");
    check_value("then it is given out", bind_ipi(), (s64)port);
    on_port(EVTCHNOP_close, port);
    on_port(EVTCHNOP_close, other);
}

static u64 ticked;
static void on_timer(void) { ticked++; }
static int has_ticked(void) { return ticked != 0; }

static void noise(u8 *page)
{
    u64 state = 88172645463325252UL;
    u32 port = listening(), second = listening();

    events_mask();
    for (int round = 0; round < 200; round++) {
        for (u32 i = 0; i < 1024; i++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            words[i] = (u32)state;
            ((u32 *)page)[i] = (u32)(state >> 32);
        }
        set_priority(port, (u32)state & 15);
        on_port(EVTCHNOP_send, port);
        on_port(EVTCHNOP_send, second);
        on_port(EVTCHNOP_unmask, second);
        on_port(EVTCHNOP_unmask, port);
    }
    memset(words, 0, PAGE_SIZE);
    memset(page, 0, PAGE_SIZE);
    memset(heads, 0, sizeof(heads));
    logged = 0;
    on_port(EVTCHNOP_send, port);
    on_port(EVTCHNOP_send, second);
    events_unmask();
    check(logged == 2, "after words full of noise events arrive again");
    on_port(EVTCHNOP_close, port);
    on_port(EVTCHNOP_close, second);
}

/* And FIFO anew. */
static void back(u8 *page, u8 *array)
{
    u16 self = DOMID_SELF, host = 0, nobody = 0x1234;

    check_value("refused: reset of the host's domain", HC2(event_channel_op, EVTCHNOP_reset, &host), -XEN_EPERM);
    check_value("refused: reset of a domain that is not there", HC2(event_channel_op, EVTCHNOP_reset, &nobody), -XEN_ESRCH);
    events_mask();
    check_value("reset", HC2(event_channel_op, EVTCHNOP_reset, &self), 0);
    event_scan = NULL;
    shared_info->vcpu_info[0].evtchn_pending_sel = 0; /* from before FIFO; while a bit is set nobody is called for it */
    events_unmask();
    check_value("all ports are closed", on_port(EVTCHNOP_close, start_info->console_evtchn), -XEN_EINVAL);
    check_value("refused: the array without a control block", expand_array(va_to_mfn(array)), -XEN_EOPNOTSUPP);
    memset(array, 0, PAGE_SIZE);
    make_readonly(array);
    check_value("its page may be a page table now", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(array), 0), 0);
    check_value("and not any more", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(array), 0), 0);
    make_writable(array);
    logged = 0;
    on_port(EVTCHNOP_send, listening());
    check(logged == 1, "two-level events arrive");
    memset(array, 0, PAGE_SIZE);
    check_value("FIFO once more", init_control(va_to_mfn(page), 64, 0), 0);
    check_value("with its array", expand_array(va_to_mfn(array)), 0);
}

void guest_main(void)
{
    u8 *page = page_alloc(), *array = page_alloc();

    control = (struct control_block *)(page + 64);
    words = (u32 *)array;
    check_begin("fifo");
    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    start(page, array);
    frames(array);
    priorities();
    masks();
    timer_init(on_timer);
    timer_set(system_time() + 1000000);
    wait_until(has_ticked);
    check(1, "the timer's event arrives");
    noise(page);
    back(page, array);
    if (!check_end())
        printk("fifo: OK\n");
}
