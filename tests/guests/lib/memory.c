/*
 * Pages and page tables, direct paging.
 *
 * The domain builder maps the domain's first pages linearly at VIRT_BASE, with at least 512 KiB of free ones behind the
 * boot stack (public/xen.h, "start-of-day memory layout"); page_alloc gives out those.
 */
#include "guest.h"

static u64 next_pfn;
static u64 mapped_end;

u64 first_free_pfn(void)
{
    return va_to_pfn((void *)start_info->pt_base) + start_info->nr_pt_frames + 1; /* 1: the boot stack */
}

void memory_init(void)
{
    next_pfn = first_free_pfn();
    mapped_end = next_pfn + 127;
    if (mapped_end > start_info->nr_pages)
        mapped_end = start_info->nr_pages;
}

u64 pfn_to_mfn(u64 pfn) { return ((u64 *)start_info->mfn_list)[pfn]; }

u64 mfn_to_pfn(u64 mfn)
{
    /* Trust the M2P only where the P2M agrees, as real guests do. */
    u64 pfn = ((volatile u64 *)M2P_VIRT_START)[mfn];
    return pfn < start_info->nr_pages && pfn_to_mfn(pfn) == mfn ? pfn : ~0UL;
}

void *page_alloc(void)
{
    if (next_pfn >= mapped_end)
        panic("out of bootstrap pages\n");
    void *page = pfn_to_va(next_pfn++);
    memset(page, 0, PAGE_SIZE);
    return page;
}

u64 *table_entry(u64 va, int level)
{
    u64 *table = (u64 *)start_info->pt_base;

    for (int at = 4;; at--) {
        u64 *entry = table + (va >> (PAGE_SHIFT + 9 * (at - 1)) & 511);
        if (at == level)
            return entry;
        if (!(*entry & PTE_P))
            return NULL;
        table = pfn_to_va(mfn_to_pfn((*entry & PTE_ADDR) >> PAGE_SHIFT));
    }
}

u64 entry_address(const u64 *entry) { return (va_to_mfn(entry) << PAGE_SHIFT) | ((u64)entry & ~PAGE_MASK); }

s64 set_entry(const u64 *entry, u64 value)
{
    struct mmu_update update = {entry_address(entry) | MMU_NORMAL_PT_UPDATE, value};
    return HC4(mmu_update, &update, 1, 0, DOMID_SELF);
}

s64 map_page(const void *va, u64 pte) { return HC3(update_va_mapping, va, pte, UVMF_INVLPG); }

s64 mmuext(u32 cmd, u64 arg1, u64 arg2)
{
    struct mmuext_op op = {.cmd = cmd, .arg1 = arg1, .arg2 = arg2};
    return HC4(mmuext_op, &op, 1, 0, DOMID_SELF);
}

s64 make_readonly(const void *va) { return map_page(va, pte_of(va_to_mfn(va), PTE_RO)); }

s64 make_writable(const void *va) { return map_page(va, pte_of(va_to_mfn(va), PTE_RW)); }

u64 *table_alloc(void)
{
    u64 *table = page_alloc();
    s64 rc = make_readonly(table);
    if (rc)
        panic("cannot make a page read-only: %ld\n", rc);
    return table;
}
