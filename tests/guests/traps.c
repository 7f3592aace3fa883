/*
 * Every way into a handler and back: exceptions of the kernel, nested ones, user mode, and the variants of iret.
 *
 * What is expected is what the SDM says of the exception and what Xen's PV ABI says of its frame (public/arch-x86/xen.h:
 * error codes with the user bit set by the guest's mode, cr2 in vcpu_info, events masked where the trap table says so).
 */
#include "guest.h"

#define USER_CODE 0x0000000000400000UL
#define USER_STACK 0x0000000000600000UL
#define HOLE 0x0000123400000000UL
#define NON_CANONICAL 0x0000800000000000UL

enum { DE = 0, DB = 1, BP = 3, OF = 4, BR = 5, UD = 6, NP = 11, SS = 12, GP = 13, PF = 14 };
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_I = 16 };

static u8 *page;     /* mapped as each case likes */
static u8 *readonly; /* mapped without the right to write */

static void expect(const char *name, u64 vector, u64 error, u64 cr2)
{
    int ok = trap_seen.count == 1 && trap_seen.vector == vector && trap_seen.error == error &&
             (vector != PF || trap_seen.cr2 == cr2);
    if (!ok)
        printk("  %d traps, vector %lu error %lx cr2 %lx; want vector %lu error %lx cr2 %lx\n", trap_seen.count,
               trap_seen.vector, trap_seen.error, trap_seen.cr2, vector, error, cr2);
    check(ok, name);
}

static void exceptions(void)
{
    PROBE("xorl %%edx, %%edx\n\tmovl $1, %%eax\n\txorl %%ecx, %%ecx\n\tdivl %%ecx");
    expect("#DE: division by zero", DE, 0, 0);
    PROBE("movl $0x80000000, %%eax\n\tcltd\n\tmovl $-1, %%ecx\n\tidivl %%ecx");
    expect("#DE: quotient too large", DE, 0, 0);
    PROBE("int3");
    expect("#BP: int3", BP, 0, 0);
    PROBE("int $3");
    expect("#BP: int $3", BP, 0, 0);
    PROBE("int $4");
    expect("#OF: int $4", OF, 0, 0);
    PROBE("int $0x80");
    expect("int $0x80", 0x80, 0, 0);
    PROBE("ud2");
    expect("#UD: ud2", UD, 0, 0);
    PROBE("int $6");
    expect("#GP: int of a gate that only the CPU may take", GP, 6 * 8 + 2, 0);
    PROBE("int $0x21");
    expect("#GP: int without a handler", GP, 0x21 * 8 + 2, 0);
    PROBE("movq (%0), %%rax", "r"(NON_CANONICAL));
    expect("#GP: non-canonical read", GP, 0, 0);
    PROBE("movl $0x12345678, %%ecx\n\txorl %%eax, %%eax\n\txorl %%edx, %%edx\n\twrmsr");
    expect("#GP: wrmsr of no MSR", GP, 0, 0);
    PROBE("movl $0xabcd, %%eax\n\tmovw %%ax, %%ss");
    expect("#GP: ss from beyond the GDT", GP, 0xabcc, 0);
}

static s64 set_iopl(u32 level)
{
    return HC2(physdev_op, 6 /* PHYSDEVOP_set_iopl */, &level);
}

/* Port instructions: the kernel needs level 1 for them, and no port is the guest's, so that nothing answers. */
static void ports(void)
{
    u64 rax = 0x1122334455667788UL, at;
    u8 byte = 1;

    PROBE("inb $0x80, %%al");
    expect("#GP: in without IOPL", GP, 0, 0);
    PROBE("outb %%al, $0x80");
    expect("#GP: out without IOPL", GP, 0, 0);
    PROBE("movl $0x80, %%edx\n\toutsb", "S"(&byte));
    expect("#GP: outs without IOPL", GP, 0, 0);
    trap_expect();
    __asm__ volatile("leaq 1f(%%rip), %1\n\tmovq $2f, trap_resume(%%rip)\n\tmovl $0x80, %%edx\n\tcmpl %%edx, %%edx\n"
                     "1:\tinl %%dx, %%eax\n\tmovl $1, %%eax\n2:"
                     : "+a"(rax), "=&r"(at) : : "rdx", "memory", "cc");
    check(trap_seen.rip == at, "a refused in: rip is the instruction");
    check(rax == 0x1122334455667788UL, "a refused in: rax is what it was");
    check((trap_seen.rflags & 0x8d5) == 0x44, "a refused in: the flags are those before it");
    check_value("set_iopl", set_iopl(1), 0);
    PROBE("outb %%al, $0x80");
    check_value("out at IOPL 1", trap_seen.count, 0);
    rax = 0x1122334455667788UL;
    __asm__ volatile("inb $0x80, %%al" : "+a"(rax));
    check(rax == 0x11223344556677ffUL, "in at IOPL 1: a byte of ones");
    __asm__ volatile("movl $0x80, %%edx\n\tinl %%dx, %%eax" : "+a"(rax) : : "rdx");
    check(rax == 0xffffffffUL, "in at IOPL 1: a word of ones, and zeros above");
    trap_expect();
    __asm__ volatile("leaq 1f(%%rip), %0\n\tmovq $2f, trap_resume(%%rip)\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\t"
                     "inb $0x80, %%al\n1:\tnop\n\tnop\n2:"
                     : "=&r"(at) : : "rax", "memory", "cc");
    check(trap_seen.vector == DB && trap_seen.rip == at, "a single step over an emulated in ends behind it");
    check_value("set_iopl back", set_iopl(0), 0);
}

/* Selectors of the guest's own table that cannot be loaded, and a call gate, which is for nobody. */
static void segments(void)
{
    struct { u32 offset; u16 selector; } __attribute__((packed)) far_code = {0, 3 << 3 | 3}, gate = {0, 4 << 3 | 3};
    u64 *table = page_alloc(), frame = va_to_mfn(table);

    table[1] = 0x00cff3000000ffffUL; /* data */
    table[2] = 0x00cf73000000ffffUL; /* data that is not present */
    table[3] = 0x00af7b000000ffffUL; /* code that is not present */
    table[4] = 0x0000ec00e0330000UL; /* a call gate to Xen's flat code, open to all */
    make_readonly(table);
    check_value("set_gdt", HC2(set_gdt, &frame, 512), 0);
    check_value("a call gate's privilege level is the selector's from now on", table[4] >> 45 & 3, 0);
    PROBE("movl $0xb, %%eax\n\tmovl %%eax, %%es\n\txorl %%eax, %%eax\n\tmovl %%eax, %%es");
    check_value("traps by a good selector", trap_seen.count, 0);
    PROBE("movl $0x13, %%eax\n\tmovl %%eax, %%es");
    expect("#NP: es not present", NP, 0x10, 0);
    PROBE("movl $0x13, %%eax\n\tmovl %%eax, %%ss");
    expect("#SS: ss not present", SS, 0x10, 0);
    PROBE("ljmp *(%0)", "r"(&far_code));
    expect("#NP: cs not present", NP, 0x18, 0);
    PROBE("lcall *(%0)", "r"(&gate));
    expect("#GP: a call gate", GP, 0x20, 0);
    check_value("no gdt", HC2(set_gdt, NULL, 0), 0);
    make_writable(table);
}

static void frames(void)
{
    u64 rsp, at;

    __asm__ volatile("movq %%rsp, %0" : "=r"(rsp));
    PROBE("1:\tint3");
    check(trap_seen.cs == (FLAT_CS64 & ~3UL) || (trap_seen.cs & 0xffff) == (FLAT_CS64 & ~3UL),
          "frame: cs has ring 0 to mean the kernel");
    check((trap_seen.cs >> 32 & 0xff) == 0, "frame: saved_upcall_mask is 0");
    check(trap_seen.rflags >> 9 & 1, "frame: IF is set when events are not masked");
    check(trap_seen.rsp <= rsp && rsp - trap_seen.rsp < 512, "frame: rsp is the interrupted one");
    events_mask();
    PROBE("int3");
    check((trap_seen.cs >> 32 & 0xff) == 1 && !(trap_seen.rflags >> 9 & 1), "frame: masked events show as IF clear");
    check(shared_info->vcpu_info[0].evtchn_upcall_mask == 1, "iret with IF clear leaves events masked");
    events_unmask();
    PROBE("ud2");
    check(shared_info->vcpu_info[0].evtchn_upcall_mask == 0, "iret with IF set unmasks events");
    trap_expect();
    __asm__ volatile("leaq 1f(%%rip), %0\n\tmovq $2f, trap_resume(%%rip)\n1:\tud2\n2:" : "=&r"(at) : : "memory");
    check(trap_seen.rip == at, "a fault's rip is the instruction");
    trap_expect();
    __asm__ volatile("leaq 1f(%%rip), %0\n\tmovq $2f, trap_resume(%%rip)\n\tint3\n1:\tnop\n2:" : "=&r"(at) : : "memory");
    check(trap_seen.rip == at, "a trap's rip is behind the instruction");
}

static void single_step(void)
{
    PROBE("pushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\tnop\n\tnop");
    expect("#DB: single step", DB, 0, 0);
    PROBE(".byte 0xf1");
    expect("#DB: icebp", DB, 0, 0);
}

static void page_faults(void)
{
    PROBE("movq (%0), %%rax", "r"(HOLE));
    expect("#PF: read, no table", PF, 0, HOLE);
    PROBE("movq %%rax, (%0)", "r"(HOLE + 8));
    expect("#PF: write, no table", PF, PF_W, HOLE + 8);
    PROBE("jmp *%0", "r"(HOLE + 16));
    check(trap_seen.vector == PF && (trap_seen.error & ~(u64)PF_I) == 0 && trap_seen.cr2 == HOLE + 16 &&
              trap_seen.rip == HOLE + 16,
          "#PF: fetch, no table");
    map_page(page, 0);
    PROBE("movb (%0), %%al", "r"(page + 5));
    expect("#PF: read, not present", PF, 0, (u64)page + 5);
    PROBE("movb %%al, (%0)", "r"(page + 6));
    expect("#PF: write, not present", PF, PF_W, (u64)page + 6);
    PROBE("movq (%0), %%rax", "r"(page - 4));
    expect("#PF: a read across the border faults at the missing page", PF, 0, (u64)page);
    make_writable(page);
    *(volatile u8 *)page = 1;
    check(1, "mapped again, no fault");
    PROBE("movb %%al, (%0)", "r"(readonly + 7));
    expect("#PF: write to a read-only page", PF, PF_P | PF_W, (u64)readonly + 7);
    PROBE("lock incq (%0)", "r"(readonly + 8));
    expect("#PF: locked write to a read-only page", PF, PF_P | PF_W, (u64)readonly + 8);
    map_page(page, pte_of(va_to_mfn(page), PTE_RW | PTE_NX));
    PROBE("jmp *%0", "r"(page));
    expect("#PF: fetch from a no-execute page", PF, PF_P | PF_I, (u64)page);
    PROBE("movq (%0), %%rax", "r"(0x1000UL));
    expect("#PF: a small number used as a pointer", PF, 0, 0x1000);
    PROBE("movq %%rax, (%0)", "r"(M2P_VIRT_START));
    expect("#PF: write to the machine-to-physical table", PF, PF_P | PF_W, M2P_VIRT_START);
    PROBE("movq (%0), %%rax", "r"(0xFFFF830000000000UL));
    check(trap_seen.vector == PF && !(trap_seen.error & (PF_W | PF_U)), "#PF: read of Xen's own area");
    PROBE("movq %%rax, (%0)", "r"(0xFFFF82D080000000UL));
    check(trap_seen.vector == PF && (trap_seen.error & (PF_W | PF_U)) == PF_W, "#PF: write to Xen's own area");
}

/* Privileged instructions that Xen emulates for the kernel. */
static void emulated(void)
{
    u64 value;
    u32 a, b, c, d;

    PROBE("movq %%cr0, %%rax");
    check_value("mov from cr0 is emulated", trap_seen.count, 0);
    __asm__ volatile("movq %%cr0, %0" : "=r"(value));
    check((value & 0x80000001UL) == 0x80000001UL, "cr0 has PE and PG");
    __asm__ volatile("movq %%cr3, %0" : "=r"(value));
    check_value("cr3 is the kernel's own table", (s64)(value >> PAGE_SHIFT), (s64)va_to_mfn((void *)start_info->pt_base));
    PROBE("movq (%0), %%rax", "r"(HOLE + 0x7000));
    __asm__ volatile("movq %%cr2, %0" : "=r"(value));
    check_value("cr2 reads as in vcpu_info", (s64)value, (s64)(HOLE + 0x7000));
    __asm__ volatile("movl $0xc0000080, %%ecx\n\trdmsr" : "=a"(a), "=d"(d) : : "rcx");
    check(a & 0x100, "EFER has LME");
    __asm__ volatile("ud2\n\t.ascii \"xen\"\n\tcpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(0x40000000), "2"(0));
    check(b == 0x566e6558 && c == 0x65584d4d && d == 0x4d4d566e, "the forced-emulation cpuid names Xen");
    PROBE("clts");
    check_value("clts is emulated", trap_seen.count, 0);
    PROBE("wbinvd");
    check_value("wbinvd is emulated", trap_seen.count, 0);
}

/* A fault inside a handler, three deep. */
static int depth, deepest;

static int nest(struct regs *regs)
{
    if (regs->vector != UD && regs->vector != PF)
        return 0;
    if (++depth > deepest)
        deepest = depth;
    if (depth == 1)
        __asm__ volatile("ud2");
    if (depth == 2)
        __asm__ volatile("movq (%0), %%rax" ::"r"(HOLE) : "rax"); /* 3 bytes */
    depth--;
    regs->rip += regs->vector == UD ? 2 : 3;
    return 1;
}

static void nested(void)
{
    u64 rbx = 0x1122334455667788UL, after;

    trap_hook = nest;
    __asm__ volatile("movq %1, %%rbx\n\tud2\n\tmovq %%rbx, %0" : "=r"(after) : "r"(rbx) : "rbx", "memory");
    trap_hook = NULL;
    check_value("three traps deep and back", deepest, 3);
    check_value("all are left", depth, 0);
    check(after == rbx, "registers survive nested traps");
}

/* iret: to another place in the kernel, as from a fault and as from a system call. */
static u64 iret_once(u64 flags, u64 rflags, u64 *rcx)
{
    u64 rax;

    __asm__ volatile("movq %%rsp, %%rbx\n\t"
                     "pushq $0xe02b\n\tpushq %%rbx\n\tpushq %[rflags]\n\tpushq $0xe030\n\t"
                     "leaq 1f(%%rip), %%rax\n\tpushq %%rax\n\tpushq %[flags]\n\t"
                     "movl $0x1111, %%ecx\n\tmovl $0x2222, %%r11d\n\tmovl $0x3333, %%eax\n\t"
                     "jmp iret_tail\n"
                     "1:\tmovq %%rbx, %%rsp"
                     : "=&a"(rax), "=&c"(*rcx)
                     : [flags] "r"(flags), [rflags] "r"(rflags)
                     : "rbx", "r11", "memory", "cc");
    return rax;
}

static void iret_variants(void)
{
    u64 rcx = 0, flags;

    check_value("iret restores rax", (s64)iret_once(0, 0x202, &rcx), 0x3333);
    check_value("iret restores rcx", (s64)rcx, 0x1111);
    check_value("iret with IF set unmasks events", shared_info->vcpu_info[0].evtchn_upcall_mask, 0);
    check_value("iret as from a system call restores rax", (s64)iret_once(0x100, 0x202, &rcx), 0x3333);
    iret_once(0, 0x2, &rcx);
    check_value("iret with IF clear masks events", shared_info->vcpu_info[0].evtchn_upcall_mask, 1);
    events_unmask();
    iret_once(0, 0x202 | 0x8d5, &rcx);
    __asm__ volatile("pushfq\n\tpopq %0" : "=r"(flags));
    check((flags & 0x3000) == 0, "IOPL stays 0");
    iret_once(0, 0x202 | 0x3000, &rcx);
    __asm__ volatile("pushfq\n\tpopq %0" : "=r"(flags));
    check((flags & 0x3000) == 0, "iret cannot raise IOPL");
    check(flags & 0x200, "the real IF stays set");
}

/* User mode: its own page table with one page of code and one of stack. */
static u64 user_value;
static int on_syscall(struct regs *regs)
{
    user_value = regs->rdi;
    if (regs->rax == 1) /* go on, with an answer */
    {
        regs->rax = user_value + 1;
        regs->rcx = regs->rip;
        return 1;
    }
    user_leave(user_value);
}

static u64 *user_l4;

static void build_user_space(const u8 *code, unsigned long size)
{
    u64 *l3 = table_alloc(), *l2 = table_alloc(), *l1_code = table_alloc(), *l1_stack = table_alloc();
    u8 *text = page_alloc();
    void *stack = page_alloc();

    user_l4 = table_alloc();
    memcpy(text, code, size);
    s64 rc = 0;
    rc |= set_entry(&l1_code[USER_CODE >> 12 & 511], 0); /* still a plain page: Xen writes it for us */
    check_value("mmu_update writes a page that has no type", rc, 0);
    struct {
        u64 *at, value;
    } entries[] = {
        {&l1_code[USER_CODE >> 12 & 511], pte_of(va_to_mfn(text), PTE_RO)},
        {&l1_stack[USER_STACK >> 12 & 511], pte_of(va_to_mfn(stack), PTE_RW | PTE_NX)},
        {&l2[USER_CODE >> 21 & 511], pte_of(va_to_mfn(l1_code), PTE_RW)},
        {&l2[USER_STACK >> 21 & 511], pte_of(va_to_mfn(l1_stack), PTE_RW)},
        {&l3[USER_CODE >> 30 & 511], pte_of(va_to_mfn(l2), PTE_RW)},
        {&user_l4[USER_CODE >> 39 & 511], pte_of(va_to_mfn(l3), PTE_RW)},
    };
    for (unsigned i = 0; i < sizeof(entries) / sizeof(entries[0]); i++)
        rc |= set_entry(entries[i].at, entries[i].value);
    check_value("user tables are written", rc, 0);
    check_value("the user's L4 is pinned", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(user_l4), 0), 0);
    check_value("the user's L4 is loaded", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(user_l4), 0), 0);
}

extern u8 user_code[], user_code_end[], user_double[], user_int3[], user_int80[], user_hlt[], user_read[], user_write[],
    user_ud[], user_jump[], user_int_gate[], user_out[], user_stack_read[], user_push[];

__asm__(".section .rodata\n"
        ".globl user_code\nuser_code:\n"
        "user_leave_now:\tmovl $0, %eax\n\tsyscall\n\tud2\n"
        ".globl user_double\nuser_double:\tmovl $1, %eax\n\tsyscall\n\tmovq %rax, %rdi\n\tmovl $1, %eax\n\tsyscall\n"
        "\tmovq %rax, %rdi\n\tjmp user_leave_now\n"
        ".globl user_int3\nuser_int3:\tint3\n\tjmp user_leave_now\n"
        ".globl user_int80\nuser_int80:\tint $0x80\n\tjmp user_leave_now\n"
        ".globl user_hlt\nuser_hlt:\thlt\n\tnop\n\tjmp user_leave_now\n"
        ".globl user_ud\nuser_ud:\tud2\n\tjmp user_leave_now\n"
        ".globl user_int_gate\nuser_int_gate:\tint $6\n\tjmp user_leave_now\n"
        ".globl user_read\nuser_read:\tmovq (%rdi), %rax\n\tjmp user_leave_now\n"
        ".globl user_write\nuser_write:\tmovq %rax, (%rdi)\n\tjmp user_leave_now\n"
        ".globl user_out\nuser_out:\toutb %al, $0x80\n\tjmp user_leave_now\n"
        ".globl user_stack_read\nuser_stack_read:\tmovq %rdi, %rbp\n\tmovq -8(%rbp), %rax\n\tjmp user_leave_now\n"
        ".globl user_push\nuser_push:\tmovq %rdi, %rsp\n\tpushq %rax\n\tjmp user_leave_now\n"
        ".globl user_jump\nuser_jump:\tjmp *%rdi\n"
        ".globl user_code_end\nuser_code_end:\n"
        ".text\n");

static u64 user_at(const u8 *label) { return USER_CODE + (u64)(label - user_code); }

static struct regs user_regs;
static u64 user_cr2;

static int leave_on_trap(struct regs *regs)
{
    user_regs = *regs;
    user_cr2 = shared_info->vcpu_info[0].cr2;
    user_leave(regs->vector);
}

static void user_fault(const char *name, const u8 *label, u64 rdi, u64 vector, u64 error)
{
    trap_hook = leave_on_trap;
    u64 got = user_run(user_at(label), USER_STACK + PAGE_SIZE, rdi);
    trap_hook = NULL;
    events_unmask();
    int ok = got == vector && user_regs.error == error && (user_regs.cs & 3) == 3 && (vector != PF || user_cr2 == rdi);
    if (!ok)
        printk("  vector %lu error %lx cs %lx cr2 %lx; want vector %lu error %lx\n", got, user_regs.error, user_regs.cs,
               user_cr2, vector, error);
    check(ok, name);
}

static void user_mode(void)
{
    build_user_space(user_code, (u64)(user_code_end - user_code));
    user_syscall = on_syscall;
    check_value("a system call leaves user mode", (s64)user_run(USER_CODE, USER_STACK + PAGE_SIZE, 0x5a5a), 0x5a5a);
    events_unmask();
    check_value("two system calls with answers", (s64)user_run(user_at(user_double), USER_STACK + PAGE_SIZE, 40), 42);
    events_unmask();
    user_fault("user: int3", user_int3, 0, BP, 0);
    check_value("user: rip behind int3", (s64)user_regs.rip, (s64)user_at(user_int3) + 1);
    check_value("user: rsp is in the frame", (s64)user_regs.rsp, (s64)(USER_STACK + PAGE_SIZE));
    user_fault("user: int $0x80", user_int80, 0, 0x80, 0);
    user_fault("user: ud2", user_ud, 0, UD, 0);
    user_fault("user: hlt", user_hlt, 0, GP, 0);
    user_fault("user: int of a gate of the CPU's", user_int_gate, 0, GP, 6 * 8 + 2);
    user_fault("user: read of an unmapped page", user_read, HOLE, PF, PF_U);
    user_fault("user: write to an unmapped page", user_write, HOLE, PF, PF_U | PF_W);
    user_fault("user: write to its code", user_write, USER_CODE, PF, PF_U | PF_W | PF_P);
    user_fault("user: jump into its stack", user_jump, USER_STACK, PF, PF_U | PF_P | PF_I);
    user_fault("user: read of kernel memory", user_read, VIRT_BASE, PF, PF_U);
    user_fault("user: non-canonical read", user_read, NON_CANONICAL, GP, 0);
    user_fault("user: non-canonical read by rbp", user_stack_read, NON_CANONICAL + 16, SS, 0);
    user_fault("user: non-canonical push", user_push, NON_CANONICAL + 16, SS, 0);
    set_iopl(1);
    user_fault("user: out at the kernel's IOPL", user_out, 0, GP, 0);
    set_iopl(3);
    check_value("user: out at IOPL 3", (s64)user_run(user_at(user_out), USER_STACK + PAGE_SIZE, 7), 7);
    events_unmask();
    set_iopl(0);
    trap_hook = leave_on_trap;
    user_run(user_at(user_read), USER_STACK + PAGE_SIZE, 0xFFFF82D080000000UL);
    trap_hook = NULL;
    events_unmask();
    check(user_regs.vector == PF && user_regs.error & PF_U, "user: read of Xen's own area");
    check_value("the user table can be dropped", mmuext(MMUEXT_NEW_USER_BASEPTR, 0, 0), 0);
    check_value("and unpinned", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(user_l4), 0), 0);
}

void guest_main(void)
{
    check_begin("traps");
    page_alloc(); /* so that `page - 4` is mapped */
    page = page_alloc();
    readonly = page_alloc();
    make_readonly(readonly);
    exceptions();
    ports();
    segments();
    frames();
    single_step();
    page_faults();
    emulated();
    nested();
    iret_variants();
    user_mode();
    if (!check_end())
        printk("traps: OK\n");
}
