"""One graph with every node of the pack, small enough to run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..drivers.server import Prompt
from ..tiny.checkpoints import ensure_checkpoint
from ..tiny.motion import TINY_SD15_VIDEO, TINY_V2, ensure_motion_module
from ..tiny.smp import TINY_BASE, ensure_ip_adapter


def ensure_small_models(models: Path) -> None:
    """Write what the graph loads into a models folder, unless it is there."""
    ensure_checkpoint(TINY_SD15_VIDEO, models / "checkpoints")
    ensure_motion_module(TINY_V2, models / "animatediff_models")
    ensure_ip_adapter(TINY_BASE, models / "ipadapter")


def whole_pack(*, width: int = 64, height: int = 64, panels: int = 2, seed: int = 1, steps: int = 1) -> Prompt:
    """Every node of the pack in one graph, on small models. Nodes have names for ids."""
    sheet = "[Mina] a girl with red hair"
    batch = {"width": width, "height": height}
    sampling = {"seed": seed, "steps": steps, "cfg": 2.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": TINY_SD15_VIDEO.file_name}),
        "picture": ("EmptyImage", {**batch, "batch_size": 1, "color": 8405024}),
        "mask": ("SolidMask", {**batch, "value": 1.0}),
        "vision": ("StoryTinyCLIPVision", {}),
        "split": (
            "StoryPromptSplitter",
            {
                "story": "\n".join(f"[Mina] waits, {number} #{number}" for number in range(1, panels + 1)),
                "characters": sheet,
                "split_by": "line",
                "style": "none",
                "negative": "",
            },
        ),
        "masked": ("StorySetSubjectMasks", {"story": ["split", 0], "character": "Mina", "masks": ["mask", 0]}),
        "empty": ("EmptyLatentImage", {**batch, "batch_size": ["split", 4]}),
        "drawn after": (
            "StoryAddReferencePanels",
            {
                "story": ["masked", 0],
                "latent": ["empty", 0],
                "images": ["picture", 0],
                "vae": ["checkpoint", 2],
                "references": "[Mina] stands",
                "characters": sheet,
                "weight": 2.0,
            },
        ),
        "encoded": ("StoryEncodePrompts", {"clip": ["checkpoint", 1], "story": ["drawn after", 0]}),
        "sharing": (
            "StoryApplyConsistentSelfAttention",
            {
                "model": ["checkpoint", 0],
                "sampling_rate": 0.5,
                "seed": 0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "blocks": "decoder",
                "window": 0,
                "story": ["drawn after", 0],
                "strength": 1.0,
                "share": "everything",
                "token_choice": "random",
                "level_rates": "",
            },
        ),
        "sampler": (
            "KSampler",
            {
                **sampling,
                "model": ["sharing", 0],
                "positive": ["encoded", 0],
                "negative": ["encoded", 1],
                "latent_image": ["drawn after", 1],
                "denoise": 1.0,
            },
        ),
        "decoded": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "panels": (
            "ImageFromBatch",
            {"image": ["decoded", 0], "batch_index": ["drawn after", 2], "length": ["split", 4]},
        ),
        "page": ("StoryContactSheet", {"images": ["panels", 0], "story": ["split", 0], "columns": 0}),
        "pairs": (
            "StoryPanelPairs",
            {"images": ["panels", 0], "video_model": "LTX (32k, 8n+1)", "frames": 9, "story": ["split", 0]},
        ),
        "clip": ("BatchImagesNode", {"images.image0": ["pairs", 0], "images.image1": ["pairs", 1]}),
        "joined": ("StoryJoinClips", {"clips": ["clip", 0]}),
        "module": ("StoryLoadMotionModule", {"motion_module_name": TINY_V2.file_name}),
        "moving": (
            "StoryApplyMotionModule",
            {
                "model": ["checkpoint", 0],
                "motion_module": ["module", 0],
                "scale": 1.0,
                "beta_schedule": "from the model",
            },
        ),
        "smp": ("StoryLoadSMP", {"smp": "interpolation (linear)", "ip_adapter": TINY_BASE.file_name}),
        "predicted": (
            "StorySemanticMotionPredictor",
            {"clip_vision": ["vision", 0], "smp": ["smp", 0], "images": ["panels", 0], "frames": 2},
        ),
        "guided": (
            "StoryApplySMP",
            {
                "model": ["moving", 0],
                "smp": ["smp", 0],
                "smp_embeds": ["predicted", 0],
                "pair_index": 0,
                "strength": 1.0,
                "guidance": "as trained",
            },
        ),
        "plain": ("StoryEncodePrompts", {"clip": ["checkpoint", 1], "story": ["split", 0]}),
        "two": ("EmptyLatentImage", {**batch, "batch_size": 2}),
        "guided sampler": (
            "KSampler",
            {
                **sampling,
                "model": ["guided", 0],
                "positive": ["plain", 0],
                "negative": ["plain", 1],
                "latent_image": ["two", 0],
                "denoise": 1.0,
            },
        ),
        "guided frames": ("VAEDecode", {"samples": ["guided sampler", 0], "vae": ["checkpoint", 2]}),
        "video": (
            "StorySMPVideoDecode",
            {
                **sampling,
                "model": ["moving", 0],
                "smp": ["smp", 0],
                "smp_embeds": ["predicted", 0],
                "panels": ["panels", 0],
                "positive": ["plain", 0],
                "negative": ["plain", 1],
                "vae": ["checkpoint", 2],
                "anchor": "hold",
                "strength": 1.0,
                "fps": 8.0,
            },
        ),
    }
    prompt: Prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    for source in ("page", "joined", "guided frames", "video"):
        inputs = {"images": [source, 0], "filename_prefix": source.replace(" ", "_")}
        prompt[f"save {source}"] = {"class_type": "SaveImage", "inputs": inputs}
    return prompt
