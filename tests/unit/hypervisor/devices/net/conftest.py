from __future__ import annotations

from collections.abc import Iterator

import pytest
from descriptors import as_the_kernel_does


@pytest.fixture(autouse=True)
def closed_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from as_the_kernel_does(request)
