"""The parts that the configuration asks for, put together."""

from __future__ import annotations

from collections.abc import Callable

from agent.conf_placement import PlacementSettings
from agent.placement.allocations import Allocations
from agent.placement.auth import Auth, FixedAuth, KeystoneAuth
from agent.placement.client import Client
from agent.placement.http import Http
from agent.placement.provider import Provider
from agent.placement.reconciler import Reconciler
from agent.resources import ResourceClaims
from hypervisor.toolstack.api import Toolstack


def make_client(settings: PlacementSettings, wait: Callable[[float], bool]) -> tuple[Http, Client]:
    """:param wait: see `Client`."""
    http = Http(seconds=settings.timeout, ca_file=settings.ca_file)
    auth: Auth = KeystoneAuth(settings)
    if settings.auth != "keystone":
        auth = FixedAuth(settings.token if settings.auth == "token" else "")
    return http, Client(http, auth, settings.endpoint, wait=wait)


def make_allocations(settings: PlacementSettings, client: Client, provider: str) -> Allocations:
    return Allocations(client, provider, project=settings.project_id, user=settings.user_id)


def make_reconciler(
    settings: PlacementSettings, identity: str, claims: ResourceClaims, toolstack: Toolstack
) -> Reconciler | None:
    """None if the configuration wants none. :param identity: the provider's UUID if none is configured."""
    if not settings.enabled:
        return None
    uuid = settings.provider_uuid or identity
    http, client = make_client(settings, lambda seconds: made.wait(seconds))
    made = Reconciler(
        Provider(client, uuid, settings.provider_name),
        make_allocations(settings, client, uuid),
        claims,
        toolstack,
        http,
        write=settings.allocations == "write",
        interval=float(settings.interval),
        aggregates=frozenset(settings.aggregates),
    )
    claims.on_change = made.changed
    return made
