"""A custom-node pack of two nodes, for development only: they load the toy world's model and its image encoder.

Link or copy nothing but this folder's path into ComfyUI's `custom_nodes`; the rest is found beside its real place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from comfy_api.latest import ComfyExtension, io

_TOY = Path(__file__).resolve().parent.parent
_NAME = "storydiffusion_toy"


def _toy_module(name: str) -> ModuleType:
    """A module of the folder above, as a package: the host knows this folder alone, under its path."""
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            _NAME, _TOY / "__init__.py", submodule_search_locations=[str(_TOY)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{_TOY} holds no toy world.")
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    return importlib.import_module(f"{_NAME}.{name}")


class StoryToyLoader(io.ComfyNode):
    """Stands in for the checkpoint loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StoryToyLoader",
            display_name="Load Toy World (development)",
            category="StoryDiffusion/development",
            description=(
                "Loads a tiny diffusion model of a pixel-art world, to try a workflow in seconds on any machine. Draw "
                "at 256 x 256. It knows a man and a woman, six scenes and five poses."
            ),
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_dev_only=True,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load the weights that lie beside the world."""
        return io.NodeOutput(*_toy_module("model").load())


class StoryToyCLIPVision(io.ComfyNode):
    """Stands in for Load CLIP Vision."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Output only."""
        return io.Schema(
            node_id="StoryToyCLIPVision",
            display_name="Load Toy CLIP Vision (development)",
            category="StoryDiffusion/development",
            description="Loads the image encoder of the toy world, which the toy world's SMP reads panels with.",
            inputs=[],
            outputs=[io.ClipVision.Output()],
            is_dev_only=True,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load the weights that lie beside the world."""
        return io.NodeOutput(_toy_module("vision").load_vision())


class ToyExtension(ComfyExtension):
    """What the host loads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Both nodes."""
        return [StoryToyLoader, StoryToyCLIPVision]


async def comfy_entrypoint() -> ToyExtension:
    """Called by the host."""
    return ToyExtension()
