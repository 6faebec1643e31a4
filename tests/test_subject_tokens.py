"""Which tokens of a prompt tell of a character, with the host's own tokenizers."""

import pytest
from storydiffusion.nodes.subject_tokens import phrase_positions, subject_positions


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


def test_the_token_behind_is_nobody_elses_and_no_end_of_the_prompt(tiny_sd15):
    tokenize = tiny_sd15[1].tokenize
    assert subject_positions(tokenize, "a man a girl", {"Bob": "a man", "Ann": "a girl"}) == {
        "Bob": [1, 2],
        "Ann": [3, 4],
    }
    # A chunk holds 75 words; what comes next is read on its own and knows nothing of them.
    full = "rain " * 73 + "a man walks"
    assert subject_positions(tokenize, full, {"Bob": "a man"}) == {"Bob": [74, 75]}
