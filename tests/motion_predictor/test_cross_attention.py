"""Cross-attention with added keys and values, against a float64 reference and diffusers' IP-Adapter
processor."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from einops import rearrange
from storydiffusion.nodes.host.types import Attend
from storydiffusion.nodes.motion_predictor.cross_attention import (
    concat_attention,
    count_text_repeats,
    decoupled_attention,
    tokens_of_rows,
)
from torch import Tensor
from torch.nn import functional as F

HEADS = 4


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=HEADS) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h t d -> b t (h d)")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Pair = tuple[Tensor, Tensor]


def inputs(batch: int = 3, queries: int = 10, text: int = 7, motion: int = 4) -> tuple[Tensor, Pair, Pair]:
    width = HEADS * 8
    q = random(batch, queries, width, seed=0)
    text_kv = random(batch, text, width, seed=1), random(batch, text, width, seed=2)
    return q, text_kv, (random(batch, motion, width, seed=3), random(batch, motion, width, seed=4))


def brute_force(q: Tensor, text: Pair, motion: Pair, strength: float) -> Tensor:
    """Equation 6 written out: weights exp(qk) for the text, strength * exp(qk) for the motion tokens,
    float64."""
    q, text_k, text_v, motion_k, motion_v = (x.double() for x in (q, *text, *motion))
    dim = q.shape[-1] // HEADS
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in (slice(h * dim, (h + 1) * dim) for h in range(HEADS)):
            for i in range(q.shape[1]):
                total, mixed = 0.0, torch.zeros(dim, dtype=torch.float64)
                for keys, values, share in ((text_k, text_v, 1.0), (motion_k, motion_v, strength)):
                    for j in range(keys.shape[1]):
                        logit = (q[b, i, head] @ keys[b, j, head]).item() / math.sqrt(dim)
                        total += share * math.exp(logit)
                        mixed += share * math.exp(logit) * values[b, j, head]
                out[b, i, head] = mixed / total
    return out


@pytest.mark.parametrize("strength", [0.25, 1.0, 3.0])
def test_concat_is_equation_6(strength: float) -> None:
    q, text, motion = inputs()
    got = concat_attention(q, text, motion, attend, strength=strength)
    torch.testing.assert_close(got.double(), brute_force(q, text, motion, strength), atol=1e-6, rtol=0)


def repeat_row_1(whole: Tensor, short: Tensor) -> Tensor:
    return torch.stack([whole[0], short[1].repeat(2, 1), whole[2]])


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_concat_does_not_count_repeated_text_twice(strength: float) -> None:
    q, text, motion = inputs()
    repeats = [1, 2, 1]
    # Row 1's text is the first half of a longer one, repeated, as the host pads it; rows 0 and 2 are whole.
    longer = random(3, 14, 32, seed=5), random(3, 14, 32, seed=6)
    padded = repeat_row_1(longer[0], text[0]), repeat_row_1(longer[1], text[1])
    got = concat_attention(q, padded, motion, attend, strength=strength, text_repeats=repeats)
    naive = concat_attention(q, padded, motion, attend, strength=strength)
    for row, (k, v) in ((0, longer), (1, text), (2, longer)):
        only = slice(row, row + 1)
        own_motion = motion[0][only], motion[1][only]
        expected = brute_force(q[only], (k[only], v[only]), own_motion, strength)
        torch.testing.assert_close(got[only].double(), expected, atol=1e-6, rtol=0)
    assert (naive[1] - got[1]).abs().max() > 0.01  # the trap, if it were not handled


def test_strength_zero_is_the_text_alone_bit_for_bit() -> None:
    q, text, motion = inputs()
    base = attend(q, *text, None)
    assert torch.equal(concat_attention(q, text, motion, attend, strength=0, text_repeats=[2, 1, 1]), base)
    assert decoupled_attention(base, q, motion, attend, strength=0) is base


def test_full_strength_without_repeats_needs_no_mask() -> None:
    q, text, motion = inputs()
    masks: list[Tensor | None] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        masks.append(mask)
        return attend(q, k, v, mask)

    watch: Attend = watched
    concat_attention(q, text, motion, watch, text_repeats=[1, 1, 1])
    concat_attention(q, text, motion, watch, text_repeats=[1, 2, 1])
    assert masks[0] is None
    assert masks[1] is not None
    assert masks[1].shape == (3, 10, 11)


def test_a_negative_strength_is_refused() -> None:
    q, text, motion = inputs()
    with pytest.raises(ValueError, match=r"strength is -0\.5"):
        concat_attention(q, text, motion, attend, strength=-0.5)
    with pytest.raises(ValueError, match=r"strength is -0\.5"):
        decoupled_attention(q, q, motion, attend, strength=-0.5)


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.0])
def test_decoupled_equals_diffusers_ip_adapter(scale: float) -> None:
    torch.manual_seed(0)
    width, context, tokens = 64, 48, 4
    layer = DiffusersAttention(query_dim=width, cross_attention_dim=context, heads=HEADS, dim_head=width // HEADS)
    processor = IPAdapterAttnProcessor2_0(width, context, num_tokens=(tokens,), scale=scale)
    layer.set_processor(processor)
    hidden, text = random(2, 30, width, seed=1), random(2, 9, context, seed=2)
    image = random(2, tokens, context, seed=3)
    with torch.inference_mode():
        expected = layer(hidden, encoder_hidden_states=(text, [image[:, None]]))
        q, k, v = layer.to_q(hidden), layer.to_k(text), layer.to_v(text)
        motion = processor.to_k_ip[0](image), processor.to_v_ip[0](image)
        got = layer.to_out[0](decoupled_attention(attend(q, k, v, None), q, motion, attend, strength=scale))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_text_repeats_are_found_row_by_row() -> None:
    chunk = random(5, 77, 3, seed=0)
    long = random(1, 308, 3, seed=1)[0]
    half = long[:154].repeat(2, 1)
    quarter = chunk[0].repeat(4, 1)
    one_differs = quarter.clone()
    one_differs[-1, -1] += 1
    assert count_text_repeats(torch.stack([long, half, quarter, one_differs])) == [1, 2, 4, 1]
    assert count_text_repeats(chunk) is None
    assert count_text_repeats(random(1, 100, 3, seed=0)) is None
    assert count_text_repeats(chunk[:1].repeat(1, 3, 1)) == [3]


def test_tokens_follow_frames_and_chunks() -> None:
    tokens, uncond = random(5, 2, 3, seed=0), random(2, 3, seed=1)
    rows = tokens_of_rows(tokens, uncond, [4, 1], [False, True, True])
    assert rows.shape == (6, 2, 3)
    assert torch.equal(rows[:2], uncond.expand(2, 2, 3))
    assert torch.equal(rows[2:4], tokens[[4, 1]])
    assert torch.equal(rows[4:], rows[2:4])
