/*
 * Writes every page it owns beyond the boot structures through its P2M, and reads all back.
 *
 * Command line: `forever` goes on rewriting until told to stop by control/shutdown (for dirty-page tests).
 */
#include "guest.h"

#define WINDOW 64

static u8 window[WINDOW * PAGE_SIZE] __attribute__((aligned(4096)));

static void map_window(u64 pfn, u64 n)
{
    static struct mmu_update updates[WINDOW];

    for (u64 i = 0; i < n; i++) {
        updates[i].ptr = entry_address(table_entry((u64)window + i * PAGE_SIZE, 1));
        updates[i].val = pte_of(pfn_to_mfn(pfn + i), PTE_RW);
    }
    s64 rc = HC4(mmu_update, updates, n, 0, DOMID_SELF);
    if (rc)
        panic("memtouch: mapping %lu pages at pfn %lu failed: %ld\n", n, pfn, rc);
    mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
}

static u64 pass(u64 salt, int writing)
{
    u64 wrong = 0;

    for (u64 pfn = first_free_pfn(); pfn < start_info->nr_pages; pfn += WINDOW) {
        u64 n = start_info->nr_pages - pfn < WINDOW ? start_info->nr_pages - pfn : WINDOW;
        map_window(pfn, n);
        for (u64 i = 0; i < n; i++) {
            volatile u64 *page = (volatile u64 *)(window + i * PAGE_SIZE);
            u64 want = (pfn + i) * 0x9E3779B97F4A7C15UL + salt;
            if (writing) {
                page[0] = want;
                page[511] = ~want;
            } else if (page[0] != want || page[511] != ~want) {
                wrong++;
            }
        }
    }
    return wrong;
}

void guest_main(void)
{
    char text[32];
    u64 wrong = 0;

    printk("memtouch: %lu of %lu pages\n", start_info->nr_pages - first_free_pfn(), start_info->nr_pages);
    if (cmdline_flag("forever"))
        xenstore_init();
    for (u64 salt = 0; salt < 2 || cmdline_flag("forever"); salt++) {
        pass(salt, 1);
        wrong += pass(salt, 0);
        if (cmdline_flag("forever") && xs_read("control/shutdown", text, sizeof(text)) > 0)
            break;
    }
    printk("memtouch: %s, %lu pages wrong\n", wrong ? "FAILED" : "OK", wrong);
}
