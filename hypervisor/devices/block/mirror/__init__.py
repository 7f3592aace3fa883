"""Copying disks that are in use to another host, so that they move with a live-migrated domain.

The room lies here, beside the images, because it knows images, drivers' records of what was written and nothing of
domains, processes or how bytes come to the other host: `link.MirrorLink` is all it asks for. `source.MirrorSource` and
`target.MirrorTarget` are the two ends, `images` makes and removes the files on the target.
"""
