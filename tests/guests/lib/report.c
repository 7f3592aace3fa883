/* One line a case, and a summary the test looks for: `mmu: 61 passed, 0 failed`. */
#include "guest.h"

static const char *suite;
static int passed, failed;

void check_begin(const char *name)
{
    suite = name;
    passed = failed = 0;
    printk("%s: begin\n", suite);
}

void check(int ok, const char *name)
{
    printk("%s %s\n", ok ? "PASS" : "FAIL", name);
    if (ok)
        passed++;
    else
        failed++;
}

void check_value(const char *name, s64 got, s64 want)
{
    if (got == want) {
        check(1, name);
        return;
    }
    failed++;
    printk("FAIL %s: got %ld, want %ld\n", name, got, want);
}

int check_end(void)
{
    printk("%s: %d passed, %d failed\n", suite, passed, failed);
    if (failed && cmdline_flag("crash_if_failed")) /* for where nobody sees what it says */
        shutdown(SHUTDOWN_crash);
    return failed;
}

const char *label(const char *format, ...)
{
    static char text[160];
    __builtin_va_list args;
    __builtin_va_start(args, format);
    text[format_text(text, sizeof(text) - 1, format, args)] = 0;
    __builtin_va_end(args);
    return text;
}
