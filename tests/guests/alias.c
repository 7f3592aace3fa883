/*
 * Code that changes through another mapping of its frame: nothing is flushed, nothing is mapped anew, and yet the
 * processor runs what is there, as on real hardware (a jump lies between). First in the kernel, then a program whose
 * kernel rewrites it between two runs, and one that rewrites itself through a writable mapping.
 */
#include "guest.h"

#define USER_CODE 0x0000000000400000UL
#define USER_STACK 0x0000000000600000UL
#define USER_ALIAS 0x0000000000601000UL
#define ROUNDS 50

static void write_answer(volatile u8 *at, u32 answer) /* mov $answer, %eax; ret */
{
    at[0] = 0xb8;
    at[1] = (u8)answer;
    at[2] = (u8)(answer >> 8);
    at[3] = 0;
    at[4] = 0;
    at[5] = 0xc3;
}

static void in_the_kernel(void)
{
    volatile u8 *data = page_alloc();
    u8 *code = page_alloc();
    int good = 0;

    check_value("a second mapping, to run", map_page(code, pte_of(va_to_mfn((void *)data), PTE_RO)), 0);
    check_value("the first, to write", map_page((void *)data, pte_of(va_to_mfn((void *)data), PTE_RW | PTE_NX)), 0);
    u32 (*volatile run)(void) = (u32(*)(void))code;
    for (u32 round = 0; round < ROUNDS; round++) {
        write_answer(data + 64 * (round & 3), round);
        run = (u32(*)(void))(code + 64 * (round & 3));
        good += run() == round;
    }
    check(good == ROUNDS, label("the kernel's code is what was written, %d times", good));
}

static int on_syscall(struct regs *regs) { user_leave(regs->rdi); }

/* mov $answer, %edi; syscall */
static void write_leave(volatile u8 *at, u32 answer)
{
    at[0] = 0xbf;
    at[1] = (u8)answer;
    at[2] = (u8)(answer >> 8);
    at[3] = 0;
    at[4] = 0;
    at[5] = 0x0f;
    at[6] = 0x05;
}

/* At +256: movl %edi, (answer of the routine at +512, through the alias); call it; mov %eax, %edi; syscall */
static const u8 SELF[] = {
    0x89, 0x3c, 0x25, 0x01, 0x12, 0x60, 0x00, /* mov %edi, 0x601201 */
    0xe8, 0xf4, 0x00, 0x00, 0x00,             /* call +512 */
    0x89, 0xc7, 0x0f, 0x05,
};

static void in_a_program(void)
{
    u64 *l4 = table_alloc(), *l3 = table_alloc(), *l2 = table_alloc(), *l1_code = table_alloc(), *l1_data = table_alloc();
    volatile u8 *text = page_alloc();
    void *stack = page_alloc();
    int good = 0;
    s64 rc = 0;

    memcpy((void *)(text + 256), SELF, sizeof(SELF));
    write_answer(text + 512, 1);
    rc |= set_entry(&l1_code[USER_CODE >> 12 & 511], pte_of(va_to_mfn((void *)text), PTE_RO));
    rc |= set_entry(&l1_data[USER_STACK >> 12 & 511], pte_of(va_to_mfn(stack), PTE_RW | PTE_NX));
    rc |= set_entry(&l1_data[USER_ALIAS >> 12 & 511], pte_of(va_to_mfn((void *)text), PTE_RW | PTE_NX));
    rc |= set_entry(&l2[USER_CODE >> 21 & 511], pte_of(va_to_mfn(l1_code), PTE_RW));
    rc |= set_entry(&l2[USER_STACK >> 21 & 511], pte_of(va_to_mfn(l1_data), PTE_RW));
    rc |= set_entry(&l3[USER_CODE >> 30 & 511], pte_of(va_to_mfn(l2), PTE_RW));
    rc |= set_entry(&l4[USER_CODE >> 39 & 511], pte_of(va_to_mfn(l3), PTE_RW));
    check_value("user tables are written", rc, 0);
    check_value("the user's L4 is pinned", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(l4), 0), 0);
    check_value("the user's L4 is loaded", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(l4), 0), 0);
    user_syscall = on_syscall;
    for (u32 round = 0; round < ROUNDS; round++) {
        write_leave(text + 64 * (round & 3), round);
        good += user_run(USER_CODE + 64 * (round & 3), USER_STACK + PAGE_SIZE, 0) == round;
        events_unmask();
    }
    check(good == ROUNDS, label("the program is what its kernel wrote, %d times", good));
    good = 0;
    for (u32 round = 0; round < ROUNDS; round++) {
        good += user_run(USER_CODE + 256, USER_STACK + PAGE_SIZE, 1000 + round) == 1000 + round;
        events_unmask();
    }
    check(good == ROUNDS, label("a program runs what it wrote itself, %d times", good));
}

void guest_main(void)
{
    check_begin("alias");
    in_the_kernel();
    in_a_program();
    if (!check_end())
        printk("alias: OK\n");
}
