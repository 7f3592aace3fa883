"""For all tests: what hypothesis must not take for a fault of ours on a machine that has other work."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("reeve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reeve")
