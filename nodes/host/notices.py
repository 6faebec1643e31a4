"""Words that the canvas shows on a node while and after it runs."""

from __future__ import annotations

import logging
from typing import Any

from server import PromptServer


def tell(hidden: Any, node: str, warning: str, *, otherwise: str) -> None:
    """Show `warning` on the running node and in the log, or, if it is empty, `otherwise` on the node.

    Called on every run, so that an old warning doesn't stay there. `hidden` is the node class's, and holds its
    `unique_id` if a server runs it.
    """
    if warning:
        logging.warning("%s: %s", node, warning)
    if hidden and hidden.unique_id:
        PromptServer.instance.send_progress_text(warning or otherwise, hidden.unique_id)
