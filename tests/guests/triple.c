/* Faults with no handler for it: its domain crashes. */
#include "guest.h"

void guest_main(void)
{
    printk("triple: faulting without handlers\n");
    console_flush();
    HC1(set_trap_table, 0);
    __asm__ volatile("ud2");
    printk("triple: still here\n");
}
