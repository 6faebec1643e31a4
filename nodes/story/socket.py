"""The socket type by which nodes hand a story to each other."""

from __future__ import annotations

from comfy_api.latest import io

StoryType = io.Custom("STORYDIFFUSION_STORY")
"""Carries a `model.Story`."""
