"""The real front end in a real, headless Chromium that is installed already."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "Boolean(window.app?.graph && app.extensionManager && LiteGraph.registered_node_types.KSampler)"
TIMEOUT_MS = 120_000

# A drag and drop as the browser itself would deliver it: three events with the file in their DataTransfer.
DROP = """async ([name, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: 'application/json' }));
    const canvas = document.querySelector('#graph-canvas');
    for (const type of ['dragenter', 'dragover', 'drop']) {
        const where = { clientX: 700, clientY: 400, bubbles: true, cancelable: true };
        canvas.dispatchEvent(new DragEvent(type, { ...where, dataTransfer: transfer }));
    }
}"""

# The veil over the page while it loads a file is taken away when its animation ends. On a busy machine one that is
# wanted and unwanted at once has none that ends, and stays; without an animation it goes at once.
NO_VEIL_ANIMATION = """document.addEventListener('DOMContentLoaded', () => {
    const style = document.createElement('style');
    style.textContent = '.p-overlay-mask { animation: none !important; }';
    document.head.append(style);
});"""


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


class FrontEnd:
    """One page with ComfyUI's canvas; `errors` collects what it reports as errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.set_default_timeout(TIMEOUT_MS)
        page.add_init_script(NO_VEIL_ANIMATION)
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str, settings: Mapping[str, Any] | None = None) -> None:
        """Load the page as one who was here before, without the tour, and wait until nodes can be placed."""
        self.page.request.post(f"{url}/api/settings", data={"Comfy.TutorialCompleted": True, **(settings or {})})
        self.page.goto(url)
        self.page.wait_for_function(READY)

    def drop_file(self, path: Path, node_type: str) -> None:
        """Drop a workflow file on the canvas and wait until its node of type `node_type` is there."""
        self.page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
        self.page.wait_for_function("(type) => app.graph.nodes.some((node) => node.type === type)", arg=node_type)

    def set_widgets(self, node_type: str, values: dict[str, Any]) -> None:
        """Set widgets of every node of this type, as typing into them would."""
        changed = self.page.evaluate(
            """([type, values]) => app.graph.nodes.filter((node) => node.type === type).map((node) => {
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find((widget) => widget.name === name);
                    widget.value = value;
                    widget.callback?.(value, app.canvas, node);
                }
            }).length""",
            [node_type, values],
        )
        if not changed:
            raise ValueError(f"There is no {node_type} on the canvas.")

    def api_prompt(self) -> dict[str, Any]:
        """Return what the canvas would queue, in API format."""
        result: dict[str, Any] = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return result

    def queue(self) -> str:
        """Press the queue button; return the id of the prompt that the server accepted."""
        with self.page.expect_response(lambda response: response.url.endswith("/prompt")) as answer:
            self.page.get_by_test_id("queue-button").click()
        if answer.value.status != 200:
            raise RuntimeError(f"The server refused what the canvas sent: {answer.value.text()}")
        prompt_id: str = answer.value.json()["prompt_id"]
        return prompt_id


@contextmanager
def open_front_end(url: str, executable: str, settings: Mapping[str, Any] | None = None) -> Iterator[FrontEnd]:
    """Open ComfyUI's page at `url`, with these of its settings changed on the server."""
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            front_end = FrontEnd(browser.new_page(viewport={"width": 1600, "height": 1000}))
            front_end.open(url, settings)
            yield front_end
        finally:
            browser.close()
