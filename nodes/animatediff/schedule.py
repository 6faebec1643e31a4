"""AnimateDiff's noise schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from comfy.model_sampling import ModelSamplingDiscrete

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

LINEAR_BETAS = "linear (AnimateDiff)"
MODEL_BETAS = "from the model"


def linear_beta_sampling(model: ModelPatcher) -> ModelSamplingDiscrete:
    """The model's noise schedule with AnimateDiff's betas: linear from 0.00085 to 0.012, sigma_max 25.1.

    The prediction type and a distilled schedule (LCM) stay what they are. The host calls these betas
    `sqrt_linear`; its `linear` is linear in their square root.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, ModelSamplingDiscrete):
        raise ValueError(
            f"This model samples with {type(current).__mro__[1].__name__}, which has no betas. Set beta_schedule to "
            f"'from the model'."
        )
    settings = {
        **model.model.model_config.sampling_settings,
        "beta_schedule": "sqrt_linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
    }
    # A schedule reads nothing else of a model config, and the host's can't be copied.
    return type(current)(SimpleNamespace(sampling_settings=settings), zsnr=current.zsnr)
