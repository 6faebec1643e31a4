"""Which tokens of a prompt tell of a character, with the host's own tokenizers."""

import pytest
from storydiffusion.nodes.prompts.subject_tokens import phrase_positions, subject_positions
from storydiffusion.nodes.story.parser import parse_story


@pytest.mark.parametrize("checkpoint", ["tiny_sd15", "tiny_sdxl"])
@pytest.mark.parametrize("prefix", ["", "rain, " * 40])
def test_positions_are_those_of_the_description_and_the_token_behind(checkpoint, prefix, request):
    clip = request.getfixturevalue(checkpoint)[1]
    prompt = f"{prefix}(a man with a red hat:1.3) and a tall girl, in a blue dress, dance"
    subjects = {"Bob": "a man with a red hat", "Ann": "a tall girl, in a blue dress", "Eve": "an old woman"}
    tokens = [token for chunk in next(iter(clip.tokenize(prompt).values())) for token, _ in chunk]
    bob, ann = (
        [token for token, _ in next(iter(clip.tokenize(text).values()))[0]][1:end]
        for text, end in (("a man with a red hat and", 8), ("a tall girl, in a blue dress,", 10))
    )
    found = subject_positions(clip.tokenize, prompt, subjects)
    assert {name: [tokens[i] for i in at] for name, at in found.items()} == {"Bob": bob, "Ann": ann, "Eve": []}
    phrases = phrase_positions(clip.tokenize, prompt, subjects)
    assert phrases == {"Bob": found["Bob"][:-1], "Ann": found["Ann"][:-1], "Eve": []}


HAT, MAN = "a man with a hat", "a man"


@pytest.mark.parametrize("sheet", ["[Bob] a man\n[Carl] a man with a hat", "[Carl] a man with a hat\n[Bob] A man"])
@pytest.mark.parametrize(
    ("story", "prompt"),
    [
        ("[Carl] and [Bob] dance", f"{HAT} and {MAN}, dance"),
        ("[Bob] and [Carl] dance", f"{MAN} and {HAT}, dance"),
    ],
)
def test_a_phrase_within_anothers_phrase_is_not_its_own(tiny_sd15, sheet, story, prompt):
    (panel,) = parse_story(story, sheet).panels
    assert panel.prompt.lower() == prompt
    carl, bob = ([1, 2, 3, 4, 5], [7, 8]) if prompt.startswith(HAT) else ([4, 5, 6, 7, 8], [1, 2])
    assert phrase_positions(tiny_sd15[1].tokenize, panel.prompt, panel.subjects) == {"Carl": carl, "Bob": bob}


@pytest.mark.parametrize(
    ("story", "prompt", "bob", "carl"),
    [
        ("[Bob] and [Carl] dance", "a man and a man, dance", [1, 2], [4, 5]),
        ("[Carl] and [Bob] dance", "a man and a man, dance", [4, 5], [1, 2]),
        ("a dog sees [Carl] and [Bob]", "a dog sees a man and a man", [7, 8], [4, 5]),
        # Whom the sentence names without describing is described in front of it, and so comes first in the prompt.
        ("a dog sees [Carl] and [Bob]'s hat", "a man, a dog sees a man and Bob's hat", [1, 2], [7, 8]),
        ("[Carl]'s dog sees [Bob] and [Carl]", "Carl's dog sees a man and a man", [5, 6], [8, 9]),
    ],
)
def test_equal_phrases_stand_in_the_order_of_the_prompt(tiny_sd15, story, prompt, bob, carl):
    (panel,) = parse_story(story, "[Bob] a man\n[Carl] a man").panels
    assert panel.prompt == prompt
    assert phrase_positions(tiny_sd15[1].tokenize, prompt, panel.subjects) == {"Bob": bob, "Carl": carl}


CJK_STORIES = [
    "[小明]和[小红]跳舞",
    "夜里【小红】看见【小明】的狗。[小红]笑了",
    "[小明][小红]跳舞",
    "「[小明]」と「[小红]」が踊る",
    "[小明]が[小红]に花をあげる",
    "[小明]은 [小红]과 춤을 춘다",
    "雨の中[小红]",
    "狗看[小明][小红]",
]


@pytest.mark.parametrize("checkpoint", ["tiny_sd15", "tiny_sdxl"])
@pytest.mark.parametrize(
    "sheet",
    [
        "[小明] 戴红帽子的男人\n[小红] 女孩，穿蓝裙子",
        "[小明] 戴红帽子的男人\n[小红] 戴红帽子的男人和狗",
        "[小明] a man in a red cap\n[小红] 女孩",
        "[小明] 赤い帽子の男\n[小红] 青い服のショウジョ",
        "[小明] 빨간 모자를 쓴 남자\n[小红] 소녀",
        "",
    ],
)
def test_characters_of_cjk_stories_are_found(checkpoint, sheet, request):
    """The tokenizer reads letters that touch as one word: each phrase has to stand alone in the prompt."""
    tokenize = request.getfixturevalue(checkpoint)[1].tokenize
    silent = token_ids(tokenize, "")
    for story in CJK_STORIES:
        (panel,) = parse_story(story, sheet, split_by="line", style="comic book").panels
        tokens = token_ids(tokenize, panel.prompt)
        found = phrase_positions(tokenize, panel.prompt, panel.subjects)
        for name, phrase in panel.subjects.items():
            expected = [token for token in token_ids(tokenize, phrase) if token not in silent]
            assert [tokens[at] for at in found[name]] == expected, (panel.prompt, name)


def token_ids(tokenize, text):
    return [token for chunk in next(iter(tokenize(text).values())) for token, _ in chunk]


@pytest.mark.parametrize("description", ['a man called "Bo"', "戴帽子的男人（老）", "“老王”", "a (tall:1.2) man!"])
def test_marks_that_melt_with_those_around_them_hide_nobody(tiny_sd15, description):
    for story in ("[Bob] walks", "他说，[Bob]，[Ann]", "he said, “[Bob]”, [Ann]"):
        (panel,) = parse_story(story, f"[Bob] {description}\n[Ann] a girl", split_by="line").panels
        assert all(phrase_positions(tiny_sd15[1].tokenize, panel.prompt, panel.subjects).values()), panel.prompt


def test_a_name_within_anothers_name(tiny_sd15):
    (panel,) = parse_story("[Ann Lee] and [Ann] dance").panels
    assert phrase_positions(tiny_sd15[1].tokenize, panel.prompt, panel.subjects) == {"Ann Lee": [1, 2], "Ann": [4]}


def test_a_phrase_that_occurs_once_is_nobody_elses(tiny_sd15):
    found = phrase_positions(tiny_sd15[1].tokenize, "a man with a hat", {"Bob": MAN, "Carl": HAT})
    assert found == {"Bob": [], "Carl": [1, 2, 3, 4, 5]}


def test_the_token_behind_is_nobody_elses_and_no_end_of_the_prompt(tiny_sd15):
    tokenize = tiny_sd15[1].tokenize
    assert subject_positions(tokenize, "a man a girl", {"Bob": "a man", "Ann": "a girl"}) == {
        "Bob": [1, 2],
        "Ann": [3, 4],
    }
    # A chunk holds 75 words; what comes next is read on its own and knows nothing of them.
    full = "rain " * 73 + "a man walks"
    assert subject_positions(tokenize, full, {"Bob": "a man"}) == {"Bob": [74, 75]}
