"""The toy model's text encoder: the host's CLIP-L class in a small config, frozen, its weights drawn from a seed.

A plain random transformer attends to everything about equally, so that after three layers hardly a word can be
read in its context ("red" of which garment?). Random weights are enough if attention has somewhere to look. So the
position embedding is a code of cosines, and the query and key weights turn some heads into "k tokens back"
(queries rotate the code by k steps), some into "the last few tokens" (keys rise with the position), and leave the
rest uniform. Everything that carries meaning (token embeddings, values, outputs, MLPs) is Gaussian noise.
"""

from __future__ import annotations

import math

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch

SEED = 20240502
WIDTH, HEADS, LAYERS, MLP_WIDTH, CONTEXT = 256, 4, 3, 64, 77
HEAD_WIDTH = WIDTH // HEADS
CONFIG = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": MLP_WIDTH,
    "projection_dim": WIDTH,
}
_FREQUENCIES = HEAD_WIDTH // 2
_RAMP = HEAD_WIDTH  # channel behind the position code that grows along the prompt
_WORD = HEAD_WIDTH + 1  # first of the channels that carry meaning
# What each layer's heads attend to: a number is "so many tokens back", "recent" the last few, "all" everything.
_HEADS: tuple[tuple[int | str, ...], ...] = (
    (1, 2, 3, "recent"),
    (1, 2, 4, "recent"),
    (1, "recent", "all", "all"),
)


def load_clip() -> comfy.sd.CLIP:
    """A CLIP object as the stock loaders make them, with the host's own tokenizer."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    # float32 on every device: the same conditioning wherever it runs.
    options = {"clip_l_model_config": dict(CONFIG), "dtype": torch.float32}
    return comfy.sd.CLIP(target, state_dict=[weights()], model_options=options)


def weights(seed: int = SEED) -> dict[str, torch.Tensor]:
    """State dict of the host's CLIPTextModel in `CONFIG`, about 13M parameters, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(49408, WIDTH)
    tokens[:, _WORD:] = torch.randn(49408, WIDTH - _WORD, generator=generator)
    angles = torch.rand(_FREQUENCIES, generator=generator) * (math.pi - 0.1) + 0.1
    state = {
        "text_model.embeddings.token_embedding.weight": tokens,
        "text_model.embeddings.position_embedding.weight": _positions(angles),
        "text_projection.weight": torch.eye(WIDTH),
    }
    for name in (
        "text_model.final_layer_norm",
        *(_layer(i) + f"layer_norm{n}" for i in range(LAYERS) for n in (1, 2)),
    ):
        state |= {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    for index, heads in enumerate(_HEADS):
        state |= _attention(_layer(index) + "self_attn.", heads, angles, generator)
        state |= _mlp(_layer(index) + "mlp.", generator)
    return state


def _layer(index: int) -> str:
    return f"text_model.encoder.layers.{index}."


def _positions(angles: torch.Tensor) -> torch.Tensor:
    index = torch.arange(CONTEXT, dtype=torch.float32)
    phase = index[:, None] * angles
    table = torch.zeros(CONTEXT, WIDTH)
    table[:, : 2 * _FREQUENCIES] = 1.5 * torch.cat([phase.cos(), phase.sin()], dim=1)
    table[:, _RAMP] = 1.5 * (index / index[-1] * 2 - 1)
    return table


def _attention(
    prefix: str, heads: tuple[int | str, ...], angles: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    queries, keys, values = (torch.zeros(WIDTH, WIDTH) for _ in range(3))
    query_bias = torch.zeros(WIDTH)
    for index, looks_at in enumerate(heads):
        rows = slice(index * HEAD_WIDTH, (index + 1) * HEAD_WIDTH)
        if isinstance(looks_at, int):
            queries[rows, :HEAD_WIDTH] = 2 * _rotation(-looks_at * angles)
            keys[rows, :HEAD_WIDTH] = 2 * torch.eye(HEAD_WIDTH)
        elif looks_at == "recent":
            keys[rows.start, _RAMP] = query_bias[rows.start] = 7
    values[:, _WORD:] = torch.randn(WIDTH, WIDTH - _WORD, generator=generator) / math.sqrt(WIDTH)
    output = torch.zeros(WIDTH, WIDTH)
    output[_WORD:] = torch.randn(WIDTH - _WORD, WIDTH, generator=generator) / math.sqrt(HEAD_WIDTH)
    state = {"q_proj": queries, "k_proj": keys, "v_proj": values, "out_proj": output}
    biases = {f"{prefix}{name}.bias": torch.zeros(WIDTH) for name in state} | {f"{prefix}q_proj.bias": query_bias}
    return {f"{prefix}{name}.weight": weight for name, weight in state.items()} | biases


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Matrix that turns the code of position p into the code of p + angles / frequencies."""
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])


def _mlp(prefix: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outer = torch.zeros(WIDTH, MLP_WIDTH)
    outer[_WORD:] = torch.randn(WIDTH - _WORD, MLP_WIDTH, generator=generator) / math.sqrt(MLP_WIDTH)
    return {
        f"{prefix}fc1.weight": torch.randn(MLP_WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH),
        f"{prefix}fc1.bias": torch.zeros(MLP_WIDTH),
        f"{prefix}fc2.weight": outer,
        f"{prefix}fc2.bias": torch.zeros(WIDTH),
    }
