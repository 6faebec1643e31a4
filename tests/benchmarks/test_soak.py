"""The soak benchmark passes only a server whose memory and pictures stay as they were."""

from __future__ import annotations

import pytest
from storydiffusion.benchmarks.soak import JOBS, Pictures, report
from storydiffusion.nodes import NODES

ONCE, OTHER = {"page": [b"a"]}, {"page": [b"b"]}


@pytest.mark.parametrize(
    ("growth", "pictures", "passes"),
    [
        (0.019, [ONCE] * 3, True),
        (-0.019, [ONCE] * 3, True),
        (0.021, [ONCE] * 3, False),
        (-0.021, [ONCE] * 3, False),
        (0.0, [ONCE, OTHER, ONCE], False),
        (0.0, [ONCE, ONCE, OTHER], False),
    ],
)
def test_what_passes(growth: float, pictures: list[Pictures], passes: bool) -> None:
    """The two ends of 50 prompts count, and nothing between them."""
    memory = [1000.0] * 50 + [5000.0] * 100 + [1000.0 * (1 + growth)] * 50
    table, passed = report(memory, pictures)
    assert passed is passes
    assert f"| 200 | 40 | 40 | 1000 | {1000 * (1 + growth):.0f} | {growth:+.1%} | 5000 |" in table


def test_prompts_hold_every_node_and_every_kind_of_end() -> None:
    jobs = [job(seed) for job in JOBS for seed in range(5)]
    used = {node["class_type"] for job in jobs if job.end == "done" for node in job.prompt.values()}
    assert used >= {node.define_schema().node_id for node in NODES}
    assert len({job.end for job in jobs}) == 4
    sizes = {
        (node["inputs"]["width"], node["inputs"]["height"])
        for job in jobs
        for node in job.prompt.values()
        if node["class_type"] == "EmptyLatentImage"
    }
    assert len(sizes) >= 4
