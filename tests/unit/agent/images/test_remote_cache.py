"""The cache: whole images only, within its limit, and those in use stay."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch_rig import fetch, fetcher, leftovers, qcow2, source
from image_servers import File, Server, serving

from agent.errors import ConfigError, InstructionError
from agent.images.remote.cache import LEASE_SECONDS, Cache, Entry
from agent.images.remote.fetcher import Fetcher

MIB = 1 << 20


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture
def made(tmp_path: Path) -> Fetcher:
    return fetcher(tmp_path, cache_max_mib=3)


def put(server: Server, made: Fetcher, number: int, holder: str = "") -> Entry:
    """One MiB that no other number has; used later than those before."""
    data = bytes([number]) * MIB
    server.files[f"/{number}"] = File(data)
    entry = fetch(made, source(server.url(f"/{number}"), data), holder)
    found = made.cache.get(entry.key)
    assert found is not None
    return found


def keys(made: Fetcher) -> set[str]:
    return {entry.key for entry in made.cache.list()}


def test_the_least_recently_used_goes_first(server: Server, made: Fetcher) -> None:
    one, two, three = (put(server, made, number) for number in (1, 2, 3))
    put(server, made, 1)
    four = put(server, made, 4)
    assert keys(made) == {one.key, three.key, four.key} and not made.cache.path(two.key).exists()
    assert sum(path.stat().st_size for path in made.cache.folder.glob("*.raw")) <= 3 * MIB


def test_pinned_leased_and_in_use_ones_stay(server: Server, made: Fetcher) -> None:
    one, two, three = put(server, made, 1), put(server, made, 2, "instruction"), put(server, made, 3)
    made.cache.pin(one.key, True)
    (made.disks.folder / "x.xvda.qcow2").write_bytes(
        qcow2(backing=os.fsencode(made.cache.path(three.key)))  # an overlay of a domain
    )
    with pytest.raises(InstructionError) as caught:
        put(server, made, 4)
    assert (caught.value.code, caught.value.retryable) == ("image.no_room", True)
    for entry, why in ((one, "pinned"), (two, "about to be used"), (three, "in use by a domain")):
        with pytest.raises(InstructionError, match=why) as caught:
            made.cache.evict(entry.key)
        assert caught.value.code == "image.in_use"
    assert keys(made) == {one.key, two.key, three.key}
    made.cache.release("instruction")
    assert put(server, made, 4).key in keys(made) and two.key not in keys(made)
    made.cache.pin(one.key, False)
    (made.disks.folder / "x.xvda.qcow2").unlink()
    assert made.cache.evict(one.key).key == one.key and made.cache.evict(three.key)


def test_downloads_under_way_keep_their_room(server: Server, made: Fetcher) -> None:
    """Two that would fit one by one, and not together."""
    one = put(server, made, 1)
    first, second = made.cache.partial / "a.part", made.cache.partial / "b.part"
    first.write_bytes(b"x")
    made.cache.room(2 * MIB - 1, first)
    assert keys(made) == {one.key}
    made.cache.room(MIB // 2, second)
    assert keys(made) == set(), "given up for the second"
    with pytest.raises(InstructionError, match="no room"):
        made.cache.room(MIB + 1, second)
    assert first.exists()
    made.cache.no_more(first)
    made.cache.room(3 * MIB, second)
    assert not first.exists(), "nobody is at it, and room is needed"


def test_nothing_is_given_up_in_vain(server: Server, made: Fetcher) -> None:
    one = put(server, made, 1)
    with pytest.raises(InstructionError, match="no room"):
        made.cache.room(4 * MIB, made.cache.partial / "a.part")
    assert keys(made) == {one.key}


def test_a_lease_that_nobody_released_ends(server: Server, made: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = put(server, made, 1, "lost")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
    assert made.cache.evict(entry.key)


def test_overlays_that_cannot_be_read_hold_everything(server: Server, made: Fetcher) -> None:
    entry = put(server, made, 1)
    (made.disks.folder / "x.qcow2").symlink_to("/etc/hostname")
    with pytest.raises(InstructionError, match="nobody can tell"):
        made.cache.evict(entry.key)


def test_an_entry_is_the_same_after_a_restart(server: Server, made: Fetcher, tmp_path: Path) -> None:
    entry = put(server, made, 1, "one")
    made.cache.pin(entry.key, True)
    again = fetcher(tmp_path).cache.get(entry.key)
    assert again is not None and again.pinned and set(again.leases) == {"one"}
    assert Entry.from_json(again.key, again.to_json()) == again


def test_what_a_crash_leaves_is_removed(server: Server, made: Fetcher, tmp_path: Path) -> None:
    """At each moment of taking an image in and of giving one up."""
    entry = put(server, made, 1)
    folder = made.cache.folder
    (folder / f"{'a' * 64}.raw.json").write_text("{}")  # before the rename, or after the image was removed
    (folder / f"{'a' * 64}.raw.new").write_text("{")
    partial = made.cache.partial
    (partial / "old.part").write_bytes(b"x")
    (partial / "old.json").write_text("{}")
    os.utime(partial / "old.part", (1, 1))
    (partial / "new.part").write_bytes(b"x")
    (partial / "new.json").write_text("{}")
    (partial / "alone.json").write_text("{}")
    assert keys(fetcher(tmp_path)) == {entry.key}
    assert sorted(path.name for path in folder.glob("a*")) == []
    assert leftovers(made) == ["new.json", "new.part"]


def test_a_download_of_another_process_is_left_alone(made: Fetcher) -> None:
    (made.cache.partial / "old.part").write_bytes(b"x")
    os.utime(made.cache.partial / "old.part", (1, 1))
    with made.cache.try_download("old.part"):
        assert made.cache.try_download("old.part") is None
        made.prepare()
        assert leftovers(made) == ["old.part"]
    made.prepare()
    assert leftovers(made) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b'{"key": 1}', b"\xff"])
def test_a_damaged_entry_is_fetched_again(server: Server, made: Fetcher, damage: bytes) -> None:
    entry = put(server, made, 1)
    (made.cache.folder / f"{entry.key}.json").write_bytes(damage)
    assert made.cache.list() == []
    assert put(server, made, 1).key == entry.key and len(server.requests) == 2


def test_an_image_that_was_cut_short_is_fetched_again(server: Server, made: Fetcher) -> None:
    entry = put(server, made, 1)
    path = made.cache.path(entry.key)
    path.chmod(0o600)
    os.truncate(path, 100)
    assert made.cache.get(entry.key) is None
    put(server, made, 1)
    assert path.stat().st_size == MIB


def test_names_are_no_paths(made: Fetcher) -> None:
    for key in ("../x", "x", f"{'a' * 64}.raw", f"{'a' * 64}.exe"):
        with pytest.raises(InstructionError) as caught:
            made.cache.evict(key)
        assert caught.value.code == "image.not_found"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache_dir"):
        Cache(tmp_path / "file" / "cache", MIB, set).prepare(0)
