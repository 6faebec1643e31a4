"""Motion modules while the host samples: frames share, prompts don't, windows hold, and the model stays as it was."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.motion import NARROW_UNET, NARROW_WIDTHS, motion_config, motion_tensors, seeded_sd15
from storydiffusion.devtools.tiny.motion_oracle import (
    record_unet_calls,
    relative_error,
    sample_video,
    seeded_conditioning,
)
from storydiffusion.nodes.animatediff.injection import MOTION_KEY
from storydiffusion.nodes.animatediff.loader import load_motion_module
from storydiffusion.nodes.animatediff.nodes import StoryApplyMotionModule
from storydiffusion.nodes.animatediff.schedule import MODEL_BETAS
from storydiffusion.nodes.consistent_attention.nodes import StoryApplyConsistentSelfAttention

WIDTH = NARROW_UNET["context_dim"]


@pytest.fixture(scope="module")
def base():
    return seeded_sd15(NARROW_UNET)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Two different motion modules: v2 and v3."""
    folder = tmp_path_factory.mktemp("motion")
    for name, middle, seed in (("v2", True, 0), ("v3", False, 1)):
        save_file(motion_tensors(motion_config(NARROW_WIDTHS, middle=middle), seed), folder / f"{name}.safetensors")
    return [load_motion_module(str(folder / f"{name}.safetensors")) for name in ("v2", "v3")]


@pytest.fixture(scope="module")
def video(base, modules):
    return apply(base, modules[0])


def apply(model, motion_module, **inputs):
    return StoryApplyMotionModule.execute(model, motion_module, **inputs).result[0]


def windowed(model, length, overlap, schedule="standard_static", causal=False):
    return ContextWindowsManualNode.execute(
        *(model, length, overlap, schedule, 1, False, "pyramid", 0, False),
        cond_retain_index_list="",
        latent_retain_index_list="",
        causal_window_fix=causal,
    ).result[0]


def denoise(model, noise, positive=None, negative=None, cfg=7.0):
    """One sampling step from the given noise (frames, 4, h, w)."""
    return comfy.sample.sample(
        *(model, noise, 1, cfg, "euler", "normal"),
        positive or seeded_conditioning(1, WIDTH),
        negative or seeded_conditioning(2, WIDTH),
        torch.zeros_like(noise),
        disable_pbar=True,
    )


def noise_of(frames, seed=0, size=16):
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(seed))


def changed_frame(noise, frame):
    changed = noise.clone()
    changed[frame] = noise_of(1, seed=99, size=noise.shape[-1])[0]
    return changed


@pytest.mark.slow
def test_frames_share_with_and_do_not_without(base, video):
    noise = noise_of(4)
    for model, shares in ((base, False), (video, True)):
        first, second = denoise(model, noise), denoise(model, changed_frame(noise, 3))
        for frame in range(3):
            assert (relative_error(second[frame], first[frame]) > 1e-3) == shares


def test_one_frame_is_sane(video):
    alone = denoise(video, noise_of(1))
    assert alone.shape == (1, 4, 16, 16)
    assert alone.isfinite().all()
    assert alone.std() > 0


def test_scale_zero_is_the_stock_model_bit_for_bit(base, modules):
    assert torch.equal(sample_video(apply(base, modules[0], scale=0.0), 3), sample_video(base, 3))


@pytest.mark.slow
def test_scale_is_continuous_down_to_zero(base, modules):
    stock = sample_video(base, 3)
    errors = [
        relative_error(sample_video(apply(base, modules[0], scale=scale, beta_schedule=MODEL_BETAS), 3), stock)
        for scale in (1e-4, 0.01, 1.0)
    ]
    assert 0 < errors[0] < 1e-2
    assert errors == sorted(errors)


def chunks_of(model, positive, negative):
    model, calls = record_unet_calls(model)
    denoise(model, noise_of(3), positive, negative)
    return calls


def test_prompts_never_mix_in_time(video):
    """Uncond rows come first; with another negative prompt, the positive's rows stay the same."""
    positive = seeded_conditioning(1, WIDTH)
    first = chunks_of(video, positive, seeded_conditioning(2, WIDTH))[0]
    second = chunks_of(video, positive, seeded_conditioning(3, WIDTH))[0]
    assert first.chunks == second.chunks == 2
    assert relative_error(second.output[3:], first.output[3:]) < 1e-6
    assert relative_error(second.output[:3], first.output[:3]) > 1e-3


def test_each_chunk_equals_its_own_call(video):
    prompts = [seeded_conditioning(seed, WIDTH) for seed in (1, 2, 3)]
    together = chunks_of(video, prompts[0] + prompts[1], prompts[2])[0]
    assert together.chunks == 3
    for chunk in range(3):
        rows = slice(3 * chunk, 3 * chunk + 3)
        context = together.context[rows][:1]
        alone = record_unet_calls(video)
        denoise(alone[0], noise_of(3), positive=[[context, {}]], cfg=1.0)
        assert alone[1][0].chunks == 1
        assert relative_error(together.output[rows], alone[1][0].output) < 1e-5


@pytest.mark.slow
def test_windows_without_overlap_equal_separate_videos(video):
    noise = noise_of(8)
    together = denoise(windowed(video, 4, 0), noise)
    apart = torch.cat([denoise(video, part) for part in noise.split(4)])
    assert relative_error(together, apart) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_longer_videos_than_the_motion_module_go_through_windows(video, schedule):
    noise = noise_of(34)
    with pytest.raises(ValueError, match=r"34 frames are sampled at once, .* at most 32\..*causal_window_fix"):
        denoise(video, noise)
    result = denoise(windowed(video, 16, 4, schedule), noise)
    assert result.isfinite().all()
    assert relative_error(denoise(windowed(video, 16, 4, schedule), changed_frame(noise, 20)), result) > 1e-3


@pytest.mark.slow
def test_causal_window_fix_adds_a_frame_that_counts(video):
    noise = noise_of(6)
    fixed = denoise(windowed(video, 4, 0, "batched", causal=True), noise)
    assert relative_error(fixed[:4], denoise(video, noise[:4])) < 1e-5
    assert relative_error(fixed[4:], denoise(video, noise[3:])[1:]) < 1e-5
    with pytest.raises(ValueError, match="33 frames are sampled at once"):
        denoise(windowed(video, 32, 0, causal=True), noise_of(34))


@pytest.mark.slow
def test_two_motion_modules_and_another_checkpoint_in_one_process(base, modules, video):
    other = seeded_sd15(NARROW_UNET, seed=1)
    names = set(base.model.state_dict())
    plain, plain_other = sample_video(base, 3), sample_video(other, 3)
    first = sample_video(video, 3)
    second = sample_video(apply(base, modules[1]), 3)
    assert relative_error(second, first) > 1e-2
    assert torch.equal(sample_video(video, 3), first)
    assert torch.equal(sample_video(base, 3), plain)
    assert torch.equal(sample_video(other, 3), plain_other)
    assert set(base.model.state_dict()) == names
    assert not base.additional_models
    assert "patches" not in base.model_options["transformer_options"]


def test_the_host_loads_and_unloads_the_weights(base, modules, video):
    first = sample_video(video, 3)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(patcher.is_clone(modules[0]) for patcher in loaded)
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    assert torch.equal(sample_video(video, 3), first)


def test_nothing_outlives_a_run(video):
    options = []

    def note(executor, *args, **kwargs):
        options.append(args[5])
        return executor(*args, **kwargs)

    model = video.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    sample_video(model, 3)
    assert MOTION_KEY in options[0]  # the wrapper added last runs innermost
    assert MOTION_KEY not in model.model_options["transformer_options"]


@pytest.mark.slow
def test_interrupted_run_leaves_nothing_behind(base, video):
    plain, first = sample_video(base, 3), sample_video(video, 3)

    def stop(*_):
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    layer = base.model.diffusion_model.output_blocks[4][0]  # inside a call, motion modules on both sides
    hook = layer.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample_video(video, 3)
    finally:
        hook.remove()
    assert torch.equal(sample_video(base, 3), plain)
    assert torch.equal(sample_video(video, 3), first)


@pytest.mark.slow
def test_clone_for_another_device_has_weights_of_its_own(video):
    clone = video.deepclone_multigpu(new_load_device=torch.device("cpu"))
    own = clone.get_additional_models_with_key(MOTION_KEY)[0].model
    assert own is not video.get_additional_models_with_key(MOTION_KEY)[0].model
    with torch.no_grad():
        own.mid_block.motion_modules[0].proj_out.weight.mul_(2)
    assert relative_error(sample_video(clone, 3), sample_video(video, 3)) > 1e-4
    with torch.no_grad():
        own.mid_block.motion_modules[0].proj_out.weight.div_(2)
    assert torch.equal(sample_video(clone, 3), sample_video(video, 3))


def consistent(model):
    return StoryApplyConsistentSelfAttention.execute(
        model, sampling_rate=0.5, seed=0, start_percent=0.0, end_percent=1.0, blocks="decoder", window=0
    ).result[0]


@pytest.mark.slow
def test_consistent_self_attention_and_motion_both_act_in_either_order(base, modules, video):
    both = sample_video(consistent(video), 4)
    assert torch.equal(sample_video(apply(consistent(base), modules[0]), 4), both)
    assert relative_error(both, sample_video(video, 4)) > 1e-3
    assert relative_error(both, sample_video(consistent(base), 4)) > 1e-3


@pytest.mark.slow
def test_consistent_self_attention_shares_within_a_window(video):
    """Frames of another window are not in the call: they are neither seen by attention in time nor shared from."""
    noise = noise_of(8)
    model = windowed(consistent(video), 4, 0)
    first, second = denoise(model, noise), denoise(model, changed_frame(noise, 6))
    assert relative_error(second[:4], first[:4]) < 1e-6
    assert relative_error(second[4:6], first[4:6]) > 1e-3


def test_a_second_model_without_a_module_of_its_own_gets_the_first_ones(base, video):
    """Dual Model CFG Guider runs the negative on another model, with the first one's patches."""

    def guided(guider):
        guider.set_conds(seeded_conditioning(1, WIDTH), seeded_conditioning(2, WIDTH))
        guider.set_cfg(7.0)
        noise = noise_of(4)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([14.0, 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)

    expected = guided(comfy.samplers.CFGGuider(video))
    assert relative_error(guided(Guider_DualModel(video, base)), expected) < 1e-4
    assert relative_error(guided(Guider_DualModel(video, video.clone())), expected) < 1e-4
    assert relative_error(guided(comfy.samplers.CFGGuider(base)), expected) > 1e-2
