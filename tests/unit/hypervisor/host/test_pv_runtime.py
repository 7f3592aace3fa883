"""The PV runtime between two domains: what it keeps ready for the next one, and who must not have it."""

from __future__ import annotations

from hypervisor.engines.unicorn.codebuffer import executable_areas
from hypervisor.host.pv_runtime import PvRuntime


def test_a_child_that_is_no_domain_sheds_the_engine_and_its_executable_memory() -> None:
    before = executable_areas()
    runtime = PvRuntime()
    made = executable_areas() - before
    assert made, "an engine is ready"
    runtime.shed()
    assert not made & executable_areas()


def test_the_engine_that_is_ready_serves_once() -> None:
    runtime = PvRuntime()
    ready = runtime._ready
    assert runtime._new_engine("") is ready
    assert runtime._new_engine("") is not ready
