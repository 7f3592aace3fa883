/*
 * Entry, ELF notes, trap and event entries of the 32-bit micro-guests.
 *
 * Xen enters with %esi = start_info and flat segments of ring 1 (public/arch-x86/xen-x86_32.h). A trap or event arrives
 * as { [error code,] eip, cs, eflags [, esp, ss] }; HYPERVISOR_iret, jumped to, takes { eip, cs, eflags [, esp, ss] }.
 */

#define HC_IRET 23
#define VECTOR_EVENT 256
#define USER_CS 0xe02b
#define USER_SS 0xe033

        .section .text.start, "ax", @progbits
        .globl _start
_start:
        cld
        movl    %esi, start_info
        movl    $boot_stack_top, %esp
        xorl    %ebp, %ebp
        call    guest_init
        ud2

        .text
        .altmacro
        .macro  trap_entry vector
trap_\vector:
        .if     (\vector != 8) && (\vector != 17) && ((\vector < 10) || (\vector > 14))
        pushl   $0
        .endif
        pushl   $\vector
        jmp     trap_common
        .endm

        .macro  trap_range from, to
        .if     \from < \to
        trap_entry \from
        trap_range %(\from + 1), \to
        .endif
        .endm

        .macro  trap_addresses from, to
        .if     \from < \to
        .long   trap_\from
        trap_addresses %(\from + 1), \to
        .endif
        .endm

        trap_range 0, 32
        trap_entry 128

        .globl  event_entry
event_entry:
        pushl   $0
        pushl   $VECTOR_EVENT
        jmp     trap_common

        .globl  failsafe_entry
failsafe_entry:
        ud2

trap_common:
        pushal
        cld
        pushl   %esp
        call    trap_dispatch
        addl    $4, %esp
        popal
        addl    $8, %esp                # vector and error code
        jmp     hypercall_page + HC_IRET * 32

/* u32 user_run(u32 eip, u32 esp, u32 native): into ring 3, by hypercall or the `iret` instruction. */
        .globl  user_run
user_run:
        pushl   %ebx
        pushl   %ebp
        pushl   %esi
        pushl   %edi
        movl    %esp, user_run_stack
        movl    20(%esp), %ecx
        movl    24(%esp), %edx
        movl    28(%esp), %eax
        pushl   $USER_SS
        pushl   %edx
        pushl   $0x202
        pushl   $USER_CS
        pushl   %ecx
        testl   %eax, %eax
        jz      hypercall_page + HC_IRET * 32
        iretl

/* void user_leave(u32 value): drop the trap's stack, return `value` from user_run. */
        .globl  user_leave
user_leave:
        movl    4(%esp), %eax
        movl    user_run_stack, %esp
        popl    %edi
        popl    %esi
        popl    %ebp
        popl    %ebx
        ret

        .section .rodata
        .balign 4
        .globl  trap_entries
trap_entries:
        trap_addresses 0, 32
        .globl  trap_entry_128
trap_entry_128:
        .long   trap_128

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
        .globl  trap_stack_top
trap_stack:
        .skip   16384
trap_stack_top:
user_run_stack:
        .skip   4

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
3:      .long   \value
4:      .balign 4
        .endm

        .noaltmacro
        .section .note.Xen, "a", @note
        note_text   6, "reeve-micro"                    # GUEST_OS
        note_text   7, "1"                              # GUEST_VERSION
        note_text   5, "xen-3.0"                        # XEN_VERSION
        note_text   8, "generic"                        # LOADER
        note_text   10, "pae_pgdir_above_4gb"           # FEATURES
        note_text   9, "yes"                            # PAE_MODE
        note_value  1, _start                           # ENTRY
        note_value  2, hypercall_page                   # HYPERCALL_PAGE
        note_value  3, 0xC0000000                       # VIRT_BASE
        note_value  4, 0                                # PADDR_OFFSET
