/*
 * Entry, ELF notes, trap and event entries of the micro-guests.
 *
 * Xen enters with %rsi = start_info and flat segments (public/arch-x86/xen.h). A trap or event arrives on a 16-byte
 * aligned stack as { rcx, r11, [error code,] rip, cs, rflags, rsp, ss }; HYPERVISOR_iret takes { rax, r11, rcx, flags,
 * rip, cs, rflags, rsp, ss }.
 */

#define HC_IRET 23
#define VECTOR_EVENT 256
#define VECTOR_SYSCALL 257

        .section .text.start, "ax", @progbits
        .globl _start
_start:
        cld
        movq    %rsi, start_info(%rip)
        leaq    boot_stack_top(%rip), %rsp
        xorl    %ebp, %ebp
        call    guest_init
        ud2

        .text

/* One stub a vector: the vectors with an error code already have it below rip. */
        .macro  trap_entry vector, has_error
trap_\vector:
        popq    %rcx
        popq    %r11
        .if     \has_error == 0
        pushq   $0
        .endif
        pushq   $\vector
        jmp     trap_common
        .endm

        .altmacro
        .macro  trap_addresses from, to
        .if     \from < \to
        .quad   trap_\from
        trap_addresses %(\from + 1), \to
        .endif
        .endm

        .macro  trap_range from, to
        .if     \from < \to
        .if     (\from == 8) || (\from == 17) || (\from == 21) || ((\from >= 10) && (\from <= 14))
        trap_entry \from, 1
        .else
        trap_entry \from, 0
        .endif
        trap_range %(\from + 1), \to
        .endif
        .endm

        trap_range 0, 32
        trap_entry 128, 0

        .globl  event_entry
event_entry:
        popq    %rcx
        popq    %r11
        pushq   $0
        pushq   $VECTOR_EVENT
        jmp     trap_common

        .globl  syscall_entry
syscall_entry:
        popq    %rcx
        popq    %r11
        pushq   $0
        pushq   $VECTOR_SYSCALL
        jmp     trap_common

        .globl  failsafe_entry
failsafe_entry: /* { rcx, r11, ds, es, fs, gs, rip, … }: a segment could not be loaded; these guests load none */
        ud2

trap_common:
        pushq   %rax
        pushq   %rcx
        pushq   %rdx
        pushq   %rbx
        pushq   %rbp
        pushq   %rsi
        pushq   %rdi
        pushq   %r8
        pushq   %r9
        pushq   %r10
        pushq   %r11
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        cld
        movq    %rsp, %rdi
        movq    %rsp, %rbp
        andq    $~15, %rsp
        call    trap_dispatch
        movq    %rbp, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %r11
        popq    %r10
        popq    %r9
        popq    %r8
        popq    %rdi
        popq    %rsi
        popq    %rbp
        popq    %rbx
        popq    %rdx
        popq    %rcx
        popq    %rax
        addq    $8, %rsp                # vector
        movq    $0, (%rsp)              # the error code's place becomes iret's flags
        .globl  iret_tail
iret_tail:
#ifdef USE_HYPERCALL_PAGE
        jmp     hypercall_page + HC_IRET * 32
#else
        pushq   %rcx
        pushq   %r11
        pushq   %rax
        movl    $HC_IRET, %eax
        syscall
#endif
        ud2

/* u64 user_run(u64 rip, u64 rsp, u64 rdi): into user mode; comes back through user_leave. */
        .globl  user_run
user_run:
        pushq   %rbx
        pushq   %rbp
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, user_run_stack(%rip)
        movq    %rdi, %rcx
        movq    %rdx, %rdi
        pushq   $0xe02b                 # ss
        pushq   %rsi                    # rsp
        pushq   $0x202                  # rflags
        pushq   $0xe033                 # cs, ring 3: user mode
        pushq   %rcx                    # rip
        pushq   $0                      # flags
        jmp     iret_tail

/* void user_leave(u64 value): drop the trap's stack, return `value` from user_run. */
        .globl  user_leave
user_leave:
        movq    %rdi, %rax
        movq    user_run_stack(%rip), %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbp
        popq    %rbx
        ret

        .section .rodata
        .balign 8
        .globl  trap_entries
trap_entries:
        trap_addresses 0, 32
        .globl  trap_entry_128
trap_entry_128:
        .quad   trap_128

        .bss
        .balign 4096
        .globl  hypercall_page
hypercall_page:
        .skip   4096
        .globl  shared_info_page
shared_info_page:
        .skip   4096
boot_stack:
        .skip   16384
        .globl  boot_stack_top
boot_stack_top:
        .globl  trap_stack, trap_stack_top
trap_stack:
        .skip   16384
trap_stack_top:
user_run_stack:
        .skip   8

/* ELF notes (public/elfnote.h). */
        .macro  note_text type, text
        .balign 4
        .long   2f - 1f, 4f - 3f, \type
1:      .asciz  "Xen"
2:      .balign 4
3:      .asciz  "\text"
4:      .balign 4
        .endm

        .macro  note_value type, value:vararg
        .balign 4
        .long   2f - 1f, 4f - 3f, \type
1:      .asciz  "Xen"
2:      .balign 4
3:      .quad   \value
4:      .balign 4
        .endm

        .noaltmacro
#ifndef NO_XEN_NOTES
        .section .note.Xen, "a", @note
        note_text   6, "reeve-micro"                    # GUEST_OS
        note_text   7, "1"                              # GUEST_VERSION
        note_text   5, "xen-3.0"                        # XEN_VERSION
        note_text   8, "generic"                        # LOADER
        note_text   10, "pae_pgdir_above_4gb"           # FEATURES
        note_text   9, "yes"                            # PAE_MODE
#ifdef PVH_ONLY
        note_value  18, _start                          # PHYS32_ENTRY, and none for PV
#else
        note_value  1, _start                           # ENTRY
        note_value  3, 0xFFFFFFFF80000000               # VIRT_BASE
        note_value  4, 0                                # PADDR_OFFSET
        note_value  13, 1, 1                            # L1_MFN_VALID: mask, value
#ifdef USE_HYPERCALL_PAGE
        note_value  2, hypercall_page                   # HYPERCALL_PAGE
#endif
#endif
#endif
