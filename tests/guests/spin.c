/* Spins for ever with events masked: only the hypervisor can stop it. */
#include "guest.h"

void guest_main(void)
{
    printk("spin: spinning\n");
    console_flush();
    events_mask();
    for (;;)
        __asm__ volatile("");
}
