"""The exceptions of the hypervisor and its toolstack.

::

    Exception
     ├─ XenError(errno)        the guest asked for something it may not have: it gets -errno
     ├─ GuestFault             the guest broke its own contract with no errno to return it in: its domain crashes
     ├─ HypervisorBug          our own mistake: loud, logged with a traceback, only that domain ends
     └─ ToolstackError         what an operator or the agent sees; has `code` and `retryable`
         ├─ SpecInvalid            domain.spec_invalid
         ├─ DomainNotFound         domain.not_found
         ├─ DomainExists           domain.uuid_in_use
         ├─ NameInUse              domain.name_in_use
         ├─ WrongState             domain.wrong_state
         ├─ NotOurs                domain.not_ours
         ├─ InsufficientMemory     host.insufficient_memory
         ├─ InsufficientVcpus      host.insufficient_vcpus
         ├─ MemoryTooSmall         domain.memory_too_small
         ├─ KernelInvalid          kernel.invalid      not a kernel image at all, or damaged
         │   ├─ KernelNotXen       kernel.no_xen_notes
         │   └─ KernelPvhOnly      kernel.pvh_only
         ├─ RamdiskInvalid         ramdisk.invalid
         ├─ DeviceNotFound         device.not_found
         ├─ DeviceExists           device.exists       the id, or a MAC, is taken
         ├─ ImageInvalid           image.invalid       missing, unreadable, another format, outside the allowed folders
         ├─ ImageInUse             image.in_use        by another domain
         ├─ NetworkUnknown         network.unknown
         ├─ Unsupported            driver.unsupported  this driver cannot do that (see its capabilities)
         ├─ HostUnavailable        host.unavailable    retryable; the host process does not answer
         ├─ OperationTimeout       domain.timeout      retryable
         ├─ StreamInvalid          stream.invalid      a saved image or a stream is damaged, cut short, or none at all
         │   └─ StreamUnsupported  stream.unsupported  of another version, byte order or kind of guest
         ├─ TemplateNotFound       template.not_found
         ├─ TemplateExists         template.exists
         ├─ TemplateInUse          template.in_use     domains run on its memory
         ├─ CpuIncompatible        cpu.incompatible    the guest saw CPU features that this host lacks
         ├─ MigrationNotFound      migration.not_found
         ├─ MigrationRefused       migration.refused   the target says no, or the stream is for no migration it knows
         │   └─ MigrationNotTransparent  migration.not_transparent  possible, but not unnoticed by the guest
         ├─ MigrationFailed        migration.failed    retryable; before the point of no return: the source runs on
         ├─ MigrationCancelled     migration.cancelled
         ├─ MigrationUnresolved    migration.unresolved  paused on both sides until an operator decides
         ├─ ProtocolError          protocol.invalid    what was said on the control socket is not of its protocol
         └─ HostFailure            host.failure        anything else that went wrong on the host

Codes are stable: programs match on them, never on the text. The text names the
cause and the cure in one line.
"""

from __future__ import annotations

from typing import ClassVar


class XenError(Exception):
    """A hypercall fails with ``-errno`` (Xen's own numbers, see ``hypervisor.abi.errno``)."""

    def __init__(self, errno: int, why: str = "") -> None:
        super().__init__(errno, why)
        self.errno = errno
        self.why = why


class GuestFault(Exception):
    """The guest did what real Xen answers with a domain crash."""


class HypervisorBug(Exception):
    """An invariant of ours does not hold."""


class ToolstackError(Exception):
    """Base of what a driver may raise.

    :ivar code: stable machine-readable name, ``area.reason``.
    :ivar retryable: the same request may succeed later without a change.
    """

    code: ClassVar[str] = "host.failure"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


class SpecInvalid(ToolstackError):
    code = "domain.spec_invalid"


class DomainNotFound(ToolstackError):
    code = "domain.not_found"


class DomainExists(ToolstackError):
    code = "domain.uuid_in_use"


class NameInUse(ToolstackError):
    code = "domain.name_in_use"


class WrongState(ToolstackError):
    code = "domain.wrong_state"


class NotOurs(ToolstackError):
    code = "domain.not_ours"


class InsufficientMemory(ToolstackError):
    code = "host.insufficient_memory"


class InsufficientVcpus(ToolstackError):
    code = "host.insufficient_vcpus"


class MemoryTooSmall(ToolstackError):
    code = "domain.memory_too_small"


class KernelInvalid(ToolstackError):
    code = "kernel.invalid"


class KernelNotXen(KernelInvalid):
    code = "kernel.no_xen_notes"


class KernelPvhOnly(KernelInvalid):
    code = "kernel.pvh_only"


class RamdiskInvalid(ToolstackError):
    code = "ramdisk.invalid"


class DeviceNotFound(ToolstackError):
    code = "device.not_found"


class DeviceExists(ToolstackError):
    code = "device.exists"


class ImageInvalid(ToolstackError):
    code = "image.invalid"


class ImageInUse(ToolstackError):
    code = "image.in_use"


class NetworkUnknown(ToolstackError):
    code = "network.unknown"


class Unsupported(ToolstackError):
    code = "driver.unsupported"


class HostUnavailable(ToolstackError):
    code = "host.unavailable"
    retryable = True


class OperationTimeout(ToolstackError):
    code = "domain.timeout"
    retryable = True


class StreamInvalid(ToolstackError):
    code = "stream.invalid"


class StreamUnsupported(StreamInvalid):
    code = "stream.unsupported"


class TemplateNotFound(ToolstackError):
    code = "template.not_found"


class TemplateExists(ToolstackError):
    code = "template.exists"


class TemplateInUse(ToolstackError):
    code = "template.in_use"


class CpuIncompatible(ToolstackError):
    code = "cpu.incompatible"


class MigrationNotFound(ToolstackError):
    code = "migration.not_found"


class MigrationRefused(ToolstackError):
    code = "migration.refused"


class MigrationNotTransparent(MigrationRefused):
    code = "migration.not_transparent"


class MigrationFailed(ToolstackError):
    code = "migration.failed"
    retryable = True


class MigrationCancelled(ToolstackError):
    code = "migration.cancelled"


class MigrationUnresolved(ToolstackError):
    code = "migration.unresolved"


class ProtocolError(ToolstackError):
    code = "protocol.invalid"


class HostFailure(ToolstackError):
    code = "host.failure"


def _tree(cls: type[ToolstackError]) -> dict[str, type[ToolstackError]]:
    found = {cls.code: cls} if cls is not ToolstackError else {}
    for sub in cls.__subclasses__():
        # A subclass without a code of its own is its parent to whom it is told.
        found = _tree(sub) | found
    return found


def from_json(data: object) -> ToolstackError:
    """Rebuild an error that crossed a socket; an unknown code becomes `HostFailure`."""
    if not isinstance(data, dict):
        return HostFailure(str(data))
    code = str(data.get("code", ""))
    message = str(data.get("message", "no reason given"))
    return _tree(ToolstackError).get(code, HostFailure)(message)
