/*
 * One of two domains that share grants and event channels.
 *
 * Command line: `peer=N` the other's number, and one of
 *   offer      grants it pages and a port, answers its events;
 *   use port=N maps, copies, binds and checks;
 *   keep       maps a page, says so, and looks at it whenever the console has a line;
 *   storm      maps and unmaps the other's page over and over, while the other does the same.
 */
#include "guest.h"

enum { OP_map = 0, OP_unmap = 1, OP_copy = 5 };
enum { MAP_device = 1, MAP_host = 2, MAP_readonly = 4 };
enum { GTF_permit = 1, GTF_readonly = 4, GTF_reading = 8, GTF_writing = 16 };
enum { COPY_source_gref = 1, COPY_dest_gref = 2 };
enum { EVTCHNOP_bind_interdomain = 0 };
enum { WRITABLE = 8, READABLE = 9, TABLE = 10, STRANGERS = 11, SECOND = 12, BACK = 13 };
enum { ST_general_error = -1, ST_bad_domain = -2, ST_bad_gntref = -3 };

struct map {
    u64 host;
    u32 flags, ref;
    u16 dom;
    short status;
    u32 handle;
    u64 bus;
};

struct unmap {
    u64 host, second;
    u32 handle;
    short status;
};

struct copy_end {
    u64 number;
    u16 dom, offset;
};

struct copy {
    struct copy_end source, dest;
    u16 length, flags;
    short status;
};

static volatile struct {
    u16 flags, domid;
    u32 frame;
} *table;
static u16 peer;
static volatile u32 *shared;
static volatile u8 *window, *second;
static u32 port;
static volatile u32 events;

static s64 grant_op(u32 op, void *args, u32 count) { return HC3(grant_table_op, op, args, count); }

static void grant(u32 ref, const volatile void *va, u16 flags, u16 domid)
{
    table[ref].frame = (u32)va_to_mfn((const void *)va);
    table[ref].domid = domid;
    barrier();
    table[ref].flags = flags;
}

static struct map map_of(u16 dom, volatile u8 *at, u32 flags, u32 ref)
{
    struct map op = {.host = (u64)at, .flags = flags, .ref = ref, .dom = dom, .status = 99};
    s64 rc = grant_op(OP_map, &op, 1);
    if (rc)
        op.status = (short)rc;
    return op;
}

static struct map map_at(volatile u8 *at, u32 flags, u32 ref) { return map_of(peer, at, flags, ref); }

static s64 unmap_at(volatile u8 *at, u64 bus, u32 handle)
{
    struct unmap op = {(u64)at, bus, handle, 99};
    s64 rc = grant_op(OP_unmap, &op, 1);
    return rc ? rc : op.status;
}

static s64 bind(u16 dom, u32 remote, u32 *local)
{
    struct {
        u16 dom;
        u32 remote, local;
    } op = {dom, remote, 0};
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_interdomain, &op);
    *local = op.local;
    return rc;
}

static s64 alloc(u16 dom, u16 remote, u32 *local)
{
    struct {
        u16 dom, remote;
        u32 port;
    } op = {dom, remote, 0};
    s64 rc = HC2(event_channel_op, EVTCHNOP_alloc_unbound, &op);
    *local = op.port;
    return rc;
}

static void count(u32 from)
{
    (void)from;
    events++;
}

static void answer(u32 from)
{
    shared[0]++;
    events++;
    event_send(from);
}

static int never(void) { return 0; }
static int some(void) { return events != 0; }

static void offer(void)
{
    char *readable = page_alloc();
    u8 *data = page_alloc();

    memcpy(readable, "only to be read", 15);
    memcpy(data, "of the neighbour", 16);
    shared[1] = 0x1234;
    grant(WRITABLE, shared, GTF_permit, peer);
    grant(READABLE, readable, GTF_permit | GTF_readonly, peer);
    grant(TABLE, table_entry((u64)shared, 1), GTF_permit, peer);
    grant(STRANGERS, data, GTF_permit, (u16)(peer + 1));
    grant(SECOND, data, GTF_permit, peer);
    if (alloc(DOMID_SELF, peer, &port))
        panic("pair: no port\n");
    event_listen(port, answer);
    printk("pair: offers port %u\n", port);
    wait_until(never);
}

/* (status, and what was copied) of one copy between a page of ours and one of the peer's grants. */
static s64 copy(u64 frame, u16 offset, u32 ref, u16 ref_offset, u16 length, int to_peer)
{
    struct copy_end ours = {frame, DOMID_SELF, offset}, theirs = {ref, peer, ref_offset};
    struct copy op = {to_peer ? ours : theirs, to_peer ? theirs : ours, length, to_peer ? COPY_dest_gref : COPY_source_gref,
                      99};
    s64 rc = grant_op(OP_copy, &op, 1);
    return rc ? rc : op.status;
}

static void use_maps(void)
{
    struct map op = map_at(window, MAP_host, WRITABLE);
    check_value("map the neighbour's page", op.status, 0);
    check(op.bus && mfn_to_pfn(op.bus >> PAGE_SHIFT) == ~0UL, "it is no page of ours");
    check(((volatile u32 *)window)[1] == 0x1234, "it shows what is there");
    ((volatile u32 *)window)[2] = 0x5678;
    struct map again = map_at(second, MAP_host | MAP_readonly, WRITABLE);
    check_value("map it again to read", again.status, 0);
    check(((volatile u32 *)second)[2] == 0x5678, "both show the same");
    PROBE("movb $1, (%0)", "r"(second));
    check_value("a read-only mapping is not written", write_fault((u64)second), FAULT);
    check_value("unmap the second", unmap_at(second, 0, again.handle), 0);
    check_value("unmap the first", unmap_at(window, 0, op.handle), 0);
    PROBE("movb (%0), %%al", "r"(window));
    check(trap_seen.vector == 14 && !(trap_seen.error & 1), "nothing is mapped there");

    check_value("a read-only grant cannot be mapped writable", map_at(window, MAP_host, READABLE).status,
                ST_general_error);
    op = map_at(window, MAP_host | MAP_readonly, READABLE);
    check_value("it can be read", op.status, 0);
    check(window[0] == 'o' && window[14] == 'd', "and is");
    check_value("unmap it", unmap_at(window, 0, op.handle), 0);
    check_value("a page table is not written", map_at(window, MAP_host, TABLE).status, ST_general_error);
    check_value("another's grant is not ours", map_at(window, MAP_host, STRANGERS).status, ST_general_error);
    check_value("no such grant", map_at(window, MAP_host, 100000).status, ST_bad_gntref);
    check_value("an invalid grant", map_at(window, MAP_host, 77).status, ST_general_error);
    check_value("no such domain", map_of(99, window, MAP_host, WRITABLE).status, ST_bad_domain);

    op = map_at(window, MAP_host | MAP_readonly, SECOND);
    check_value("map to read", op.status, 0);
    again = map_at(second, MAP_host, SECOND);
    check_value("and the same to write", again.status, 0);
    second[100] = 0x77;
    check(window[100] == 0x77, "the page moved under both");
    check_value("unmap one", unmap_at(window, 0, op.handle), 0);
    check_value("unmap the other", unmap_at(second, 0, again.handle), 0);
    op = map_at(window, MAP_host | MAP_device, SECOND);
    check_value("for devices, too", op.status, 0);
    check(window[100] == 0x77, "what was written stayed");
    check_value("unmap both", unmap_at(window, op.bus, op.handle), 0);
}

static void use_copies(u8 *page)
{
    u64 mfn = va_to_mfn(page);

    memset(page, 0, PAGE_SIZE);
    check_value("copy from the neighbour", copy(mfn, 10, READABLE, 5, 10, 0), 0);
    check(page[10] == 't' && page[19] == 'd' && !page[20], "what was asked for");
    memcpy(page, "a gift", 6);
    check_value("copy to the neighbour", copy(mfn, 0, SECOND, 200, 6, 1), 0);
    check_value("and back", copy(mfn, 100, SECOND, 198, 10, 0), 0);
    check(!page[101] && page[102] == 'a' && page[107] == 't' && !page[108], "it arrived");
    check_value("not to a read-only grant", copy(mfn, 0, READABLE, 0, 6, 1), ST_general_error);
    check_value("not to a page table", copy(mfn, 0, TABLE, 0, 6, 1), ST_general_error);
    check_value("not beyond the page", copy(mfn, 0, SECOND, 4090, 7, 1), -10);

    /* In one call: what a copy wrote, the next one reads. */
    struct copy both[2] = {
        {{mfn, DOMID_SELF, 0}, {SECOND, peer, 300}, 6, COPY_dest_gref, 99},
        {{SECOND, peer, 300}, {mfn, DOMID_SELF, 500}, 6, COPY_source_gref, 99},
    };
    check_value("two copies", grant_op(OP_copy, both, 2), 0);
    check(!both[0].status && !both[1].status && page[500] == 'a' && page[505] == 't', "in their order");
}

static void use_events(u32 remote)
{
    u32 local, other;
    u32 before;
    struct map op = map_at(window, MAP_host, WRITABLE);
    check_value("map the counter", op.status, 0);
    before = *(volatile u32 *)window;
    check_value("bind to the neighbour's port", bind(peer, remote, &local), 0);
    event_listen(local, count);
    events = 0;
    for (u32 i = 1; i <= 20; i++) {
        events = 0;
        event_send(local);
        wait_until(some);
    }
    check(*(volatile u32 *)window - before >= 20, "each event was answered");
    check_value("the port is taken", bind(peer, remote, &other), -XEN_EINVAL);
    check_value("a port that waits for nobody", bind(peer, 1, &other), -XEN_EINVAL);
    check_value("a domain that is not there", bind(99, remote, &other), -XEN_ESRCH);
    check_value("a port of the neighbour's own", alloc(peer, peer, &other), -XEN_EPERM);
    check_value("a port of nobody's own", alloc(99, peer, &other), -XEN_ESRCH);
    check_value("close", HC2(event_channel_op, EVTCHNOP_close, &local), 0);
    check_value("and bind anew", bind(peer, remote, &local), 0);
    event_listen(local, count);
    events = 0;
    event_send(local);
    wait_until(some);
    check_value("unmap the counter", unmap_at(window, 0, op.handle), 0);
    grant(BACK, (void *)shared, GTF_permit, peer);
}

static void keep(void)
{
    static char line[64];
    struct map op;

    for (int i = 0; i < 100000; i++) {
        op = map_at(window, MAP_host, WRITABLE);
        if (!op.status)
            break;
    }
    printk("pair: mapped %d\n", op.status);
    for (;;) {
        while (console_line(line, sizeof(line)) < 0)
            HC2(sched_op, SCHEDOP_yield, 0);
        if (str_equal(line, "unmap"))
            printk("pair: unmapped %ld\n", unmap_at(window, 0, op.handle));
        else if (str_equal(line, "map"))
            printk("pair: mapped %d\n", map_at(second, MAP_host, WRITABLE).status);
        else
            printk("pair: sees %x\n", ((volatile u32 *)window)[1]);
    }
}

static void storm(void)
{
    u32 good = 0, early = 0, bad = 0;

    grant(WRITABLE, shared, GTF_permit, peer);
    printk("pair: storms\n");
    while (good < 300 && bad < 100) {
        struct map op = map_at(window, MAP_host, WRITABLE);
        if (op.status) {
            if (good)
                bad++;
            else
                early++;
            HC2(sched_op, SCHEDOP_yield, 0);
            continue;
        }
        ((volatile u32 *)window)[3]++;
        if (unmap_at(window, 0, op.handle))
            bad++;
        good++;
    }
    printk("pair: storm over, %u good, %u bad\n", good, bad);
    wait_until(never);
}

void guest_main(void)
{
    u64 frame = 0;
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1, .frame_list = (u64)&frame};

    peer = (u16)parse_number(cmdline_option("peer"));
    if (grant_op(GNTTABOP_setup_table, &setup, 1) || setup.status)
        panic("pair: no grant table\n");
    table = page_alloc();
    if (map_page((void *)table, pte_of(frame, PTE_RW)))
        panic("pair: the grant table cannot be mapped\n");
    shared = page_alloc();
    window = page_alloc();
    second = page_alloc();
    if (cmdline_flag("offer"))
        offer();
    if (cmdline_flag("keep"))
        keep();
    if (cmdline_flag("storm"))
        storm();
    check_begin("pair");
    use_maps();
    use_copies(page_alloc());
    use_events((u32)parse_number(cmdline_option("port")));
    if (!check_end())
        printk("pair: OK\n");
}
