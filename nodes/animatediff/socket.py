"""The socket type by which nodes hand a motion module to each other."""

from __future__ import annotations

from comfy_api.latest import io

MotionModuleType = io.Custom("STORYDIFFUSION_MOTION_MODULE")
"""Carries the host's ModelPatcher of a `module.MotionModule`."""
