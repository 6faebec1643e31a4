"""Add Reference Panels: given pictures stay as they are, and the story's panels are drawn after them."""

import re

import nodes
import pytest
import torch
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention
from storydiffusion.nodes.consistent_attention.sources import story_sources
from storydiffusion.nodes.prompts.nodes import StoryEncodePrompts
from storydiffusion.nodes.references.nodes import StoryAddReferencePanels
from storydiffusion.nodes.references.rows import add_reference_rows
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.windows.plan import plan_windows

SHEET = "[Bob] a man with a red cap\n[Ann] a girl in a blue dress"
STORY = parse_story("[Bob] walks\n[Ann] sleeps\n[Bob] reads", SHEET)


def images(count=1, size=64):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(3))


def add(vae, story=STORY, latent=None, pictures=None, references="[Bob] stands before a white wall", **weight):
    latent = {"samples": torch.zeros(len(story.panels), 4, 8, 8)} if latent is None else latent
    pictures = images() if pictures is None else pictures
    return StoryAddReferencePanels.execute(story, latent, pictures, vae, references, SHEET, **weight).result


def draw(model, clip, story, latent, rate=0.5, window=0, sampler="ddim"):
    patched = StoryApplyConsistentSelfAttention.execute(model, rate, 0, 0.0, 1.0, "decoder", window, story).result[0]
    positive, negative = StoryEncodePrompts.execute(clip, story).result
    return nodes.common_ksampler(patched, 5, 2, 5.0, sampler, "normal", positive, negative, latent)[0]["samples"]


@pytest.mark.slow
def test_references_stay_as_they_are_and_panels_follow_them(tiny_sd15):
    model, clip, vae = tiny_sd15
    story, latent, count = add(vae)
    assert count == 1
    drawn = draw(model, clip, story, latent)
    torch.testing.assert_close(drawn[:1], vae.encode(images()), rtol=1e-4, atol=1e-4)
    other = draw(model, clip, *add(vae, pictures=1 - images())[:2])
    assert not torch.allclose(drawn[1], other[1], atol=1e-2)  # Bob is drawn after his picture
    torch.testing.assert_close(drawn[2], other[2], rtol=1e-4, atol=1e-4)  # Ann is not in it
    assert not torch.allclose(drawn[3], other[3], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "same"), [("ddim", True), ("euler_ancestral", False)])
def test_panels_keep_the_noise_they_have_without_references_unless_the_sampler_adds_more(tiny_sd15, sampler, same):
    model, clip, vae = tiny_sd15
    story, latent, count = add(vae)
    alone = draw(model, clip, STORY, {"samples": torch.zeros(3, 4, 8, 8)}, rate=0.0, sampler=sampler)
    with_reference = draw(model, clip, story, latent, rate=0.0, sampler=sampler)[count:]
    assert torch.allclose(with_reference, alone, rtol=1e-3, atol=1e-3) == same


@pytest.mark.slow
def test_a_weight_of_three_is_three_equal_pictures(tiny_sd15):
    model, clip, vae = tiny_sd15
    alike = {"rate": 1.0, "sampler": "euler"}  # the host's ddim noises a masked row anew, each in its own way
    story, latent, _ = add(vae, weight=3.0)
    heavy = draw(model, clip, story, latent, **alike)[1:]
    line = "[Bob] stands before a white wall\n"
    story, latent, _ = add(vae, pictures=images().expand(3, -1, -1, -1), references=line * 3, weight=1.0)
    threefold = draw(model, clip, story, {**latent, "batch_index": [3, 3, 3, 0, 1, 2]}, **alike)[3:]
    torch.testing.assert_close(heavy, threefold, rtol=1e-3, atol=1e-3)
    light = draw(model, clip, *add(vae, weight=1.0)[:2], **alike)[1:]
    assert not torch.allclose(heavy[0], light[0], atol=1e-2)
    torch.testing.assert_close(heavy[1], light[1], rtol=1e-4, atol=1e-4)  # Ann is not in the picture


def test_references_are_read_but_do_not_read():
    story = add_story()
    assert story_sources(story) == [[], [0, 3], [], [0, 1]]


class Encoder:
    """The node asks a VAE for nothing but latents of the pictures."""

    def encode(self, pixels):
        return torch.zeros(pixels.shape[0], 4, 8, 8)


def add_story(story=STORY, references="[Bob] stands before a white wall", sheet=SHEET):
    latent = {"samples": torch.zeros(len(story.panels), 4, 8, 8)}
    pictures = images(len(references.splitlines()))
    return StoryAddReferencePanels.execute(story, latent, pictures, Encoder(), references, sheet).result[0]


class TestNames:
    """Whose picture it is: tags of this node against those of the story."""

    @pytest.mark.parametrize(
        ("references", "sheet"),
        [("[bob] stands", ""), ("[ＢＯＢ] stands", ""), ("[Bob] stands", "[bob] a man"), ("stands", "[bob] a man")],
    )
    def test_another_spelling_is_the_same_character(self, references, sheet):
        story = add_story(references=references, sheet=sheet)
        assert story.panels[0].characters == tuple(story.panels[0].subjects) == ("Bob",)
        assert story_sources(story) == [[], [0, 3], [], [0, 1]]

    def test_the_words_of_the_pictures_prompt_stay(self):
        picture = add_story(references="[bob] stands", sheet="").panels[0]
        assert (picture.prompt, picture.subjects) == ("bob stands", {"Bob": "bob"})

    def test_a_story_that_names_nobody(self):
        story = add_story(parse_story("a man walks\n[NC] rain\nhe sleeps"), "a man", "")
        assert story_sources(story) == [[], [0, 3], [], [0, 1]]

    def test_pictures_in_front_of_pictures(self):
        story = add_story(add_story(references="[Bob] stands"), "[Bob] sits")
        assert story_sources(story) == [[], [], [0, 1, 4], [], [0, 1, 2]]

    @pytest.mark.parametrize(
        ("references", "sheet", "complaint"),
        [
            ("[Bob] sits\n[Rob] stands", "", r"picture 2: .*\('stands'\) names \[Rob\]\. .* are \[Bob\], \[Ann\]"),
            ("a white wall", "", r"picture 1: .* names no character\. The story's characters are \[Bob\], \[Ann\]"),
            ("[NC] a wall\n[Bob] sits", "", r"picture 1: .* names no character\. "),
        ],
    )
    def test_a_picture_at_which_nobody_would_look(self, references, sheet, complaint):
        with pytest.raises(ValueError, match=complaint):
            add_story(references=references, sheet=sheet)

    def test_a_name_for_a_story_that_names_nobody(self):
        with pytest.raises(ValueError, match=r"names \[Bob\]\. The story names no character: .* without tags"):
            add_story(parse_story("a man walks\nhe sleeps"), "[Bob] stands", "")

    def test_a_story_without_characters(self):
        with pytest.raises(ValueError, match="No panel of the story has a character"):
            add_story(parse_story("[NC] rain\n[NC] snow", "[Bob] a man"), "[Bob] stands")

    def test_an_earlier_picture_is_no_panel_that_looks(self):
        with pytest.raises(ValueError, match=r"names \[Eve\]\. .* are \[Bob\], \[Ann\]"):
            add_story(add_story(references="[Bob] and [Eve] stand", sheet=""), "[Eve] stands", "")


def test_references_are_the_anchors_of_windows():
    casts = [panel.characters for panel in add_story().panels]
    assert [window.panels for window in plan_windows(casts, 2)] == [(0, 1), (2,), (0, 3)]


@pytest.mark.slow
def test_references_reach_the_panels_of_every_window(tiny_sd15):
    """Two pictures and six panels in windows of four, (0 1 2 3), (0 1 4 5) and (1 6 7).

    The first picture, Bob's, reaches his panels in both windows that hold it. Ann's panels see but the second picture:
    no panel that stands in a window with hers when she is alone shows both.
    """
    model, clip, vae = tiny_sd15
    story = parse_story("[Bob] walks\n[Ann] sits\n[Bob] and [Ann] run\n[Bob] eats\n[Ann] reads\n[NC] the sea", SHEET)
    pictures = images(2)
    others = torch.cat([1 - pictures[:1], pictures[1:]])

    def with_pictures(batch):
        drawn_after, latent, count = add(vae, story, pictures=batch, references="[Bob] stands\n[Bob] and [Ann] stand")
        return draw(model, clip, drawn_after, latent, window=4)[count:]

    difference = (with_pictures(pictures) - with_pictures(others)).abs().amax((1, 2, 3))
    assert (difference[[0, 2, 3]] > 1e-4).all()  # little in two steps on random weights, but no rounding
    assert (difference[[1, 4, 5]] < 1e-6).all()


def test_rows_masks_and_noise_numbers():
    latent = {"samples": torch.zeros(2, 4, 8, 8), "noise_mask": torch.full((1, 64, 64), 0.5), "batch_index": [4, 7]}
    rows = add_reference_rows(latent, torch.ones(3, 4, 8, 8))
    assert rows["samples"].shape == (5, 4, 8, 8)
    assert rows["noise_mask"][:, 0, 0, 0].tolist() == [0, 0, 0, 0.5, 0.5]
    assert rows["batch_index"] == [8, 9, 10, 4, 7]


class TestErrors:
    @pytest.mark.parametrize(
        ("latent", "complaint"),
        [
            ({"samples": torch.zeros(2, 4, 1, 8, 8)}, r"latent gives a batch of the shape \(2, 4, 1, 8, 8\)"),
            ({"batch_index": []}, "batch_index numbers 0 rows, but it has 2"),
            ({"noise_mask": torch.zeros(8)}, r"noise mask has the shape \(8,\)"),
            ({"noise_mask": torch.zeros(2, 0, 8)}, r"noise mask has the shape \(2, 0, 8\)"),
            ({"noise_mask": torch.zeros(3, 8, 8)}, "noise mask has 3 rows; it must have 1 or 2"),
        ],
    )
    def test_latent_batches_that_are_none(self, latent, complaint):
        with pytest.raises(ValueError, match=complaint):
            add_reference_rows({"samples": torch.zeros(2, 4, 8, 8)} | latent, torch.zeros(1, 4, 8, 8))

    def test_a_vae_for_videos(self):
        with pytest.raises(ValueError, match=r"vae gives a batch of the shape \(1, 4, 1, 8, 8\).*no video"):
            add_reference_rows({"samples": torch.zeros(2, 4, 8, 8)}, torch.zeros(1, 4, 1, 8, 8))

    @pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 64, 1), (1, 0, 64, 3)])
    def test_pictures_that_are_none(self, shape):
        with pytest.raises(ValueError, match=rf"images has the shape {re.escape(str(shape))}"):
            add(None, pictures=torch.zeros(shape))

    def test_size(self, tiny_sd15):
        with pytest.raises(ValueError, match=r"encode to 16 x 16 latents, but the latent batch is 8 x 8"):
            add(tiny_sd15[2], pictures=images(size=128))

    @pytest.mark.parametrize("weight", [0.0, 20.0])
    def test_weight(self, tiny_sd15, weight):
        with pytest.raises(ValueError, match=rf"weight is {weight}; it must lie between 0\.1 and 16\.0"):
            add(tiny_sd15[2], weight=weight)

    def test_a_replacement_by_another_node_cannot_weigh_pictures(self, tiny_sd15):
        model, _, vae = tiny_sd15
        owned = model.clone()
        owned.set_model_attn1_replace(lambda q, k, v, options: q, "output", 1)

        def share(weight, strength=1.0):
            story = add(vae, weight=weight)[0]
            StoryApplyConsistentSelfAttention.execute(owned, 0.5, 0, 0.0, 1.0, "decoder", 0, story, strength)

        with pytest.raises(ValueError, match="set strength and the weight of reference panels to 1"):
            share(3.0)
        share(1.0)
        share(3.0, strength=0.0)  # nothing is shared, so there is nothing to weigh

    def test_number_of_descriptions(self, tiny_sd15):
        with pytest.raises(ValueError, match="references describes 1 pictures, but images holds 2"):
            add(tiny_sd15[2], pictures=images(2))

    @pytest.mark.parametrize(
        ("references", "complaint"),
        [
            ("\n", "^references is empty"),
            ("[Bob] stands\n[Rob] sits", r"References, line 2 \('\[Rob\] sits'\): \[Rob\] is not in the characters"),
            ("a white wall", r"describes \[Bob\], \[Ann\], but the references field names none of them"),
        ],
    )
    def test_text_errors_name_this_nodes_input(self, references, complaint):
        with pytest.raises(ValueError, match=complaint):
            add_story(references=references)

    def test_number_of_panels(self, tiny_sd15):
        with pytest.raises(ValueError, match="story has 3 panels, but the latent batch has 2"):
            add(tiny_sd15[2], latent={"samples": torch.zeros(2, 4, 8, 8)})

    def test_other_vae(self):
        with pytest.raises(ValueError, match=r"vae gives 16 latent channels, but the latent batch has 4"):
            add_reference_rows({"samples": torch.ones(2, 4, 8, 8)}, torch.ones(1, 16, 8, 8))
