"""Two mover processes, real TLS, the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import mover_rig
import pytest
from authority import Authority
from mover_rig import IDENT, TOKEN, Memory, bitmap, pair

from hypervisor.errors import HostFailure, HostUnavailable, MigrationFailed, MigrationRefused, ToolstackError
from hypervisor.host.mover import CLOSED, EPOCH, PagesSent, Receiver, Sender, TlsFiles, wire
from hypervisor.host.mover.tls import names
from hypervisor.host.mover.wire import Kind, Secret
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.types import PAGE_SIZE

PAGES = 600
ROUND_TRIP = 20.0


@dataclasses.dataclass
class Place:
    """What the tests of this file share."""

    loop: asyncio.Runner
    zygote: ZygoteClient
    ca: Authority
    source: TlsFiles
    target: TlsFiles

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test()

        self.loop.run(bounded())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    ca = Authority(tmp_path_factory.mktemp("ca"))
    source, target = ca.host("source"), ca.host("target")
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        zygote = runner.run(stack.enter_async_context(mover_rig.zygote()))
        yield Place(runner, zygote, ca, source, target)
        runner.run(stack.aclose())


def test_pages_and_blobs_arrive(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(PAGES), Memory(PAGES)
        contents = {number: os.urandom(PAGE_SIZE) for number in range(0, PAGES, 3)}
        for number, content in contents.items():
            memory.write(number, content)
        into.write(1, b"left from before")
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            sent = await sender.pages(bitmap(PAGES, range(PAGES)))
            assert sent.pages == PAGES and sent.zero == PAGES - len(contents)
            assert sent.bytes > len(contents) * PAGE_SIZE and sent.seconds > 0
            assert into.all() == memory.all()
            memory.write(7, b"new")
            memory.write(8, b"not sent")
            last = await sender.pages(bitmap(PAGES, [7]), last=True)
            assert (last.pages, last.zero) == (1, 0)
            await sender.blob("state", b"x" * 3_000_000)
            assert await receiver.receive(ROUND_TRIP) == ("state", b"x" * 3_000_000)
            assert into.read(7) == memory.read(7) and into.read(8) != memory.read(8)
            await receiver.blob("complete", b"")
            assert await sender.receive(ROUND_TRIP) == ("complete", b"")

    place.run(test)


def test_an_epoch_arrives_whole(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(PAGES), Memory(PAGES)
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            await sender.commit(0)
            for number in (1, 2):
                memory.write(7, b"epoch %d" % number)
                before, wanted = into.all(), memory.all()
                # The guest runs on when it is told that it may.
                sender.on_copied = lambda: memory.write(7, b"later")
                sent = await sender.epoch(bitmap(PAGES, [7, 8]))
                assert (sent.pages, sent.zero, memory.read(7)[:5]) == (2, 1, b"later")
                await sender.blob("state", b"x")
                assert await receiver.receive(ROUND_TRIP) == ("state", b"x")
                assert into.all() == before, "nothing of it is there before it is whole"
                await sender.commit(number)
                assert await receiver.receive(ROUND_TRIP) == (EPOCH, b"%d" % number)
                assert into.all() == wanted and not receiver.torn
            with pytest.raises(HostFailure):
                await sender.blob(EPOCH, b"3")

    place.run(test)


def test_the_end_is_told_to_the_other_side(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(8), Memory(8)
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            await sender.close()
            assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"")
            assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"")
            with pytest.raises(MigrationFailed):
                await receiver.blob("late", b"")
            with pytest.raises(MigrationFailed):
                await sender.pages(bitmap(8, []))

    place.run(test)


# -- who may come in


async def listen(place: Place, tls: TlsFiles | None = None, into: Memory | None = None) -> Receiver:
    memory = into or Memory(8)
    return await Receiver.listen(
        place.zygote,
        address="127.0.0.1",
        tls=tls or place.target,
        ident=IDENT,
        token=TOKEN,
        memory_fd=memory.fd,
        pages=8,
    )


async def knock(place: Place, receiver: Receiver, tls: TlsFiles | None = None, **options: Any) -> Sender:
    memory = Memory(8)
    wanted = {"ident": IDENT, "token": TOKEN, "pages": 8, "memory_fd": memory.fd, "address": "127.0.0.1", **options}
    return await Sender.start(place.zygote, port=receiver.port, tls=tls or place.source, **wanted)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token": "another"}, "token is wrong"),
        ({"ident": IDENT[:-1] + "2"}, "not the migration"),
        ({"pages": 9}, "9 pages instead of 8"),
        ({"tls": "stranger"}, "certificate|ended the connection"),
        ({"tls": "stranger, trusting"}, "ended the connection"),
        ({"tls": "expired"}, "ended the connection"),
        ({"tls": "wants another"}, "mismatch|doesn't match|not trusted"),
    ],
)
def test_who_is_not_expected_is_refused_and_who_is_comes_in(place: Place, change: dict[str, Any], why: str) -> None:
    tls = change.pop("tls", "")
    stranger = Authority(place.ca.folder, "other").host("stranger")
    files = {
        "": place.source,
        "stranger": stranger,
        "stranger, trusting": dataclasses.replace(stranger, ca=str(place.ca.ca)),
        "expired": place.ca.host("expired", days=-1),
        "wants another": dataclasses.replace(place.source, peer="elsewhere.example"),
    }[tls]

    async def test() -> None:
        receiver = await listen(place)
        refused: asyncio.Queue[str] = asyncio.Queue()
        receiver.on_refused = refused.put_nowait
        try:
            with pytest.raises(MigrationRefused, match=why) as caught:
                await knock(place, receiver, files, **change)
            assert "\n" not in caught.value.message and TOKEN not in caught.value.message
            assert await asyncio.wait_for(refused.get(), ROUND_TRIP)
            sender = await knock(place, receiver)
            await receiver.connected(ROUND_TRIP)
            await sender.close()
        finally:
            await receiver.close()

    place.run(test)


def test_the_target_may_insist_on_a_name(place: Place) -> None:
    async def test() -> None:
        receiver = await listen(place, dataclasses.replace(place.target, peer="source"))
        try:
            with pytest.raises(MigrationRefused):
                await knock(place, receiver, place.ca.host("third"))
            sender = await knock(place, receiver)
            await sender.close()
        finally:
            await receiver.close()

    place.run(test)


def test_there_is_one_connection_and_strangers_do_not_hinder_it(place: Place) -> None:
    async def test() -> None:
        receiver = await listen(place)
        idle = [await asyncio.open_connection("127.0.0.1", receiver.port) for _ in range(20)]
        for _, writer in idle[:10]:
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
        try:
            sender = await knock(place, receiver)
            await receiver.connected(ROUND_TRIP)
            with pytest.raises(HostUnavailable):
                await knock(place, receiver)
            for reader, writer in idle:
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1000):  # an alert may come; then the end
                        pass
                writer.close()
            await sender.close()
        finally:
            await receiver.close()

    place.run(test)


def test_files_that_are_of_no_use(place: Place) -> None:
    async def test() -> None:
        missing = dataclasses.replace(place.target, key="/nonexistent/key.pem")
        with pytest.raises(HostFailure, match=r"/nonexistent/key.pem cannot be used \(No such file"):
            await listen(place, missing)
        with pytest.raises(HostFailure, match="cannot be used"):
            await listen(place, dataclasses.replace(place.target, key=place.source.key))
        with pytest.raises(HostFailure, match="migration_address"):
            await Receiver.listen(
                place.zygote, address="203.0.113.9", tls=place.target, ident=IDENT, token=TOKEN, memory_fd=0, pages=1
            )
        receiver = await listen(place)
        await receiver.close()
        with pytest.raises(HostUnavailable, match="cannot be reached"):
            await knock(place, receiver)

    place.run(test)


@pytest.mark.parametrize(
    ("certificate", "wanted", "good"),
    [
        ((("DNS", "a.example"),), "A.example", True),
        ((("DNS", "*.example"),), "a.example", True),
        ((("DNS", "*.example"),), "b.a.example", False),
        ((("DNS", "*.example"),), ".example", False),
        ((("DNS", "10.0.0.1"),), "10.0.0.1", False),
        ((("IP Address", "10.0.0.1"),), "10.0.0.1", True),
        ((("IP Address", "0:0:0:0:0:0:0:1\n"),), "::1", True),
        ((("IP Address", "nonsense"),), "::1", False),
        ((), "a", False),
    ],
)
def test_names_of_certificates(certificate: Any, wanted: str, good: bool) -> None:
    assert names({"subjectAltName": certificate}, wanted) is good


# -- what goes wrong on the way


class Between:
    """Passes a connection on, and does `harm` to the bytes towards the target."""

    def __init__(self, port: int, harm: Callable[[bytes, int], bytes | None]) -> None:
        self._to, self._harm = port, harm
        self.port = 0

    async def __aenter__(self) -> Between:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        towards = asyncio.create_task(self._pump(reader, back, self._harm))
        await self._pump(there, writer, lambda data, _: data)
        await towards

    async def _pump(self, reader: Any, writer: Any, harm: Callable[[bytes, int], bytes | None]) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                changed = harm(data, passed)
                if changed is None:
                    break
                passed += len(data)
                writer.write(changed)
                await writer.drain()
        writer.close()


def flip(at: int) -> Callable[[bytes, int], bytes | None]:
    def harm(data: bytes, passed: int) -> bytes | None:
        if passed <= at < passed + len(data):
            changed = bytearray(data)
            changed[at - passed] ^= 0x10
            return bytes(changed)
        return data

    return harm


def cut(at: int) -> Callable[[bytes, int], bytes | None]:
    return lambda data, passed: None if passed + len(data) > at else data


@pytest.mark.parametrize("harm", [flip, cut], ids=["flipped", "cut"])
@pytest.mark.parametrize("at", [100, 900, 2500, 60_000, 300_000])
def test_a_damaged_or_cut_connection_is_one_error_on_both_sides(place: Place, harm: Any, at: int) -> None:
    async def test() -> None:
        memory, into = Memory(PAGES), Memory(PAGES)
        for page in range(PAGES):
            memory.write(page, os.urandom(PAGE_SIZE))
        common = {"ident": IDENT, "token": TOKEN, "pages": PAGES}
        receiver = await Receiver.listen(
            place.zygote, address="127.0.0.1", tls=place.target, memory_fd=into.fd, **common
        )
        try:
            async with Between(receiver.port, harm(at)) as between:
                with pytest.raises(ToolstackError) as caught:
                    sender = await Sender.start(
                        place.zygote, address="127.0.0.1", port=between.port, tls=place.source, memory_fd=memory.fd,
                        **common,
                    )  # fmt: skip
                    try:
                        await sender.pages(bitmap(PAGES, range(PAGES)))
                    finally:
                        await sender.close()
            assert "\n" not in caught.value.message
            if at >= 60_000:
                assert isinstance(caught.value, MigrationFailed)
                assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"") and receiver.why
        finally:
            await receiver.close()

    place.run(test)


async def speak(place: Place, receiver: Receiver) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A source that knows the token, and what it says from then on is the test's."""
    context = ssl.create_default_context(cafile=place.source.ca)
    context.load_cert_chain(place.source.certificate, place.source.key)
    reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port, ssl=context, server_hostname="127.0.0.1")
    _, _, _, _, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    nonce = wire.parse_challenge(await reader.readexactly(length))
    own = ssl.PEM_cert_to_DER_cert(Path(place.source.certificate).read_text())
    secret = Secret(IDENT, TOKEN, 8, writer.get_extra_info("ssl_object").getpeercert(True), own)
    writer.write(wire.hello(secret, nonce, bytes(32), 0))
    _, _, _, _, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
    wire.check_welcome(await reader.readexactly(length), secret, nonce, bytes(32))
    return reader, writer


@pytest.mark.parametrize(
    "said",
    [
        wire.header(Kind.FILL, count=1, length=12) + struct.pack("<IQ", 8, 1),
        wire.header(Kind.PAGES, count=1, length=PAGE_SIZE + 4) + struct.pack("<I", 1 << 31) + bytes(PAGE_SIZE),
        b"\xff" * 12,
        wire.record(Kind.WELCOME, bytes(32)),
    ],
    ids=["fill outside", "page outside", "nonsense", "out of place"],
)
def test_who_has_the_token_still_cannot_say_anything(place: Place, said: bytes) -> None:
    async def test() -> None:
        into = Memory(8 + 4)
        receiver = await listen(place, into=into)
        try:
            reader, writer = await speak(place, receiver)
            writer.write(wire.header(Kind.FILL, count=1, length=12) + struct.pack("<IQ", 7, 5) + said)
            assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"")
            assert isinstance(receiver.error, MigrationFailed) and "makes no sense" in receiver.why
            assert into.read(7) == struct.pack("<Q", 5) * 512 and into.all()[8 * PAGE_SIZE :] == bytes(4 * PAGE_SIZE)
            assert not await reader.read()
            writer.close()
        finally:
            await receiver.close()

    place.run(test)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_mover_that_dies_is_noticed(place: Place, victim: str) -> None:
    async def test() -> None:
        memory, into = Memory(8), Memory(8)
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            dies, lives = (sender, receiver) if victim == "sender" else (receiver, sender)
            signal.pidfd_send_signal(dies._pidfd, signal.SIGKILL)
            assert await lives.receive(ROUND_TRIP) == (CLOSED, b"")
            assert await dies.receive(ROUND_TRIP) == (CLOSED, b"")
            with pytest.raises(MigrationFailed):
                await sender.pages(bitmap(8, [1]))

    place.run(test)


def test_no_process_and_no_descriptor_is_left(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(8), Memory(8)

        def children() -> str:
            return Path(f"/proc/{place.zygote.pid}/task/{place.zygote.pid}/children").read_text()

        async with pair(place.zygote, place.source, place.target, memory, into):
            assert len(children().split()) >= 2
        before = len(os.listdir("/proc/self/fd"))
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            await sender.blob("state", b"x")
            await receiver.receive(ROUND_TRIP)
        assert len(os.listdir("/proc/self/fd")) <= before
        async with asyncio.timeout(ROUND_TRIP):
            while children().strip():
                await asyncio.sleep(0.01)

    place.run(test)


# -- how fast


def test_the_bandwidth_can_be_limited_and_progress_is_told(place: Place) -> None:
    async def test() -> None:
        pages, rate = 600, 4 << 20
        memory, into = Memory(pages), Memory(pages)
        for page in range(pages):
            memory.write(page, os.urandom(PAGE_SIZE))
        everything = bitmap(pages, range(pages))
        seen: list[PagesSent] = []
        async with pair(place.zygote, place.source, place.target, memory, into, rate=rate) as (sender, _):
            sender.on_progress = seen.append
            slow = await sender.pages(everything)
            assert slow.seconds >= 0.8 * (pages * PAGE_SIZE / rate - 0.1)
            assert seen and 0 < seen[0].pages < pages and seen[-1].bytes < slow.bytes
            started = time.monotonic()
            fast = await sender.pages(everything, last=True)
            assert fast.bytes > pages * PAGE_SIZE and time.monotonic() - started < slow.seconds
            sender.limit(1)
            crawling = asyncio.create_task(sender.pages(everything))
            await asyncio.wait({crawling}, timeout=0.3)
            assert not crawling.done()
            sender.limit(0)
            assert (await crawling).pages == pages

    place.run(test)
