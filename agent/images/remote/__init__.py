"""Images that are fetched, from HTTP servers and from Glance, and kept in a cache.

`source` says what is wanted, `policy` what may be asked for, `transport` asks, `glance` knows OpenStack's service,
`download` writes what comes into a temporary file, `content` looks at it, `cache` keeps it, `fetcher` joins those who
want the same. `disks` and `steps` make a domain's disks and kernels of it.
"""
