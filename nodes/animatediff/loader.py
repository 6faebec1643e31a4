"""Motion module files: which kinds there are, their weight names, and how one becomes a model the host manages."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch

from ..host.model_files import read_weights, register_model_folder
from ..host.patchers import make_patcher
from .module import NORM_GROUPS, NUM_HEADS, MotionModule, MotionModuleConfig

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Weights = dict[str, torch.Tensor]

FOLDER_NAME = "animatediff_models"
V1_MAX_FRAMES = 24
SDXL_CHANNELS = ((320, 320), (640, 640), (1280, 1280))

# What other files hold, told by a part of one of their weights' names. Order matters: the first that fits is named.
OTHER_KINDS = (
    (
        "lora",
        "a LoRA (AnimateDiff's motion LoRAs and domain adapters are LoRAs too; this node loads neither)",
    ),
    ("temporal_attentions.", "a Hotshot-XL motion module, made for SDXL"),
    ("fps_embedding.", "a FancyVideo motion module"),
    ("img_encoder.", "an AnimateLCM image-to-video motion module"),
    ("cc_projection", "a MotionCtrl motion module"),
    ("pose_encoder.", "a CameraCtrl pose encoder"),
    ("controlnet_", "a ControlNet or SparseCtrl model"),
    ("control_model.", "a ControlNet"),
    ("time_stack.", "a Stable Video Diffusion model"),
    ("model.diffusion_model.", "a whole checkpoint (use Load Checkpoint)"),
)
PIA_INPUT_CHANNELS = 9
MOST_IN_A_ROW = 16
"""Levels of a side, and motion modules of a level: SD1.5 has 4 and 3, and many more would take minutes to build."""

_MOTION_KEY = re.compile(r"^(?:module\.)?((?:down_blocks|up_blocks)\.\d+|mid_block)\.motion_modules\.(\d+)\.(.+)$")
# diffusers' MotionAdapter names the parts of a transformer block as an image transformer's.
_DIFFUSERS_NAMES = (
    (".attn1.", ".attention_blocks.0."),
    (".attn2.", ".attention_blocks.1."),
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".ff_norm."),
)


register_model_folder(FOLDER_NAME, folder_paths.supported_pt_extensions)


def load_motion_module(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The motion module at `path` as a ModelPatcher whose `.model` is a `MotionModule`.

    Raises ValueError for a file that is no AnimateDiff v2 or v3 motion module, saying what it is. The signature is
    what the host's `cached_patcher_init` asks for: it loads the file again for another GPU.
    """
    name = Path(path).name
    weights = motion_weights(read_weights(path, "a motion module"), name)
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights), weight_dtype=comfy.utils.weight_dtype(weights)
    )
    config = read_config(weights, name)
    _require_shapes(config, weights, name)
    model = MotionModule(
        config,
        name,
        operations=comfy.ops.manual_cast,
        device=comfy.model_management.unet_offload_device(),
        dtype=dtype,
    )
    try:
        return make_patcher(model, weights, (load_motion_module, (path,)), disable_dynamic=disable_dynamic)
    except ValueError as error:
        raise _damaged(name, str(error)) from error


def motion_weights(content: Mapping[str, Any], name: str) -> Weights:
    """Return the weights of the motion module in `content`, under `MotionModule`'s own names.

    Accepts AnimateDiff's names and those of diffusers' MotionAdapter; weights outside the motion modules are left
    out (some files carry the UNet they were trained with). `name` is the file's, for messages.
    """
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    refuse_other_kinds(tensors, name)
    weights: Weights = {}
    for key, tensor in tensors.items():
        if match := _MOTION_KEY.match(key):
            level, index, part = match.groups()
            for new_part in _own_names(part):
                if new_part.endswith("pos_encoder.weight") and tensor.shape[-2:].numel() == tensor.numel():
                    tensor = tensor.reshape(tensor.shape[-2:])
                weights[f"{level}.motion_modules.{index}.{new_part}"] = tensor
    ignored = sum(not _MOTION_KEY.match(key) for key in tensors)
    if ignored:
        logging.warning(f"{name}: {ignored} weights don't belong to its motion modules and are not loaded.")
    return weights


def _own_names(part: str) -> Iterator[str]:
    part = part.removeprefix("temporal_transformer.")
    if part.endswith(".pos_embed.pe"):  # diffusers keeps one encoding for both attentions
        block = part.removesuffix("pos_embed.pe")
        yield from (f"{block}attention_blocks.{index}.pos_encoder.weight" for index in range(2))
        return
    for theirs, ours in _DIFFUSERS_NAMES:
        part = part.replace(theirs, ours)
    yield part.replace("pos_encoder.pe", "pos_encoder.weight")


def refuse_other_kinds(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ValueError unless `tensors` hold motion modules, and nothing that makes them another kind."""
    kind = next((kind for part, kind in OTHER_KINDS if any(part in key for key in tensors)), None)
    has_motion = any(_MOTION_KEY.match(key) for key in tensors)
    if kind is None and has_motion and _input_channels(tensors) == PIA_INPUT_CHANNELS:
        kind = "a PIA motion module, which also replaces the UNet's first layer"
    if kind is None and not has_motion:
        shown = ", ".join(sorted(tensors)[:3]) or "none at all"
        kind = f"something else (its weights: {shown})"
    if kind is not None:
        raise _refusal(name, kind)


def _input_channels(tensors: Mapping[str, torch.Tensor]) -> int | None:
    shape = tensors["conv_in.weight"].shape if "conv_in.weight" in tensors else ()
    return shape[1] if len(shape) == 4 else None


def _refusal(name: str, kind: str) -> ValueError:
    return ValueError(f"{name} is {kind}. Load an AnimateDiff v2 or v3 motion module for SD1.5.")


def read_config(weights: Weights, name: str) -> MotionModuleConfig:
    """Return the sizes of the motion module whose `weights` are given; ValueError for v1 and other families."""
    encodings = {key: tuple(tensor.shape) for key, tensor in weights.items() if key.endswith("pos_encoder.weight")}
    for key, shape in encodings.items():
        if len(shape) != 2 or 0 in shape:
            raise _damaged(name, f"{key} has the shape {shape}, not frames and channels")
    lengths = {frames for frames, _ in encodings.values()}
    if not lengths:
        raise _refusal(name, "an AnimateLCM motion module: it has no positional encoding")
    if lengths == {V1_MAX_FRAMES}:
        raise _refusal(
            name,
            "an AnimateDiff v1 motion module (its positional encoding ends at 24 frames), which needs a UNet whose "
            "group norms pool all frames",
        )
    if len(lengths) > 1:
        raise _damaged(name, f"its positional encodings differ in length: {sorted(lengths)} frames")
    middle = _channels(weights, "mid_block", name)
    config = MotionModuleConfig(
        down=_level_channels(weights, "down_blocks", name),
        middle=middle[0] if middle else None,
        up=_level_channels(weights, "up_blocks", name),
        max_frames=lengths.pop(),
    )
    if config.down == SDXL_CHANNELS:
        raise _refusal(name, "an AnimateDiff motion module for SDXL")
    return config


def _level_channels(weights: Weights, side: str, name: str) -> tuple[tuple[int, ...], ...]:
    levels = _numbers(weights, rf"{side}\.(\d{{1,9}})\.")
    if len(levels) > MOST_IN_A_ROW:
        raise _damaged(name, f"it has {len(levels)} {side}, at most {MOST_IN_A_ROW} are read")
    if levels != set(range(len(levels))):
        raise _damaged(name, f"it has {side} {sorted(levels)}, with gaps")
    return tuple(_channels(weights, f"{side}.{level}", name) for level in range(len(levels)))


def _channels(weights: Weights, level: str, name: str) -> tuple[int, ...]:
    indices = _numbers(weights, rf"{re.escape(level)}\.motion_modules\.(\d{{1,9}})\.")
    if len(indices) > MOST_IN_A_ROW:
        raise _damaged(name, f"{level} has {len(indices)} motion modules, at most {MOST_IN_A_ROW} are read")
    norms = [weights.get(f"{level}.motion_modules.{index}.norm.weight") for index in range(len(indices))]
    channels = tuple(norm.numel() for norm in norms if norm is not None)
    if len(channels) != len(indices):
        raise _damaged(name, f"a motion module of {level} lacks its norm.weight")
    for width in channels:
        if not width or width % NORM_GROUPS or width % NUM_HEADS:
            raise _damaged(name, f"{level} has {width} channels, which is no multiple of {NORM_GROUPS}")
    return channels


def _numbers(weights: Weights, pattern: str) -> set[int]:
    matches = (re.match(pattern, key) for key in weights)
    return {int(match.group(1)) for match in matches if match}


def _require_shapes(config: MotionModuleConfig, weights: Weights, name: str) -> None:
    """Raise ValueError for a weight that is missing or has another shape, before memory is taken for all of them."""
    try:
        module = MotionModule(config, name, operations=comfy.ops.disable_weight_init, device="meta")
    except RuntimeError as error:  # a size beyond what torch can count
        raise _damaged(name, str(error)) from error
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise _damaged(name, f"{len(missing)} missing weights: {', '.join(missing[:3])}")
    for key, shape in expected.items():
        if weights[key].shape != shape:
            raise _damaged(name, f"size mismatch for {key}: {tuple(weights[key].shape)}, not {tuple(shape)}")
        if not _is_whole(weights[key]):
            raise _damaged(name, f"{key} says {tuple(shape)}, but the file doesn't hold as many numbers")


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether every number of the tensor is there: a pickled one can be of any size over a single number."""
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"{name} is no complete AnimateDiff v2 or v3 motion module: {what}.")
