/*
 * Boots, says who it is, echoes console lines, and obeys control/shutdown.
 *
 * Command line: `quit` ends it right after the greeting.
 */
#include "guest.h"

static char path[128];
static char text[256];

static void obey(void)
{
    if (xs_read("control/shutdown", text, sizeof(text)) <= 0)
        return;
    printk("hello: control/shutdown says %s\n", text);
    xs_write("control/shutdown", ""); /* the acknowledgement */
    if (str_equal(text, "poweroff") || str_equal(text, "halt"))
        shutdown(SHUTDOWN_poweroff);
    if (str_equal(text, "reboot"))
        shutdown(SHUTDOWN_reboot);
    if (str_equal(text, "crash"))
        shutdown(SHUTDOWN_crash);
    printk("hello: cannot do that\n");
}

/* Sleep until something changed, but look at both sources first. */
static int something_to_do(void)
{
    if (console_line(text, sizeof(text)) >= 0) {
        printk("echo: %s\n", text);
        return 1;
    }
    if (xs_event(path, sizeof(path))) {
        if (str_equal(path, "control/shutdown"))
            obey();
        return 1;
    }
    return 0;
}

void guest_main(void)
{
    printk("hello: %s, %lu pages, cmdline \"%s\"\n", start_info->magic, start_info->nr_pages, start_info->cmd_line);
    xenstore_init();
    if (xs_read("name", text, sizeof(text)) < 0)
        panic("hello: no name in xenstore\n");
    printk("hello: name %s\n", text);
    if (xs_read("domid", text, sizeof(text)) < 0)
        panic("hello: no domid in xenstore\n");
    printk("hello: domid %s\n", text);
    if (cmdline_flag("quit"))
        return;
    xs_watch("control/shutdown", "control");
    printk("hello: ready\n");
    for (;;)
        wait_until(something_to_do);
}
