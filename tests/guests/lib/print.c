/* Strings and a small printf. */
#include "guest.h"

unsigned long str_len(const char *s)
{
    unsigned long n = 0;
    while (s[n])
        n++;
    return n;
}

int str_equal(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

void *memset(void *to, int byte, unsigned long n)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return result;
}

void *memcpy(void *to, const void *from, unsigned long n)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return result;
}

struct output {
    char *to;
    int size;
    int used;
};

static void put(struct output *out, char c)
{
    if (out->used < out->size)
        out->to[out->used++] = c;
}

static void put_number(struct output *out, u64 value, unsigned base, int negative, int width, char fill)
{
    char digits[24];
    int n = 0;

    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    if (negative)
        digits[n++] = '-';
    for (int i = n; i < width; i++)
        put(out, fill);
    while (n)
        put(out, digits[--n]);
}

int format_text(char *to, int size, const char *format, __builtin_va_list args)
{
    struct output out = {to, size, 0};

    for (; *format; format++) {
        if (*format != '%') {
            put(&out, *format);
            continue;
        }
        char fill = ' ';
        int width = 0;
        int is_long = 0;
        if (*++format == '0') {
            fill = '0';
            format++;
        }
        while (*format >= '0' && *format <= '9')
            width = width * 10 + (*format++ - '0');
        while (*format == 'l') {
            is_long = 1;
            format++;
        }
        switch (*format) {
        case 's':
            for (const char *s = __builtin_va_arg(args, const char *); *s; s++)
                put(&out, *s);
            break;
        case 'c':
            put(&out, (char)__builtin_va_arg(args, int));
            break;
        case 'd': {
            s64 value = is_long ? __builtin_va_arg(args, s64) : __builtin_va_arg(args, int);
            put_number(&out, value < 0 ? -(u64)value : (u64)value, 10, value < 0, width, fill);
            break;
        }
        case 'u':
        case 'x':
            put_number(&out, is_long ? __builtin_va_arg(args, u64) : __builtin_va_arg(args, u32),
                       *format == 'u' ? 10 : 16, 0, width, fill);
            break;
        default:
            put(&out, *format);
        }
    }
    return out.used;
}

void printk(const char *format, ...)
{
    char text[512];
    __builtin_va_list args;
    __builtin_va_start(args, format);
    int n = format_text(text, sizeof(text), format, args);
    __builtin_va_end(args);
    console_write(text, n);
}
