"""Measure clips and panels: `python -m smp.evaluate videos|transitions|images ...`; see `smp/TRAINING.md`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .encoder import PAPER_MODEL
from .evaluation.clip_scores import Measures
from .evaluation.folders import score_characters, score_videos
from .evaluation.models import LPIPS, LPIPS_FILES, CLIPScorer
from .evaluation.published import IMAGES, VIDEO
from .evaluation.report import format_table, summarise

HELD_ENDS = (
    "First and last frame are held at the true ones, and count in -first, -frames and motion; -arrival compares the "
    "last drawn frame, the last but one, with the true end. --free-ends draws all frames."
)
FREE_ENDS = "All frames are drawn; -last compares the last one with the true end."


def main() -> int:
    """Run the command line; 0 when something was measured."""
    arguments = parse_arguments(sys.argv[1:])
    try:
        {"videos": evaluate_videos, "transitions": evaluate_transitions, "images": evaluate_images}[arguments.what](
            arguments
        )
    except ValueError as error:
        print(f"smp.evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="smp.evaluate", description=(__doc__ or "").split(":")[0] + ".")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="videos|transitions|images")
    videos = kinds.add_parser("videos", help="a folder of videos; NAME.png beside NAME.mp4 is its true end")
    videos.add_argument("folder", type=Path)
    videos.add_argument("--size", type=int, default=256, help="shorter side in pixels; default: %(default)s")
    transitions = kinds.add_parser("transitions", help="an SMP against linear interpolation, on validation clips")
    transitions.add_argument("--config", type=Path, required=True, help="config of the decoding stage")
    transitions.add_argument("--weights", type=Path, required=True, help="the trained smp.safetensors")
    transitions.add_argument("--motion-module", type=Path, help="default: the config's")
    transitions.add_argument("--clips", type=int, default=100, help="how many, spread out; default: %(default)s")
    transitions.add_argument("--free-ends", action="store_true", help="draw the first and last frame too")
    images = kinds.add_parser("images", help="a folder for each character, NAME.txt the prompt of NAME.png")
    images.add_argument("folder", type=Path)
    images.add_argument("--pose-weights", type=Path, help="torchvision's Keypoint R-CNN; without: no pose diversity")
    for command in (videos, transitions):
        command.add_argument("--lpips-weights", type=Path, help="torchvision's trunk; without: no LPIPS")
        command.add_argument("--lpips-net", choices=sorted(LPIPS_FILES), default="alex")
    for command in (videos, transitions, images):
        command.add_argument("--clip-weights", type=Path, required=command is images, help="open_clip weights file")
        command.add_argument("--clip-model", default=PAPER_MODEL, help="default: %(default)s")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def load_measures(arguments: argparse.Namespace) -> Measures:
    """The models whose weights the command line names."""
    lpips = arguments.lpips_weights and LPIPS(arguments.lpips_weights, arguments.lpips_net, arguments.device)
    clip = arguments.clip_weights and CLIPScorer(arguments.clip_weights, arguments.clip_model, arguments.device)
    return Measures(lpips or None, clip.embed if clip else None)


def evaluate_videos(arguments: argparse.Namespace) -> None:
    """Print the table of a folder of videos."""
    if arguments.size < 64:
        raise ValueError(f"--size is {arguments.size}; LPIPS needs at least 64 pixels.")
    rows, broken = score_videos(arguments.folder, load_measures(arguments), arguments.size)
    for name, reason in broken.items():
        print(f"skipped {name}: {reason}")
    if not rows:
        raise ValueError(f"Every video in {arguments.folder} is broken.")
    print(f"{len(rows)} videos (mean ± standard error); LPIPS lower, CLIPSIM higher is better, motion 0 is frozen\n")
    print(format_table({str(arguments.folder): summarise(rows)}, VIDEO))


def evaluate_transitions(arguments: argparse.Namespace) -> None:
    """Print the table of an SMP against linear interpolation."""
    from .evaluation.transitions import Drawing, compare_transitions
    from .training.config import load_config
    from .training.data.clips import spread
    from .training.run.build import build
    from .training.run.start import read_smp
    from .training.stages.decoding import DecodingStage

    if arguments.clips < 1:
        raise ValueError(f"--clips is {arguments.clips}; it must be at least 1.")
    config = load_config(arguments.config)
    if config.stage != "decoding" or not config.validation_data:
        raise ValueError("Transitions are drawn by the decoding stage on validation_data; the config needs both.")
    guidance = read_smp(arguments.weights).config.guidance
    config = replace(config, start=str(arguments.weights), model={}, predictor={}, guidance=guidance)
    config = replace(config, data=config.validation_data, preview_clips=1, gradient_checkpointing=False)
    if arguments.motion_module:
        config = replace(config, motion_module=str(arguments.motion_module))
    stage, clips, _ = build(config)
    assert isinstance(stage, DecodingStage)
    stage.to(arguments.device).eval()
    numbers = spread(arguments.clips, len(clips))
    drawing = Drawing(
        config.preview_steps, config.preview_cfg, not arguments.free_ends, config.seed, config.mixed_precision
    )
    rows = compare_transitions(stage.motion, stage.denoiser, clips, numbers, load_measures(arguments), drawing)
    print(f"{len(numbers)} transitions (mean ± standard error)")
    print(f"{FREE_ENDS if arguments.free_ends else HELD_ENDS}\n")
    print(format_table({name: summarise(scores) for name, scores in rows.items()}, VIDEO))


def evaluate_images(arguments: argparse.Namespace) -> None:
    """Print the table of a folder of characters."""
    from .evaluation.image_scores import LEAST_JOINTS
    from .evaluation.poses import PoseReader

    clip = CLIPScorer(arguments.clip_weights, arguments.clip_model, arguments.device)
    poses = PoseReader(arguments.pose_weights, arguments.device) if arguments.pose_weights else None
    scores, left = score_characters(arguments.folder, clip, poses)
    if left.panels:
        print(f"No person was found in {left.panels} panels; they do not enter pose diversity.")
    if left.pairs:
        print(f"{left.pairs} pairs of panels show fewer than {LEAST_JOINTS} of the same joints, or all in one place.")
        print("They do not enter pose diversity.")
    print(f"{len(scores)} characters (mean ± standard error over characters)\n")
    print(format_table({str(arguments.folder): summarise([*scores.values()])}, IMAGES))


if __name__ == "__main__":
    sys.exit(main())
