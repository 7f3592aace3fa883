/* Ends as crashed by its own word. */
#include "guest.h"

void guest_main(void)
{
    printk("crashme: crashing\n");
    shutdown(SHUTDOWN_crash);
}
