from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import HypervisorBug, InsufficientMemory
from hypervisor.host.ledger import ALIGN, WIDE_MFN, Claim, ExtentTaken, Ledger
from hypervisor.memory import layout
from hypervisor.types import Mfn


def check(ledger: Ledger) -> None:
    """No extent overlaps another, none leaves the machine address space, commitments are within the total."""
    last = layout.FIRST_MFN
    for claim in ledger.claims():
        assert claim.base_mfn >= last
        assert claim.end_mfn <= layout.MAX_MFN
        last = claim.end_mfn
    assert ledger.committed == sum(claim.committed for claim in ledger.claims())
    assert ledger.committed + ledger.free == ledger.total


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000), st.integers(0, 100), st.booleans()), max_size=60))
def test_claims_never_overlap_and_frames_are_conserved(steps: list[tuple[bool, int, int, bool]]) -> None:
    ledger = Ledger(40_000, chance=random.Random(1))
    held: list[Claim] = []
    for take, frames, pick, wide in steps:
        if take:
            free = ledger.free
            try:
                held.append(ledger.claim(f"d{pick}", frames + 10, frames, wide=wide))
                assert (held[-1].base_mfn >= WIDE_MFN) == wide
                assert ledger.free == free - frames
            except InsufficientMemory:
                assert frames > free
                assert ledger.free == free
        elif held:
            ledger.release(held.pop(pick % len(held)))
        check(ledger)
        for claim in held:
            assert ledger.owner_of(claim.base_mfn) == claim.owner
            assert ledger.owner_of(claim.end_mfn - 1) == claim.owner
    again = Ledger.restore(ledger.save())
    assert again.save() == ledger.save()
    assert again.claims() == ledger.claims()


def test_first_fit_reuses_the_lowest_hole() -> None:
    ledger = Ledger(10_000)
    first, second = ledger.claim("a", 100, 100), ledger.claim("b", 100, 100)
    assert first.base_mfn == layout.FIRST_MFN
    assert second.base_mfn == first.end_mfn
    ledger.release(first)
    assert ledger.claim("c", 101, 101).base_mfn == second.end_mfn
    assert ledger.claim("d", 100, 100).base_mfn == layout.FIRST_MFN


def test_wide_extents_lie_anywhere_beyond_4_gib_until_there_is_no_room() -> None:
    first, end = WIDE_MFN - 3000, WIDE_MFN + 20 * ALIGN
    places = set()
    for seed in range(400):
        ledger = Ledger(10**6, first_mfn=first, end_mfn=end, chance=random.Random(seed))
        ledger.claim_at("a", WIDE_MFN + 7 * ALIGN, ALIGN + 1, 1)
        places.add(ledger.claim("b", 2 * ALIGN, 1, wide=True).base_mfn)
    assert places == {WIDE_MFN + at * ALIGN for at in (*range(6), *range(9, 19))}
    ledger = Ledger(10**6, first_mfn=first, end_mfn=end)
    claims = [ledger.claim("c", ALIGN, 1, wide=True) for _ in range(20)]
    assert {claim.base_mfn for claim in claims} == {WIDE_MFN + at * ALIGN for at in range(20)}
    assert ledger.claim("d", ALIGN, 1, wide=True).base_mfn == first


def test_a_given_extent_is_claimed_or_refused() -> None:
    ledger = Ledger(1000)
    base = layout.FIRST_MFN + 1000
    claim = ledger.claim_at("a", base, 100, 100)
    assert (claim.base_mfn, claim.frames) == (base, 100)
    assert ledger.claim_at("b", base + 100, 50, 1).base_mfn == base + 100
    assert ledger.claim_at("c", base - 50, 50, 1).base_mfn == base - 50
    before = ledger.claims()
    for at in (base - 1, base, base + 99, base + 149, base - 100 + 1):
        with pytest.raises(ExtentTaken):
            ledger.claim_at("d", at, 100, 1)
    for at in (0, layout.FIRST_MFN - 1, layout.MAX_MFN - 99, -5):
        with pytest.raises(ExtentTaken):
            ledger.claim_at("d", at, 100, 1)
    with pytest.raises(InsufficientMemory):
        ledger.claim_at("d", base + 5000, 2000, 2000)
    assert ledger.claims() == before


def test_too_much_names_what_is_left_and_the_cure() -> None:
    ledger = Ledger(64 * 256)
    ledger.claim("a", 256 * 60, 256 * 60)
    with pytest.raises(InsufficientMemory, match=r"needs 5 MiB .* 4 of 64 MiB left: give it less memory"):
        ledger.claim("b", 256 * 4 + 1, 256 * 4 + 1)
    assert ledger.free == 4 * 256


def test_failed_body_gives_the_claim_back() -> None:
    ledger = Ledger(1000)
    with pytest.raises(RuntimeError), ledger.claiming("a", 10, 10):
        assert ledger.free == 990
        raise RuntimeError
    assert ledger.free == 1000
    with ledger.claiming("a", 10, 10):
        pass
    assert ledger.free == 990


def test_adoption_may_exceed_the_total_but_not_overlap() -> None:
    ledger = Ledger(10)
    ledger.adopt(Claim(1, "a", Mfn(layout.FIRST_MFN + 50), 100, 100))
    assert ledger.free == 0
    with pytest.raises(HypervisorBug, match="overlaps"):
        ledger.adopt(Claim(2, "b", Mfn(layout.FIRST_MFN + 149), 10, 1))
    with pytest.raises(HypervisorBug, match="not one of this host's"):
        ledger.adopt(Claim(2, "b", Mfn(5), 10, 1))


def test_release_twice_is_a_bug() -> None:
    ledger = Ledger(100)
    claim = ledger.claim("a", 5, 5)
    ledger.release(claim)
    with pytest.raises(HypervisorBug, match="not held"):
        ledger.release(claim)


def test_a_commitment_changes_with_its_owner() -> None:
    ledger = Ledger(1000)
    claim, other = ledger.claim("a", 800, 100), ledger.claim("b", 800, 500)
    grown = ledger.recommit(claim, 500)
    assert grown.base_mfn == claim.base_mfn and ledger.free == 0
    check(ledger)
    with pytest.raises(InsufficientMemory, match="left"):
        ledger.recommit(other, 501)
    with pytest.raises(HypervisorBug):
        ledger.recommit(claim, 10)
    for frames in (0, -1, 801):
        with pytest.raises(HypervisorBug):
            ledger.recommit(grown, frames)
    assert ledger.recommit(grown, 1).committed == 1 and ledger.free == 499
    ledger.release(other)
    check(ledger)
