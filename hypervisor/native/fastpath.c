/*
 * The plainest traps of 64-bit PV guests without Python: a program's system call, the return to it, a page fault that
 * is the guest's own affair, the plainest updates of page tables, and the event callback behind them.
 *
 * It does what hypervisor/cpu/traps.py does, step for step, on the same memory: the engine's registers, the vCPU's
 * `VcpuState`, the guest's frames. Whatever is not plain is left untouched for the Python callback; so nothing is
 * changed before it is certain that all of it can be done. tests/unit/hypervisor/native compares both on random states.
 */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#include "tables.h"

typedef uint64_t u64;
typedef int64_t i64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;

/* hypervisor.cpu.state.VcpuState */
struct vcpu_state {
    u64 kernel_mode, kernel_sp, kernel_ss, kernel_cr3, user_cr3, gs_base_other, vcpu_info;
    u64 event_callback, failsafe_callback, syscall_callback, syscall32_callback, sysenter_callback, deadline;
    u32 iopl;
    u16 event_cs, failsafe_cs;
    u8 failsafe_masks, syscall_masks, syscall32_masks, sysenter_masks;
    u16 syscall32_cs, sysenter_cs;
    u64 trap_address[256];
    u16 trap_cs[256];
    u8 trap_flags[256];
};

/* hypervisor.native.Context; offsets of the engine's registers come from its verified layout. */
struct context {
    u32 size, on;
    u8 *memory;       /* the domain's extent */
    u64 base, limit;  /* its machine address, its bytes */
    u8 *env;          /* the engine's CPU state */
    u64 (*read_eflags)(void *env);
    void (*stop)(void *engine);
    void (*raise)(void *env, int vector, int error); /* does not return */
    void (*python_syscall)(void *engine, void *data);
    void (*python_interrupt)(void *engine, u32 number, void *data);
    struct tables *tables;
    struct vcpu_state *state; /* of the vCPU that runs */
    u64 windows;              /* its descriptor windows: word offset of their L1 entries in the memory */
    u32 leaving;              /* the run is being left: no event is delivered any more */
    u32 regs, eip, eflags, cc_src, cc_op, df, hflags, segs, cr, error_code, is_int, old_exception;
    u64 syscalls, irets, faults, events, ports, updates; /* done here, for statistics */
    /* hypervisor.memory.frames.FrameTable, and what PageTables knows besides */
    u8 *kind, *executed;
    u32 *count, *refs;
    u64 *stamp, frames, epoch, lazy_nx;
};

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11 };
enum { CS = 1, SS = 2, GS = 5 };
enum { FLAG_TF = 1 << 8, FLAG_IF = 1 << 9, FLAG_DF = 1 << 10, FLAG_IOPL = 3 << 12, FLAG_NT = 1 << 14, FLAG_RF = 1 << 16,
       FLAG_VM = 1 << 17, FLAG_AC = 1 << 18 };
enum { PTE_P = 1, PTE_RW = 2, PTE_US = 4, PTE_PSE = 0x80, PF_USER = 4 };
enum { HF_CPL = 3, HF_CS32 = 1 << 4, HF_SS32 = 1 << 5, HF_ADDSEG = 1 << 6, HF_CS64 = 1 << 15 };
enum { PENDING = 0, MASK = 1, CR2 = 16 }; /* of struct vcpu_info (public/xen.h, public/arch-x86/xen-x86_64.h) */
enum { KERNEL_CS = 0xe033, KERNEL_SS = 0xe02b, USER_CS32 = 0xe023, IRET = 23, IN_SYSCALL = 1 << 8, TI_IF = 4 };
enum { CC_FLAGS = 0x8d5, CC_OP_EFLAGS = 1, FLAT_CODE64 = 0x00affb00, FLAT_DATA = 0x00cff300 };
#define PTE_ADDR 0x000ffffffffff000ULL
#define LOW_END (1ULL << 47)
#define XEN_END 0xffff880000000000ULL
#define DESC_CODE64 0x00affb000000ffffULL
#define DESC_DATA 0x00cff3000000ffffULL
#define DESC_ACCESSED (1ULL << 40)

#define Q(c, offset) (*(u64 *)((c)->env + (offset)))
#define D(c, offset) (*(u32 *)((c)->env + (offset)))
#define GPR(c, n) Q(c, (c)->regs + 8 * (n))
#define RIP(c) Q(c, (c)->eip)
#define SELECTOR(c, n) D(c, (c)->segs + 24 * (n))
#define BASE(c, n) Q(c, (c)->segs + 24 * (n) + 8)

/* hypervisor.memory.guest.GuestAccess.translate */
static i64 translate(const struct context *c, u64 cr3, u64 va, u64 need)
{
    const u64 *words = (const u64 *)c->memory;
    u64 table = (cr3 & PTE_ADDR) - c->base, entry, offset;

    if (va >= LOW_END && va < XEN_END)
        return -1;
    for (int shift = 36; shift >= 18; shift -= 9) {
        if (table >= c->limit)
            return -1;
        entry = words[(table + (va >> shift & 0xff8)) >> 3];
        if ((entry & need) != need || entry & PTE_PSE)
            return -1;
        table = (entry & PTE_ADDR) - c->base;
    }
    if (table >= c->limit)
        return -1;
    entry = words[(table + (va >> 9 & 0xff8)) >> 3];
    if ((entry & need) != need)
        return -1;
    offset = (entry & PTE_ADDR) - c->base;
    return offset < c->limit ? (i64)(offset + (va & 0xfff)) : -1;
}

static int is_canonical(u64 va)
{
    return va < LOW_END || va >= 0xffff800000000000ULL;
}

static void set_hidden(struct context *c, int segment, u32 selector, u32 attributes)
{
    u32 at = c->segs + 24 * segment;

    D(c, at) = selector;
    Q(c, at + 8) = 0;
    D(c, at + 16) = 0xffffffff;
    D(c, at + 20) = attributes;
}

static void load_flat64(struct context *c, u32 cs, u32 ss)
{
    set_hidden(c, CS, cs, FLAT_CODE64);
    set_hidden(c, SS, ss, FLAT_DATA);
    D(c, c->hflags) = (D(c, c->hflags) & ~(u32)HF_ADDSEG) | HF_CS64 | HF_CS32 | HF_SS32 | HF_CPL;
}

static void switch_mode(struct context *c, u64 kernel)
{
    struct vcpu_state *s = c->state;
    u64 base = BASE(c, GS);

    s->kernel_mode = kernel;
    BASE(c, GS) = s->gs_base_other;
    s->gs_base_other = base;
    reeve_switch(c->tables, kernel ? s->kernel_cr3 : s->user_cr3, (int)kernel);
}

struct frame {
    u64 rcx, r11, rip, cs, flags, rsp, ss;
};

/* Traps.bounce. 0: not done, and nothing was changed. */
static int bounce(struct context *c, struct frame *f, u64 address, int has_error, u64 error, int masks)
{
    struct vcpu_state *s = c->state;
    u8 *mask = c->memory + s->vcpu_info + MASK;
    u64 stack, words[8], size = 8 * (7 + has_error);
    int n = 0;
    i64 at;

    if (!address)
        return 0;
    stack = ((s->kernel_mode ? f->rsp : s->kernel_sp) & ~15ULL) - size;
    if ((stack & 0xfff) + size > 4096)
        return 0;
    at = translate(c, s->kernel_mode ? Q(c, c->cr + 24) : s->kernel_cr3, stack, PTE_P | PTE_US | PTE_RW);
    if (at < 0)
        return 0;
    words[n++] = f->rcx;
    words[n++] = f->r11;
    if (has_error)
        words[n++] = error;
    words[n++] = f->rip;
    words[n++] = (s->kernel_mode ? f->cs & ~3ULL : f->cs) | (u64)*mask << 32;
    words[n++] = (f->flags & ~(u64)(FLAG_IF | FLAG_IOPL)) | (*mask ? 0 : FLAG_IF);
    words[n++] = f->rsp;
    words[n++] = f->ss;
    if (!s->kernel_mode)
        switch_mode(c, 1);
    memcpy(c->memory + at, words, size);
    if (masks)
        *mask = 1;
    GPR(c, RCX) = f->rcx;
    GPR(c, R11) = f->r11;
    GPR(c, RSP) = stack;
    RIP(c) = address;
    load_flat64(c, KERNEL_CS, KERNEL_SS);
    Q(c, c->eflags) &= ~(u64)(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | FLAG_AC);
    return 1;
}

static struct frame current(struct context *c)
{
    return (struct frame){ GPR(c, RCX), GPR(c, R11), RIP(c), SELECTOR(c, CS) & 0xffff,
                           (u32)c->read_eflags(c->env), GPR(c, RSP), SELECTOR(c, SS) & 0xffff };
}

/* Traps.deliver_event. Where that is not plain the run ends, and the run loop does it before the next one. */
static void deliver_event(struct context *c, void *engine)
{
    struct vcpu_state *s = c->state;
    const u8 *info = c->memory + s->vcpu_info;
    struct frame f;

    if (c->leaving || !info[PENDING] || info[MASK] || !s->event_callback)
        return;
    f = current(c);
    if (bounce(c, &f, s->event_callback, 0, 0, 1))
        c->events++;
    else
        c->stop(engine);
}

/* Traps.user_syscall */
static int user_syscall(struct context *c)
{
    struct frame f;

    if (!(D(c, c->hflags) & HF_CS64))
        return 0;
    f = current(c);
    f.rip += 2;
    f.rcx = f.rip;
    f.r11 = f.flags;
    f.cs = KERNEL_CS;
    f.ss = KERNEL_SS;
    return bounce(c, &f, c->state->syscall_callback, 0, 0, c->state->syscall_masks);
}

/* XenArea.descriptor of the GDT */
static u64 descriptor(const struct context *c, u32 selector)
{
    const u64 *words = (const u64 *)c->memory;
    u64 page = (words[c->windows + (selector >> 12)] & PTE_ADDR) - c->base;

    return page < c->limit ? words[(page >> 3) + (selector >> 3 & 511)] : 0;
}

/* Traps.iret, to 64-bit code of flat segments */
static int iret(struct context *c)
{
    struct vcpu_state *s = c->state;
    u64 stack = GPR(c, RSP), frame[9], flags, rip, cs, ss;
    i64 at;

    if (SELECTOR(c, CS) != KERNEL_CS || (stack & 0xfff) + sizeof(frame) > 4096)
        return 0;
    at = translate(c, Q(c, c->cr + 24), stack, PTE_P | PTE_US);
    if (at < 0)
        return 0;
    memcpy(frame, c->memory + at, sizeof(frame)); /* once: another process may write there */
    flags = frame[6];
    rip = frame[4];
    cs = frame[5] & 0xffff;
    ss = frame[8] & 0xffff;
    if (flags & FLAG_TF || !is_canonical(rip) || ((cs & 3) == 3 && !s->user_cr3))
        return 0;
    if (frame[3] & IN_SYSCALL) {
        if (cs == USER_CS32)
            return 0;
    } else if ((cs | 3) != KERNEL_CS || (ss | 3) != KERNEL_SS) {
        if ((cs | ss) & 4 || !(cs & ~3ULL) || !(ss & ~3ULL) || (descriptor(c, cs) | DESC_ACCESSED) != DESC_CODE64
            || (descriptor(c, ss) | DESC_ACCESSED) != DESC_DATA)
            return 0;
    }
    if ((cs & 3) == 3)
        switch_mode(c, 0);
    c->memory[s->vcpu_info + MASK] = flags & FLAG_IF ? 0 : 1;
    flags = (flags & ~(u64)(FLAG_IOPL | FLAG_VM)) | FLAG_IF | 2;
    GPR(c, RAX) = frame[0];
    RIP(c) = rip;
    GPR(c, RSP) = frame[7];
    Q(c, c->cc_src) = flags & CC_FLAGS;
    D(c, c->cc_op) = CC_OP_EFLAGS;
    D(c, c->df) = flags & FLAG_DF ? 0xffffffff : 1;
    Q(c, c->eflags) = (flags & ~(u64)(CC_FLAGS | FLAG_DF)) | 2;
    if (frame[3] & IN_SYSCALL) {
        GPR(c, R11) = flags;
        GPR(c, RCX) = rip;
        load_flat64(c, KERNEL_CS, KERNEL_SS);
        return 1;
    }
    GPR(c, R11) = frame[1];
    GPR(c, RCX) = frame[2];
    if ((cs | 3) == KERNEL_CS && (ss | 3) == KERNEL_SS)
        load_flat64(c, KERNEL_CS, KERNEL_SS);
    else
        load_flat64(c, cs | 3, ss | 3);
    return 1;
}

#include "updates.h"

/* Trapping.exception of a page fault that cannot be a write to a page table or a fetch that is to be allowed */
static int page_fault(struct context *c)
{
    struct vcpu_state *s = c->state;
    u64 error = D(c, c->error_code), cr2 = Q(c, c->cr + 16);
    struct frame f;

    if (D(c, c->is_int) || (s->kernel_mode && (error & 3) == 3) || (error & 0x11) == 0x11)
        return 0;
    error = s->kernel_mode ? error & ~(u64)PF_USER : error | PF_USER;
    f = current(c);
    if (!bounce(c, &f, s->trap_address[14], 1, error, s->trap_flags[14] & TI_IF))
        return 0;
    *(u64 *)(c->memory + s->vcpu_info + CR2) = cr2;
    D(c, c->old_exception) = 0xffffffff;
    return 1;
}

/* The hook of `syscall`: RIP is at the instruction, and its length is added behind the hook. */
EXPORTED void reeve_syscall(void *engine, void *data)
{
    struct context *c = data;

    if (c->on) {
        if (c->state->kernel_mode) {
            if (GPR(c, RAX) == IRET && iret(c)) {
                c->irets++;
                goto done;
            }
            if (GPR(c, RAX) != IRET && hypercall(c)) {
                c->updates++;
                goto done;
            }
        } else if (user_syscall(c)) {
            c->syscalls++;
            goto done;
        }
    }
    c->python_syscall(engine, data);
    return;
done:
    deliver_event(c, engine);
    RIP(c) -= 2;
}

/* The hook of exceptions and interrupts. */
EXPORTED void reeve_interrupt(void *engine, u32 number, void *data)
{
    struct context *c = data;

    if (c->on && number == 14 && page_fault(c)) {
        c->faults++;
        deliver_event(c, engine);
        return;
    }
    c->python_interrupt(engine, number, data);
}

/* PrivilegedOps._io_allowed, and the ports of a machine without devices */
static int port_allowed(struct context *c)
{
    if (!c->on || c->state->iopl < (c->state->kernel_mode ? 1 : 3))
        return 0;
    c->ports++;
    return 1;
}

EXPORTED u32 reeve_port_in(void *engine, u32 port, int size, void *data)
{
    struct context *c = data;

    (void)engine, (void)port, (void)size;
    if (!port_allowed(c))
        c->raise(c->env, 13, 0);
    return 0xffffffff;
}

EXPORTED void reeve_port_out(void *engine, u32 port, int size, u32 value, void *data)
{
    struct context *c = data;

    (void)engine, (void)port, (void)size, (void)value;
    if (!port_allowed(c))
        c->raise(c->env, 13, 0);
}

/* What Python's structures are compared with: sizes, then offsets of the last fields. */
EXPORTED const u32 reeve_layout[] = {
    sizeof(struct context), offsetof(struct context, state), offsetof(struct context, old_exception),
    offsetof(struct context, lazy_nx), sizeof(struct vcpu_state), offsetof(struct vcpu_state, iopl),
    offsetof(struct vcpu_state, syscall_masks), offsetof(struct vcpu_state, trap_address),
    offsetof(struct vcpu_state, trap_flags), sizeof(struct tables), offsetof(struct tables, blocks),
};
