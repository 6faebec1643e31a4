"""ComfyUI-StoryDiffusion: the same characters in every panel of a story, and video from panel to panel."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"  # docs/<node_id>.md: the help page of each node


class StoryDiffusionExtension(ComfyExtension):  # noqa: D101
    async def get_node_list(self) -> list[type[io.ComfyNode]]:  # noqa: D102
        return NODES


async def comfy_entrypoint() -> StoryDiffusionExtension:  # noqa: D103
    return StoryDiffusionExtension()
