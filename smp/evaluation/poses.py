"""Keypoints of people, by torchvision's Keypoint R-CNN from a local file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import keypointrcnn_resnet50_fpn

from .image_scores import Pose

WEIGHTS_FILE = "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"
LEAST_SCORE = 0.7  # detections below are often not people
LEAST_KEYPOINT_SCORE = 2.0  # of the heatmap, before any softmax: Detectron, the model's first home, draws those above


class PoseReader:
    """17 COCO keypoints of the most certain person in a picture.

    Args:
        weights: torchvision's file.
        device: where it runs.

    Raises:
        ValueError: no such file, or weights of another network.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """Loads the weights."""
        if not weights.is_file():
            raise ValueError(f"There is no file {weights}; poses need torchvision's {WEIGHTS_FILE}.")
        model = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise ValueError(f"{weights.name} is not torchvision's Keypoint R-CNN: {error}") from error
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def read(self, image: Tensor) -> Pose | None:
        """(H, W, 3) in [0, 1] -> 17 keypoints in pixels, or None when there is no person."""
        found = self.model([image.movedim(-1, 0).to(self.device)])[0]
        if not len(found["scores"]) or found["scores"][0] < LEAST_SCORE:
            return None
        visible = found["keypoints_scores"][0] > LEAST_KEYPOINT_SCORE
        return Pose(found["keypoints"][0, :, :2].cpu(), visible.cpu())
