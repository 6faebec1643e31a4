"""Labels of tokens and what may pass between panels, against plain references."""

import pytest
import torch
from storydiffusion.nodes.story.parser import parse_story
from storydiffusion.nodes.subjects.labels import BACKGROUND, label_tokens, may_read, otsu_threshold, spread_peaks
from storydiffusion.nodes.subjects.nodes import StorySetSubjectMasks


def otsu_by_trying_all(values):
    """The cut between two neighbours with the greatest variance between the classes."""
    ordered = sorted(values.tolist())
    best, threshold = -1.0, 0.0
    for cut in range(1, len(ordered)):
        low, high = ordered[:cut], ordered[cut:]
        apart = sum(high) / len(high) - sum(low) / len(low)
        variance = len(low) * len(high) * apart**2
        if variance > best * (1 + 1e-9):
            best, threshold = variance, (ordered[cut - 1] + ordered[cut]) / 2
    return threshold


def test_otsu_equals_trying_every_cut():
    values = torch.rand(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    expected = [otsu_by_trying_all(row) for row in values]
    assert otsu_threshold(values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("size", "radius"), [((16, 16), 1), ((64, 40), 2), ((64, 64), 4), ((4, 4), 0)])
def test_a_peak_counts_for_a_sixteenth_of_the_picture_around_it(size, radius):
    maps = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    spread = spread_peaks(maps)
    assert spread.shape == maps.shape
    for row, column in ((0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, 1)):
        rows = slice(max(row - radius, 0), row + radius + 1)
        columns = slice(max(column - radius, 0), column + radius + 1)
        assert torch.equal(spread[..., row, column], maps[..., rows, columns].amax((2, 3)))


def two_characters():
    """Two panels of 8 tokens: the first character left, the second right, on scales of their own."""
    maps = torch.tensor([[0.9, 0.8, 0.9, 0, 0, 0, 0, 0.1], [0, 0, 0, 0.01, 0.02, 0.1, 0.09, 0.1]])
    return torch.stack([maps, maps.flip(-1)])


def test_labels_follow_the_maps_whatever_their_scale():
    labels = label_tokens(two_characters(), torch.ones(2, 2, dtype=torch.bool))
    assert labels[0].tolist() == [0, 0, 0, BACKGROUND, BACKGROUND, 1, 1, 1]
    assert labels[1].tolist() == [1, 1, 1, BACKGROUND, BACKGROUND, 0, 0, 0]


def test_who_is_not_there_gets_no_label():
    labels = label_tokens(two_characters(), torch.tensor([[True, False], [False, False]]))
    assert labels.tolist() == [[0, 0, 0, *[BACKGROUND] * 5], [BACKGROUND] * 8]


def test_an_empty_map_is_background():
    assert label_tokens(torch.zeros(1, 1, 6), torch.ones(1, 1, dtype=torch.bool)).tolist() == [[BACKGROUND] * 6]


@pytest.mark.parametrize(
    ("query", "key", "everything", "subjects"),
    [
        (0, 0, True, True),
        (0, 1, False, False),  # never from one character to another
        (0, BACKGROUND, True, False),
        (BACKGROUND, 0, True, False),
        (BACKGROUND, 1, False, False),  # who doesn't stand in the reading panel gives it nothing
        (BACKGROUND, BACKGROUND, True, False),
    ],
)
def test_may_read(query, key, everything, subjects):
    present = torch.tensor([True, False])
    labels = torch.tensor([query]), torch.tensor([key])
    assert may_read(*labels, present, subjects_only=False).item() == everything
    assert may_read(*labels, present, subjects_only=True).item() == subjects


MEETING = parse_story("[Bob] and [Ann] dance\n[Bob] walks\n[Ann] sleeps", "[Bob] a man\n[Ann] a girl")


def test_masks_of_nobody():
    with pytest.raises(ValueError, match="character is 'Eve'; the story's characters are: Bob, Ann"):
        StorySetSubjectMasks.execute(MEETING, "Eve", torch.zeros(1, 8, 8))


@pytest.mark.parametrize("character", ["Bob", "[bob]", " 【ＢＯＢ】\n"])
def test_masks_belong_to_the_storys_own_spelling(character):
    story = StorySetSubjectMasks.execute(MEETING, character, torch.ones(1, 8, 8)).result[0]
    assert [list(panel.masks) for panel in story.panels] == [["Bob"], ["Bob"], []]


def test_masks_of_another_count():
    with pytest.raises(ValueError, match="masks holds 2 masks, but the story has 3 panels"):
        StorySetSubjectMasks.execute(MEETING, "[Bob]", torch.zeros(1, 8, 8).expand(2, -1, -1))


def test_a_mask_without_a_batch_is_one_mask_for_all_panels():
    story = parse_story("[Bob] walks\n[Bob] reads", "[Bob] a man")
    mask = torch.rand(5, 7)
    flat, batched = (StorySetSubjectMasks.execute(story, "Bob", given).result[0] for given in (mask, mask[None]))
    for panel, expected in zip(flat.panels, batched.panels, strict=True):
        assert torch.equal(panel.masks["Bob"], expected.masks["Bob"])
        assert torch.equal(panel.masks["Bob"], mask)
