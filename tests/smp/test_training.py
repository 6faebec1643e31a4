"""Training of the SMP: config, order of clips, shards, and the loop's semantic stage, in one process."""

from __future__ import annotations

import functools
import http.server
import json
import math
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from storydiffusion.devtools.tiny.clips import FRAMES, curved_clips, tiny_config, write_clips
from storydiffusion.smp.atomic import atomic_write
from storydiffusion.smp.checkpoint import load_checkpoint
from storydiffusion.smp.training.config import TrainConfig, load_config, require_same_run
from storydiffusion.smp.training.data.clips import Clip, ClipsInMemory, DrawnClips, generator_at, spread, stack
from storydiffusion.smp.training.data.order import ClipOrder, ProcessBatches, Share
from storydiffusion.smp.training.data.shards import EncodedClips, ShardReader
from storydiffusion.smp.training.run.average import Average
from storydiffusion.smp.training.run.build import build
from storydiffusion.smp.training.run.loop import train
from storydiffusion.smp.training.run.measure import measure
from storydiffusion.smp.training.run.schedule import get_ema_decay, get_lr
from storydiffusion.smp.training.run.start import start_smp
from storydiffusion.smp.training.stages.decoding import DecodingDraw
from storydiffusion.smp.training.stages.semantic import SemanticStage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Config


def test_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.iterations, config.frames) == (1e-4, 100_000, 16)
    assert (config.guidance, config.train_motion_module) == ("concat", True)
    assert (config.preview_steps, config.preview_cfg) == (50, 7.5)


def test_a_config_is_read_from_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('out = "x"\nlearning_rate = 1\n[predictor]\nlayers = 2\n', encoding="utf-8")
    config = load_config(tmp_path / "run.toml")
    assert (config.out, config.learning_rate, config.predictor) == ("x", 1, {"layers": 2})
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert load_config(tmp_path / "run.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1", r"run.toml cannot be used as a training config. .* no entries named \['lerning_rate'\]"),
        ("iterations = 0", "iterations is 0; it must be at least 1"),
        ('iterations = "many"', "iterations is 'many'; it must be of type int"),
        ("iterations = true", "iterations is True; it must be of type int"),
        ('learning_rate = "1e-4"', "learning_rate is '1e-4'; it must be of type number"),
        ('stage = "both"', r"stage is 'both'; it must be one of \['semantic', 'decoding'\]"),
        ('guidance = "sum"', "guidance is 'sum'"),
        ("ema = 1.0", "ema is 1.0; it must be at least 0 and less than 1"),
        ("drop_both = 0.95", "their sum at most 1"),
        ("streams = 3", "streams is 3; it must divide global_batch, which is 64"),
        ("clip_norm = 0.0", "clip_norm is 0.0; it must be more than 0"),
        ("out = [", "run.toml cannot be used"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.toml")


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    config = TrainConfig(global_batch=64, micro_batch=4)
    assert [config.accumulation(processes) for processes in (1, 2, 16)] == [16, 8, 1]
    with pytest.raises(ValueError, match=r"multiple of micro_batch \(4\) times the number of processes \(3\)"):
        config.accumulation(3)
    with pytest.raises(ValueError, match="global_batch is 64"):
        config.accumulation(32)


def test_learning_rate_and_average_follow_their_schedules() -> None:
    constant = TrainConfig(warmup=4, iterations=12, learning_rate=1.0)
    assert [get_lr(constant, step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = replace(constant, schedule="cosine")
    assert [get_lr(cosine, step) for step in (4, 8, 12)] == pytest.approx([1, 0.5, 0])
    assert get_lr(replace(constant, warmup=0), 0) == 1
    assert [get_ema_decay(constant, step) for step in (0, 90)] == pytest.approx([0.1, 0.91])
    assert get_ema_decay(constant, 10**6) == constant.ema


def test_the_average_is_a_moving_one() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"p": parameter})
    parameter.data.fill_(3)
    average.update({"p": parameter}, 0.75)
    assert average.values["p"].item() == pytest.approx(0.75 * 1 + 0.25 * 3)


# Order


def test_every_epoch_holds_every_clip_once_in_another_order() -> None:
    order = ClipOrder([3, 0, 4, 5], batch=4, seed=1, shuffle_shards=2)
    epochs = [[order.clip(position) for position in range(12 * e, 12 * e + 12)] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = ClipOrder([3, 0, 4, 5], batch=4, seed=1, shuffle_shards=2)
    assert [again.clip(position) for position in range(24, 36)] == epochs[2]  # without having gone there
    other_seed = ClipOrder([3, 0, 4, 5], batch=4, seed=2, shuffle_shards=2)
    assert [other_seed.clip(position) for position in range(12)] != epochs[0]


def test_clips_are_mixed_among_few_shards_at_a_time() -> None:
    order = ClipOrder([10] * 6, batch=1, seed=0, shuffle_shards=2)
    shards = [order.clip(position) // 10 for position in range(60)]
    assert [len(set(shards[first : first + 20])) for first in (0, 20, 40)] == [2, 2, 2]
    assert shards[:20] != sorted(shards[:20])


def test_a_stream_reads_its_own_shards_only() -> None:
    order = ClipOrder([5, 7, 5, 7], batch=4, seed=0, streams=2)
    shards = [5, 12, 17, 24]
    slots = {slot: {order.clip(step * 4 + slot) for step in range(50)} for slot in range(4)}
    owners = {slot: {next(i for i, end in enumerate(shards) if clip < end) for clip in slots[slot]} for slot in slots}
    assert owners == {0: {0, 2}, 1: {0, 2}, 2: {1, 3}, 3: {1, 3}}
    assert slots[0] | slots[1] | slots[2] | slots[3] == set(range(24))
    with pytest.raises(ValueError, match="streams is 3; there are only 2 shards with clips"):
        ClipOrder([5, 0, 5], batch=3, seed=0, streams=3)
    with pytest.raises(ValueError, match="holds no clips"):
        ClipOrder([0], batch=1, seed=0)


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_processes_share_an_iteration_whatever_their_number(processes: int, micro_batch: int) -> None:
    order = ClipOrder([9, 9], batch=8, seed=3, streams=2)

    def batches(process: int, first: int) -> list[list[tuple[int, int]]]:
        share = Share(process, processes, micro_batch)
        sampler = ProcessBatches(order, share, batch=8, first=first, last=5)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    for first in (0, 3):
        parts = [batches(process, first) for process in range(processes)]
        passes = 8 // processes // micro_batch
        for step in range(first, 5):
            own = [part[(step - first) * passes : (step - first + 1) * passes] for part in parts]
            places = [place for part in own for batch in part for place in batch]
            assert sorted(places) == [(p, order.clip(p)) for p in range(8 * step, 8 * step + 8)]


def test_draws_depend_on_position_and_seed_alone() -> None:
    clips = ClipsInMemory([{"latents": torch.zeros(2, 1, 3, 3)}] * 2, {})
    draw = DecodingDraw(0.05, 0.05, 0.05, 1000)

    def drawn(position: int, seed: int = 0) -> dict[str, torch.Tensor]:
        return DrawnClips(clips, ("latents",), draw, seed)[position, 0]

    assert torch.equal(drawn(7)["noise"], drawn(7)["noise"])
    assert not torch.equal(drawn(7)["noise"], drawn(8)["noise"])
    assert not torch.equal(drawn(7)["noise"], drawn(7, seed=1)["noise"])


def test_conditioning_is_dropped_at_its_rates() -> None:
    draw = DecodingDraw(drop_motion=0.2, drop_text=0.3, drop_both=0.1, timesteps=10)
    generator = torch.Generator().manual_seed(0)
    clip = {"latents": torch.zeros(1)}
    draws = [draw(clip, generator) for _ in range(2000)]
    motion, text = (torch.stack([d[name] for d in draws]) for name in ("drop_motion", "drop_text"))
    shares = [(motion & ~text), (text & ~motion), (motion & text)]
    assert [share.float().mean().item() for share in shares] == pytest.approx([0.2, 0.3, 0.1], abs=0.03)
    assert {int(d["timesteps"]) for d in draws} == set(range(10))
    never = [DecodingDraw(0, 0, 0, 10)(clip, generator) for _ in range(50)]
    assert not any(d["drop_motion"] or d["drop_text"] for d in never)


def test_a_clip_that_lacks_what_the_stage_reads_is_named() -> None:
    clips = DrawnClips(ClipsInMemory(curved_clips(1), {}), ("tokens", "latents"), DecodingDraw(0, 0, 0, 1), 0)
    with pytest.raises(ValueError, match=r"Clip 0 has no \['latents'\]; it has \['tokens'\]"):
        clips[0, 0]


# Shards


@pytest.fixture
def prepared(tmp_path: Path) -> TrainConfig:
    config = tiny_config(tmp_path / "run", data=str(tmp_path / "clips"))
    write_clips(tmp_path / "clips", curved_clips(7), config, shard_size=3)
    return config


def test_clips_come_back_from_shards_by_number(prepared: TrainConfig) -> None:
    clips = EncodedClips(prepared.data, ("tokens",), frames=FRAMES)
    assert clips.shard_sizes == [3, 3, 1]
    for copy in (clips, pickle.loads(pickle.dumps(clips))):
        for number in (6, 0, 4):
            torch.testing.assert_close(copy[number]["tokens"], curved_clips(7)[number]["tokens"], rtol=1e-3, atol=1e-3)
    with pytest.raises(IndexError, match="There is no clip 7"):
        clips[7]


def test_shards_come_from_a_url_through_the_cache(prepared: TrainConfig, tmp_path: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=prepared.data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        remote = EncodedClips(url, ("tokens",), frames=FRAMES, cache=str(tmp_path / "cache"))
        local = EncodedClips(prepared.data, ("tokens",), frames=FRAMES)
        assert torch.equal(remote[5]["tokens"], local[5]["tokens"])
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["000001.tar"]  # only what was asked for
        server.shutdown()
    assert torch.equal(remote[4]["tokens"], local[4]["tokens"])  # from the cache
    with pytest.raises(ValueError, match="`cache` must name a folder"):
        ShardReader(url)


def test_shards_that_do_not_fit_the_run_are_refused(prepared: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 5 frames, the config says 6"):
        build(replace(prepared, frames=6))
    with pytest.raises(ValueError, match="another token space"):
        build(replace(prepared, model={**prepared.model, "encoder_width": 9}))
    with pytest.raises(ValueError, match=r"no index.json in .*; `python -m smp.prepare` makes"):
        build(replace(prepared, data=str(tmp_path)))
    with pytest.raises(ValueError, match="names no `data`"):
        build(replace(prepared, data=""))
    with pytest.raises(ValueError, match=r"neither `start` .* nor a \[model\]"):
        build(replace(prepared, model={}))


def read_all(url: str, cache: Path, started: Barrier) -> None:
    started.wait()
    remote = EncodedClips(url, ("tokens",), frames=FRAMES, cache=str(cache))
    assert [len(remote[number]["tokens"]) for number in range(7)] == [FRAMES] * 7


def test_a_forked_process_opens_the_shards_anew(prepared: TrainConfig, tmp_path: Path) -> None:
    """An open file's place is shared after a fork: one process would read where another has gone."""
    clips = EncodedClips(prepared.data, ("tokens",), frames=FRAMES)
    old = clips[0]["tokens"]
    write_clips(tmp_path / "others", curved_clips(7, seed=1), prepared, shard_size=3)
    (tmp_path / "others" / "000000.tar").replace(Path(prepared.data) / "000000.tar")
    new = EncodedClips(prepared.data, ("tokens",), frames=FRAMES)[0]["tokens"]
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=lambda: answer.put(clips[0]["tokens"].tolist()))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answer.get() == new.tolist() != old.tolist()
    assert torch.equal(clips[0]["tokens"], old)  # while this process goes on with what it had opened


def test_reading_processes_change_nothing(prepared: TrainConfig, quiet: None) -> None:
    runs = [replace(prepared, out=f"{prepared.out}-{workers}", workers=workers) for workers in (0, 2)]
    for config in runs:
        stage, clips, _ = build(config)
        assert clips[3].keys() == {"tokens"}  # a shard is open when the reading processes start
        train(config, stage, clips)
    assert events(runs[0], "loss") == events(runs[1], "loss")
    assert len(set(events(runs[0], "loss").values())) == runs[0].iterations


@pytest.mark.slow
def test_processes_that_read_the_same_shards_download_each_once(prepared: TrainConfig, tmp_path: Path) -> None:
    asked: list[str] = []

    class Slow(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(0.2)  # all of them come while it is not there yet
            super().do_GET()

        def log_message(self, *args: object) -> None: ...

    context = multiprocessing.get_context("fork")
    handler, started = functools.partial(Slow, directory=prepared.data), context.Barrier(4)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        arguments = (url, tmp_path / "cache", started)
        processes = [context.Process(target=read_all, args=arguments) for _ in range(4)]
        for process in processes:  # before the server's thread, which a fork would not take along
            process.start()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for process in processes:
            process.join(60)
        server.shutdown()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path for path in asked if path.endswith(".tar")) == [f"/00000{shard}.tar" for shard in range(3)]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"00000{shard}.tar" for shard in range(3)]


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "file") as partial:
            partial.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as first:
        first.write_text("first", encoding="utf-8")
        with atomic_write(tmp_path / "file") as second:
            second.write_text("second", encoding="utf-8")
        assert (tmp_path / "file").read_text(encoding="utf-8") == "second"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The loop


def events(config: TrainConfig, name: str) -> dict[int, float]:
    """What was logged, as it was written: files of runs that began within one second are in no order."""
    log = EventAccumulator(str(Path(config.out) / "log"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in sorted(log.Scalars(name), key=lambda event: event.wall_time)}


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Progress bars stay out of the test's output."""
    yield
    capfd.readouterr()


def semantic(config: TrainConfig) -> SemanticStage:
    return SemanticStage(*start_smp(config))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_the_semantic_stage_learns_the_bow_that_a_line_misses(tmp_path: Path, quiet: None, seed: int) -> None:
    wide = {"hidden": 32, "layers": 1, "heads": 2, "head_dim": 16}
    size = {"iterations": 240, "global_batch": 16, "micro_batch": 16, "validate_every": 120}
    config = tiny_config(tmp_path / "run", seed=seed, predictor=wide, **size)
    stage = semantic(config)
    frozen = {name: value.clone() for name, value in stage.added_kv.state_dict().items()}
    blank = {"tokens": torch.zeros(1, 8)}
    held_out = ClipsInMemory(curved_clips(16, seed=100 + seed), blank)
    train(config, stage, ClipsInMemory(curved_clips(3840, seed=seed), blank), held_out)
    loss, linear = events(config, "validation/loss"), events(config, "validation/linear")
    assert list(loss) == [120, 240]
    assert linear[120] == linear[240] > 0
    assert loss[240] < loss[120] < linear[120]
    assert loss[240] < 0.5 * linear[240]  # on clips never trained on; untrained it is the line
    assert events(config, "loss")[1] > 1.5 * events(config, "loss")[240]
    assert sorted(set(events(config, "lr").values())) == pytest.approx([0.005, 0.01])
    assert all(speed > 0 for speed in events(config, "clips_per_second").values())
    assert len(list((tmp_path / "run" / "previews").rglob("*.png"))) == 4  # two clips, twice
    saved = load_checkpoint(tmp_path / "run" / "smp.safetensors")
    assert saved.config == stage.motion.config
    assert all(torch.equal(saved.added_kv[name], value) for name, value in frozen.items())


def test_the_semantic_loss_is_equation_7_for_each_clip(tmp_path: Path) -> None:
    stage = semantic(tiny_config(tmp_path / "run"))
    torch.nn.init.normal_(stage.motion.predictor.proj_out.weight, generator=generator_at(0, 0))
    tokens = stack(curved_clips(3))["tokens"]
    with torch.no_grad():
        loss, numbers = stage({"tokens": tokens}), stage.validate({"tokens": tokens})
        predicted = [stage.motion.predictor(clip[:1], clip[-1:], FRAMES)[0] for clip in tokens]
    expected = [(mine - true).square().mean() for mine, true in zip(predicted, tokens, strict=True)]
    torch.testing.assert_close(loss, torch.stack(expected))
    torch.testing.assert_close(numbers["loss"], torch.stack(expected))
    times = torch.linspace(0, 1, FRAMES)[:, None, None]
    line = tokens[:, :1] * (1 - times) + tokens[:, -1:] * times
    torch.testing.assert_close(numbers["linear"], (line - tokens).square().mean(dim=(1, 2, 3)))


def test_validation_looks_at_the_same_clips_spread_over_the_set(tmp_path: Path, quiet: None) -> None:
    assert spread(3, 10) == [1, 5, 8]
    assert spread(1, 3) == [1]
    assert spread(9, 4) == [0, 1, 2, 3]
    assert spread(0, 4) == spread(4, 0) == []
    asked: list[int] = []

    class Watched(ClipsInMemory):
        def __getitem__(self, index: int) -> Clip:
            asked.append(index)
            return super().__getitem__(index)

    config = tiny_config(tmp_path / "run", iterations=2, validate_every=1, validation_clips=3, preview_clips=2)
    train(config, semantic(config), ClipsInMemory(curved_clips(8), {}), Watched(curved_clips(10), {}))
    assert asked == 2 * [1, 5, 8, 2, 7]


def test_measuring_needs_no_file_that_the_config_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run", global_batch=1, micro_batch=1, model={}, start="ip-adapter-plus.safetensors")
    measure(config, 1)
    printed = capfd.readouterr()
    assert "ip-adapter-plus.safetensors isn't there yet; an SMP of IP-Adapter Plus's shape" in printed.err
    report = json.loads(printed.out)
    assert report["shard_gb_per_million_clips"] == pytest.approx(2 * 5 * 16 * 768 / 1e3)  # 5 frames of 16 tokens
    measure(replace(config, start=""), 1)
    assert "isn't there" not in capfd.readouterr().err


def test_the_saved_file_holds_the_averaged_weights(tmp_path: Path, quiet: None) -> None:
    config = tiny_config(tmp_path / "run", iterations=5)
    stage = semantic(config)
    train(config, stage, ClipsInMemory(curved_clips(8), {}))
    saved = load_checkpoint(tmp_path / "run" / "smp.safetensors").motion["predictor.proj_out.bias"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-000000005.pt", weights_only=True)
    assert torch.equal(saved, state["average"]["motion.predictor.proj_out.bias"])
    assert not torch.equal(saved, state["trained"]["motion.predictor.proj_out.bias"])


def test_accumulated_batches_are_one_batch(tmp_path: Path, quiet: None) -> None:
    clips = ClipsInMemory(curved_clips(16), {})
    whole, parts = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "parts", micro_batch=1)
    for config in (whole, parts):
        train(config, semantic(config), clips)
    assert [*events(parts, "loss").values()] == pytest.approx([*events(whole, "loss").values()], rel=1e-5)


@pytest.mark.parametrize("clip_norm", [1e-8, 100.0])
def test_a_step_is_adamws_with_decay_on_the_clipped_gradient(tmp_path: Path, quiet: None, clip_norm: float) -> None:
    rate, decay = 1e-2, 0.3
    options = {"iterations": 1, "warmup": 0, "micro_batch": 2, "learning_rate": rate, "weight_decay": decay}
    config, clips = tiny_config(tmp_path / "run", clip_norm=clip_norm, **options), curved_clips(4)
    stage = semantic(config)
    with torch.no_grad():  # all of it must move, the layers before an output of zero too
        for number, parameter in enumerate(stage.trained().values()):
            parameter.add_(torch.randn(parameter.shape, generator=generator_at(0, number)) / 5)
    before = {name: value.detach().clone().requires_grad_() for name, value in stage.trained().items()}
    true = stack(clips)["tokens"]
    loss = (torch.func.functional_call(stage, before, ({"tokens": true},))).mean()  # of the batch in one
    gradients = dict(zip(before, torch.autograd.grad(loss, [*before.values()]), strict=True))
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert 1e-3 < norm < 100
    train(config, stage, ClipsInMemory(clips, {}))
    for name, parameter in stage.trained().items():
        gradient = gradients[name] * min(1.0, clip_norm / norm.item())
        # At the first step both of Adam's means are the gradient's own, so its length matters beside epsilon alone.
        moved = before[name] * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter, moved, rtol=1e-4, atol=2e-5, msg=name)


def test_only_so_many_checkpoints_are_kept(tmp_path: Path, quiet: None) -> None:
    config = tiny_config(tmp_path / "run", checkpoint_every=1, keep_checkpoints=3)
    train(config, semantic(config), ClipsInMemory(curved_clips(4), {}))
    assert [path.stem for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        f"step-{step:09d}" for step in (4, 5, 6)
    ]


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path, quiet: None) -> None:
    clips = ClipsInMemory(curved_clips(8), {})
    config = tiny_config(tmp_path / "run")
    train(config, semantic(config), clips)
    for change, message in (({"seed": 1}, "seed: 0 -> 1"), ({"global_batch": 8}, "global_batch: 4 -> 8")):
        changed = replace(config, **change)
        with pytest.raises(ValueError, match=f"started with other settings .*{message}"):
            train(changed, semantic(changed), clips)
    more = ClipsInMemory(curved_clips(9), {})
    with pytest.raises(ValueError, match=r"other clips: 8 in 1 shards, and `data` .* now holds 9 in 1"):
        train(replace(config, iterations=8), semantic(config), more)
    longer = replace(config, iterations=8, micro_batch=2, checkpoint_every=1)
    train(longer, semantic(longer), clips)
    assert list(events(longer, "loss")) == list(range(1, 9))


def test_a_field_that_came_later_had_its_default(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    before = {name: value for name, value in config.to_dict().items() if name not in ("token_weight", "ema")}
    require_same_run(before, replace(config, ema=TrainConfig().ema))
    with pytest.raises(ValueError, match=r"token_weight: 0.0 -> 1.0"):
        require_same_run(before, replace(config, ema=TrainConfig().ema, token_weight=1.0))


def test_a_run_killed_while_it_writes_its_files_writes_them_again(
    tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = ClipsInMemory(curved_clips(8), {})
    config = tiny_config(tmp_path / "run", checkpoint_every=3)
    stage = semantic(config)
    exports = []

    def export(folder: Path) -> None:
        exports.append(folder)
        if len(exports) == 2:  # the one after the last iteration
            raise KeyboardInterrupt
        SemanticStage.export(stage, folder)

    monkeypatch.setattr(stage, "export", export)
    with pytest.raises(KeyboardInterrupt):
        train(config, stage, clips)
    train(config, semantic(config), clips)
    unbroken = replace(config, out=str(tmp_path / "unbroken"))
    train(unbroken, semantic(unbroken), clips)
    files = [load_checkpoint(tmp_path / name / "smp.safetensors").motion for name in ("run", "unbroken")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, quiet: None) -> None:
    config = tiny_config(tmp_path / "run")
    clips = curved_clips(4)
    clips[2]["tokens"][1] = math.nan
    with pytest.raises(ValueError, match="The loss of iteration 1 is nan"):
        train(config, semantic(config), ClipsInMemory(clips, {}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_smp_goes_on_from_its_file(tmp_path: Path, quiet: None) -> None:
    config = tiny_config(tmp_path / "run")
    train(config, semantic(config), ClipsInMemory(curved_clips(8), {}))
    file = tmp_path / "run" / "smp.safetensors"
    second = replace(config, start=str(file), model={}, predictor={}, out=str(tmp_path / "second"))
    motion, _ = start_smp(second)
    weights = load_checkpoint(file).motion
    assert all(torch.equal(value, weights[name]) for name, value in motion.state_dict().items())
    with pytest.raises(ValueError, match=r"a predictor of another shape than \[predictor\]"):
        start_smp(replace(second, predictor={"layers": 7}))
    with pytest.raises(ValueError, match=r"both `start` and a \[model\]"):
        start_smp(replace(second, model=config.model))
    with pytest.raises(ValueError, match="There is no file at"):
        start_smp(replace(second, start="missing.safetensors"))
