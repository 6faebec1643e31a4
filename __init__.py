"""ComfyUI-StoryDiffusion: the same characters in every panel of a story, and video from panel to panel."""

from comfy_api.latest import ComfyExtension, io

from .nodes.attention_nodes import StoryApplyConsistentSelfAttention
from .nodes.clip_nodes import StoryJoinClips, StoryPanelPairs
from .nodes.conditioning_nodes import StoryEncodePrompts
from .nodes.motion_nodes import StoryApplyMotionModule, StoryLoadMotionModule
from .nodes.reference_nodes import StoryAddReferencePanels
from .nodes.smp_nodes import StoryApplySMP, StoryLoadSMP, StorySemanticMotionPredictor
from .nodes.story_nodes import StoryContactSheet, StoryPromptSplitter
from .nodes.subject_nodes import StorySetSubjectMasks
from .nodes.video_nodes import StorySMPVideoDecode

WEB_DIRECTORY = "./web"  # docs/<node_id>.md: the help page of each node

NODES: list[type[io.ComfyNode]] = [
    StoryPromptSplitter,
    StoryEncodePrompts,
    StorySetSubjectMasks,
    StoryApplyConsistentSelfAttention,
    StoryAddReferencePanels,
    StoryContactSheet,
    StoryLoadMotionModule,
    StoryApplyMotionModule,
    StoryLoadSMP,
    StorySemanticMotionPredictor,
    StoryApplySMP,
    StorySMPVideoDecode,
    StoryPanelPairs,
    StoryJoinClips,
]


class StoryDiffusionExtension(ComfyExtension):  # noqa: D101
    async def get_node_list(self) -> list[type[io.ComfyNode]]:  # noqa: D102
        return NODES


async def comfy_entrypoint() -> StoryDiffusionExtension:  # noqa: D103
    return StoryDiffusionExtension()
