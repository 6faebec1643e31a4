"""Cost of Consistent Self-Attention in one attention layer, at the shapes of an SDXL picture of 1024 x 1024.

Compares, interleaved in one run, plain self-attention (equation 1), ours (gathered tokens) and the official code's
dense mask over the tokens of all panels. Times are ratios to plain. The floor is the key count: attention reads
1 + rate * (panels - 1) times more keys, whatever the code.

    python dev.py bench attention [--panels 4] [--rate 0.5] [--repeats 10]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..nodes.consistent_attention.attention import consistent_self_attention
from ..nodes.consistent_attention.sources import all_other_panels
from ..nodes.consistent_attention.token_sampling import TokenDraw, draw_tokens
from .measuring.official_mask import dense_mask
from .measuring.seconds import seconds

HEAD_DIM = 64


@dataclass(frozen=True)
class Level:
    """One resolution of SDXL's UNet with self-attention."""

    name: str
    tokens: int
    heads: int


LEVELS = (Level("64 x 64, 10 heads", 4096, 10), Level("32 x 32, 20 heads", 1024, 20))


def multi_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the host's attention_pytorch does: (R, N, C) to heads, torch's kernel, and back."""
    q, k, v = (tensor.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def contenders(
    level: Level, panels: int, rate: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name and call of each way to attend, on the same random tensors; one chunk of `panels` panels."""
    generator = torch.Generator().manual_seed(0)
    shape = (panels, level.tokens, level.heads * HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    sources = all_other_panels(panels)

    def draw() -> list[TokenDraw]:
        return [draw_tokens(level.tokens, rate, draw=(0, 0, ("output", 0, 0), panel)) for panel in range(panels)]

    mask = dense_mask(level.tokens, panels, draw(), device)

    def gathered() -> torch.Tensor:
        return consistent_self_attention(q, k, v, chunks=1, sources=sources, draws=draw(), attend=multi_head)

    def masked() -> torch.Tensor:
        joined_q, joined_k, joined_v = (tensor.flatten(0, 1)[None] for tensor in (q, k, v))
        return multi_head(joined_q, joined_k, joined_v, mask)[0].unflatten(0, (panels, level.tokens))

    return {"plain": lambda: multi_head(q, k, v), "ours": gathered, "official mask": masked}


def measure(level: Level, panels: int, rate: float, repeats: int, device: torch.device, dtype: torch.dtype) -> str:
    """One row of the table."""
    calls = contenders(level, panels, rate, device, dtype)
    difference = (calls["ours"]() - calls["official mask"]()).abs().max().item()  # also warms up
    calls["plain"]()
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(repeats)]
    median = {name: statistics.median(one[name] for one in rounds) for name in calls}
    floor = 1 + rate * (panels - 1)
    ours, mask = median["ours"] / median["plain"], median["official mask"] / median["plain"]
    return (
        f"| {level.name} | {panels} | {rate} | {median['plain'] * 1e3:.2f} ms | {floor:.2f}x | {ours:.2f}x | "
        f"{ours / floor:.2f} | {mask:.2f}x | {mask / ours:.2f}x | {difference:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panels", type=int, nargs="+", default=[4])
    parser.add_argument("--rate", type=float, nargs="+", default=[0.5])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, torch {torch.__version__}, medians of {arguments.repeats} interleaved calls\n")
    print("| level | panels | rate | plain | floor | ours | ours / floor | official mask | mask / ours | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for panels in arguments.panels:
            for rate in arguments.rate:
                for level in LEVELS:
                    print(measure(level, panels, rate, arguments.repeats, device, dtype), flush=True)


if __name__ == "__main__":
    main()
