"""The pack's ComfyUI nodes, a folder a feature; README.md says which is which."""

from comfy_api.latest import io

from .animatediff.nodes import StoryApplyMotionModule, StoryLoadMotionModule
from .clips.nodes import StoryJoinClips, StoryPanelPairs
from .consistent_attention.nodes import StoryApplyConsistentSelfAttention
from .motion_predictor.nodes import StoryApplySMP, StoryLoadSMP, StorySemanticMotionPredictor
from .pages.nodes import StoryContactSheet
from .prompts.nodes import StoryEncodePrompts
from .references.nodes import StoryAddReferencePanels
from .story.nodes import StoryPromptSplitter
from .subjects.nodes import StorySetSubjectMasks
from .transition_video.nodes import StorySMPVideoDecode

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
