"""What the journal of xenstored is told: lists whose first item is the kind (`hypervisor.xenstore.journal.replay`)."""

from __future__ import annotations

from typing import Any, Protocol

Record = list[Any]


class Journal(Protocol):
    def append(self, records: list[Record]) -> None:
        """Make the records of one step durable against the end of this process."""


def of_domain(domid: int, saved: dict[str, Any]) -> list[Record]:
    """The records that make a domain which was saved by `Server.save_domain`; its nodes have their own.

    Its target is not among them: that is another domain of the same host.
    """
    records: list[Record] = [["d", domid]]
    if saved["positions"] is not None:
        records += [["p", domid, *saved["positions"]], ["i", domid, saved["positions"][0], saved["in"]]]
    records += [["o", domid, *message] for message in saved["out"]]
    records += [["w", domid, *watch] for watch in saved["watches"]]
    records += [["t", domid, ident] for ident in saved["transactions"]]
    if saved["shutdown"]:
        records.append(["s", domid, True])
    return records
