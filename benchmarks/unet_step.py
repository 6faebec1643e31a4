"""Cost of Consistent Self-Attention in one whole model call of SDXL's UNet, with guidance, at 1024 x 1024.

The UNet has SDXL's own configuration and random weights (time doesn't depend on them). Compared in one run,
interleaved: the stock UNet, the decoder with our patch, and the decoder with the official code's dense mask over all
panels' tokens. Times are ratios to the stock UNet; peak memory is what the call adds to the weights, GPU only.

With `--counted` nothing is computed: the same calls run on tensors without content, and their operations (matrix
products and convolutions) and the memory of their tensors are counted. That needs neither a GPU nor the memory.

    python dev.py bench unet_step [--counted] [--panels 4 8] [--rate 0.5] [--size 1024] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..devtools.toy.model import fused_attention
from ..nodes.consistent_attention.blocks import choose_blocks
from ..nodes.consistent_attention.patch import ConsistentSelfAttentionPatch
from ..nodes.consistent_attention.settings import SharingSettings
from ..nodes.consistent_attention.token_sampling import draw_tokens
from ..nodes.host.noise_level import STEP_KEY, SamplingStep
from ..nodes.host.unet import blocks_with_attention
from .measuring.live_tensors import LiveTensors
from .measuring.official_mask import dense_mask
from .measuring.seconds import seconds

# comfy.supported_models.SDXL, and what its checkpoints say besides.
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
CHUNKS = 2  # conditional and unconditional


def build_unet(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """SDXL's UNet with random weights."""
    unet = UNetModel(**SDXL, dtype=dtype, device=device, operations=comfy.ops.disable_weight_init)
    with torch.no_grad():
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


class OfficialMaskPatch:
    """The official code's attention: every query over all panels' tokens, under a dense boolean mask."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.masks: dict[int, torch.Tensor] = {}  # one per token count, as there; filled by the warm-up

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        panels, tokens = q.shape[0] // CHUNKS, q.shape[1]
        if tokens not in self.masks:
            draws = [draw_tokens(tokens, self.rate, draw=(panel,)) for panel in range(panels)]
            self.masks[tokens] = dense_mask(tokens, panels, draws, q.device)
        joined = (tensor.unflatten(0, (CHUNKS, panels)).flatten(1, 2) for tensor in (q, k, v))
        out = comfy.ldm.modules.attention.attention_pytorch(*joined, extra["n_heads"], mask=self.masks[tokens])
        return out.unflatten(1, (panels, tokens)).flatten(0, 1)


def contenders(
    unet: torch.nn.Module, panels: int, rate: float, size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name and call of each way to run the UNet once on `panels` panels, conditional and unconditional."""
    rows = CHUNKS * panels
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, context, y = tensor(rows, 4, size // 8, size // 8), tensor(rows, 77, 2048), tensor(rows, 2816)
    timesteps = torch.full((rows,), 500.0, device=device)
    keys = [block.key for block in choose_blocks(blocks_with_attention(unet), "decoder")]
    settings = SharingSettings(sampling_rate=rate, seed=0, sources=None)

    def run(patch: Any) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            options: dict[str, Any] = {
                "cond_or_uncond": [1, 0],
                "sigmas": torch.ones(panels, device=device),
                "optimized_attention_override": fused_attention,  # the host's default on a CPU is another
                STEP_KEY: SamplingStep(noise_level=0, sigma=1.0),
            }
            if patch is not None:
                options["patches_replace"] = {"attn1": dict.fromkeys(keys, patch)}
            return unet(x, timesteps, context=context, y=y, transformer_options=options)

        return call

    return {
        "stock": run(None),
        "ours": run(ConsistentSelfAttentionPatch(settings, rate)),
        "official mask": run(OfficialMaskPatch(rate)),
    }


def peak_mib(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Memory that a call takes beyond what is there before it; nan without a GPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Count:
    """Of one model call."""

    tflop: float
    mebibytes: float


def count(call: Callable[[], torch.Tensor]) -> Count:
    """Operations, and the most that tensors take beyond what was there before."""
    with LiveTensors() as tensors:
        call()
    # Only plain attention is counted. The fused kernels, whose memory is counted above, multiply the same numbers.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
        call()
    return Count(operations.get_total_flops() / 1e12, tensors.peak / 2**20)


def counted(panels: int, rate: float, size: int) -> dict[str, Count]:
    """Operations and memory of each contender in half precision."""
    device, dtype = torch.device("cpu"), torch.float16
    with FakeTensorMode(), torch.no_grad():
        calls = contenders(build_unet(device, dtype), panels, rate, size, device, dtype)
        return {name: count(call) for name, call in calls.items()}


def print_counted(panels: list[int], rate: float, size: int) -> None:
    """The table of `--counted`."""
    print(f"Counted, {torch.float16}, torch {torch.__version__}, {size} px, rate {rate}, decoder blocks\n")
    print("| panels | TFLOP stock | ours / stock | mask / stock | MiB stock | MiB ours | MiB mask |")
    print("|---|---|---|---|---|---|---|")
    for number in panels:
        stock, ours, mask = counted(number, rate, size).values()
        print(
            f"| {number} | {stock.tflop:.1f} | {ours.tflop / stock.tflop:.2f}x | {mask.tflop / stock.tflop:.2f}x | "
            f"{stock.mebibytes:.0f} | {ours.mebibytes:.0f} | {mask.mebibytes:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help="count operations and memory instead of measuring")
    parser.add_argument("--panels", type=int, nargs="+", default=[4])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.counted:
        print_counted(arguments.panels, arguments.rate, arguments.size)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, torch {torch.__version__}, {arguments.size} px, rate {arguments.rate}, decoder blocks\n")
    print("| panels | stock | ours / stock | mask / stock | mask / ours | MiB stock | MiB ours | MiB mask |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        unet = build_unet(device, dtype)
        for panels in arguments.panels:
            calls = contenders(unet, panels, arguments.rate, arguments.size, device, dtype)
            memory = {key: peak_mib(call, device) for key, call in calls.items()}  # also warms up
            rounds = [{key: seconds(call, device) for key, call in calls.items()} for _ in range(arguments.repeats)]
            time = {key: statistics.median(one[key] for one in rounds) for key in calls}
            print(
                f"| {panels} | {time['stock'] * 1e3:.0f} ms | {time['ours'] / time['stock']:.2f}x | "
                f"{time['official mask'] / time['stock']:.2f}x | {time['official mask'] / time['ours']:.2f}x | "
                f"{memory['stock']:.0f} | {memory['ours']:.0f} | {memory['official mask']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
