"""Train the toy world's UNet; resumes from its checkpoint, and comes out the same on the same machine.

python devtools/launch.py storydiffusion.devtools.toy.train --out FOLDER --samples 120000
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_sampling
import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .examples import Examples
from .export import write_weights
from .model import fused_attention, new_unet
from .text_encoder import load_clip


@dataclass(frozen=True)
class Config:
    """What the weights depend on (beside the machine's arithmetic)."""

    samples: int = 120_000
    batch: int = 16
    # Each part of a batch runs on one thread: half a network pass on each of two cores beats every layer on both.
    parts: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    # The rate stays up until this share of the samples is left, so that an unfinished run can be given more.
    decay: float = 0.4
    ema: float = 0.998
    prompts: int = 6144
    seed: int = 1

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, plateau, cosine to zero."""
        left = (self.steps - step) / (self.decay * self.steps)
        decayed = 1.0 if left >= 1 else 0.5 - 0.5 * math.cos(math.pi * left)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * decayed


class Trainer:
    """Weights, optimiser and average of one run."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        _one_thread()
        self.examples = Examples(load_clip(), prompts=config.prompts, seed=config.seed, device=device)
        self.unets = [new_unet(config.seed).to(device).train() for _ in range(config.parts)]
        self.parameters = list(self.unets[0].parameters())
        for unet in self.unets[1:]:  # one set of weights, one gradient each
            for own, shared in zip(unet.parameters(), self.parameters, strict=True):
                own.data = shared.data
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )
        schedule = comfy.model_sampling.ModelSamplingDiscrete()
        self.alphas = (1 / (1 + schedule.sigmas**2)).to(device)
        self.pool = ThreadPoolExecutor(config.parts, initializer=_one_thread)
        self.step = 0

    def advance(self) -> float:
        """One optimiser step; gives the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        losses = list(self.pool.map(self._backward, range(self.config.parts)))
        for own in zip(*(unet.parameters() for unet in self.unets), strict=True):
            for other in own[1:]:
                own[0].grad += other.grad
                other.grad = None
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The first steps' weights would linger for long in a plain average.
        keep = min(self.config.ema, self.step / (self.step + 20))
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.parameters], 1 - keep)
        return sum(losses)

    def _backward(self, part: int) -> float:
        size = self.config.batch // self.config.parts
        latents, context = self.examples.batch(self.step, part, size)
        seed = np.random.SeedSequence([self.config.seed, self.step, part]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        # One time from each of `size` equal ranges: the loss depends on the time more than on anything else.
        fractions = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        t = (fractions * len(self.alphas)).long().to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        signal, sigma = self.alphas[t].sqrt()[:, None, None, None], (1 - self.alphas[t]).sqrt()[:, None, None, None]
        unet: UNetModel = self.unets[part]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            predicted = unet(
                signal * latents + sigma * noise,
                timesteps=t,
                context=context,
                transformer_options={"optimized_attention_override": fused_attention},
            )
        loss = F.mse_loss(predicted.float(), signal * noise - sigma * latents) / self.config.parts
        loss.backward()
        return loss.item()

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        names = (name for name, _ in self.unets[0].named_parameters())
        return dict(zip(names, self.average, strict=True))

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "weights": self.unets[0].state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path) -> None:
        """Continue a run. It may be given more samples as long as its learning rate has not begun to fall."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        before = Config(**state["config"])
        same = asdict(before) | {"samples": 0} == asdict(self.config) | {"samples": 0}
        if not same or before.rate(state["step"]) != self.config.rate(state["step"]):
            raise SystemExit(f"{path} is of another run ({before}); give another --out, or remove it.")
        for own, value in zip(self.parameters, state["weights"].values(), strict=True):
            own.data.copy_(value)
        for own, value in zip(self.average, state["average"], strict=True):
            own.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # per thread; late in training denormal gradients slow a CPU down many times


def run(trainer: Trainer, out: Path, *, checkpoint_seconds: float = 120) -> Iterator[str]:
    """Train to the end, with checkpoints and usable weights on the way; gives lines of progress."""
    checkpoint, config = out / "checkpoint.pt", trainer.config
    if checkpoint.is_file():
        trainer.resume(checkpoint)
        yield f"resumed at step {trainer.step} of {config.steps}"
    losses: list[float] = []
    begun, first, saved = time.monotonic(), trainer.step, time.monotonic()
    while trainer.step < config.steps:
        losses.append(trainer.advance())
        if trainer.step % 50 == 0:
            speed = (trainer.step - first) * config.batch / (time.monotonic() - begun)
            loss = sum(losses) / len(losses)
            yield f"step {trainer.step}/{config.steps} loss {loss:.4f} samples/s {speed:.1f}"
            losses.clear()
        if time.monotonic() - saved > checkpoint_seconds or trainer.step == config.steps:
            trainer.save(checkpoint)
            write_weights(trainer.averaged_weights(), out / "toy_world.safetensors", _record(trainer))
            saved = time.monotonic()
    yield f"done: {trainer.step} steps, {trainer.step * config.batch} samples"


def _record(trainer: Trainer) -> dict[str, str]:
    config = trainer.config
    command = "python devtools/launch.py storydiffusion.devtools.toy.train --out FOLDER"
    changed = {name: value for name, value in asdict(config).items() if value != asdict(Config())[name]}
    options = "".join(f" --{name} {value}" for name, value in changed.items())
    return {
        "command": command + options,
        "config": json.dumps(asdict(config)),
        "samples": str(trainer.step * config.batch),
        "device": trainer.device.type,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the weights")
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for line in run(Trainer(Config(**arguments), device), out):
        print(line, flush=True)


if __name__ == "__main__":
    main()
