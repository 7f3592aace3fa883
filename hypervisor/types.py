"""Identifier types used across the hypervisor.

They are ``NewType``s: free at run time, and a type checker refuses to pass a
guest frame where a machine frame is meant.

* ``Mfn``  machine frame number; unique on a host (the ledger hands out extents).
* ``Pfn``  guest pseudo-physical frame number, 0 .. max_pfn-1 of one domain.
* ``Gfn``  what a hypercall calls a guest frame; equals the mfn for PV guests.
* ``Port`` event channel port of one domain, 1 .. 4095 with the 2-level ABI.
* ``GrantRef`` index into one domain's grant table.
* ``DomId`` a host's own number for a domain; never stored, never leaves the host.
"""

from typing import NewType

DomId = NewType("DomId", int)
Mfn = NewType("Mfn", int)
Pfn = NewType("Pfn", int)
Gfn = NewType("Gfn", int)
Port = NewType("Port", int)
GrantRef = NewType("GrantRef", int)
VcpuId = NewType("VcpuId", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
