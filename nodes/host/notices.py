"""Words that the canvas shows on a node while and after it runs."""

from __future__ import annotations

from typing import Any

from server import PromptServer


def show_on_node(hidden: Any, text: str) -> None:
    """Show `text` on the running node; `hidden` is its class's, and holds its `unique_id` if a server runs it."""
    if hidden and hidden.unique_id:
        PromptServer.instance.send_progress_text(text, hidden.unique_id)
