"""Consistent Self-Attention under the host's samplers, latents and conditioning nodes."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
import torch
from storydiffusion.nodes.host.noise_level import STEP_KEY
from storydiffusion.tests.helpers.sharing import prompts, share

Conditioning = list[Any]


def picture(panels: int = 2) -> torch.Tensor:
    return torch.randn(panels, 4, 8, 8, generator=torch.Generator().manual_seed(8))


def draw(
    model: Any,
    positive: Conditioning | None = None,
    *,
    negative: Conditioning | None = None,
    latent: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sampler: str = "euler",
    steps: int = 1,
    cfg: float = 5.0,
    **options: Any,
) -> torch.Tensor:
    """Two panels by the host's own sampling; after a single step they are the guided prediction itself."""
    given = {"samples": torch.zeros(2, 4, 8, 8) if latent is None else latent}
    if mask is not None:
        given = nodes.SetLatentNoiseMask().set_mask(given, mask)[0]
    positive, negative = positive or prompts(1, 2), negative or prompts(99)
    sampled = nodes.common_ksampler(model, 5, steps, cfg, sampler, "normal", positive, negative, given, **options)
    return sampled[0]["samples"]


def draw_split(
    first: Any,
    second: Any,
    positives: tuple[Conditioning, Conditioning] | None = None,
    *,
    sampler: str = "euler",
    steps: int = 4,
) -> torch.Tensor:
    """The same in two KSampler (Advanced), a model and prompts for each; the first hands its noise on."""
    samples: dict[str, Any] = {"samples": torch.zeros(2, 4, 8, 8)}
    first_positive, second_positive = positives or (prompts(1, 2), prompts(1, 2))
    for model, positive, options in (
        (first, first_positive, ("enable", 0, steps // 2, "enable")),
        (second, second_positive, ("disable", steps // 2, 10000, "disable")),
    ):
        add_noise, start, end, leftover = options
        samples = nodes.KSamplerAdvanced().sample(
            model, add_noise, 5, steps, 5.0, sampler, "normal", positive, prompts(99), samples, start, end, leftover
        )[0]
    return samples["samples"]


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-3)


class StepRecorder:
    """The numbers of the steps that the UNet's calls belong to, and how many conditions each call held."""

    def __init__(self, model: Any) -> None:
        self.unet = model.model.diffusion_model
        self.steps: list[int] = []
        self.conditions: list[int] = []

    def __enter__(self) -> StepRecorder:
        self.hook = self.unet.register_forward_pre_hook(self.note, with_kwargs=True)
        return self

    def note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.steps.append(kwargs["transformer_options"][STEP_KEY].noise_level)
        self.conditions.append(len(kwargs["transformer_options"]["cond_or_uncond"]))

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


@pytest.fixture
def model(tiny_sd15: tuple[Any, Any, Any]) -> Any:
    return tiny_sd15[0]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 4), ("heun", 2), ("dpm_2", 2)])
def test_split_over_two_samplers_equals_one(model: Any, sampler: str, steps: int) -> None:
    """Each sampler is told its own half of the schedule alone; the tokens drawn must be the same all the same."""
    whole = draw(share(model), sampler=sampler, steps=steps)
    split = draw_split(share(model), share(model), sampler=sampler, steps=steps)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)
    assert differ(split, draw_split(model, model, sampler=sampler, steps=steps))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["start", "end"])
def test_start_and_end_mean_the_same_in_a_split_sampling(model: Any, part: str) -> None:
    patched = share(model, **{f"{part}_percent": 0.5})
    whole, split = draw(patched, steps=4), draw_split(patched, patched)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)
    # The half outside is the stock model's: leaving the node out there changes nothing.
    by_hand = draw_split(model, share(model)) if part == "start" else draw_split(share(model), model)
    torch.testing.assert_close(split, by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_ancestral_sampler_that_asks_twice_in_a_step(model: Any) -> None:
    with StepRecorder(model) as record:
        drawn = draw(share(model), sampler="dpmpp_2s_ancestral", steps=3)
    first, second, third = sorted(set(record.steps), reverse=True)
    # It asks a second time at a noise level below the one that the next step starts at.
    assert record.steps == [first, second, second, third, third]
    assert differ(drawn, draw(model, sampler="dpmpp_2s_ancestral", steps=3))


def test_without_guidance_the_negative_has_no_say(model: Any) -> None:
    with StepRecorder(model) as record:
        drawn = draw(share(model), cfg=1.0)
    assert record.conditions == [1]
    assert torch.equal(draw(share(model), negative=prompts(98), cfg=1.0), drawn)
    assert differ(draw(share(model), prompts(1, 3), cfg=1.0)[0], drawn[0])


def test_with_little_memory_the_halves_of_guidance_are_drawn_apart(model: Any) -> None:
    together = draw(share(model))
    hungry = share(model)
    # The host asks the model what a batch takes; one that takes more than there is goes through one by one.
    hungry.add_object_patch("memory_usage_factor", 1e12)
    with StepRecorder(model) as record:
        apart = draw(hungry)
    assert record.conditions == [1, 1]
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


class TestPictureToPicture:
    @pytest.mark.slow
    def test_part_of_the_noise(self, model: Any) -> None:
        drawn = draw(share(model), latent=picture(), denoise=0.5)
        stock = draw(model, latent=picture(), denoise=0.5)
        assert torch.equal(draw(share(model, sampling_rate=0.0), latent=picture(), denoise=0.5), stock)
        assert differ(drawn[0], stock[0])
        assert differ(draw(share(model), prompts(1, 3), latent=picture(), denoise=0.5)[0], drawn[0])
        other = torch.cat([picture()[:1], -picture()[1:]])
        assert differ(draw(share(model), latent=other, denoise=0.5)[0], drawn[0])  # the others' pictures are seen

    def test_half_the_noise_is_the_second_half_of_the_steps(self, model: Any) -> None:
        later = draw(share(model), latent=picture(), steps=4, start_step=2)
        assert torch.equal(draw(share(model), latent=picture(), steps=2, denoise=0.5), later)

    def test_a_mask_per_panel(self, model: Any) -> None:
        """Left half of the first panel, all of the second: what is not masked stays, and is looked at."""
        mask = torch.zeros(2, 64, 64)
        mask[0, :, :32] = 1
        kept = draw(share(model), latent=picture(), mask=mask)
        torch.testing.assert_close(kept[0, :, :, 4:], picture()[0, :, :, 4:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[1], picture()[1], rtol=1e-4, atol=1e-4)
        assert differ(kept[0, :, :, :4], draw(model, latent=picture(), mask=mask)[0, :, :, :4])
        other = torch.cat([picture()[:1], -picture()[1:]])
        changed = draw(share(model), latent=other, mask=mask)
        assert differ(changed[0, :, :, :4], kept[0, :, :, :4])
        torch.testing.assert_close(changed[0, :, :, 4:], kept[0, :, :, 4:], rtol=1e-4, atol=1e-4)


class TestConditioning:
    """The host's nodes that put several prompts on one picture, with a row for each panel."""

    @pytest.mark.slow
    def test_combined_prompts(self, model: Any) -> None:
        combined = nodes.ConditioningCombine().combine(prompts(1, 2), prompts(4, 5))[0]
        drawn = draw(share(model), combined)
        # The host averages the predictions of both, and each of them shares within itself.
        parts = [draw(share(model), positive, cfg=1.0) for positive in (prompts(1, 2), prompts(4, 5))]
        torch.testing.assert_close(draw(share(model), combined, cfg=1.0), sum(parts) / 2, rtol=1e-3, atol=1e-3)
        assert torch.equal(draw(share(model, sampling_rate=0.0), combined), draw(model, combined))
        other = nodes.ConditioningCombine().combine(prompts(1, 2), prompts(4, 6))[0]
        assert differ(draw(share(model), other)[0], drawn[0])

    @pytest.mark.slow
    def test_a_prompt_for_an_area(self, model: Any) -> None:
        """The UNet sees the area alone, so tokens are shared within it: outside, nothing changes."""

        def with_area(*numbers: int) -> Conditioning:
            area = nodes.ConditioningSetArea().append(prompts(*numbers), 32, 64, 32, 0, 1.0)[0]
            return nodes.ConditioningCombine().combine(prompts(1, 2), area)[0]

        drawn, changed = (draw(share(model), with_area(*numbers), cfg=1.0) for numbers in ((4, 5), (4, 6)))
        assert differ(changed[0, :, :, 4:], drawn[0, :, :, 4:])
        assert torch.equal(changed[0, :, :, :4], drawn[0, :, :, :4])
        assert torch.equal(
            draw(share(model, sampling_rate=0.0), with_area(4, 5), cfg=1.0), draw(model, with_area(4, 5), cfg=1.0)
        )

    @pytest.mark.slow
    def test_a_prompt_for_part_of_the_steps(self, model: Any) -> None:
        """One prompt for the first half and one for the second are two samplers with a prompt each."""
        halves = [
            nodes.ConditioningSetTimestepRange().set_range(prompts(1, 2), 0.0, 0.4)[0],
            nodes.ConditioningSetTimestepRange().set_range(prompts(4, 5), 0.4, 1.0)[0],
        ]
        one = draw(share(model), nodes.ConditioningCombine().combine(*halves)[0], steps=4)
        two = draw_split(share(model), share(model), (prompts(1, 2), prompts(4, 5)))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_a_prompt_behind_a_prompt(self, model: Any) -> None:
        def behind(*numbers: int) -> Conditioning:
            return nodes.ConditioningConcat().concat(prompts(1, 2), prompts(*numbers))[0]

        drawn = draw(share(model), behind(4, 5))
        assert torch.equal(draw(share(model, sampling_rate=0.0), behind(4, 5)), draw(model, behind(4, 5)))
        assert differ(draw(share(model), behind(4, 6))[0], drawn[0])
        assert differ(draw(share(model))[0], drawn[0])
