"""Images that were tampered with: nothing in them is believed, and each is refused with one line."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from harness import CONSOLE_PORT, STORE_PORT, UUID, GuestRun, build, guest_runs, make_memory, running

from hypervisor.abi.structs import StartInfo, VcpuGuestContext
from hypervisor.domain import Domain, MachineConfig
from hypervisor.errors import CpuIncompatible, StreamInvalid, WrongState
from hypervisor.machine import Machine
from hypervisor.suspended.rebuild import rebuild
from hypervisor.suspended.state import EXTENDED, place
from hypervisor.suspended.transfer import Incoming
from hypervisor.toolstack.stream import libxc
from hypervisor.toolstack.stream.records import (
    Kind,
    Marker,
    P2mFrames,
    PageData,
    PvInfo,
    Record,
    SharedInfo,
    VcpuBlob,
)
from hypervisor.toolstack.stream.source import Source

pytestmark = pytest.mark.skipif(bool(build.available()), reason=str(build.available()))
PAGES = 2048


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from guest_runs()


@pytest.fixture(scope="module")
def image() -> Iterator[list[Record]]:
    """The records of a guest that suspended."""
    run = GuestRun("suspend", cmdline="now", vcpus=2, parks=True).start()
    try:
        run.wait_suspended()
        yield records_of(run.stream())
    finally:
        run.close()


def records_of(stream: bytes) -> list[Record]:
    source = Source.of_file(io.BytesIO(stream))
    return list(libxc.read_records(source, libxc.read_header(source).version))


def restored(records: list[Record], *, ram: int = PAGES, vcpus: int = 2) -> Domain:
    stream = libxc.header_bytes() + b"".join(map(libxc.record_bytes, records))
    incoming = Incoming(Source.of_file(io.BytesIO(stream)))
    incoming.begin()
    policy = incoming.policy.save() if incoming.policy is not None else "engine"
    memory = make_memory(ram)
    state, frames = incoming.finish(np.frombuffer(memory, np.uint64, ram * 512), ram)
    config = MachineConfig(
        UUID, "x", 3, 0x40000, 0, ram, vcpus, vcpus, tsc_khz=1_000_000, cpu_policy=policy, mcg_cap=state.mcg_cap
    )
    domain = Machine(config, memory, notify_host=lambda _port: None).domain
    rebuild(domain, state, frames, (STORE_PORT, CONSOLE_PORT))
    return domain


def replaced(records: list[Record], change: Callable[[Record], Record]) -> list[Record]:
    return [change(record) for record in records]


def with_context(records: list[Record], change: Callable[[VcpuGuestContext], None], number: int = 0) -> list[Record]:
    def edit(record: Record) -> Record:
        if not isinstance(record, VcpuBlob) or record.kind is not Kind.X86_PV_VCPU_BASIC or record.vcpu != number:
            return record
        context = VcpuGuestContext.from_buffer_copy(record.content)
        change(context)
        return dataclasses.replace(record, content=bytes(context))

    return replaced(records, edit)


def contents(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Types and pages of all page numbers, to be changed and put back by `with_pages`."""
    types, pages = np.full(PAGES, 15, np.uint8), np.zeros((PAGES, 512), np.uint64)
    for record in records:
        if isinstance(record, PageData):
            pfns = record.pfns.astype(np.int64)
            types[pfns] = record.types
            pages[pfns[record.types < 13]] = np.frombuffer(record.pages, np.uint64).reshape(-1, 512)
    return types, pages


def with_pages(records: list[Record], types: np.ndarray, pages: np.ndarray) -> list[Record]:
    out: list[Record] = []
    for record in records:
        if not isinstance(record, PageData):
            out.append(record)
        elif record.pfns[0] == 0:
            for first in range(0, PAGES, 512):
                some = types[first : first + 512]
                data = pages[first : first + 512][some < 13].tobytes()
                out.append(PageData(np.arange(first, first + 512, dtype=np.uint64), some, data))
    return out


def tables(types: np.ndarray, level: int) -> list[int]:
    return [int(pfn) for pfn in np.flatnonzero((types < 13) & (types & 7 == level))]


def test_it_can_be_restored_as_it_is(image: list[Record]) -> None:
    types, pages = contents(image)
    domain = restored(with_pages(image, types, pages))
    assert domain.recount() == [] and [vcpu.up for vcpu in domain.vcpus] == [True, True]
    fewer = [record for record in image if record.kind is not Kind.X86_CPUID_POLICY]
    assert restored(fewer).recount() == []


def test_pages_where_the_domain_has_no_frames(image: list[Record]) -> None:
    """A domain whose pages are numbered beyond its frames gets those that are left."""
    types, pages = contents(image)
    absent = [int(pfn) for pfn in np.flatnonzero(types == 0) if not pages[pfn].any()][-600:]
    types[absent] = 15
    domain = restored(with_pages(image, types, pages), ram=PAGES - 500)
    assert domain.recount() == [] and domain.frames.pages() == PAGES - 600


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: setattr(c.user_regs, "rdx", 1 << 40), "start_info"),
        (lambda c: setattr(c.user_regs, "rdx", PAGES), "start_info"),
        (lambda c: c.ctrlreg.__setitem__(3, PAGES << 12), "page table of vCPU 0"),
        (lambda c: c.ctrlreg.__setitem__(3, 5 << 12), "cannot run"),
        (lambda c: c.ctrlreg.__setitem__(1, 5 << 12 | 1), "cannot run"),
        (lambda c: setattr(c, "gdt_ents", 1 << 20), "descriptors"),
        (lambda c: (setattr(c, "gdt_ents", 512), c.gdt_frames.__setitem__(0, PAGES))[0], "GDT"),
        (lambda c: setattr(c.user_regs, "rip", 1 << 50), "canonical"),
        (lambda c: (setattr(c, "ldt_ents", 8), setattr(c, "ldt_base", 0x1000))[0], "LDT"),
        (lambda c: (setattr(c, "flags", 0), c.ctrlreg.__setitem__(1, 0))[0], "user page table"),
    ],
)
def test_registers(image: list[Record], change: Callable[[VcpuGuestContext], None], says: str) -> None:
    with pytest.raises(StreamInvalid, match=says) as caught:
        restored(with_context(image, change))
    assert "\n" not in caught.value.message


def test_page_tables(image: list[Record]) -> None:
    def refused(change: Callable[[np.ndarray, np.ndarray], None], says: str) -> None:
        types, pages = contents(image)
        change(types, pages)
        with pytest.raises(StreamInvalid, match=says) as caught:
            restored(with_pages(image, types, pages))
        assert "\n" not in caught.value.message

    types, _ = contents(image)
    l1, l2, l4 = tables(types, 1), tables(types, 2), tables(types, 4)[0]

    def entry(pfn: int, slot: int, value: int) -> Callable[[np.ndarray, np.ndarray], None]:
        return lambda _types, pages: pages[pfn].__setitem__(slot, value)

    writable = 0x67
    refused(entry(l1[0], 0, l2[0] << 12 | writable), "writable mapping of a page table")
    refused(entry(l1[0], 0, (PAGES + 5) << 12 | writable), "which it has not")
    refused(entry(l1[0], 0, 1 << 45 | writable), "which it has not")
    refused(entry(l1[0], 0, 7 << 12 | writable | 1 << 3), "bad L1 flags")
    refused(entry(l2[0], 3, 7 << 12 | writable | 1 << 7), "bad L2 flags")
    refused(entry(l2[0], 3, l4 << 12 | writable), "cannot run")
    refused(lambda types, _pages: types.__setitem__(l1[0], 0), "cannot run")
    refused(lambda types, _pages: types.__setitem__(l4, 0x8 | 3), "cannot run")
    refused(lambda types, _pages: types.__setitem__(l1[0], 15), "which it has not")


def test_rings_and_lists(image: list[Record]) -> None:
    types, pages = contents(image)
    context = next(r for r in image if isinstance(r, VcpuBlob) and r.kind is Kind.X86_PV_VCPU_BASIC)
    at = VcpuGuestContext.from_buffer_copy(context.content).user_regs.rdx
    page = pages[at].view(np.uint8)
    info = StartInfo.from_buffer_copy(page.tobytes()[: ctypes.sizeof(StartInfo)])
    for field, value, says in (
        ("store_mfn", PAGES + 1, "xenstore's ring"),
        ("store_mfn", tables(types, 1)[0], "page table"),
        ("store_mfn", at, "share a page"),
    ):
        changed = StartInfo.from_buffer_copy(bytes(info))
        setattr(changed, field, value)
        page[: ctypes.sizeof(StartInfo)] = np.frombuffer(bytes(changed), np.uint8)
        with pytest.raises(StreamInvalid, match=says):
            restored(with_pages(image, types, pages))

    def frames(change: Callable[[P2mFrames], P2mFrames]) -> list[Record]:
        return replaced(image, lambda r: change(r) if isinstance(r, P2mFrames) else r)

    table = tables(types, 1)[0]
    with pytest.raises(StreamInvalid, match="which is a page table"):
        restored(frames(lambda r: dataclasses.replace(r, frames=(table, *r.frames[1:]))))
    with pytest.raises(StreamInvalid, match="beyond its list"):
        restored(frames(lambda r: dataclasses.replace(r, last=511, frames=r.frames[:1])))
    with pytest.raises(StreamInvalid, match="list of frames is of pages"):
        restored(frames(lambda r: dataclasses.replace(r, last=(1 << 17) - 1, frames=(0,) * 256)))


def test_vcpus_and_size(image: list[Record]) -> None:
    with pytest.raises(StreamInvalid, match="vCPU 1 of 1"):
        restored(image, vcpus=1)
    only_second = [r for r in image if not (isinstance(r, VcpuBlob) and r.vcpu == 0)]
    with pytest.raises(StreamInvalid, match="vCPU 0"):
        restored(only_second)
    with pytest.raises(StreamInvalid, match="at most"):
        restored(image, ram=1024)
    with pytest.raises(StreamInvalid, match="2048 pages"):
        place(np.zeros(2048, np.uint8), 2047)


def test_a_processor_that_is_not_here(image: list[Record]) -> None:
    before = image[:-1]
    avx = VcpuBlob(Kind.X86_PV_VCPU_XSAVE, 0, (7).to_bytes(8, "little") * 2 + bytes(832))
    with pytest.raises(CpuIncompatible, match="AVX"):
        restored([*before, avx, Marker(Kind.END)])
    msr = (0x48).to_bytes(4, "little") + bytes(4) + (1).to_bytes(8, "little")
    with pytest.raises(CpuIncompatible, match="MSR 0x48"):
        restored([*before, VcpuBlob(Kind.X86_PV_VCPU_MSRS, 0, msr), Marker(Kind.END)])
    restored([*before, VcpuBlob(Kind.X86_PV_VCPU_MSRS, 0, msr[:8] + bytes(8)), Marker(Kind.END)])


def test_flipped_bits_of_the_state(image: list[Record]) -> None:
    """What is accepted keeps the machine's invariants."""
    rng = random.Random(5)
    types, _ = contents(image)
    accepted = 0
    for _ in range(40):
        pages_types, pages = contents(image)
        pfn = rng.choice([p for level in (1, 2, 3, 4) for p in tables(types, level)])
        pages[pfn, rng.randrange(512)] ^= np.uint64(1 << rng.randrange(64))
        records = with_pages(image, pages_types, pages)
        number = rng.choice([n for n, r in enumerate(records) if isinstance(r, VcpuBlob | SharedInfo | PvInfo)])
        record = records[number]
        if isinstance(record, VcpuBlob) and rng.random() < 0.7:
            data = bytearray(record.content)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            records[number] = dataclasses.replace(record, content=bytes(data))
        try:
            domain = restored(records)
        except StreamInvalid as exc:
            assert "\n" not in exc.message
            continue
        accepted += 1
        assert domain.recount() == []
    assert accepted


@pytest.mark.parametrize(("cmdline", "says"), [("now keep", "none of its pages"), ("now plain", "0 entries")])
def test_guests_that_cannot_be_saved(runs: list[GuestRun], cmdline: str, says: str) -> None:
    run = running(runs, "suspend", cmdline=cmdline, parks=True)
    run.wait_suspended()
    with pytest.raises(WrongState, match=says) as caught:
        run.stream()
    assert "\n" not in caught.value.message
    run.wake()
    run.wait_text("suspend: awake 1, cancelled")


def test_machine_check_banks_that_the_guest_was_shown(image: list[Record]) -> None:
    def shown(record: Record) -> Record:
        if isinstance(record, VcpuBlob) and record.kind is Kind.X86_PV_VCPU_EXTENDED:
            fields = list(EXTENDED.unpack(record.content))
            return dataclasses.replace(record, content=EXTENDED.pack(*fields[:-1], 0x104))
        return record

    domain = restored(replaced(image, shown))
    msr = domain.privileged.msr
    assert (msr.read(0x179), msr.read(0x400 + 4 * 3), msr.read(0x400 + 4 * 4)) == (0x104, 0, None)
    assert msr.write(0x401, 0) and msr.write(0x17A, 0) and not msr.write(0x410, 0)
    assert domain.config.mcg_cap == 0x104
