"""An instruction to an agent, for commands that need its answer."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from agent.cli.base import Common, UsageError
from agent.cli.fetched import json_argument
from agent.cli.settings import Connection
from agent.errors import AgentError

SECONDS = 30.0
"""For an answer that the agent has at once."""


class InstructionFailed(AgentError):
    """The reply says that the instruction was not carried out; code, text and retryable are the reply's."""


def ask(
    connection: Connection,
    verb: str,
    args: Mapping[str, Any],
    timeout: float,
    tell: Callable[[dict[str, Any]], None] = lambda data: None,
    ident: str = "",
) -> dict[str, Any]:
    """The result of an instruction to this host's agent.

    :param timeout: seconds; also the instruction's deadline. :param tell: hears its progress reports.
    :raises InstructionFailed: with the reply's code. :raises AgentError: no reply, no broker.
    """
    from agent.rpc.client import Client  # here: kombu takes its time

    ident = ident or str(uuid.uuid4())
    if not connection.broker_url:
        raise UsageError("no broker known: give --config-file with the agent's configuration")
    with Client(
        connection.broker_url,
        connection.host,
        tls=connection.broker_tls,
        signer=connection.signer,
        quorum=connection.broker_quorum,
    ) as client:
        client.listen(
            lambda report: tell(report.data) if report.data.get("instruction") == ident else None,
            f"progress.{connection.host}",
        )
        client.send(verb, args, instruction_id=ident, deadline=time.time() + timeout)
        # Past the deadline it is taken back, which takes a while, too.
        reply = client.wait(ident, timeout + 60.0)
    if reply.error is not None:
        raise failure(reply.error)
    return dict(reply.result or {})


def failure(error: Mapping[str, Any]) -> InstructionFailed:
    """A reply's error."""
    return InstructionFailed(
        str(error.get("message", "no reason given")),
        code=str(error.get("code", "instruction.failed")),
        retryable=bool(error.get("retryable", False)),
    )


class AgentCommand(Common):
    """A command about what the agent is doing, or has refused to do."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        json_argument(parser)

    def ask(self, verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        return ask(self.connection, verb, args, SECONDS)
