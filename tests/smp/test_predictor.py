"""The Semantic Motion Predictor and the interpolation it starts from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from storydiffusion.smp.config import SMPConfig
from storydiffusion.smp.interpolation import interpolate_linear, interpolate_spherical
from storydiffusion.smp.predictor import SemanticMotionPredictor
from torch import nn
from torch.nn import functional as F

SMALL = SMPConfig(tokens=3, width=20, hidden=32, layers=2, heads=3, head_dim=4, max_frames=6)


def tokens(seed: int, batch: int = 2, config: SMPConfig = SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.tokens, config.width, generator=generator)


def scrambled(config: SMPConfig) -> SemanticMotionPredictor:
    """A predictor whose every weight is random, the zero ones too."""
    generator = torch.Generator().manual_seed(1)
    predictor = SemanticMotionPredictor(config)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return predictor


@pytest.mark.parametrize("frames", [2, 5, 6, 40])
@pytest.mark.parametrize("pin_ends", [False, True])
def test_untrained_is_the_linear_interpolation_bit_for_bit(frames: int, pin_ends: bool) -> None:
    predictor = SemanticMotionPredictor(dataclasses.replace(SMALL, pin_ends=pin_ends))
    start, end = tokens(1), tokens(2)
    predicted = predictor(start, end, frames)
    assert predicted.shape == (2, frames, SMALL.tokens, SMALL.width)
    assert torch.equal(predicted, interpolate_linear(start, end, frames))
    assert torch.equal(predicted[:, 0], start)
    assert torch.equal(predicted[:, -1], end)


def test_paper_size_has_768_attention_channels_inside_1024() -> None:
    with torch.device("meta"):
        predictor = SemanticMotionPredictor(SMPConfig())
    assert len(predictor.layers) == 8
    shapes = {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()}
    assert shapes["layers.7.attn.to_q.weight"] == (12 * 64, 1024)
    assert shapes["layers.7.attn.to_out.weight"] == (1024, 12 * 64)


@pytest.mark.slow
def test_paper_size_untrained_is_exact_too() -> None:
    config = SMPConfig()
    predictor = SemanticMotionPredictor(config)
    start, end = tokens(1, 1, config), tokens(2, 1, config)
    with torch.inference_mode():
        assert torch.equal(predictor(start, end, 4), interpolate_linear(start, end, 4))


def test_pinned_ends_hold_and_the_frames_between_move() -> None:
    start, end = tokens(1), tokens(2)
    free, pinned = scrambled(SMALL), scrambled(dataclasses.replace(SMALL, pin_ends=True))
    free_frames, pinned_frames = free(start, end, 6), pinned(start, end, 6)
    assert torch.equal(pinned_frames[:, 0], start)
    assert torch.equal(pinned_frames[:, -1], end)
    assert torch.equal(pinned_frames[:, 1:-1], free_frames[:, 1:-1])
    assert (free_frames[:, 0] - start).abs().max() > 0.01
    assert (free_frames - interpolate_linear(start, end, 6)).abs().amax(dim=(0, 2, 3)).min() > 0.01


def test_residual_adds_the_interpolation() -> None:
    start, end = tokens(1), tokens(2)
    residual, direct = scrambled(SMALL), scrambled(dataclasses.replace(SMALL, residual=False))
    line = interpolate_linear(start, end, 6)
    torch.testing.assert_close(residual(start, end, 6) - line, direct(start, end, 6), atol=1e-5, rtol=0)


def test_pairs_of_a_batch_do_not_mix() -> None:
    predictor = scrambled(SMALL)
    start, end = tokens(1, 3), tokens(2, 3)
    together = predictor(start, end, 6)
    for pair in range(3):
        alone = predictor(start[pair : pair + 1], end[pair : pair + 1], 6)
        torch.testing.assert_close(together[pair : pair + 1], alone, atol=1e-5, rtol=1e-5)


def test_frames_see_their_time_and_tokens_their_slot() -> None:
    predictor = scrambled(dataclasses.replace(SMALL, residual=False))
    still = torch.ones(1, SMALL.tokens, SMALL.width)
    frames = predictor(still, still, 6)
    assert (frames[:, 1:] - frames[:, :-1]).abs().amax(dim=-1).min() > 1e-3
    assert (frames[:, :, 1:] - frames[:, :, :-1]).abs().amax(dim=-1).min() > 1e-3


def as_torchs_transformer(predictor: SemanticMotionPredictor) -> nn.TransformerEncoder:
    """torch's own pre-norm transformer with the predictor's weights; attention must be as wide as what is inside."""
    config = predictor.config
    layer = nn.TransformerEncoderLayer(
        config.hidden,
        config.heads,
        4 * config.hidden,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    encoder = nn.TransformerEncoder(layer, config.layers, norm=predictor.norm_out, enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, predictor.layers, strict=True):
        attention = ours.attn
        weights = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        theirs.self_attn.in_proj_weight.data = weights
        theirs.self_attn.in_proj_bias.data.zero_()
        theirs.self_attn.out_proj = attention.to_out
        theirs.linear1, theirs.linear2 = ours.mlp[0], ours.mlp[2]
        theirs.norm1, theirs.norm2 = ours.norm1, ours.norm2
    return encoder.eval()


@pytest.mark.parametrize("frames", [2, 6, 9])
def test_motion_is_torchs_own_transformer_on_line_time_and_slot(frames: int) -> None:
    config = dataclasses.replace(SMALL, hidden=12)
    predictor = scrambled(config)
    start, end = tokens(1), tokens(2)
    time = torch.linspace(0, 1, frames)
    # 32 waves, from half a period in the whole transition to half a period a frame of the longest trained one.
    waves = torch.stack([torch.pi * time * (config.max_frames - 1) ** (number / 31) for number in range(32)], dim=1)
    with torch.no_grad():
        when = predictor.time_embedding(torch.cat([waves.sin(), waves.cos()], dim=1))
        line = interpolate_linear(start, end, frames)
        x = predictor.proj_in(line) + when[:, None] + predictor.token_embedding.weight
        motion = predictor.proj_out(as_torchs_transformer(predictor)(x.flatten(1, 2)).view_as(x))
        torch.testing.assert_close(predictor(start, end, frames), line + motion, atol=1e-4, rtol=1e-4)


def test_it_learns_a_motion_that_interpolation_cannot_make() -> None:
    torch.manual_seed(0)
    predictor = SemanticMotionPredictor(SMALL)
    start, end = tokens(1, 4), tokens(2, 4)
    line = interpolate_linear(start, end, 6)
    target = line + torch.sin(torch.linspace(0, torch.pi, 6))[:, None, None]  # an arc above the line
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.mse_loss(predictor(start, end, 6), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * F.mse_loss(line, target).item()


def test_linear_is_straight_and_spherical_keeps_the_length_of_equal_tokens() -> None:
    start, end = F.normalize(tokens(1), dim=-1) * 3, F.normalize(tokens(2), dim=-1) * 3
    linear, spherical = interpolate_linear(start, end, 5), interpolate_spherical(start, end, 5)
    torch.testing.assert_close(linear[:, 2], (start + end) / 2)
    torch.testing.assert_close(spherical.norm(dim=-1), torch.full((2, 5, SMALL.tokens), 3.0))
    assert linear[:, 2].norm(dim=-1).max() < 2.9
    angles = F.cosine_similarity(spherical[:, 1:], spherical[:, :-1], dim=-1).acos()
    torch.testing.assert_close(angles, angles[:, :1].expand_as(angles), atol=1e-4, rtol=1e-4)


def test_spherical_length_goes_linearly_and_the_ends_are_exact() -> None:
    start, end = F.normalize(tokens(1), dim=-1) * 2, F.normalize(tokens(2), dim=-1) * 4
    frames = interpolate_spherical(start, end, 5)
    lengths = torch.linspace(2, 4, 5)[None, :, None].expand(2, 5, SMALL.tokens)
    torch.testing.assert_close(frames.norm(dim=-1), lengths)
    assert torch.equal(frames[:, 0], start)
    assert torch.equal(frames[:, -1], end)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_spherical_is_linear_where_no_great_circle_is_defined(factor: float) -> None:
    start = tokens(1)
    frames = interpolate_spherical(start, start * factor, 5)
    torch.testing.assert_close(frames, interpolate_linear(start, start * factor, 5))


def test_errors_name_what_is_wrong() -> None:
    predictor = SemanticMotionPredictor(SMALL)
    with pytest.raises(ValueError, match=r"frames is 1"):
        predictor(tokens(1), tokens(2), 1)
    with pytest.raises(ValueError, match=r"tokens of shape \(3, 20\), not \(3, 19\)"):
        predictor(tokens(1)[..., :19], tokens(2)[..., :19], 4)
    with pytest.raises(ValueError, match="of one shape"):
        predictor(tokens(1), tokens(2)[:1], 4)
    with pytest.raises(ValueError, match=r"SMPConfig\.layers is 0"):
        SMPConfig(layers=0)
