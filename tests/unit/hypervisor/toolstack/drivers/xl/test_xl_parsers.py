"""xl's parsers on what a real Xen 4.17 printed, and on what it never would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.errors import HostFailure
from hypervisor.toolstack.drivers.xl import parsers

SAMPLES = Path(__file__).parent / "samples"
UUID = "46b436ae-d30c-47e2-b58b-605b58b46e26"


def sample(name: str) -> str:
    return (SAMPLES / f"xl_{name}.txt").read_text()


def verbose(rows: str) -> str:
    return sample("list").splitlines()[0] + "   UUID                            Reason-Code\tSecurity Label\n" + rows


def test_list() -> None:
    assert parsers.domain_rows(sample("list")) == [
        parsers.Row("Domain-0", 0, 1024, 2, "r", 35.3),
        parsers.Row("pv1", 1, 256, 1, "b", 6.7),
    ]


def test_verbose_list_with_a_name_of_several_words() -> None:
    row = f"my 1 guest{' ' * 35}7   256     1     ---s--       6.7 {UUID}        1                -"
    text = verbose(row + "\n")
    assert parsers.domain_rows(text) == [parsers.Row("my 1 guest", 7, 256, 1, "s", 6.7, UUID, 1)]


def test_a_domain_that_is_being_saved() -> None:
    """As a real Xen showed it: the reason's letter stands where the `c` of a crash is."""
    dom0, saved = parsers.domain_rows(sample("list_-v_saving"))
    assert (dom0.domid, dom0.uuid, dom0.reason) == (0, "00000000-0000-0000-0000-000000000000", None)
    assert saved == parsers.Row("d56c28a", 9, 16, 2, "s", 28.5, "56c28a48-fb09-4f8b-b13c-f9e4668539d4", 2)


@pytest.mark.parametrize(("letter", "flags"), [("-", "s"), ("r", "s"), ("s", "s"), ("c", "sc"), ("w", "s"), ("?", "s")])
def test_letters_of_why_a_domain_ended(letter: str, flags: str) -> None:
    text = sample("list_-v_saving").replace("---ss-", f"---s{letter}-")
    assert parsers.domain_rows(text)[1].flags == flags


def test_a_guest_that_has_no_cpu_shows_no_flag() -> None:
    assert parsers.domain_rows(sample("list_-v_saving").replace("---ss-", "------"))[1].flags == ""


def test_list_as_json() -> None:
    configs = parsers.domain_configs(sample("list_-l"))
    assert sorted(configs) == [0, 1]
    assert configs[1]["c_info"]["uuid"] == UUID
    assert configs[1]["b_info"]["max_memkb"] == 524288
    one = json.loads(sample("list_-l"))[1]
    assert parsers.domain_configs(json.dumps(one)) == {1: configs[1]}


def test_info() -> None:
    facts = parsers.host_facts(sample("info"))
    assert (facts["nr_cpus"], facts["total_memory"], facts["free_memory"]) == ("2", "4095", "2772")
    assert facts["virt_caps"].split()[:3] == ["pv", "hvm", "hap"]
    assert facts["xen_version"] == "4.17.7" and facts["xen_changeset"] == ""


def test_vcpus() -> None:
    rows = parsers.vcpu_rows(sample("vcpu-list"))
    assert len(rows) == 4
    assert rows[2] == parsers.VcpuRow(1, 0, 1, "b", 5.8, "all", "all")
    assert rows[3] == parsers.VcpuRow(1, 1, None, "p", 0.9, "all", "all")


def test_weights() -> None:
    assert parsers.weights(sample("sched-credit2")) == {0: (256, 0), 1: (256, 0)}


def test_pools() -> None:
    assert parsers.pools(sample("cpupool-list")) == [parsers.Pool("Pool-0", 2, "credit2", True, 2)]


DISKS = "Vdev  BE  handle state evt-ch ring-ref BE-path                       \n"
"""Not recorded: from xl_block.c of Xen 4.17."""


def test_nics() -> None:
    header = sample("network-list_pv1")
    assert parsers.nic_rows(header) == []
    row = "0   0  00:16:3e:00:00:01     0     4     -1    -1/-1          /local/domain/0/backend/vif/1/0\n"
    expected = parsers.DeviceRow(0, 4, "/local/domain/0/backend/vif/1/0", "00:16:3e:00:00:01")
    assert parsers.nic_rows(header + row) == [expected]


def test_disks() -> None:
    assert parsers.disk_rows(DISKS) == []
    row = "51712 0   1      4     9      8        /local/domain/0/backend/vbd/1/51712   \n"
    gone = "51728 0   1      -1    -1     -1       /local/domain/0/backend/qdisk/1/51728 \n"
    assert parsers.disk_rows(DISKS + row + gone) == [
        parsers.DeviceRow(51712, 4, "/local/domain/0/backend/vbd/1/51712"),
        parsers.DeviceRow(51728, -1, "/local/domain/0/backend/qdisk/1/51728"),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        "51712 0   1      4     9      8        /local/domain/0/backend/vbd/1/51728\n",
        "51712 0   1      4     9      8        /etc/51712\n",
        "51712 0   1      4     9      8        /local/domain/0/backend/vbd/1/51712\n" * 2,
    ],
)
def test_back_ends_that_cannot_be(rows: str) -> None:
    with pytest.raises(HostFailure, match="is it xl"):
        parsers.disk_rows(DISKS + rows)


PARSERS: dict[str, Callable[[str], object]] = {
    "list": parsers.domain_rows,
    "info": parsers.host_facts,
    "vcpu-list": parsers.vcpu_rows,
    "sched-credit2": parsers.weights,
    "cpupool-list": parsers.pools,
    "network-list_pv1": parsers.nic_rows,
    "list_-l": parsers.domain_configs,
}


@pytest.mark.parametrize("name", PARSERS)
def test_a_line_that_is_not_known_is_an_error_with_its_text(name: str) -> None:
    with pytest.raises(HostFailure) as caught:
        PARSERS[name](sample(name) + "? what is \x1b[31m this\n")
    assert "\x1b" not in caught.value.message and "\n" not in caught.value.message
    if name != "list_-l":
        assert "what is" in caught.value.message


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_cut_short_inside_a_line_is_an_error(name: str) -> None:
    text = sample(name).rstrip()
    for end in range(0, len(text), 7):
        if not text[:end].endswith("\n"):
            with pytest.raises(HostFailure):
                PARSERS[name](text[:end])


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=300), at=st.integers(0, 4000))
def test_garbage_is_an_error_or_a_result_and_nothing_else(name: str, text: str, at: int) -> None:
    whole = sample(name)
    for data in (text, whole[:at] + text + whole[at:]):
        try:
            PARSERS[name](data)
        except HostFailure as exc:
            assert "\n" not in exc.message and len(exc.message) < 700


@pytest.mark.parametrize("text", ["[" * 100_000, '{"domid": true, "config": {}}', "[1]", '"x"', '[{"domid": 1}]'])
def test_json_that_is_no_list_of_domains(text: str) -> None:
    with pytest.raises(HostFailure):
        parsers.domain_configs(text)


def test_a_domain_twice_or_none_at_all_cannot_be() -> None:
    text = sample("list")
    for bad in (text + text.splitlines()[1] + "\n", text.splitlines()[0] + "\n"):
        with pytest.raises(HostFailure):
            parsers.domain_rows(bad)


def test_facts_that_are_missing_or_no_numbers() -> None:
    text = sample("info")
    for bad in (text.replace("free_memory", "freed_memory"), text.replace(": 2772", ": lots"), text + "host : twice\n"):
        with pytest.raises(HostFailure):
            parsers.host_facts(bad)
