"""What integration tests share: helper modules beside this file, and a private RabbitMQ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rabbitmq import Rabbit, RabbitMissing, private_broker


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    """A broker of our own; skipped when there is none, unless CI=true."""
    context = private_broker(tmp_path_factory.mktemp("rabbit"))
    try:
        broker = context.__enter__()
    except RabbitMissing as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(exc))
    try:
        yield broker
    finally:
        context.__exit__(None, None, None)
