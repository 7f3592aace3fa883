/*
 * Calls every hypercall number with every sub-operation, with zeros, with garbage and with pointers that a guest may not
 * hand over: none may do more than answer with an error, except where doing nothing is a success.
 *
 * After each round the guest must still work: it takes a trap, a timer event and a page fault.
 */
#include "guest.h"

#define NUMBERS 64
#define OPERATIONS 48
#define ERRNO_MAX 4095

static u8 *readonly;

/* What ends or changes the guest by design, whatever it is given. */
static int is_left_out(u64 nr, u64 op)
{
    switch (nr) {
    case HC_sched_op:
        return op == SCHEDOP_block;
    case HC_vcpu_op:
        return op == 2 || op == 11; /* down of the only vCPU, an NMI */
    case HC_iret:
    case HC_sched_op_compat: /* 2 is a shutdown, without a pointer */
    case HC_set_trap_table:  /* here and below zero is a good value */
    case HC_set_callbacks:
    case HC_stack_switch:
    case HC_set_segment_base:
    case HC_set_gdt:
    case HC_nmi_op:
    case HC_fpu_taskswitch:
    case HC_set_timer_op:
    case HC_vm_assist:
    case HC_set_debugreg:
    case HC_get_debugreg:
        return 1;
    }
    return 0;
}

/* Where Xen answers with 0 or a number though every pointer is bad. */
static int may_succeed(u64 nr, u64 op, u64 pointer, u64 count)
{
    switch (nr) {
    case HC_mmu_update:
    case HC_mmuext_op:
    case HC_multicall:
    case HC_console_io:
    case HC_grant_table_op:
        return count == 0;
    case HC_memory_op:
        /* maximum_ram_page; a reservation that cannot be read stops before its first extent; sharing's counters */
        return op == 2 || op == 0 || op == 1 || op == 6 || op == 18 || op == 19;
    case HC_physdev_op:
        return op == 4; /* IRQ_UNMASK_NOTIFY, does nothing */
    case HC_xen_version:
        return op == 0 || op == 7 || (op == 10 && pointer == 0); /* version, pagesize, the build id's length */
    case HC_vcpu_op:
        return op == 1 || op == VCPUOP_is_up || op == VCPUOP_stop_periodic_timer || op == 9; /* up, stop_singleshot */
    case HC_sched_op:
        return op == SCHEDOP_yield;
    case HC_hvm_op:
        return (op == 5 || op == 24) && pointer == 0; /* flush_tlbs, guest_request_vm_event */
    }
    return 0;
}

static s64 call(u64 nr, u64 op, u64 pointer, u64 count)
{
    switch (nr) {
    case HC_mmu_update:
    case HC_mmuext_op:
        return hypercall(nr, pointer, count, 0, DOMID_SELF, 0);
    case HC_multicall:
        return hypercall(nr, pointer, count, 0, 0, 0);
    case HC_grant_table_op:
        return hypercall(nr, op, pointer, count, 0, 0);
    case HC_console_io:
        return hypercall(nr, op, count, pointer, 0, 0);
    case HC_vcpu_op:
        return hypercall(nr, op, 0, pointer, 0, 0);
    }
    return hypercall(nr, op, pointer, pointer, pointer, pointer);
}

static u64 ticked;
static void on_timer(void) { ticked = 1; }
static int has_ticked(void) { return ticked != 0; }

static void still_works(const char *after)
{
    PROBE("ud2");
    int ok = trap_seen.count == 1 && trap_seen.vector == 6;
    PROBE("movq (%0), %%rax", "r"(0x5000UL));
    ok = ok && trap_seen.count == 1 && trap_seen.vector == 14;
    ticked = 0;
    timer_set(system_time() + 1000000);
    wait_until(has_ticked);
    check(ok, label("the guest still works after %s", after));
}

static void sweep(const char *what, u64 pointer, u64 count)
{
    u64 errors = 0, harmless = 0, strange = 0;

    for (u64 nr = 0; nr < NUMBERS; nr++) {
        for (u64 op = 0; op < OPERATIONS; op++) {
            if (is_left_out(nr, op))
                continue;
            s64 rc = call(nr, op, pointer, count);
            if (rc < 0 && rc >= -ERRNO_MAX) {
                errors++;
            } else if (may_succeed(nr, op, pointer, count)) {
                harmless++;
            } else {
                strange++;
                printk("  hypercall %lu operation %lu pointer %lx count %lu: %ld\n", nr, op, pointer, count, rc);
            }
        }
    }
    printk("%s: %lu errors, %lu harmless successes\n", what, errors, harmless);
    check_value(label("nothing but errors with %s", what), (s64)strange, 0);
    still_works(what);
}

/* A good call whose answer would go where the guest may not write. */
static void outputs(void)
{
    static const u64 addresses[] = {M2P_VIRT_START, 0xFFFF830000000000UL, 0x0000800000000000UL, 0xFFFF7FFFFFFFFFF8UL};

    for (unsigned i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
        check_value(label("xen_version's text to %lx", addresses[i]), HC2(xen_version, 1, addresses[i]), -XEN_EFAULT);
        check_value(label("memory map's bounds to %lx", addresses[i]), HC2(memory_op, 12, addresses[i]), -XEN_EFAULT);
        check_value(label("multicall at %lx", addresses[i]), HC2(multicall, addresses[i], 1), -XEN_EFAULT);
    }
    check_value("xen_version's text to a read-only page", HC2(xen_version, 1, readonly), -XEN_EFAULT);
    check_value("xen_version's text across into nothing", HC2(xen_version, 1, readonly - 8), -XEN_EFAULT);
}

static void numbers(void)
{
    check_value("number 63", hypercall(63, 0, 0, 0, 0, 0), -XEN_ENOSYS);
    check_value("number 11", hypercall(11, 0, 0, 0, 0, 0), -XEN_ENOSYS);
#ifndef USE_HYPERCALL_PAGE
    check_value("number 1000", hypercall(1000, 0, 0, 0, 0, 0), -XEN_ENOSYS);
    check_value("number 2^31", hypercall(1UL << 31, 0, 0, 0, 0, 0), -XEN_ENOSYS);
    check_value("number 2^63", hypercall(1UL << 63, 0, 0, 0, 0, 0), -XEN_ENOSYS);
#endif
    struct multicall_entry calls[2] = {{.op = 11}, {.op = HC_xen_version, .args = {XENVER_version}}};
    check_value("a multicall goes on behind an error", HC2(multicall, calls, 2), 0);
    check_value("its error", calls[0].result, -XEN_ENOSYS);
    check(calls[1].result >= 3 << 16, "and the answer behind it");
    struct multicall_entry nested = {.op = HC_multicall, .args = {(u64)calls, 2}};
    check_value("a multicall in a multicall", HC2(multicall, &nested, 1), 0);
    check_value("is refused", nested.result, -XEN_EINVAL);
}

void guest_main(void)
{
    check_begin("hypercalls");
    page_alloc(); /* a writable page right before it */
    readonly = page_alloc();
    make_readonly(readonly);
    timer_init(on_timer);
    still_works("nothing");
    numbers();
    outputs();
    sweep("null pointers", 0, 0);
    sweep("an unmapped address", 0xFFFFFFFFC0000000UL, 0);
    sweep("a non-canonical address", 0xdead000000000000UL, 0);
    sweep("an unmapped address and a count", 0x0000600000000000UL, 1);
    sweep("Xen's own area and a count", 0xFFFF830000000000UL, 1);
    if (!check_end())
        printk("hypercalls: OK\n");
}
