/*
 * A front end without a device: grants pages to domain 0, leaves a port for it, and answers each event by adding one to
 * a counter in the page and sending an event back.
 *
 * Command line: `busy` spins instead of sleeping between events.
 */
#include "guest.h"

enum { GTF_permit = 1, GTF_readonly = 4 };
enum { WRITABLE = 8, READABLE = 9, MANY = 16, PAGES = 64 };

static volatile struct {
    u16 flags, domid;
    u32 frame;
} *table;
static u32 port;
static u32 *shared;

static void grant(u32 ref, const void *va, u16 flags)
{
    table[ref].frame = (u32)va_to_mfn(va);
    table[ref].domid = 0;
    barrier();
    table[ref].flags = flags;
}

static void answer(u32 from)
{
    u32 command = *(volatile u32 *)&shared[1];
    if (command == 1)
        shutdown(SHUTDOWN_poweroff);
    if (command == 2) { /* whether the writable page can be taken back */
        shared[2] = table[WRITABLE].flags;
        shared[1] = 0;
    }
    shared[0]++;
    event_send(from);
}

static int never(void) { return 0; }

void guest_main(void)
{
    u64 frame = 0;
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1, .frame_list = (u64)&frame};
    struct {
        u16 dom, remote_dom;
        u32 port;
    } alloc = {DOMID_SELF, 0, 0};

    if (HC3(grant_table_op, GNTTABOP_setup_table, &setup, 1) || setup.status)
        panic("share: no grant table\n");
    table = page_alloc();
    if (map_page((void *)table, pte_of(frame, PTE_RW)))
        panic("share: the grant table cannot be mapped\n");
    shared = page_alloc();
    char *readable = page_alloc();
    memcpy(readable, "only to be read", 15);
    grant(WRITABLE, shared, GTF_permit);
    grant(READABLE, readable, GTF_permit | GTF_readonly);
    for (u32 i = 0; i < PAGES; i++)
        grant(MANY + i, page_alloc(), GTF_permit);
    if (HC2(event_channel_op, EVTCHNOP_alloc_unbound, &alloc))
        panic("share: no port\n");
    port = alloc.port;
    event_listen(port, answer);
    printk("share: port %u\n", port);
    console_flush();
    if (cmdline_flag("busy")) {
        for (;;)
            __asm__ volatile("" ::: "memory");
    }
    wait_until(never);
}
