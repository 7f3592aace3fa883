/* Takes a trap on a stack that is not there: Xen cannot push the frame, the domain crashes. */
#include "guest.h"

void guest_main(void)
{
    printk("stackbomb: trapping on a bad stack\n");
    console_flush();
    __asm__ volatile("movq %0, %%rsp\n\tint3" ::"r"(0x0000600000000000UL) : "memory");
    printk("stackbomb: still here\n");
}
