"""The toy world's image encoder is a genuine CLIP_VISION, and its embedding knows what a picture shows."""

from __future__ import annotations

from typing import Any

import comfy.clip_model
import numpy as np
import pytest
import safetensors.torch
import torch
from storydiffusion.devtools.toy.animation import moment, picture_of
from storydiffusion.devtools.toy.train_vision import (
    CLASSES,
    Reader,
    batch,
    labels_of,
    loss_of,
    numbers_of,
    random_example,
)
from storydiffusion.devtools.toy.vision import (
    CONFIG,
    WEIGHTS,
    encode_pictures,
    enlarge,
    load_vision,
    new_tower,
    pixel_values,
)


@pytest.fixture(scope="module")
def clip_vision() -> Any:
    return load_vision()


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, their classes and their numbers."""
    rng = np.random.default_rng(11)
    shots = [random_example(rng) for _ in range(2100)]
    states = [moment(shot, float(rng.random())) for shot in shots]
    pairs = list(zip(shots, states, strict=True))
    images = np.stack([picture_of(*pair) for pair in pairs])
    return images, np.array([labels_of(shot) for shot in shots]), np.array([numbers_of(state) for state in states])


def test_short_way_to_pixel_values_is_the_host_s_own() -> None:
    images = np.random.default_rng(0).random((3, 32, 32, 3)).astype(np.float32)
    host = comfy.clip_model.clip_preprocess(enlarge(images), size=CONFIG["image_size"])
    assert torch.equal(pixel_values(images), host)


def test_short_way_through_the_encoder_is_the_host_s_own(clip_vision: Any, pictures: Any) -> None:
    hidden, embeds = encode_pictures(clip_vision, pictures[0][:4])
    output = clip_vision.encode_image(enlarge(pictures[0][:4]))
    assert torch.equal(hidden, output["penultimate_hidden_states"].float())
    assert torch.equal(embeds, output["image_embeds"].float())


def test_host_and_transformers_agree_on_the_shipped_weights(clip_vision: Any, pictures: Any) -> None:
    tower = new_tower(0).eval()
    tower.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(WEIGHTS).items()})
    with torch.no_grad():
        expected = tower(pixel_values=pixel_values(pictures[0][:8])).image_embeds
        found = clip_vision.encode_image(enlarge(pictures[0][:8]))["image_embeds"]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_a_linear_map_reads_figure_and_pose_off_the_embedding(clip_vision: Any, pictures: Any) -> None:
    """Fitted on 1800 pictures, tried on 300 others; guessing the mean would explain nothing."""
    images, classes, numbers = pictures
    with torch.no_grad():
        embeds = clip_vision.encode_image(enlarge(images))["image_embeds"].double().numpy()
    inputs = np.concatenate([embeds, np.ones((len(embeds), 1))], axis=1)
    tops = np.eye(CLASSES["top"])[classes[:, list(CLASSES).index("top")]]
    wanted = np.concatenate([numbers, tops], axis=1)
    fitted = np.linalg.lstsq(inputs[:1800], wanted[:1800], rcond=None)[0]
    read = inputs[1800:] @ fitted
    errors, spread = (read - wanted[1800:]) ** 2, (wanted[1800:] - wanted[:1800].mean(0)) ** 2
    explained = 1 - errors.sum(0) / spread.sum(0)
    count = numbers.shape[1]
    assert explained[:count].min() > 0.5  # hands that hang before a dress of their colour are the hardest
    assert explained[count - 2] > 0.95  # where the figure stands
    right = read[:, count:].argmax(1) == tops[1800:].argmax(1)
    assert right.mean() > 0.9


def test_weights_of_another_encoder_are_refused(tmp_path: Any) -> None:
    weights = safetensors.torch.load_file(WEIGHTS)
    weights.pop("visual_projection.weight")
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"missing \['visual_projection.weight'\]"):
        load_vision(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_training_lowers_the_loss() -> None:
    reader = Reader(0)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    data = batch(np.random.default_rng(0), 16, 0.0)
    losses = []
    for _ in range(12):
        loss = loss_of(reader, *data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
