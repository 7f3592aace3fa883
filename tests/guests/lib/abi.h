/*
 * The part of Xen's 64-bit PV interface that the micro-guests use.
 *
 * Declared anew from the public interface (public/xen.h, arch-x86/xen.h, event_channel.h, sched.h, vcpu.h, callback.h,
 * memory.h, grant_table.h, version.h, physdev.h, io/console.h, io/xs_wire.h). Only x86-64, only what a guest here needs.
 */
#ifndef GUEST_ABI_H
#define GUEST_ABI_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef signed char s8;
typedef int s32;
typedef long s64;

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096UL
#define PAGE_MASK (~(PAGE_SIZE - 1))

/* Hypercall numbers. */
enum {
    HC_set_trap_table = 0,
    HC_mmu_update = 1,
    HC_set_gdt = 2,
    HC_stack_switch = 3,
    HC_set_callbacks = 4,
    HC_fpu_taskswitch = 5,
    HC_sched_op_compat = 6,
    HC_platform_op = 7,
    HC_set_debugreg = 8,
    HC_get_debugreg = 9,
    HC_update_descriptor = 10,
    HC_memory_op = 12,
    HC_multicall = 13,
    HC_update_va_mapping = 14,
    HC_set_timer_op = 15,
    HC_xen_version = 17,
    HC_console_io = 18,
    HC_grant_table_op = 20,
    HC_vm_assist = 21,
    HC_update_va_mapping_otherdomain = 22,
    HC_iret = 23,
    HC_vcpu_op = 24,
    HC_set_segment_base = 25,
    HC_mmuext_op = 26,
    HC_xsm_op = 27,
    HC_nmi_op = 28,
    HC_sched_op = 29,
    HC_callback_op = 30,
    HC_event_channel_op = 32,
    HC_physdev_op = 33,
    HC_hvm_op = 34,
    HC_sysctl = 35,
    HC_domctl = 36,
};

/* Error numbers; a hypercall returns them negated. */
enum {
    XEN_EPERM = 1,
    XEN_ENOENT = 2,
    XEN_ESRCH = 3,
    XEN_EIO = 5,
    XEN_ENXIO = 6,
    XEN_E2BIG = 7,
    XEN_ENOMEM = 12,
    XEN_EACCES = 13,
    XEN_EFAULT = 14,
    XEN_EBUSY = 16,
    XEN_EEXIST = 17,
    XEN_EINVAL = 22,
    XEN_ENOSPC = 28,
    XEN_ENOSYS = 38,
    XEN_EOPNOTSUPP = 95,
};

#define DOMID_SELF 0x7FF0U

/* Flat selectors of 64-bit PV guests, kernel and user alike in ring 3. */
#define FLAT_CS64 0xe033
#define FLAT_SS64 0xe02b

#define M2P_VIRT_START 0xFFFF800000000000UL
#define XEN_FIRST_L4_SLOT 256
#define XEN_LAST_L4_SLOT 271

struct vcpu_time_info {
    u32 version;
    u32 pad0;
    u64 tsc_timestamp;
    u64 system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags;
    u8 pad1[2];
};

struct vcpu_info {
    u8 evtchn_upcall_pending;
    u8 evtchn_upcall_mask;
    u64 evtchn_pending_sel;
    u64 cr2;
    u64 pad;
    struct vcpu_time_info time;
};

struct shared_info {
    struct vcpu_info vcpu_info[32];
    u64 evtchn_pending[64];
    u64 evtchn_mask[64];
    u32 wc_version;
    u32 wc_sec;
    u32 wc_nsec;
    u32 wc_sec_hi;
    u64 max_pfn;
    u64 pfn_to_mfn_frame_list_list;
    u64 nmi_reason;
    u64 p2m_cr3;
    u64 p2m_vaddr;
    u64 p2m_generation;
};

struct start_info {
    char magic[32];
    u64 nr_pages;
    u64 shared_info; /* machine address */
    u32 flags;
    u64 store_mfn;
    u32 store_evtchn;
    u64 console_mfn;
    u32 console_evtchn;
    u64 pt_base; /* virtual address */
    u64 nr_pt_frames;
    u64 mfn_list; /* virtual address */
    u64 mod_start;
    u64 mod_len;
    char cmd_line[1024];
    u64 first_p2m_pfn;
    u64 nr_p2m_frames;
};

_Static_assert(sizeof(struct vcpu_info) == 64, "vcpu_info");
_Static_assert(sizeof(struct shared_info) == 3136, "shared_info");
_Static_assert(sizeof(struct start_info) == 1168, "start_info");

/* Traps. */
struct trap_info {
    u8 vector;
    u8 flags; /* 0-1 the privilege that may raise it by `int`, 2 mask events on entry */
    u16 cs;
    u64 address;
};

#define TRAP_MASK_EVENTS 4

struct callback_register {
    u16 type;
    u16 flags;
    u64 address;
};

enum { CALLBACKOP_register = 0, CALLBACKOP_unregister = 1 };
enum { CALLBACKTYPE_event = 0, CALLBACKTYPE_failsafe = 1, CALLBACKTYPE_syscall = 2, CALLBACKTYPE_nmi = 4 };
#define CALLBACKF_mask_events 1

/* Page tables. */
#define PTE_P (1UL << 0)
#define PTE_W (1UL << 1)
#define PTE_U (1UL << 2)
#define PTE_PWT (1UL << 3)
#define PTE_PCD (1UL << 4)
#define PTE_A (1UL << 5)
#define PTE_D (1UL << 6)
#define PTE_PSE (1UL << 7) /* PAT in an L1 entry */
#define PTE_NX (1UL << 63)
#define PTE_ADDR 0x000FFFFFFFFFF000UL
#define PTE_RO (PTE_P | PTE_U | PTE_A)
#define PTE_RW (PTE_P | PTE_W | PTE_U | PTE_A | PTE_D)

struct mmu_update {
    u64 ptr;
    u64 val;
};

enum { MMU_NORMAL_PT_UPDATE = 0, MMU_MACHPHYS_UPDATE = 1, MMU_PT_UPDATE_PRESERVE_AD = 2 };

struct mmuext_op {
    u32 cmd;
    u64 arg1;
    u64 arg2;
};

enum {
    MMUEXT_PIN_L1_TABLE = 0,
    MMUEXT_PIN_L2_TABLE = 1,
    MMUEXT_PIN_L3_TABLE = 2,
    MMUEXT_PIN_L4_TABLE = 3,
    MMUEXT_UNPIN_TABLE = 4,
    MMUEXT_NEW_BASEPTR = 5,
    MMUEXT_TLB_FLUSH_LOCAL = 6,
    MMUEXT_INVLPG_LOCAL = 7,
    MMUEXT_SET_LDT = 13,
    MMUEXT_NEW_USER_BASEPTR = 15,
    MMUEXT_CLEAR_PAGE = 16,
    MMUEXT_COPY_PAGE = 17,
    MMUEXT_MARK_SUPER = 19,
};

#define UVMF_INVLPG 2UL

struct multicall_entry {
    u64 op;
    s64 result;
    u64 args[6];
};

enum { VMASST_CMD_enable = 0, VMASST_CMD_disable = 1, VMASST_TYPE_writable_pagetables = 2 };

/* Scheduling and vCPUs. */
enum { SCHEDOP_yield = 0, SCHEDOP_block = 1, SCHEDOP_shutdown = 2, SCHEDOP_poll = 3, SCHEDOP_watchdog = 6 };
enum { SHUTDOWN_poweroff = 0, SHUTDOWN_reboot = 1, SHUTDOWN_suspend = 2, SHUTDOWN_crash = 3 };

struct sched_poll {
    u64 ports;
    u32 nr_ports;
    u64 timeout; /* absolute system time, ns; 0 for none */
};

enum {
    VCPUOP_initialise = 0,
    VCPUOP_up = 1,
    VCPUOP_is_up = 3,
    VCPUOP_register_runstate_memory_area = 5,
    VCPUOP_stop_periodic_timer = 7,
    VCPUOP_register_vcpu_info = 10,
};

struct vcpu_register_vcpu_info {
    u64 mfn;
    u32 offset;
    u32 rsvd;
};

/* Event channels. */
enum {
    EVTCHNOP_bind_virq = 1,
    EVTCHNOP_close = 3,
    EVTCHNOP_send = 4,
    EVTCHNOP_alloc_unbound = 6,
    EVTCHNOP_unmask = 9,
};
#define VIRQ_TIMER 0

struct evtchn_bind_virq {
    u32 virq;
    u32 vcpu;
    u32 port;
};

struct gnttab_query_size {
    u16 dom;
    u32 nr_frames;
    u32 max_nr_frames;
    short status;
};

struct gnttab_setup_table {
    u16 dom;
    u32 nr_frames;
    short status;
    u64 frame_list;
};

enum { GNTTABOP_setup_table = 2, GNTTABOP_query_size = 6 };
enum { CONSOLEIO_write = 0 };
enum { XENVER_version = 0 };

/* Shared rings. */
struct console_ring {
    char in[1024];
    char out[2048];
    u32 in_cons, in_prod;
    u32 out_cons, out_prod;
};

struct xenstore_ring {
    char req[1024];
    char rsp[1024];
    u32 req_cons, req_prod;
    u32 rsp_cons, rsp_prod;
};

struct xs_header {
    u32 type;
    u32 req_id;
    u32 tx_id;
    u32 len;
};

enum { XS_DIRECTORY = 1, XS_READ = 2, XS_WATCH = 4, XS_WRITE = 11, XS_WATCH_EVENT = 15, XS_ERROR = 16 };
#define XS_PAYLOAD_MAX 4096

#endif
