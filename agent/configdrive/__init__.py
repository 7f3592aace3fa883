"""First boot: a small disk from which cloud-init takes a guest's name, keys, network and user data.

`FirstBoot` says what, `documents` gives the files of either format, `write_iso` the disk. `Drives` keeps the disks of a
node; `request` reads what an instruction wants, `steps` carries it out.
Sources: cloud-init's documentation of the NoCloud and ConfigDrive data sources; OpenStack's
``network_data.json`` schema.
"""

from agent.configdrive.content import ConfigDriveFormat, FirstBoot, GuestNetwork, documents
from agent.configdrive.drives import Drives
from agent.configdrive.iso import MAX_BYTES, write_iso

__all__ = ["MAX_BYTES", "ConfigDriveFormat", "Drives", "FirstBoot", "GuestNetwork", "documents", "write_iso"]
