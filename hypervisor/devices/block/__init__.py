"""Disks: the block back end (public/io/blkif.h) and the images behind it."""
