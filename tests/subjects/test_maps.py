"""Subject maps of one run, written by several model calls, also at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from storydiffusion.nodes.subjects.maps import NamingTokens, SubjectMaps

CALLS = 200


def new_maps(uuids: list[str]) -> SubjectMaps:
    naming: dict[Any, NamingTokens] = {uuid: NamingTokens(77, [{"Bob": [1]}]) for uuid in uuids}
    return SubjectMaps(("Bob",), torch.tensor([[True]]), (8, 8), {}, naming, frozenset([0]))


def written_by(uuid: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(ord(uuid))
    return [torch.rand(8, 8, generator=generator) for _ in range(CALLS)]


def test_calls_in_threads_give_what_calls_one_by_one_give() -> None:
    """Sums of floats depend on their order: each conditioning has its own, and these are added in one order."""
    uuids = ["a", "b", "c"]

    def write(maps: SubjectMaps, uuid: str) -> None:
        for attention in written_by(uuid):
            maps.write(5.0, uuid, 0, {"Bob": attention})

    one_by_one, at_once = new_maps(uuids), new_maps(uuids)
    for uuid in reversed(uuids):
        write(one_by_one, uuid)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda uuid: write(at_once, uuid), uuids))
    for maps in (one_by_one, at_once):
        assert maps.total is None
        maps.settle()
    assert torch.equal(at_once.total, one_by_one.total)
    expected = sum(torch.stack(written_by(uuid)).double().sum(0) for uuid in uuids)
    torch.testing.assert_close(at_once.total[0, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_a_step_writes_is_read_from_the_next_one_on() -> None:
    maps = new_maps(["a"])
    device = torch.device("cpu")
    maps.write(5.0, "a", 0, {"Bob": torch.eye(8)})
    assert maps.labels(5.0, (8, 8), device) is None
    first = maps.labels(4.0, (8, 8), device)
    assert first is maps.labels(4.0, (8, 8), device)
    maps.write(4.0, "a", 0, {"Bob": torch.ones(8, 8)})
    assert maps.labels(4.0, (8, 8), device) is first
    assert maps.labels(3.0, (8, 8), device) is not first


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_labels_lie_where_the_call_runs(device: str) -> None:
    maps = new_maps(["a"])
    maps.write(5.0, "a", 0, {"Bob": torch.eye(8)})
    labels = maps.labels(4.0, (4, 4), torch.device(device))
    assert labels.labels.device.type == labels.present.device.type == device
