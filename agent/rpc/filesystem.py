"""kombu's ``filesystem`` transport, made safe against crashes and strangers.

It keeps the files of kombu's own transport (one ``<order>_<id>.<queue>.msg`` per message in one
folder, ``<exchange>.exchange`` tables in another), so a stock kombu client can talk to it, and changes:

* a message is written under another name and renamed, after an fsync: no reader sees half of it, and
  when `publish` returns it is on the disk (what a publisher confirm is with RabbitMQ);
* a message taken is moved to the folder ``unacked`` and removed by the acknowledgement only. What a
  killed consumer had taken is put back by `recover`, which the queue's one owner calls at start;
* queue names are checked: they become file names;
* a file that is damaged or too large is delivered as such, so that it is quarantined instead of stopping the queue.
"""

from __future__ import annotations

import base64
import binascii
import collections
import fcntl
import itertools
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import filesystem, virtual

from agent.durable import sync

LOG = logging.getLogger(__name__)

QUEUE_RE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
SETTLE_SECONDS = 2.0
"""A file younger than this that cannot be read is one that a stock client is still writing."""
MAX_TOPIC_BACKLOG = 10000
"""Reports nobody fetches: beyond this many files of one queue further ones are dropped."""

_sequence = itertools.count()
_order_lock = threading.Lock()
_last_order = 0


def _order() -> int:
    """Milliseconds that never go back in this process: files sort in the order they were sent."""
    global _last_order
    with _order_lock:
        _last_order = max(_last_order, time.time_ns() // 1_000_000)
        return _last_order


def _sort_key(name: str) -> tuple[int, str]:
    head = name.partition("_")[0]
    return (int(head) if head.isdigit() and len(head) < 20 else 0, name)


class Message(virtual.Message):  # type: ignore[misc]
    """Without kombu's automatic decompression: a small hostile body could become gigabytes."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        headers = dict(payload.get("headers") or {})
        packed = headers.pop("compression", None)
        super().__init__({**payload, "headers": headers}, channel=channel, **kwargs)
        if packed is not None:
            self.headers["compression"] = packed


class Channel(filesystem.Channel):  # type: ignore[misc]
    """One folder per broker; options ``data_folder_in`` (= ``_out``), ``unacked_folder``, ``max_message_bytes``."""

    Message = Message

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._taken: dict[str, Path] = {}
        self._listed: dict[str, collections.deque[str]] = {}  # names seen by the last look into the folder

    @property
    def _data(self) -> Path:
        return Path(self.transport_options["data_folder_in"])

    @property
    def _unacked(self) -> Path:
        return Path(self.transport_options["unacked_folder"])

    @property
    def _max_file_bytes(self) -> int:
        # The body travels as base64 inside a JSON envelope.
        return int(self.transport_options.get("max_message_bytes", 1 << 20)) * 4 // 3 + 65536

    def _put(self, queue: str, payload: dict[str, Any], **_kwargs: Any) -> None:
        _check_queue(queue)
        if payload["properties"]["delivery_info"].get("exchange") and self._size(queue) >= MAX_TOPIC_BACKLOG:
            LOG.debug("queue %s is full: report dropped", queue)
            return
        name = f"{_order()}_{next(_sequence):010d}-{uuid.uuid4()}.{queue}.msg"
        hidden = self._data / f".{name}.new"
        try:
            with open(_open_own(hidden), "wb") as file:
                file.write(json.dumps(payload).encode())
                file.flush()
                os.fsync(file.fileno())
            os.rename(hidden, self._data / name)
            sync(self._data)
        except OSError as exc:
            hidden.unlink(missing_ok=True)
            raise ChannelError(f"cannot write to the message folder {self._data}: {exc.strerror}") from exc

    def _get(self, queue: str) -> dict[str, Any]:
        _check_queue(queue)
        listed = self._listed.setdefault(queue, collections.deque())
        if not listed:
            listed.extend(sorted(self._files(queue), key=_sort_key))
        while listed:
            name = listed.popleft()
            taken = self._unacked / name
            try:
                os.rename(self._data / name, taken)
            except OSError:
                continue  # another consumer of this queue was quicker
            try:
                payload = self._read(taken)
            except OSError as exc:  # somebody else's file, a broken disk: the queue goes on without it
                LOG.warning("message %s cannot be read: %s", name, exc.strerror)
                payload = _damaged(b"", 0, {})
            if payload is None:
                os.rename(taken, self._data / name)
                continue
            # Not the sender's own tag: two files could bear the same one.
            tag = uuid.uuid4().hex
            payload["properties"]["delivery_tag"] = tag
            self._taken[tag] = taken
            return payload
        raise Empty()

    def _files(self, queue: str) -> list[str]:
        suffix = f".{queue}.msg"
        with os.scandir(self._data) as entries:
            return [e.name for e in entries if e.name.endswith(suffix) and e.name.partition(".")[2] == suffix[1:]]

    def _size(self, queue: str) -> int:
        return len(self._files(queue))

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The envelope in `path`; one that marks it as damaged; None when its writer may not be done yet."""
        size = path.stat().st_size
        if size > self._max_file_bytes:
            return _damaged(_head(path), size, _tail_properties(path, size))
        data = path.read_bytes()
        try:
            payload = json.loads(data)
            body = payload["body"]
            properties = payload["properties"]
            if properties.get("body_encoding") == "base64":
                base64.b64decode(body, validate=True)
            if not isinstance(body, str) or not isinstance(properties["delivery_info"], dict):
                raise TypeError("not an envelope")
            payload["headers"] = dict(payload.get("headers") or {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
            if abs(time.time() - path.stat().st_mtime) < SETTLE_SECONDS:
                return None
            return _damaged(data[:65536], size, {})
        return dict(payload)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        path = self._taken.pop(delivery_tag, None)
        super().basic_ack(delivery_tag, multiple)
        if path is not None:
            path.unlink(missing_ok=True)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        path = self._taken.get(delivery_tag)
        super().basic_reject(delivery_tag, requeue)
        if path is not None and not requeue:
            del self._taken[delivery_tag]
            path.unlink(missing_ok=True)

    def _restore(self, message: Any) -> None:
        path = self._taken.pop(message.delivery_tag, None)
        if path is not None and path.exists():
            os.rename(path, self._data / path.name)

    def _restore_at_beginning(self, message: Any) -> None:
        self._restore(message)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        _check_queue(queue)
        entry = [routing_key or "", pattern or "", queue]
        _edit_table(self._exchange_file(exchange), lambda table: table if entry in table else [*table, entry])

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        if if_empty and self._size(queue):
            return
        super().queue_delete(queue, **kwargs)
        self._purge(queue)

    def _delete(self, queue: str, exchange: str, *_meta: Any, **_kwargs: Any) -> None:
        _edit_table(self._exchange_file(exchange), lambda table: [row for row in table if row[2] != queue])


class Transport(filesystem.Transport):  # type: ignore[misc]
    Channel = Channel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        # kombu's is one for the process: with two folders a queue bound in one would count as bound in both.
        self.state = virtual.BrokerState()


def recover(root: Path, queue: str) -> int:
    """Put back what a killed consumer of `queue` had taken. For the queue's one owner, before it consumes."""
    count = 0
    for path in sorted((root / "unacked").glob(f"*.{queue}.msg")):
        if path.name.partition(".")[2] == f"{queue}.msg":
            os.rename(path, root / "data" / path.name)
            count += 1
    return count


def sweep(root: Path, prefix: str, older_than: float, now: float, seen: dict[str, float]) -> int:
    """Remove messages of queues `prefix`… that nobody fetched for `older_than` seconds, and half-written files.

    :param now: by a clock that nobody sets. :param seen: when each was first seen; kept for the next sweep.

    Such a queue's reader is gone: it is unbound too, so that it gets no more.
    """
    count = 0
    left: set[str] = set()
    known = dict(seen)
    seen.clear()
    for folder in (root / "data", root / "unacked"):
        with os.scandir(folder) as entries:
            for entry in entries:
                queue = entry.name.partition(".")[2].removesuffix(".msg")
                if not (queue.startswith(prefix) or entry.name.startswith(".")):
                    continue
                since = known.get(entry.name, now)
                if now - since <= older_than:
                    seen[entry.name] = since
                    continue
                try:
                    os.unlink(entry.path)
                except FileNotFoundError:
                    continue
                left.add(queue)
                count += 1
    if left:
        for file in (root / "control").glob("*.exchange"):
            _edit_table(file, lambda table: [row for row in table if row[2] not in left])
    return count


def _edit_table(file: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change an exchange's table in one rename, under a lock of its own: no reader sees half a table."""
    guard = _open_own(file.with_suffix(".lock"))
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            table = json.loads(file.read_text())
        except FileNotFoundError:
            table = []
        changed = change(table)
        if changed == table:
            return
        new = file.with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(_open_own(new), "wb") as out:
            out.write(json.dumps(changed).encode())
        os.rename(new, file)
    finally:
        os.close(guard)


def _open_own(path: Path) -> int:
    """A file of the folder's owner, made if need be; never the target of a link.

    What root sends (``sudo reeve instruct``) the agent's own user must be able to read.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def _check_queue(queue: Any) -> None:
    if not isinstance(queue, str) or not QUEUE_RE.fullmatch(queue):
        raise ChannelError(f"queue name {queue!r} is not usable: give letters, digits, '.', '_' or '-'")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _tail_properties(path: Path, size: int) -> dict[str, Any]:
    """The properties of an envelope too large to parse: kombu writes them last."""
    with open(path, "rb") as file:
        file.seek(size - 4096)
        tail = file.read()
    start = tail.rfind(b'"properties": ')
    try:
        properties = json.loads(tail[start + len(b'"properties": ') : -1]) if start >= 0 else {}
    except (ValueError, RecursionError):
        return {}
    return properties if isinstance(properties, dict) else {}


def _damaged(body: bytes, size: int, properties: dict[str, Any]) -> dict[str, Any]:
    kept = {key: properties[key] for key in ("reply_to", "correlation_id") if isinstance(properties.get(key), str)}
    return {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": {"x-reeve-size": size},
        "properties": kept | {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": ""}},
    }
