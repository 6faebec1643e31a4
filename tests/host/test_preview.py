"""The live preview shows all panels: through the host's own samplers and progress; see also tests/server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
import nodes
import pytest
import torch
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_custom_sampler import SamplerCustom
from PIL import Image
from storydiffusion.nodes.host.preview import PanelGridPreviewer, grid_columns, panel_grid, showing_all_panels
from storydiffusion.tests.helpers.sharing import share

HEIGHT, WIDTH = 8, 16  # of the latents; three such panels stand in one column: 24 x 16


def prompts(rows: int, seed: int = 0) -> list[Any]:
    return [[torch.randn(rows, 77, 768, generator=torch.Generator().manual_seed(seed)), {}]]


class TestGrid:
    @pytest.mark.parametrize(
        ("panels", "size", "columns"),
        [
            (1, (8, 8), 1),
            (2, (8, 8), 2),
            (3, (8, 8), 2),
            (5, (8, 8), 3),
            (16, (8, 8), 4),
            (3, (8, 16), 1),
            (4, (16, 8), 4),
        ],
    )
    def test_columns_that_make_panels_largest_in_a_square(
        self, panels: int, size: tuple[int, int], columns: int
    ) -> None:
        assert grid_columns(panels, *size) == columns

    def test_panels_lie_in_reading_order_and_the_rest_is_zero(self) -> None:
        latents = torch.randn(5, 4, 2, 3)
        sheet = panel_grid(latents, 64)
        assert sheet.shape == (1, 4, 3 * 2, 2 * 3)
        for panel in range(5):
            row, column = divmod(panel, 2)
            assert torch.equal(sheet[0, :, row * 2 : row * 2 + 2, column * 3 : column * 3 + 3], latents[panel])
        assert not sheet[0, :, 4:, 3:].any()

    def test_a_single_panel_stays_as_it_is(self) -> None:
        latents = torch.randn(1, 4, 64, 64)
        assert panel_grid(latents, 8) is latents

    @pytest.mark.parametrize("panels", [2, 7, 64])
    def test_a_sheet_is_never_larger_than_asked(self, panels: int) -> None:
        latents = torch.ones(panels, 4, 16, 12)
        sheet = panel_grid(latents, 40)
        assert max(sheet.shape[-2:]) <= 40
        columns = grid_columns(panels, 16, 12)
        assert sheet.shape[-1] % columns == 0
        assert sheet[0, :, 0, 0].tolist() == [1.0] * 4


@pytest.fixture
def previews() -> Iterator[list[Image.Image]]:
    """Every preview that the host would send, as its previewer made it; previews are on meanwhile."""
    images: list[Image.Image] = []

    def keep(value: int, total: int, preview: Any, node_id: str | None = None) -> None:
        if preview is not None:
            images.append(preview[1])

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(keep)
    latent_preview.set_preview_method("latent2rgb")
    yield images
    latent_preview.set_preview_method("default")
    comfy.utils.set_progress_bar_global_hook(before)


def draw(model: Any, panels: int = 3, steps: int = 2) -> torch.Tensor:
    latent = {"samples": torch.zeros(panels, 4, HEIGHT, WIDTH)}
    return nodes.common_ksampler(model, 5, steps, 5.0, "euler", "normal", prompts(panels), prompts(1), latent)[0][
        "samples"
    ]


def rgb(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the host's previewer shows for each of `latents` (B, 4, H, W), as (B, H, W, 3)."""
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    shown = [previewer.decode_latent_to_preview_image("JPEG", latents[row : row + 1])[1] for row in range(len(latents))]
    return torch.stack([pixels(image) for image in shown])


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


def custom_sampling(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and denoised latents of SamplerCustom, whose callback also keeps the result."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)[:3]
    out, denoised = SamplerCustom.execute(
        model,
        add_noise=True,
        noise_seed=5,
        cfg=5.0,
        positive=prompts(3),
        negative=prompts(1),
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=sigmas,
        latent_image={"samples": torch.zeros(3, 4, HEIGHT, WIDTH)},
    ).result
    return out["samples"], denoised["samples"]


@pytest.mark.slow
def test_every_step_shows_all_panels(tiny_sd15: tuple, previews: list[Image.Image]) -> None:
    draw(share(tiny_sd15[0]))
    assert [image.size for image in previews] == [(WIDTH, 3 * HEIGHT)] * 2
    draw(tiny_sd15[0])
    assert [image.size for image in previews[2:]] == [(WIDTH, HEIGHT)] * 2  # without this pack: the first panel


@pytest.mark.slow
def test_the_sheet_is_made_of_the_panels_previews_and_results_stay(
    tiny_sd15: tuple, previews: list[Image.Image]
) -> None:
    model = tiny_sd15[0]
    patched = share(model)
    out, denoised = custom_sampling(patched)
    shown = pixels(previews[-1]).unflatten(0, (3, HEIGHT))
    assert torch.equal(shown, rgb(model, model.model.process_latent_in(denoised)))
    assert len({panel.numpy().tobytes() for panel in shown}) == 3
    latent_preview.set_preview_method("none")
    unseen, unseen_denoised = custom_sampling(patched)
    assert torch.equal(out, unseen)
    assert torch.equal(denoised, unseen_denoised)
    assert denoised.shape == out.shape


@pytest.mark.slow
def test_windows_are_shown_together(tiny_sd15: tuple, previews: list[Image.Image]) -> None:
    draw(share(tiny_sd15[0], window=2), panels=4, steps=1)
    assert [image.size for image in previews] == [(2 * WIDTH, 2 * HEIGHT)]


def test_nothing_is_shown_when_previews_are_off(tiny_sd15: tuple, previews: list[Image.Image]) -> None:
    latent_preview.set_preview_method("none")
    draw(share(tiny_sd15[0]), steps=1)
    assert not previews


def test_the_samplers_own_callback_is_not_touched(tiny_sd15: tuple, previews: list[Image.Image]) -> None:
    results: dict[str, torch.Tensor] = {}
    callback = latent_preview.prepare_callback(tiny_sd15[0], 1, results)
    shown = showing_all_panels(callback)
    latents = torch.randn(3, 4, HEIGHT, WIDTH)
    shown(0, latents, latents, 1)
    assert results["x0"] is latents
    callback(0, latents, latents, 1)
    assert [image.size for image in previews] == [(WIDTH, 3 * HEIGHT), (WIDTH, HEIGHT)]
    assert showing_all_panels(shown) is shown  # samplers within samplers


def test_other_callbacks_stay_as_they_are(tiny_sd15: tuple) -> None:
    def keep(step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        kept.append(x0)

    kept: list[torch.Tensor] = []
    assert showing_all_panels(keep) is keep
    assert showing_all_panels(None) is None
    assert showing_all_panels(kept.append) == kept.append
    off = latent_preview.prepare_callback(tiny_sd15[0], 1)  # previews are off by default
    assert showing_all_panels(off) is off


@pytest.mark.parametrize("panels", [1, 2, 4, 9])
def test_a_decoder_is_given_no_more_than_one_panels_size(panels: int) -> None:
    """TAESD makes 8 x 8 pixels of a latent one: all panels together cost it what the host's single one does."""
    previewer = latent_preview.TAESDPreviewerImpl(TAESD(latent_channels=4))
    latents = torch.randn(panels, 4, 18, 12)
    with torch.inference_mode():
        _, host, _ = previewer.decode_latent_to_preview_image("JPEG", latents)
        _, sheet, _ = PanelGridPreviewer(previewer).decode_latent_to_preview_image("JPEG", latents)
    assert host.size == (12 * 8, 18 * 8)
    assert max(sheet.size) <= 18 * 8
    assert min(sheet.size) >= 8 * 8
