/*
 * A hostile kernel and its page tables: types, reference counts, pins, base pointers, batches, the M2P and descriptor
 * tables. The expectations follow Xen's arch/x86/mm.c (mod_l?_entry, promote_l?_table, do_mmuext_op, do_mmu_update) and
 * pv/descriptor-tables.c.
 */
#include "guest.h"

#define SPARE_VA 0x0000700000000000UL
#define PFN_MASK ((1UL << 40) - 1)

static u8 *page, *other;
static u64 *l1, *l2, *l3;

static void fill(u64 *table, u64 value, u64 rest)
{
    make_writable(table);
    for (int i = 0; i < 512; i++)
        table[i] = i == 5 ? value : rest;
    make_readonly(table);
}

static void upper_levels(void)
{
    u64 *l4_entry = table_entry(SPARE_VA, 4);
    u64 l4 = va_to_mfn((void *)start_info->pt_base);

    l1 = table_alloc();
    l2 = table_alloc();
    l3 = table_alloc();
    check_value("an L4 entry for a chain of tables", set_entry(l4_entry, pte_of(va_to_mfn(l3), PTE_RW)), 0);
    check_value("an L3 entry", set_entry(l3, pte_of(va_to_mfn(l2), PTE_RW)), 0);
    check_value("refused: L2 superpage", set_entry(l2, pte_of(va_to_mfn(page), PTE_RW | PTE_PSE) & ~0x1ff000UL), -XEN_EINVAL);
    check_value("refused: L3 superpage", set_entry(l3 + 1, pte_of(0, PTE_RW | PTE_PSE)), -XEN_EINVAL);
    check_value("refused: global L2", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW | 0x100)), -XEN_EINVAL);
    check_value("refused: L4 superpage", set_entry(l4_entry + 1, pte_of(0, PTE_RW | PTE_PSE)), -XEN_EINVAL);
    check_value("refused: a table that is mapped writable", set_entry(l2, pte_of(va_to_mfn(page), PTE_RW)), -XEN_EINVAL);
    check_value("refused: the L4 as an L1", set_entry(l2, pte_of(l4, PTE_RW)), -XEN_EINVAL);
    check_value("refused: a frame of nobody's as an L1", set_entry(l2, pte_of(PFN_MASK - 1, PTE_RW)), -XEN_EINVAL);
    check_value("refused: frame 0 as an L1", set_entry(l2, pte_of(0, PTE_RW)), -XEN_EINVAL);
    check_value("refused: an L2 that contains itself", set_entry(l2, pte_of(va_to_mfn(l2), PTE_RW)), -XEN_EINVAL);
    fill(l1, ~0UL, ~0UL);
    check_value("refused: an L1 of rubbish", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW)), -XEN_EINVAL);
    fill(l1, pte_of(0, PTE_RW), 0);
    check_value("refused: an L1 with frame 0", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW)), -XEN_EPERM);
    fill(l1, pte_of(l4, PTE_RW), 0);
    check_value("refused: an L1 with a writable L4", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW)), -XEN_EBUSY);
    check_value("it has no type after all that", make_writable(l1), 0);
    fill(l1, pte_of(va_to_mfn(l1), PTE_RW), 0);
    check_value("refused: an L1 that maps itself writable", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW)), -XEN_EBUSY);
    check_value("no entry was left", (s64)l2[0], 0);
    for (int slot = XEN_FIRST_L4_SLOT; slot <= XEN_LAST_L4_SLOT; slot++) {
        u64 *entry = (u64 *)start_info->pt_base + slot;
        s64 rc = set_entry(entry, pte_of(va_to_mfn(l3), PTE_RW)), zero = set_entry(entry, 0);
        check(rc == -XEN_EINVAL && zero == -XEN_EINVAL, label("refused: L4 slot %d (%ld, %ld)", slot, rc, zero));
    }
    check_value("refused: an L4 entry to itself, writable", set_entry(l4_entry + 1, pte_of(l4, PTE_RW)), -XEN_EINVAL);
    fill(l1, pte_of(va_to_mfn(other), PTE_RW), 0);
    check_value("a good L1", set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW)), 0);
    other[9] = 0x3c;
    check_value("it maps the page", ((volatile u8 *)SPARE_VA)[5 * PAGE_SIZE + 9], 0x3c);
}

static void reference_counts(void)
{
    u64 *table = table_alloc();
    u64 mfn = va_to_mfn(table);

    check_value("a linked L1 cannot be written", make_writable(l1), -XEN_EBUSY);
    check_value("pin it", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(l1), 0), 0);
    check_value("unlink it", set_entry(l2, 0), 0);
    check_value("pinned, it still cannot be written", make_writable(l1), -XEN_EBUSY);
    PROBE("movq (%0), %%rax", "r"(SPARE_VA + 5 * PAGE_SIZE));
    check(trap_seen.vector == 14 && trap_seen.error == 0, "unlinked, it maps nothing");
    check_value("unpin it", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(l1), 0), 0);
    check_value("now it can be written", make_writable(l1), 0);
    l1[5] = 0;
    check_value("unlink the chain", set_entry(table_entry(SPARE_VA, 4), 0), 0);
    check_value("its L3 can be written", make_writable(l3), 0);
    check_value("its L2 is held by nothing but that", make_writable(l2), 0);

    check_value("refused: pin of a page mapped writable", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(page), 0), -XEN_EINVAL);
    check_value("pin an empty page as an L1", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), 0);
    check_value("refused: pin it twice", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), -XEN_EINVAL);
    check_value("refused: pin it as an L2", mmuext(MMUEXT_PIN_L2_TABLE, mfn, 0), -XEN_EINVAL);
    check_value("refused: write it", make_writable(table), -XEN_EBUSY);
    check_value("refused: clear it", mmuext(MMUEXT_CLEAR_PAGE, mfn, 0), -XEN_EINVAL);
    check_value("refused: copy onto it", mmuext(MMUEXT_COPY_PAGE, mfn, va_to_mfn(page)), -XEN_EINVAL);
    check_value("unpin it", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), 0);
    check_value("refused: unpin it twice", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), -XEN_EINVAL);
    for (u32 level = 0; level < 4; level++) {
        fill(table, ~0UL, ~0UL);
        check_value(label("refused: pin rubbish as an L%u", level + 1), mmuext(level, mfn, 0), -XEN_EINVAL);
    }
    check_value("it can be written after all that", make_writable(table), 0);
    make_readonly(table);
    check_value("refused: pin of no frame", mmuext(MMUEXT_PIN_L4_TABLE, ~0UL, 0), -XEN_EINVAL);
    check_value("refused: pin of frame 0", mmuext(MMUEXT_PIN_L1_TABLE, 0, 0), -XEN_EINVAL);
    check_value("refused: unpin of no frame", mmuext(MMUEXT_UNPIN_TABLE, PFN_MASK, 0), -XEN_EINVAL);

    map_page(page, pte_of(va_to_mfn(other), PTE_RW)); /* a second writable mapping */
    make_readonly(other);
    check_value("refused: pin while one writable map is left", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(other), 0), -XEN_EINVAL);
    map_page(page, 0);
    mmuext(MMUEXT_CLEAR_PAGE, va_to_mfn(other), 0);
    check_value("pin when none is", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(other), 0), 0);
    check_value("unpin", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(other), 0), 0);
    make_writable(page);
    make_writable(other);
}

static void base_pointers(void)
{
    u64 *table = table_alloc();

    check_value("refused: baseptr of a writable page", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(page), 0), -XEN_EINVAL);
    check_value("refused: baseptr of frame 0", mmuext(MMUEXT_NEW_BASEPTR, 0, 0), -XEN_EINVAL);
    check_value("refused: baseptr of no frame", mmuext(MMUEXT_NEW_BASEPTR, ~0UL, 0), -XEN_EINVAL);
    check_value("refused: baseptr of the L3", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(table_entry((u64)page, 3)), 0), -XEN_EINVAL);
    fill(table, ~0UL, ~0UL);
    check_value("refused: baseptr of rubbish", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(table), 0), -XEN_EINVAL);
    check_value("refused: user baseptr of rubbish", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(table), 0), -XEN_EINVAL);
    check_value("refused: user baseptr of no frame", mmuext(MMUEXT_NEW_USER_BASEPTR, ~0UL, 0), -XEN_EINVAL);
    make_writable(table);
    memcpy(table, (void *)start_info->pt_base, PAGE_SIZE);
    make_readonly(table);
    check_value("a copy of the L4 can be loaded", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(table), 0), 0);
    check_value("and cannot be written", make_writable(table), -XEN_EBUSY);
    check_value("the old one again", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn((void *)start_info->pt_base), 0), 0);
    check_value("then the copy can be written", make_writable(table), 0);
}

static s64 machphys(u64 mfn, u64 pfn)
{
    struct mmu_update update = {mfn << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, pfn};
    return HC4(mmu_update, &update, 1, 0, DOMID_SELF);
}

static void batches(void)
{
    u64 mfn = va_to_mfn(page), l1_of_page = entry_address(table_entry((u64)page, 1));
    struct mmu_update three[3] = {{l1_of_page, pte_of(mfn, PTE_RO)}, {l1_of_page, pte_of(0, PTE_RW)}, {l1_of_page, 0}};
    u32 done = 77;

    check_value("a batch stops at its first error", HC4(mmu_update, three, 3, &done, DOMID_SELF), -XEN_EPERM);
    check_value("and says how far it came", done, 1);
    check((*table_entry((u64)page, 1) & (PTE_P | PTE_W)) == PTE_P, "what came before holds");
    make_writable(page);
    three[0].ptr = l1_of_page | 5;
    check_value("refused: an unknown kind of update", HC4(mmu_update, three, 1, 0, DOMID_SELF), -XEN_ENOSYS);
    check_value("refused: a domain that is not there", HC4(mmu_update, three, 1, 0, 0x1234), -XEN_ESRCH);
    three[0] = (struct mmu_update){mfn << PAGE_SHIFT | 0x18, 0x1234567};
    check_value("mmu_update of a plain page writes it", HC4(mmu_update, three, 1, 0, DOMID_SELF), 0);
    check_value("and it is there", ((volatile s64 *)page)[3], 0x1234567);
    three[0].ptr = 0x18;
    check_value("refused: mmu_update in frame 0", HC4(mmu_update, three, 1, 0, DOMID_SELF), -XEN_EINVAL);
    check_value("refused: M2P entry of frame 0", machphys(0, 5), -XEN_EINVAL);
    check_value("refused: M2P entry of no frame", machphys(PFN_MASK, 5), -XEN_EINVAL);
    check_value("the M2P entry of its own page", machphys(mfn, 0x55), 0);
    check_value("reads back", ((volatile s64 *)M2P_VIRT_START)[mfn], 0x55);
    check_value("and back", machphys(mfn, va_to_pfn(page)), 0);
    check_value("clear a page", mmuext(MMUEXT_CLEAR_PAGE, mfn, 0), 0);
    check_value("it is clear", ((volatile s64 *)page)[3], 0);
    other[100] = 0x42;
    check_value("copy a page", mmuext(MMUEXT_COPY_PAGE, mfn, va_to_mfn(other)), 0);
    check_value("it is copied", *(volatile u8 *)(page + 100), 0x42);
    check_value("refused: copy from frame 0", mmuext(MMUEXT_COPY_PAGE, mfn, 0), -XEN_EINVAL);
    check_value("refused: clear frame 0", mmuext(MMUEXT_CLEAR_PAGE, 0, 0), -XEN_EINVAL);
    check_value("refused: superpage marks", mmuext(MMUEXT_MARK_SUPER, mfn, 0), -XEN_EOPNOTSUPP);
    check_value("refused: an unknown operation", mmuext(99, mfn, 0), -XEN_ENOSYS);
}

static void descriptors(void)
{
    u64 *gdt = page_alloc();
    u64 frame = va_to_mfn(gdt);

    gdt[1] = 0x0000820000000000UL; /* an LDT descriptor */
    check_value("refused: a GDT that is mapped writable", HC2(set_gdt, &frame, 512), -XEN_EINVAL);
    make_readonly(gdt);
    check_value("refused: a GDT with a system descriptor", HC2(set_gdt, &frame, 512), -XEN_EINVAL);
    make_writable(gdt);
    gdt[1] = 0x00cff3000000ffffUL; /* data, DPL 3 */
    make_readonly(gdt);
    check_value("refused: a GDT too long", HC2(set_gdt, &frame, 7169), -XEN_EINVAL);
    check_value("a good GDT", HC2(set_gdt, &frame, 512), 0);
    check_value("refused: write the GDT", make_writable(gdt), -XEN_EBUSY);
    check_value("refused: a bad descriptor", HC2(update_descriptor, frame << PAGE_SHIFT | 8, 0x820000000000UL), -XEN_EINVAL);
    check_value("a good descriptor", HC2(update_descriptor, frame << PAGE_SHIFT | 8, 0x00cff3000000ffffUL), 0);
    check_value("refused: a descriptor into an L1",
                HC2(update_descriptor, entry_address(table_entry((u64)page, 1)), 0x00cff3000000ffffUL), -XEN_EINVAL);
    check_value("no GDT", HC2(set_gdt, 0, 0), 0);
    check_value("the page can be written again", make_writable(gdt), 0);
    struct vcpu_register_vcpu_info info = {.mfn = 0};
    check_value("refused: vcpu_info in frame 0", HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &info), -XEN_EINVAL);
    info.mfn = va_to_mfn((void *)start_info->pt_base);
    check_value("refused: vcpu_info in the L4", HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &info), -XEN_EINVAL);
    info = (struct vcpu_register_vcpu_info){.mfn = va_to_mfn(page), .offset = PAGE_SIZE - 32};
    check_value("refused: vcpu_info across a border", HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &info), -XEN_ENXIO);
}

void guest_main(void)
{
    check_begin("tables");
    page = page_alloc();
    other = page_alloc();
    upper_levels();
    reference_counts();
    base_pointers();
    batches();
    descriptors();
    if (!check_end())
        printk("tables: OK\n");
}
