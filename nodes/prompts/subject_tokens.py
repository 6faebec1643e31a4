"""Which tokens of an encoded prompt tell of a character. Host-free."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
    between two chunks of a long prompt don't hide it. No token is two characters': "a man" isn't looked for within
    another's "a man with a hat", and equal phrases stand in the prompt in the order of `subjects`. Otherwise a phrase
    that occurs twice counts where it occurs first. Marks at its ends may be missing: the tokenizer melts the last one
    of 'a man called "Bo"' with a comma behind. A phrase whose letters touch others is melted whole, and not found.
    """
    silent = set(_tokens(tokenize("")))
    spoken = [(position, token) for position, token in enumerate(_tokens(tokenize(prompt))) if token not in silent]
    tokens = [token for _, token in spoken]

    def words(phrase: str) -> list[int]:
        return [token for token in _tokens(tokenize(phrase)) if token not in silent]

    taken: set[int] = set()
    runs = dict.fromkeys(subjects, range(0))
    for name in sorted(subjects, key=lambda name: -len(words(subjects[name]))):
        phrase = subjects[name]
        runs[name] = _first_run(tokens, words(phrase), taken) or _first_run(tokens, words(_bare(phrase)), taken)
        taken.update(runs[name])
    return {name: [spoken[index][0] for index in run] for name, run in runs.items()}


def _bare(phrase: str) -> str:
    """`phrase` from its first letter or digit to its last."""
    letters = [index for index, character in enumerate(phrase) if character.isalnum()]
    return phrase[letters[0] : letters[-1] + 1] if letters else ""


def _first_run(tokens: Sequence[int], wanted: Sequence[int], taken: Container[int]) -> range:
    """Where `wanted` first stands in `tokens` with no index `taken`; empty if nowhere."""
    for start in range(len(tokens) - len(wanted) + 1):
        run = range(start, start + len(wanted))
        if tokens[start : run.stop] == wanted and not any(index in taken for index in run):
            return run
    return range(0)


def _tokens(tokens: Tokens) -> Iterable[int]:
    """All tokens of the first text encoder, in order: SDXL's two encoders see the same tokens at the same places."""
    chunks = next(iter(tokens.values()))
    # A textual inversion stands as a tensor: it names nobody.
    return (pair[0] if isinstance(pair[0], int) else -1 for chunk in chunks for pair in chunk)
