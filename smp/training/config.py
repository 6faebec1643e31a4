"""Everything a training run depends on, as data; read from a TOML or JSON file."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import Guidance, build_dataclass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Stage = Literal["semantic", "decoding"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["no", "bf16", "fp16"]

# What may change when a run goes on: where things lie and how often one looks, but nothing that a loss depends on.
FREE_TO_CHANGE = frozenset(
    {
        *("out", "data", "validation_data", "start", "sd15", "motion_module", "cache", "cache_gb", "workers"),
        *("micro_batch", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints", "log_every"),
        *("validate_every", "validation_clips", "preview_clips", "preview_steps", "preview_cfg"),
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Where the paper gives a value, the default is it; else the comment says where it is from.

    Raises:
        ValueError: a value out of range; the message names the field, the value and what is allowed.
    """

    # Semantic: the predictor in token space (equation 7). Decoding: all that the authors trained, while denoising.
    stage: Stage = "semantic"
    # Folder of the run: checkpoints, logs, previews and the trained file.
    out: str = "runs/smp"
    # Shards of embeddings that `smp.prepare` wrote: a folder or a URL.
    data: str = ""
    # The same of clips that are never trained on. Empty: no validation.
    validation_data: str = ""
    # File that training starts from: IP-Adapter for SD1.5 (a decoder that exists), or an SMP. Empty: `model` is built.
    start: str = ""
    # Without `start`: an `SMPModelConfig` as its `to_dict` writes it, without a predictor. Its weights are random.
    model: dict[str, Any] = field(default_factory=dict)
    # Fields of `SMPConfig` that differ from its defaults (8 layers, 1024 wide, 12 heads: the paper's).
    predictor: dict[str, Any] = field(default_factory=dict)
    # How P enters cross-attention in the decoding stage. Equation 6 joins its keys to the text's.
    guidance: Guidance = "concat"

    # Folder of SD1.5 in diffusers' layout: unet/ and vae/ for the decoding stage; text_encoder/ and tokenizer/, with
    # vae/, for `smp.prepare`, which without it stores no latents and no text.
    sd15: str = ""
    # Decoding stage: AnimateDiff V2 motion module file (the paper's base).
    motion_module: str = ""
    # The authors trained predictor, projections and motion module together (their answer in issue #70).
    train_motion_module: bool = True
    # Decoding stage: weight of the tokens' own error (equation 7) beside the denoising loss. The paper names none.
    token_weight: float = 0.0
    # Recomputes the UNet's activations in the backward pass: about a third more time for far less memory.
    gradient_checkpointing: bool = True

    # The paper's.
    iterations: int = 100_000
    # The paper's, with AdamW.
    learning_rate: float = 1e-4
    # The paper names no schedule, so none; cosine goes from learning_rate to zero.
    schedule: Schedule = "constant"
    # Adam's second moments rest on few gradients at first: 1 % of the run. The paper names none.
    warmup: int = 1000
    # AdamW's own default in PyTorch.
    weight_decay: float = 0.01
    # The usual bound for transformers: rare large gradients at low noise would undo many small steps.
    clip_norm: float = 1.0
    # Weights are averaged over some 10 000 steps, as diffusion models usually are; early on over fewer.
    ema: float = 0.9999
    # bf16 is what an A100 trains in without a loss scale; a CPU or an older card wants "no" or "fp16".
    mixed_precision: Precision = "no"

    # Clips per iteration over all processes. The paper names none: its 8 GPUs with 8 clips each.
    global_batch: int = 64
    # Clips per process and forward pass; the rest of the batch is accumulated. 8 clips of 16 frames.
    micro_batch: int = 8
    # Frames per clip: AnimateDiff's 16 (the paper names none). A predictor of other lengths still runs.
    frames: int = 16
    # Dropped conditioning, for classifier-free guidance: P alone, the text alone, both. IP-Adapter's rates.
    drop_motion: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    # All chance follows from it and a clip's position in the run: order, noise, what is dropped.
    seed: int = 0

    # Shards are dealt to this many streams, each of which feeds its own part of every batch: with one stream per node
    # a node reads only its own shards. It orders the data, so it stays as it is when the number of nodes changes.
    streams: int = 1
    # Clips are shuffled among this many shards at a time, so that few shards are open at once.
    shuffle_shards: int = 8
    # Processes that read ahead for each training process. 0: read in between.
    workers: int = 4
    # Where shards behind a URL are kept, and how many gigabytes of them.
    cache: str = ""
    cache_gb: float = 100.0

    # Iterations between checkpoints: what a crash costs at most.
    checkpoint_every: int = 1000
    # Checkpoints kept; each is some four times the trained weights.
    keep_checkpoints: int = 2
    # Iterations between logged losses.
    log_every: int = 10
    # Iterations between validations.
    validate_every: int = 2000
    # Validation clips whose loss is averaged.
    validation_clips: int = 256
    # Validation clips that are drawn to look at.
    preview_clips: int = 2
    # The paper's inference: DDIM, 50 steps, guidance 7.5.
    preview_steps: int = 50
    preview_cfg: float = 7.5

    def __post_init__(self) -> None:
        """Check types and ranges."""
        for entry in fields(self):
            default = {} if entry.default is MISSING else entry.default  # a factory makes the two tables
            _require_type(entry.name, getattr(self, entry.name), default)
        for name, choices in (("stage", Stage), ("schedule", Schedule), ("mixed_precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {list(get_args(choices))}.")
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance is {self.guidance!r}; it must be one of {list(get_args(Guidance))}.")
        positive = ("iterations", "global_batch", "micro_batch", "streams", "shuffle_shards", "checkpoint_every")
        for name in (*positive, "keep_checkpoints", "log_every", "validate_every", "preview_steps"):
            self._require_least(name, 1)
        self._require_least("frames", 2)
        for name in (
            "token_weight",
            "warmup",
            "weight_decay",
            "workers",
            "seed",
            "validation_clips",
            "preview_clips",
            "preview_cfg",
        ):
            self._require_least(name, 0)
        for name in ("learning_rate", "clip_norm", "cache_gb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be at least 0 and less than 1.")
        rates = {name: getattr(self, name) for name in ("drop_motion", "drop_text", "drop_both")}
        if min(rates.values()) < 0 or sum(rates.values()) > 1:
            raise ValueError(f"The dropping rates are {rates}; each must be at least 0, and their sum at most 1.")
        if self.global_batch % self.streams:
            raise ValueError(f"streams is {self.streams}; it must divide global_batch, which is {self.global_batch}.")

    def _require_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def accumulation(self, processes: int) -> int:
        """Forward passes per process and iteration; ValueError when the batch cannot be split evenly."""
        passes, rest = divmod(self.global_batch, self.micro_batch * processes)
        if rest or not passes:
            raise ValueError(
                f"global_batch is {self.global_batch}; it must be a multiple of micro_batch ({self.micro_batch}) times "
                f"the number of processes ({processes}), so that every process does the same work."
            )
        return passes

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as `load_config` reads them."""
        return asdict(self)


def _require_type(name: str, value: Any, default: Any) -> None:
    allowed = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool)):
        kind = "number" if isinstance(default, float) else type(default).__name__
        raise ValueError(f"{name} is {value!r}; it must be of type {kind}.")


def load_config(path: Path) -> TrainConfig:
    """Read a run's config from a `.toml` or `.json` file.

    Raises:
        ValueError: no such file, not TOML or JSON, an unknown key (named), a value out of range.
    """
    if not path.is_file():
        raise ValueError(f"There is no config file at {path}.")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path.name} is a {path.suffix or 'nameless'} file; a config is a .toml or .json file.")
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return build_dataclass(TrainConfig, data)
    except (ValueError, TypeError) as error:  # both decoders' errors are ValueErrors
        raise ValueError(f"{path.name} cannot be used as a training config. {error}") from error


def require_same_run(before: dict[str, Any], now: TrainConfig) -> None:
    """ValueError, naming the fields, when a run is to go on with settings that its losses depend on changed."""
    after = now.to_dict()
    free = FREE_TO_CHANGE | ({"iterations"} if now.schedule == "constant" else set())
    before = {**TrainConfig().to_dict(), **before}  # a field that came later had its default's effect
    changed = [
        f"{name}: {before[name]!r} -> {value!r}"
        for name, value in after.items()
        if name not in free and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"The run in {now.out} was started with other settings ({'; '.join(changed)}). Set them back to go on "
            "with it, or give `out` another folder to start a new run."
        )


def require_same_data(before: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    """ValueError when a run is to go on with other clips than it began with; see `clips.identity`."""
    if before != now:
        raise ValueError(
            f"The run in {config.out} was started on other clips: {before['clips']} in {before['shards']} shards, and "
            f"`data` ({config.data!r}) now holds {now['clips']} in {now['shards']}, or another encoder's. Set `data` "
            "to the same shards, or give `out` another folder to start a new run."
        )
