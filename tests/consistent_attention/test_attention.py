"""Consistent Self-Attention's mathematics against brute force, without the host's model."""

import pytest
import torch
import torch.nn.functional as F
from storydiffusion.nodes.consistent_attention.attention import consistent_self_attention
from storydiffusion.nodes.consistent_attention.key_bias import shared_key_bias
from storydiffusion.nodes.consistent_attention.sources import all_other_panels, panels_sharing_a_character
from storydiffusion.nodes.consistent_attention.token_sampling import (
    TokenDraw,
    draw_tokens,
    grid_tokens,
    sampled_token_count,
)
from storydiffusion.nodes.subjects.labels import BACKGROUND, label_tokens, may_read
from storydiffusion.tests.reference.tiled_attention import tiled_consistent_self_attention

HEADS = 2


def attend(q, k, v, bias=None):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def brute_force(q, k, v, *, chunks, sources, draws, weight=lambda *_: 1.0):
    """Equation 3, one query token and one head at a time, in float64.

    `weight(reader, token, source, other)` multiplies the exponential of a key of another panel.
    """
    panels, width = len(sources), q.shape[-1] // HEADS
    q, k, v = (t.double() for t in (q, k, v))
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        chunk, reader = divmod(row, panels)
        pairs = [(row, token) for token in range(k.shape[1])]
        pairs += [
            (chunk * panels + source, int(token)) for source in sources[reader] for token in draws[source].sampled
        ]
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            for token in range(q.shape[1]):
                scores = torch.stack([q[row, token, part] @ k[r, t, part] for r, t in pairs]) / width**0.5
                factors = [1.0 if r == row else weight(reader, token, r - chunk * panels, t) for r, t in pairs]
                weights = scores.exp() * torch.tensor(factors, dtype=torch.float64)
                weights = weights / weights.sum()
                out[row, token, part] = sum(w * v[r, t, part] for w, (r, t) in zip(weights, pairs, strict=True))
    return out


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("panels", [1, 2, 3, 7])
@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
def test_equals_brute_force(chunks, panels, rate):
    generator = torch.Generator().manual_seed(1)
    tokens = 6
    q, k, v = (torch.randn(chunks * panels, tokens, 8, generator=generator) for _ in range(3))
    sharing = {
        "chunks": chunks,
        "sources": all_other_panels(panels),
        "draws": [draw_tokens(tokens, rate, draw=(0, panel)) for panel in range(panels)],
    }
    ours = consistent_self_attention(q, k, v, attend=attend, **sharing)
    assert relative_error(ours, brute_force(q, k, v, **sharing)) <= 1e-6


def test_routing_by_character_equals_brute_force():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2 * 4, 6, 8, generator=generator) for _ in range(3))
    sharing = {
        "chunks": 2,
        "sources": panels_sharing_a_character([("Bob",), ("Ann",), (), ("Ann", "Bob")]),
        "draws": [draw_tokens(6, 0.5, draw=(panel,)) for panel in range(4)],
    }
    ours = consistent_self_attention(q, k, v, attend=attend, **sharing)
    assert relative_error(ours, brute_force(q, k, v, **sharing)) <= 1e-6


def test_gathering_after_projection_equals_projecting_the_gathered_tokens():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 16, 8, generator=generator, dtype=torch.float64)
    to_q, to_k, to_v = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    draws = [draw_tokens(16, 0.5, draw=(panel,)) for panel in range(3)]
    ours = consistent_self_attention(
        hidden @ to_q,
        hidden @ to_k,
        hidden @ to_v,
        chunks=1,
        sources=all_other_panels(3),
        draws=draws,
        attend=attend,
    )
    for i in range(3):
        s_i = torch.cat([hidden[j, draws[j].sampled] for j in range(3) if j != i])
        p_i = torch.cat([s_i, hidden[i]])[None]  # P_i = [S_i, I_i]
        torch.testing.assert_close(ours[i : i + 1], attend(hidden[i : i + 1] @ to_q, p_i @ to_k, p_i @ to_v))


def test_sources():
    assert all_other_panels(3) == [[1, 2], [0, 2], [0, 1]]
    cast = [("Bob",), ("Ann",), (), ("Ann", "Bob"), ()]
    assert panels_sharing_a_character(cast) == [[3], [3], [], [0, 1], []]


def test_panel_without_sources_is_plain_and_chunks_do_not_mix():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2 * 3, 6, 8, generator=generator) for _ in range(3))
    sharing = {
        "sources": panels_sharing_a_character([("Bob",), (), ("Bob",)]),
        "draws": [TokenDraw(torch.arange(6), torch.arange(0))] * 3,
        "attend": attend,
    }
    both = consistent_self_attention(q, k, v, chunks=2, **sharing)
    alone = consistent_self_attention(q[3:], k[3:], v[3:], chunks=1, **sharing)
    torch.testing.assert_close(both[3:], alone)
    torch.testing.assert_close(both[1::3], attend(q[1::3], k[1::3], v[1::3]))
    assert not torch.allclose(both[0], attend(q, k, v)[0])


def test_a_draw_divides_the_tokens_and_depends_on_its_key_alone():
    key = (7, 3, ("output", 1, 0), 2)
    drawn = draw_tokens(1000, 0.5, draw=key)
    assert drawn.sampled.shape == drawn.rest.shape == (500,)
    assert torch.equal(torch.cat([drawn.sampled, drawn.rest]).sort().values, torch.arange(1000))
    assert torch.equal(drawn.sampled, draw_tokens(1000, 0.5, draw=key).sampled)
    for other in [(8, *key[1:]), (7, 4, *key[2:]), (7, 3, ("output", 2, 0), 2), (*key[:3], 3)]:
        assert not torch.equal(drawn.sampled, draw_tokens(1000, 0.5, draw=other).sampled)


def test_sampling_is_the_same_in_every_process_and_version():
    """The draw is part of a picture's recipe: changing it changes every picture ever published."""
    assert draw_tokens(10, 0.5, draw=(0, 0, ("output", 0, 0), 0)).sampled.tolist() == [1, 3, 4, 6, 7]


def test_sampling_is_uniform():
    counts = torch.zeros(32)
    for draw in range(2000):
        counts[draw_tokens(32, 0.25, draw=(draw,)).sampled] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(("tokens", "rate", "count"), [(10, 0.0, 0), (10, 0.04, 0), (10, 0.5, 5), (7, 1.0, 7)])
def test_sampled_token_count(tokens, rate, count):
    assert sampled_token_count(tokens, rate) == count


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_rate_out_of_range_names_the_value(rate):
    with pytest.raises(ValueError, match=f"sampling_rate is {rate}"):
        sampled_token_count(10, rate)


def test_rows_that_are_not_whole_chunks_of_panels():
    q = torch.zeros(5, 4, 8)
    with pytest.raises(ValueError, match="5 rows"):
        consistent_self_attention(
            q,
            q,
            q,
            chunks=2,
            sources=all_other_panels(3),
            draws=[TokenDraw(torch.arange(4), torch.arange(0))] * 3,
            attend=attend,
        )


@pytest.mark.parametrize(
    ("height", "width", "rate"), [(4, 4, 0.5), (8, 8, 0.25), (5, 7, 0.3), (16, 16, 1.0), (3, 3, 0.0)]
)
def test_grid_gives_its_count_spread_evenly(height, width, rate):
    draw = grid_tokens(height, width, rate)
    assert len(draw.sampled) == round(height * width * rate)
    assert sorted([*draw.sampled.tolist(), *draw.rest.tolist()]) == list(range(height * width))


def test_grid_at_half_is_the_chequerboard_and_at_a_quarter_every_other_row_and_column():
    taken = torch.zeros(64)
    taken[grid_tokens(8, 8, 0.5).sampled] = 1
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(taken.view(8, 8), ((rows + columns) % 2 == 0).float())
    taken = torch.zeros(64)
    taken[grid_tokens(8, 8, 0.25).sampled] = 1
    assert torch.equal(taken.view(8, 8), ((rows % 2 == 0) & (columns % 2 == 0)).float())


def sharing(panels, tokens, chunks=2):
    return {
        "chunks": chunks,
        "sources": all_other_panels(panels),
        "draws": [draw_tokens(tokens, 0.5, draw=(0, panel)) for panel in range(panels)],
    }


def tensors(rows, tokens):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(rows, tokens, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("weights", [[0.05] * 3, [0.5] * 3, [1.0] * 3, [4.0, 1.0, 1.0], [0.2, 1.0, 3.0]])
def test_weights_multiply_those_of_the_other_panels(weights):
    q, k, v = tensors(6, 6)
    kept = sharing(3, 6)

    def bias(reader, pool):
        own = [weights[source] for source in pool]
        return shared_key_bias(reader, pool, shared=3, own=3, weights=own, readable=None, like=q)

    def weight(_reader, _token, source, _other):
        return weights[source]

    ours = consistent_self_attention(q, k, v, attend=attend, key_bias=bias, **kept)
    assert relative_error(ours, brute_force(q, k, v, **kept, weight=weight)) <= 1e-6


@pytest.mark.parametrize("subjects_only", [False, True])
def test_labels_gate_tokens_as_a_loop_over_pairs_does(subjects_only):
    q, k, v = tensors(6, 8)
    kept = sharing(3, 8)
    generator = torch.Generator().manual_seed(5)
    present = torch.tensor([[True, True], [True, False], [True, True]])
    labels = label_tokens(torch.rand(3, 2, 8, generator=generator), present)
    assert {label for row in labels.tolist() for label in row} == {0, 1, BACKGROUND}

    def bias(reader, pool):
        def readable(source):
            given = labels[source][kept["draws"][source].sampled]
            return may_read(labels[reader], given, present[reader], subjects_only=subjects_only)

        return shared_key_bias(reader, pool, shared=4, own=4, weights=[0.5] * len(pool), readable=readable, like=q)

    def weight(reader, token, source, other):
        query, key = labels[reader, token].item(), labels[source, other].item()
        if query == key:
            return 0.5 if key != BACKGROUND or not subjects_only else 0.0
        to_or_from_background = key == BACKGROUND or (query == BACKGROUND and present[reader, key])
        return 0.5 if to_or_from_background and not subjects_only else 0.0

    ours = consistent_self_attention(q, k, v, attend=attend, key_bias=bias, **kept)
    assert relative_error(ours, brute_force(q, k, v, **kept, weight=weight)) <= 1e-6


@pytest.mark.parametrize(("panels", "window"), [(5, 2), (5, 3), (4, 4), (3, 8), (2, 1)])
def test_tiles_equal_the_mean_over_brute_force_tiles(panels, window):
    q, k, v = tensors(panels, 6)
    draws = [draw_tokens(6, 0.5, draw=(0, panel)) for panel in range(panels)]
    ours = tiled_consistent_self_attention(q, k, v, window=window, draws=draws, attend=attend)
    found = [[] for _ in range(panels)]
    for first in range(max(panels - window, 0) + 1):
        rows = list(range(first, min(first + window, panels)))
        tile = brute_force(
            *(t[rows] for t in (q, k, v)),
            chunks=1,
            sources=all_other_panels(len(rows)),
            draws=[draws[row] for row in rows],
        )
        for row, out in zip(rows, tile, strict=True):
            found[row].append(out)
    reference = torch.stack([torch.stack(results).mean(0) for results in found])
    assert relative_error(ours, reference) <= 1e-6


def test_tiles_of_no_panels_are_refused():
    with pytest.raises(ValueError, match="window is 0"):
        tiled_consistent_self_attention(*tensors(2, 6), window=0, draws=[], attend=attend)
