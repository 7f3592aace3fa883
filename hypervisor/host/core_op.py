"""What a domain process tells of its guest's registers, for core dumps."""

from __future__ import annotations

import base64
from typing import Any

from hypervisor.errors import HostFailure, WrongState
from hypervisor.host.runtime import CoreSource


def tell(source: CoreSource | None, vcpu: object) -> dict[str, Any]:
    """Op ``core``: a vCPU's context, or with None for it what there is."""
    if source is None:
        raise WrongState("this runtime tells no registers")
    if vcpu is None:
        return source.describe()
    if not isinstance(vcpu, int):
        raise HostFailure(f"op core of vCPU {vcpu!r}")
    return {"context": base64.b64encode(source.context(vcpu)).decode()}
