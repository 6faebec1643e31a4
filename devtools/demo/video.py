"""The demo's videos: a clip from text, and a story as one video with its predicted transitions."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..drivers.read_video import read_video
from ..drivers.server import ComfyServer, Prompt
from ..toy.animation import FRAMES
from ..workflows.shipped import TOY_SIZE, load_api_workflow, node_of, on_toy_video, with_inputs
from .progress import announce, show_progress

Frames = NDArray[np.uint8]
STEPS, CFG = 20, 3.0
FPS = 8
CHARACTERS = "[Bob] a man with a red hat\n"
# The prompts tell the panels; what happens between them is told by nobody.
STORY = """\
[Bob] standing, on the left, by the sea
[Bob] jumping, on the right, by the sea
[Bob] waving, in the middle, by the sea
[Bob] cheering, on the left, by the sea
"""
CLIP_TEXT = "a woman with a yellow dress, in the snow"


def clip_prompt() -> Prompt:
    """The shipped AnimateDiff workflow on the toy world."""
    changes: dict[str, dict[str, Any]] = {
        "CLIPTextEncode": {"text": ""},
        "EmptyLatentImage": {"width": TOY_SIZE, "height": TOY_SIZE, "batch_size": FRAMES},
        "KSampler": {"steps": STEPS, "cfg": CFG},
    }
    workflow = load_api_workflow("animatediff_text_to_video_sd15")
    prompt = on_toy_video(with_inputs(workflow, changes), steps=STEPS, cfg=CFG)
    positive = prompt[node_of(prompt, "KSampler")]["inputs"]["positive"][0]
    prompt[positive]["inputs"]["text"] = CLIP_TEXT
    return prompt


def story_video_prompt() -> Prompt:
    """The whole paper in one graph: story text, consistent panels, predicted transitions, one video."""
    story: dict[str, dict[str, Any]] = {
        "StoryPromptSplitter": {"story": STORY, "characters": CHARACTERS, "style": "none", "negative": ""},
        "EmptyLatentImage": {"width": TOY_SIZE, "height": TOY_SIZE},
        "KSampler": {"steps": STEPS},
    }
    return on_toy_video(with_inputs(load_api_workflow("story_to_video"), story), steps=STEPS, cfg=CFG)


def without_both(prompt: Prompt) -> Prompt:
    """The same graph with nothing shared between panels, and without the predictor's tokens."""
    return with_inputs(
        prompt,
        {"StoryApplyConsistentSelfAttention": {"sampling_rate": 0.0}, "StorySMPVideoDecode": {"strength": 0.0}},
    )


def draw_videos(server: ComfyServer, folder: Path) -> list[Path]:
    """A clip, the story's video, the same without, and both of them side by side: as a video and as a strip."""
    prompt = story_video_prompt()
    videos = {
        "clip.mp4": ("a clip from text, through the motion module", clip_prompt()),
        "story.mp4": ("a story as one video: consistent panels, predicted transitions", prompt),
        "story_without.mp4": (
            "the same without Consistent Self-Attention and without the predictor",
            without_both(prompt),
        ),
    }
    written = []
    for name, (what, workflow) in videos.items():
        announce(f"sampling {what}")
        outputs = server.run(workflow, on_progress=show_progress)
        (video,) = server.image_paths(outputs, node_of(workflow, "SaveVideo"))
        written.append(Path(shutil.copy(video, folder / name)))
    without, with_ = (read_video(folder / name)[0] for name in ("story_without.mp4", "story.mp4"))
    both = np.concatenate([without, with_], axis=2)
    return [
        *written,
        write_video(both, folder / "story_without_and_with.mp4"),
        write_strip(without, with_, folder / "story_without_and_with.png"),
    ]


def write_video(frames: Frames, path: Path) -> Path:
    """Write frames (F, H, W, 3) as the workflows' videos are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(FPS))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_strip(upper: Frames, lower: Frames, path: Path) -> Path:
    """Write both clips as pictures: transition below transition, and of each the upper clip above the lower."""
    step, shown = FRAMES - 1, TOY_SIZE // 2
    rows = []
    for first in range(0, len(upper) - 1, step):
        rows += [np.concatenate(list(clip[first : first + step + 1, ::2, ::2]), axis=1) for clip in (upper, lower)]
        rows.append(np.full((shown // 8, rows[-1].shape[1], 3), 255, np.uint8))
    Image.fromarray(np.concatenate(rows[:-1])).save(path)
    return path
