"""From a choice of files to an SMP whose weights the host manages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.ops
import folder_paths

from ...smp.checkpoint import load_checkpoint
from ...smp.config import Interpolation, SMPModelConfig
from ...smp.ip_adapter import load_ip_adapter
from ...smp.model import SMPWeights
from ..host.model_files import read_weights, register_model_folder
from ..host.patchers import make_patcher

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SMP_FOLDER = "smp"
IP_ADAPTER_FOLDER = "ipadapter"
NO_FILE = "none"
INTERPOLATIONS: dict[str, Interpolation] = {
    "interpolation (linear)": "linear",
    "interpolation (spherical)": "spherical",
}


register_model_folder(SMP_FOLDER, {".safetensors"})
register_model_folder(IP_ADAPTER_FOLDER, {".safetensors", ".bin"})


@dataclass(frozen=True)
class LoadedSMP:
    """An SMP in the host's hands: its config, a summary for users, a ModelPatcher for each module."""

    config: SMPModelConfig
    summary: str
    motion: ModelPatcher
    added_kv: ModelPatcher


def load_smp(read: Callable[[], SMPWeights], summary: str) -> LoadedSMP:
    """Give an SMP's weights to the host to manage (device, dtype, offloading, copies for several GPUs).

    Args:
        read: reads the file; called again when the host wants pristine weights.
        summary: one sentence for users.
    """
    motion, added_kv = load_patchers(read)
    return LoadedSMP(motion.model.config, summary, motion, added_kv)


def load_patchers(read: Callable[[], SMPWeights], disable_dynamic: bool = False) -> list[ModelPatcher]:
    """ModelPatchers of the motion and the added-projection module."""
    weights = read()
    offload_device = comfy.model_management.unet_offload_device()
    modules = weights.modules(operations=comfy.ops.manual_cast, device=offload_device)
    states = zip(modules, (weights.motion, weights.added_kv), strict=True)
    return [
        make_patcher(module, state, (load_patchers, (read,), position), disable_dynamic=disable_dynamic)
        for position, (module, state) in enumerate(states)
    ]


def smp_source(smp_name: str, ip_adapter_name: str) -> tuple[Callable[[], SMPWeights], str]:
    """A function that reads the chosen weights, and one sentence that says what they are.

    Raises:
        ValueError: interpolation without IP-Adapter weights, or IP-Adapter weights beside an SMP checkpoint.
    """
    interpolation = INTERPOLATIONS.get(smp_name)
    if interpolation is None:
        if ip_adapter_name != NO_FILE:
            raise ValueError(
                f"The SMP checkpoint '{smp_name}' brings its own projections, so ip_adapter must be "
                f"'{NO_FILE}'; it is '{ip_adapter_name}'."
            )
        path = Path(folder_paths.get_full_path_or_raise(SMP_FOLDER, smp_name))
        return lambda: load_checkpoint(path), f"Trained SMP: '{smp_name}' predicts the motion."
    if ip_adapter_name == NO_FILE:
        raise ValueError(
            f"smp is '{smp_name}', which has no decoder of its own: choose IP-Adapter weights for SD1.5 "
            "(ip-adapter_sd15 or ip-adapter-plus_sd15) from models/ipadapter."
        )
    path = Path(folder_paths.get_full_path_or_raise(IP_ADAPTER_FOLDER, ip_adapter_name))
    summary = (
        f"No trained SMP: {interpolation} interpolation between the panels' image tokens, decoded by the "
        f"IP-Adapter weights '{ip_adapter_name}'."
    )
    return lambda: _read_ip_adapter(path, interpolation), summary


def _read_ip_adapter(path: Path, interpolation: Interpolation) -> SMPWeights:
    file = read_weights(path, "an IP-Adapter")
    try:
        return load_ip_adapter(dict(file), interpolation=interpolation)
    except ValueError as error:
        raise ValueError(f"'{path.name}' cannot be used by Load SMP. {error}") from error
