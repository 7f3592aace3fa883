"""The forms a message may have: Reeve's own (`agent.wire`) and oslo.messaging's (`agent.oslo`). Pure.

Which one a message has depends on the queue it came from, never on a guess from its content.
"""

from __future__ import annotations

from agent import oslo, wire
from agent.errors import MessageError


def decode(
    raw: wire.Raw, host: str, max_bytes: int = wire.MAX_BYTES, service: oslo.Service = oslo.SERVICE, now: float = 0.0
) -> wire.Instruction | wire.Outgoing | None:
    """A message as an instruction, or the answer to one that needs no instruction (a ping); None: nothing to do.

    :param now: seconds since the epoch; what a message says of its age counts from here.
    :raises MessageError: with the code that names what is wrong.
    """
    if raw.dialect == oslo.DIALECT:
        return oslo.decode(raw, host, max_bytes, service, now)
    return wire.decode(raw, host, max_bytes)


def encode_reply(reply: wire.Reply, reply_to: str, dialect: str = wire.DIALECT, correlation: str = "") -> wire.Outgoing:
    """The reply in the form its sender speaks. :raises ValueError: a dialect this version does not have."""
    if dialect == oslo.DIALECT:
        return oslo.encode_reply(reply, reply_to, correlation)
    if dialect != wire.DIALECT:
        raise ValueError(f"no dialect {dialect!r}")
    return wire.encode_reply(reply, reply_to, correlation)


def encode_refusal(
    raw: wire.Raw, why: MessageError, host: str, max_bytes: int = wire.MAX_BYTES
) -> wire.Outgoing | None:
    """What the sender of a refused message is told; None when it cannot be told who that is."""
    if raw.dialect == oslo.DIALECT:
        return oslo.encode_refusal(raw, why, host, max_bytes)
    address, ident = wire.readable_reply_address(raw, max_bytes)
    if not address:
        return None
    return wire.encode_reply(wire.Reply(ident, host, error=why.to_json() | {"undone": True}), address)
