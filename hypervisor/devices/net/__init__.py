"""Networks: the driver of a guest's nics (netif), the switch between domains, and its uplinks.

::

    guest ── rings, grant copies ── driver process ── one message a frame ── switch process ── uplink (TAP, slirp4netns)
                                    `driver`           `message`             `switch`         `uplinks`
"""
