"""Which frames of a transition are held to its panels, and until when."""

from __future__ import annotations

import pytest
import torch
from storydiffusion.nodes.transition_video.anchoring import ANCHORS, HoldMask, held_latents, hold_parts

RAMP = (1.0, 0.6, 0.3)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (2, [1.0, 1.0]),
        (3, [1.0, 0.0, 1.0]),  # the middle frame is as near to one panel as to the other
        (4, [1.0, 0.6, 0.6, 1.0]),
        (5, [1.0, 0.6, 0.0, 0.6, 1.0]),
        (8, [1.0, 0.6, 0.3, 0.0, 0.0, 0.3, 0.6, 1.0]),
    ],
)
def test_ramp_falls_from_both_ends(frames: int, expected: list[float]) -> None:
    torch.testing.assert_close(hold_parts(frames, RAMP), torch.tensor(expected))


def test_every_anchor_releases_ends_last() -> None:
    assert ANCHORS["off"] == ()
    for ramp in ANCHORS.values():
        assert list(ramp) == sorted(ramp, reverse=True)
        assert all(0 < part <= 1 for part in ramp)
    assert ANCHORS["release late"][0] < 1 == ANCHORS["hold"][0] == ANCHORS["hold, soft neighbours"][0]


@pytest.mark.parametrize(
    ("frames", "levels"),
    [
        (2, [1, 2]),
        (3, [1, 0, 2]),
        (4, [1, 1, 2, 2]),
        (5, [1, 1, 0, 2, 2]),
        (6, [1, 1, 1, 2, 2, 2]),
        (7, [1, 1, 1, 0, 2, 2, 2]),
        (8, [1, 1, 1, 0, 0, 2, 2, 2]),
    ],
)
def test_held_frames_have_the_latents_of_the_panel_at_their_end(frames: int, levels: list[int]) -> None:
    first, last = torch.full((4, 2, 3), 1.0), torch.full((4, 2, 3), 2.0)
    latents = held_latents(first, last, hold_parts(frames, RAMP))
    assert latents.shape == (frames, 4, 2, 3)
    assert latents.amax(dim=(1, 2, 3)).tolist() == levels
    assert torch.equal(latents.amax(dim=(1, 2, 3)), latents.amin(dim=(1, 2, 3)))
    assert not held_latents(first, last, hold_parts(frames, ())).any()


def test_frames_are_freed_when_the_noise_falls_below_their_level() -> None:
    mask = HoldMask(torch.tensor([0.0, 0.5, 3.0, 999999999.9]))
    denoise_mask = torch.ones(4, 4, 2, 2)

    def free(sigma: float) -> list[float]:
        allowed = mask(torch.full((4,), sigma), denoise_mask, {})
        assert allowed.shape == (4, 1, 1, 1)
        return allowed.flatten().tolist()

    assert free(25.0) == [0, 0, 0, 1]
    assert free(3.0) == [0, 0, 1, 1]
    assert free(0.4) == [0, 1, 1, 1]
    assert free(0.03) == [0, 1, 1, 1]  # the last model call: an end that is held stays held


def test_a_frame_is_free_where_another_nodes_mask_frees_it_too() -> None:
    """Differential Diffusion frees a pixel when the noise falls below its own threshold."""

    def threshold(sigma: torch.Tensor, denoise_mask: torch.Tensor, extra_options: dict[str, object]) -> torch.Tensor:
        assert extra_options == {"step": 1}
        return (denoise_mask >= 0.5).float()

    wanted = torch.tensor([0.2, 0.9]).reshape(1, 1, 1, 2).expand(3, 1, 1, 2)
    mask = HoldMask(torch.tensor([0.0, 3.0, 99.0]), threshold)(torch.full((3,), 2.0), wanted, {"step": 1})
    assert mask.flatten(1).tolist() == [[0, 0], [0, 1], [0, 1]]
