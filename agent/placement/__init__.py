"""What OpenStack's Placement is told of this host: its provider, what it has, and what its domains take of it.

`http` asks within bounds, `auth` says who asks, `client` knows Placement's API, `answers` what its answers must look
like. `inventory` and `allocations` say what should be there, `provider` and `allocations` make it so, `reconciler` is
the thread that has them do it, `build` joins the parts.
"""
