"""What the demo makes of the shipped video workflows, and of the videos they save."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from storydiffusion.devtools.demo.video import (
    FPS,
    clip_prompt,
    story_video_prompt,
    without_both,
    write_strip,
    write_video,
)
from storydiffusion.devtools.drivers.read_video import read_video
from storydiffusion.devtools.toy.animation import FRAMES
from storydiffusion.devtools.workflows.shipped import node_of


def test_both_graphs_run_on_the_toy_world_alone() -> None:
    for prompt in (clip_prompt(), story_video_prompt()):
        loaders = {node["class_type"] for node in prompt.values() if "Loader" in node["class_type"]}
        assert loaders <= {"StoryToyLoader", "StoryToyCLIPVision"}
    story = story_video_prompt()
    assert story[node_of(story, "StoryLoadSMP")]["inputs"] == {"smp": "toy_smp.safetensors", "ip_adapter": "none"}


def test_the_other_graph_differs_in_sharing_and_prediction_only() -> None:
    story = story_video_prompt()
    other = without_both(story)
    changed = {
        (story[key]["class_type"], name): (value, other[key]["inputs"][name])
        for key in story
        for name, value in story[key]["inputs"].items()
        if other[key]["inputs"][name] != value
    }
    assert changed == {
        ("StoryApplyConsistentSelfAttention", "sampling_rate"): (0.5, 0.0),
        ("StorySMPVideoDecode", "strength"): (1.0, 0.0),
    }


def test_videos_are_written_as_they_are_read(tmp_path: Path) -> None:
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, :, 48:] = (40, 120, 200)
    frames[1, :32] = 255
    read, rate = read_video(write_video(frames, tmp_path / "video.mp4"))
    assert read.shape == frames.shape
    assert rate == FPS
    assert np.abs(read.astype(int) - frames).mean() < 6


def test_strip_shows_every_transition_of_both_clips(tmp_path: Path) -> None:
    frames = np.zeros((2 * (FRAMES - 1) + 1, 256, 256, 3), np.uint8)
    strip = Image.open(write_strip(frames, frames + 200, tmp_path / "strip.png"))
    assert strip.size == (128 * FRAMES, 4 * 128 + 16)
    assert strip.getpixel((0, 0)) == (0, 0, 0)
    assert strip.getpixel((0, 128)) == (200, 200, 200)
