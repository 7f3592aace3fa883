/*
 * The runtime below every micro-guest: entry, console, events, traps, time, page tables, xenstore.
 *
 * A guest is one C file with a `guest_main`. When it returns, the domain powers off.
 */
#ifndef GUEST_H
#define GUEST_H

#include "abi.h"

#define VIRT_BASE 0xFFFFFFFF80000000UL

/* start.S, init.c */
extern struct start_info *start_info;
extern struct shared_info *shared_info;
extern char hypercall_page[];
void guest_main(void);
const char *cmdline_option(const char *name); /* text after `name=`, or NULL; ends at a space or NUL */
int cmdline_flag(const char *name);
u64 parse_number(const char *text); /* decimal or 0x… */
__attribute__((noreturn)) void shutdown(u32 reason);
__attribute__((noreturn, format(printf, 1, 2))) void panic(const char *format, ...);

/* Hypercalls: rax = number, rdi rsi rdx r10 r8 = arguments; rcx and r11 are lost. */
static inline s64 hypercall(u64 nr, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5)
{
    register u64 r10 __asm__("r10") = a4;
    register u64 r8 __asm__("r8") = a5;
#ifdef USE_HYPERCALL_PAGE
    u64 result = (u64)hypercall_page + nr * 32;
    __asm__ volatile("call *%%rax"
#else
    u64 result = nr;
    __asm__ volatile("syscall"
#endif
                     : "+a"(result), "+D"(a1), "+S"(a2), "+d"(a3), "+r"(r10), "+r"(r8)
                     :
                     : "rcx", "r11", "memory", "cc");
    return (s64)result;
}

#define HC0(nr) hypercall(HC_##nr, 0, 0, 0, 0, 0)
#define HC1(nr, a) hypercall(HC_##nr, (u64)(a), 0, 0, 0, 0)
#define HC2(nr, a, b) hypercall(HC_##nr, (u64)(a), (u64)(b), 0, 0, 0)
#define HC3(nr, a, b, c) hypercall(HC_##nr, (u64)(a), (u64)(b), (u64)(c), 0, 0)
#define HC4(nr, a, b, c, d) hypercall(HC_##nr, (u64)(a), (u64)(b), (u64)(c), (u64)(d), 0)

#define barrier() __asm__ volatile("" ::: "memory")
#define NULL ((void *)0)

/* print.c */
unsigned long str_len(const char *s);
int str_equal(const char *a, const char *b);
void *memset(void *to, int byte, unsigned long n);
void *memcpy(void *to, const void *from, unsigned long n);
int format_text(char *to, int size, const char *format, __builtin_va_list args);
/* %s %c %d %u %x with l and zero padding; one call is one write to the console */
__attribute__((format(printf, 1, 2))) void printk(const char *format, ...);

/* console.c */
void console_init(void);
void console_write(const char *text, int n);
void console_flush(void); /* until the backend took everything */
int console_line(char *to, int size); /* a complete input line without its end, or -1 */

/* events.c */
void events_init(void);
void events_mask(void);
void events_unmask(void); /* and take what is pending */
void event_listen(u32 port, void (*handler)(u32 port));
void event_send(u32 port);
/* Sleep until `ready` says so; it is asked after every event. */
void wait_until(int (*ready)(void));
void event_upcall(void);
extern void (*event_scan)(void); /* instead of the two-level ABI's scan: calls event_deliver for what is pending */
void event_deliver(u32 port);

/* traps.c */
struct regs {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error;
    u64 rip, cs, rflags, rsp, ss;
};
struct trap_record {
    int count; /* traps since `trap_expect` */
    u64 vector, error, cr2, rip, rflags, rsp, cs;
};
extern struct trap_record trap_seen;
extern u64 trap_resume;                      /* where to go on after an expected trap; cleared by it */
extern int (*trap_hook)(struct regs *regs);  /* looked at first; true: handled */
extern int (*user_syscall)(struct regs *regs); /* `syscall` from user mode; true: return to user mode */
void traps_init(void);
/* After a PROBE: FAULT when it ended in a page fault of a write to a present page at `at`, 0 when in none. */
#define FAULT (-1000)
s64 write_fault(u64 at);
void trap_expect(void);
u64 user_run(u64 rip, u64 rsp, u64 rdi); /* until user_leave */
__attribute__((noreturn)) void user_leave(u64 value);
extern u8 trap_stack[], trap_stack_top[];

/*
 * Run asm `code`; a trap in it ends it. `trap_seen` then tells which. All registers that the code uses go into clobbers.
 */
#define PROBE(code, ...)                                                                                               \
    do {                                                                                                               \
        trap_expect();                                                                                                 \
        __asm__ volatile("movq $9f, trap_resume(%%rip)\n\t" code "\n9:\tmovq $0, trap_resume(%%rip)" ::__VA_ARGS__     \
                         : "memory", "cc", "rax", "rcx", "rdx");                                                       \
    } while (0)

/* time.c */
u64 system_time(void); /* ns since the domain's clock began */
void timer_init(void (*handler)(void));
s64 timer_set(u64 deadline); /* absolute, ns; 0 stops it */

/* memory.c */
void memory_init(void);
u64 pfn_to_mfn(u64 pfn);
u64 mfn_to_pfn(u64 mfn); /* from the M2P; ~0 when the frame has none */
static inline u64 va_to_pfn(const void *va) { return ((u64)va - VIRT_BASE) >> PAGE_SHIFT; }
static inline void *pfn_to_va(u64 pfn) { return (void *)(VIRT_BASE + (pfn << PAGE_SHIFT)); }
static inline u64 va_to_mfn(const void *va) { return pfn_to_mfn(va_to_pfn(va)); }
static inline u64 pte_of(u64 mfn, u64 flags) { return (mfn << PAGE_SHIFT) | flags; }
void *page_alloc(void); /* a zeroed page inside the bootstrap mapping, mapped writable */
u64 first_free_pfn(void);
u64 *table_entry(u64 va, int level); /* the entry of `va` in the table of that level, through the bootstrap mapping */
u64 entry_address(const u64 *entry); /* its machine address */
s64 set_entry(const u64 *entry, u64 value); /* by mmu_update */
s64 map_page(const void *va, u64 pte);      /* by update_va_mapping */
s64 mmuext(u32 cmd, u64 arg1, u64 arg2);
s64 make_readonly(const void *va);
s64 make_writable(const void *va);
u64 *table_alloc(void); /* a zeroed page mapped read-only, ready to become a page table */

/* xenstore.c */
void xenstore_init(void);
int xs_read(const char *path, char *to, int size); /* length, or -1 */
int xs_write(const char *path, const char *value);
int xs_watch(const char *path, const char *token);
int xs_event(char *path, int size); /* a watch event's path into `path`; false when none is there */

/* report.c: one line a case */
void check_begin(const char *name);
void check(int ok, const char *name);
void check_value(const char *name, s64 got, s64 want);
int check_end(void);
__attribute__((format(printf, 1, 2))) const char *label(const char *format, ...); /* good until the next one */

#endif
