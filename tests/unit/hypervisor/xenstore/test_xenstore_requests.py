"""Requests and their answers, as rows of (client, transaction, request, payload, expected)."""

from __future__ import annotations

import pytest

from hypervisor.xenstore.wire import Op

OK = b"OK|"

# As in docs/misc/xenstore.txt, "|" stands for a NUL.
# client, transaction (a name: started at first use; "" for none; a number: as it is), request, payload,
# expected reply or errno name
Row = tuple[int, str | int, int, bytes, bytes]

TABLES: dict[str, list[Row]] = {
    "read and write": [
        (0, "", Op.READ, b"/a|", b"ENOENT"),
        (0, "", Op.WRITE, b"/a/b/c|some|bytes\xff", OK),
        (0, "", Op.READ, b"/a/b/c|", b"some|bytes\xff"),
        (0, "", Op.READ, b"/a/b|", b""),
        (0, "", Op.DIRECTORY, b"/a|", b"b|"),
        (0, "", Op.WRITE, b"/a/d|", OK),
        (0, "", Op.DIRECTORY, b"/a|", b"b|d|"),
        (0, "", Op.DIRECTORY, b"/a/d|", b""),
        (0, "", Op.WRITE, b"/a/b/c|", OK),
        (0, "", Op.READ, b"/a/b/c|", b""),
        (0, "", Op.WRITE, b"/|root", OK),
        (0, "", Op.READ, b"/|", b"root"),
    ],
    "mkdir": [
        (0, "", Op.WRITE, b"/a|value", OK),
        (0, "", Op.MKDIR, b"/a|", OK),
        (0, "", Op.READ, b"/a|", b"value"),
        (0, "", Op.MKDIR, b"/a/x/y|", OK),
        (0, "", Op.DIRECTORY, b"/a/x|", b"y|"),
        (0, "", Op.MKDIR, b"/a/x/y/|", b"EINVAL"),
    ],
    "remove": [
        (0, "", Op.WRITE, b"/a/b/c|x", OK),
        (0, "", Op.RM, b"/a/b|", OK),
        (0, "", Op.READ, b"/a/b/c|", b"ENOENT"),
        (0, "", Op.DIRECTORY, b"/a|", b""),
        (0, "", Op.RM, b"/a/b|", OK),
        (0, "", Op.RM, b"/a/b/c|", b"ENOENT"),
        (0, "", Op.RM, b"/|", b"EINVAL"),
    ],
    "paths": [
        (0, "", Op.READ, b"", b"EINVAL"),
        (0, "", Op.READ, b"|", b"EINVAL"),
        (0, "", Op.READ, b"/a", b"EINVAL"),
        (0, "", Op.READ, b"/a|b|", b"EINVAL"),
        (0, "", Op.READ, b"/a//b|", b"EINVAL"),
        (0, "", Op.READ, b"/a/|", b"EINVAL"),
        (0, "", Op.READ, b"//|", b"EINVAL"),
        (0, "", Op.READ, b"/a b|", b"EINVAL"),
        (0, "", Op.READ, b"/\xc3\xa4|", b"EINVAL"),
        (0, "", Op.READ, b"/a\n|", b"EINVAL"),
        (0, "", Op.READ, b"@releaseDomain|", b"EINVAL"),
        (0, "", Op.WRITE, b"@releaseDomain|x", b"EINVAL"),
        (0, "", Op.READ, b"/" + b"a" * 3071 + b"|", b"ENOENT"),
        (0, "", Op.READ, b"/" + b"a" * 3072 + b"|", b"EINVAL"),
        (5, "", Op.READ, b"a" * 2048 + b"|", b"ENOENT"),
        (5, "", Op.READ, b"a" * 2049 + b"|", b"EINVAL"),
        (5, "", Op.WRITE, b"data/x|own", OK),
        (0, "", Op.READ, b"/local/domain/5/data/x|", b"own"),
        (0, "", Op.WRITE, b"rel|v", OK),
        (0, "", Op.READ, b"/local/domain/0/rel|", b"v"),
    ],
    "permissions": [
        (0, "", Op.WRITE, b"/secret/x|v", OK),
        (5, "", Op.READ, b"/secret/x|", b"EACCES"),
        (5, "", Op.READ, b"/secret/not-there|", b"EACCES"),
        (5, "", Op.WRITE, b"/secret/x|v", b"EACCES"),
        (5, "", Op.WRITE, b"/new|v", b"EACCES"),
        (5, "", Op.RM, b"/secret|", b"EACCES"),
        (0, "", Op.SET_PERMS, b"/secret/x|n0|r5|", OK),
        (5, "", Op.READ, b"/secret/x|", b"v"),
        (6, "", Op.READ, b"/secret/x|", b"EACCES"),
        (5, "", Op.WRITE, b"/secret/x|w", b"EACCES"),
        (5, "", Op.GET_PERMS, b"/secret/x|", b"n0|r5|"),
        (0, "", Op.SET_PERMS, b"/secret/x|r0|n5|b6|", OK),
        (5, "", Op.READ, b"/secret/x|", b"EACCES"),
        (6, "", Op.WRITE, b"/secret/x|six", OK),
        (7, "", Op.READ, b"/secret/x|", b"six"),
        (6, "", Op.SET_PERMS, b"/secret/x|b6|", b"EACCES"),
        (0, "", Op.SET_PERMS, b"/secret/x|n0|r32756|", OK),
        (7, "", Op.READ, b"/secret/x|", b"six"),
    ],
    "owners": [
        (5, "", Op.WRITE, b"mine|v", OK),
        (5, "", Op.GET_PERMS, b"mine|", b"n5|"),
        (5, "", Op.SET_PERMS, b"mine|n5|w6|", OK),
        (5, "", Op.SET_PERMS, b"mine|n6|", b"EPERM"),
        (6, "", Op.READ, b"/local/domain/5/mine|", b"EACCES"),
        (6, "", Op.WRITE, b"/local/domain/5/mine/deep|v", OK),
        (0, "", Op.GET_PERMS, b"/local/domain/5/mine/deep|", b"n6|w6|"),
        (0, "", Op.SET_PERMS, b"/local/domain/5/mine|n7|", OK),
        (5, "", Op.READ, b"mine|", b"EACCES"),
        (7, "", Op.READ, b"/local/domain/5/mine|", b"v"),
    ],
    "ill-formed permissions": [
        (0, "", Op.WRITE, b"/a|", OK),
        (0, "", Op.SET_PERMS, b"/a|", b"EINVAL"),
        (0, "", Op.SET_PERMS, b"/a|x0|", b"EINVAL"),
        (0, "", Op.SET_PERMS, b"/a|n|", b"EINVAL"),
        (0, "", Op.SET_PERMS, b"/a|n-1|", b"EINVAL"),
        (0, "", Op.SET_PERMS, b"/a|n65536|", b"EINVAL"),
        (0, "", Op.SET_PERMS, b"/b|n0|", b"ENOENT"),
        (5, "", Op.SET_PERMS, b"|n5|", b"EINVAL"),
        (0, "", Op.GET_PERMS, b"@introduceDomain|", b"n0|"),
        (0, "", Op.SET_PERMS, b"@introduceDomain|n0|r5|", OK),
        (0, "", Op.GET_PERMS, b"@introduceDomain|", b"n0|r5|"),
        (5, "", Op.SET_PERMS, b"@introduceDomain|n5|", b"EACCES"),
        (0, "", Op.SET_PERMS, b"@nothing|n0|", b"ENOENT"),
        (0, "", Op.SET_PERMS, b"@releaseDomain|b5|", OK),
        (5, "", Op.SET_PERMS, b"@releaseDomain|b5|r6|", OK),
        (5, "", Op.SET_PERMS, b"@releaseDomain|b6|", b"EPERM"),
    ],
    "directory in parts": [
        (0, "", Op.DIRECTORY_PART, b"/a|0|", b"ENOENT"),
        (0, "", Op.WRITE, b"/a/b|", OK),
        (0, "", Op.DIRECTORY_PART, b"/a|0|", b"5|b||"),
        (0, "", Op.DIRECTORY_PART, b"/a|2|", b"5||"),
        (0, "", Op.DIRECTORY_PART, b"/a|99|", b"5||"),
        (0, "", Op.DIRECTORY_PART, b"/a|x|", b"EINVAL"),
        (0, "", Op.DIRECTORY_PART, b"/a|", b"EINVAL"),
    ],
    "dom0 only": [
        (5, "", Op.INTRODUCE, b"6|1|2|", b"EACCES"),
        (5, "", Op.RELEASE, b"6|", b"EACCES"),
        (5, "", Op.IS_DOMAIN_INTRODUCED, b"5|", b"EACCES"),
        (5, "", Op.RESUME, b"5|", b"EACCES"),
        (5, "", Op.SET_TARGET, b"5|6|", b"EACCES"),
        (5, "", Op.CONTROL, b"check|", b"EACCES"),
        (0, "", Op.INTRODUCE, b"9|1|2|", b"ENOSYS"),
        (0, "", Op.INTRODUCE, b"0|1|2|", b"EINVAL"),
        (0, "", Op.INTRODUCE, b"32752|1|2|", b"EINVAL"),
        (0, "", Op.INTRODUCE, b"9|1|0|", b"EINVAL"),
        (0, "", Op.INTRODUCE, b"9|1|", b"EINVAL"),
        (0, "", Op.INTRODUCE, b"9|--1|2|", b"EINVAL"),
        (0, "", Op.RELEASE, b"0|", b"EINVAL"),
        (0, "", Op.SET_TARGET, b"5|", b"EINVAL"),
    ],
    "control": [
        (0, "", Op.CONTROL, b"check|", OK),
        (0, "", Op.CONTROL, b"check|now|", b"EINVAL"),
        (0, "", Op.CONTROL, b"print|hello|", OK),
        (0, "", Op.CONTROL, b"print|", b"EINVAL"),
        (0, "", Op.CONTROL, b"log|on|", OK),
        (0, "", Op.CONTROL, b"log|off|", OK),
        (0, "", Op.CONTROL, b"log|maybe|", b"EINVAL"),
        (0, "", Op.CONTROL, b"memreport|", OK),
        (0, "", Op.CONTROL, b"memreport|/etc/passwd|", b"EINVAL"),
        (0, "", Op.CONTROL, b"logfile|/etc/passwd|", b"EINVAL"),
        (0, "", Op.CONTROL, b"live-update|-a|", b"EINVAL"),
        (0, "", Op.CONTROL, b"|", b"EINVAL"),
        (0, "", Op.CONTROL, b"", b"EINVAL"),
        (0, "", Op.CONTROL, b"check", b"EINVAL"),
        (5, "", Op.WRITE, b"a|v", OK),
        (
            *(0, "", Op.CONTROL, b"quota|5|"),
            b"Domain 5:\nnodes           :        2\nwatches         :        0\ntransactions    :        0\n"
            b"outstanding     :        0\nmemory          :       83\n|",
        ),
        (0, "", Op.CONTROL, b"quota|77|", b"ENOENT"),
        (0, "", Op.CONTROL, b"quota|x|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|nodes|0|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|nodes|-1|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|nonsense|1|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|write-rate|1|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|nodes|", b"EINVAL"),
        (0, "", Op.CONTROL, b"quota|set|nodes|3|", OK),
        (5, "", Op.WRITE, b"b|v", OK),
        (5, "", Op.WRITE, b"c|v", b"ENOSPC"),
        (0, "", Op.CONTROL, b"quota|set|nodes|4|", OK),
        (5, "", Op.WRITE, b"c|v", OK),
    ],
    "domains": [
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"5|", b"F|"),
        (5, "", Op.GET_DOMAIN_PATH, b"007|", b"/local/domain/7|"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"5|", b"T|"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"0|", b"T|"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"x|", b"EINVAL"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"32752|", b"T|"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"65536|", b"EINVAL"),
        (0, "", Op.GET_DOMAIN_PATH, b"5|6|", b"EINVAL"),
        (0, "", Op.RESUME, b"5|", OK),
        (0, "", Op.RESUME, b"99|", b"ENOENT"),
        (0, "", Op.RELEASE, b"5|", OK),
        (0, "", Op.RELEASE, b"5|", b"ENOENT"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"5|", b"F|"),
        (0, "", Op.READ, b"/local/domain/5|", b"ENOENT"),
    ],
    "a domain's target": [
        (6, "", Op.WRITE, b"own|six", OK),
        (5, "", Op.READ, b"/local/domain/6/own|", b"EACCES"),
        (0, "", Op.SET_TARGET, b"5|6|", OK),
        (5, "", Op.READ, b"/local/domain/6/own|", b"six"),
        (0, "", Op.SET_TARGET, b"5|99|", b"ENOENT"),
        (0, "", Op.RELEASE, b"6|", OK),
        (0, "", Op.WRITE, b"/x|", OK),
        (0, "", Op.SET_PERMS, b"/x|n6|", OK),
        (5, "", Op.READ, b"/x|", b"EACCES"),
    ],
    "no such request": [
        (5, "", Op.WATCH_EVENT, b"a|b|", b"ENOSYS"),
        (5, "", Op.ERROR, b"EINVAL|", b"ENOSYS"),
        (5, "", 20, b"|", b"ENOSYS"),
        (5, "", 0xFFFF, b"", b"ENOSYS"),
        (5, "", 0xFFFF_FFFF, b"", b"ENOSYS"),
    ],
    "a transaction": [
        (5, "T", Op.WRITE, b"a/b|1", OK),
        (5, "T", Op.READ, b"a/b|", b"1"),
        (5, "T", Op.DIRECTORY, b"a|", b"b|"),
        (5, "", Op.READ, b"a/b|", b"ENOENT"),
        (5, "T", Op.TRANSACTION_START, b"|", b"EBUSY"),
        (5, "T", Op.TRANSACTION_END, b"X|", b"EINVAL"),
        (5, "T", Op.TRANSACTION_END, b"T|", OK),
        (5, "", Op.READ, b"a/b|", b"1"),
        (5, "T", Op.READ, b"a/b|", b"ENOENT"),
        (5, "T", Op.TRANSACTION_END, b"T|", b"ENOENT"),
        (5, "", Op.TRANSACTION_END, b"T|", b"ENOENT"),
    ],
    "a transaction given up": [
        (0, "", Op.WRITE, b"/a/b|1", OK),
        (0, "T", Op.RM, b"/a|", OK),
        (0, "T", Op.READ, b"/a/b|", b"ENOENT"),
        (0, "T", Op.TRANSACTION_END, b"F|", OK),
        (0, "", Op.READ, b"/a/b|", b"1"),
    ],
    "reading what another wrote: again": [
        (0, "", Op.WRITE, b"/a|1", OK),
        (0, "T", Op.READ, b"/a|", b"1"),
        (0, "T", Op.WRITE, b"/b|1", OK),
        (0, "", Op.WRITE, b"/a|2", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
        (0, "", Op.READ, b"/b|", b"ENOENT"),
    ],
    "writing what another wrote: again": [
        (0, "", Op.WRITE, b"/a|1", OK),
        (0, "T", Op.WRITE, b"/a|2", OK),
        (0, "U", Op.WRITE, b"/a|3", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", OK),
        (0, "U", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
        (0, "", Op.READ, b"/a|", b"2"),
    ],
    "missing a node that another makes: again": [
        (0, "", Op.MKDIR, b"/d|", OK),
        (0, "T", Op.READ, b"/d/x|", b"ENOENT"),
        (0, "", Op.WRITE, b"/d/x|", OK),
        (0, "T", Op.WRITE, b"/e|", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
    ],
    "listing what another extends: again": [
        (0, "", Op.MKDIR, b"/d|", OK),
        (0, "T", Op.DIRECTORY, b"/d|", b""),
        (0, "", Op.WRITE, b"/d/x|", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
    ],
    "changing permissions meanwhile: again": [
        (0, "", Op.WRITE, b"/a|1", OK),
        (0, "T", Op.GET_PERMS, b"/a|", b"n0|"),
        (0, "", Op.SET_PERMS, b"/a|n0|r5|", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
    ],
    "others elsewhere: no conflict": [
        (0, "", Op.MKDIR, b"/d|", OK),
        (0, "", Op.MKDIR, b"/e|", OK),
        (0, "T", Op.WRITE, b"/d/x|1", OK),
        (0, "U", Op.WRITE, b"/e/x|2", OK),
        (0, "", Op.WRITE, b"/e/y|", OK),
        (0, "T", Op.TRANSACTION_END, b"T|", OK),
        (0, "U", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
        (0, "", Op.READ, b"/d/x|", b"1"),
    ],
    "a transaction that never was": [
        (5, 77, Op.READ, b"a|", b"ENOENT"),
        (5, 77, Op.WRITE, b"a|v", b"ENOENT"),
        (5, 77, Op.TRANSACTION_START, b"|", b"ENOENT"),
        (5, 77, Op.TRANSACTION_END, b"T|", b"ENOENT"),
        (5, 77, Op.GET_DOMAIN_PATH, b"5|", b"ENOENT"),
        (5, 77, Op.WATCH, b"a|t|", OK),
        (5, 77, Op.UNWATCH, b"a|t|", OK),
        (5, 77, Op.RESET_WATCHES, b"|", OK),
    ],
    "another's transaction is not mine": [
        (5, "T", Op.WRITE, b"a|1", OK),
        (6, "T", Op.READ, b"/local/domain/5/a|", b"ENOENT"),
    ],
    "a permission lost within": [
        (0, "", Op.WRITE, b"/a|1", OK),
        (0, "", Op.SET_PERMS, b"/a|n0|b5|", OK),
        (5, "T", Op.WRITE, b"/a|2", OK),
        (0, "", Op.SET_PERMS, b"/a|n0|", OK),
        (5, "T", Op.TRANSACTION_END, b"T|", b"EAGAIN"),
        (0, "", Op.READ, b"/a|", b"1"),
    ],
    "reset": [
        (5, "", Op.WATCH, b"a|t|", OK),
        (5, "T", Op.WRITE, b"a|1", OK),
        (5, "", Op.RESET_WATCHES, b"|", OK),
        (5, "", Op.UNWATCH, b"a|t|", b"ENOENT"),
        (5, "T", Op.TRANSACTION_END, b"T|", b"ENOENT"),
    ],
    "ill-formed watches": [
        (5, "", Op.WATCH, b"a|", b"EINVAL"),
        (5, "", Op.WATCH, b"a|t", b"EINVAL"),
        (5, "", Op.WATCH, b"a|t|x|", b"EINVAL"),
        (5, "", Op.WATCH, b"a|t|1|y|", b"EINVAL"),
        (5, "", Op.WATCH, b"a//b|t|", b"EINVAL"),
        (5, "", Op.WATCH, b"a|t|", OK),
        (5, "", Op.WATCH, b"a|t|", b"EEXIST"),
        (5, "", Op.WATCH, b"/local/domain/5/a|t|", b"EEXIST"),
        (5, "", Op.WATCH, b"a|u|", OK),
        (5, "", Op.UNWATCH, b"a|t|", OK),
        (5, "", Op.UNWATCH, b"a|t|", b"ENOENT"),
        (6, "", Op.UNWATCH, b"/local/domain/5/a|u|", b"ENOENT"),
        (5, "", Op.WATCH, b"@any thing/\xff|u|", OK),
        (5, "", Op.WATCH, b"@any thing/\xff|u|", b"EEXIST"),
        (5, "", Op.UNWATCH, b"@any thing/\xff|u|", OK),
        (5, "", Op.WATCH, b"@" + 2047 * b"a" + b"|u|", OK),
        (5, "", Op.WATCH, b"@" + 2048 * b"a" + b"|u|", b"EINVAL"),
        (5, "", Op.WATCH, b"|u|", b"EINVAL"),
        (5, "", Op.WATCH, b"a|u|-1|", b"EINVAL"),
        (5, "", Op.WATCH, b"a||", OK),
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_table(world, name: str) -> None:
    transactions: dict[str, int] = {}
    for number, (domid, tx, op, payload, expected) in enumerate(TABLES[name]):
        client = world.domain(domid)
        if isinstance(tx, str) and tx and tx not in transactions:
            transactions[tx] = client.start()
        ident = tx if isinstance(tx, int) else transactions.get(tx, 0)
        answer = client.ask(op, payload.replace(b"|", b"\0"), ident)
        assert answer == expected.replace(b"|", b"\0"), f"row {number}: {payload!r}"


def test_a_list_of_children_longer_than_a_payload_comes_in_parts(world) -> None:
    names = [f"node-{i:04d}" for i in range(600)]
    for name in names:
        world.dom0.ask(Op.WRITE, f"/d/{name}".encode() + b"\0")
    assert world.dom0.ask(Op.DIRECTORY, b"/d\0") == b"E2BIG"
    listing, generations = b"", set()
    while True:
        part = world.dom0.ask(Op.DIRECTORY_PART, b"/d\0%d\0" % len(listing))
        assert len(part) <= 4096
        generation, _, rest = part.partition(b"\0")
        generations.add(generation)
        if rest.endswith(b"\0\0"):
            listing += rest[:-1]
            break
        listing += rest
    assert listing.decode().split("\0")[:-1] == names
    assert len(generations) == 1


def test_a_bug_of_ours_is_an_error_of_that_request_only(world, monkeypatch) -> None:
    monkeypatch.setattr(world.server.store, "get", lambda path: 1 / 0)
    assert world.dom0.ask(Op.READ, b"/a\0") == b"EIO"
    monkeypatch.undo()
    assert world.dom0.ask(Op.WRITE, b"/a\0v") == b"OK\0"
