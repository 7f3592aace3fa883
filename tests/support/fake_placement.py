"""As much of Placement 1.38 as a host uses, in memory, over HTTP: generations, marks of consumers, capacity."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

CONCURRENT = "placement.concurrent_update"


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, detail: str, code: str = "placement.undefined_code") -> None:
        self.status, self.detail, self.code = status, detail, code


@dataclasses.dataclass
class FakeProvider:
    name: str
    generation: int = 0
    inventories: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    traits: set[str] = dataclasses.field(default_factory=set)
    aggregates: set[str] = dataclasses.field(default_factory=set)

    def expect(self, generation: int) -> None:
        if generation != self.generation:
            raise Refused(409, "resource provider generation conflict", CONCURRENT)
        self.generation += 1


@dataclasses.dataclass
class FakeConsumer:
    allocations: dict[str, dict[str, int]]
    project: str
    user: str
    type: str
    generation: int = 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakePlacement

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.asked.append((self.command, self.path, self.headers.get("X-Auth-Token", "")))
        misdeed = server.misdeeds.pop(0) if server.misdeeds else None
        if misdeed is not None:
            with contextlib.suppress(OSError):
                misdeed(self)
            return
        try:
            if server.tokens is not None and self.headers.get("X-Auth-Token") not in server.tokens:
                raise Refused(401, "no such token")
            if self.headers.get("OpenStack-API-Version") != "placement 1.38":
                raise Refused(406, "no such version")
            with server.lock:
                if server.before is not None:
                    server.before(self.command, self.path)
                status, found = server.carry_out(self.command, self.path, json.loads(body) if body else None)
        except Refused as exc:
            status, found = exc.status, {"errors": [{"status": exc.status, "detail": exc.detail, "code": exc.code}]}
        self.reply(status, b"" if found is None else json.dumps(found).encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class FakePlacement(ThreadingHTTPServer):
    """:ivar asked: (method, path, token) of each request. :ivar misdeeds: what is done instead, once each.

    :ivar before: called with method and path before each request is carried out: what another client does meanwhile.
    :ivar tokens: that are taken; None for all.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.providers: dict[str, FakeProvider] = {}
        self.consumers: dict[str, FakeConsumer] = {}
        self.known_traits = {"HW_CPU_X86_SSE2", "HW_CPU_X86_AVX", "HW_CPU_X86_AVX2", "COMPUTE_NODE"}
        self.asked: list[tuple[str, str, str]] = []
        self.misdeeds: list[Callable[[Handler], None]] = []
        self.before: Callable[[str, str], None] | None = None
        self.tokens: set[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/placement"

    def count(self, method: str) -> int:
        return sum(asked == method for asked, *_ in self.asked)

    def rows(self, provider: str) -> dict[str, dict[str, int]]:
        """What each consumer has at a provider."""
        found = {uuid: consumer.allocations.get(provider) for uuid, consumer in self.consumers.items()}
        return {uuid: dict(row) for uuid, row in found.items() if row}

    def put(self, uuid: str, provider: str, row: dict[str, int], *, type: str = "INSTANCE", project: str = "p") -> None:
        """As a scheduler writes it."""
        old = self.consumers.get(uuid)
        allocations = {**(old.allocations if old else {}), provider: row}
        self.consumers[uuid] = FakeConsumer(allocations, project, "u", type, old.generation + 1 if old else 1)

    def handle_error(self, request: Any, client_address: Any) -> None: ...

    def carry_out(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        assert path.startswith("/placement/"), path
        path, _, query = path.removeprefix("/placement").partition("?")
        for pattern, handler in _ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {path}")
            if found is not None:
                return handler(self, *found.groups(), query if method == "GET" else body)
        raise Refused(404, f"no such page {method} {path}")

    def provider(self, uuid: str) -> FakeProvider:
        if uuid not in self.providers:
            raise Refused(404, f"No resource provider with uuid {uuid} found")
        return self.providers[uuid]

    def _list(self, query: str) -> tuple[int, Any]:
        name = unquote(query.removeprefix("name="))
        return 200, {"resource_providers": [_shown(u, p) for u, p in self.providers.items() if p.name == name]}

    def _create(self, body: Any) -> tuple[int, Any]:
        taken = {provider.name for provider in self.providers.values()}
        if body["uuid"] in self.providers or body["name"] in taken:
            raise Refused(409, f"Conflicting resource provider {body['name']}", "placement.duplicate_name")
        self.providers[body["uuid"]] = FakeProvider(body["name"])
        return 200, _shown(body["uuid"], self.providers[body["uuid"]])

    def _show(self, uuid: str, body: Any) -> tuple[int, Any]:
        return 200, _shown(uuid, self.provider(uuid))

    def _rename(self, uuid: str, body: Any) -> tuple[int, Any]:
        if any(p.name == body["name"] for u, p in self.providers.items() if u != uuid):
            raise Refused(409, f"Conflicting resource provider {body['name']}", "placement.duplicate_name")
        self.provider(uuid).name = body["name"]
        return 200, _shown(uuid, self.provider(uuid))

    def _get_inventories(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        return 200, {"resource_provider_generation": provider.generation, "inventories": provider.inventories}

    def _put_inventories(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        provider.expect(body["resource_provider_generation"])
        gone = set(provider.inventories) - set(body["inventories"])
        if any(gone & set(row) for row in self.rows(uuid).values()):
            raise Refused(409, "update conflict: inventory is in use", "placement.inventory.inuse")
        provider.inventories = body["inventories"]
        return self._get_inventories(uuid, None)

    def _get_traits(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        return 200, {"resource_provider_generation": provider.generation, "traits": sorted(provider.traits)}

    def _put_traits(self, uuid: str, body: Any) -> tuple[int, Any]:
        if unknown := set(body["traits"]) - self.known_traits:
            raise Refused(400, f"No such trait {min(unknown)}.")
        provider = self.provider(uuid)
        provider.expect(body["resource_provider_generation"])
        provider.traits = set(body["traits"])
        return self._get_traits(uuid, None)

    def _create_trait(self, name: str, body: Any) -> tuple[int, Any]:
        if not name.startswith("CUSTOM_"):
            raise Refused(400, "The trait is invalid")
        new = name not in self.known_traits
        self.known_traits.add(name)
        return 201 if new else 204, None

    def _get_aggregates(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        return 200, {"resource_provider_generation": provider.generation, "aggregates": sorted(provider.aggregates)}

    def _put_aggregates(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        provider.expect(body["resource_provider_generation"])
        provider.aggregates = set(body["aggregates"])
        return self._get_aggregates(uuid, None)

    def _get_rows(self, uuid: str, body: Any) -> tuple[int, Any]:
        provider = self.provider(uuid)
        rows = {
            consumer: {"resources": row, "consumer_generation": self.consumers[consumer].generation}
            for consumer, row in self.rows(uuid).items()
        }
        return 200, {"resource_provider_generation": provider.generation, "allocations": rows}

    def _get_consumer(self, uuid: str, body: Any) -> tuple[int, Any]:
        found = self.consumers.get(uuid)
        if found is None:
            return 200, {"allocations": {}}
        return 200, {
            "allocations": {provider: {"resources": row} for provider, row in found.allocations.items()},
            "project_id": found.project,
            "user_id": found.user,
            "consumer_type": found.type,
            "consumer_generation": found.generation,
        }

    def _put_consumer(self, uuid: str, body: Any) -> tuple[int, Any]:
        old = self.consumers.get(uuid)
        if body["consumer_generation"] != (old.generation if old else None):
            raise Refused(409, "consumer generation conflict - expected another", CONCURRENT)
        wanted = {provider: dict(row["resources"]) for provider, row in body["allocations"].items()}
        for provider, row in wanted.items():
            self._check(uuid, provider, row)
        for provider in {*wanted, *(old.allocations if old else ())}:
            self.providers[provider].generation += 1
        if not wanted:
            self.consumers.pop(uuid, None)
        else:
            self.consumers[uuid] = FakeConsumer(
                wanted,
                body["project_id"],
                body["user_id"],
                body["consumer_type"],
                old.generation + 1 if old else 1,
            )
        return 204, None

    def _check(self, consumer: str, uuid: str, row: dict[str, int]) -> None:
        if uuid not in self.providers:
            raise Refused(400, f"Allocation for resource provider '{uuid}' that does not exist.")
        for name, amount in row.items():
            assert amount > 0, "Placement's schema wants 1 at least"
            given = self.providers[uuid].inventories.get(name)
            used = sum(other.get(name, 0) for key, other in self.rows(uuid).items() if key != consumer)
            room = (given["total"] - given["reserved"]) * given["allocation_ratio"] if given else 0
            if used + amount > room or (given and amount > given["max_unit"]):
                raise Refused(409, f"Unable to allocate inventory: {name} on resource provider {uuid}")


def _shown(uuid: str, provider: FakeProvider) -> dict[str, Any]:
    return {"uuid": uuid, "name": provider.name, "generation": provider.generation, "links": []}


_ROUTES: dict[str, Callable[..., tuple[int, Any]]] = {
    r"GET /resource_providers": FakePlacement._list,
    r"POST /resource_providers": FakePlacement._create,
    r"GET /resource_providers/([^/]+)": FakePlacement._show,
    r"PUT /resource_providers/([^/]+)": FakePlacement._rename,
    r"GET /resource_providers/([^/]+)/inventories": FakePlacement._get_inventories,
    r"PUT /resource_providers/([^/]+)/inventories": FakePlacement._put_inventories,
    r"GET /resource_providers/([^/]+)/traits": FakePlacement._get_traits,
    r"PUT /resource_providers/([^/]+)/traits": FakePlacement._put_traits,
    r"PUT /traits/([^/]+)": FakePlacement._create_trait,
    r"GET /resource_providers/([^/]+)/aggregates": FakePlacement._get_aggregates,
    r"PUT /resource_providers/([^/]+)/aggregates": FakePlacement._put_aggregates,
    r"GET /resource_providers/([^/]+)/allocations": FakePlacement._get_rows,
    r"GET /allocations/([^/]+)": FakePlacement._get_consumer,
    r"PUT /allocations/([^/]+)": FakePlacement._put_consumer,
}


@contextlib.contextmanager
def placement() -> Iterator[FakePlacement]:
    server = FakePlacement()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
