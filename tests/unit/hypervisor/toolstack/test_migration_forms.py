"""Offers, tickets, options and statuses: JSON forms that survive a message, and what is refused."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.api import (
    DomainSpec,
    KernelBoot,
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
    MigrationStatus,
    MigrationTicket,
    SaveInfo,
)
from hypervisor.toolstack.migration import check_ident

IDENT = str(uuid.UUID(int=7))
SPEC = DomainSpec(IDENT, "web", KernelBoot("/kernel"), 64, metadata=(("a", "b"),))
FORMS = [
    SaveInfo(IDENT, "web", "/save", 4096, 1, 2.5, 0.5),
    MigrationOffer("embedded", "unicorn-1", SPEC, 3, 64, 1, False, {"cpu": {"leaf": [1, 2]}}),
    MigrationTicket(IDENT, IDENT, MigrationMode.IMAGE, "127.0.0.1", 4000, {"x": 1}),
    MigrationOptions(1000, 5, "zstd", 3, False, 60, True, True),
    MigrationStatus(IDENT, IDENT, MigrationRole.TARGET, MigrationPhase.COMPLETE, detail="waits"),
    MigrationStatus(IDENT, IDENT, MigrationRole.SOURCE, MigrationPhase.KEPT, error={"code": "migration.failed"}),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_a_form_survives_json(form: Any) -> None:
    assert type(form).from_json(json.loads(json.dumps(form.to_json()))) == form


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_what_is_unknown_missing_or_of_another_type_is_refused_in_one_line(form: Any) -> None:
    good = form.to_json()
    bad: list[object] = [None, [], "text", {**good, "more": 1}]
    bad += [{**good, name: object()} for name in good]
    bad += [{**good, name: True} for name, value in good.items() if type(value) in (int, float, str)]
    if type(form) is not MigrationOptions:
        bad.append({})
    for data in bad:
        with pytest.raises(SpecInvalid) as caught:
            type(form).from_json(data)
        assert "\n" not in caught.value.message and len(caught.value.message) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth_bytes": -1},
        {"bandwidth_bytes": 1 << 48},
        {"downtime_ms": 0},
        {"downtime_ms": float("nan")},
        {"compress": "lz4"},
        {"max_rounds": 0},
        {"max_rounds": 1001},
        {"timeout_s": 0},
        {"timeout_s": 1e9},
    ],
)
def test_options_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        MigrationOptions.from_json(change)


def test_an_offer_is_of_its_domain() -> None:
    offer = MigrationOffer.from_json(FORMS[1].to_json())
    assert offer.uuid == SPEC.uuid and offer.spec == SPEC
    with pytest.raises(SpecInvalid):
        MigrationOffer.from_json({**FORMS[1].to_json(), "spec": {**SPEC.to_json(), "memory_mib": "64"}})


def test_which_phases_have_ended() -> None:
    assert {phase for phase in MigrationPhase if phase.ended} == {"moved", "kept", "running", "dropped"}


@pytest.mark.parametrize("ident", ["", "x", IDENT.replace("-", ""), IDENT + "\n", 7, None, "A" * 100])
def test_an_ident_is_a_uuid(ident: Any) -> None:
    check_ident(IDENT)
    with pytest.raises(SpecInvalid):
        check_ident(ident)
