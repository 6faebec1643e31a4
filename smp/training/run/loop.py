"""The training loop: one for both stages, one CPU and many GPUs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config import TrainConfig, require_same_data, require_same_run
from ..data.clips import Clip, ClipDataset, DrawnClips, identity, stack
from ..data.order import ClipOrder, ProcessBatches, Share
from ..stages.stage import Stage
from .average import Average, copy_values, load_values
from .checkpoints import load_latest, save_state
from .schedule import get_ema_decay, get_lr
from .validation import validate

LOG = "log"


def train(config: TrainConfig, stage: Stage, clips: ClipDataset, validation: ClipDataset | None = None) -> None:
    """Train `stage` until `config.iterations`, from the last checkpoint in `config.out` if there is one.

    Everything by chance depends on the seed and a clip's position in the run, never on the process or on when the
    run was interrupted: the losses of a resumed run are those of an unbroken one.

    Args:
        config: the run.
        stage: what trains; all processes must build it alike.
        clips: the training set.
        validation: clips that are never trained on.

    Raises:
        ValueError: a batch that the processes cannot share evenly, a run begun with other settings, a loss that is no
            longer a number.
    """
    run = Run(config, stage)
    try:
        run.resume(clips)
        run.train(clips, validation)
    finally:
        run.accelerator.end_training()  # closes the log, and the process group


class Run:
    """The state of a run: weights, their average, the optimiser, and the number of iterations done."""

    def __init__(self, config: TrainConfig, stage: Stage) -> None:
        """Starts from the stage's present weights."""
        self.config, self.stage, self.step = config, stage, 0
        self.out = Path(config.out)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=config.out
        )
        passes = config.accumulation(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = passes
        stage.to(self.accelerator.device)
        self.trained = stage.trained()
        self.data: dict[str, Any] = {}
        optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(stage, optimizer)
        self.average = Average(self.trained)

    def train(self, clips: ClipDataset, validation: ClipDataset | None) -> None:
        """The loop."""
        config, accelerator = self.config, self.accelerator
        self._start_log()
        batches = self.batches(clips)
        shown = not accelerator.is_main_process
        bar = tqdm(total=config.iterations, initial=self.step, desc=config.stage, disable=shown, smoothing=0.05)
        since, at = time.perf_counter(), self.step
        while self.step < config.iterations:
            lr = get_lr(config, self.step)
            own_loss = self.advance(batches, lr)
            bar.update()
            if self.step % config.log_every == 0:
                loss = self._mean_loss(own_loss)
                speed = (self.step - at) * config.global_batch / (time.perf_counter() - since)
                since, at = time.perf_counter(), self.step
                bar.set_postfix({"loss": f"{loss:.4g}", "lr": f"{lr:.2g}", "clips/s": f"{speed:.3g}"})
                accelerator.log({"loss": loss, "lr": lr, "clips_per_second": speed}, step=self.step)
            last = self.step == config.iterations
            if validation is not None and (last or self.step % config.validate_every == 0):
                with self.average.in_place_of(self.stage):
                    validate(config, self.stage, validation, accelerator, self.step)
            if last or self.step % config.checkpoint_every == 0:
                self.save()
        bar.close()

    def advance(self, batches: Iterator[Clip], lr: float) -> torch.Tensor:
        """One iteration: all forward and backward passes of this process, then the step; its mean loss, ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        passes, total = self.accelerator.gradient_accumulation_steps, 0.0
        for _ in range(passes):
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            with self.accelerator.accumulate(self.model):  # gradients travel between processes in the last pass only
                loss = self.model(batch).mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained.values(), self.config.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total = total + loss.detach() / passes
        self.average.update(self.trained, get_ema_decay(self.config, self.step))
        self.step += 1
        return torch.as_tensor(total)

    def batches(self, clips: ClipDataset) -> Iterator[Clip]:
        """This process's batches from the present iteration on.

        The loader is not handed to Accelerate, which would deal its batches out to the processes a second time.
        """
        config, accelerator = self.config, self.accelerator
        order = ClipOrder(
            clips.shard_sizes,
            batch=config.global_batch,
            seed=config.seed,
            streams=config.streams,
            shuffle_shards=config.shuffle_shards,
        )
        share = Share(accelerator.process_index, accelerator.num_processes, config.micro_batch)
        loader = DataLoader(
            DrawnClips(clips, self.stage.fields, self.stage.draw, config.seed),
            batch_sampler=ProcessBatches(
                order, share, batch=config.global_batch, first=self.step, last=config.iterations
            ),
            collate_fn=stack,
            num_workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        return iter(loader)

    def save(self) -> None:
        """Write the trained files with the averaged weights, then a checkpoint.

        In this order: a run that is killed in between does these iterations again and writes the files anew. The other
        way round the last checkpoint could be there without them, and nothing would be left to do.
        """
        if self.accelerator.is_main_process:
            for leftover in self.out.glob(".*.safetensors.*"):  # of an export that was killed
                leftover.unlink()
            with self.average.in_place_of(self.stage):
                self.stage.export(self.out)
            scaler = self.accelerator.scaler
            state = {
                "config": self.config.to_dict(),
                "data": self.data,
                "trained": copy_values(self.trained),
                "average": self.average.values,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
            }
            save_state(self.out, self.step, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self, clips: ClipDataset) -> None:
        """Go on from the newest checkpoint; ValueError if it is of another run or not the same in all processes."""
        state = load_latest(self.out)
        self.data = identity(clips)
        if state is not None:
            require_same_run(state["config"], self.config)
            require_same_data(state["data"], self.data, self.config)
            load_values(self.trained, state["trained"])
            for name, value in state["average"].items():
                self.average.values[name].copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(f"The processes found checkpoints of iterations {steps}; `out` must be a shared folder.")

    def _start_log(self) -> None:
        # What a killed run logged after its last checkpoint is logged again, so it must not count.
        options = {"tensorboard": {"purge_step": self.step + 1}} if self.step else {}
        self.accelerator.init_trackers(LOG, init_kwargs=options)

    def _mean_loss(self, loss: torch.Tensor) -> float:
        mean = float(self.accelerator.reduce(loss.to(self.accelerator.device), reduction="mean"))
        if not math.isfinite(mean):
            raise ValueError(
                f"The loss of iteration {self.step} is {mean}. Start a new run in another `out` with a learning_rate "
                f"below {self.config.learning_rate}; with `start` set to this run's last smp.safetensors it goes on "
                "from there."
            )
        return mean
