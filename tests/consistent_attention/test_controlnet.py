"""ControlNet with one hint per panel, through the host's own nodes: hint i reaches panel i, whole batch or windows."""

import functools
import gc

import comfy.controlnet
import comfy.model_management
import nodes
import pytest
import torch
from storydiffusion.devtools.tiny.controlnet import TINY_SD15_CONTROL, ensure_controlnet
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.host.control_hints import WindowedHints
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.story.parser import parse_story

SIZE = 64
SHEET = "[Bob] a man with a red cap"
PANELS = 5
ACTIONS = ("walks", "sleeps", "reads", "sings", "jumps")


@pytest.fixture(scope="module")
def control(models):
    return comfy.controlnet.load_controlnet(str(ensure_controlnet(TINY_SD15_CONTROL, models / "controlnet")))


@functools.cache
def story(panels):
    return parse_story("\n".join(f"[Bob] {action}" for action in ACTIONS[:panels]), SHEET)


@functools.cache  # a full-size text encoder on a CPU costs more than the sampling
def encode(clip, panels):
    return StoryEncodePrompts.execute(clip, story(panels)).result


def hints(count=PANELS, seed=7):
    return torch.rand(count, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))


def controlled(clip, control, images, panels=PANELS, strength=1.0):
    """Positive and negative conditioning of the story, with a hint per panel."""
    positive, negative = encode(clip, panels)
    return nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, images, strength, 0.0, 1.0)


def patched(model, rate=0.0, window=0, panels=PANELS):
    return StoryApplyConsistentSelfAttention.execute(
        model,
        sampling_rate=rate,
        seed=0,
        start_percent=0.0,
        end_percent=1.0,
        blocks="decoder",
        window=window,
        story=story(panels),
    ).result[0]


def draw(model, conditioning, panels=PANELS, steps=1):
    latent = {"samples": torch.zeros(panels, 4, SIZE // 8, SIZE // 8)}
    return nodes.common_ksampler(model, 5, steps, 5.0, "ddim", "normal", *conditioning, latent)[0]["samples"]


@functools.cache
def drawn_with_one_hint(model, clip, control, panel):
    return draw(patched(model), controlled(clip, control, hints()[panel : panel + 1]))


def changed_panels(first, second):
    """Numbers of the panels that are not the same in both batches."""
    difference = (first - second).abs().amax((1, 2, 3))
    assert not ((difference > 1e-3) & (difference < 1e-2)).any(), difference  # changed or not, nothing between
    return [panel for panel, value in enumerate(difference.tolist()) if value > 1e-2]


def with_other_hint(panel):
    images = hints()
    images[panel] = hints(1, seed=8)[0]
    return images


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3], ids=["one batch", "windows"])
def test_hint_i_reaches_panel_i_and_no_other(tiny_sd15, control, window):
    """Without sharing. Windows of 3: panels 0 1 2, and then 3 and 4 with panel 0, the anchor, in front."""
    model, clip, _ = tiny_sd15
    model = patched(model, window=window)
    drawn = draw(model, controlled(clip, control, hints()), steps=2)
    for panel in (0, 3):
        other = draw(model, controlled(clip, control, with_other_hint(panel)), steps=2)
        assert changed_panels(drawn, other) == [panel]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2, 3], ids=["one batch", "windows of 2", "windows of 3"])
def test_a_panel_is_what_it_is_when_its_hint_is_the_only_one(tiny_sd15, control, window):
    """The host applies a single hint to every row, which no batching or window can get wrong."""
    model, clip, _ = tiny_sd15
    drawn = draw(patched(model, window=window), controlled(clip, control, hints()))
    for panel in range(PANELS):
        alone = drawn_with_one_hint(model, clip, control, panel)
        torch.testing.assert_close(drawn[panel], alone[panel], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_single_hint_is_for_all_windows(tiny_sd15, control):
    model, clip, _ = tiny_sd15
    conditioning = controlled(clip, control, hints(1))
    torch.testing.assert_close(
        draw(patched(model, window=2), conditioning), draw(patched(model), conditioning), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_two_controlnets_in_windows(tiny_sd15, control):
    model, clip, _ = tiny_sd15
    first = controlled(clip, control, hints(), strength=0.5)
    both = nodes.ControlNetApplyAdvanced().apply_controlnet(*first, control, hints(seed=9), 0.5, 0.0, 1.0)
    whole = draw(patched(model), both)
    torch.testing.assert_close(draw(patched(model, window=3), both), whole, rtol=1e-3, atol=1e-3)
    assert changed_panels(whole, draw(patched(model), first)) == list(range(PANELS))


@pytest.mark.slow
def test_with_sharing_a_hint_stays_within_its_window(tiny_sd15, control):
    model, clip, _ = tiny_sd15
    model = patched(model, rate=0.5, window=3)
    drawn = draw(model, controlled(clip, control, hints()))
    assert changed_panels(drawn, draw(model, controlled(clip, control, with_other_hint(4)))) == [3, 4]
    assert changed_panels(drawn, draw(model, controlled(clip, control, with_other_hint(0)))) == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_model_control_and_conditioning_are_left_as_they_were(tiny_sd15, control, window):
    model, clip, _ = tiny_sd15
    plain = draw(model, encode(clip, PANELS))
    images = hints()
    conditioning = controlled(clip, control, images)
    (applied,) = {entry[1]["control"] for half in conditioning for entry in half}
    drawn = draw(patched(model, rate=0.5, window=window), conditioning)
    assert {entry[1]["control"] for half in conditioning for entry in half} == {applied}
    assert torch.equal(applied.cond_hint_original, images.movedim(-1, 1))
    assert applied.cond_hint is None
    assert not windowed_hints()
    assert torch.equal(draw(model, encode(clip, PANELS)), plain)
    assert torch.equal(draw(patched(model, rate=0.5, window=window), conditioning), drawn)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(tiny_sd15, control):
    model, clip, _ = tiny_sd15
    conditioning = controlled(clip, control, hints())
    before = draw(patched(model, window=3), conditioning)
    calls = []

    def interrupt(_module, _args):
        calls.append(1)
        if len(calls) == 2:  # in the second window
            raise comfy.model_management.InterruptProcessingException

    hook = model.model.diffusion_model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            draw(patched(model, window=3), conditioning)
    finally:
        hook.remove()
    assert not windowed_hints()
    assert torch.equal(draw(patched(model, window=3), conditioning), before)


def windowed_hints():
    """Stand-ins for a control that are still alive: each may hold hints on the GPU."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is WindowedHints]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("count", [2, 6])
def test_number_of_hints(tiny_sd15, control, count, window):
    model, clip, _ = tiny_sd15
    with pytest.raises(ValueError, match=rf"positive conditioning has {count} hint images, but .* 5 panels"):
        draw(patched(model, window=window), controlled(clip, control, hints(count)))


def test_a_control_that_is_bound_to_its_whole_batch_is_refused_in_windows(tiny_sd15, control):
    """As Advanced-ControlNet makes them: a copy would go on asking the original for all hints."""
    model, clip, _ = tiny_sd15
    bound = control.copy()
    bound.get_control = bound.get_control
    with pytest.raises(ValueError, match=r"ControlNet of this run \(ControlNet\) can't follow its hints"):
        draw(patched(model, window=2), controlled_by(clip, bound, hints()))
    draw(patched(model, window=2), controlled_by(clip, bound, hints(1)))  # one hint for all


def controlled_by(clip, bound, images):
    """Conditioning whose control is `bound` itself, and not the copy that the host's node makes."""
    conditioning = controlled(clip, bound, images)
    for entries in conditioning:
        for _, options in entries:
            options["control"].get_control = options["control"].get_control
    return conditioning
