/* The trap table, expected traps, and system calls from user mode. */
#include "guest.h"

#define VECTOR_EVENT 256
#define VECTOR_SYSCALL 257

struct trap_record trap_seen;
u64 trap_resume;
int (*trap_hook)(struct regs *regs);
int (*user_syscall)(struct regs *regs);

extern u64 trap_entries[], trap_entry_128;
void trap_dispatch(struct regs *regs);

static u64 cr2_now(void) { return *(volatile u64 *)&shared_info->vcpu_info[0].cr2; }

void traps_init(void)
{
    struct trap_info table[34];
    int n = 0;

    for (u8 vector = 0; vector < 32; vector++) {
        if (vector == 2 || vector == 9 || vector == 15)
            continue; /* NMI has its own registration, the others are reserved */
        u8 privilege = vector == 3 || vector == 4 ? 3 : 0;
        table[n++] = (struct trap_info){vector, privilege | TRAP_MASK_EVENTS, FLAT_CS64, trap_entries[vector]};
    }
    table[n++] = (struct trap_info){0x80, 3 | TRAP_MASK_EVENTS, FLAT_CS64, trap_entry_128};
    table[n] = (struct trap_info){0, 0, 0, 0};
    if (HC1(set_trap_table, table) || HC2(stack_switch, FLAT_SS64, trap_stack_top))
        shutdown(SHUTDOWN_crash);
}

void trap_expect(void)
{
    trap_seen = (struct trap_record){0};
    trap_resume = 0;
}

static void describe(struct regs *regs)
{
    panic("unexpected trap %lu error %lx rip %lx cs %lx rflags %lx rsp %lx cr2 %lx\n", regs->vector, regs->error, regs->rip,
          regs->cs, regs->rflags, regs->rsp, cr2_now());
}

void trap_dispatch(struct regs *regs)
{
    if (regs->vector == VECTOR_EVENT) {
        event_upcall();
        return;
    }
    if (regs->vector == VECTOR_SYSCALL) {
        if (!user_syscall || !user_syscall(regs))
            panic("unexpected system call from rip %lx\n", regs->rip);
        return;
    }
    if (trap_hook && trap_hook(regs))
        return;
    if (!trap_resume)
        describe(regs);
    trap_seen.count++;
    trap_seen.vector = regs->vector;
    trap_seen.error = regs->error;
    trap_seen.cr2 = cr2_now();
    trap_seen.rip = regs->rip;
    trap_seen.rflags = regs->rflags;
    trap_seen.rsp = regs->rsp;
    trap_seen.cs = regs->cs;
    regs->rip = trap_resume;
    regs->rflags &= ~0x100UL; /* a single step is one step */
    trap_resume = 0;
}

s64 write_fault(u64 at)
{
    if (!trap_seen.count)
        return 0;
    if (trap_seen.vector != 14 || trap_seen.error != 3 || trap_seen.cr2 != at) {
        printk("  vector %lu error %lx cr2 %lx\n", trap_seen.vector, trap_seen.error, trap_seen.cr2);
        return FAULT - 1;
    }
    return FAULT;
}
