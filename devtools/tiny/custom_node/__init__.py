"""A custom-node pack of one node, for development only: a small stand-in for the CLIP vision model.

The host's own loader takes ViT-L and larger, and ViT-H needs 12 GB of memory on a CPU. Link this folder into ComfyUI's
`custom_nodes`; the rest is found beside its real place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import folder_paths
from comfy_api.latest import ComfyExtension, io

DEVTOOLS = Path(__file__).resolve().parents[2]


def _stand_ins() -> ModuleType:
    """The module with small stand-ins, under the pack's alias: the host knows the pack only under its path."""
    if "storydiffusion" not in sys.modules:
        spec = importlib.util.spec_from_file_location("pack_alias", DEVTOOLS / "pack_alias.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{DEVTOOLS} holds no pack_alias.py.")
        alias = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alias)
        alias.register(Path(folder_paths.__file__).parent)
    return importlib.import_module("storydiffusion.devtools.tiny.smp")


class StoryTinyCLIPVision(io.ComfyNode):
    """Stands in for Load CLIP Vision."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Output only."""
        return io.Schema(
            node_id="StoryTinyCLIPVision",
            display_name="Load Tiny CLIP Vision (development)",
            category="StoryDiffusion/development",
            description="A CLIP vision model with ViT-H's output widths, three layers and random weights.",
            inputs=[],
            outputs=[io.ClipVision.Output()],
            is_dev_only=True,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Make the model; it is the same every time."""
        return io.NodeOutput(_stand_ins().tiny_clip_vision())


class TinyNodesExtension(ComfyExtension):
    """What the host loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The one node."""
        return [StoryTinyCLIPVision]


async def comfy_entrypoint() -> TinyNodesExtension:
    """Called by the host."""
    return TinyNodesExtension()
