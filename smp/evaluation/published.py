"""The figures that StoryDiffusion's paper (arXiv 2405.01434) publishes."""

from __future__ import annotations

VIDEO = {
    "SEINE": {"LPIPS-first": 0.4332, "LPIPS-frames": 0.2220, "CLIPSIM-first": 0.9259, "CLIPSIM-frames": 0.9736},
    "SparseCtrl": {"LPIPS-first": 0.4913, "LPIPS-frames": 0.1768, "CLIPSIM-first": 0.9032, "CLIPSIM-frames": 0.9756},
    "StoryDiffusion": {
        "LPIPS-first": 0.3794,
        "LPIPS-frames": 0.1635,
        "CLIPSIM-first": 0.9606,
        "CLIPSIM-frames": 0.9870,
    },
}
"""Transitions, about 1000 test videos."""

IMAGES = {
    "IP-Adapter": {"text-image": 0.6129, "character": 0.8802},
    "PhotoMaker": {"text-image": 0.6541, "character": 0.8924},
    "StoryDiffusion": {"text-image": 0.6586, "character": 0.8950},
}
"""Panels of 20 characters in 100 activities on SDXL, DDIM 50, guidance 5."""
