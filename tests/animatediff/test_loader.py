"""Motion module files: every format that holds AnimateDiff v2 or v3 loads, everything else is named and refused."""

import pickle

import comfy.ops
import folder_paths
import pytest
import torch
from diffusers.models.unets.unet_motion_model import MotionAdapter
from safetensors.torch import save_file
from storydiffusion.devtools.tiny.motion import (
    FULL_V2,
    FULL_V3,
    NARROW_WIDTHS,
    SD15_WIDTHS,
    motion_config,
    motion_tensors,
)
from storydiffusion.nodes.animatediff.loader import FOLDER_NAME, load_motion_module, motion_weights, read_config
from storydiffusion.nodes.animatediff.module import MotionModule
from storydiffusion.nodes.animatediff.nodes import StoryLoadMotionModule

V2 = motion_config(NARROW_WIDTHS)
V3 = motion_config(NARROW_WIDTHS, middle=False)
FIRST = "down_blocks.0.motion_modules.0.temporal_transformer."
ENCODING = FIRST + "transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


def small(config=V2, **changes):
    return motion_tensors(config, dtype=torch.float32) | changes


def written(tmp_path, tensors, name="module.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
    return str(tmp_path / name)


def state(path):
    return load_motion_module(path).model.state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize(("spec", "keys", "millions"), [(FULL_V2, 588, 453.2), (FULL_V3, 560, 417.1)])
def test_full_size_has_the_published_number_of_weights(spec, keys, millions):
    module = MotionModule(spec.config, "", operations=comfy.ops.disable_weight_init, device="meta")
    weights = module.state_dict()
    learned = sum(tensor.numel() for key, tensor in weights.items() if "pos_encoder" not in key)
    assert len(weights) == keys
    assert learned / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("config", [V2, V3, motion_config((32, 64, 64), res_blocks=1, max_frames=16)])
def test_safetensors_give_back_sizes_and_weights(tmp_path, config):
    tensors = small(config)
    patcher = load_motion_module(written(tmp_path, tensors))
    assert patcher.model.config == config
    assert patcher.model.name == "module.safetensors"
    own = patcher.model.state_dict()
    assert len(own) == len(tensors)
    for key, tensor in tensors.items():
        name = key.replace("temporal_transformer.", "").replace("pos_encoder.pe", "pos_encoder.weight")
        assert torch.equal(own[name], tensor.reshape(own[name].shape)), key


@pytest.mark.slow
def test_training_checkpoint_equals_the_plain_file(tmp_path):
    tensors = small()
    unet = {"module.conv_in.weight": torch.zeros(32, 4, 3, 3), "module.time_embedding.bias": torch.zeros(8)}
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()} | unet
    content = {"epoch": 3, "global_step": 100, "state_dict": wrapped}
    torch.save(content, tmp_path / "module.ckpt")
    assert_same(state(str(tmp_path / "module.ckpt")), state(written(tmp_path, tensors)))


@pytest.mark.parametrize("middle", [True, False])
def test_diffusers_motion_adapter_loads(tmp_path, middle):
    torch.manual_seed(0)
    adapter = MotionAdapter(block_out_channels=NARROW_WIDTHS, use_motion_mid_block=middle)
    adapter.save_pretrained(tmp_path)
    own = state(str(tmp_path / "diffusion_pytorch_model.safetensors"))
    theirs = adapter.down_blocks[1].motion_modules[0]
    block = theirs.transformer_blocks[0]
    prefix = "down_blocks.1.motion_modules.0."
    assert torch.equal(own[prefix + "proj_in.weight"], theirs.proj_in.weight)
    inner = prefix + "transformer_blocks.0."
    assert torch.equal(own[inner + "attention_blocks.1.to_q.weight"], block.attn2.to_q.weight)
    assert torch.equal(own[inner + "ff_norm.weight"], block.norm3.weight)
    for index in range(2):
        assert torch.equal(own[f"{inner}attention_blocks.{index}.pos_encoder.weight"], block.pos_embed.pe[0])
    assert ("mid_block.motion_modules.0.norm.weight" in own) == middle


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Malicious(), protocol=2), "can't be read"),
        (b"no weights", "can't be read"),
        (b"", "can't be read"),
    ],
)
def test_code_and_rubbish_are_refused_unread(tmp_path, content, message):
    (tmp_path / "evil.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"evil\.ckpt {message}"):
        load_motion_module(str(tmp_path / "evil.ckpt"))


def test_checkpoint_with_an_object_inside_is_refused(tmp_path):
    torch.save({**small(), "config": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt can't be read.*more than weights"):
        load_motion_module(str(tmp_path / "evil.ckpt"))


def test_list_of_tensors_is_refused(tmp_path):
    torch.save([torch.zeros(2), torch.zeros(3)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt"):
        load_motion_module(str(tmp_path / "list.ckpt"))


def zeros(*keys):
    return {key: torch.zeros(1) for key in keys}


def sdxl():
    """Only the weights that tell the sizes."""
    encoding = "transformer_blocks.0.attention_blocks.0.pos_encoder.pe"
    tensors = {}
    for level, width in enumerate(SD15_WIDTHS[:3]):
        for index in range(2):
            module = f"down_blocks.{level}.motion_modules.{index}.temporal_transformer."
            tensors |= {module + "norm.weight": torch.ones(width), module + encoding: torch.zeros(1, 32, width)}
    return tensors


OTHERS = {
    "AnimateDiff v1": lambda: small(motion_config(NARROW_WIDTHS, middle=False, max_frames=24)),
    "AnimateDiff motion module for SDXL": sdxl,
    "AnimateLCM motion": lambda: {key: value for key, value in small().items() if "pos_encoder" not in key},
    "AnimateLCM image-to-video": lambda: small(**zeros("img_encoder.conv.weight")),
    "PIA": lambda: small(V3, **{"conv_in.weight": torch.zeros(32, 9, 3, 3)}),
    "FancyVideo": lambda: small(V3, **zeros("fps_embedding.linear.weight")),
    "MotionCtrl": lambda: small(**zeros(FIRST + "transformer_blocks.0.cc_projection.weight")),
    "CameraCtrl": lambda: zeros("pose_encoder.unshuffle.weight"),
    "Hotshot-XL": lambda: zeros("down_blocks.0.temporal_attentions.0.norm.weight"),
    "LoRA": lambda: zeros(FIRST + "transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight"),
    "SparseCtrl": lambda: small(V3, **zeros("controlnet_down_blocks.0.weight")),
    "a ControlNet": lambda: zeros("control_model.input_hint_block.0.weight"),
    "Stable Video Diffusion": lambda: zeros("model.diffusion_model.input_blocks.1.1.time_stack.0.norm.weight"),
    "a whole checkpoint": lambda: zeros("model.diffusion_model.input_blocks.0.0.weight"),
    "something else": lambda: zeros("encoder.weight"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    path = written(tmp_path, OTHERS[kind](), "stranger.safetensors")
    with pytest.raises(ValueError, match=rf"stranger\.safetensors is .*{kind}.*Load an AnimateDiff v2 or v3"):
        load_motion_module(path)


def without(tensors, part):
    return {key: tensor for key, tensor in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(small(), "up_blocks.1.motion_modules.2.temporal_transformer.proj_out"), "missing weights: up"),
        (without(small(), "down_blocks.1."), r"down_blocks \[0, 2, 3\], with gaps"),
        (without(small(), FIRST + "norm."), "down_blocks.0 lacks its norm"),
        (small(**zeros(FIRST + "gate.weight")), "unknown weights: down_blocks.0.motion_modules.0.gate.weight"),
        (small(**{FIRST + "proj_in.weight": torch.zeros(32, 33)}), "size mismatch for down_blocks.0"),
        (small(**{FIRST + "norm.weight": torch.ones(30)}), "30 channels"),
        (
            small(**{ENCODING: torch.zeros(1, 8, 32)}),
            r"differ in length: \[8, 32\]",
        ),
        (small(**{ENCODING: torch.zeros(())}), r"pos_encoder.weight has the shape \(\), not frames and channels"),
        (small(**{ENCODING: torch.zeros(2, 32, 32)}), r"pos_encoder.weight has the shape \(2, 32, 32\)"),
        (small(**{ENCODING: torch.zeros(1, 0, 32)}), r"pos_encoder.weight has the shape \(0, 32\)"),
        (small(**{FIRST + "norm.weight": torch.ones(())}), "1 channels"),
        (small(**{FIRST + "norm.weight": torch.ones(0)}), "0 channels"),
        (
            small(**{FIRST + "norm.weight": torch.ones(2**20)}),
            r"size mismatch for down_blocks.0.*\(32,\), not \(1048576",
        ),
        (
            small(**zeros("down_blocks." + "1" * 5000 + ".motion_modules.0.norm.weight")),
            "unknown weights: down_blocks.1111",
        ),
        (small(**zeros(*(f"up_blocks.{n}.motion_modules.0.norm.weight" for n in range(20)))), "it has 20 up_blocks"),
        (
            small(**zeros(*(f"up_blocks.0.motion_modules.{n}.norm.weight" for n in range(20)))),
            "up_blocks.0 has 20 motion",
        ),
    ],
)
def test_incomplete_files_say_what_is_wrong(tmp_path, tensors, message):
    path = written(tmp_path, tensors, "broken.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)broken\.safetensors is no complete AnimateDiff.*{message}"):
        load_motion_module(path)


def test_a_pickled_weight_of_more_numbers_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path):
    encodings = {
        key: torch.zeros(1, 1, 1).expand(1, 2**40, tensor.shape[-1]) for key, tensor in small().items() if ".pe" in key
    }
    torch.save(small(**encodings), tmp_path / "vast.ckpt")
    with pytest.raises(ValueError, match=r"vast\.ckpt is no complete.*says \(1099511627776, 32\)"):
        load_motion_module(str(tmp_path / "vast.ckpt"))


def test_names_that_are_no_text_are_no_weights(tmp_path):
    torch.save({**small(), 1: torch.zeros(3)}, tmp_path / "numbered.ckpt")
    assert_same(state(str(tmp_path / "numbered.ckpt")), state(written(tmp_path, small())))


def test_a_first_layer_of_another_shape_is_no_pia(tmp_path):
    tensors = small(**{"conv_in.weight": torch.zeros(())})
    assert_same(state(written(tmp_path, tensors)), state(written(tmp_path, small())))


def test_weights_outside_the_motion_modules_are_left_out_with_a_warning(caplog):
    tensors = small(**zeros("conv_out.weight"))
    assert not any("conv_out" in key for key in motion_weights(tensors, "mixed.ckpt"))
    assert "mixed.ckpt: 1 weights" in caplog.text
    assert read_config(motion_weights(tensors, "mixed.ckpt"), "mixed.ckpt") == V2


def test_loader_node_lists_and_loads_from_the_animatediff_folder(tmp_path, monkeypatch):
    StoryLoadMotionModule.define_schema()
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER_NAME]
    assert any(path.endswith("models/animatediff_models") for path in paths)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER_NAME, ([str(tmp_path)], extensions))
    monkeypatch.delitem(folder_paths.filename_list_cache, FOLDER_NAME, raising=False)
    written(tmp_path, small())
    (tmp_path / "readme.txt").write_text("no weights")
    assert folder_paths.get_filename_list(FOLDER_NAME) == ["module.safetensors"]
    loaded = StoryLoadMotionModule.execute("module.safetensors").result[0]
    assert loaded.model.config == V2
