"""Which capabilities each verb of `hypervisor.toolstack.api.Toolstack` needs; a driver without them refuses it."""

from __future__ import annotations

from collections.abc import Mapping

from hypervisor.toolstack.info import Capability

NEEDS: Mapping[str, tuple[Capability, ...]] = {
    "capabilities": (),
    "host_info": (),
    "list_domains": (),
    "get_domain": (),
    "get_spec": (),
    "create": (),
    "unpause": (),
    "pause": (),
    "shutdown": (),
    "reboot": (Capability.REBOOT,),
    "reset": (Capability.REBOOT,),
    "destroy": (),
    "wait": (),
    "console_log": (Capability.CONSOLE,),
    "open_console": (Capability.CONSOLE,),
    "list_devices": (Capability.DISK,),
    "attach_disk": (Capability.DISK, Capability.HOTPLUG),
    "attach_nic": (Capability.NIC, Capability.HOTPLUG),
    "detach_device": (Capability.HOTPLUG,),
    "set_vcpus": (Capability.RESIZE,),
    "set_memory": (Capability.RESIZE,),
    "redefine": (Capability.RESIZE,),
    "resize_disk": (Capability.DISK_RESIZE,),
    "set_scheduling": (Capability.RESIZE,),
    "stats": (Capability.RESIZE,),
    "sysrq": (Capability.SYSRQ,),
    "dump_core": (Capability.DUMP_CORE,),
    "save": (Capability.SAVE,),
    "restore": (Capability.SAVE,),
    "template_create": (Capability.TEMPLATES,),
    "template_list": (Capability.TEMPLATES,),
    "template_get": (Capability.TEMPLATES,),
    "template_remove": (Capability.TEMPLATES,),
    "clone": (Capability.TEMPLATES,),
    "migration_offer": (Capability.LIVE_MIGRATION,),
    "migration_prepare": (Capability.LIVE_MIGRATION,),
    "migration_start": (Capability.LIVE_MIGRATION,),
    "migration_status": (Capability.LIVE_MIGRATION,),
    "migration_list": (Capability.LIVE_MIGRATION,),
    "migration_cancel": (Capability.LIVE_MIGRATION,),
    "migration_resolve": (Capability.LIVE_MIGRATION,),
    "migration_takeover": (Capability.LIVE_MIGRATION, Capability.STANDBY),
    "migration_forget": (Capability.LIVE_MIGRATION,),
    "subscribe": (),
    "close": (),
}
"""In the order of the API. All that are named are needed; none: every driver has it."""
