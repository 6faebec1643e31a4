"""A real ComfyUI server: start it with this pack, queue API prompts, follow them, stop it for good."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from ..environment.links import link_folder

PACK_ROOT = Path(__file__).resolve().parents[2]
PACKS = {
    "ComfyUI-StoryDiffusion": PACK_ROOT,
    # Loaders for development, no part of the shipped pack.
    "StoryToyWorld": PACK_ROOT / "devtools" / "toy" / "custom_node",
    "StoryTinyNodes": PACK_ROOT / "devtools" / "tiny" / "custom_node",
}
ADDRESS = "127.0.0.1"
READY_TIMEOUT = 300.0
STOP_TIMEOUT = 30.0
LONGEST_RUN = 600.0
LOG_LINES_SHOWN = 40

Prompt = dict[str, dict[str, Any]]
Progress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server did not start, died, or did not answer in time; the message says what to do."""


@dataclass(frozen=True)
class NodeError:
    """One error as the ComfyUI window shows it."""

    node_id: str
    node_class: str
    message: str

    def __str__(self) -> str:
        return f"{self.node_class} (node {self.node_id}): {self.message}"


class PromptError(RuntimeError):
    """The server refused the prompt, or a node of it failed."""

    def __init__(self, errors: list[NodeError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise a ServerError if something listens on the port already."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there, the option would let two servers share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise ServerError(
                f"Port {port} is in use ({error.strerror}). Stop what runs there, or leave out --port: "
                f"a free one is chosen then."
            ) from error


class ComfyServer:
    """A ComfyUI process with this pack and the loaders of the small models in its custom nodes, as a context manager.

    `base` gets the server's own folders (custom_nodes, input, output, user), `models` is its models folder,
    and `log` receives what it prints; None lets it print to the terminal.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        models: Path,
        *,
        cpu: bool,
        port: int | None = None,
        log: Path | None = None,
    ) -> None:
        self.base = base.resolve()
        self.port = free_port() if port is None else port
        self.url = f"http://{ADDRESS}:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(sys.executable, str(comfyui.resolve() / "main.py"), *(["--cpu"] if cpu else [])),
            *("--listen", ADDRESS, "--port", str(self.port)),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *("--base-directory", str(self.base), "--models-directory", str(models.resolve())),
            *("--database-url", f"sqlite:///{self.base / 'comfy.db'}"),
        ]

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; `wait_ready` tells when it answers."""
        check_port(self.port)
        self.base.mkdir(parents=True, exist_ok=True)
        for name, folder in PACKS.items():
            link_folder(self.base / "custom_nodes" / name, folder)
        if self._log is None:
            self._process = subprocess.Popen(self._command, cwd=self.base)
            return
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.base, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        """Number of the running process; ServerError if there is none."""
        if self._process is None:
            raise ServerError("The server isn't running.")
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the server answers; raise a ServerError with the end of its log when it does not."""
        deadline = time.monotonic() + READY_TIMEOUT
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {READY_TIMEOUT:.0f} s.{self._log_tail()}")

    def wait(self) -> int:
        """Wait for the process to end by itself; return its exit status."""
        return 0 if self._process is None else self._process.wait()

    def stop(self) -> None:
        """End the process, first by asking."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log_text(self) -> str:
        """Return what the server printed so far, if it prints to a file."""
        return "" if self._log is None else self._log.read_text(encoding="utf-8", errors="replace")

    def run(self, prompt: Prompt, timeout: float = 600.0, on_progress: Progress | None = None) -> dict[str, Any]:
        """Queue an API-format prompt, wait for its end, return the outputs its nodes report, by node id.

        `on_progress` is called with a node's class, its steps done, and its steps in all.

        Raises:
            PromptError: the prompt was refused, or a node failed; the errors name the node.
            ServerError: the server died, or `timeout` seconds went by.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress), timeout))
        except asyncio.TimeoutError as error:  # the built-in one only from Python 3.11 on
            raise ServerError(f"The prompt did not finish within {timeout:.0f} s.{self._log_tail()}") from error
        except aiohttp.ClientError as error:
            self._check_alive()
            raise ServerError(f"The connection to ComfyUI broke: {error}.{self._log_tail()}") from error

    def wait_for(self, prompt_id: str) -> dict[str, Any]:
        """Return the history entry of a prompt that somebody else has queued, when the server is done with it."""
        deadline = time.monotonic() + LONGEST_RUN
        while time.monotonic() < deadline:
            self._check_alive()
            with urllib.request.urlopen(f"{self.url}/history/{prompt_id}") as response:
                history = json.load(response)
            if prompt_id in history:
                entry: dict[str, Any] = history[prompt_id]
                return entry
            time.sleep(0.5)
        raise ServerError(f"The prompt did not finish within {LONGEST_RUN:.0f} s.{self._log_tail()}")

    def image_paths(self, outputs: dict[str, Any], node_id: str) -> list[Path]:
        """Return the files that a SaveImage node reported in the outputs of `run`, in order."""
        folder = self.base / "output"
        return [folder / image["subfolder"] / image["filename"] for image in outputs[node_id]["images"]]

    async def _run(self, prompt: Prompt, on_progress: Progress | None) -> dict[str, Any]:
        client_id = uuid.uuid4().hex
        timeout = aiohttp.ClientTimeout(total=None)  # `run` has its own
        async with (
            aiohttp.ClientSession(self.url, timeout=timeout) as session,
            session.ws_connect("/ws", params={"clientId": client_id}, max_msg_size=0) as socket_,
        ):
            async with session.post("/prompt", json={"prompt": prompt, "client_id": client_id}) as response:
                answer = await response.json()
            if response.status != 200:
                raise PromptError(_refusals(answer, prompt))
            await _follow(socket_, answer["prompt_id"], prompt, on_progress)
            async with session.get(f"/history/{answer['prompt_id']}") as response:
                history = await response.json()
        outputs: dict[str, Any] = history[answer["prompt_id"]]["outputs"]
        return outputs

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise ServerError(f"ComfyUI ended with status {self._process.returncode}.{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log_text().splitlines()[-LOG_LINES_SHOWN:]
        return "\nIts last lines:\n" + "\n".join(lines) if lines else ""


async def _follow(
    socket_: aiohttp.ClientWebSocketResponse, prompt_id: str, prompt: Prompt, on_progress: Progress | None
) -> None:
    """Read the server's messages until the prompt is done."""
    async for message in socket_:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue  # previews
        event = message.json()
        data = event["data"]
        if data.get("prompt_id") != prompt_id:
            continue
        if event["type"] == "executing" and data["node"] is None:
            return  # the history has the outputs only now, not at execution_success
        if event["type"] == "execution_interrupted":
            raise PromptError([NodeError(data["node_id"], data["node_type"], "interrupted")])
        if event["type"] == "execution_error":
            raise PromptError([NodeError(data["node_id"], data["node_type"], data["exception_message"].strip())])
        if event["type"] == "progress" and on_progress is not None:
            on_progress(prompt[data["node"]]["class_type"], data["value"], data["max"])
    raise aiohttp.ClientConnectionError("the server closed it")


def _refusals(answer: dict[str, Any], prompt: Prompt) -> list[NodeError]:
    """Return the errors of a prompt that failed validation."""
    errors = [
        NodeError(node_id, node["class_type"], f"{error['message']}: {error['details']}")
        for node_id, node in answer["node_errors"].items()
        for error in node["errors"]
    ]
    if errors:
        return errors
    error = answer["error"]
    return [NodeError("", "prompt", f"{error['message']} {error['details']}".strip())]
