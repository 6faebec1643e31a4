"""What an SMP is made of, as data: the predictor, the token space it works in, and where its tokens go."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

TokenSpace = Literal["image_embeds", "resampled"]
Interpolation = Literal["linear", "spherical"]
Guidance = Literal["concat", "decoupled"]
Uncond = Literal["zero", "blank_image"]


@dataclass(frozen=True)
class SMPConfig:
    """Shape of a `SemanticMotionPredictor`.

    The paper gives 8 layers, hidden size 1024 and 12 heads. 1024 is not divisible by 12, so heads and head
    size are explicit: attention projects from `hidden` to heads * head_dim (12 * 64 = 768) and back.

    Args:
        tokens: N, tokens per frame.
        width: C, channels per token.
        hidden: channels inside the transformer.
        layers: transformer layers.
        heads: attention heads.
        head_dim: channels per head.
        max_frames: the longest transition seen in training. A label and the finest frame position: other
            lengths run.
        residual: the transformer's output is added to the linear interpolation instead of replacing it.
        pin_ends: the first and last predicted frame are the given start and end tokens, exactly.
    """

    tokens: int = 16
    width: int = 768
    hidden: int = 1024
    layers: int = 8
    heads: int = 12
    head_dim: int = 64
    max_frames: int = 16
    residual: bool = True
    pin_ends: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("tokens", "width", "hidden", "layers", "heads", "head_dim"):
            _require_at_least("SMPConfig", name, getattr(self, name), 1)
        _require_at_least("SMPConfig", "max_frames", self.max_frames, 2)


@dataclass(frozen=True)
class ResamplerConfig:
    """Shape of a `Resampler`; the defaults are IP-Adapter Plus for SD1.5."""

    encoder_width: int = 1280
    hidden: int = 768
    queries: int = 16
    width: int = 768
    depth: int = 4
    heads: int = 12
    head_dim: int = 64
    ff_mult: int = 4


@dataclass(frozen=True)
class ProjectionConfig:
    """Shape of an `ImageProjection`; the defaults are IP-Adapter for SD1.5."""

    embed_width: int = 1024
    tokens: int = 4
    width: int = 768


@dataclass(frozen=True)
class CrossAttentionSite:
    """One cross-attention of a UNet: its host key (block, number, index) and its inner channels."""

    block: str
    number: int
    index: int
    channels: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Block ("input", "middle", "output"), block number, transformer index, as the host names it."""
        return self.block, self.number, self.index


def _sd15_sites() -> tuple[CrossAttentionSite, ...]:
    levels = (
        [("input", n, c) for n, c in zip((1, 2, 4, 5, 7, 8), (320, 320, 640, 640, 1280, 1280), strict=True)]
        + [("output", n, c) for n, c in zip(range(3, 12), (1280,) * 3 + (640,) * 3 + (320,) * 3, strict=True)]
        + [("middle", 0, 1280)]
    )
    return tuple(CrossAttentionSite(block, number, 0, channels) for block, number, channels in levels)


SD15_SITES = _sd15_sites()
"""SD1.5's 16 cross-attentions as IP-Adapter files number them (1, 3, .. 31): input, output, middle."""


@dataclass(frozen=True)
class SMPModelConfig:
    """A whole SMP: tokens from an image encoder, a motion between them, and the cross-attentions they enter.

    Args:
        token_space: `image_embeds` (1 token, the encoder's projected embedding) or `resampled` (the encoder's
            penultimate hidden states through the resampler).
        encoder_width: channels of what the encoder hands over (ViT-H-14: 1024 embedding, 1280 hidden states).
        sites: the UNet's cross-attentions that have added key/value projections.
        guidance: how the added keys and values were trained to be used: concat (equation 6) or decoupled (IP-Adapter).
        uncond: what the unconditional rows saw in training: an all-zero token, or a blank image, encoded.
        predictor: the trained predictor's shape, or None when motion is `interpolation`.
        interpolation: the motion without a predictor. A predictor always starts from the linear one.
        resampler: set if and only if token_space is `resampled`.
        projection: maps the token space to the tokens that the added projections read, where these differ.

    Raises:
        ValueError: the parts do not fit each other.
    """

    token_space: TokenSpace
    encoder_width: int
    sites: tuple[CrossAttentionSite, ...]
    guidance: Guidance
    uncond: Uncond
    predictor: SMPConfig | None = None
    interpolation: Interpolation = "linear"
    resampler: ResamplerConfig | None = None
    projection: ProjectionConfig | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        _require_choice("token_space", self.token_space, ("image_embeds", "resampled"))
        _require_choice("guidance", self.guidance, ("concat", "decoupled"))
        _require_choice("uncond", self.uncond, ("zero", "blank_image"))
        _require_choice("interpolation", self.interpolation, ("linear", "spherical"))
        if not self.sites:
            raise ValueError("An SMP needs at least one cross-attention site; sites is empty.")
        if (self.resampler is not None) != (self.token_space == "resampled"):
            raise ValueError("An SMP has a resampler if and only if its token_space is 'resampled'.")
        if self.resampler is not None and self.resampler.encoder_width != self.encoder_width:
            raise ValueError(f"The resampler reads width {self.resampler.encoder_width}, not {self.encoder_width}.")
        if self.predictor is not None and (self.predictor.tokens, self.predictor.width) != self.token_shape:
            shape = (self.predictor.tokens, self.predictor.width)
            raise ValueError(f"The predictor works on tokens of shape {shape}, the token space has {self.token_shape}.")
        if self.projection is not None and self.token_shape != (1, self.projection.embed_width):
            raise ValueError(
                f"The image projection reads one token of width {self.projection.embed_width}, "
                f"the token space has {self.token_shape}."
            )

    @property
    def token_shape(self) -> tuple[int, int]:
        """(N, C) of the space in which motion is predicted."""
        if self.resampler is not None:
            return self.resampler.queries, self.resampler.width
        return 1, self.encoder_width

    @property
    def output_shape(self) -> tuple[int, int]:
        """(N, C) of the tokens that the added key/value projections read."""
        if self.projection is not None:
            return self.projection.tokens, self.projection.width
        return self.token_shape

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SMPModelConfig:
        """Build from plain JSON types. ValueError on unknown or missing entries, or parts that do not fit."""
        parts = dict(data)
        for name, part in (
            ("predictor", SMPConfig),
            ("resampler", ResamplerConfig),
            ("projection", ProjectionConfig),
        ):
            if parts.get(name) is not None:
                parts[name] = build_dataclass(part, parts[name])
        parts["sites"] = tuple(build_dataclass(CrossAttentionSite, site) for site in parts.get("sites", ()))
        return build_dataclass(cls, parts)


T = TypeVar("T")


def build_dataclass(cls: type[T], data: dict[str, Any]) -> T:
    """An instance of a dataclass from named entries; ValueError, naming them, when some are unknown or missing."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no entries named {unknown}; it has {sorted(known)}.")
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} is incomplete: {error}.") from error


def _require_at_least(owner: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{owner}.{name} is {value}; it must be at least {least}.")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {list(choices)}.")
