"""Make the shipped workflows' UI files from their API twins, in the real front end.

`storydiffusion.devtools.workflows.layout [NAME ...]` loads workflows/api/NAME.json (without a name: each), arranges the
nodes as `layouts.json` says, and writes workflows/NAME.json. Inputs that a node has got since are added to the twin,
with their defaults. A screenshot goes to output/.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..drivers.browser import FrontEnd, find_chromium, open_front_end
from ..drivers.server import PACK_ROOT, ComfyServer, Prompt
from .shipped import WORKFLOWS, api_workflow_names, load_api_workflow

LAYOUTS = Path(__file__).with_name("layouts.json")
MODEL_LINKS = Path(__file__).with_name("model_links.json")
LINE_LENGTH = 100

# Columns from left to right, nodes stacked in each; a group is drawn around the columns that name it.
ARRANGE = """async (layout) => {
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
    api = load_api_workflow(name)
    front_end.page.evaluate("([api, name]) => app.loadApiJson(api, name)", [api, name])
    front_end.page.wait_for_function("(ids) => ids.every((id) => app.graph.getNodeById(id))", arg=list(api))
    front_end.page.wait_for_timeout(1000)  # widgets settle
    text = front_end.page.evaluate(ARRANGE, layout)
    workflow: dict[str, Any] = json.loads(text)
    link_models(workflow, json.loads(MODEL_LINKS.read_text(encoding="utf-8")))
    return workflow


def link_models(workflow: dict[str, Any], links: dict[str, dict[str, str]]) -> None:
    """Tell each loader where its file comes from: the front end offers to download what is missing."""
    for node in workflow["nodes"]:
        files = [value for value in node.get("widgets_values") or [] if value in links]
        if files:
            node["properties"]["models"] = [{"name": name, **links[name]} for name in files]


def with_new_inputs(twin: Prompt, sent: Prompt) -> Prompt:
    """Return the twin with the inputs that the canvas sends: what the twin has stays as written, new ones follow."""
    changed: Prompt = {}
    for node_id, node in twin.items():
        known, current = node["inputs"], sent[node_id]["inputs"]
        kept = {name: value for name, value in known.items() if name in current}
        added = {name: value for name, value in current.items() if name not in known}
        changed[node_id] = {"class_type": node["class_type"], "inputs": {**kept, **added}}
    return changed


def format_api_workflow(prompt: Prompt) -> str:
    """Return the JSON text of an API workflow: the inputs of a node in one line where that is short enough."""
    nodes = []
    for node_id, node in prompt.items():
        inputs = f'    "inputs": {json.dumps(node["inputs"], ensure_ascii=False)}'
        if len(inputs) > LINE_LENGTH:
            entries = [
                f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in node["inputs"].items()
            ]
            inputs = '    "inputs": {\n      ' + ",\n      ".join(entries) + "\n    }"
        nodes.append(f'  "{node_id}": {{\n    "class_type": "{node["class_type"]}",\n{inputs}\n  }}')
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def write_workflow(front_end: FrontEnd, name: str) -> None:
    """Write the UI file, and the API twin with the inputs that its nodes have by now."""
    workflow = make_ui_workflow(front_end, name)
    twin = with_new_inputs(load_api_workflow(name), front_end.api_prompt())
    front_end.page.wait_for_timeout(1000)
    screenshot = PACK_ROOT / "output" / f"{name}.canvas.png"
    front_end.page.screenshot(path=screenshot)
    text = json.dumps(workflow, indent=2, ensure_ascii=False)
    (WORKFLOWS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (WORKFLOWS / "api" / f"{name}.json").write_text(format_api_workflow(twin), encoding="utf-8")
    print(f"wrote {name}: UI file, API twin, and {screenshot}")


def main() -> None:
    executable = find_chromium()
    if executable is None:
        sys.exit("layout: no Chromium is installed.")
    (PACK_ROOT / "output").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        comfyui = Path(os.environ["COMFYUI_PATH"])
        server = ComfyServer(comfyui, base, PACK_ROOT / ".dev" / "models", cpu=True, log=base / "log.txt")
        with server:
            for name in sys.argv[1:] or api_workflow_names():
                with open_front_end(server.url, executable) as front_end:
                    write_workflow(front_end, name)


if __name__ == "__main__":
    main()
