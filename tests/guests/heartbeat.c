/*
 * Beats a hundred times a second, and looks each time whether its memory is what it was: the neighbour of a guest that
 * misbehaves (tests/fuzz). The host reads `pulse`, which it finds by its mark.
 */
#include "guest.h"

#define PERIOD 10000000UL
#define PAGES 64
#define WORDS (PAGE_SIZE / sizeof(u64))

static struct {
    u64 mark[2];
    u64 beats, late, worst; /* late: ns, of the last beat; worst: since the host wrote 0 */
    u64 damaged;            /* words that were not what they should be */
} pulse __attribute__((section(".data"))) = {.mark = {0x7472616548207461UL, 0x21747261656220UL}};

static u64 *pages[PAGES];
static volatile u64 fired;
static u64 awaited;

static void on_timer(void) { fired++; }
static int has_fired(void) { return fired >= awaited; }
static u64 word_at(u64 page, u64 n) { return (page * WORDS + n + 1) * 0x9e3779b97f4a7c15UL; }

void guest_main(void)
{
    for (u64 page = 0; page < PAGES; page++) {
        pages[page] = page_alloc();
        for (u64 n = 0; n < WORDS; n++)
            pages[page][n] = word_at(page, n);
    }
    timer_init(on_timer);
    u64 deadline = system_time() + PERIOD;
    for (;;) {
        awaited++;
        timer_set(deadline);
        wait_until(has_fired);
        u64 now = system_time();
        *(volatile u64 *)&pulse.late = now - deadline;
        if (now - deadline > *(volatile u64 *)&pulse.worst)
            *(volatile u64 *)&pulse.worst = now - deadline;
        u64 page = pulse.beats % PAGES;
        for (u64 n = 0; n < WORDS; n++)
            if (pages[page][n] != word_at(page, n))
                pulse.damaged++;
        pulse.beats++;
        /* The next one from now: a late beat does not make the rest late. */
        deadline = system_time() + PERIOD;
    }
}
