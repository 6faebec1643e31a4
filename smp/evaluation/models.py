"""The models behind LPIPS and CLIPSIM, from local files; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import lpips
import open_clip
import torch
from open_clip.factory import load_state_dict
from torch import Tensor, nn

from ..encoder import PAPER_MODEL, OpenCLIPEncoder

LPIPS_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
"""torchvision's ImageNet weights, which LPIPS's own layers (part of the package) were fitted to."""

BATCH = 16
"""Pictures that a model sees at a time, so that memory does not grow with the length of a video."""


class LPIPS:
    """The `lpips` package's distance, its trunk's weights from a file of torchvision.

    Args:
        trunk: torchvision's ImageNet weights of the network; see `LPIPS_FILES`.
        net: "alex", which most papers report, or "vgg".
        device: where it runs.

    Raises:
        ValueError: no such file, or weights of another network.
    """

    def __init__(self, trunk: Path, net: str = "alex", device: torch.device | str = "cpu") -> None:
        """Loads the weights."""
        if net not in LPIPS_FILES:
            raise ValueError(f"net is {net!r}; it must be one of {sorted(LPIPS_FILES)}.")
        if not trunk.is_file():
            raise ValueError(f"There is no file {trunk}; LPIPS needs torchvision's {LPIPS_FILES[net]}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision with arguments of its day
            # A random trunk is the package's way of not downloading one.
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_trunk(self.model.net, torch.load(trunk, map_location="cpu", weights_only=True), trunk.name)
        self.device = torch.device(device)
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: (N, H, W, 3) in [0, 1] twice -> (N,)."""
        parts = zip(a.split(BATCH), b.split(BATCH), strict=True)
        return torch.cat([self._of_batch(first, second) for first, second in parts])

    def _of_batch(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = (images.movedim(-1, 1).to(self.device, torch.float32) * 2 - 1 for images in (a, b))
        return self.model(first, second).flatten().cpu()


def _load_trunk(trunk: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Fill the package's slices (`slice2.3.weight`) from torchvision's layers (`features.3.weight`)."""
    state = trunk.state_dict()
    for key in state:
        source = f"features.{key.partition('.')[2]}"
        if source not in weights or weights[source].shape != state[key].shape:
            raise ValueError(f"{name} has no {source} of shape {tuple(state[key].shape)}; it is of another network.")
        state[key] = weights[source]
    trunk.load_state_dict(state)


class CLIPScorer:
    """An open_clip model: embeddings of pictures and of texts.

    Args:
        weights: open_clip weights file with both towers.
        model: name of the architecture.
        device: where it runs.

    Raises:
        ValueError: no such file, or one of another architecture.
    """

    def __init__(self, weights: Path, model: str = PAPER_MODEL, device: torch.device | str = "cpu") -> None:
        """Loads the weights."""
        if not weights.is_file():
            raise ValueError(f"There is no open_clip weights file at {weights}.")
        clip = open_clip.create_model(model, pretrained=None, load_weights=False)
        try:
            clip.load_state_dict(load_state_dict(str(weights), weights_only=True))
        except RuntimeError as error:
            raise ValueError(f"{weights.name} does not fit open_clip's {model}: {error}") from error
        self.device = torch.device(device)
        self.clip = clip.to(self.device).eval()
        self.images = OpenCLIPEncoder(clip.visual).to(self.device)
        self.tokenizer = open_clip.get_tokenizer(model)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) in [0, 1] -> (N, E); the centre square of each."""
        return torch.cat([self.images(part.to(self.device)).image_embeds.cpu() for part in images.split(BATCH)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E)."""
        return self.clip.encode_text(self.tokenizer(list(texts)).to(self.device)).float().cpu()
