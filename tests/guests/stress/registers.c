/* SSE and x87 state that must survive system calls, other processes and signal handlers; and signals themselves. */
#include "stress.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { SEEDS = 16, STEPS = 3000 };

/* A chaotic series: one wrong bit anywhere changes the end. */
static uint64_t series(unsigned int seed)
{
    volatile double start = 0.1 + seed % SEEDS * 0.05;
    double x = start;
    long double y = (long double)start;
    float z = (float)start;
    uint64_t bits, result;
    for (int step = 0; step < STEPS; step++) {
        x = 3.99 * x * (1.0 - x) + 1e-12 / (1.0 + __builtin_sqrt(x + 1.0));
        y = 3.97L * y * (1.0L - y);
        z = 3.9F * z * (1.0F - z);
    }
    memcpy(&result, &x, 8);
    memcpy(&bits, &y, 8);
    result ^= bits * 3;
    double wide = z;
    memcpy(&bits, &wide, 8);
    return result + bits;
}

static uint64_t reference[SEEDS];

void prepare_registers(void)
{
    for (unsigned int seed = 0; seed < SEEDS; seed++)
        reference[seed] = series(seed);
}

struct registers {
    unsigned char xmm[16][16];
    long double x87[8]; /* as pushed: the last one is st(0) */
    uint32_t mxcsr;
    uint16_t control;
};

/* Load all registers, do a system call `turns` times with a little waiting after each, and store them again. */
static __attribute__((noinline)) void hold(const struct registers *in, struct registers *out, long call, long first,
                                           long second, long turns)
{
    uint32_t plain = 0x1f80;
    __asm__ volatile("fninit\n\t"
                     "fldcw %c[control](%[in])\n\t"
                     "ldmxcsr %c[mxcsr](%[in])\n\t"
                     ".irp n,0,1,2,3,4,5,6,7\n\t"
                     "fldt %c[x87]+16*\\n(%[in])\n\t"
                     ".endr\n\t"
                     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
                     "movdqu 16*\\n(%[in]),%%xmm\\n\n\t"
                     ".endr\n"
                     "1:\tmov %[call],%%rax\n\t"
                     "mov %[first],%%rdi\n\t"
                     "mov %[second],%%rsi\n\t"
                     "syscall\n\t"
                     "mov $500,%%ecx\n"
                     "2:\tdec %%ecx\n\t"
                     "jnz 2b\n\t"
                     "dec %[turns]\n\t"
                     "jnz 1b\n\t"
                     ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
                     "movdqu %%xmm\\n,16*\\n(%[out])\n\t"
                     ".endr\n\t"
                     ".irp n,7,6,5,4,3,2,1,0\n\t"
                     "fstpt %c[x87]+16*\\n(%[out])\n\t"
                     ".endr\n\t"
                     "stmxcsr %c[mxcsr](%[out])\n\t"
                     "fnstcw %c[control](%[out])\n\t"
                     "fninit\n\t"
                     "ldmxcsr %[plain]\n\t"
                     : [turns] "+r"(turns)
                     : [in] "r"(in), [out] "r"(out), [call] "r"(call), [first] "r"(first), [second] "r"(second),
                       [plain] "m"(plain), [x87] "i"(__builtin_offsetof(struct registers, x87)),
                       [mxcsr] "i"(__builtin_offsetof(struct registers, mxcsr)),
                       [control] "i"(__builtin_offsetof(struct registers, control))
                     : "rax", "rcx", "rdi", "rsi", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
                       "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
                       "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)");
}

static void hold_and_check(int worker, unsigned int seed, long call, long first, long second, long turns)
{
    static const uint32_t rounding[] = { 0x1f80, 0x3f80, 0x5f80, 0x7f80 };
    struct registers in, out;
    memset(&in, 0, sizeof(in));
    memset(&out, 0, sizeof(out));
    for (int number = 0; number < 16; number++)
        memset(in.xmm[number], (int)((seed + (unsigned int)number * 17) & 0xff), 16);
    for (int number = 0; number < 8; number++)
        in.x87[number] = (long double)(seed + (unsigned int)number) / 3;
    in.mxcsr = rounding[seed % 4];
    in.control = (uint16_t)(0x037f | (seed % 4) << 10);
    hold(&in, &out, call, first, second, turns);
    for (int number = 0; number < 16; number++)
        if (memcmp(in.xmm[number], out.xmm[number], 16))
            fail("worker %d: xmm%d changed from 0x%02x to 0x%02x during system call %ld", worker, number,
                 in.xmm[number][0], out.xmm[number][0], call);
    for (int number = 0; number < 8; number++)
        if (memcmp(&in.x87[number], &out.x87[number], 10))
            fail("worker %d: st(%d) changed during system call %ld", worker, 7 - number, call);
    if ((in.mxcsr ^ out.mxcsr) & 0xffc0)
        fail("worker %d: mxcsr 0x%x became 0x%x", worker, in.mxcsr, out.mxcsr);
    if (in.control != out.control)
        fail("worker %d: x87 control word 0x%x became 0x%x", worker, in.control, out.control);
}

void run_fpu(int worker, unsigned int seed)
{
    hold_and_check(worker, seed, SYS_sched_yield, 0, 0, 20);
    for (unsigned int turn = 0; turn < 4; turn++) {
        uint64_t found = series(seed + turn);
        if (found != reference[(seed + turn) % SEEDS])
            fail("worker %d: series %u gave 0x%lx, not 0x%lx", worker, (seed + turn) % SEEDS, found,
                 reference[(seed + turn) % SEEDS]);
    }
}

static unsigned char stack[1 << 16] __attribute__((aligned(16)));
static volatile sig_atomic_t outer, inner, alarms;

static void spoil_registers(void)
{
    __asm__ volatile("fninit\n\tfld1\n\tfldpi\n\tpcmpeqd %%xmm0,%%xmm0\n\tmovdqa %%xmm0,%%xmm7\n\t"
                     "movdqa %%xmm0,%%xmm15\n\tfstp %%st(0)\n\tfstp %%st(0)" ::
                         : "xmm0", "xmm7", "xmm15", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)",
                           "st(7)");
}

static void check_stack(const char *which)
{
    volatile unsigned char here = 0;
    if (&here < stack || &here >= stack + sizeof(stack))
        fail("the %s handler is not on the alternate stack", which);
}

static void on_inner(int number)
{
    (void)number;
    check_stack("inner");
    spoil_registers();
    inner++;
}

static void on_outer(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    check_stack("outer");
    sig_atomic_t before = inner;
    if (info->si_pid != getpid())
        fail("a signal from %d, not %d", info->si_pid, getpid());
    spoil_registers();
    raise(SIGUSR2);
    if (inner != before + 1)
        fail("the nested signal came %d times", (int)(inner - before));
    outer++;
}

static void on_alarm(int number)
{
    (void)number;
    spoil_registers();
    alarms++;
}

static void queue(unsigned int seed)
{
    enum { COUNT = 8 };
    sigset_t set;
    siginfo_t info;
    struct timespec wait = { .tv_sec = 10 };
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (unsigned int index = 0; index < COUNT; index++)
        if (sigqueue(getpid(), SIGRTMIN, (union sigval){ .sival_int = (int)(seed + index) }))
            fail("sigqueue: %m");
    for (unsigned int index = 0; index < COUNT; index++)
        if (sigtimedwait(&set, &info, &wait) != SIGRTMIN || info.si_value.sival_int != (int)(seed + index))
            fail("queued signal %u is not what was sent", index);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
}

void run_signals(int worker, unsigned int seed)
{
    enum { TURNS = 10 };
    struct sigaction first = { .sa_sigaction = on_outer, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    struct sigaction second = { .sa_handler = on_inner, .sa_flags = SA_ONSTACK };
    struct sigaction third = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct itimerval often = { { 0, 3000 }, { 0, 3000 } }, never = { 0 };
    if (sigaltstack(&(stack_t){ .ss_sp = stack, .ss_size = sizeof(stack) }, NULL))
        fail("sigaltstack: %m");
    sigaction(SIGUSR1, &first, NULL);
    sigaction(SIGUSR2, &second, NULL);
    sigaction(SIGALRM, &third, NULL);
    outer = inner = alarms = 0;
    hold_and_check(worker, seed, SYS_kill, getpid(), SIGUSR1, TURNS);
    if (outer != TURNS || inner != TURNS)
        fail("worker %d: %d outer and %d inner signals of %d", worker, (int)outer, (int)inner, TURNS);
    queue(seed);
    double end = now() + 30;
    setitimer(ITIMER_REAL, &often, NULL);
    while (alarms < 3) {
        if (series(seed) != reference[seed % SEEDS])
            fail("worker %d: a series differs after a signal", worker);
        if (now() > end)
            fail("worker %d: %d of 3 alarms in 30 s", worker, (int)alarms);
    }
    setitimer(ITIMER_REAL, &never, NULL);
}
