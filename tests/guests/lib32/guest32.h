/*
 * The part of Xen's 32-bit PAE PV interface that the micro-guests use, declared anew from the public headers
 * (public/xen.h, arch-x86/xen-x86_32.h, event_channel.h, sched.h, memory.h, io/console.h).
 */
#ifndef GUEST32_H
#define GUEST32_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;

#define PAGE_SIZE 4096U
#define VIRT_BASE 0xC0000000U
#define M2P ((const volatile u32 *)0xF5800000U)
#define KERNEL_CS 0xe019
#define KERNEL_DS 0xe021
#define DOMID_SELF 0x7FF0U

enum {
    HC_set_trap_table = 0, HC_mmu_update = 1, HC_set_gdt = 2, HC_stack_switch = 3, HC_set_callbacks = 4,
    HC_fpu_taskswitch = 5, HC_console_io = 18, HC_update_descriptor = 10, HC_memory_op = 12, HC_multicall = 13,
    HC_update_va_mapping = 14, HC_set_timer_op = 15, HC_xen_version = 17, HC_grant_table_op = 20, HC_vm_assist = 21, HC_vcpu_op = 24, HC_set_segment_base = 25,
    HC_mmuext_op = 26, HC_sched_op = 29, HC_event_channel_op = 32,
};
enum { XEN_EPERM = 1, XEN_EINVAL = 22, XEN_ENOSYS = 38, XEN_EFAULT = 14, XEN_EBUSY = 16 };
enum { MMUEXT_PIN_L3_TABLE = 2, MMUEXT_UNPIN_TABLE = 4, MMUEXT_NEW_BASEPTR = 5, MMUEXT_NEW_USER_BASEPTR = 15 };
enum { SCHEDOP_yield = 0, SCHEDOP_block = 1, SCHEDOP_shutdown = 2, SCHEDOP_poll = 3 };
enum { SHUTDOWN_poweroff = 0, SHUTDOWN_crash = 3 };
enum { EVTCHNOP_bind_virq = 1, EVTCHNOP_send = 4 };
enum { XENMEM_increase_reservation = 0, XENMEM_decrease_reservation = 1, XENMEM_machphys_mapping = 12 };
enum { VCPUOP_initialise = 0, VCPUOP_up = 1, VCPUOP_down = 2, VCPUOP_is_up = 3, VCPUOP_get_runstate_info = 4 };
#define UVMF_INVLPG 2U

#define PTE_P 1ULL
#define PTE_W 2ULL
#define PTE_U 4ULL
#define PTE_AD 0x60ULL

struct vcpu_info {
    u8 evtchn_upcall_pending, evtchn_upcall_mask;
    u32 evtchn_pending_sel;
    u32 cr2, pad[5];
    u32 time_version, time_pad;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    u8 tsc_shift, flags, pad1[2];
};

struct shared_info {
    struct vcpu_info vcpu_info[32];
    u32 evtchn_pending[32];
    u32 evtchn_mask[32];
    u32 wc_version, wc_sec, wc_nsec;
    u32 max_pfn, frame_list_list, nmi_reason, p2m_cr3, p2m_vaddr, p2m_generation, wc_sec_hi;
};

struct start_info {
    char magic[32];
    u32 nr_pages, shared_info, flags, store_mfn, store_evtchn, console_mfn, console_evtchn;
    u32 pt_base, nr_pt_frames, mfn_list, mod_start, mod_len;
    char cmd_line[1024];
    u32 first_p2m_pfn, nr_p2m_frames;
};

_Static_assert(sizeof(struct vcpu_info) == 64, "vcpu_info");
_Static_assert(sizeof(struct shared_info) == 2344, "shared_info");
_Static_assert(sizeof(struct start_info) == 1112, "start_info");

struct trap_info { u8 vector, flags; u16 cs; u32 address; };
struct mmu_update { u64 ptr, val; };
struct mmuext_op { u32 cmd, arg1, arg2; };
struct multicall_entry { u32 op; s32 result; u32 args[6]; };
struct console_ring { char in[1024]; char out[2048]; u32 in_cons, in_prod, out_cons, out_prod; };

struct user_regs {
    u32 ebx, ecx, edx, esi, edi, ebp, eax;
    u16 error_code, entry_vector;
    u32 eip;
    u16 cs;
    u8 saved_upcall_mask, pad0;
    u32 eflags, esp;
    u16 ss, pad1, es, pad2, ds, pad3, fs, pad4, gs, pad5;
};

struct vcpu_context {
    u8 fpu[512];
    u32 flags;
    struct user_regs regs;
    struct trap_info traps[256];
    u32 ldt_base, ldt_ents, gdt_frames[16], gdt_ents, kernel_ss, kernel_sp;
    u32 ctrlreg[8], debugreg[8];
    u32 event_cs, event_eip, failsafe_cs, failsafe_eip, vm_assist;
};

_Static_assert(sizeof(struct vcpu_context) == 2800, "vcpu_context");

/* What a trap leaves on the stack; esp and ss only when it came from ring 3. */
struct trap_frame {
    u32 edi, esi, ebp, esp_dummy, ebx, edx, ecx, eax;
    u32 vector, error, eip, cs, eflags, esp, ss;
};

static inline s32 hypercall(u32 number, u32 a, u32 b, u32 c, u32 d, u32 e)
{
    s32 result;
    __asm__ volatile("int $0x82" : "=a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d), "+D"(e) : "0"(number) : "memory");
    return result;
}

#endif
