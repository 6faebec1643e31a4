"""The socket types by which nodes hand an SMP and its predictions to each other."""

from __future__ import annotations

from comfy_api.latest import io

SMPType = io.Custom("STORYDIFFUSION_SMP")
"""Carries a `loading.LoadedSMP`."""

SMPEmbedsType = io.Custom("STORYDIFFUSION_SMP_EMBEDS")
"""Carries a `predict.SMPEmbeds`."""
