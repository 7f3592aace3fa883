/* A client of xenstore over the shared ring (public/io/xs_wire.h): one request at a time, watch events kept aside. */
#include "guest.h"

#define MAX_EVENTS 8
#define MAX_PATH 128

static struct xenstore_ring *ring;
static u32 port;
static u32 request_id;
static char payload[XS_PAYLOAD_MAX + 1];
static char events[MAX_EVENTS][MAX_PATH];
static int events_used;

static void on_event(u32 unused) { (void)unused; }

void xenstore_init(void)
{
    ring = pfn_to_va(mfn_to_pfn(start_info->store_mfn));
    port = start_info->store_evtchn;
    event_listen(port, on_event);
}

static int has_room(void) { return ring->req_prod - *(volatile u32 *)&ring->req_cons < sizeof(ring->req); }

static int has_data(void) { return *(volatile u32 *)&ring->rsp_prod != ring->rsp_cons; }

static void send(const void *data, u32 n)
{
    for (const char *from = data; n; n--) {
        if (!has_room()) {
            event_send(port);
            wait_until(has_room);
        }
        ring->req[ring->req_prod % sizeof(ring->req)] = *from++;
        barrier();
        *(volatile u32 *)&ring->req_prod = ring->req_prod + 1;
    }
}

static void receive(void *data, u32 n)
{
    for (char *to = data; n; n--) {
        if (!has_data()) {
            event_send(port);
            wait_until(has_data);
        }
        *to++ = ring->rsp[ring->rsp_cons % sizeof(ring->rsp)];
        barrier();
        *(volatile u32 *)&ring->rsp_cons = ring->rsp_cons + 1;
    }
}

static void keep_event(void)
{
    int i = 0;

    if (events_used == MAX_EVENTS)
        return; /* a reader that cares looks at the store itself */
    for (; i < MAX_PATH - 1 && payload[i]; i++)
        events[events_used][i] = payload[i];
    events[events_used++][i] = 0;
}

/* One message into `payload`; its header is returned. */
static struct xs_header receive_message(void)
{
    struct xs_header header;

    receive(&header, sizeof(header));
    if (header.len > XS_PAYLOAD_MAX)
        panic("xenstore sent a message of %u bytes\n", header.len);
    receive(payload, header.len);
    payload[header.len] = 0;
    event_send(port);
    return header;
}

/* Returns the answer's length (it is in `payload`), or -1 for an error. */
static int request(u32 type, const char *first, const char *second, int end_second)
{
    u32 n1 = (u32)str_len(first) + 1;
    u32 n2 = second ? (u32)str_len(second) + (end_second ? 1 : 0) : 0;
    struct xs_header header = {type, ++request_id, 0, n1 + n2};

    send(&header, sizeof(header));
    send(first, n1);
    send(second, n2);
    event_send(port);
    for (;;) {
        struct xs_header answer = receive_message();
        if (answer.type == XS_WATCH_EVENT)
            keep_event();
        else if (answer.req_id == request_id)
            return answer.type == XS_ERROR ? -1 : (int)answer.len;
    }
}

int xs_read(const char *path, char *to, int size)
{
    int n = request(XS_READ, path, NULL, 0);
    if (n < 0)
        return -1;
    if (n > size - 1)
        n = size - 1;
    memcpy(to, payload, (unsigned long)n);
    to[n] = 0;
    return n;
}

int xs_write(const char *path, const char *value) { return request(XS_WRITE, path, value, 0); }

int xs_watch(const char *path, const char *token) { return request(XS_WATCH, path, token, 1); }

int xs_event(char *path, int size)
{
    if (!events_used && has_data() && receive_message().type == XS_WATCH_EVENT)
        keep_event();
    if (!events_used)
        return 0;
    int i = 0;
    for (; i < size - 1 && events[0][i]; i++)
        path[i] = events[0][i];
    path[i] = 0;
    events_used--;
    memcpy(events[0], events[1], (unsigned long)events_used * MAX_PATH);
    return 1;
}
