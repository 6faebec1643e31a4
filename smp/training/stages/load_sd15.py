"""SD1.5 and AnimateDiff's motion module from local files; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from ...config import Guidance
from ...injection import AddedKV
from ...model import SemanticMotion
from ..config import TrainConfig
from ..data.clips import Clip
from .decoding import DecodingStage
from .unet_denoiser import UNetMotionDenoiser

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_decoding_stage(config: TrainConfig, motion: SemanticMotion, added_kv: AddedKV, blank: Clip) -> DecodingStage:
    """Stage (b) on SD1.5; its frozen weights are kept in the precision that training computes in.

    Raises:
        ValueError: files that are missing or do not fit.
    """
    for name in ("sd15", "motion_module"):
        if not getattr(config, name):
            raise ValueError(f"The decoding stage needs `{name}` in the config; it is empty.")
    if "text" not in blank:
        raise ValueError(
            "The clips have no text. Set `sd15` in the config and prepare them again: latents and text come with it."
        )
    unet = load_unet(Path(config.sd15), Path(config.motion_module))
    require_few_frames(config.frames, unet)
    vae = load_vae(Path(config.sd15)) if config.preview_clips else None
    denoiser = make_denoiser(unet, added_kv, config, vae)
    return DecodingStage(motion, denoiser, config, blank)


def require_few_frames(frames: int, unet: UNetMotionModel) -> None:
    """ValueError when a clip is longer than the UNet's motion modules have positions for."""
    most = unet.config.motion_max_seq_length
    if frames > most:
        raise ValueError(f"frames is {frames}; it must be at most {most}, as far as the motion module counts frames.")


def make_denoiser(
    unet: UNetMotionModel, added_kv: AddedKV, config: TrainConfig, vae: AutoencoderKL | None
) -> UNetMotionDenoiser:
    """The UNet as a denoiser, frozen and cast as the config says."""
    guidance: Guidance = config.guidance
    denoiser = UNetMotionDenoiser(
        unet,
        added_kv,
        animatediff_scheduler(),
        guidance=guidance,
        train_motion_module=config.train_motion_module,
        vae=vae,
    )
    _cast_frozen(unet, PRECISIONS[config.mixed_precision])
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def animatediff_scheduler() -> DDPMScheduler:
    """AnimateDiff's noise schedule: SD1.5's ends, but a linear way between them."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type="epsilon")


def load_unet(sd15: Path, motion_module: Path) -> UNetMotionModel:
    """SD1.5's UNet with an AnimateDiff motion module.

    Args:
        sd15: folder in diffusers' layout.
        motion_module: AnimateDiff's file, or one that training exported.

    Raises:
        ValueError: a file is missing or of another kind.
    """
    unet = _load(UNet2DConditionModel, sd15, "unet")
    state = convert_animatediff_checkpoint_to_diffusers(_read_motion_module(motion_module))
    state = {name: tensor for name, tensor in state.items() if not name.endswith("pos_embed.pe")}
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_norm_num_groups=unet.config.norm_num_groups,
        use_motion_mid_block=any(name.startswith("mid_block") for name in state),
    )
    missing, unexpected = adapter.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("pos_embed.pe"))]
    if wrong:
        raise ValueError(f"{motion_module.name} does not fit this UNet's motion modules; the first name: {wrong[0]}.")
    return UNetMotionModel.from_unet2d(unet, adapter)


def load_vae(sd15: Path) -> AutoencoderKL:
    """SD1.5's VAE."""
    vae = _load(AutoencoderKL, sd15, "vae")
    vae.requires_grad_(False)
    return vae.eval()


def _load(cls: Any, folder: Path, name: str) -> Any:
    if not (folder / name / "config.json").is_file():
        raise ValueError(f"There is no {name}/config.json in {folder}; it must be SD1.5 in diffusers' layout.")
    return cls.from_pretrained(folder, subfolder=name, local_files_only=True)


def _read_motion_module(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"There is no motion module file at {path}.")
    safe = path.suffix == ".safetensors"
    content: dict[str, Any] = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    return {
        name.removeprefix("module."): tensor for name, tensor in content.items() if ".motion_modules." in f".{name}"
    }


def _cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
