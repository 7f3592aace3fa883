/*
 * Grant tables of a domain that grants to itself: versions, mappings and copies with the hardware's own view of them, and
 * what a hostile kernel may try. The expectations follow Xen's common/grant_table.c and arch/x86/pv/grant_table.c.
 */
#include "guest.h"

enum { EVTCHNOP_status = 5 };
enum {
    OP_map = 0,
    OP_unmap = 1,
    OP_transfer = 4,
    OP_copy = 5,
    OP_unmap_and_replace = 7,
    OP_set_version = 8,
    OP_get_status_frames = 9,
    OP_get_version = 10,
    OP_swap = 11,
};
enum { MAP_device = 1, MAP_host = 2, MAP_readonly = 4, MAP_application = 8, MAP_contains_pte = 16 };
enum { GTF_permit = 1, GTF_readonly = 4, GTF_reading = 8, GTF_writing = 16, GTF_sub_page = 256 };
enum {
    ST_general_error = -1,
    ST_bad_domain = -2,
    ST_bad_gntref = -3,
    ST_bad_handle = -4,
    ST_bad_dev_addr = -6,
    ST_bad_copy_arg = -10,
    ST_eagain = -12,
};

struct entry_v1 {
    u16 flags, domid;
    u32 frame;
};

struct entry_v2 {
    u16 flags, domid, offset, length;
    u64 frame;
};

struct map {
    u64 host;
    u32 flags, ref;
    u16 dom;
    short status;
    u32 handle;
    u64 bus;
};

struct unmap {
    u64 host, second; /* dev_bus_addr or new_addr */
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

_Static_assert(sizeof(struct map) == 32 && sizeof(struct unmap) == 24 && sizeof(struct copy) == 40, "grant structures");

#define REF 8
#define RING 20
static u16 self;
static volatile struct entry_v1 *v1;
static volatile struct entry_v2 *v2;
static volatile u16 *status;
static u8 *page, *other, *window, *second;

static s64 grant_op(u32 op, void *args, u32 count) { return HC3(grant_table_op, op, args, count); }

static struct map map_at(u64 host, u32 flags, u32 ref)
{
    struct map op = {.host = host, .flags = flags, .ref = ref, .dom = self, .status = 99};
    s64 rc = grant_op(OP_map, &op, 1);
    if (rc)
        op.status = (short)rc;
    return op;
}

static s64 unmap_at(u64 host, u64 bus, u32 handle)
{
    struct unmap op = {host, bus, handle, 99};
    s64 rc = grant_op(OP_unmap, &op, 1);
    return rc ? rc : op.status;
}

static s64 replace_at(u64 host, u64 new, u32 handle)
{
    struct unmap op = {host, new, handle, 99};
    s64 rc = grant_op(OP_unmap_and_replace, &op, 1);
    return rc ? rc : op.status;
}

static void grant_v1(u32 ref, const void *va, u16 flags)
{
    v1[ref].frame = (u32)va_to_mfn(va);
    v1[ref].domid = self;
    barrier();
    v1[ref].flags = flags;
}

static int seen_v1(u32 ref) { return v1[ref].flags & (GTF_reading | GTF_writing); }

/* The domain's own number, which a port that waits for this domain itself tells; its grants are good under it. */
static int find_self(void)
{
    struct {
        u16 dom, remote;
        u32 port;
    } alloc = {DOMID_SELF, DOMID_SELF, 0};
    struct {
        u16 dom;
        u32 port, status, vcpu;
        u16 remote;
    } query = {.dom = DOMID_SELF};

    if (HC2(event_channel_op, EVTCHNOP_alloc_unbound, &alloc))
        return 0;
    query.port = alloc.port;
    if (HC2(event_channel_op, EVTCHNOP_status, &query) || query.status != 1)
        return 0;
    self = query.remote;
    grant_v1(REF, page, GTF_permit);

    struct map first = map_at((u64)window, MAP_host | MAP_readonly, REF);
    check_value("the first mapping", first.status, 0);
    check_value("the first mapping is undone", unmap_at((u64)window, 0, first.handle), 0);
    return 1;
}

static s64 version(u32 number) { return grant_op(OP_set_version, &number, 1); }

static void table(void)
{
    u64 frame = 0;
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1, .frame_list = (u64)&frame};

    check(!grant_op(GNTTABOP_setup_table, &setup, 1) && !setup.status, "the table is set up");
    v1 = page_alloc();
    v2 = (volatile struct entry_v2 *)v1;
    check_value("and mapped", map_page((void *)v1, pte_of(frame, PTE_RW)), 0);
    check(find_self(), label("the domain has a number: %u", self));
}

static void linear(void)
{
    u64 bus = va_to_mfn(page) << PAGE_SHIFT;

    page[5] = 0x11;
    grant_v1(REF, page, GTF_permit);
    struct map op = map_at((u64)window, MAP_host, REF);
    check_value("map writable", op.status, 0);
    check_value("the frame's address", (s64)op.bus, (s64)bus);
    check_value("in use, for writing", seen_v1(REF), GTF_reading | GTF_writing);
    check(window[5] == 0x11, "it shows the page");
    window[5] = 0x22;
    check(((volatile u8 *)page)[5] == 0x22, "it writes the page");
    check_value("not with another handle", unmap_at((u64)window, 0, op.handle + 1), ST_bad_handle);
    check_value("unmap", unmap_at((u64)window, 0, op.handle), 0);
    check_value("not in use any more", seen_v1(REF), 0);
    PROBE("movb (%0), %%al", "r"(window));
    check(trap_seen.vector == 14 && !(trap_seen.error & 1), "and nothing is mapped there");
    check_value("not twice", unmap_at((u64)window, 0, op.handle), ST_bad_handle);

    grant_v1(REF, page, GTF_permit | GTF_readonly);
    check_value("a read-only grant cannot be written", map_at((u64)window, MAP_host, REF).status, ST_general_error);
    op = map_at((u64)window, MAP_host | MAP_readonly, REF);
    check_value("it can be read", op.status, 0);
    check_value("in use, for reading", seen_v1(REF), GTF_reading);
    PROBE("movb $1, (%0)", "r"(window));
    check_value("a write faults", write_fault((u64)window), FAULT);
    check(window[5] == 0x22, "a read does not");
    check_value("unmap it", unmap_at((u64)window, 0, op.handle), 0);
}

static void by_entry(void)
{
    u64 entry = entry_address(table_entry((u64)window, 1));

    grant_v1(REF, page, GTF_permit);
    for (u64 off = 1; off < 8; off++)
        check_value("a misaligned entry is refused", map_at(entry + off, MAP_host | MAP_contains_pte, REF).status,
                    ST_general_error);
    struct map op = map_at(entry, MAP_host | MAP_contains_pte, REF);
    check_value("map by the entry's address", op.status, 0);
    window[6] = 0x33;
    check(((volatile u8 *)page)[6] == 0x33, "it is mapped");
    check_value("replace is refused", replace_at(entry, (u64)second, op.handle), ST_general_error);
    check_value("unmap by the entry's address", unmap_at(entry, 0, op.handle), 0);
    u64 l2 = entry_address(table_entry((u64)window, 2)), l4 = entry_address(table_entry((u64)window, 4));
    u64 data = va_to_mfn(other) << PAGE_SHIFT;
    check_value("an L2 entry is refused", map_at(l2, MAP_host | MAP_contains_pte, REF).status, ST_general_error);
    check_value("an L4 entry is refused", map_at(l4, MAP_host | MAP_contains_pte, REF).status, ST_general_error);
    check_value("plain memory is refused", map_at(data, MAP_host | MAP_contains_pte, REF).status, ST_general_error);
    check_value("Xen's addresses are refused", map_at(M2P_VIRT_START, MAP_host, REF).status, ST_general_error);
    check_value("none of that is in use", seen_v1(REF), 0);
}

static void page_types(void)
{
    u64 mfn = va_to_mfn(other);

    memset(other, 0, PAGE_SIZE);
    grant_v1(REF, other, GTF_permit);
    check_value("no other mapping of a page", map_page(other, 0), 0);
    struct map op = map_at((u64)window, MAP_host | MAP_device, REF);
    check_value("map it for host and device", op.status, 0);
    check_value("it is no page table", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), -XEN_EINVAL);
    check_value("unmap it for the host", unmap_at((u64)window, 0, op.handle), 0);
    check_value("it still is no page table", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), -XEN_EINVAL);
    check_value("unmap another bus address", unmap_at(0, op.bus + PAGE_SIZE, op.handle), ST_bad_dev_addr);
    check_value("unmap it for the device", unmap_at(0, op.bus, op.handle), 0);
    check_value("now it may be one", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), 0);
    check_value("a page table cannot be mapped writable", map_at((u64)window, MAP_host, REF).status, ST_general_error);
    op = map_at((u64)window, MAP_host | MAP_readonly, REF);
    check_value("but read-only", op.status, 0);
    check_value("unmap the table", unmap_at((u64)window, 0, op.handle), 0);
    check_value("unpin it", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), 0);
    check_value("map it where it was", map_page(other, pte_of(mfn, PTE_RW)), 0);
}

static void steal(void)
{
    grant_v1(REF, page, GTF_permit);
    grant_v1(REF + 1, other, GTF_permit);
    struct map first = map_at((u64)window, MAP_host, REF), op = map_at((u64)second, MAP_host | MAP_readonly, REF + 1);

    check(!first.status && !op.status, "two mappings");
    page[9] = 0x44;
    check_value("replace the one by the other", replace_at((u64)second, (u64)window, op.handle), 0);
    check(second[9] == 0x44, "the entry moved");
    check_value("the mapping of the moved entry is not where it was", unmap_at((u64)window, 0, first.handle),
                ST_general_error);
    check_value("it can be unmapped where it is", unmap_at((u64)second, 0, first.handle), 0);
    check_value("nothing is in use", seen_v1(REF) | seen_v1(REF + 1), 0);

    first = map_at((u64)window, MAP_host, REF);
    check_value("a mapping overwritten", map_page(window, 0), 0);
    check_value("cannot be unmapped", unmap_at((u64)window, 0, first.handle), ST_general_error);
    check_value("and stays in use", seen_v1(REF), GTF_reading | GTF_writing);
    check_value("until an entry like it is there", map_page(window, pte_of(va_to_mfn(page), PTE_RW)), 0);
    check_value("which is taken for it", unmap_at((u64)window, 0, first.handle), 0);
}

static void refused(void)
{
    struct map op = {.host = (u64)window, .flags = MAP_host, .ref = REF, .dom = self};

    v1[REF].flags = 0;
    check_value("no grant", map_at((u64)window, MAP_host, REF).status, ST_general_error);
    check_value("a number too high", map_at((u64)window, MAP_host, 512).status, ST_bad_gntref);
    check_value("no kind of mapping", map_at((u64)window, MAP_readonly, REF).status, ST_bad_gntref);
    op.dom = 0;
    check(!grant_op(OP_map, &op, 1) && op.status == ST_general_error, "domain 0 grants nothing");
    op.dom = 0x7000;
    check(!grant_op(OP_map, &op, 1) && op.status == ST_bad_domain, "no such domain");
    check_value("a transfer", grant_op(OP_transfer, &op, 1), -XEN_EOPNOTSUPP);
    check_value("too many", grant_op(OP_map, &op, 1U << 31), -XEN_EINVAL);
    check_value("no operation", grant_op(3, &op, 1), -XEN_ENOSYS);
    check_value("arguments nowhere", grant_op(OP_map, (void *)M2P_VIRT_START, 1), -XEN_EFAULT);
    check_value("arguments not mapped", grant_op(OP_copy, window, 1), -XEN_EFAULT);
}

static s64 copy(u64 source, u16 from, u64 dest, u16 to, u16 length, u16 flags)
{
    struct copy op = {{source, DOMID_SELF, from}, {dest, DOMID_SELF, to}, length, flags, 99};
    s64 rc = grant_op(OP_copy, &op, 1);
    return rc ? rc : op.status;
}

static void copies(void)
{
    u64 from = va_to_mfn(page), to = va_to_mfn(other), table = va_to_mfn((void *)start_info->pt_base);

    memcpy(page + 100, "some bytes", 10);
    grant_v1(REF, page, GTF_permit | GTF_readonly);
    grant_v1(REF + 1, other, GTF_permit);
    check_value("frame to frame", copy(from, 100, to, 0, 10, 0), 0);
    check_value("grant to frame", copy(REF, 100, to, 10, 10, 1), 0);
    check_value("frame to grant", copy(from, 100, REF + 1, 20, 10, 2), 0);
    check_value("grant to grant", copy(REF, 100, REF + 1, 30, 10, 3), 0);
    int same = 1;
    for (int i = 0; i < 40; i++)
        same &= ((volatile u8 *)other)[i] == (u8)"some bytes"[i % 10];
    check(same, "all of them arrived");
    check_value("to a read-only grant", copy(from, 0, REF, 0, 1, 2), ST_general_error);
    check_value("to a page table", copy(from, 0, table, 0, 8, 0), ST_general_error);
    check_value("across the end of the page", copy(from, 4090, to, 0, 10, 0), ST_bad_copy_arg);
    check_value("nothing is left in use", seen_v1(REF) | seen_v1(REF + 1), 0);

    static struct copy many[600];
    for (int i = 0; i < 600; i++)
        many[i] = (struct copy){{REF, self, (u16)i}, {REF + 1, self, (u16)(3000 - i)}, 1, 3, 99};
    for (int i = 0; i < 600; i++)
        page[i] = (u8)(i * 7);
    check_value("a long batch", grant_op(OP_copy, many, 600), 0);
    int good = 0;
    for (int i = 0; i < 600; i++)
        good += many[i].status == 0 && ((volatile u8 *)other)[3000 - i] == (u8)(i * 7);
    check_value("all of it done", good, 600);
}

static void version_two(void)
{
    u64 frame = 0;
    struct {
        u32 frames;
        u16 dom;
        short status;
        u64 list;
    } get = {1, DOMID_SELF, 99, (u64)&frame};

    grant_v1(REF, page, GTF_permit);
    struct map op = map_at((u64)window, MAP_host, REF);
    check_value("not while a grant is in use", version(2), -XEN_EBUSY);
    unmap_at((u64)window, 0, op.handle);
    check_value("version 3", version(3), -XEN_EINVAL);
    check_value("version 2", version(2), 0);
    check_value("the old entries are gone", v2[REF].flags, 0);
    check(!grant_op(OP_get_status_frames, &get, 1) && !get.status, "it has a status frame");
    status = page_alloc();
    check_value("which can be mapped", map_page((void *)status, pte_of(frame, PTE_RW)), 0);

    v2[REF].domid = self;
    v2[REF].frame = va_to_mfn(page);
    v2[REF].flags = GTF_permit;
    op = map_at((u64)window, MAP_host, REF);
    check_value("map", op.status, 0);
    check_value("the status tells", status[REF], GTF_reading | GTF_writing);
    check_value("the entry does not", v2[REF].flags, GTF_permit);
    check_value("unmap", unmap_at((u64)window, 0, op.handle), 0);
    check_value("the status tells that too", status[REF], 0);
    v2[REF].offset = 64;
    v2[REF].length = 32;
    v2[REF].flags = GTF_permit | GTF_sub_page;
    check_value("a part of a page is not mapped", map_at((u64)window, MAP_host, REF).status, ST_general_error);
    check_value("it is copied", copy(REF, 64, va_to_mfn(other), 0, 32, 1), 0);
    check_value("but no more than it", copy(REF, 64, va_to_mfn(other), 0, 33, 1), ST_general_error);
    check_value("not back while the status frame is mapped", version(1), -XEN_EBUSY);
    check_value("unmap the status frame", map_page((void *)status, 0), 0);
    check_value("back to version 1", version(1), 0);
    struct {
        u32 a, b;
        short status;
    } swap = {REF, REF + 1, 99};
    grant_v1(REF, page, GTF_permit);
    check(!grant_op(OP_swap, &swap, 1) && !swap.status, "two grants are swapped");
    check(v1[REF + 1].frame == (u32)va_to_mfn(page) && v1[REF].flags == 0, "as they should");
}

void guest_main(void)
{
    check_begin("grants");
    page = page_alloc();
    other = page_alloc();
    window = page_alloc();
    second = page_alloc();
    table();
    linear();
    by_entry();
    page_types();
    steal();
    refused();
    copies();
    version_two();
    /* One mapping is left to the end of the domain. */
    grant_v1(RING, page, GTF_permit);
    check_value("a mapping that stays", map_at((u64)window, MAP_host, RING).status, 0);
    if (!check_end())
        printk("grants: OK\n");
}
