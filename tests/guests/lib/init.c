/* Bring-up before guest_main, and the end of a guest. */
#include "guest.h"

struct start_info *start_info;
struct shared_info *shared_info;
extern u8 shared_info_page[];
void guest_init(void);

void guest_init(void)
{
    shared_info = (struct shared_info *)shared_info_page;
    s64 rc = HC3(update_va_mapping, shared_info, (start_info->shared_info & PTE_ADDR) | PTE_RW, UVMF_INVLPG);
    if (rc)
        shutdown(SHUTDOWN_crash);
    memory_init();
    traps_init();
    events_init();
    console_init();
    guest_main();
    shutdown(SHUTDOWN_poweroff);
}

void shutdown(u32 reason)
{
    console_flush();
    for (;;)
        HC2(sched_op, SCHEDOP_shutdown, &reason);
}

void panic(const char *format, ...)
{
    char text[256];
    __builtin_va_list args;
    __builtin_va_start(args, format);
    int n = format_text(text, sizeof(text), format, args);
    __builtin_va_end(args);
    console_write(text, n);
    shutdown(SHUTDOWN_crash);
}

static const char *find_word(const char *name)
{
    unsigned long n = str_len(name);
    const char *p = start_info->cmd_line;
    const char *end = p + sizeof(start_info->cmd_line);

    while (p < end && *p) {
        unsigned long i = 0;
        while (i < n && p + i < end && p[i] == name[i])
            i++;
        if (i == n)
            return p + n;
        while (p < end && *p && *p != ' ')
            p++;
        while (p < end && *p == ' ')
            p++;
    }
    return NULL;
}

const char *cmdline_option(const char *name)
{
    const char *p = find_word(name);
    return p && *p == '=' ? p + 1 : NULL;
}

int cmdline_flag(const char *name)
{
    const char *p = find_word(name);
    return p && (*p == ' ' || *p == 0);
}

u64 parse_number(const char *text)
{
    u64 value = 0;
    u64 base = 10;

    if (text[0] == '0' && text[1] == 'x') {
        base = 16;
        text += 2;
    }
    for (;; text++) {
        u64 digit = *text >= '0' && *text <= '9'   ? (u64)(*text - '0')
                    : *text >= 'a' && *text <= 'f' ? (u64)(*text - 'a' + 10)
                                                   : 99;
        if (digit >= base)
            return value;
        value = value * base + digit;
    }
}
