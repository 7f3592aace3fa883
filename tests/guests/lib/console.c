/*
 * The console: the shared ring of start_info, or HYPERVISOR_console_io when there is none or the command line says
 * `console_io`.
 */
#include "guest.h"

static struct console_ring *ring;
static u32 port;
static char line[256];
static int line_used;

static void on_event(u32 unused)
{
    (void)unused; /* the ring is looked at by whoever waits */
}

void console_init(void)
{
    if (!start_info->console_mfn || cmdline_flag("console_io"))
        return;
    ring = pfn_to_va(mfn_to_pfn(start_info->console_mfn));
    port = start_info->console_evtchn;
    event_listen(port, on_event);
}

static void wait_for_backend(void)
{
    struct sched_poll poll = {.ports = (u64)&port, .nr_ports = 1, .timeout = system_time() + 1000000000UL};

    /* The port may be pending from before: then poll returns at once, and the loops here ask again. */
    __asm__ volatile("lock btrq %1, %0" : "+m"(shared_info->evtchn_pending[port / 64]) : "r"((u64)port % 64) : "cc");
    barrier();
    event_send(port);
    if (*(volatile u32 *)&ring->out_cons != ring->out_prod)
        HC2(sched_op, SCHEDOP_poll, &poll);
}

void console_write(const char *text, int n)
{
    if (!ring) {
        HC3(console_io, CONSOLEIO_write, n, text);
        return;
    }
    while (n) {
        u32 prod = ring->out_prod;
        u32 room = sizeof(ring->out) - (prod - *(volatile u32 *)&ring->out_cons);
        for (; n && room; n--, room--)
            ring->out[prod++ % sizeof(ring->out)] = *text++;
        barrier();
        *(volatile u32 *)&ring->out_prod = prod;
        if (n)
            wait_for_backend();
    }
    event_send(port);
}

void console_flush(void)
{
    for (int i = 0; ring && i < 5 && *(volatile u32 *)&ring->out_cons != ring->out_prod; i++)
        wait_for_backend();
}

int console_line(char *to, int size)
{
    while (ring && ring->in_cons != *(volatile u32 *)&ring->in_prod) {
        char c = ring->in[ring->in_cons % sizeof(ring->in)];
        barrier();
        *(volatile u32 *)&ring->in_cons = ring->in_cons + 1;
        event_send(port);
        if (c == '\r' || c == '\n') {
            int n = line_used < size - 1 ? line_used : size - 1;
            memcpy(to, line, (unsigned long)n);
            to[n] = 0;
            line_used = 0;
            return n;
        }
        if (line_used < (int)sizeof(line))
            line[line_used++] = c;
    }
    return -1;
}
