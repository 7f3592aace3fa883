"""Fetching from an HTTP server that may be of bad will."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch_rig import DATA, fetch, fetcher, leftovers, source
from image_servers import File, Handler, Server, bomb, cut_at, endless, redirect, serving, slow_body, slow_headers

from agent.errors import InstructionError
from agent.images.remote.download import Progress
from agent.images.remote.fetcher import Fetcher, simple_wait

SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        made.files["/disk"] = File(DATA)
        yield made


@pytest.fixture
def made(tmp_path: Path) -> Fetcher:
    return fetcher(tmp_path)


def refused(made: Fetcher, code: str, wanted: Any, *, retryable: bool = False) -> str:
    with pytest.raises(InstructionError) as caught:
        fetch(made, wanted)
    error = caught.value
    assert (error.code, error.retryable) == (code, retryable), error.message
    assert "\n" not in error.message and error.message
    assert made.cache.list() == []
    return error.message


def test_it_is_fetched_once_and_found_again(server: Server, made: Fetcher, tmp_path: Path) -> None:
    entry = fetch(made, source(server.url("/disk"), size=len(DATA)))
    path = made.cache.path(entry.key)
    assert path.read_bytes() == DATA and path.stat().st_mode & 0o777 == 0o400
    assert (entry.key, entry.size, entry.disk_size) == (f"{SHA}.raw", len(DATA), len(DATA))
    assert fetch(made, source(server.url("/disk"))) == made.cache.get(entry.key)
    other = {"algorithm": "sha512", "value": hashlib.sha512(DATA).hexdigest()}
    server.files["/same"] = File(DATA)
    assert fetch(made, source(server.url("/same"), hash=other)).key == entry.key
    assert fetch(fetcher(tmp_path), source(server.url("/disk"))).key == entry.key, "the next agent has it, too"
    assert len(server.requests) == 2 and leftovers(made) == []
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_another_format_is_another_image(server: Server, made: Fetcher) -> None:
    fetch(made, source(server.url("/disk")))
    with pytest.raises(InstructionError, match="no kernel"):
        fetch(made, source(server.url("/disk"), image_format="kernel"))


@pytest.mark.parametrize("etag", ['"one"', ""])
def test_a_connection_that_is_cut_is_resumed(server: Server, made: Fetcher, etag: str) -> None:
    """Without a validator it begins again."""
    server.files["/disk"] = File(DATA, etag, cut_at(100_000))
    assert fetch(made, source(server.url("/disk"))).size == len(DATA)
    first, second = server.asked("/disk")
    assert "Range" not in first
    if etag:
        assert second["If-Range"] == etag and 0 < int(second["Range"][6:-1]) <= 100_000
    else:
        assert "Range" not in second


def test_what_was_left_is_resumed_by_the_next_agent(server: Server, made: Fetcher, tmp_path: Path) -> None:
    server.files["/disk"] = File(DATA, '"one"', cut_at(50_000, 2))
    refused(made, "image.fetch_failed", source(server.url("/disk")), retryable=True)
    assert len(leftovers(made)) == 2
    entry = fetch(fetcher(tmp_path), source(server.url("/disk")))
    assert int(server.asked("/disk")[-1]["Range"][6:-1]) > 50_000
    assert made.cache.path(entry.key).read_bytes() == DATA and leftovers(made) == []


def test_a_hole_in_what_was_left_is_found(server: Server, made: Fetcher, tmp_path: Path) -> None:
    server.files["/disk"] = File(DATA, '"one"', cut_at(50_000, 2))
    refused(made, "image.fetch_failed", source(server.url("/disk")), retryable=True)
    (part,) = made.cache.partial.glob("*.part")
    part.write_bytes(bytes(4096) + part.read_bytes()[4096:])
    entry = fetch(fetcher(tmp_path), source(server.url("/disk")))
    assert made.cache.path(entry.key).read_bytes() == DATA
    assert "Range" not in server.asked("/disk")[-1]


def test_an_etag_that_changed_begins_again(server: Server, made: Fetcher) -> None:
    """The server replaces its file while it is read: never the beginning of one and the end of another."""
    old = bytes(len(DATA))

    def replaced(handler: Handler, file: File) -> None:
        cut_at(100_000)(handler, File(old, '"old"'))
        server.files["/disk"] = File(DATA, '"new"')

    server.files["/disk"] = File(old, '"old"', replaced)
    entry = fetch(made, source(server.url("/disk")))
    assert made.cache.path(entry.key).read_bytes() == DATA
    assert server.asked("/disk")[1]["If-Range"] == '"old"'


def test_a_server_that_ignores_if_range(server: Server, made: Fetcher) -> None:
    """It sends the rest of another file as if it were the same: the hash tells, and it is fetched anew."""
    old = bytes(len(DATA))
    asked: list[int] = []

    def cheat(handler: Handler, file: File) -> None:
        asked.append(1)
        if len(asked) == 1:
            cut_at(100_000)(handler, File(old, '"one"'))
        else:
            handler.serve(File(DATA, '"one"'))

    server.files["/disk"] = File(DATA, '"one"', cheat)
    assert made.cache.path(fetch(made, source(server.url("/disk"))).key).read_bytes() == DATA
    assert len(asked) == 3


def wrong_part(handler: Handler, file: File) -> None:
    if handler.headers.get("Range"):
        total = len(file.data)
        handler.reply(206, file.data, {"ETag": file.etag, "Content-Range": f"bytes 0-{total - 1}/{total}"})
    else:
        cut_at(50_000)(handler, file)


def no_length(handler: Handler, file: File) -> None:
    handler.begin(200, {"Connection": "close"})
    handler.wfile.write(file.data[:1000])
    handler.hang_up()


def longer(handler: Handler, file: File) -> None:
    handler.begin(200, {"Transfer-Encoding": "chunked"})
    handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(file.data) + 1, file.data + b"x"))


BAD: dict[str, tuple[Any, dict[str, Any], str, bool, str]] = {
    "cut again and again": (cut_at(1000, 9), {}, "image.fetch_failed", True, "disk"),
    "another length": (None, {"size": len(DATA) + 1}, "image.invalid", False, f"{len(DATA)} bytes, not"),
    "more than was said": (longer, {"size": len(DATA)}, "image.invalid", False, "more than"),
    "another hash": (None, {"data": b"other"}, "image.invalid", False, f"has sha256 {SHA}"),
    "another part": (wrong_part, {}, "image.fetch_failed", True, "another part"),
    "gzip": (bomb, {}, "image.invalid", False, "encoded"),
    "gone": (lambda handler, file: handler.reply(410, b""), {}, "image.not_found", False, "status 410"),
    "forbidden": (lambda handler, file: handler.reply(403, b""), {}, "image.auth_failed", False, "403"),
    "busy": (lambda handler, file: handler.reply(503, b""), {}, "image.fetch_failed", True, "503"),
    "strange": (lambda handler, file: handler.reply(299, b""), {}, "image.fetch_failed", False, "299"),
    "empty": (lambda handler, file: handler.reply(200, b""), {}, "image.invalid", False, "empty"),
    "hangs up": (lambda handler, file: handler.hang_up(), {}, "image.fetch_failed", True, "disk"),
    "no HTTP": (lambda handler, file: handler.wfile.write(b"hello\r\n"), {}, "image.fetch_failed", True, "disk"),
    "slow body": (slow_body, {}, "image.fetch_failed", True, "disk"),
    "slow headers": (slow_headers, {}, "image.fetch_failed", True, "disk"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_server_of_bad_will(server: Server, tmp_path: Path, case: str) -> None:
    misdeed, fields, code, retryable, says = BAD[case]
    server.files["/disk"] = File(DATA, misdeed=misdeed)
    made = fetcher(tmp_path, retries=0 if case.startswith("slow") else 1)
    assert says in refused(made, code, source(server.url("/disk?token=hidden"), **fields), retryable=retryable)


def test_an_endless_body_ends_at_the_limit(server: Server, tmp_path: Path) -> None:
    server.files["/disk"] = File(b"", misdeed=endless)
    made = fetcher(tmp_path, max_image_mib=2)
    refused(made, "image.too_large", source(server.url("/disk")))
    assert all(path.stat().st_size <= 2 << 20 for path in made.cache.partial.iterdir())


def test_a_declared_length_beyond_the_limit_is_not_begun(server: Server, tmp_path: Path) -> None:
    server.files["/disk"] = File(b"", misdeed=lambda handler, file: handler.reply(200, b"", length=1 << 40))
    refused(fetcher(tmp_path, max_image_mib=2), "image.too_large", source(server.url("/disk")))


def test_the_whole_has_a_time(server: Server, tmp_path: Path) -> None:
    server.files["/disk"] = File(DATA, misdeed=slow_body)
    made = fetcher(tmp_path, fetch_seconds=0.3, stall_seconds=30.0, answer_seconds=30.0)
    assert "fetch_seconds" in refused(made, "image.fetch_failed", source(server.url("/disk")))


def test_redirects_are_followed_and_checked(server: Server, tmp_path: Path) -> None:
    made = fetcher(tmp_path, allowed_hosts=("127.0.0.1",))
    server.files["/here"] = File(b"", misdeed=redirect("/disk"))
    assert fetch(made, source(server.url("/here"))).size == len(DATA)
    made.cache.evict(f"{SHA}.raw")
    for target, says in {
        "http://localhost:1/disk": "host localhost is not allowed",
        "http://169.254.169.254/latest": "169.254.169.254 is not allowed",
        "file:///etc/passwd": "no URL",
        "ftp://127.0.0.1/x": "ftp is not allowed",
        "/there": "more than 5 times",
    }.items():
        server.files["/there"] = File(b"", misdeed=redirect(target))
        assert says in refused(made, "image.source_refused", source(server.url("/there"))), target


def test_special_addresses_are_refused_whatever_their_name(server: Server, tmp_path: Path) -> None:
    made = fetcher(tmp_path, allowed_networks=())
    port = server.server_address[1]
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "127.1",
        "0x7f000001",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
    ):
        message = refused(made, "image.source_refused", source(f"http://{host}:{port}/disk"))
        assert "allowed_networks" in message, host
    assert server.requests == []


def test_a_name_is_resolved_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers a good address first and a bad one then gains nothing."""
    from agent.images.remote import transport

    real, answers = transport.socket.getaddrinfo, ["127.0.0.1", "127.0.0.2"]
    monkeypatch.setattr(
        transport.socket, "getaddrinfo", lambda host, *args, **more: real(answers.pop(0), *args, **more)
    )
    assert fetch(fetcher(tmp_path), source(f"http://images.test:{server.server_address[1]}/disk")).size == len(DATA)
    assert answers == ["127.0.0.2"]


def test_without_a_hash_only_if_that_is_allowed(server: Server, made: Fetcher, tmp_path: Path) -> None:
    wanted = source(server.url("/disk"), hash=None)
    assert "require_hash" in refused(made, "image.source_refused", wanted)
    made = fetcher(tmp_path, require_hash=False)
    server.files["/disk"].misdeed = no_length
    assert "no length" in refused(made, "image.invalid", wanted)
    server.files["/disk"].misdeed = None
    entry = fetch(made, wanted)
    assert fetch(made, wanted).key == entry.key and server.asked("/disk")[-1]["If-None-Match"] == '"one"'
    server.files["/disk"] = File(bytes(1024), '"two"')
    assert fetch(made, wanted).key != entry.key, "the server has another now"
    assert len(made.cache.list()) == 2


def test_many_who_want_the_same_cause_one_download(server: Server, made: Fetcher) -> None:
    go = threading.Event()

    def held(handler: Handler, file: File) -> None:
        go.wait(10)
        handler.serve(file)

    server.files["/disk"].misdeed = held
    seen: list[str] = []
    waiting = threading.Barrier(9)

    def want() -> None:
        told: list[Progress] = []

        def wait(ready: Any) -> object:
            waiting.wait(10)
            return simple_wait(ready)

        seen.append(made.fetch(source(server.url("/disk")), "", wait, told.append).key)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    waiting.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert seen == [f"{SHA}.raw"] * 8 and len(server.requests) == 1


def test_the_failure_of_one_is_that_of_all(server: Server, made: Fetcher) -> None:
    server.files["/disk"] = File(b"other" * 1000)
    waiting, codes = threading.Barrier(3), []

    def want() -> None:
        try:
            made.fetch(source(server.url("/disk")), "", lambda ready: (waiting.wait(10), simple_wait(ready))[1])
        except InstructionError as exc:
            codes.append(exc.code)

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert codes == ["image.invalid"] * 3 and leftovers(made) == []


class Stopped(Exception):
    pass


def test_who_gives_up_cuts_it_off_and_what_came_is_resumed(server: Server, tmp_path: Path) -> None:
    made = fetcher(tmp_path, stall_seconds=30.0)
    begun = threading.Event()

    def half(handler: Handler, file: File) -> None:
        handler.begin(200, {"Content-Length": str(len(file.data)), "ETag": file.etag})
        handler.wfile.write(file.data[:100_000])
        begun.set()
        server.over.wait(10)

    server.files["/disk"].misdeed = half
    jobs: list[Any] = []

    def wait(ready: Any) -> object:
        while True:
            ready(0.1)
            (job,) = made._jobs.values()
            if job.progress.done > 60_000:
                jobs.append(job)
                raise Stopped

    with pytest.raises(Stopped):
        made.fetch(source(server.url("/disk")), "", wait)
    assert jobs[0].over.wait(5), "its thread ends"
    assert begun.is_set() and len(leftovers(made)) == 2
    server.files["/disk"].misdeed = None
    assert fetch(made, source(server.url("/disk"))).size == len(DATA)
    assert "Range" in server.asked("/disk")[-1]


def test_through_a_proxy(server: Server, tmp_path: Path) -> None:
    """It is told the whole URL, and connects by itself."""
    url = "http://images.test/disk"
    server.files[url] = File(DATA)
    made = fetcher(tmp_path, proxy=server.url(""), allowed_networks=())
    assert fetch(made, source(url)).size == len(DATA)
    assert server.requests[0][0] == url
    made = fetcher(tmp_path / "other", proxy=server.url(""), allowed_networks=())
    for host in ("127.0.0.1", "127.1", "0x7f000001", "2130706433"):
        assert "special address" in refused(made, "image.source_refused", source(f"http://{host}/x")), host
