"""What a disk's data lies in: raw files and devices, and qcow2 behind a storage daemon."""
