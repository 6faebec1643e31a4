"""Which tokens of an encoded prompt tell of a character. Host-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Tokens = Mapping[str, Sequence[Sequence[Sequence[Any]]]]
"""What the host's CLIP.tokenize gives: for each text encoder, chunks of (token, weight) pairs."""

SUBJECTS_KEY = "storydiffusion_subjects"
"""Entry of a conditioning's options: for each panel, {character: positions of the tokens that tell of it}."""


def subject_positions(
    tokenize: Callable[[str], Tokens], prompt: str, subjects: Mapping[str, str]
) -> dict[str, list[int]]:
    """Positions, in the encoded `prompt`, of the tokens that tell of each of `subjects`, {character: phrase}.

    These are the tokens of the phrase and the one behind it, a comma or a verb as a rule. CLIP's text encoders are
    causal: a token knows what stands before it and nothing that follows, so the first one to know a phrase with its
    last word is the one behind. It is left out where it begins another character's phrase, or ends the prompt.
    """
    phrases = phrase_positions(tokenize, prompt, subjects)
    silent = set(_tokens(tokenize("")))
    spoken = {position for position, token in enumerate(_tokens(tokenize(prompt))) if token not in silent}
    free = spoken.difference(*phrases.values())
    return {
        name: found + [position + 1 for position in found[-1:] if position + 1 in free]
        for name, found in phrases.items()
    }


def phrase_positions(
    tokenize: Callable[[str], Tokens], prompt: str, subjects: Mapping[str, str]
) -> dict[str, list[int]]:
    """Positions, in the encoded `prompt`, of the tokens of each phrase of `subjects`, {character: phrase}.

    A phrase is looked for as a run of tokens, so that weights such as "(a man:1.2)" and the start and end tokens
    between two chunks of a long prompt don't hide it. A phrase that occurs twice counts where it occurs first; one
    that the tokenizer melts into its neighbours, as happens in CJK text, has no positions.
    """
    silent = set(_tokens(tokenize("")))
    spoken = [(position, token) for position, token in enumerate(_tokens(tokenize(prompt))) if token not in silent]
    positions = {}
    for name, phrase in subjects.items():
        wanted = [token for token in _tokens(tokenize(phrase)) if token not in silent]
        starts = (i for i in range(len(spoken)) if [token for _, token in spoken[i : i + len(wanted)]] == wanted)
        first = next(starts, None)
        found = [] if first is None else spoken[first : first + len(wanted)]
        positions[name] = [position for position, _ in found]
    return positions


def _tokens(tokens: Tokens) -> Iterable[int]:
    """All tokens of the first text encoder, in order: SDXL's two encoders see the same tokens at the same places."""
    chunks = next(iter(tokens.values()))
    # A textual inversion stands as a tensor: it names nobody.
    return (pair[0] if isinstance(pair[0], int) else -1 for chunk in chunks for pair in chunk)
