"""What benchmarks count without running it is what running it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from storydiffusion.benchmarks.measuring.live_tensors import LiveTensors
from storydiffusion.benchmarks.training_cost.preparation import count_latents, count_tokens
from storydiffusion.benchmarks.training_cost.training import Cost, Training, count, hours, paper_configs
from storydiffusion.benchmarks.unet_step import counted
from storydiffusion.smp.training.config import TrainConfig
from storydiffusion.smp.training.run.measure import random_run
from torch.utils.flop_counter import FlopCounterMode

SEMANTIC, DECODING = paper_configs()
KIB = torch.zeros(256)


def test_live_tensors_are_counted_while_they_live_and_what_was_there_before_is_not() -> None:
    with LiveTensors() as tensors:
        view = KIB[:128] + 0  # half a KiB beside a view of what was there
        assert tensors.live == 512
        both = torch.cat([KIB, view])
        assert tensors.live == 512 + 1536
        del view, both
        assert tensors.live == 0
        KIB.add_(0)
    assert tensors.peak == 2048


@pytest.mark.slow
@pytest.mark.parametrize("panels", [2, 3])
def test_sharing_costs_what_its_further_keys_cost(panels: int) -> None:
    """SDXL's decoder at 256 x 256 pixels: 6 layers of 640 channels at 16 x 16, 30 of 1280 at 8 x 8; with guidance."""
    rate = 0.5
    stock, ours, mask = counted(panels, rate, size=256).values()
    # Queries x keys x channels, a product each for scores and values, a multiplication and an addition each.
    own = 2 * panels * 4 * (6 * 256**2 * 640 + 30 * 64**2 * 1280) / 1e12
    assert ours.tflop - stock.tflop == pytest.approx(own * rate * (panels - 1), rel=1e-3)
    assert mask.tflop - stock.tflop == pytest.approx(own * (panels - 1), rel=1e-3)


def small(**changes: Any) -> TrainConfig:
    predictor = {"layers": 2, "hidden": 64, "heads": 2, "head_dim": 32}
    return replace(SEMANTIC, micro_batch=2, frames=4, predictor=predictor, **changes)


def run_for_real(config: TrainConfig) -> Cost:
    with LiveTensors() as tensors:
        training = Training(config, *random_run(replace(config, global_batch=config.micro_batch)))
        training.advance()
        training.advance()
        gigabytes = tensors.peak / 1e9
        with FlopCounterMode(display=False) as operations:
            training.advance()
    return Cost(operations.get_total_flops() / 1e12, gigabytes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_counted_is_what_a_real_pass_takes(precision: Any) -> None:
    config = small(mixed_precision=precision)
    counted, real = count(config), run_for_real(config)
    assert counted.gigabytes == pytest.approx(real.gigabytes, rel=0.02)
    # Fused attention isn't counted in the real pass; here it is little beside the layers.
    assert real.tflop <= counted.tflop <= 1.1 * real.tflop


@pytest.mark.slow
def test_a_transformer_takes_six_operations_for_each_weight_and_token() -> None:
    """The rule of thumb for training: two forward, four backward; attention itself comes on top."""
    clips, frames, tokens, weights = 2, SEMANTIC.frames, 16, 94.0e6
    counted = count(replace(SEMANTIC, micro_batch=clips)).tflop * 1e12
    assert counted == pytest.approx(6 * weights * clips * frames * tokens, rel=0.1)


@pytest.mark.slow
def test_the_decoding_stage_is_counted_whole() -> None:
    # Weights, gradients, average and two moments of 566.4M trained parameters, and the UNet's in half precision.
    held = 20 * 566.4e6 + 2 * 0.86e9
    assert held < count(replace(DECODING, micro_batch=1)).gigabytes * 1e9 < 1.2 * held


@pytest.mark.slow
def test_twice_the_clips_are_twice_the_operations_and_more_memory() -> None:
    one, two = (count(replace(small(), micro_batch=clips, global_batch=clips)) for clips in (1, 2))
    assert two.tflop == pytest.approx(2 * one.tflop, rel=0.01)
    assert two.gigabytes > one.gigabytes


@pytest.mark.slow
def test_a_clips_encoding_is_counted_whole() -> None:
    """The image tower of ViT-H-14 has 630.8M weights and sees 257 tokens a frame; each is a multiplication and an
    addition. Attention and the resampler come on top."""
    tokens = count_tokens(DECODING)
    assert tokens.tflop * 1e12 == pytest.approx(2 * 630.8e6 * 257 * DECODING.frames, rel=0.06)
    assert tokens.gigabytes > 6 * 0.63  # weights in 32 bits, and in 16 for the products
    latents, half = count_latents(DECODING), count_latents(replace(DECODING, frames=DECODING.frames // 2))
    assert latents.tflop == pytest.approx(2 * half.tflop)
    # The four levels' residual convolutions, 3 x 3, at 256 to 32 pixels a side, two blocks of two each; the first of a
    # level also widens. They are most of an encoder that has little else: downsampling, the middle, its attention.
    widths, sides = [128, 128, 256, 512, 512], [256, 128, 64, 32]
    levels = [
        9 * side**2 * (into * out + 3 * out**2) for into, out, side in zip(widths, widths[1:], sides, strict=False)
    ]
    assert 0.8 < 2 * sum(levels) * DECODING.frames / (latents.tflop * 1e12) < 1


def test_hours_are_operations_over_the_rate() -> None:
    config = replace(SEMANTIC, iterations=3600, global_batch=16, micro_batch=4)
    assert hours(config, Cost(tflop=2.0, gigabytes=1.0), devices=8, tflops=1.0) == pytest.approx(1.0)
