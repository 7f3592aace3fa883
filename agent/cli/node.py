"""`reeve node`: what this machine has."""

from __future__ import annotations

import argparse

from agent.cli.base import Show, Table, plain


class NodeShow(Show):
    """Show the node's capacity, driver and what the driver can do."""

    examples = (
        ("reeve node show", "capacity and capabilities as a table"),
        ("reeve node show -f json", "the same for a program"),
        ("reeve node show -f value -c memory_free_mib", "one number: free memory in MiB"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            data = plain(toolstack.host_info().to_json())
        data["capabilities"] = Table(data["capabilities"])
        data["detail"] = Table(data["detail"])
        return tuple(data), tuple(data.values())
