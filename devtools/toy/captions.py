"""Prompts of the toy world: phrases for what a picture shows, in varied wording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figure import Kind
from .palette import CLOTHES, HAIR
from .world import Direction, Look

_SCENE = {
    "sea": ("by the sea", "at the beach", "on the beach", "at the seaside"),
    "forest": ("in the forest", "in the woods", "among the trees", "in a forest"),
    "city": ("in the city", "in town", "in a city", "among the houses"),
    "desert": ("in the desert", "among the dunes", "in a desert"),
    "snow": ("in the snow", "in the snowy mountains", "in the mountains"),
    "night": ("at night", "under the stars", "under the night sky", "in the night"),
}
_POSE = {
    "standing": ("standing", "stands", "stands still", "is standing"),
    "waving": ("waving", "waves", "is waving", "waves hello"),
    "cheering": ("cheering", "cheers", "is cheering", "cheers with both arms up"),
    "walking": ("walking", "walks", "is walking", "goes for a walk"),
    "jumping": ("jumping", "jumps", "is jumping", "jumps up"),
}
_TOGETHER = {"standing": "stand", "waving": "wave", "cheering": "cheer", "walking": "walk", "jumping": "jump"}
_POSITION = {
    "left": ("on the left", "at the left", "to the left"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "at the right", "to the right"),
}
_SUBJECT = {Kind.MAN: ("a man", "a man", "a boy"), Kind.WOMAN: ("a woman", "a woman", "a girl")}
_WEARING = ("with", "with", "in", "wearing")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(rng: np.random.Generator, options: Sequence[str]) -> str:
    """The first wording half of the time: a small model knows few words well rather than many badly."""
    return options[0] if rng.random() < 0.5 else _pick(rng, options)


def _garment(field: str, look: Look) -> str:
    colours = tuple(CLOTHES)
    if field == "hair":
        return f"{tuple(HAIR)[look.hair]} hair"
    if field == "hat":
        return f"a {colours[look.accent]} hat".replace("a orange", "an orange")
    if field == "accent":
        return f"{colours[look.accent]} shoes"
    if field == "trousers":
        return f"{colours[look.trousers]} trousers"
    garment = "dress" if look.kind == Kind.WOMAN else "shirt"
    return f"a {colours[look.top]} {garment}".replace("a orange", "an orange")


def describe(direction: Direction, look: Look, rng: np.random.Generator) -> str:
    """The figure itself, as in a character sheet: "a man with a red hat"."""
    subject = _pick(rng, _SUBJECT[direction.kind])
    if not direction.described:
        return subject
    hair_first = direction.described[0] == "hair"
    # Nobody is "in blond hair".
    wearing = "with" if hair_first else _pick(rng, _WEARING)
    garments = " and ".join(_garment(field, look) for field in direction.described)
    return f"{subject}{_pick(rng, (' ', ', ') if wearing == 'wearing' else (' ',))}{wearing} {garments}"


def caption(scene: str | None, directions: Sequence[Direction], looks: Sequence[Look], rng: np.random.Generator) -> str:
    """A prompt for the picture; what the directions leave open goes unmentioned."""
    figures = [describe(direction, look, rng) for direction, look in zip(directions, looks, strict=True)]
    place = _phrase(rng, _SCENE[scene]) if scene else ""
    if len(figures) == 1:
        text = _alone(figures[0], directions[0], place, rng)
    elif directions[0].pose == directions[1].pose and rng.random() < 0.8:
        text = _both(figures, directions[0].pose, place, rng)
    else:
        acts = [_act(d, rng, told=0.5) for d in directions]
        clauses = [_join([figure, *act], rng) for figure, act in zip(figures, acts, strict=True)]
        text = f"{clauses[0]}{_pick(rng, (' and ', ', and ', ', '))}{clauses[1]}"
        text = _join([text, place] if rng.random() < 0.7 else [place, text], rng)
    return _punctuate(text, rng)


def _act(direction: Direction, rng: np.random.Generator, *, told: float = 1.0) -> list[str]:
    """Pose and position. Two figures stand in the order of their telling, so that theirs need not be `told`."""
    act = [_phrase(rng, _POSE[direction.pose])] if direction.pose else []
    if direction.position and rng.random() < told:
        act.append(_phrase(rng, _POSITION[direction.position]))
    return act


def _alone(figure: str, direction: Direction, place: str, rng: np.random.Generator) -> str:
    act = _act(direction, rng)
    order = int(rng.integers(4))
    if order == 0:
        return _join([place, figure, *act], rng)
    if order == 1:
        return _join([figure, *act, place], rng)
    if order == 2:
        return _join([figure, *act[:1], place, *act[1:]], rng)
    return _join([figure, " ".join([*act[:1], place, *act[1:]]).strip()], rng)


def _both(figures: Sequence[str], pose: str | None, place: str, rng: np.random.Generator) -> str:
    pair = f"{figures[0]} and {figures[1]}"
    acts = [_pick(rng, (_TOGETHER[pose], *_POSE[pose][:1])) if pose else "", place]
    return _join([pair, *acts] if rng.random() < 0.5 else [pair, " ".join(acts).strip()], rng)


def _join(parts: Sequence[str], rng: np.random.Generator) -> str:
    return _pick(rng, (", ", ", ", " ")).join(part for part in parts if part)


def _punctuate(text: str, rng: np.random.Generator) -> str:
    return f"{text}{_pick(rng, ('', '', '.'))}"
