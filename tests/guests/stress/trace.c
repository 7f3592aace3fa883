/* ptrace: a breakpoint, registers read and written, single steps counted, system calls stopped. */
#include "stress.h"

#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

unsigned long stress_traced(unsigned long count);
extern const char stress_traced_end[];

/* 3 * count, by 1 + 3 * count instructions and a return. */
__asm__(".text\n"
        ".globl stress_traced, stress_traced_end\n"
        "stress_traced:\n\t"
        "xor %eax,%eax\n"
        "1:\tadd $3,%eax\n\t"
        "dec %edi\n\t"
        "jnz 1b\n"
        "stress_traced_end:\n\t"
        "ret\n");

static void stopped(pid_t child, int number, const char *when)
{
    int status;
    if (waitpid(child, &status, 0) != child)
        fail("ptrace: waitpid %s: %m", when);
    if (!WIFSTOPPED(status) || WSTOPSIG(status) != number)
        fail("ptrace: status 0x%x %s, not stopped by signal %d", status, when, number);
}

static void request(enum __ptrace_request what, pid_t child, void *address, void *data)
{
    if (ptrace(what, child, address, data))
        fail("ptrace: request %d: %m", (int)what);
}

static struct user_regs_struct registers_of(pid_t child)
{
    struct user_regs_struct registers;
    request(PTRACE_GETREGS, child, NULL, &registers);
    return registers;
}

static void stop_at_start(pid_t child, unsigned long count)
{
    void *place = (void *)(uintptr_t)stress_traced;
    errno = 0;
    long text = ptrace(PTRACE_PEEKTEXT, child, place, NULL);
    if (errno)
        fail("ptrace: read of the text: %m");
    request(PTRACE_POKETEXT, child, place, (void *)((text & ~0xffL) | 0xcc));
    request(PTRACE_CONT, child, NULL, NULL);
    stopped(child, SIGTRAP, "at the breakpoint");
    struct user_regs_struct registers = registers_of(child);
    if (registers.rip != (uintptr_t)place + 1 || registers.rdi != count)
        fail("ptrace: stopped at 0x%llx with %llu, not after 0x%lx with %lu", registers.rip, registers.rdi,
             (unsigned long)place, count);
    request(PTRACE_POKETEXT, child, place, (void *)text);
    registers.rip--;
    request(PTRACE_SETREGS, child, NULL, &registers);
}

static void step_through(pid_t child, unsigned long count)
{
    for (unsigned long step = 0; step < 1 + 3 * count; step++) {
        request(PTRACE_SINGLESTEP, child, NULL, NULL);
        stopped(child, SIGTRAP, "after a step");
        struct user_regs_struct registers = registers_of(child);
        unsigned long added = (step + 2) / 3;
        if (registers.rax != 3 * added)
            fail("ptrace: eax is %llu after step %lu at +%llu, not %lu", registers.rax, step,
                 registers.rip - (uintptr_t)stress_traced, 3 * added);
    }
}

static void trace(unsigned int seed, bool steps)
{
    unsigned long count = 4 + seed % 8;
    int code = (int)(seed >> 8 & 0x7f);
    pid_t child = begin();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
            fail("ptrace: traceme: %m");
        raise(SIGSTOP);
        _exit((int)stress_traced(count));
    }
    stopped(child, SIGSTOP, "at the start");
    stop_at_start(child, count);
    struct user_regs_struct registers = registers_of(child);
    if (steps) {
        step_through(child, count);
        registers = registers_of(child);
        if (registers.rip != (uintptr_t)stress_traced_end)
            fail("ptrace: at 0x%llx after all steps, not 0x%lx", registers.rip, (unsigned long)stress_traced_end);
    }
    registers.rip = (uintptr_t)stress_traced_end;
    registers.rax = (unsigned long)code;
    request(PTRACE_SETREGS, child, NULL, &registers);
    request(PTRACE_SYSCALL, child, NULL, NULL);
    stopped(child, SIGTRAP, "at a system call");
    registers = registers_of(child);
    if (registers.orig_rax != SYS_exit_group || registers.rdi != (unsigned long)code)
        fail("ptrace: system call %llu with %llu, not exit_group with %d", registers.orig_rax, registers.rdi, code);
    request(PTRACE_CONT, child, NULL, NULL);
    finished(child, code, "ptrace");
}

void run_trace(int worker, unsigned int seed)
{
    (void)worker;
    trace(seed, false);
}

void run_steps(int worker, unsigned int seed)
{
    (void)worker;
    trace(seed, true);
}
