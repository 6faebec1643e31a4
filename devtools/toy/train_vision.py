"""Train the toy world's image encoder to know what a picture shows: who, how, where, in which colours.

python devtools/launch.py storydiffusion.devtools.toy.train_vision --out FOLDER

Everything must be readable from the embedding by a linear map; the maps are thrown away. Joints and places must be so
twice, as numbers and as one of many steps: with numbers alone the embedding has one direction for each, and the image
projection, itself linear, can't make of it what differs between places.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .animation import Moment, Shot, moment, picture_of, random_shot
from .export import write_weights
from .figure import SIZE, Kind
from .palette import CLOTHES_RGB, HAIR_RGB, SKIN_RGB
from .scenes import SCENES
from .vision import EMBED_WIDTH, new_tower, pixel_values
from .world import random_look

CLASSES = {
    "kind": len(Kind),
    "hat": 2,
    "hair": len(HAIR_RGB),
    "skin": len(SKIN_RGB),
    "top": len(CLOTHES_RGB),
    "trousers": len(CLOTHES_RGB),
    "accent": len(CLOTHES_RGB),
    "background": 2 * len(SCENES),
}
STEPS = torch.linspace(-1.75, 1.75, 15)
"""Limits between the steps of a number; for a place, 1.5 pixels apart."""
UNKNOWN = -100
"""cross_entropy's mark for what a picture doesn't show: a woman's trousers."""
NOISE = 0.08
"""Pictures of the diffusion model are not quite clean."""
BATCH, LEARNING_RATE, WARMUP = 64, 1e-3, 100


def labels_of(shot: Shot) -> list[int]:
    """The classes, in the order of CLASSES."""
    look = shot.look
    trousers = look.trousers if look.kind == Kind.MAN else UNKNOWN
    background = 2 * shot.scene + shot.mirrored
    return [look.kind, int(look.hat), look.hair, look.skin, look.top, trousers, look.accent, background]


def numbers_of(state: Moment) -> list[float]:
    """Joints and places, each with a spread of about one."""
    pose = state.pose
    hands = [(pose.left_hand[0] + 2) / 2, pose.left_hand[1] / 5, (pose.right_hand[0] - 2) / 2, pose.right_hand[1] / 5]
    feet = [(pose.left_foot[0] + 2) / 1.5, (pose.left_foot[1] - 7) / 1.5]
    feet += [(pose.right_foot[0] - 2) / 1.5, (pose.right_foot[1] - 7) / 1.5]
    return [*hands, *feet, pose.lift / 2, (state.x - SIZE / 2) / 6, (state.balloon - SIZE / 2) / 12]


class Reader(nn.Module):
    """The encoder with the linear maps that read its embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.tower = new_tower(seed)
        numbers = len(numbers_of(moment(random_example(np.random.default_rng(0)), 0)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.classes = nn.Linear(EMBED_WIDTH, sum(CLASSES.values()))
            self.numbers = nn.Linear(EMBED_WIDTH, numbers)
            self.steps = nn.Linear(EMBED_WIDTH, numbers * (len(STEPS) + 1))

    def forward(self, pixels: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """(B, 3, 32, 32) to logits of each class, to the numbers (B, n), and to logits of their steps (B, steps, n)."""
        embeds = self.tower(pixel_values=pixels).image_embeds
        classes = self.classes(embeds).split([*CLASSES.values()], dim=1)
        return classes, self.numbers(embeds), self.steps(embeds).unflatten(1, (len(STEPS) + 1, -1))


def random_example(rng: np.random.Generator) -> Shot:
    return random_shot(rng, random_look(rng, Kind(int(rng.integers(2)))))


def batch(rng: np.random.Generator, size: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (size, 3, 32, 32), classes (size, len(CLASSES)) and numbers (size, n)."""
    shots = [random_example(rng) for _ in range(size)]
    states = [moment(shot, float(rng.random())) for shot in shots]
    clean = np.stack([picture_of(shot, state) for shot, state in zip(shots, states, strict=True)])
    spread = noise * rng.random((size, 1, 1, 1))
    pictures = clean + spread * rng.standard_normal(clean.shape)
    labels = torch.tensor([labels_of(shot) for shot in shots])
    return pixel_values(pictures), labels, torch.tensor([numbers_of(state) for state in states])


def loss_of(reader: Reader, pixels: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
    """Mean over classes, plus the numbers' steps and their mean squared error, which matters most for motion."""
    logits, read, steps = reader(pixels)
    classes = [F.cross_entropy(row, labels[:, index], ignore_index=UNKNOWN) for index, row in enumerate(logits)]
    stepwise = F.cross_entropy(steps, torch.bucketize(numbers, STEPS))
    return torch.stack(classes).mean() + stepwise + 4 * F.mse_loss(read, numbers)


@torch.no_grad()
def measure(reader: Reader, seed: int, count: int = 1024) -> dict[str, float]:
    """Share of classes and steps read right, and the numbers' root mean squared error, on fresh pictures."""
    pixels, labels, numbers = batch(np.random.default_rng([seed, 1]), count, 0)
    logits, read, steps = reader.eval()(pixels)
    reader.train()
    known = labels != UNKNOWN
    right = torch.stack([row.argmax(1) for row in logits], dim=1) == labels
    shares = {name: float(right[known[:, i], i].float().mean()) for i, name in enumerate(CLASSES)}
    shares["steps"] = float((steps.argmax(1) == torch.bucketize(numbers, STEPS)).float().mean())
    return shares | {"numbers": float((read - numbers).square().mean().sqrt())}


def train(out: Path, steps: int, seed: int) -> None:
    """Train from the start; at this size a run is minutes long and not resumed."""
    reader = Reader(seed)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=min(0.3, WARMUP / steps))
    begun = time.monotonic()
    for step in range(steps):
        loss = loss_of(reader, *batch(np.random.default_rng([seed, 0, step]), BATCH, NOISE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % 100 == 0:
            speed = (step + 1) * BATCH / (time.monotonic() - begun)
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} pictures/s {speed:.0f}", flush=True)
    scores = measure(reader, seed)
    print({name: round(value, 4) for name, value in scores.items()}, flush=True)
    command = "python devtools/launch.py storydiffusion.devtools.toy.train_vision --out FOLDER"
    record = {
        "command": f"{command} --steps {steps} --seed {seed}",
        "pictures": str(steps * BATCH),
        "torch": torch.__version__,
    }
    write_weights(reader.tower.state_dict(), out / "toy_vision.safetensors", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
