"""Pictures for the Load Image nodes of the shipped workflows, as a user would choose them: toy figures and poses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..toy.figure import POSES, Kind, Part
from ..toy.palette import Array
from ..toy.scenes import SCENES
from ..toy.world import Actor, Look, Picture, part_map, render

SIZE = 512
MINA = Look(Kind.WOMAN, hat=False, hair=3, skin=0, top=2, trousers=0, accent=0)
OTTO = Look(Kind.MAN, hat=True, hair=4, skin=0, top=6, trousers=4, accent=4)

# OpenPose's 18 points without the face's, x and y from 0 to 1, and between which of them it draws a limb.
LIMBS = (
    *(("neck", "nose"), ("neck", "right_shoulder"), ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist")),
    *(("neck", "left_shoulder"), ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist")),
    *(("neck", "right_hip"), ("right_hip", "right_knee"), ("right_knee", "right_ankle")),
    *(("neck", "left_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle")),
)
_TRUNK = {"nose": (0.5, 0.16), "neck": (0.5, 0.28), "right_shoulder": (0.41, 0.28), "left_shoulder": (0.59, 0.28)}
_HIPS = {"right_hip": (0.45, 0.54), "left_hip": (0.55, 0.54)}
Joints = dict[str, tuple[float, float]]
WAVING: Joints = {
    **_TRUNK,
    **_HIPS,
    "right_elbow": (0.37, 0.4),
    "right_wrist": (0.36, 0.52),
    "left_elbow": (0.7, 0.22),
    "left_wrist": (0.74, 0.08),
    "right_knee": (0.44, 0.73),
    "right_ankle": (0.44, 0.92),
    "left_knee": (0.56, 0.73),
    "left_ankle": (0.56, 0.92),
}
RUNNING: Joints = {
    **_TRUNK,
    **_HIPS,
    "right_elbow": (0.3, 0.38),
    "right_wrist": (0.24, 0.27),
    "left_elbow": (0.66, 0.4),
    "left_wrist": (0.76, 0.33),
    "right_knee": (0.38, 0.72),
    "right_ankle": (0.2, 0.76),
    "left_knee": (0.68, 0.62),
    "left_ankle": (0.68, 0.82),
}
SITTING: Joints = {
    **{name: (x - 0.12, y + 0.14) for name, (x, y) in {**_TRUNK, **_HIPS}.items()},
    "right_elbow": (0.3, 0.56),
    "right_wrist": (0.44, 0.62),
    "left_elbow": (0.49, 0.56),
    "left_wrist": (0.58, 0.62),
    "right_knee": (0.57, 0.66),
    "right_ankle": (0.57, 0.9),
    "left_knee": (0.66, 0.68),
    "left_ankle": (0.66, 0.9),
}
JUMPING: Joints = {
    **_TRUNK,
    **_HIPS,
    "right_elbow": (0.3, 0.18),
    "right_wrist": (0.2, 0.08),
    "left_elbow": (0.7, 0.18),
    "left_wrist": (0.8, 0.08),
    "right_knee": (0.3, 0.6),
    "right_ankle": (0.34, 0.78),
    "left_knee": (0.7, 0.6),
    "left_ankle": (0.66, 0.78),
}


def _panel(scene: str, *actors: tuple[Look, str, float]) -> Array:
    return render(Picture(SCENES.index(scene), False, tuple(Actor(look, POSES[pose], x) for look, pose, x in actors)))


def _portrait() -> Array:
    """Mina before a white wall."""
    parts = part_map(Actor(MINA, POSES["standing"], 16), alone=False)
    return np.where((parts == Part.BACKGROUND)[..., None], 1, MINA.colours()[parts])


def _pixel_art(image: Array) -> Image.Image:
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    return picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _pose(joints: Joints) -> Image.Image:
    """The pose as pose detectors draw it: one colour per limb, on black."""
    picture = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(picture)
    points = {name: (x * SIZE, y * SIZE) for name, (x, y) in joints.items()}
    for number, limb in enumerate(LIMBS):
        draw.line([points[name] for name in limb], f"hsv({360 * number // len(LIMBS)}, 100%, 85%)", SIZE // 28)
    for x, y in points.values():
        draw.ellipse((x - SIZE / 45, y - SIZE / 45, x + SIZE / 45, y + SIZE / 45), "white")
    return picture


EXAMPLES: dict[str, Callable[[], Image.Image]] = {
    "character.png": lambda: _pixel_art(_portrait()),
    "chapter_1_panel_1.png": lambda: _pixel_art(_panel("sea", (MINA, "standing", 16))),
    "chapter_1_panel_2.png": lambda: _pixel_art(_panel("city", (MINA, "waving", 9), (OTTO, "standing", 23))),
    "start.png": lambda: _pixel_art(_panel("sea", (MINA, "standing", 9))),
    "end.png": lambda: _pixel_art(_panel("sea", (MINA, "cheering", 22))),
    "pose_1.png": lambda: _pose(WAVING),
    "pose_2.png": lambda: _pose(RUNNING),
    "pose_3.png": lambda: _pose(SITTING),
    "pose_4.png": lambda: _pose(JUMPING),
}


def write_example_inputs(folder: Path) -> None:
    """Write all of them into a server's input folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in EXAMPLES.items():
        draw().save(folder / name)
