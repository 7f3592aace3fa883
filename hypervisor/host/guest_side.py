"""The domain process's part of a link to a driver process."""

from __future__ import annotations

from hypervisor.errors import HostUnavailable
from hypervisor.host import channel as channels
from hypervisor.host.driver_process import DriverOrder
from hypervisor.host.guest_link_ends import LinkEnds
from hypervisor.host.table import Domain


class DomainSide:
    """A `hypervisor.host.drivers.GuestSide`: makes links between a domain process and its drivers."""

    def __init__(self, domain: Domain, order: DriverOrder) -> None:
        self._domain = domain
        self._order = order

    async def open_link(self) -> list[int]:
        if self._order.link:
            return []
        process = self._domain.process
        if process is None or not process.alive:
            raise HostUnavailable("the domain process is gone")
        ends = LinkEnds.create(process.handles.memory)
        try:
            await process.request("link", fds=ends.for_domain)
        except BaseException:
            channels.close_all(ends.for_driver)
            raise
        finally:
            channels.close_all(ends.for_domain)
        return ends.for_driver
