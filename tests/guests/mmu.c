/*
 * A hostile kernel and its L1 entries: what Xen must refuse, by whatever way it is written and with the error number it
 * gives, and what it must allow. `tables` does the same with whole page tables.
 *
 * The expectations follow Xen's arch/x86/mm.c (get_page_from_l1e, mod_l?_entry, do_mmuext_op) and pv/ro-page-fault.c for
 * direct writes. Where the number depends on what a frame happens to be, any refusal passes.
 *
 * Command line: `foreign=0x…` names a frame that belongs to another domain.
 */
#include "guest.h"

#define SPARE_VA 0x0000700000000000UL
#define PFN_MASK ((1UL << 40) - 1)
#define COMPARED (PTE_ADDR | PTE_P | PTE_W | PTE_NX)

/* The ways to write an L1 entry. */
static s64 by_mmu_update(u8 *va, u64 pte) { return set_entry(table_entry((u64)va, 1), pte); }

static s64 by_va_mapping(u8 *va, u64 pte) { return map_page(va, pte); }

static s64 multicall(u64 op, u64 a, u64 b, u64 c, u64 d)
{
    struct multicall_entry call = {.op = op, .args = {a, b, c, d}};
    s64 rc = HC2(multicall, &call, 1);
    return rc ? rc : call.result;
}

static s64 by_multicall_va(u8 *va, u64 pte) { return multicall(HC_update_va_mapping, (u64)va, pte, UVMF_INVLPG, 0); }

static s64 by_multicall_mmu(u8 *va, u64 pte)
{
    struct mmu_update update = {entry_address(table_entry((u64)va, 1)), pte};
    return multicall(HC_mmu_update, (u64)&update, 1, 0, DOMID_SELF);
}

static s64 by_write(u8 *va, u64 pte)
{
    u64 *entry = table_entry((u64)va, 1);

    PROBE("movq %1, (%0)", "r"(entry), "r"(pte));
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)va, 0);
    return write_fault((u64)entry);
}

static const struct {
    const char *name;
    s64 (*apply)(u8 *va, u64 pte);
} routes[] = {
    {"mmu_update", by_mmu_update},          {"update_va_mapping", by_va_mapping},
    {"multicalled update_va_mapping", by_multicall_va}, {"multicalled mmu_update", by_multicall_mmu},
    {"direct write", by_write},
};
#define ROUTES (sizeof(routes) / sizeof(routes[0]))

static int is_refusal(s64 rc) { return rc == -XEN_EPERM || rc == -XEN_EBUSY || rc == -XEN_EINVAL || rc == FAULT; }

static u8 *page, *other;

/* `want` 0: any refusal. The entry must stay as it was. */
static void refuse_l1(const char *what, u64 pte, s64 want)
{
    for (unsigned i = 0; i < ROUTES; i++) {
        u64 *entry = table_entry((u64)page, 1);
        u64 before = *entry & COMPARED;
        s64 rc = routes[i].apply(page, pte);
        s64 wanted = routes[i].apply == by_write ? FAULT : want;
        const char *name = label("refused: %s, by %s (%ld)", what, routes[i].name, rc);
        if ((*entry & COMPARED) != before) {
            check(0, label("the entry changed: %s, by %s", what, routes[i].name));
            routes[i].apply(page, pte_of(va_to_mfn(page), PTE_RW));
        } else if (wanted) {
            check_value(name, rc, wanted);
        } else {
            check(is_refusal(rc), name);
        }
    }
}

static void allow_l1(const char *what, u64 pte)
{
    for (unsigned i = 0; i < ROUTES; i++) {
        s64 rc = routes[i].apply(page, pte);
        int same = ((*table_entry((u64)page, 1) ^ pte) & COMPARED) == 0;
        check(rc == 0 && same, label("allowed: %s, by %s (%ld)", what, routes[i].name, rc));
        make_writable(page);
    }
}

static u64 lowest, highest;

static u64 grant_frames[64];

static void learn_grant_frames(void)
{
    struct gnttab_query_size size = {.dom = DOMID_SELF};
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .frame_list = (u64)grant_frames};

    if (HC3(grant_table_op, GNTTABOP_query_size, &size, 1) || size.status)
        return;
    setup.nr_frames = size.nr_frames < 64 ? size.nr_frames : 64;
    HC3(grant_table_op, GNTTABOP_setup_table, &setup, 1);
}

static int is_mine(u64 mfn)
{
    for (int i = 0; i < 64; i++)
        if (grant_frames[i] == mfn)
            return 1;
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++)
        if (pfn_to_mfn(pfn) == mfn)
            return 1;
    return mfn == start_info->shared_info >> PAGE_SHIFT;
}

static void foreign_frames(void)
{
    const char *option = cmdline_option("foreign");
    u64 refused = 0, tried = 0;

    learn_grant_frames();
    refuse_l1("frame 0", pte_of(0, PTE_RW), -XEN_EPERM);
    refuse_l1("frame 0, read-only", pte_of(0, PTE_RO), -XEN_EPERM);
    refuse_l1("frame 1", pte_of(1, PTE_RW), 0);
    refuse_l1("a frame just below", pte_of(lowest - 1, PTE_RW), 0);
    refuse_l1("the last but one frame number", pte_of(PFN_MASK - 1, PTE_RW), -XEN_EPERM);
    refuse_l1("the last frame number", pte_of(PFN_MASK, PTE_RW), -XEN_EINVAL);
    refuse_l1("all ones", ~0UL, -XEN_EINVAL);
    if (option) {
        refuse_l1("a neighbour's frame", pte_of(parse_number(option), PTE_RW), -XEN_EBUSY);
        refuse_l1("a neighbour's frame, read-only", pte_of(parse_number(option), PTE_RO), -XEN_EBUSY);
    }
    for (u64 mfn = highest + 1; mfn < highest + 1200; mfn += mfn < highest + 400 ? 1 : 7) {
        if (is_mine(mfn))
            continue;
        tried++;
        s64 rc = map_page(page, pte_of(mfn, PTE_RW));
        if (is_refusal(rc))
            refused++;
        else
            printk("  frame %lx (own end + %ld): %ld\n", mfn, (s64)(mfn - highest), rc);
        make_writable(page);
    }
    check_value("every frame behind our own is refused", (s64)refused, (s64)tried);
}

static void l1_values(void)
{
    u64 mfn = va_to_mfn(page);
    u64 l1 = va_to_mfn(table_entry((u64)page, 1)), l2 = va_to_mfn(table_entry((u64)page, 2));
    u64 l4 = va_to_mfn((void *)start_info->pt_base);

    refuse_l1("writable map of its own L1", pte_of(l1, PTE_RW), -XEN_EBUSY);
    refuse_l1("writable map of its L2", pte_of(l2, PTE_RW), -XEN_EBUSY);
    refuse_l1("writable map of the L4", pte_of(l4, PTE_RW), -XEN_EBUSY);
    refuse_l1("PAT bit", pte_of(mfn, PTE_RW | PTE_PSE), -XEN_EINVAL);
    refuse_l1("cache attributes", pte_of(mfn, PTE_RW | PTE_PCD), -XEN_EINVAL);
    refuse_l1("an address beyond what there is", pte_of(mfn, PTE_RW) | 1UL << 51, -XEN_EPERM);
    allow_l1("the bits that are free for software", pte_of(mfn, PTE_RW) | 7UL << 9 | 7UL << 52);
    allow_l1("read-only map of the L4", pte_of(l4, PTE_RO | PTE_NX));
    allow_l1("writable map of shared_info", (start_info->shared_info & PTE_ADDR) | PTE_RW);
    allow_l1("another page of its own", pte_of(va_to_mfn(other), PTE_RW));
    allow_l1("nothing", 0);
    allow_l1("not present, with rubbish in it", 0xdeadbeef00UL << 12 | 0x10);
    check_value("a virtual address without tables", map_page((void *)SPARE_VA, pte_of(mfn, PTE_RO)), -XEN_EINVAL);
    check_value("a virtual address of Xen's", map_page((void *)M2P_VIRT_START, pte_of(mfn, PTE_RO)), -XEN_EINVAL);
}

/* Direct writes of every size and kind: the entry changes as the instruction says. */
static void write_kinds(void)
{
    u64 *entry = table_entry((u64)page, 1);
    u64 mine = pte_of(va_to_mfn(page), PTE_RW), theirs = pte_of(va_to_mfn(other), PTE_RW), was;

    other[0] = 0x77;
    page[0] = 0x11;
    was = mine;
    __asm__ volatile("xchgq %0, (%1)" : "+r"(was) : "r"(entry) : "memory");
    check((was & COMPARED) == (mine & COMPARED) && (*entry & COMPARED) == (mine & COMPARED), "xchg of the same value");
    was = theirs;
    __asm__ volatile("xchgq %0, (%1)" : "+r"(was) : "r"(entry) : "memory");
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    check_value("xchg maps another page", *(volatile u8 *)page, 0x77);
    was = *entry;
    u8 equal;
    __asm__ volatile("lock cmpxchgq %3, (%2)\n\tsete %1" : "+a"(was), "=q"(equal) : "r"(entry), "r"(mine) : "memory", "cc");
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    check(equal && *(volatile u8 *)page == 0x11, "cmpxchg that succeeds");
    was = 0x123;
    __asm__ volatile("lock cmpxchgq %3, (%2)\n\tsete %1" : "+a"(was), "=q"(equal) : "r"(entry), "r"(theirs) : "memory", "cc");
    check(!equal && was == *entry && (*entry & COMPARED) == (mine & COMPARED), "cmpxchg that fails changes nothing");
    __asm__ volatile("lock andq %1, (%0)" ::"r"(entry), "r"(~PTE_W) : "memory", "cc");
    check(!(*entry & PTE_W), "and takes the write right");
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    PROBE("movb $1, (%0)", "r"(page));
    check(trap_seen.vector == 14 && trap_seen.error == 3, "and the page is read-only then");
    __asm__ volatile("lock orq %1, (%0)" ::"r"(entry), "r"(PTE_W) : "memory", "cc");
    check(*entry & PTE_W, "or gives it back");
    __asm__ volatile("btrq $1, (%0)" ::"r"(entry) : "memory", "cc");
    check(!(*entry & PTE_W), "btr takes the write right");
    __asm__ volatile("movb %b1, (%0)" ::"r"(entry), "q"(PTE_RW & 0xff) : "memory");
    check(*entry & PTE_W, "a one-byte write");
    __asm__ volatile("movl $0, (%0)" ::"r"(entry) : "memory");
    check(!(*entry & PTE_P), "a four-byte write");
    __asm__ volatile("movq %1, (%0)" ::"r"(entry), "r"(mine) : "memory");
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    check_value("mapped again", *(volatile u8 *)page, 0x11);
    PROBE("movq %1, (%0)", "r"((u8 *)entry + 4), "r"(0UL));
    check_value("a write that crosses entries", write_fault((u64)entry + 4), FAULT);
    for (int level = 2; level <= 4; level++) {
        u64 *upper = table_entry((u64)page, level);
        PROBE("movq %1, (%0)", "r"(upper), "r"(*upper));
        check_value(label("a direct write to an L%d", level), write_fault((u64)upper), FAULT);
    }
}

/* Direct writes are emulated only for a guest that asked for it. */
static void writable_page_tables(void)
{
    u64 *entry = table_entry((u64)page, 1);

    check_value("no direct write before the assist is enabled", by_write(page, *entry), FAULT);
    check_value("enable the assist", HC2(vm_assist, VMASST_CMD_enable, VMASST_TYPE_writable_pagetables), 0);
    check_value("a direct write after that", by_write(page, *entry), 0);
    check_value("disable it", HC2(vm_assist, VMASST_CMD_disable, VMASST_TYPE_writable_pagetables), 0);
    check_value("no direct write again", by_write(page, *entry), FAULT);
    check_value("enable it again", HC2(vm_assist, VMASST_CMD_enable, VMASST_TYPE_writable_pagetables), 0);
    check_value("an assist that is none", HC2(vm_assist, VMASST_CMD_enable, 31), -XEN_EINVAL);
    check_value("a command that is none", HC2(vm_assist, 2, VMASST_TYPE_writable_pagetables), -XEN_ENOSYS);
}

void guest_main(void)
{
    check_begin("mmu");
    lowest = ~0UL;
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++) {
        lowest = pfn_to_mfn(pfn) < lowest ? pfn_to_mfn(pfn) : lowest;
        highest = pfn_to_mfn(pfn) > highest ? pfn_to_mfn(pfn) : highest;
    }
    page = page_alloc();
    other = page_alloc();
    writable_page_tables();
    foreign_frames();
    l1_values();
    write_kinds();
    if (!check_end())
        printk("mmu: OK\n");
}
