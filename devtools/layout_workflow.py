"""Make a shipped workflow's UI file from its API twin, in the real front end.

`storydiffusion.devtools.layout_workflow NAME` loads workflows/api/NAME.json, arranges the nodes as
devtools/layouts.json says, and writes workflows/NAME.json, and a screenshot to output/.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from .browser import FrontEnd, find_chromium, open_front_end
from .server import PACK_ROOT, ComfyServer
from .workflows import WORKFLOWS, load_api_workflow

LAYOUTS = Path(__file__).with_name("layouts.json")

# Columns from left to right, nodes stacked in each; a group is drawn around the columns that name it.
ARRANGE = """async ([api, name, layout]) => {
    await app.loadApiJson(api, name);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    const [gapX, gapY, margin, titleHeight] = [60, 40, 24, 34];
    const offset = [140, 200];
    let x = 0;
    for (const group of layout.groups) {
        const left = x, placed = [];
        let bottom = 0;
        for (const column of group.columns) {
            let y = 0, width = 0;
            for (const entry of column) {
                let node;
                if (entry.note) {
                    node = LiteGraph.createNode('MarkdownNote');
                    app.graph.add(node);
                    node.widgets[0].value = entry.note.join('\\n');
                    node.color = '#432';
                    node.bgcolor = '#653';
                } else {
                    node = app.graph.getNodeById(entry.node);
                }
                const control = node.widgets?.find((widget) => widget.name === 'control_after_generate');
                if (control) control.value = 'fixed';
                if (entry.title) node.title = entry.title;
                const least = node.computeSize();
                node.setSize([Math.max(entry.width ?? 0, least[0]), Math.max(entry.height ?? 0, least[1])]);
                node.pos = [x, y + LiteGraph.NODE_TITLE_HEIGHT];
                y += node.size[1] + LiteGraph.NODE_TITLE_HEIGHT + gapY;
                width = Math.max(width, node.size[0]);
                placed.push(node);
            }
            bottom = Math.max(bottom, y - gapY);
            x += width + gapX;
        }
        const box = new LiteGraph.LGraphGroup(group.title);
        box.pos = [left - margin, -margin - titleHeight];
        box.size = [x - gapX - left + 2 * margin, bottom + 2 * margin + titleHeight];
        box.color = group.color;
        app.graph.add(box);
        x += margin;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
    app.canvas.ds.scale = layout.scale;
    app.canvas.ds.offset = offset;
    app.canvas.setDirty(true, true);
    const result = app.graph.serialize();
    result.extra = { ds: { scale: layout.scale, offset } };
    return JSON.stringify(result);
}"""


def make_ui_workflow(front_end: FrontEnd, name: str) -> dict[str, Any]:
    """Return the UI format of the API workflow, arranged, with its notes."""
    layout = json.loads(LAYOUTS.read_text(encoding="utf-8"))[name]
    text = front_end.page.evaluate(ARRANGE, [load_api_workflow(name), name, layout])
    workflow: dict[str, Any] = json.loads(text)
    return workflow


def main() -> None:
    name = sys.argv[1]
    executable = find_chromium()
    if executable is None:
        sys.exit("layout_workflow: no Chromium is installed.")
    screenshot = PACK_ROOT / "output" / f"{name}.canvas.png"
    screenshot.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        comfyui = Path(os.environ["COMFYUI_PATH"])
        server = ComfyServer(comfyui, base, PACK_ROOT / ".dev" / "models", cpu=True, log=base / "log.txt")
        with server, open_front_end(server.url, executable) as front_end:
            workflow = make_ui_workflow(front_end, name)
            front_end.page.wait_for_timeout(1000)
            front_end.page.screenshot(path=screenshot)
    target = WORKFLOWS / f"{name}.json"
    target.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {target} and {screenshot}")


if __name__ == "__main__":
    main()
