"""The Xen ABI: numbers, structure offsets and sizes, as Xen's public headers give them.

::

    from hypervisor import abi
    abi.HYPERVISOR_mmu_update        # the headers' own names, without leading underscores
    abi.START_INFO_NR_PAGES          # offset of a member: STRUCTURE_MEMBER
    abi.SIZEOF_SHARED_INFO           # size of a structure
    abi.COMPAT_START_INFO_NR_PAGES   # what a 32-bit guest sees, where it differs

All are plain integers. Hypercall arguments as ctypes classes are in
`hypervisor.abi.structs`, error numbers in `hypervisor.abi.errno`, names for
traces in `hypervisor.abi.hypercalls`. ``tools/gen_abi.py`` makes them.
"""

from hypervisor.abi._generated import *  # noqa: F403
