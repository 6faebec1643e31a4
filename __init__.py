"""ComfyUI-StoryDiffusion: the same characters in every panel of a story, and video from panel to panel."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .nodes.attention_nodes import StoryApplyConsistentSelfAttention
from .nodes.conditioning_nodes import StoryEncodePrompts
from .nodes.story_nodes import StoryContactSheet, StoryPromptSplitter

WEB_DIRECTORY = "./web"  # docs/<node_id>.md: the help page of each node


class StoryDiffusionExtension(ComfyExtension):
    """The pack's nodes."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StoryPromptSplitter, StoryEncodePrompts, StoryApplyConsistentSelfAttention, StoryContactSheet]


async def comfy_entrypoint() -> StoryDiffusionExtension:
    """Entry point of ComfyUI's V3 schema."""
    return StoryDiffusionExtension()
