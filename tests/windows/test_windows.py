"""Long stories in windows: the plan, and the host's UNet evaluated by it."""

import functools
import re

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.story.model import UNNAMED_CHARACTER, Panel, Story
from storydiffusion.nodes.windows.plan import PanelWindow, plan_windows
from storydiffusion.tests.helpers.sharing import prompts, share


def test_one_character_is_anchored_by_its_first_panel():
    assert plan_windows([("Bob",)] * 6, 3) == [
        PanelWindow((0, 1, 2), (0, 1, 2)),
        PanelWindow((0, 3, 4), (3, 4)),
        PanelWindow((0, 5), (5,)),
    ]


def test_anchors_are_those_of_the_characters_in_the_window():
    casts = [("Bob",), ("Ann",), ("Bob",), (), ("Ann", "Bob"), ("Eve",)]
    assert plan_windows(casts, 3) == [
        PanelWindow((0, 1, 2), (0, 1, 2)),
        PanelWindow((3,), (3,)),  # Ann and Bob together need three panels of their own
        PanelWindow((0, 1, 4), (4,)),
        PanelWindow((5,), (5,)),
    ]


@pytest.mark.parametrize("window", [2, 3, 5, 8])
@pytest.mark.parametrize("panels", [1, 2, 7, 16, 33])
def test_every_panel_is_owned_once_and_the_extra_work_is_bounded(window, panels):
    plan = plan_windows([("Bob",)] * panels, window)
    assert sorted(panel for part in plan for panel in part.owned) == list(range(panels))
    assert all(set(part.owned) <= set(part.panels) and len(part.panels) <= window for part in plan)
    work = sum(len(part.panels) for part in plan)
    assert work <= panels * window / (window - 1)


def test_no_panels_need_no_window():
    assert plan_windows([], 3) == []


def test_window_too_small_for_a_panel():
    with pytest.raises(ValueError, match=r"window is 2, but panel 3 needs 3 panels at once.*Ann, Bob.*3 or more"):
        plan_windows([("Ann",), ("Bob",), ("Ann", "Bob")], 2)


@pytest.mark.parametrize("name", ["", UNNAMED_CHARACTER])
def test_window_too_small_where_nobody_has_a_name(name):
    complaint = (
        "window is 1, but panel 2 needs 2 panels at once: itself and the one that it is drawn after. "
        "Set window to 2 or more."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        plan_windows([(name,)] * 2, 1)


@functools.cache  # a full-size text encoder on a CPU costs more than the sampling
def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model, clip, panels, story=None, window=0, rate=0.5, steps=2):
    patched = StoryApplyConsistentSelfAttention.execute(model, rate, 0, 0.0, 1.0, "decoder", window, story).result[0]
    texts = [f"a man, picture {i}" for i in range(panels)]
    rows = [encode(clip, text)[0] for text in texts]
    positive = [[torch.cat([row[0] for row in rows]), rows[0][1]]]
    negative = encode(clip, "blurry")
    latent = torch.zeros(panels, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(
        patched, noise, steps, 5.0, "ddim", "normal", positive, negative, latent, disable_pbar=True, seed=5
    )


def rows_per_call(model):
    """Rows (one chunk) of every call of the real UNet."""
    calls = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _m, args: calls.append(args[0].shape[0] // 2))
    return calls, hook


@pytest.mark.slow
def test_the_unet_never_sees_more_than_a_window(tiny_sd15):
    model, clip, _ = tiny_sd15
    calls, hook = rows_per_call(model)
    try:
        latents = sample(model, clip, 6, window=3, steps=1)
    finally:
        hook.remove()
    assert calls == [3, 3, 2]
    assert latents.isfinite().all()


@pytest.mark.slow
def test_a_story_that_fits_one_window_equals_no_window(tiny_sd15):
    model, clip, _ = tiny_sd15
    assert torch.equal(sample(model, clip, 3, window=3), sample(model, clip, 3))


@pytest.mark.slow
def test_without_sharing_windows_change_nothing(tiny_sd15):
    model, clip, _ = tiny_sd15
    torch.testing.assert_close(
        sample(model, clip, 5, window=2, rate=0.0), sample(model, clip, 5, rate=0.0), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_a_panel_is_driven_by_what_its_window_holds(tiny_sd15):
    """The first window of a story is the story cut off there; draws of tokens belong to panels, not to rows."""
    model, clip, _ = tiny_sd15
    cast = [("Bob",), ("Ann",), ("Bob",), ("Ann",)]
    story = Story(tuple(Panel("", "", names) for names in cast), "")
    windows = sample(model, clip, 4, story, window=2)
    # windows: (0, 1), (0, 2), (1, 3); Bob and Ann don't share, so the first two are plain.
    plain = sample(model, clip, 4, story, rate=0.0)
    torch.testing.assert_close(windows[:2], plain[:2], rtol=1e-3, atol=1e-3)
    whole = sample(model, clip, 4, story, steps=1)
    one_step = sample(model, clip, 4, story, window=2, steps=1)
    # After one step even the second window's panel equals the whole story's: its one source is the anchor.
    torch.testing.assert_close(one_step[2], whole[2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(one_step[2], plain[2], atol=1e-2)


def in_core_windows(model):
    """`model` with the host's own context windows, two rows each."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model,
        context_length=2,
        context_overlap=0,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="flat",
        dim=0,
        freenoise=False,
        causal_window_fix=False,
    )[0]


@pytest.mark.slow
def test_the_hosts_own_context_windows_are_honoured(tiny_sd15):
    """Rows of a core context window are panels of the story, not its first ones."""
    model, clip, _ = tiny_sd15
    windowed = in_core_windows(model)
    story = Story(tuple(Panel("", "", names) for names in [("Bob",), ("Ann",), ("Eve",), ("Eve",)]), "")
    latents = sample(windowed, clip, 4, story)
    plain = sample(model, clip, 4, story, rate=0.0)
    torch.testing.assert_close(latents[:2], plain[:2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents[2:], plain[2:], atol=1e-2)


def test_two_windowings_on_one_model_are_refused(tiny_sd15):
    with pytest.raises(ValueError, match="window is 3, but this model already has context windows"):
        StoryApplyConsistentSelfAttention.execute(in_core_windows(tiny_sd15[0]), 0.5, 0, 0.0, 1.0, "decoder", 3)


def draw_four(model):
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        *(model, noise, 1, 5.0, "euler", "normal"),
        prompts(1, 2, 3, 4),
        prompts(9),
        torch.zeros_like(noise),
        disable_pbar=True,
    )


@pytest.mark.parametrize("cache", [EasyCacheNode, LazyCacheNode])
def test_caches_that_would_mix_up_windows_are_refused(tiny_sd15, cache):
    def cached(model):
        return cache.execute(model, 0.2, 0.15, 0.95, False).result[0]

    for both in (cached(share(tiny_sd15[0], window=2)), share(cached(tiny_sd15[0]), window=2)):
        with pytest.raises(ValueError, match=r"EasyCache \(or LazyCache\) is on this model.* 4 panels"):
            draw_four(both)
    draw_four(cached(share(tiny_sd15[0], window=4)))  # a single window
    draw_four(cached(share(tiny_sd15[0])))
