/*
 * Does whatever it is told: the guest side of the fuzzers in tests/fuzz.
 *
 * The host writes a program (a list of hypercalls and memory accesses) into `box`, the guest carries it out, survives the
 * faults it causes, and reports with a CONSOLEIO_write of `fuzz_done`; the answer to that hypercall comes when the next
 * program is there. In raw mode the guest draws its calls itself. `box` begins with a mark by which the host finds it.
 */
#include "guest.h"

#define CALLS 64
#define ARENA 32
#define KERNEL_CS64 0xe030 /* as Xen shows it */
#define WINDOW_VA 0x0000010000000000UL

enum kind {
    HYPERCALL,
    WRITE8, /* args: address, value */
    WRITE4,
    WRITE1,
    EXCHANGE,
    COMPARE_EXCHANGE,
    OR8,
    AND8,
    FILL, /* `rep stosq` of args[2] words */
    IRET, /* args[0]: the frame */
    USER, /* args: rip and rsp to go on with in user mode */
    TOUCH, /* write args[3] at offset args[2] of each page from args[0] to args[1] */
};

struct call {
    u64 nr, args[6], kind, delay;
    s64 result;
    u64 trapped; /* 1 + vector, 0: no trap */
};
_Static_assert(sizeof(struct call) == 88, "struct call");

static struct {
    u64 mark[2];
    u64 raw, count, seed;     /* of the program: raw calls, or calls in `calls` */
    u64 batches, done, traps; /* what was done since the start */
    u64 values[64];           /* raw mode chooses arguments from these */
    u64 arena, arena_pages, window, window_l1, edge, info, recover, spin, spin_stack; /* addresses for the host */
    u64 events, broken;       /* broken: traps outside of calls */
} box __attribute__((aligned(4096), section(".data"))) = {.mark = {0x7a7a75667a7a7566UL, 0x21646c726f77206fUL}};

/* What answers may overwrite has a page behind it that nothing else is in. */
static struct call calls[CALLS] __attribute__((aligned(4096), used));
static u8 images[CALLS][512] __attribute__((aligned(4096), used));
static u8 gap[4096] __attribute__((aligned(4096), used));
static u8 big[3 * 4096] __attribute__((aligned(4096), used)); /* for structures beyond an image: argument of raw calls */
static u8 info_page[4096] __attribute__((aligned(4096), used));
static u8 iret_stack[8192] __attribute__((aligned(4096), used));
static u8 spin_stack[4096] __attribute__((aligned(4096), used));
static char fuzz_done[] = "\1fuzz: batch done";

u64 fuzz_stack;
static int must_heal, in_user;
void fuzz_loop(void);
extern char _end[], fuzz_restart[], fuzz_back[], fuzz_event[], fuzz_spin[], failsafe_entry[], syscall_entry[];
u64 fuzz_call(struct call *call);
u64 fuzz_iret(u64 frame);

__asm__(".text\n"
        ".macro fuzz_save\n"
        "pushq %rbx\n pushq %rbp\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, fuzz_stack(%rip)\n"
        "leaq fuzz_back(%rip), %rax\n movq %rax, trap_resume(%rip)\n"
        ".endm\n"
        "fuzz_call: fuzz_save\n"
        "movq (%rdi), %rax\n movq 16(%rdi), %rsi\n movq 24(%rdi), %rdx\n"
        "movq 32(%rdi), %r10\n movq 40(%rdi), %r8\n movq 48(%rdi), %r9\n movq 8(%rdi), %rdi\n"
        "syscall\n"
        ".globl fuzz_back\n"
        "fuzz_back: movq fuzz_stack(%rip), %rsp\n cld\n movq $0, trap_resume(%rip)\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbp\n popq %rbx\n ret\n"
        "fuzz_iret: fuzz_save\n movq %rdi, %rsp\n movl $23, %eax\n syscall\n ud2\n"
        /* Events are taken and forgotten, wherever the vcpu_info is. */
        "fuzz_event: popq %rcx\n popq %r11\n pushq $0\n"
        "movb $0, shared_info_page(%rip)\n movb $0, info_page(%rip)\n movb $0, info_page+64(%rip)\n"
        "movb $0, shared_info_page+64(%rip)\n"
        "incq box+648(%rip)\n jmp iret_tail\n"
        /* After a trap between two calls. */
        "fuzz_restart: leaq boot_stack_top(%rip), %rsp\n call fuzz_loop\n ud2\n"
        /* A second vCPU does nothing, again and again. */
        "fuzz_spin: movl $29, %eax\n xorl %edi, %edi\n xorl %esi, %esi\n syscall\n jmp fuzz_spin\n");
_Static_assert(__builtin_offsetof(__typeof__(box), events) == 648, "fuzz_event knows the offset");

/* Any trap ends what was going on: an expected one where PROBE wants it, a program's with the program. */
static int on_trap(struct regs *regs)
{
    box.traps++;
    if ((regs->cs & 3) == 3) {
        trap_seen.count++;
        trap_seen.vector = regs->vector;
        if (in_user)
            user_leave(1);
        trap_resume = (u64)fuzz_back;
    }
    if (!trap_resume) {
        box.broken++;
        must_heal = 1;
        trap_resume = (u64)fuzz_restart;
    }
    /* An iret that was refused left the selectors it asked for in the frame. */
    regs->cs = KERNEL_CS64;
    regs->ss = FLAT_SS64;
    regs->rflags = 0x202;
    return 0;
}

static int on_syscall(struct regs *regs)
{
    if (in_user)
        user_leave(2);
    regs->cs = KERNEL_CS64; /* by an iret of a program's */
    regs->ss = FLAT_SS64;
    regs->rip = (u64)fuzz_back;
    return 1;
}

static void heal(void)
{
    struct callback_register events = {CALLBACKTYPE_event, CALLBACKF_mask_events, (u64)fuzz_event};
    struct callback_register failsafe = {CALLBACKTYPE_failsafe, 0, (u64)failsafe_entry};
    struct callback_register syscalls = {CALLBACKTYPE_syscall, CALLBACKF_mask_events, (u64)syscall_entry};

    traps_init();
    HC2(callback_op, CALLBACKOP_register, &events);
    HC2(callback_op, CALLBACKOP_register, &failsafe);
    HC2(callback_op, CALLBACKOP_register, &syscalls);
    HC2(vm_assist, VMASST_CMD_enable, VMASST_TYPE_writable_pagetables);
    HC1(fpu_taskswitch, 0);
    if (must_heal || !(box.batches & 15))
        for (u8 *page = (u8 *)&box; page < (u8 *)_end; page += PAGE_SIZE)
            if (page != (u8 *)shared_info)
                make_writable(page);
    must_heal = 0;
}

static void access(struct call *call)
{
    u64 *at = (u64 *)call->args[0], value = call->args[1], other = call->args[2];

    switch (call->kind) {
    case WRITE8:
        PROBE("movq %1, (%0)", "r"(at), "r"(value));
        break;
    case WRITE4:
        PROBE("movl %k1, (%0)", "r"(at), "r"(value));
        break;
    case WRITE1:
        PROBE("movb %b1, (%0)", "r"(at), "b"(value));
        break;
    case EXCHANGE:
        PROBE("movq %1, %%rax\n\txchgq %%rax, (%0)", "r"(at), "r"(value));
        break;
    case COMPARE_EXCHANGE:
        PROBE("movq %2, %%rax\n\tlock cmpxchgq %1, (%0)", "r"(at), "r"(value), "r"(other));
        break;
    case OR8:
        PROBE("lock orq %1, (%0)", "r"(at), "r"(value));
        break;
    case AND8:
        PROBE("lock andq %1, (%0)", "r"(at), "r"(value));
        break;
    case FILL:
        trap_expect();
        __asm__ volatile("movq $9f, trap_resume(%%rip)\n\trep stosq\n9:\tmovq $0, trap_resume(%%rip)"
                         : "+D"(at), "+c"(other)
                         : "a"(value)
                         : "memory", "cc", "rdx");
        break;
    case IRET:
        trap_expect();
        fuzz_iret(call->args[0]);
        break;
    case USER:
        trap_expect();
        in_user = 1;
        call->result = (s64)user_run(call->args[0], call->args[1], 0);
        in_user = 0;
        break;
    case TOUCH:
        for (u64 va = call->args[0]; va < call->args[1]; va += PAGE_SIZE) {
            PROBE("movq %1, (%0)", "r"(va + (other & 0xff8)), "r"(call->args[3]));
            if (!trap_seen.count)
                call->result++;
        }
        break;
    }
}

static void carry_out(struct call *call)
{
    for (volatile u64 n = call->delay & 0xffff; n; n--)
        ;
    call->result = 0;
    trap_expect();
    if (call->kind == HYPERCALL)
        call->result = (s64)fuzz_call(call);
    else
        access(call);
    call->trapped = trap_seen.count ? 1 + trap_seen.vector : 0;
    box.done++;
}

static u64 draw(void)
{
    u64 x = box.seed;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return box.seed = x;
}

/* Calls that take what keeps this guest alive are left to programs. */
static u64 draw_number(void)
{
    static const u8 numbers[] = {1, 1, 2, 5, 7, 8, 9, 10, 12, 12, 13, 14, 14, 15, 17, 18, 20, 20, 20, 21, 22, 24, 24, 25,
                                 26, 26, 26, 27, 28, 29, 32, 32, 32, 33, 34, 35, 36, 38, 39, 40, 41, 48, 55, 63, 6, 16};
    u64 random = draw();
    return random >> 8 & 255 ? numbers[random % sizeof(numbers)] : random >> 16;
}

static u64 draw_argument(void)
{
    u64 random = draw();
    switch (random & 7) {
    case 0:
    case 1:
        return random >> 32 & 31;
    case 2:
        return (u64)big + (random >> 16 & 0x1fff);
    case 3:
        return draw() >> (random >> 8 & 63);
    default:
        return box.values[random >> 16 & 63] + (random & 0x100 ? random >> 32 & 0xfff : 0);
    }
}

/* Entries at random would be an iret or set_trap_table(NULL) before long. */
static void draw_multicall(struct call *call)
{
    struct multicall_entry *entries = (struct multicall_entry *)big + (draw() & 31);

    call->args[0] = (u64)entries;
    call->args[1] = draw() & 7;
    for (u64 n = 0; n < call->args[1]; n++) {
        entries[n].op = draw_number();
        if (entries[n].op == HC_iret)
            entries[n].op = 14;
        for (int i = 0; i < 6; i++)
            entries[n].args[i] = draw_argument();
    }
}

static void raw_batch(void)
{
    static struct call call;

    for (u64 n = box.count; n; n--) {
        call.nr = draw_number();
        if (call.nr == HC_iret)
            continue;
        for (int i = 0; i < 6; i++)
            call.args[i] = draw_argument();
        for (int i = 0; i < 16; i++)
            ((u64 *)big)[draw() & 1023] = draw_argument();
        if (call.nr == HC_multicall)
            draw_multicall(&call);
        carry_out(&call);
    }
}

static void set_up(void)
{
    u64 *l1 = table_alloc(), *l2 = table_alloc(), *l3 = table_alloc();
    u8 *edge;

    box.arena = (u64)page_alloc();
    for (int i = 1; i < ARENA; i++)
        page_alloc();
    box.arena_pages = ARENA;
    edge = page_alloc();
    map_page(page_alloc(), 0);
    box.edge = (u64)edge + PAGE_SIZE;
    set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW));
    set_entry(l3 + (WINDOW_VA >> 30 & 511), pte_of(va_to_mfn(l2), PTE_RW));
    set_entry(l2, pte_of(va_to_mfn(l1), PTE_RW));
    set_entry((u64 *)start_info->pt_base + (WINDOW_VA >> 39 & 511), pte_of(va_to_mfn(l3), PTE_RW));
    box.window = WINDOW_VA;
    box.window_l1 = (u64)l1;
    box.info = (u64)info_page;
    box.recover = (u64)fuzz_back;
    box.spin = (u64)fuzz_spin;
    box.spin_stack = (u64)spin_stack + sizeof(spin_stack);
    trap_hook = on_trap;
    user_syscall = on_syscall;
}

void fuzz_loop(void)
{
    for (;;) {
        heal();
        box.batches++;
        HC3(console_io, CONSOLEIO_write, sizeof(fuzz_done) - 1, fuzz_done);
        if (box.raw)
            raw_batch();
        else
            for (u64 n = 0; n < box.count && n < CALLS; n++)
                carry_out(&calls[n]);
    }
}

void guest_main(void)
{
    set_up();
    fuzz_loop();
}
