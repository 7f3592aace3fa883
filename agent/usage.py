"""What `reeve-agent --help` says besides the options."""

from __future__ import annotations

DESCRIPTION = "Carries out a scheduler's instructions on this node: takes them from a message queue, journals them, "
DESCRIPTION += "runs them on the local hypervisor and replies. Killed at any moment, it goes on where it was."
EPILOG = """examples:
  reeve-agent
      folder broker and journal under the default state folder; then, in another terminal:
      reeve instruct list
  reeve-agent --broker-url amqp://guest:guest@127.0.0.1:5672/ --agent-host node1
      take instructions from RabbitMQ, queue reeve.node1
  reeve-agent --driver-name fake --agent-state-dir /tmp/try
      try it without a hypervisor
"""
