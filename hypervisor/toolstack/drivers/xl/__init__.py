"""The driver of a Xen host: the program ``xl`` and xenstore."""
